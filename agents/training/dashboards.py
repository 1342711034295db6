"""What a training shows while it runs: TensorBoard's file in the run folder, and Weights & Biases if asked for.

    tensorboard --logdir runs/train

Tags: ``validation/`` and ``episode/`` are what progress.csv holds; ``learner/`` is all that RLlib's learner reports as
a number: losses, KL divergence, entropy, learning rate, norms of gradients.
"""

from __future__ import annotations

import contextlib
import math
import numbers
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from tensorboardX import SummaryWriter

from sim.errors import ConfigError

FOLDER = "tensorboard"
"""In the run folder."""
OF_ROW = {
    "episode_return": "episode/return",
    "validation_utility": "validation/utility",
    "best_utility": "validation/best_utility",
    "top_action_share": "validation/top_action_share",
    "sample_seconds": "seconds/sample",
    "learn_seconds": "seconds/learn",
}
"""Column of progress.csv -> tag."""


def learner_scalars(result: Mapping[str, Any]) -> dict[str, float]:
    """Return tag -> value of what RLlib's learners report of an iteration, for all finite numbers."""
    found: dict[str, float] = {}
    for module, values in result.get("learners", {}).items():
        if not str(module).startswith("__"):  # __all_modules__ holds timers
            found.update((f"learner/{name}", value) for name, value in _numbers(values))
    return found


def _numbers(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{prefix}{name}/")
        elif type(value) is not bool and isinstance(value, numbers.Real) and math.isfinite(value):
            yield f"{prefix}{name}", float(value)


class Dashboards:
    """Writes scalars, with the environment steps so far as the horizontal axis."""

    def __init__(self, folder: Path, cfg: DictConfig) -> None:
        """Open TensorBoard's file, and a run of Weights & Biases if ``cfg.wandb`` names a project.

        Raises:
            ConfigError: if Weights & Biases refuses, for example without a login.
        """
        self.run = _wandb_run(folder, cfg) if cfg.wandb else None
        self.writer = SummaryWriter(str(folder / FOLDER))

    def iteration(self, result: Mapping[str, Any]) -> None:
        """Write what the learners report."""
        self._write(learner_scalars(result), int(result.get("num_env_steps_sampled_lifetime", 0)))

    def validation(self, row: Mapping[str, Any]) -> None:
        """Write a row of progress.csv."""
        scalars = {tag: float(row[column]) for column, tag in OF_ROW.items() if math.isfinite(row[column])}
        self._write(scalars, int(row["env_steps"]))

    def _write(self, scalars: Mapping[str, float], steps: int) -> None:
        for tag, value in scalars.items():
            self.writer.add_scalar(tag, value, steps)
        if self.run is not None and scalars:
            self.run.log({**scalars, "env_steps": steps})

    def close(self) -> None:
        """Write out what is still in memory."""
        self.writer.close()
        if self.run is not None:
            self.run.finish()


def check_wandb(project: str | None) -> None:
    """Check, before anything slow starts, that a training can be logged to Weights & Biases.

    Raises:
        ModuleNotFoundError: if it is not installed. ConfigError: without a login.
    """
    if not project:
        return
    import wandb

    if os.environ.get("WANDB_MODE") not in ("offline", "disabled") and not wandb.login(prompt=False):
        raise ConfigError(f"wandb={project}: no login was found; run wandb login, or set WANDB_MODE=offline")


def _wandb_run(folder: Path, cfg: DictConfig) -> Any:
    import wandb

    folder.mkdir(parents=True, exist_ok=True)
    config: Any = OmegaConf.to_container(cfg, resolve=True)
    try:
        run = wandb.init(
            project=cfg.wandb, name=f"{cfg.label} seed {cfg.seed}", group=cfg.label, dir=folder, config=config
        )
    except wandb.Error as error:
        raise ConfigError(
            f"wandb={cfg.wandb}: {' '.join(str(error).split())}; run wandb login, or set WANDB_MODE=offline"
        ) from error
    with contextlib.suppress(wandb.Error):
        run.define_metric("*", step_metric="env_steps")
    return run
