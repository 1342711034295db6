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
import socket
import struct
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.record_writer import masked_crc32c
from tensorboardX.summary import scalar

from sim.atomic import errors_name
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


class EventFile:
    """TensorBoard's file of one training, written at once: a full disk is an error here, and not in a thread."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}"
        self._append(Event(wall_time=time.time(), file_version="brain.Event:2"))

    def append(self, scalars: Mapping[str, float], steps: int) -> None:
        """Append tag -> value at this number of environment steps.

        Raises:
            OSError: if the file cannot be written; it names the file.
        """
        self._append(*(Event(wall_time=time.time(), step=steps, summary=scalar(*one)) for one in scalars.items()))

    def _append(self, *events: Any) -> None:
        with errors_name(self.path), self.path.open("ab") as file:
            for event in events:
                data = event.SerializeToString()
                length = struct.pack("<Q", len(data))
                file.write(length + _checksum(length) + data + _checksum(data))


def _checksum(data: bytes) -> bytes:
    return struct.pack("<I", masked_crc32c(data))


class Dashboards:
    """Writes scalars, with the environment steps so far as the horizontal axis."""

    def __init__(self, folder: Path, cfg: DictConfig) -> None:
        """Open TensorBoard's file, and a run of Weights & Biases if ``cfg.wandb`` names a project.

        Raises:
            ConfigError: if Weights & Biases refuses, for example without a login.
        """
        self.run = _wandb_run(folder, cfg) if cfg.wandb else None
        self.events = EventFile(folder / FOLDER)

    def iteration(self, result: Mapping[str, Any]) -> None:
        """Write what the learners report."""
        self._write(learner_scalars(result), int(result.get("num_env_steps_sampled_lifetime", 0)))

    def validation(self, row: Mapping[str, Any]) -> None:
        """Write a row of progress.csv."""
        scalars = {tag: float(row[column]) for column, tag in OF_ROW.items() if math.isfinite(row[column])}
        self._write(scalars, int(row["env_steps"]))

    def _write(self, scalars: Mapping[str, float], steps: int) -> None:
        self.events.append(scalars, steps)
        if self.run is not None and scalars:
            self.run.log({**scalars, "env_steps": steps})

    def close(self) -> None:
        """End the run of Weights & Biases."""
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
