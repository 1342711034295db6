"""``python -m agents.train experiment=...``: train a policy with RLlib; ``--help`` shows how."""

from __future__ import annotations

import csv
import json
import os
import pickle
import shutil
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from agents.training.export import export_network
from agents.training.on_ray import join_ray
from agents.training.validation import validation_utilities
from sim.config import build, one_thread, run_command
from sim.errors import ConfigError
from sim.policies.learned import Network
from sim.results.run_folder import provenance, write_json, write_text

BUFFER = "replay_buffer.pickle"
COLUMNS = (
    "iteration",
    "seconds",
    "env_steps",
    "episode_return",
    "validation_utility",
    "best_utility",
    "sample_seconds",
    "learn_seconds",
    "healthy_runners",
)


@dataclass(kw_only=True)
class RayConfig:
    """Where to train. address: an existing cluster (``auto`` or host:port); null starts ray here.

    runners: remote env runners; 0 samples in the driver, fastest for a cheap environment on two cores.
    """

    address: str | None = None
    runners: int = 0


@dataclass(kw_only=True)
class TrainConfig:
    """What a training is told.

    label: names the folder. minutes, iterations: when to stop at the latest; null for no limit of iterations.
    validate_every: iterations from one validation to the next. patience: validations in a row without a better one
        after which training stops; min_gain: what counts as better. checkpoint_minutes: between two checkpoints.
    resume: go on from the folder's last checkpoint. imitate: begin by imitating a policy (agents/training/imitate.py).
    """

    env: Any
    algorithm: Any
    reward: Any
    label: str = "train"
    seed: int = 0
    minutes: float = 10.0
    iterations: int | None = None
    num_envs: int = 64
    hidden: list[int] = field(default_factory=lambda: [84, 84])
    activation: str = "relu"
    validate_every: int = 5
    patience: int = 60
    min_gain: float = 1e-4
    checkpoint_minutes: float = 1.0
    resume: bool = False
    imitate: Any = None
    ray: RayConfig = field(default_factory=RayConfig)


ConfigStore.instance().store(name="train_schema", node=TrainConfig)


def train_command() -> None:
    """Run ``python -m agents.train``."""
    one_thread()
    # RLlib of the pinned version warns of its own deprecations; what it says of ours stays.
    warnings.filterwarnings("ignore", module=r"ray\..*")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    run_command(_run, "train")


def environment_kwargs(cfg: DictConfig) -> dict[str, Any]:
    """Return the arguments of the environment, its reward among them, as plain values."""
    env_kwargs: dict[str, Any] = OmegaConf.to_container(cfg.env.kwargs, resolve=True)  # type: ignore[assignment]
    reward: Any = OmegaConf.to_container(cfg.reward, resolve=True)
    return {**env_kwargs, "reward": reward}


def build_algorithm(cfg: DictConfig) -> Any:
    """Build the RLlib algorithm of a configuration; ray must run."""
    from agents.training.algorithms import Setup

    setup = Setup(
        env=f"agents.envs.registration:{cfg.env.id}",
        env_kwargs=environment_kwargs(cfg),
        seed=cfg.seed,
        num_envs=cfg.num_envs,
        runners=cfg.ray.runners,
        hidden=tuple(cfg.hidden),
        activation=cfg.activation,
    )
    return build(cfg.algorithm)(setup).build_algo()


def start_ray(cfg: DictConfig) -> None:
    """Join the cluster of ``ray.address``, or start ray here.

    Raises:
        ConfigError: when there is no cluster at the address.
    """
    import torch

    torch.set_num_threads(1)
    join_ray(cfg.ray.address, **({} if cfg.ray.address else {"num_cpus": max(2, 1 + cfg.ray.runners)}))


def current_network(algorithm: Any, activation: str) -> Network:
    """Return the network that the algorithm would act with now."""
    from agents.training.modules import network_of_module

    # An algorithm that learns from written episodes alone has no env runner to hold its module.
    plays = algorithm.env_runner_group is not None
    module = algorithm.get_module() if plays else algorithm.learner_group._learner.module["default_policy"]
    return network_of_module(module.get_state(), activation)


