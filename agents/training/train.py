"""``python -m agents.train experiment=...``: train a policy with RLlib; ``--help`` shows how."""

from __future__ import annotations

import contextlib
import logging
import os
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

from agents.training.checkpoints import Checkpoints
from agents.training.checks import check_resumed, check_train_split, check_training
from agents.training.dashboards import Dashboards, check_wandb
from agents.training.export import export_network
from agents.training.on_ray import join_ray
from agents.training.progress import Progress, progress_row
from agents.training.validation import CountedActs, validation_utilities
from sim.config import build, one_thread, run_command
from sim.errors import ConfigError
from sim.policies.learned import Network
from sim.progress import Report, say
from sim.progress import progress as show_progress
from sim.results.run_folder import provenance, write_json, write_text


@dataclass(kw_only=True)
class RayConfig:
    """Where to train.

    address: an existing Ray cluster, ``auto`` or host:port; null starts Ray on this machine.
    runners: remote env runners; 0 samples in the driver, which is fastest for a cheap environment on two cores.
    """

    address: str | None = None
    runners: int = 0


@dataclass(kw_only=True)
class TrainConfig:
    """The configuration of a training.

    label: names the run folder.
    minutes, iterations: training stops at the first of these limits; null means no limit on iterations.
    num_envs: environments per runner. hidden, activation: layers of the network.
    validate_every: iterations between validations.
    patience, min_gain: training stops after ``patience`` validations in a row that raise the best utility by at most
        ``min_gain``.
    checkpoint_minutes: minutes between checkpoints. resume: continue from the folder's last checkpoint.
    imitate: imitation before training (agents/training/imitate.py); null for none.
    wandb: project of Weights & Biases that the training is logged to; null for none. It needs the extra wandb.
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
    wandb: str | None = None
    ray: RayConfig = field(default_factory=RayConfig)


ConfigStore.instance().store(name="train_schema", node=TrainConfig)

BELOW_ALL = -1e300
"""The best validation utility before the first validation; a checkpoint states it, and JSON has no infinity."""


def environment_kwargs(cfg: DictConfig) -> dict[str, Any]:
    """Return the arguments of the environment, reward included, as plain values.

    Raises:
        ConfigError: if they name another split than that of training.
    """
    kwargs: dict[str, Any] = OmegaConf.to_container(cfg.env.kwargs, resolve=True)  # type: ignore[assignment]
    check_train_split(kwargs)
    reward: Any = OmegaConf.to_container(cfg.reward, resolve=True)
    return {**kwargs, "reward": reward}


def _heads(cfg: DictConfig) -> tuple[int, int] | None:
    """Return the heads of an actor whose actions are pairs of weights and a wait limit; None for other actions."""
    if cfg.env.id not in ("ServeTrace-v0", "ServeCluster-v0"):
        return None
    from agents.envs.cluster import ClusterSetting
    from agents.envs.serve import ServeSetting

    setting = ServeSetting if cfg.env.id == "ServeTrace-v0" else ClusterSetting
    heads = setting(**environment_kwargs(cfg)).actions.heads
    return heads if min(heads) > 1 else None


def build_algorithm(cfg: DictConfig) -> Any:
    """Build the RLlib algorithm of a configuration; Ray must be running."""
    from agents.training.algorithms import Setup

    logging.getLogger("ray.rllib").setLevel(logging.ERROR)  # or it explains its own versions at each start
    setup = Setup(
        env=f"agents.envs.registration:{cfg.env.id}",
        env_kwargs=environment_kwargs(cfg),
        seed=cfg.seed,
        num_envs=cfg.num_envs,
        runners=cfg.ray.runners,
        hidden=tuple(cfg.hidden),
        activation=cfg.activation,
        heads=_heads(cfg),
    )
    algorithm = build(cfg.algorithm)(setup).build_algo()
    if algorithm.local_replay_buffer is not None:
        algorithm.local_replay_buffer.rng = np.random.default_rng(cfg.seed)  # RLlib does not seed it
    return algorithm


def start_ray(cfg: DictConfig) -> None:
    """Join the Ray cluster at ``ray.address``, or start Ray on this machine.

    Raises:
        ConfigError: if no cluster answers at the address.
    """
    import torch

    torch.set_num_threads(1)
    join_ray(cfg.ray.address, **({} if cfg.ray.address else {"num_cpus": max(2, 1 + cfg.ray.runners)}))


def current_network(algorithm: Any, activation: str) -> Network:
    """Return the network with which the algorithm would act now."""
    from agents.training.modules import learner_module, network_of_module

    # An algorithm that learns from written episodes alone has no env runner to hold its module.
    has_runners = algorithm.env_runner_group is not None
    module = algorithm.get_module() if has_runners else learner_module(algorithm)
    return network_of_module(module.get_state(), activation, getattr(module, "heads", None))


def train(cfg: DictConfig, folder: Path, on_validation: Callable[[Mapping[str, Any]], None] | None = None) -> float:
    """Train in a folder.

    Args:
        cfg: a ``TrainConfig``. folder: the run folder. on_validation: called with every row of progress.csv.
    Returns:
        The best mean validation utility, in [0, 1].
    Raises:
        ConfigError: if a value is out of range, if the folder holds a run and ``cfg.resume`` is false, or if a resumed
            run began with other values.
    """
    cfg = without_none(cfg)
    check_training(cfg)
    check_wandb(cfg.wandb)
    checkpoints = Checkpoints(folder)
    progress, console = Progress(folder / "progress.csv"), Console()
    resuming = checkpoints.last() is not None
    if (resuming or progress.has_rows()) and not cfg.resume:
        raise ConfigError(
            f"{folder} already holds a run; continue it with resume=true, or start another with label=..."
        )
    if resuming:
        check_resumed(cfg, folder)
    elif cfg.resume:
        console.print(f"{folder} has no checkpoint; the training starts from the beginning", highlight=False)
    say("starting Ray and building the algorithm: about half a minute")
    start_ray(cfg)
    algorithm = build_algorithm(cfg)
    status: dict[str, Any] = {"iteration": 0, "seconds": 0.0, "best": BELOW_ALL, "since_best": 0}
    if resuming:
        status.update(checkpoints.restore(algorithm))
        console.print(f"resumed at iteration {status['iteration']}, {status['seconds']:.0f} s", highlight=False)
        progress.rewind(status["iteration"])
    else:
        write_text(folder / "config.yaml", OmegaConf.to_yaml(cfg, resolve=True))
        write_json(folder / "provenance.json", provenance(cfg.seed))
        progress.start()
        if cfg.imitate is not None:
            build(cfg.imitate)(algorithm, cfg.env.id, dict(algorithm.config.env_config), seed=cfg.seed)
    try:
        dashboards = Dashboards(folder, cfg)

        def validated(row: Mapping[str, Any]) -> None:
            dashboards.validation(row)
            if on_validation is not None:
                on_validation(row)

        shown = show_progress("training", 100.0, "%", begun=100.0 * limit_share(cfg, status))
        with contextlib.closing(dashboards), shown as report:
            _iterate(cfg, algorithm, status, checkpoints, progress, validated, dashboards.iteration, report)
    finally:
        algorithm.stop()
    console.print(
        f"best validation utility {status['best']:.4f} after {status['seconds']:.0f} s; files: {folder}",
        highlight=False,
        soft_wrap=True,
    )
    return float(status["best"])


NO_IMITATION = "agents.training.imitate.imitate_nothing"


def without_none(cfg: DictConfig) -> DictConfig:
    """Return the configuration with ``imitate=none``, and all keys that an experiment set next to it, as null."""
    if cfg.imitate is None or cfg.imitate.get("_target_") != NO_IMITATION:
        return cfg
    return OmegaConf.merge(cfg, {"imitate": None})  # type: ignore[return-value]


def limit_share(cfg: DictConfig, status: Mapping[str, Any]) -> float:
    """Return how much of ``minutes`` or of ``iterations``, whichever ends first, is used, in [0, 1]."""
    share = status["seconds"] / (60.0 * cfg.minutes)
    if cfg.iterations is not None:
        share = max(share, status["iteration"] / cfg.iterations)
    return min(1.0, float(share))


def _iterate(
    cfg: DictConfig,
    algorithm: Any,
    status: dict[str, Any],
    checkpoints: Checkpoints,
    progress: Progress,
    on_validation: Callable[[Mapping[str, Any]], None],
    on_iteration: Callable[[Mapping[str, Any]], None],
    report: Report,
) -> None:
    """Train, validate and save checkpoints until a limit is reached; keep ``status`` up to date."""
    started_s = time.monotonic() - status["seconds"]
    saved_s = time.monotonic()
    stop = False
    while not stop:
        result = algorithm.train()
        status["iteration"] += 1
        status["seconds"] = time.monotonic() - started_s
        report(100.0 * limit_share(cfg, status), f"at iteration {status['iteration']}")
        on_iteration(result)
        stop = status["seconds"] >= 60.0 * cfg.minutes
        stop |= cfg.iterations is not None and status["iteration"] >= cfg.iterations
        if status["iteration"] % cfg.validate_every == 0 or stop:
            row = progress_row(status, result, *_validate(cfg, algorithm, status, checkpoints.folder))
            progress.append(row)
            if status["iteration"] % (4 * cfg.validate_every) == 0 or stop:
                progress.print(row)
            on_validation(row)
            stop |= status["since_best"] >= cfg.patience
        if stop or time.monotonic() - saved_s >= 60.0 * cfg.checkpoint_minutes:
            checkpoints.save(algorithm, status)
            saved_s = time.monotonic()


def _validate(cfg: DictConfig, algorithm: Any, status: dict[str, Any], folder: Path) -> tuple[float, float]:
    """Return the mean validation utility, and the share of decisions that were the most frequent action.

    The network is exported to the folder if it is the best so far.
    """
    network = current_network(algorithm, cfg.activation)
    env_kwargs = environment_kwargs(cfg)
    acts = CountedActs(network)
    utility = float(validation_utilities(cfg.env.id, env_kwargs, network, acts).mean())
    status["since_best"] += 1
    if utility > status["best"] + cfg.min_gain:
        status["best"], status["since_best"] = utility, 0
        export_network(folder / "best" / "policy.json", network, cfg, env_kwargs, status, utility)
    return utility, acts.top_share


def _run(cfg: DictConfig) -> None:
    train(cfg, Path(HydraConfig.get().runtime.output_dir))


def main() -> None:
    """Run ``python -m agents.train``."""
    one_thread()
    # Hide the warnings of RLlib's pinned version about its own deprecations; warnings about our code stay.
    warnings.filterwarnings("ignore", module=r"ray\..*")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    run_command(_run, "train")
