"""From a command line to typed objects: one Hydra entry for every command, and options of conf/ by name.

    command         runs a command; its help
    arguments       splits a command line into Hydra's options and overrides
    overrides       checks ``key=value`` before the command starts
    annotations     whether a value fits the type of a parameter
    options         options of conf/ by name, and what they build
    schema          the keys of a replay
    failures        errors in one line, and exit statuses
    streams         output on any terminal, pipe or disk
    sweeps          what --multirun leaves next to its jobs: failures, a table

Others import the names below from here.
"""

from sim.config.command import help_text, one_thread, run_command, start
from sim.config.failures import fail
from sim.config.options import (
    CONF_DIR,
    build,
    build_option,
    compose_config,
    load_option,
    name_of,
    option_names,
    option_path,
    with_differences,
)
from sim.config.overrides import check_overrides
from sim.config.schema import ReplayConfig, SweepConfig

__all__ = [
    "CONF_DIR",
    "ReplayConfig",
    "SweepConfig",
    "build",
    "build_option",
    "check_overrides",
    "compose_config",
    "fail",
    "help_text",
    "load_option",
    "name_of",
    "one_thread",
    "option_names",
    "option_path",
    "run_command",
    "start",
    "with_differences",
]
