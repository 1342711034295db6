"""Which policies and curves an evaluation reads: what the command line names, and what is there of the configuration's.

``conf/evaluate.yaml`` lists the trainings behind the published page. A machine that has not run them evaluates without
them; a file that the command line names must be there.
"""

from __future__ import annotations

import glob
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf, open_dict

from sim.errors import ConfigError, nearest
from sim.paths import REPOSITORY

GLOBS = {
    "learned": "prune",
    "curves": "prune",
    "serve_learned": "serve",
    "serve_curves": "serve",
    "cluster_learned": "cluster",
    "cluster_curves": "cluster",
    "roles_learned": "roles",
}
"""Keys that map a name to a glob of files, with the task that reads them."""


def named(argument: str) -> str:
    """Return an argument of the command line so that Hydra accepts a new name: ``learned.mine=PATH`` needs a ``++``."""
    key, equals, value = argument.partition("=")
    whole = key in GLOBS and value.lstrip().startswith("{")
    return f"++{argument}" if equals and (whole or (key.partition(".")[0] in GLOBS and "." in key)) else argument


def allow_new_names() -> None:
    """Let the command line name policies that conf/evaluate.yaml does not have (``named``)."""
    sys.argv[1:] = map(named, sys.argv[1:])


def files_of(pattern: str) -> list[Path]:
    """Return the files that match a glob, sorted; a relative one counts from here, or else from the repository."""
    for root in (Path.cwd(), REPOSITORY):
        matches = (root / path for path in glob.glob(pattern, root_dir=root))  # noqa: PTH207 - Path.glob takes no absolute one
        if found := sorted(path for path in matches if path.is_file()):
            return found
    return []


def glob_files(pattern: str) -> list[Path]:
    """Return the files that match a glob, sorted.

    Raises:
        ConfigError: if there is none.
    """
    paths = files_of(pattern)
    if not paths:
        raise ConfigError(f"{pattern} matches no file; pass the path of a best/policy.json, or a glob of several")
    return paths


def replaced(cfg: DictConfig, overrides: Sequence[str]) -> DictConfig:
    """Return the configuration with ``KEY={...}`` replacing the names of a key; Hydra would add them.

    So ``learned={}`` evaluates no learned policy, and ``learned={mine: PATH}`` only this one.
    """
    changed = cfg.copy()
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    for number, override in enumerate(parsed):
        key = override.get_key_element().lstrip("+")
        value = override.value() if not override.is_delete() else None
        if key not in GLOBS or not isinstance(value, Mapping):
            continue
        names = {str(name): str(pattern) for name, pattern in value.items()}
        for later in parsed[number + 1 :]:
            parent, _, name = later.get_key_element().lstrip("+~").partition(".")
            if parent == key and name:
                names.pop(name, None)
                if not later.is_delete():
                    names[name] = str(later.value())
        with open_dict(changed):
            changed[key] = names
    return changed


def present(cfg: DictConfig, default: Mapping[str, Any]) -> tuple[DictConfig, list[str]]:
    """Return the configuration without the names of the default whose files are not there, and a note on each policy.

    Args:
        cfg: an ``EvaluateConfig``. default: the values of conf/evaluate.yaml.
    Raises:
        ConfigError: for another glob that matches no file.
    """
    changed, notes = cfg.copy(), []
    for key in [key for key, task in GLOBS.items() if task in cfg.tasks]:
        names: dict[str, Any] = OmegaConf.to_container(cfg[key], resolve=True)  # type: ignore[assignment]
        for name, pattern in list(names.items()):
            if files_of(str(pattern)):
                continue
            if default.get(key, {}).get(name) != pattern:
                raise ConfigError(
                    f"{key}.{name}: {pattern} matches no file; pass the path of a file, or a glob of several, or leave "
                    f"it out: '~{key}.{name}'"
                )
            del names[name]
            if "curves" not in key:
                notes.append(f"{key}.{name} is left out: no file matches {pattern}")
        with open_dict(changed):
            changed[key] = names
    if "ablation" in cfg.tasks and cfg.serve_ablation and not files_of(cfg.serve_ablation):
        if cfg.serve_ablation != default.get("serve_ablation"):
            raise ConfigError(f"serve_ablation: {cfg.serve_ablation} matches no file; pass the path of a policy.json")
        notes.append(f"the ablation is left out: no file matches {cfg.serve_ablation}")
        changed.serve_ablation = ""
    return changed, notes


def chosen_rules(policies: Mapping[str, Any], names: Sequence[str] | None) -> dict[str, Any]:
    """Return the rules with these names, in their own order; all if ``names`` is None."""
    return dict(policies) if names is None else {name: policies[name] for name in policies if name in names}


def check_learned_names(cfg: DictConfig, rules: Sequence[str]) -> None:
    """Check that no learned policy has the name of a rule, whose rows it would replace.

    Args:
        cfg: an ``EvaluateConfig``. rules: names of all rules.
    Raises:
        ConfigError: for such a name.
    """
    for key in (key for key in GLOBS if "curves" not in key):
        for name in map(str, cfg[key]):
            if name in rules or name.startswith(("by_load", "fixed_")):
                raise ConfigError(f"{key}: {name} is the name of a rule; call it otherwise, such as my_{name}")


def check_rules(names: Sequence[str] | None, known: Sequence[str]) -> None:
    """Check the names of ``baselines``.

    Raises:
        ConfigError: for a name that no task has.
    """
    for name in names or ():
        if name not in known:
            raise ConfigError(f"baselines: there is no rule {name!r}; {nearest(name, known)}")
