"""Runs a command of the project inside the test process, so that parts of it can be replaced."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable

from hydra.core.global_hydra import GlobalHydra


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
