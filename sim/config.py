"""From a command line to typed objects: one Hydra entry for every command, and options of conf/ by name.

A command is a function of its configuration, ``conf/NAME.yaml`` and a dataclass that checks the keys; ``run_command``
runs it. Code that runs outside a command takes a file of conf/ by name with ``load_option`` or ``build_option``.
"""

from __future__ import annotations

import inspect
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import OverrideType, Quote, QuotedString
from hydra.errors import HydraException, InstantiationException, OverrideParseException
from hydra.utils import get_method
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

import conf
from sim.errors import ConfigError, RapLabError, nearest

CONF_DIR = Path(conf.__file__).resolve().parent
HELP_FLAGS = ("--help", "-h")
OTHER_FLAGS = ("--hydra-help", "--info", "--version", "-sc")
"""Hydra's own flags that print something instead of running the command."""


@dataclass(kw_only=True)
class ReplayConfig:
    """One replay. Each group is a folder of conf/; its YAML names what it builds and the values.

    tick_s: seconds between two decisions of the policy, which are also the moments at which the budget may change.
    latency: a file of conf/calibration by name, or a path; null takes the calibration of this model on this GPU.
    quality_table: a file of conf/quality by name, which says what the plans that a request ran under cost in quality;
        null takes the one of this model, where there is one.
    workspace_bytes: activations, CUDA graphs and the like: the part of the budget that neither weights nor KV can use.
        The default is what vLLM 0.19 took on a real RTX 4090 with Llama-3.1-8B: 0.9 x 25.25 GB - 16.06 GB of weights
        - 5.43 GB of KV blocks (casys-kaist/LLMServingSim, meta.json).
    fixed_s: overhead of an iteration, in place of the calibration's; null keeps that.
    label, tags: free text, to find a run again.
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
class SweepConfig(ReplayConfig):
    """A replay, or many: over several seeds and several windows of the trace.

    seeds: one replay each; ``seed`` alone when empty.
    windows, window_s: one replay for each of these windows of ``window_s`` seconds, counted from 0, after all steps of
        the workload; the full trace when empty.
    workers: processes; the records are the same for any number.
    executor: what runs the replays: processes of this machine, or a Ray cluster.
    """

    seeds: list[int] = field(default_factory=list)
    windows: list[int] = field(default_factory=list)
    window_s: float | None = None
    workers: int = 1
    executor: Any = None


ConfigStore.instance().store(name="replay_schema", node=SweepConfig)


# --- Commands --------------------------------------------------------------------------------------------------------


def run_command(task: Callable[[DictConfig], object], config_name: str, *, positional: str | None = None) -> None:
    """Run a command: parse its arguments, compose its configuration, call the task.

    An error that the user can mend ends the process with one line on stderr and exit status 2.

    Args:
        task: takes the composed configuration. If it returns an int other than 0, that is the exit status.
        config_name: a file of conf/, which states defaults, help and Hydra's settings.
        positional: the key, a list, that takes arguments without ``=``; None allows none.
    """
    sweep = [a for a in sys.argv[1:] if a in ("-m", "--multirun")]
    # Hydra takes its flags before the overrides only; people type this one anywhere.
    arguments = sweep + [a for a in sys.argv[1:] if a not in sweep]
    try:
        if "--run" in arguments:  # Hydra would take it as a flag of its own and do nothing
            raise ConfigError("--run is not an option; set measure=true where a command has that key (see --help)")
        if positional is not None:
            arguments = _name_positional(arguments, positional)
        overrides = [a for a in arguments if not a.startswith("-")]
        if any(a in HELP_FLAGS for a in arguments):
            print(help_text(config_name, overrides))
            return
        if not any(a in OTHER_FLAGS for a in arguments):
            check_overrides(overrides, config_name)
    except (ConfigError, OverrideParseException) as error:
        fail(str(error))
    sys.argv[1:] = arguments
    status = 0

    def guarded(cfg: DictConfig) -> None:
        nonlocal status
        try:
            result = task(cfg)
        except RapLabError as error:
            if sweep:
                raise  # a sweep reports which of its jobs failed
            fail(str(error))
        else:
            status = status or (result if isinstance(result, int) else 0)

    guarded.__module__ = task.__module__
    hydra.main(version_base="1.3", config_path=str(CONF_DIR), config_name=config_name)(guarded)()
    if status:
        raise SystemExit(status)


def _name_positional(arguments: Sequence[str], key: str) -> list[str]:
    """Return the arguments with those that have no ``=`` collected into ``key=[...]``."""
    plain = [a for a in arguments if "=" not in a and not a.startswith("-")]
    others = [a for a in arguments if a not in plain]
    if not plain:
        return others
    quoted = [QuotedString(text=a, quote=Quote.single).with_quotes() for a in plain]
    return [*others, f"{key}=[{','.join(quoted)}]"]


def help_text(config_name: str, overrides: Sequence[str] = ()) -> str:
    """Return the help of a command: its own text, the groups that it uses with their options, its configuration."""
    try:
        cfg = compose_config(config_name, overrides, with_hydra=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(" ".join(str(error).split())) from error
    groups = "\n".join(f"{group}: {', '.join(option_names(group))}" for group in groups_of(cfg))
    template: str = OmegaConf.to_container(cfg.hydra.help, resolve=False)["template"]  # type: ignore[call-overload,index]
    with open_dict(cfg):
        del cfg["hydra"]
    return template.replace("$APP_CONFIG_GROUPS", groups).replace("$CONFIG", OmegaConf.to_yaml(cfg)).rstrip()


def groups_of(cfg: DictConfig) -> list[str]:
    """Return the groups of conf/ that a command uses, sorted; ``cfg`` with Hydra's own part."""
    return sorted(group for group in cfg.hydra.runtime.choices if "/" not in group)


