"""Checks of ``key=value`` before a command starts: the group, option or key exists, and the value has its type."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, Override, OverrideType, QuotedString
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from sim.config.annotations import NUMBER, describe, fits, types_of
from sim.config.arguments import parse_overrides
from sim.config.options import (
    CONF_DIR,
    compose_config,
    folders_of,
    groups_of,
    option_names,
    option_path,
    search_path,
    target,
)
from sim.errors import ConfigError, nearest
from sim.limits import LEAST_TICK_S

LIMITS: Mapping[str, tuple[float, bool, str]] = {
    "tick_s": (LEAST_TICK_S, True, f"at least {LEAST_TICK_S:g} seconds"),
    "window_s": (0.0, False, "above 0 seconds"),
    "fixed_s": (0.0, True, "at least 0 seconds"),
    "host_floor_s": (0.0, True, "at least 0 seconds"),
    "nested_overhead": (0.0, True, "a share of at least 0"),
    "slowdown": (0.01, True, "at least 0.01"),
    "workspace_bytes": (0.0, True, "at least 0 bytes"),
    "workers": (1, True, "at least 1"),
    "seed": (0, True, "at least 0"),
    "minutes": (0.0, False, "above 0"),
}
"""Key, in every command that has it -> smallest value, whether that itself is allowed, and both in words."""
KINDS = {"Float": NUMBER, "Integer": "a whole number", "Boolean": "true or false", "ListConfig": "a list: [a,b]"}
"""What the errors of OmegaConf call types."""


def check_overrides(
    overrides: Sequence[str], config_name: str, config_dir: Path | None = None, *, multirun: bool = True
) -> None:
    """Check that every ``key=value`` names a group, an option or a key that exists, with a value of the right type.

    Args:
        config_dir: a folder with more options, next to conf/.
        multirun: whether one key may have several values.
    Raises:
        ConfigError: with the nearest name that exists, or what is allowed.
    """
    parsed = parse_overrides(overrides, multirun=multirun)
    search = search_path(parsed, config_dir)
    folders = folders_of(compose_config(config_name, search, with_hydra=True)) if search else [CONF_DIR]
    # conf/calibration holds tables by name, not options of a group.
    groups = {path.parent.name for folder in folders for path in folder.glob("*/*.yaml")}
    chosen = []
    for override in parsed:
        key = override.get_key_element().lstrip("+~").split("@")[0]
        if key in groups and not override.is_delete():
            values = [str(value) for value in _values_of(override, option_names(key, folders))]
            for value in values:
                if value not in ("None", "null"):
                    option_path(key, value, folders)
            chosen.append(f"{override.get_key_element()}={values[0]}")
    composed = _compose_chosen(config_name, chosen, search)
    _check_sweep(parsed, composed)
    keys = set(groups_of(composed))
    with open_dict(composed):
        del composed["hydra"]
    keys |= set(_keys(composed))
    changed = []
    for override in parsed:
        key = override.get_key_element().split("@")[0]
        if override.type in (OverrideType.ADD, OverrideType.FORCE_ADD, OverrideType.DEL):
            continue  # the user states that the key is new, or removes it; what is built from it checks it
        if key.split(".")[0].split("/")[0] == "hydra" or key in groups:
            continue
        if key not in keys:
            raise ConfigError(f"there is no key {key!r}; {_nearest_few(key, keys)}")
        changed.append((key, list(_values_of(override, ()))))
    _check_values(composed, changed)


def _check_sweep(parsed: Sequence[Override], composed: DictConfig) -> None:
    """Check that the jobs of a sweep do not write into one folder, where a command names it by ``out`` alone."""
    if "out" not in composed or composed.hydra.run.dir != ".":
        return
    swept = [one.get_key_element() for one in parsed if one.is_sweep_override()]
    out = next((str(one.value()) for one in parsed if one.get_key_element() == "out"), "")
    if swept and swept != ["out"] and "${" not in out:
        key = next(key for key in swept if key != "out")
        raise ConfigError(
            f"{', '.join(swept)} has several values, but all jobs would write into out={out or composed.out}; run them "
            f"one by one, or put the key into the folder: {shlex.quote(f'out=runs/{key}_${{{key}}}')}"
        )


def _compose_chosen(config_name: str, chosen: Sequence[str], search: Sequence[str]) -> DictConfig:
    """Return the configuration with the chosen options of groups.

    Raises:
        ConfigError: for a group that the command does not use.
    """
    try:
        return compose_config(config_name, [*chosen, *search], with_hydra=True)
    except (HydraException, OmegaConfBaseException) as error:
        plain = compose_config(config_name, search, with_hydra=True)
        used = groups_of(plain)
        for name in (text.partition("=")[0] for text in chosen):
            if not name.startswith(("+", "~")) and name.split("@")[0] not in used:
                if OmegaConf.is_dict(plain.get(name)):
                    raise ConfigError(
                        f"this command has no group {name!r}, but keys of that name; set one of them: "
                        + ", ".join(f"{name}.{key}=VALUE" for key in plain[name])
                    ) from error
                known = used or {str(key) for key in plain if key != "hydra"}
                what = "group" if used else "group, and no key,"
                raise ConfigError(f"this command has no {what} {name!r}; {nearest(name, known)}") from error
        raise ConfigError(" ".join(str(error).split())) from error


def _values_of(override: Override, names: Sequence[str]) -> Iterator[Any]:
    """Yield the values of an override: several of a sweep; none of one whose values only a sweeper knows."""
    value: Any = override.value()
    if isinstance(value, Glob):
        yield from value.filter(list(names))
    elif override.is_discrete_sweep():
        for text in override.sweep_string_iterator():
            yield OverridesParser.create().parse_override(f"key={text}").value()
    elif not override.is_sweep_override():
        yield str(value) if isinstance(value, QuotedString) else value


def _check_values(cfg: DictConfig, changed: Sequence[tuple[str, Sequence[Any]]]) -> None:
    """Check each value of each key against the type that the command or a target states, before anything starts."""
    for key, values in changed:
        before = OmegaConf.select(cfg, key, throw_on_missing=False)
        for value in values:
            _check_dots(cfg, key, value)
            _check_kind(key, value, before)
            try:
                # As Hydra does: a mapping of some keys keeps the others.
                OmegaConf.update(cfg, key, value, merge=isinstance(value, Mapping))
            except OmegaConfBaseException as error:
                raise ConfigError(_type_error(key, value, error)) from error
            if key in LIMITS:
                _check_limit(key, value)
            _check_target_of(cfg, key)


def _check_dots(cfg: DictConfig, key: str, value: Any) -> None:
    """Check that a key does not go on below one whose own keys hold dots, such as those of a window or a policy."""
    parts = key.split(".")
    for at in range(len(parts) - 1, 0, -1):
        above, name = ".".join(parts[:at]), ".".join(parts[at:])
        node = OmegaConf.select(cfg, above, throw_on_missing=False)
        if OmegaConf.is_dict(node):
            if "." in name and name in node:
                remedy = shlex.quote(f"{above}={{{name}: {value}}}")
                raise ConfigError(f"{key}: {name} is one key of {above}; to change it and keep the others: {remedy}")
            return


def _check_kind(key: str, value: Any, before: Any) -> None:
    """Check that no text replaces a number, a list or a mapping.

    For this, unlike for the type that a target states, nothing needs to be imported, which can take seconds.
    """
    if isinstance(value, str) and "${" in value:
        return
    if isinstance(before, bool) and value is not None and not isinstance(value, bool):
        raise ConfigError(f"{key} is {value!r}; it must be true or false")
    if isinstance(before, int | float) and not isinstance(before, bool) and isinstance(value, str | bool):
        raise ConfigError(f"{key} is {value!r}; it must be {NUMBER}, such as {before}")
    if OmegaConf.is_config(before) and isinstance(value, str | bool):
        numbers = len(before) and all(isinstance(one, int | float) or OmegaConf.is_list(one) for one in before)
        kind = "a mapping" if OmegaConf.is_dict(before) else f"{NUMBER} or a list" if numbers else "a list"
        example = str(before).replace("'", "")
        raise ConfigError(f"{key} is {value!r}; it must be {kind}{f', such as {example}' if len(before) else ''}")
    if OmegaConf.is_dict(before) and isinstance(value, Mapping) and OmegaConf.is_struct(before):
        for name in value:
            if name not in before:
                raise ConfigError(
                    f"{key} has no {str(name)!r}; {nearest(str(name), map(str, before))}; to add it: "
                    f"{shlex.quote(f'+{key}.{name}=VALUE')}"
                )


def _type_error(key: str, value: Any, error: Exception) -> str:
    """Return what OmegaConf says of a value of the wrong type, in this project's words."""
    text = str(error).partition("\n")[0]
    kind = next((words for name, words in KINDS.items() if re.search(rf"\b{name}\b", text)), None)
    shown = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
    return f"{key} is {shown!r}; it must be {kind}" if kind else f"{key} is {shown!r}: {text}"


