"""Every command line that the project shows: in the README, the pages, the help of commands and the experiments."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import yaml

from sim.config import CONF_DIR
from sim.paths import REPOSITORY

PAGES = [
    REPOSITORY / "README.md",
    REPOSITORY / "CONTRIBUTING.md",
    *(REPOSITORY / "docs").glob("*.md"),
    *(REPOSITORY / "docs" / "tasks").glob("*.md"),
]
WALK = REPOSITORY / "docs" / "results" / "walk" / "index.md"
"""Written by tests/bench/walk.py, which ran its lines one after another; later ones need the files of earlier ones."""
RESULTS = [path for path in (REPOSITORY / "docs" / "results").rglob("*.md") if path != WALK]
COMMAND = re.compile(r"python -m [\w.]+(?: (?:'[^']*'|\"[^\"]*\"|[^\s'\"#])+)*")
"""Arguments are separated by one space; a comment or a description follows after more."""


def command_lines(*, results: bool = True) -> list[str]:
    """Return every line that starts a command, once, sorted; those of the pages of results too."""
    found = set()
    for path in [*PAGES, *(RESULTS if results else [])]:
        text = _joined(path.read_text(encoding="utf-8"))
        found |= {_arguments_of(line) for line in re.findall(r"^    (python -m .*)$", text, re.MULTILINE)}
        found |= {_arguments_of(" ".join(span.split())) for span in re.findall(r"`(python -m [^`]+)`", text)}
    for path in CONF_DIR.glob("*.yaml"):
        found |= set(help_lines(path))
    for path in (CONF_DIR / "experiment").glob("*.yaml"):
        found.add(_arguments_of(path.read_text(encoding="utf-8").splitlines()[1].removeprefix("# ")))
    return sorted(found)


def help_lines(path: Path) -> list[str]:
    """Return the command lines in the help of a command."""
    template = yaml.safe_load(path.read_text(encoding="utf-8"))["hydra"]["help"]["template"]
    lines, found = _joined(template).split("\n"), []
    for number, line in enumerate(lines):
        text = line.strip()
        if not re.match(r"(?:- )?python -m ", text):
            continue
        while COMMAND.match(text) and _rest(text).startswith(("'", '"')):  # quotes that end on a later line
            number += 1
            text += " " + lines[number].strip()
        found.append(_arguments_of(text))
    return found


def other_lines() -> list[str]:
    """Return the lines of the pages' code blocks that start something else: curl, pip, make."""
    found = set()
    for path in PAGES:
        text = _joined(path.read_text(encoding="utf-8"))
        found |= {line.strip() for line in re.findall(r"^    ((?:curl|pip|make) .*)$", text, re.MULTILINE)}
    return sorted(found)


def split(line: str) -> tuple[str, list[str]]:
    """Return the command of a line and its arguments, as a shell splits them."""
    command, *arguments = shlex.split(line.removeprefix("python -m "))
    return command, arguments


def unquoted(line: str) -> str:
    """Return a line without its quoted parts."""
    return re.sub(r"'[^']*'|\"[^\"]*\"", "", line)


def _joined(text: str) -> str:
    return re.sub(r"[ ]*\\\n\s*", " ", text)


def _arguments_of(line: str) -> str:
    found = COMMAND.match(line)
    assert found, line
    return found[0]


def _rest(line: str) -> str:
    return line[len(_arguments_of(line)) :].removeprefix(" ")
