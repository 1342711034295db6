"""Options of conf/: a group is a folder, an option is a YAML file, and what it names can be built.

Code that runs outside a command takes a file of conf/ by name with ``load_option`` or ``build_option``, or one of an
installed package (sim/plugins.py). A command also sees the folders that ``--config-dir`` and
``hydra.searchpath`` add.
"""

from __future__ import annotations

import importlib.util
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, cast

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import InstantiationException
from omegaconf import DictConfig, OmegaConf, open_dict

import conf
from sim.config.arguments import parse_overrides
from sim.errors import ConfigError, RapLabError, nearest
from sim.plugins import plugin_folders

CONF_DIR = Path(conf.__file__).resolve().parent
SEARCH_PATH = "hydra.searchpath"


def label_part(label: str | None) -> str:
    """Return what a label adds to the name of a run folder: ``_LABEL``, with ``-`` for odd characters."""
    return f"_{re.sub(r'[^A-Za-z0-9.+=-]+', '-', label)[:60]}" if label else ""


OmegaConf.register_new_resolver("label_part", label_part, replace=True)


def option_names(group: str, folders: Sequence[Path] | None = None) -> list[str]:
    """Return the options of a group: the names of the YAML files in ``GROUP/`` of each folder, sorted.

    Args:
        folders: conf/ and others; None takes those of the running command, or ``known_folders``.
    """
    return sorted({path.stem for folder in folders or _current_folders() for path in (folder / group).glob("*.yaml")})


def option_path(group: str, name: str, folders: Sequence[Path] | None = None) -> Path:
    """Return the path of ``GROUP/NAME.yaml`` in the first folder that has it; ``folders`` as in ``option_names``.

    Raises:
        ConfigError: if there is no such file, with the nearest name.
    """
    for folder in folders or _current_folders():
        if (path := folder / group / f"{name}.yaml").is_file():
            return path
    trained = "; a trained policy: policy=learned_serve policy.path=FILE.json" if group == "policy" else ""
    raise ConfigError(f"there is no {group}={name}; {nearest(name, option_names(group, folders))}{trained}")


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
    searched = any(text.startswith(f"{SEARCH_PATH}=") for text in overrides)
    overrides = [*overrides, *([] if searched else search_path([], None))]
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        return hydra.compose(config_name, overrides=overrides, return_hydra_config=with_hydra)


def with_differences(cfg: DictConfig, differences: Mapping[Any, Any], where: str) -> DictConfig:
    """Return a configuration with ``key: value`` pairs applied: an option of a group, or the value of a key.

    Another ``gpu`` keeps the configuration's ``gpu.tp``, as on a command line.

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
                if key == "gpu":  # another kind of GPU, and as many of them
                    option.tp = one.gpu.get("tp", 1)
                one[key] = option
            continue
        parent, _, name = str(key).rpartition(".")
        node = OmegaConf.select(one, parent) if parent else one
        if node is None or name not in list(node):  # a key without a value yet exists too
            raise ConfigError(f"{where}: there is no {key!r}; {nearest(name, map(str, node or one))}")
        named = isinstance(value, Mapping) and "_target_" in value  # replaces what the option names, keys and all
        OmegaConf.update(one, str(key), value, merge=not named, force_add=named)
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
    "roles",
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
        if isinstance(error.__cause__, RapLabError | OSError):
            raise error.__cause__ from None  # what was wrong, without what Hydra adds to it
        raise


def name_of(node: Any) -> str:
    """Return the name of what a config node builds: its ``name``, or the one that the built object has.

    ``model=hf`` has no name of its own; it is in the file that ``model.config`` names.
    """
    return str(node.get("name") or build(node).name)


def target(name: str) -> Callable[..., Any]:
    """Return what a ``_target_`` names.

    Raises:
        ConfigError: if there is no such thing.
        ModuleNotFoundError: if its module needs a package that is not installed.
    """
    try:
        return cast(Callable[..., Any], resolve_name(name))
    except ModuleNotFoundError as error:
        if not f"{name}.".startswith(f"{error.name}."):
            raise
        problem = str(error)
    except (ImportError, AttributeError, ValueError) as error:
        problem = str(error)
    raise ConfigError(
        f"_target_: {name} cannot be imported ({problem}); name MODULE.FUNCTION, with its Python file in the current "
        "folder, next to the options of --config-dir, or installed"
    )


def _check_targets(node: Any, passed: set[str]) -> None:
    if isinstance(node, Mapping):
        if "_target_" in node:
            parameters = inspect.signature(target(node["_target_"])).parameters
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


# --- Folders of options ----------------------------------------------------------------------------------------------


def groups_of(cfg: DictConfig) -> list[str]:
    """Return the groups of conf/ that a command uses, sorted; ``cfg`` with Hydra's own part."""
    return sorted(group for group in cfg.hydra.runtime.choices if "/" not in group)


def search_path(overrides: Sequence[Override], config_dir: Path | None) -> list[str]:
    """Return the override that adds the folders of ``--config-dir``, ``hydra.searchpath`` and installed packages.

    Returns:
        A list of that override; empty without any such folder.
    """
    folders = [] if config_dir is None else [str(config_dir)]
    for override in overrides:
        if override.get_key_element() == SEARCH_PATH:
            value = override.value()
            folders += [str(one) for one in value] if isinstance(value, list) else [str(value)]
    for folder in folders:
        package = folder.removeprefix("pkg://") if folder.startswith("pkg://") else None
        found = Path(folder.removeprefix("file://")).is_dir() if package is None else importlib.util.find_spec(package)
        if not found:
            raise ConfigError(f"{SEARCH_PATH}: no such folder {folder}; name one that holds GROUP/NAME.yaml")
    folders += [str(folder) for folder in plugin_folders()]
    quoted = [QuotedString(text=folder, quote=Quote.single).with_quotes() for folder in folders]
    return [f"{SEARCH_PATH}=[{','.join(quoted)}]"] if folders else []


def folders_of(cfg: DictConfig) -> list[Path]:
    """Return the folders with options of groups: conf/, then those added to it; ``cfg`` with hydra."""
    folders = [CONF_DIR]
    for source in cfg.hydra.runtime.config_sources:
        if source.schema == "file":
            folders.append(Path(source.path).absolute())
        elif source.schema == "pkg" and source.provider != "hydra":
            spec = importlib.util.find_spec(source.path)
            folders += [Path(place) for place in (spec.submodule_search_locations or [])] if spec else []
    return list(dict.fromkeys(folders))


def added_folders(config_name: str, overrides: Sequence[str], config_dir: Path | None) -> list[Path]:
    """Return the folders that ``--config-dir``, ``hydra.searchpath`` and installed packages add to conf/."""
    search = search_path(parse_overrides(overrides), config_dir)
    return folders_of(compose_config(config_name, search, with_hydra=True))[1:] if search else []


def _current_folders() -> list[Path]:
    """Return the folders with options that the running command sees; ``known_folders`` outside a command."""
    return folders_of(cast(DictConfig, HydraConfig.instance().cfg)) if HydraConfig.initialized() else known_folders()


def known_folders() -> list[Path]:
    """Return the folders with options that need no argument to be found: conf/ and those of installed packages."""
    return [CONF_DIR, *plugin_folders()]
