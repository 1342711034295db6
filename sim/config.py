"""Hydra around a command: structured configs, help worth reading, and errors that name the nearest right key."""

from __future__ import annotations

import inspect
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import OverrideType
from hydra.errors import HydraException, InstantiationException, OverrideParseException
from hydra.utils import get_method
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

import conf
from sim.errors import ConfigError, RapLabError, nearest

CONF_DIR = Path(conf.__file__).resolve().parent


@dataclass(kw_only=True)
class ReplayConfig:
    """What a replay is told. Each group is a folder of conf/; its YAML names what it builds and with which values.

    tick_s: seconds between two decisions of the policy; it also decides where the budget changes.
    latency: a file of conf/calibration by name, or a path; null takes the one made for this model on this GPU.
    quality_table: a file of conf/quality by name, by which requests are charged for the plans they ran under; null
        takes the one of this model where there is one.
    workspace_bytes: activations, CUDA graphs and the like; part of the budget that neither weights nor KV can use.
        The default is what vLLM 0.19 took on a real RTX 4090 with Llama-3.1-8B: 0.9 x 25.25 GB - 16.06 GB of weights
        - 5.43 GB of KV blocks (casys-kaist/LLMServingSim, meta.json).
    fixed_s: overhead of an iteration instead of the calibration's own; null keeps that.
    label, tags: yours, to find a run again.
    iterations: also write iterations.parquet. plot: also write replay.png.
    """

    trace: Any
    workload: Any
    model: Any
    gpu: Any
    engine: Any
    budget: Any
    policy: Any
    slo: Any
    latency: str | None = None
    quality_table: str | None = None
    fixed_s: float | None = None
    workspace_bytes: float = 1.24e9
    tick_s: float = 1.0
    seed: int = 0
    iterations: bool = False
    plot: bool = False
    label: str = ""
    tags: list[str] = field(default_factory=list)


@dataclass(kw_only=True)
class ManyConfig(ReplayConfig):
    """A replay that may be many: of several seeds, of several windows of the trace.

    seeds: one replay each; ``seed`` alone when empty.
    windows, window_s: one replay each of these windows of so many seconds, counted from 0, after all steps of the
        workload; the whole trace when empty.
    workers: processes; the records are the same for any number.
    executor: what does them at once: processes of this machine, or a Ray cluster.
    """

    seeds: list[int] = field(default_factory=list)
    windows: list[int] = field(default_factory=list)
    window_s: float | None = None
    workers: int = 1
    executor: Any = None


ConfigStore.instance().store(name="replay_schema", node=ManyConfig)


def run_command(task: Callable[[DictConfig], object], config_name: str) -> None:
    """Run a Hydra task; a mistake of the user ends it with one clear message and exit status 2."""
    sweep = [a for a in sys.argv[1:] if a in ("-m", "--multirun")]
    # Hydra takes its flags before the overrides only; people type this one anywhere.
    arguments = sweep + [a for a in sys.argv[1:] if a not in sweep]
    sys.argv[1:] = arguments
    try:
        if not any(a in ("--help", "-h", "--hydra-help", "--info", "--version", "-sc") for a in arguments):
            check_overrides([a for a in arguments if not a.startswith("-")], config_name)
    except (ConfigError, OverrideParseException) as error:
        fail(str(error))

    def guarded(cfg: DictConfig) -> None:
        try:
            task(cfg)
        except RapLabError as error:
            if sweep:
                raise  # a sweep reports which of its jobs failed
            fail(str(error))

    guarded.__module__ = task.__module__
    hydra.main(version_base="1.3", config_path=str(CONF_DIR), config_name=config_name)(guarded)()


def fail(message: str) -> None:
    """Say what went wrong and end with exit status 2."""
    print(f"error: {message}", file=sys.stderr)
    sys.stderr.flush()
    logging.shutdown()
    raise SystemExit(2)


def check_overrides(overrides: list[str], config_name: str) -> None:
    """Check that every ``key=value`` names a group, an option or a key that exists.

    Raises:
        ConfigError: naming the nearest right one.
    """
    parsed = OverridesParser.create().parse_overrides(overrides)
    # conf/calibration holds tables by name, not options of a group.
    groups = {path.parent.name for path in CONF_DIR.glob("*/*.yaml")}
    chosen = []
    for override in parsed:
        key = override.get_key_element().lstrip("+~").split("@")[0]
        if override.is_sweep_override() and key in groups:
            values = [str(v) for v in override.sweep_string_iterator()]
        else:
            values = [str(override.value())]
        if key in groups and not override.is_delete():
            options = {path.stem for path in (CONF_DIR / key).glob("*.yaml")}
            for value in values:
                if value not in options and value not in ("None", "null"):
                    raise ConfigError(f"there is no {key}={value}; {nearest(value, options)}")
            chosen.append(f"{override.get_key_element()}={values[0]}")
    with hydra.initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        try:
            composed = hydra.compose(config_name, overrides=chosen)
        except (HydraException, OmegaConfBaseException) as error:
            raise ConfigError(str(error)) from error
    keys = set(_keys(composed)) | groups
    for override in parsed:
        key = override.get_key_element().split("@")[0]
        if override.type in (OverrideType.ADD, OverrideType.FORCE_ADD, OverrideType.DEL):
            continue  # the user says that the key is new, or goes; what is built checks it
        if key.split(".")[0].split("/")[0] == "hydra" or key in keys:
            continue
        raise ConfigError(f"there is no key {key!r}; {_nearest_few(key, keys)}")


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


def build(node: Any, /, **given: Any) -> Any:
    """Build what a config node's ``_target_`` names, from its values and from ``given``.

    Args:
        node: a mapping with ``_target_``; nested targets are built too, ``_partial_`` ones as functools.partial.
        given: arguments that only the caller has, such as the model.
    Raises:
        ConfigError: for a key that the target does not take, with the nearest one; for a missing value.
    """
    if not OmegaConf.is_config(node) or "_target_" not in node:
        raise ConfigError(f"expected a config group with a _target_, got {node!r}; choose an option, e.g. trace=burst")
    missing = sorted(OmegaConf.missing_keys(node))
    if missing:
        name = node._get_full_key("")
        raise ConfigError(f"{name}.{missing[0]} has no value; set it: {name}.{missing[0]}=VALUE")
    plain = OmegaConf.to_container(node, resolve=True)
    _check_targets(plain, set(given))
    try:
        return hydra.utils.instantiate(node, _convert_="all", **given)
    except InstantiationException as error:
        if isinstance(error.__cause__, RapLabError):
            raise error.__cause__ from None  # what was wrong, without what Hydra says around it
        raise


def _check_targets(node: Any, given: set[str]) -> None:
    if isinstance(node, Mapping):
        if "_target_" in node:
            parameters = inspect.signature(get_method(node["_target_"])).parameters
            allowed = {name for name in parameters if name not in given}
            if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
                for key in node:
                    if not str(key).startswith("_") and key not in parameters:
                        raise ConfigError(f"{node['_target_']} takes no {key!r}; {nearest(str(key), allowed)}")
        for value in node.values():
            _check_targets(value, set())
    elif isinstance(node, list):
        for value in node:
            _check_targets(value, set())


def one_thread() -> None:
    """Keep numeric libraries at one thread: several runs share a machine, and two threads on two cores can stall."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
