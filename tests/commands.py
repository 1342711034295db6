"""Runs a command of the project inside the test process, so that parts of it can be replaced."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable

from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from sim.config import CONF_DIR, compose_config
from sim.config.options import groups_of


def exit_status(main: Callable[[], None], *arguments: str) -> int:
    """Run a command's main with these arguments; return the status with which the process would end."""
    before, path, root = sys.argv, list(sys.path), logging.getLogger()
    handlers, level = list(root.handlers), root.level
    sys.argv = [main.__module__, *arguments]
    GlobalHydra.instance().clear()
    try:
        main()
    except SystemExit as end:
        return int(end.code or 0)
    finally:
        sys.argv, sys.path[:] = before, path
        root.handlers[:] = handlers  # Hydra's write to the stdout of this call
        root.setLevel(level)
    return 0


def keys_taken_for_groups(config_name: str) -> set[str]:
    """Return the keys of a command that cannot be set: of KEY=VALUE, Hydra takes a folder of conf/ for a group.

    Groups that the command has are none of them, nor are mappings, of which KEY.PART=VALUE sets a part.
    """
    cfg = compose_config(config_name, with_hydra=True)
    single = {key for key in map(str, cfg) if OmegaConf.is_missing(cfg, key) or not OmegaConf.is_dict(cfg[key])}
    return single.intersection(path.name for path in CONF_DIR.iterdir() if path.is_dir()).difference(groups_of(cfg))
