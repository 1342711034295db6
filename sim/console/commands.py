"""Which commands there are: each file of conf/ begins with ``# python -m MODULE: what it does``."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import conf
from sim.errors import ConfigError, nearest

CONF = Path(conf.__file__).resolve().parent
PACKAGES = ("sim", "agents", "hw")
"""The packages with commands; the first that has a name gets the short form of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """A command. module: what ``python -m`` takes. about: one sentence. path: its file in conf/."""

    module: str
    about: str
    path: Path


def commands() -> dict[str, Command]:
    """Return module -> command, in the order of PACKAGES and of names.

    Raises:
        ConfigError: for a file whose first line names no command.
    """
    found = []
    for path in CONF.glob("*.yaml"):
        with path.open(encoding="utf-8") as file:
            first = file.readline().strip()
        named = re.fullmatch(r"# python -m ([\w.]+): (.+)", first)
        if not named:
            raise ConfigError(f"{path} begins with {first!r}; begin it with '# python -m COMMAND: what it does'")
        found.append(Command(module=named[1], about=named[2], path=path))
    found.sort(key=lambda one: (PACKAGES.index(one.module.partition(".")[0]), one.module))
    return {one.module: one for one in found}


def short_names() -> dict[str, Command]:
    """Return short name -> command: the last part of its module; of two with one name, the first package's has it.

    The other keeps its full name: ``replay`` is sim.replay, ``hw.replay`` is itself.
    """
    every = commands()
    found: dict[str, Command] = {}
    for module, command in every.items():
        last = module.rpartition(".")[2]
        found[module if last in found else last] = command
    return found


def find_command(name: str) -> Command:
    """Return the command of a short or full name; ``-`` and ``_`` are the same.

    Raises:
        ConfigError: if there is none, with the nearest name.
    """
    typed, short = name.replace("-", "_"), short_names()
    if found := short.get(typed) or commands().get(typed):
        return found
    raise ConfigError(f"there is no command {name!r}; {nearest(typed, short)}; rap lists all of them")
