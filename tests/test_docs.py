"""Every command line of the README and the pages is one that the command accepts."""

from __future__ import annotations

import re
import shlex

import pytest

pytest.importorskip("ray", reason="the pages show the commands of all packages: pip install -e '.[dev]'")

from sim.config import check_overrides
from sim.paths import REPOSITORY
from sim.reference import commands, page

PAGES = [REPOSITORY / "README.md", *(REPOSITORY / "docs").glob("*.md"), *(REPOSITORY / "docs" / "tasks").glob("*.md")]
EXAMPLE_POLICY = "policy=drop_when_busy"
"""The pages show how to add it."""


def command_lines() -> list[str]:
    """Return what follows ``python -m`` in code blocks and in code spans, without trailing comments."""
    found = set()
    for path in PAGES:
        text = path.read_text(encoding="utf-8").replace("\\\n", " ")
        blocks = re.findall(r"^    python -m (.*)$", text, re.MULTILINE)
        spans = re.findall(r"`python -m ([^`]+)`", text)
        found |= {re.sub(r"\s+(#|->).*$", "", line).strip() for line in blocks + spans}
    return sorted(line for line in found if EXAMPLE_POLICY not in line)


@pytest.fixture(scope="module", autouse=True)
def schemas() -> None:
    """Register the schema of every command, as the page of keys needs them all."""
    page()


@pytest.mark.parametrize("line", command_lines())
def test_every_documented_command_line_has_groups_options_and_keys_that_exist(line: str) -> None:
    command, *arguments = shlex.split(line)
    path = commands().get(command)
    if path is None:
        pytest.skip(f"{command} is not configured by Hydra")
    overrides = [argument for argument in arguments if not argument.startswith("-")]
    check_overrides([override for override in overrides if "=" in override], path.stem)
