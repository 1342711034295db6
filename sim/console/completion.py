"""What a shell offers next on a line that begins with ``rap``: commands, then groups, options and keys.

The scripts ask the hidden command ``rap __complete LINE`` at every press of the key; they are for bash and zsh.
"""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from sim.console.commands import CONF, find_command, short_names
from sim.errors import ConfigError
from sim.plugins import plugin_folders

KEYS = Path(__file__).parent / "keys.json"
ASK = "__complete"
OWN = ("--help", "--version", "completion")
"""What ``rap`` itself takes in place of a command."""
OPTIONS = ("--cfg", "--config-dir", "--help", "--hydra-help", "--info", "--multirun", "--quiet", "--resolve")
"""The options that a command takes: Hydra's, and ``--quiet``."""

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
  all=("${{(@f)$(rap {ASK} "$LBUFFER" 2>/dev/null)}}")
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
        line: from ``rap`` to the cursor; a space at its end begins a new word.
    """
    words = line.split()[1:] + ([""] if line[-1:].isspace() else [])
    if len(words) <= 1:
        return _starting("".join(words), [*short_names(), *OWN])
    name, *typed, word = words
    if name == "completion":
        return _starting(word, SCRIPTS)
    try:
        module = find_command(name).module
    except ConfigError:
        return []
    known = json.loads(KEYS.read_text(encoding="utf-8"))[module]
    return _starting(word, OPTIONS if word.startswith("-") else _arguments(known, typed, word))


def _starting(word: str, offered: Any) -> list[str]:
    return sorted({text for text in offered if text.startswith(word)})


def _arguments(known: Mapping[str, Any], typed: list[str], word: str) -> Iterator[str]:
    """Yield the arguments of a command that may stand in place of a word."""
    groups, keys = known["groups"], known["keys"]
    folders = [CONF, *plugin_folders(), *_config_folders(typed)]
    key, equals, _ = word.partition("=")
    if equals and key in groups:
        yield from (f"{key}={path.stem}" for folder in folders for path in (folder / key).glob("*.yaml"))
    elif equals:
        yield from (f"{key}={value}" for value in ("true", "false") if keys.get(key) == "bool")
    else:
        yield from (f"{name}=" for name in (*groups, *keys))
        group = word.partition(".")[0]
        if group in groups and "." in word:
            chosen = dict(pair.split("=", 1) for pair in typed if "=" in pair).get(group, groups[group])
            yield from _option_keys(folders, group, chosen)


def _config_folders(typed: list[str]) -> list[Path]:
    """Return the folder of ``--config-dir``, if it is there."""
    named = [text.partition("=")[2] for text in typed if text.startswith("--config-dir=")]
    named += [after for text, after in itertools.pairwise(typed) if text == "--config-dir"]
    return [Path(text) for text in named]


def _option_keys(folders: list[Path], group: str, chosen: str | None) -> Iterator[str]:
    """Yield the keys that an option of a group sets, with the group in front."""
    for folder in folders:
        path = folder / group / f"{chosen}.yaml"
        if path.is_file():
            with contextlib.suppress(OSError, UnicodeDecodeError, yaml.YAMLError):  # a broken option has no keys
                yield from _dotted(yaml.safe_load(path.read_text(encoding="utf-8")), f"{group}.")
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