def fail(message: str) -> None:
    """Print what went wrong to stderr and end with exit status 2."""
    print(f"error: {message}", file=sys.stderr)
    sys.stderr.flush()
    logging.shutdown()
    raise SystemExit(2)


def check_overrides(overrides: Sequence[str], config_name: str) -> None:
    """Check that every ``key=value`` names a group, an option or a key that exists.

    Raises:
        ConfigError: with the nearest name that does.
    """
    parsed = OverridesParser.create().parse_overrides(list(overrides))
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
            for value in values:
                if value not in ("None", "null"):
                    option_path(key, value)
            chosen.append(f"{override.get_key_element()}={values[0]}")
    try:
        composed = compose_config(config_name, chosen, with_hydra=True)
    except (HydraException, OmegaConfBaseException) as error:
        used = groups_of(compose_config(config_name, with_hydra=True))
        for name in (text.partition("=")[0] for text in chosen):
            if not name.startswith(("+", "~")) and name.split("@")[0] not in used:
                raise ConfigError(f"this command has no group {name!r}; {nearest(name, used)}") from error
        raise ConfigError(" ".join(str(error).split())) from error
    keys = set(groups_of(composed))
    with open_dict(composed):
        del composed["hydra"]
    keys |= set(_keys(composed))
    for override in parsed:
        key = override.get_key_element().split("@")[0]
        if override.type in (OverrideType.ADD, OverrideType.FORCE_ADD, OverrideType.DEL):
            continue  # the user states that the key is new, or removes it; what is built from it checks it
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


# --- Options of conf/ ------------------------------------------------------------------------------------------------


def option_names(group: str) -> list[str]:
    """Return the options of a group: the names of the YAML files in ``conf/GROUP``, sorted."""
    return sorted(path.stem for path in (CONF_DIR / group).glob("*.yaml"))


def option_path(group: str, name: str) -> Path:
    """Return the path of ``conf/GROUP/NAME.yaml``.

    Raises:
        ConfigError: if there is no such file, with the nearest name.
    """
    names = option_names(group)
    if name not in names:
        raise ConfigError(f"there is no {group}={name}; {nearest(name, names)}")
    return CONF_DIR / group / f"{name}.yaml"


