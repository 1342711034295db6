"""``--multirun hydra/launcher=ray``: the jobs of a sweep as tasks on a Ray cluster.

Hydra's own plug-in for Ray is no longer maintained. Each task composes the configuration of its job and runs it in the
folder in which the command was started, which the machines of the cluster must share.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, configure_log, run_job, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict

from agents.training.on_ray import run_on_ray
from sim.errors import ConfigError

TARGET = "hydra_plugins.rap_lab.RayLauncher"


class RayLauncher(Launcher):
    """Runs jobs on the cluster at ``address`` (see ``join_ray``), each on ``cpus`` CPUs."""

    def __init__(self, address: str | None = None, cpus: float = 1.0) -> None:
        """Set the cluster and the share of it that a job takes.

        Raises:
            ConfigError: if ``cpus`` is not above 0.
        """
        if not cpus > 0:
            raise ConfigError(f"hydra.launcher.cpus is {cpus}; a job needs more than 0 CPUs, such as 1")
        self.address, self.cpus = address, cpus

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Take what every job needs."""
        self.hydra_context, self.task_function, self.config = hydra_context, task_function, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run one job per list of overrides; results come in this order."""
        setup_globals()
        configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)
        Path(str(self.config.hydra.sweep.dir)).mkdir(parents=True, exist_ok=True)
        here = str(Path.cwd()), sys.path, sys.argv
        context = (self.hydra_context, self.task_function, self.config, Singleton.get_state(), here)
        jobs = [(context, initial_job_idx + at, list(one)) for at, one in enumerate(job_overrides)]
        return run_on_ray(self.address, _job, jobs, "jobs", cpus=self.cpus, retries=0)


def _job(job: tuple[tuple[Any, ...], int, list[str]]) -> JobReturn:
    """Run one job in a process of the cluster: what all jobs need, its number and its overrides."""
    context, number, overrides = job
    hydra_context, task_function, config, state, (folder, search, sys.argv) = context
    os.chdir(folder)
    sys.path += [place for place in search if place not in sys.path]
    setup_globals()
    Singleton.set_state(state)
    one = hydra_context.config_loader.load_sweep_config(config, overrides)
    with open_dict(one):
        one.hydra.job.id = f"{one.hydra.job.name}_{number}"
        one.hydra.job.num = number
    HydraConfig.instance().set_config(one)
    return run_job(
        hydra_context=hydra_context,
        task_function=task_function,
        config=one,
        job_dir_key="hydra.sweep.dir",
        job_subdir_key="hydra.sweep.subdir",
    )


def register() -> None:
    """Let Hydra know the launcher, under the name that the configuration gives it.

    Hydra takes plug-ins of modules in a package of the name hydra_plugins alone; this project has no such package.
    """
    plugins = Plugins.instance()
    plugins.register(RayLauncher)
    plugins.class_name_to_class[TARGET] = RayLauncher