def _check_limit(key: str, value: Any) -> None:
    smallest, itself, text = LIMITS[key]
    if isinstance(value, int | float) and not (smallest < value < math.inf or (itself and value == smallest)):
        raise ConfigError(f"{key} is {value}; it must be {text}, and finite")


def _check_target_of(cfg: DictConfig, key: str) -> None:
    """Check the value of a key, or a parent of it, that is an argument of a ``_target_``."""
    parts = key.split(".")
    for at in range(len(parts) - 1, 0, -1):
        node = OmegaConf.select(cfg, ".".join(parts[:at]), throw_on_missing=False)
        if not OmegaConf.is_dict(node) or not isinstance(node.get("_target_"), str):
            continue
        wanted = types_of(target(node["_target_"])).get(parts[at])
        if wanted is None or OmegaConf.is_missing(node, parts[at]):
            return
        value = node[parts[at]]  # resolved
        plain = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
        if not fits(plain, wanted):
            raise ConfigError(f"{'.'.join(parts[: at + 1])} is {plain!r}; it must be {describe(wanted)}")
        return


def _nearest_few(key: str, keys: set[str]) -> str:
    parent = key.rpartition(".")[0]
    siblings = {k for k in keys if k.rpartition(".")[0] == parent} or {k for k in keys if "." not in k}
    return nearest(key, siblings)


def _keys(node: Any, prefix: str = "") -> Iterator[str]:
    if OmegaConf.is_dict(node):
        for key in node:
            name = f"{prefix}.{key}" if prefix else str(key)
            yield name
            if not OmegaConf.is_missing(node, key) and not OmegaConf.is_interpolation(node, key):
                yield from _keys(node[key], name)
    elif OmegaConf.is_list(node):
        for index, value in enumerate(node):
            yield f"{prefix}.{index}"
            yield from _keys(value, f"{prefix}.{index}")
