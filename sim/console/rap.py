"""``rap COMMAND KEY=VALUE ...``: the same as ``python -m MODULE KEY=VALUE ...``."""

from __future__ import annotations

import importlib.metadata
import runpy
import sys
from collections.abc import Sequence

from sim.console.commands import PACKAGES, find_command, short_names
from sim.console.completion import ASK, SCRIPTS, complete
from sim.errors import ConfigError, nearest

HEAD = """\
rap COMMAND KEY=VALUE GROUP=OPTION     the same as python -m MODULE KEY=VALUE GROUP=OPTION
rap COMMAND --help                     groups and keys of a command
rap --version                          version of the project
eval "$(rap completion bash)"          commands, groups, options and keys are completed; zsh too
"""
TITLES = {"sim": "Simulate", "agents": "Learn and compare", "hw": "Run a real model"}


def main() -> None:
    """Run the command line."""
    if sys.argv[1:2] == [ASK]:  # at every press of a key: without the import of Hydra below
        for text in complete(" ".join(sys.argv[2:])):
            print(text)
        return
    from sim.config.failures import errors_in_one_line

    with errors_in_one_line():
        run(sys.argv[1:])


def run(arguments: Sequence[str]) -> None:
    """Run one command line without its first word.

    Raises:
        ConfigError: for a command, shell or option that does not exist, with the nearest one.
    """
    quiet = ["--quiet"] if arguments[:1] == ["--quiet"] else []  # it may stand before the command, too
    name, *rest = arguments[len(quiet) :] or ["--help"]
    if name in ("--help", "-h", "help"):
        print(overview(), end="")
    elif name == "--version":
        print(f"rap-lab {importlib.metadata.version('rap-lab')}")
    elif name == "completion":
        print(script(rest))
    else:
        module = find_command(name).module
        sys.argv[1:] = [*rest, *quiet]
        runpy.run_module(module, run_name="__main__", alter_sys=True)


def script(shells: Sequence[str]) -> str:
    """Return the script that completes ``rap`` in a shell.

    Raises:
        ConfigError: for no shell, several, or one without a script.
    """
    if len(shells) != 1 or shells[0] not in SCRIPTS:
        named = " ".join(shells)
        raise ConfigError(
            f"rap completion takes one shell, {' or '.join(SCRIPTS)}, not {named!r}; "
            f"{nearest(named, SCRIPTS)}, as in: rap completion bash"
        )
    return SCRIPTS[shells[0]]


def overview() -> str:
    """Return the list of commands, with a sentence on each."""
    parts, short = [HEAD], short_names()
    for package in PACKAGES:
        parts.append(f"{TITLES[package]} ({package})")
        mine = {name: one for name, one in short.items() if one.module.partition(".")[0] == package}
        width = max(map(len, short))
        parts += [f"  {name:<{width}}  {one.about}" for name, one in mine.items()]
        parts.append("")
    return "\n".join(parts)
