"""From a command line to typed objects: one Hydra entry for every command, and options of conf/ by name.

A command is a function of its configuration, ``conf/NAME.yaml`` and a dataclass that checks the keys; ``run_command``
runs it. What it uses of ``options`` and ``overrides`` can be imported from here too.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from sim.arguments import parse_overrides, read_arguments
from sim.atomic import sole_writer
from sim.errors import ConfigError
from sim.failures import INTERRUPTED, errors_in_one_line, fail, full_error
from sim.options import (
    CONF_DIR,
    added_folders,
    build,
    build_option,
    compose_config,
    folders_of,
    groups_of,
    load_option,
    name_of,
    option_names,
    option_path,
    search_path,
    with_differences,
)
from sim.overrides import check_overrides
from sim.streams import print_any_text

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
RUN_FILES = ("summary.json", "summaries.json", "compare.json")
"""What a run folder gets last: a folder with one of them is complete, and no other run writes into it."""


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


def start(main: str) -> None:
    """Import and run a command's main, ``MODULE:FUNCTION``; one line says so if a package is not installed."""
    with errors_in_one_line():
        run = resolve_name(main)
        run()


def run_command(task: Callable[[DictConfig], object], config_name: str, *, positional: str | None = None) -> None:
    """Run a command: parse its arguments, compose its configuration, call the task.

    An error that the user can mend ends the process with one line on stderr and exit status 2. Of several jobs
    (``--multirun``) each that fails prints such a line, the others run, and the exit status is 1.

    Args:
        task: takes the composed configuration. If it returns an int other than 0, that is the exit status.
        config_name: a file of conf/, which states defaults, help and Hydra's settings.
        positional: the key, a list, that takes arguments without ``=``; None allows none.
    """
    print_any_text()
    job = _Job(task)
    with errors_in_one_line():
        if os.environ.get("NUMBA_DISABLE_JIT", "0") not in ("", "0"):
            raise ConfigError("NUMBA_DISABLE_JIT is set, but the simulator only runs compiled; unset it")
        arguments = read_arguments(sys.argv[1:], positional=positional)
        config_name = arguments.config_name or config_name
        if arguments.help:
            print(help_text(config_name, arguments.overrides, arguments.config_dir))
            return
        folders = added_folders(config_name, arguments.overrides, arguments.config_dir)
        sys.path += [str(folder) for folder in folders]  # Python files next to these options
        if not arguments.shows:
            check_overrides(arguments.overrides, config_name, arguments.config_dir, multirun=arguments.multirun)
        sys.argv[1:] = [*arguments.options, *arguments.overrides]
        job.multirun = arguments.multirun
        with _environment("HYDRA_FULL_ERROR", "1"):  # Hydra raises its errors instead of printing them
            try:
                hydra.main(version_base="1.3", config_path=str(CONF_DIR), config_name=config_name)(job)()
            except ValueError as error:
                if job.count:
                    raise
                raise ConfigError(str(error)) from error  # of an option of Hydra; the command has not started
    if job.failed:
        print(f"error: {job.failed} of {job.count} jobs failed", file=sys.stderr)
    if job.failed or job.status:
        raise SystemExit(1 if job.failed else job.status)


class _Job:
    """What Hydra calls: the task of a command, alone in its run folder, with its errors in one line."""

    multirun = False

    def __init__(self, task: Callable[[DictConfig], object]) -> None:
        self.task, self.full_error = task, full_error()
        self.__module__, self.__name__ = task.__module__, task.__name__  # Hydra reads them
        self.count = self.failed = self.status = 0

    def __call__(self, cfg: DictConfig) -> None:
        self.count += 1
        folder = Path(HydraConfig.get().runtime.output_dir)
        job = HydraConfig.get().job
        name = f"job {job.num} ({job.override_dirname})" if self.multirun else ""
        with _environment("HYDRA_FULL_ERROR", "1" if self.full_error else None):
            try:
                with errors_in_one_line(f"{name}: " if name else ""):
                    result = self._run(cfg, folder)
            except SystemExit as end:
                with suppress(OSError):
                    folder.rmdir()  # nothing was written into it
                if not self.multirun or end.code == INTERRUPTED:
                    raise
            except Exception:
                if not self.multirun:
                    raise
                traceback.print_exc()
            else:
                self.status = self.status or (result if isinstance(result, int) else 0)
                return
        self.failed += 1
        if HydraConfig.get().runtime.choices["hydra/launcher"] != "basic":
            raise ConfigError(f"{name} failed")  # a process of its own does not count here

    def _run(self, cfg: DictConfig, folder: Path) -> object:
        if folder == Path.cwd():  # the command has no run folder
            return self.task(cfg)
        with sole_writer(folder, RUN_FILES):
            return self.task(cfg)


@contextmanager
def _environment(name: str, value: str | None) -> Iterator[None]:
    """Set an environment variable, or remove it, for a while."""
    before = os.environ.pop(name, None)
    if value is not None:
        os.environ[name] = value
    try:
        yield
    finally:
        os.environ.pop(name, None)
        if before is not None:
            os.environ[name] = before


def help_text(config_name: str, overrides: Sequence[str] = (), config_dir: Path | None = None) -> str:
    """Return the help of a command: its own text, the groups that it uses with their options, its configuration."""
    search = search_path(parse_overrides(overrides), config_dir)
    try:
        cfg = compose_config(config_name, [*overrides, *search], with_hydra=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(" ".join(str(error).split())) from error
    folders = folders_of(cfg)
    groups = "\n".join(f"{group}: {', '.join(option_names(group, folders))}" for group in groups_of(cfg))
    template: str = OmegaConf.to_container(cfg.hydra.help, resolve=False)["template"]  # type: ignore[call-overload,index]
    with open_dict(cfg):
        del cfg["hydra"]
    return template.replace("$APP_CONFIG_GROUPS", groups).replace("$CONFIG", OmegaConf.to_yaml(cfg)).rstrip()


def one_thread() -> None:
    """Keep numeric libraries at one thread: several runs share a machine, and two threads on two cores can stall."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
