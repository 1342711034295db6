"""What a shell offers next on a line that begins with ``rap``: commands, then groups, options and keys.

The scripts ask the hidden command ``rap __complete LINE`` at every press of the key; they are for bash and zsh.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import shlex
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from sim.console.commands import CONF, find_command, short_names
from sim.errors import ConfigError
from sim.plugins import belongs_to, plugin_folders

KEYS = Path(__file__).parent / "keys.json"
ASK = "__complete"
OWN = ("--help", "--version", "completion")
"""What ``rap`` itself takes in place of a command."""
OPTIONS = ("--cfg", "--config-dir", "--help", "--hydra-help", "--info", "--multirun", "--quiet", "--resolve")
"""The options that a command takes: Hydra's, and ``--quiet``."""
LAUNCHER = "hydra/launcher"
LAUNCHER_PACKAGES = {"basic": "hydra", "joblib": "hydra_plugins.hydra_joblib_launcher"}
"""Launchers of ``--multirun`` that are no option of conf/ -> the package that has them."""
CURSOR = "\0"
"""Marks where the cursor is while a line is divided into words."""

BASH = f"""\
_rap() {{
  local line=${{COMP_LINE:0:COMP_POINT}} word
  word=${{line##* }}
  mapfile -t COMPREPLY < <(rap {ASK} "$line" 2>/dev/null)
  # bash may take what is before the last "=" for a word of its own, which stays as it is.
  if [[ $COMP_WORDBREAKS == *=* && $word == *=* ]]; then COMPREPLY=("${{COMPREPLY[@]#"${{word%=*}}="}}"); fi
  if [[ ${{#COMPREPLY[@]}} == 1 && ${{COMPREPLY[0]}} == *[=.] ]]; then compopt -o nospace; fi
}}
complete -o default -F _rap rap"""
ZSH = f"""\
autoload -Uz compinit && (( $+functions[compdef] )) || compinit
_rap() {{
  local -a all ended open
  all=(${{(f)"$(rap {ASK} "${{(j: :)words[1,CURRENT-1]}} $PREFIX" 2>/dev/null)"}})
  (( $#all )) || {{ _files; return }}
  open=(${{(M)all:#*[=.]}})
  ended=(${{all:#*[=.]}})
  (( $#open )) && compadd -S '' -- $open
  (( $#ended )) && compadd -- $ended
}}
compdef _rap rap"""
SCRIPTS = {"bash": BASH, "zsh": ZSH}


def complete(line: str) -> list[str]:
    """Return what may stand in place of the last word of a line, sorted; nothing for a command that does not exist.

    Args:
        line: from ``rap`` to the cursor, with quotes and backslashes as typed; a space at its end begins a new word.
    """
    words = [word for word in _words(line)[1:] if word != "--quiet"]
    if len(words) <= 1:
        return _starting("".join(words), [*short_names(), *OWN])
    name, *typed, word = words
    if name == "completion":
        return _starting(word, SCRIPTS)
    try:
        module = find_command(name).module
    except ConfigError:
        return []
    if typed[-1:] == ["--config-dir"]:
        return []  # the shell completes folders
    known = json.loads(KEYS.read_text(encoding="utf-8"))[module]
    return _starting(word, OPTIONS if word.startswith("-") else _arguments(module, known, typed, word))


def _words(line: str) -> list[str]:
    """Return the words of a line as a shell reads them, the last one up to the cursor; a quote may still be open."""
    for end in ("", "'", '"'):
        with contextlib.suppress(ValueError):
            words = shlex.split(f"{line}{CURSOR}{end}")
            return [word.removesuffix(CURSOR) for word in words]
    return line.split()


def _starting(word: str, offered: Iterable[str]) -> list[str]:
    return sorted({text for text in offered if text.startswith(word)})


def _arguments(module: str, known: Mapping[str, Any], typed: list[str], word: str) -> Iterator[str]:
    """Yield the arguments of a command that may stand in place of a word."""
    groups, keys, own = known["groups"], known["keys"], known["hydra"]
    config_folders, others = _config_folders(typed)
    folders = [CONF, *plugin_folders(), *config_folders]
    key, equals, _ = word.partition("=")
    if equals and (key in groups or (key == LAUNCHER and key in own)):
        files = (path for folder in folders for path in (folder / key).glob("*.yaml"))
        yield from (f"{key}={path.stem}" for path in files if belongs_to(path, module))
        if key == LAUNCHER:
            yield from (f"{key}={name}" for name, package in LAUNCHER_PACKAGES.items() if _installed(package))
    elif equals:
        yield from (f"{key}={value}" for value in ("true", "false") if keys.get(key) == "bool")
    else:
        yield from (f"{name}=" for name in (*groups, *keys, *own))
        yield from () if others else known["first"]
        chosen = dict(pair.split("=", 1) for pair in typed if "=" in pair)
        group = LAUNCHER if word.startswith("hydra.launcher.") else word.partition(".")[0]
        if "." in word and (group in groups or group in own):
            yield from _option_keys(folders, group, chosen.get(group, groups.get(group)))


def _installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # of the package around it
        return False


def _config_folders(typed: list[str]) -> tuple[list[Path], list[str]]:
    """Return the folders of ``--config-dir``, whether they are there or not, and the words that are no KEY=VALUE."""
    folders, others, before = [], [], ""
    for text in typed:
        if before == "--config-dir":
            folders.append(text)
        elif text.startswith("--config-dir="):
            folders.append(text.partition("=")[2])
        elif not text.startswith("-") and "=" not in text:
            others.append(text)
        before = text
    return [Path(text).expanduser() for text in folders], others


def _option_keys(folders: list[Path], group: str, chosen: str | None) -> Iterator[str]:
    """Yield the keys that an option of a group sets, with the group in front."""
    for folder in folders:
        path = folder / group / f"{chosen}.yaml"
        if path.is_file():
            with contextlib.suppress(OSError, UnicodeDecodeError, yaml.YAMLError):  # a broken option has no keys
                yield from _dotted(yaml.safe_load(path.read_text(encoding="utf-8")), f"{group.replace('/', '.')}.")
            return


def _dotted(content: Any, prefix: str) -> Iterator[str]:
    if not isinstance(content, Mapping):
        return
    for key, value in content.items():
        if str(key).startswith("_") or key == "defaults":
            continue
        if isinstance(value, Mapping) and value:
            yield from _dotted(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}="