def load_option(group: str, name: str, changed: Mapping[str, Any] | None = None, *, seed: int = 0) -> DictConfig:
    """Return the content of ``conf/GROUP/NAME.yaml``, as Hydra would put it under ``GROUP``.

    Args:
        changed: keys with values that replace the file's; ``build`` checks them.
        seed: what ``${seed}`` in the file stands for.
    Raises:
        ConfigError: for an unknown name.
    """
    node = cast(DictConfig, OmegaConf.load(option_path(group, name)))
    config = OmegaConf.create({"seed": seed, "workers": 1, group: OmegaConf.merge(node, changed or {})})
    return cast(DictConfig, config[group])


def build_option(group: str, name: str, changed: Mapping[str, Any] | None = None, *, seed: int = 0) -> Any:
    """Build what ``conf/GROUP/NAME.yaml`` names: a trace, a GPU, a function that makes a policy.

    Arguments and errors: as ``load_option`` and ``build``.
    """
    return build(load_option(group, name, changed, seed=seed))


def compose_config(config_name: str, overrides: Sequence[str] = (), *, with_hydra: bool = False) -> DictConfig:
    """Return the configuration that a command would see with these overrides.

    A running command may call this too: Hydra allows one configuration folder at a time, and a command that has its
    configuration needs the folder no longer.
    """
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        return hydra.compose(config_name, overrides=list(overrides), return_hydra_config=with_hydra)


def with_differences(cfg: DictConfig, differences: Mapping[Any, Any], where: str) -> DictConfig:
    """Return a configuration with ``key: value`` pairs applied: an option of a group, or the value of a key.

    Args:
        where: the key under which the differences stand, for messages.
    Raises:
        ConfigError: for a pair that names no key or option, with the nearest name.
    """
    one = cfg.copy()
    OmegaConf.set_struct(one, True)
    for key, value in differences.items():
        if key in VARIED_GROUPS:
            try:
                option = load_option(key, str(value))
            except ConfigError as error:
                raise ConfigError(f"{where}: {error}") from error
            with open_dict(one):
                one[key] = option
            continue
        parent, _, name = str(key).rpartition(".")
        node = OmegaConf.select(one, parent) if parent else one
        if node is None or name not in list(node):  # a key without a value yet exists too
            raise ConfigError(f"{where}: there is no {key!r}; {nearest(name, map(str, node or one))}")
        OmegaConf.update(one, str(key), value)
    return one


VARIED_GROUPS = (
    "trace",
    "workload",
    "model",
    "gpu",
    "engine",
    "budget",
    "policy",
    "slo",
    "router",
    "outages",
    "autoscaler",
)
"""Groups of which one variant of a configuration may choose another option."""


def build(node: Any, /, **arguments: Any) -> Any:
    """Build what a config node's ``_target_`` names, from its values and from ``arguments``.

    Args:
        node: a mapping with ``_target_``; nested targets are built too, ``_partial_`` ones as functools.partial.
        arguments: those that only the caller has, such as the model.
    Raises:
        ConfigError: for a key that the target does not take, with the nearest one; for a missing value.
    """
    if not OmegaConf.is_config(node) or "_target_" not in node:
        raise ConfigError(f"expected a config group with a _target_, got {node!r}; choose an option, e.g. trace=burst")
    missing = sorted(OmegaConf.missing_keys(node))
    if missing:
        raise ConfigError(f"{missing[0]} has no value; set it: {missing[0]}=VALUE")
    plain = OmegaConf.to_container(node, resolve=True)
    _check_targets(plain, set(arguments))
    try:
        return hydra.utils.instantiate(node, _convert_="all", **arguments)
    except InstantiationException as error:
        if isinstance(error.__cause__, RapLabError):
            raise error.__cause__ from None  # what was wrong, without what Hydra adds to it
        raise


def name_of(node: Any) -> str:
    """Return the name of what a config node builds: its ``name``, or the one that the built object has.

    ``model=hf`` has no name of its own; it is in the file that ``model.config`` names.
    """
    return str(node.get("name") or build(node).name)


def _check_targets(node: Any, passed: set[str]) -> None:
    if isinstance(node, Mapping):
        if "_target_" in node:
            parameters = inspect.signature(get_method(node["_target_"])).parameters
            allowed = {name for name in parameters if name not in passed}
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