class Checkpoints:
    """The last whole checkpoint of a run folder. A killed run leaves the one before or the new one, never half.

    They are RLlib's, which pickles: resume only runs of your own. RLlib's new API stack leaves the replay buffer out
    whatever ``store_buffer_in_checkpoints`` says (2.60), so it is kept beside.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.pointer = folder / "checkpoint.json"

    def last(self) -> tuple[Path, dict[str, Any]] | None:
        """Return where the last checkpoint is, and what was noted with it."""
        if not self.pointer.exists():
            return None
        noted = json.loads(self.pointer.read_text(encoding="utf-8"))
        return self.folder / noted["checkpoint"], noted

    def save(self, algorithm: Any, noted: Mapping[str, Any]) -> None:
        """Save the algorithm, replay buffer included; the one before goes once the new one is named."""
        before = self.last()
        name = f"checkpoint_{noted['iteration']:06d}"
        path = self.folder / name
        shutil.rmtree(path, ignore_errors=True)
        algorithm.save_to_path(path.absolute())
        if algorithm.local_replay_buffer is not None:
            with (path / BUFFER).open("wb") as file:
                pickle.dump(algorithm.local_replay_buffer.get_state(), file, protocol=pickle.HIGHEST_PROTOCOL)
        write_json(self.pointer, {**noted, "checkpoint": name})
        if before is not None and before[0] != path:
            shutil.rmtree(before[0], ignore_errors=True)

    def restore(self, algorithm: Any) -> dict[str, Any]:
        """Put an algorithm where the last checkpoint left it; return what was noted with it, nothing without one."""
        last = self.last()
        if last is None:
            return {}
        path, noted = last
        algorithm.restore_from_path(str(path.absolute()))
        if algorithm.local_replay_buffer is not None:
            with (path / BUFFER).open("rb") as file:
                algorithm.local_replay_buffer.set_state(pickle.load(file))
        return noted


def _run(cfg: DictConfig) -> None:
    folder = Path(HydraConfig.get().runtime.output_dir)
    train(cfg, folder)


def train(cfg: DictConfig, folder: Path, on_validation: Callable[[Mapping[str, Any]], None] | None = None) -> float:
    """Train in a folder; return the best validation utility. ``on_validation`` is told every row of progress.csv."""
    checkpoints = Checkpoints(folder)
    begun = checkpoints.last() is not None
    if begun and not cfg.resume:
        raise ConfigError(f"{folder} holds a run already; resume=true goes on with it, label=... begins another")
    console = Console()
    start_ray(cfg)
    algorithm = build_algorithm(cfg)
    env_kwargs = environment_kwargs(cfg)
    progress = folder / "progress.csv"
    noted: dict[str, Any] = {"iteration": 0, "seconds": 0.0, "best": -np.inf, "since_best": 0}
    if begun:
        noted.update(checkpoints.restore(algorithm))
        console.print(f"resumed at iteration {noted['iteration']}, {noted['seconds']:.0f} s", highlight=False)
        _cut_rows(progress, noted["iteration"])
    else:
        write_text(folder / "config.yaml", OmegaConf.to_yaml(cfg, resolve=True))
        write_json(folder / "provenance.json", provenance(cfg.seed))
        write_text(progress, ",".join(COLUMNS) + "\n")
        if cfg.imitate is not None:
            build(cfg.imitate)(algorithm, cfg.env.id, env_kwargs, seed=cfg.seed)
    begun_s = time.monotonic() - noted["seconds"]
    saved_s = time.monotonic()
    try:
        while True:
            result = algorithm.train()
            noted["iteration"] += 1
            noted["seconds"] = time.monotonic() - begun_s
            stop = noted["seconds"] >= 60.0 * cfg.minutes
            stop |= cfg.iterations is not None and noted["iteration"] >= cfg.iterations
            if noted["iteration"] % cfg.validate_every == 0 or stop:
                network = current_network(algorithm, cfg.activation)
                reached = float(validation_utilities(cfg.env.id, env_kwargs, network).mean())
                noted["since_best"] += 1
                if reached > noted["best"] + cfg.min_gain:
                    noted["best"], noted["since_best"] = reached, 0
                    export_network(folder / "best" / "policy.json", network, cfg, env_kwargs, noted, reached)
                row = _row(noted, result, reached)
                with progress.open("a", newline="", encoding="utf-8") as file:
                    csv.writer(file).writerow(row)
                if noted["iteration"] % (4 * cfg.validate_every) == 0 or stop:
                    _say(console, row)
                if on_validation is not None:
                    on_validation(dict(zip(COLUMNS, row, strict=True)))
                stop |= noted["since_best"] >= cfg.patience
            if stop or time.monotonic() - saved_s >= 60.0 * cfg.checkpoint_minutes:
                checkpoints.save(algorithm, noted)
                saved_s = time.monotonic()
            if stop:
                break
    finally:
        algorithm.stop()
    console.print(
        f"best validation utility {noted['best']:.4f} after {noted['seconds']:.0f} s; files: {folder}",
        highlight=False,
        soft_wrap=True,
    )
    return float(noted["best"])


def _row(noted: Mapping[str, Any], result: Mapping[str, Any], reached: float) -> list[Any]:
    timers = result.get("timers", {})
    learners = result.get("learners", {}).get("__all_modules__", {})
    return [
        noted["iteration"],
        round(noted["seconds"], 2),
        int(result.get("num_env_steps_sampled_lifetime", 0)),
        round(float(result.get("env_runners", {}).get("episode_return_mean", float("nan"))), 5),
        round(reached, 5),
        round(noted["best"], 5),
        round(float(timers.get("env_runner_sampling_timer", float("nan"))), 4),
        round(float(timers.get("learner_update_timer", learners.get("learner_update_timer", float("nan")))), 4),
        int(result.get("fault_tolerance", {}).get("num_healthy_workers", 0)),
    ]


def _say(console: Console, row: list[Any]) -> None:
    seen = dict(zip(COLUMNS, row, strict=True))
    console.print(
        f"{seen['seconds']:7.0f} s  iteration {seen['iteration']:5d}  {seen['env_steps']:9,d} steps  "
        f"return {seen['episode_return']:8.3f}  validation utility {seen['validation_utility']:.4f} "
        f"(best {seen['best_utility']:.4f})",
        highlight=False,
        soft_wrap=True,
    )


def _cut_rows(progress: Path, iteration: int) -> None:
    """Drop the rows that a killed run wrote after its last checkpoint; they will be written again."""
    lines = progress.read_text(encoding="utf-8").splitlines() if progress.exists() else [",".join(COLUMNS)]
    kept = [lines[0], *(line for line in lines[1:] if line and int(line.split(",")[0]) <= iteration)]
    write_text(progress, "\n".join(kept) + "\n")
