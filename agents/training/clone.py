"""``python -m agents.clone experiment=clone_serve``: learn from a planner that knows the next seconds.

On training windows, the planner stops the engine at a tick, runs legal plans from there for some seconds on the
requests that will really arrive (``SimEngine.snapshot``), and records the utility that each plan loses. A network
learns to predict these losses from what a server can observe. It is trained by regression, so it predicts the mean over
all futures that match the observation, and the plan it rates best is the best on average. A copy of the planner's
choices would not have this property. What a plan of a row loses counts only against the other plans tried there.

The planner knows arrivals and output lengths. It is used on training windows only; the network does not know them.
Looking ahead takes most of the time. Its result is kept in demonstrations.npz, which other seeds can read
(``algorithm.demonstrations``).
"""

from __future__ import annotations

import copy
import math
import time
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from hydra.core.hydra_config import HydraConfig
from numpy.typing import NDArray
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from agents.envs.reward import utility_lost
from agents.envs.serve import ServeCore, ServeSetting
from agents.envs.serve_windows import Window
from agents.training.checks import check_training
from agents.training.export import export_network
from agents.training.train import environment_kwargs
from agents.training.validation import validation_utilities
from sim.atomic import write_whole
from sim.config import build, one_thread, run_command
from sim.errors import ConfigError
from sim.paths import REPOSITORY
from sim.policies.admission import built
from sim.policies.base import Policy, PolicyContext
from sim.policies.learned import Network, network_of, pair_values
from sim.policies.learned_serve import own_plan
from sim.progress import progress
from sim.results.run_folder import provenance, write_json, write_text
from sim.types import Floats32

SCALE_REQUESTS = 600
"""Losses are stated as in a window of this many requests, so each window counts the same in a fit, as it does in
utility. Counted in requests, a busy window would count as much as a hundred calm ones."""
LEAST_SPREAD = 0.01
"""An entry that moves less than this in training counts as if it moved this much."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LookaheadClone:
    """How the planner looks ahead, and how the network learns from it.

    windows: training windows. every: ticks between two looks ahead. horizon_s: seconds that each look covers.
    trials: plans that a look tries: the present one, and others chosen at random; None tries every legal plan.
    demonstrations: glob of the demonstrations.npz of other clones, which are read instead of looking ahead; None looks
        ahead.
    grace_s: a request still waiting at the horizon counts as late this many seconds before its TTFT target.
    then: a rule (as ``policy.policy`` of conf/policy/saber.yaml names one) that decides after the tried plan ran for
        ``hold_s`` seconds of a look; None keeps the tried plan to the horizon. Where memory moves faster than the
        horizon, no plan is good for all of it, and a tried plan is worth what a good rule makes of the state it leaves.
        Between two looks its plans run, if they are among the actions: looking ahead again with the policy learned so
        far (``{name: learned_serve, path: FILE.json}``) shows the network the states that this policy leads to.
    stray: share of looks after which a random legal plan runs instead of the best, so that the network also sees states
        that follow from its mistakes.
    epochs, batch, lr, weight_decay: of the fit by Adam.
    """

    windows: int
    every: int
    horizon_s: float
    grace_s: float
    stray: float
    epochs: int
    batch: int
    lr: float
    weight_decay: float
    trials: int | None = None
    demonstrations: str | None = None
    then: Any = None
    hold_s: float | None = None

    def __post_init__(self) -> None:
        if (self.then is None) != (self.hold_s is None):
            raise ConfigError("algorithm.then and algorithm.hold_s belong together: a rule, and the seconds before it")
        if self.hold_s is not None and not 0 < self.hold_s <= self.horizon_s:
            raise ConfigError(
                f"algorithm.hold_s is {self.hold_s}; it must be above 0 and at most horizon_s, {self.horizon_s}"
            )


def look_ahead(
    core: ServeCore,
    horizon_s: float,
    grace_s: float,
    tried: NDArray[np.bool_] | None = None,
    then: Policy | None = None,
    hold_s: float = 0.0,
) -> NDArray[np.float64]:
    """Return the utility that each plan loses within the horizon, float64[a], in requests; NaN where it is not tried.

    Args:
        tried: bool[a]; None tries every plan. A plan that is not legal is never tried.
        then, hold_s: a copy of this policy decides at every tick from ``hold_s`` seconds on; None keeps the plan.
    """
    setting, engine = core.setting, core.engine
    legal = core.actions.legal(core.state, core.choice)
    if tried is not None:
        legal &= tried
    end_s = core.state.time_s + horizon_s
    saved = engine.snapshot()
    lost = np.full(len(legal), np.nan)
    for action in np.flatnonzero(legal).tolist():
        engine.apply(setting.actions.plans[action])
        if then is not None:
            _follow(core, copy.deepcopy(then), core.state.time_s + hold_s, end_s)
        engine.run_until(end_s)
        lost[action] = utility_lost(engine.records(), setting.slo, setting.dense_nll, end_s, 1, ahead_s=grace_s)
        engine.restore(saved)
    return lost


def _follow(core: ServeCore, policy: Policy, first_s: float, end_s: float) -> None:
    """Let a policy decide at every tick from a time on; it has seen every tick before."""
    ticks = math.ceil((end_s - core.state.time_s) / core.setting.tick_s - 1e-9)
    for number in range(1, ticks):
        state = core.engine.run_until(core.state.time_s + number * core.setting.tick_s)
        plan = policy(state)
        if state.time_s >= first_s - 1e-9:
            core.engine.apply(plan)


def demonstrations(setting: ServeSetting, config: LookaheadClone, seed: int) -> tuple[Floats32, NDArray[np.float64]]:
    """Return features float32[n, o] and the utility that each plan loses, float64[n, a].

    The unit is a request of a window that has ``SCALE_REQUESTS``: the share of the window's requests, times that.

    Args:
        setting: what is served; its split must be "train". config: how to look ahead. seed: of windows and random
            plans.
    """
    rng = np.random.default_rng(seed)
    core = ServeCore(setting)
    numbers = {plan: number for number, plan in enumerate(setting.actions.plans)}
    features, losses = [], []
    with progress("looking ahead", config.windows, "windows") as report:
        for number in range(config.windows):
            window = setting.sample_window(rng)
            core.begin(window)
            offset = int(rng.integers(config.every))
            action = core.choice.action
            then = None if config.then is None else rule_for(config.then, setting, window)
            for tick in range(1, setting.ticks - 1):
                if then is not None:
                    # A learned policy may replace the limits of its plan by measured ones, which are in no table.
                    action = numbers.get(own_plan(then, then(core.state)), action)
                legal = core.actions.legal(core.state, core.choice)
                observed = core.observe()[: setting.table.features]
                if tick % config.every == offset:
                    tried = _tried(rng, legal, core, config.trials)
                    lost = look_ahead(core, config.horizon_s, config.grace_s, tried, then, config.hold_s or 0.0)
                    features.append(observed)
                    losses.append(lost * SCALE_REQUESTS / max(1, core.requests))
                    action = int(np.nanargmin(lost))
                    if rng.random() < config.stray:
                        action = int(rng.choice(np.flatnonzero(legal)))
                core.step(action if legal[action] else core.choice.action)
            report(number + 1)
    return np.stack(features), np.stack(losses)


def rule_for(then: Any, setting: ServeSetting, window: Window) -> Policy:
    """Return a new policy for the server of a window: its costs of low precision, and whether it has such copies.

    The policy takes the server to be as fast as calibrated, and measures the speed that it has. Only ``learned_serve``
    knows servers without copies at low precision; another rule should name none.
    """
    if isinstance(then, Mapping) and then.get("name") == "learned_serve":
        then = {**then, "low_bits": window.low_bits}
    return built(then, PolicyContext.of(replace(setting.server_for(window), slowdown=1.0)))


def _tried(
    rng: np.random.Generator, legal: NDArray[np.bool_], core: ServeCore, trials: int | None
) -> NDArray[np.bool_] | None:
    """Return which plans a look tries: the present one and random legal ones, ``trials`` in all."""
    if trials is None or legal.sum() <= trials:
        return None
    present = core.choice.action
    others = np.flatnonzero(legal & (np.arange(len(legal)) != present))
    tried = np.zeros(len(legal), dtype=np.bool_)
    tried[rng.choice(others, trials - 1, replace=False)] = tried[present] = True
    return tried


def read_demonstrations(pattern: str, shape: tuple[int, int]) -> tuple[Floats32, NDArray[np.float64]]:
    """Return the features and losses of all files that a glob finds, as ``demonstrations``.

    Args:
        shape: entries of an observation, and plans.
    Raises:
        ConfigError: if there is no file, or one was made with another table.
    """
    paths = sorted(REPOSITORY.glob(pattern))
    if not paths:
        raise ConfigError(
            f"algorithm.demonstrations is {pattern!r}, but no such file exists; look ahead first: "
            "python -m agents.clone algorithm.demonstrations=null"
        )
    parts = []
    for path in paths:
        try:
            with np.load(path, allow_pickle=False) as found:
                part = found["features"].astype(np.float32), found["losses"].astype(np.float64)
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise ConfigError(f"{path} holds no demonstrations ({type(error).__name__}: {error})") from error
        if (part[0].shape[1:], part[1].shape[1:]) != ((shape[0],), (shape[1],)) or len(part[0]) != len(part[1]):
            raise ConfigError(
                f"{path} has {part[0].shape} features and {part[1].shape} losses; this environment has {shape[0]} "
                f"entries and {shape[1]} plans; look ahead again with algorithm.demonstrations=null"
            )
        parts.append(part)
    return np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts])


def fit(
    features: Floats32,
    losses: NDArray[np.float64],
    config: LookaheadClone,
    cfg: DictConfig,
    env_kwargs: dict[str, Any],
    heads: tuple[int, int] | None = None,
) -> tuple[Network, float, list[tuple[int, float, float]]]:
    """Fit a network to the losses of plans.

    Args:
        features: float32[n, o]. losses: float64[n, a], as of ``demonstrations``; NaN where a plan was not legal.
        config: epochs, batch and learning rate. cfg: sizes of hidden layers, and the seed.
        env_kwargs: of the validation episodes. heads: as in ``Network``.
    Returns:
        The network with the best validation utility, this utility, and (epoch, error, utility) of every validation.
    """
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(int(cfg.seed))
    known = ~np.isnan(losses)
    # The target of a plan is how much less it loses than the mean of the plans tried with it; outputs are compared in
    # the same way, so they rank plans.
    mean = np.nanmean(losses, axis=1, keepdims=True)
    target = torch.from_numpy(np.where(known, mean - losses, 0.0).astype(np.float32))
    mean_entry, spread = _scales(features)
    mask, inputs = torch.from_numpy(known), torch.from_numpy((features - mean_entry) / spread)
    model = _perceptron([features.shape[1], *cfg.hidden, sum(heads) if heads else losses.shape[1]])
    optimizer = torch.optim.Adam(model.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    rng = np.random.default_rng(int(cfg.seed))
    best: tuple[float, Network] | None = None
    history = []
    with progress("fitting", config.epochs, "epochs") as report:
        for epoch in range(1, config.epochs + 1):
            error = 0.0
            for rows in np.array_split(rng.permutation(len(features)), max(1, len(features) // config.batch)):
                # Huber, because losses have long tails: in a burst every plan can lose a tenth of the window.
                values, tried = model(inputs[rows]), mask[rows]
                values = pair_values(values, heads) if heads else values
                values = values - (values * tried).sum(1, keepdim=True) / tried.sum(1, keepdim=True)
                errors = torch.nn.functional.huber_loss(values, target[rows], reduction="none", delta=3.0)
                loss = (errors * tried).sum() / tried.sum()
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                error += float(loss.detach()) * len(rows) / len(features)
            if epoch % 10 == 0 or epoch == config.epochs:
                network = _network(model, heads, mean_entry, spread)
                utility = float(validation_utilities(cfg.env.id, env_kwargs, network).mean())
                history.append((epoch, error, utility))
                if best is None or utility > best[0]:
                    best = utility, network
            report(epoch)
    assert best is not None
    return best[1], best[0], history


def _perceptron(sizes: Sequence[int]) -> Any:
    """Return a torch perceptron with layers of these sizes and ReLU between them."""
    import torch

    layers: list[torch.nn.Module] = []
    for i, (size, out) in enumerate(pairwise(sizes)):
        layers += [torch.nn.Linear(size, out)] + ([torch.nn.ReLU()] if i < len(sizes) - 2 else [])
    return torch.nn.Sequential(*layers)


def _scales(features: Floats32) -> tuple[Floats32, Floats32]:
    """Return the mean and the spread of each entry, float32[o]: what the fit subtracts, and divides by.

    Entries of an observation fill their ranges unequally (the memory there is moves over a tenth of its range), and a
    fit learns little from those that hardly move.
    """
    return features.mean(axis=0), np.maximum(features.std(axis=0), LEAST_SPREAD)


def _network(model: Any, heads: tuple[int, int] | None, mean: Floats32, spread: Floats32) -> Network:
    """Return a copy, in NumPy, of a ``_perceptron`` that was fitted to ``(features - mean) / spread``.

    Its first layer takes the features as they are.
    """
    linear = [layer for layer in model if hasattr(layer, "weight")]
    pairs = [(layer.weight.detach().numpy().copy(), layer.bias.detach().numpy().copy()) for layer in linear]
    weight, bias = pairs[0]
    weight /= spread
    pairs[0] = weight, bias - weight @ mean
    return network_of(pairs, "relu", heads)


def clone(cfg: DictConfig, folder: Path) -> float:
    """Look ahead, fit a network and export it to a folder; return its mean validation utility, in [0, 1].

    Raises:
        ConfigError: for another algorithm or environment, a value that is out of range, or a folder with a clone.
    """
    config = build(cfg.algorithm)
    if not isinstance(config, LookaheadClone) or cfg.env.id != "ServeTrace-v0":
        raise ConfigError(
            "agents.clone needs algorithm=lookahead_clone and env=serve_trace; use experiment=clone_serve"
        )
    check_training(cfg)
    if (folder / "best" / "policy.json").exists():
        raise ConfigError(f"{folder} already holds a clone; make another with label=...")
    console = Console()
    env_kwargs = environment_kwargs(cfg)
    write_text(folder / "config.yaml", OmegaConf.to_yaml(cfg, resolve=True))
    write_json(folder / "provenance.json", provenance(cfg.seed))
    started_s = time.monotonic()
    setting = ServeSetting(**env_kwargs)
    if config.demonstrations is None:
        features, losses = demonstrations(setting, config, int(cfg.seed))
        write_whole(folder / "demonstrations.npz", partial(_save, features=features, losses=losses))
    else:
        shape = setting.table.features, len(setting.actions.plans)
        features, losses = read_demonstrations(config.demonstrations, shape)
    console.print(
        f"looked ahead at {len(features):,} ticks, {time.monotonic() - started_s:.0f} s",
        highlight=False,
    )
    heads = setting.actions.heads if min(setting.actions.heads) > 1 else None
    network, utility, history = fit(features, losses, config, cfg, env_kwargs, heads)
    seconds = time.monotonic() - started_s
    status = {"iteration": max(history, key=lambda row: row[2])[0], "seconds": seconds}
    export_network(folder / "best" / "policy.json", network, cfg, env_kwargs, status, utility)
    rows = [f"{epoch},{error:.5f},{validated:.5f}" for epoch, error, validated in history]
    write_text(folder / "fit.csv", "\n".join(["epoch,error,validation_utility", *rows]) + "\n")
    console.print(
        f"validation utility {utility:.4f} after {seconds:.0f} s; files: {folder}", highlight=False, soft_wrap=True
    )
    return utility


def _save(part: Path, **arrays: NDArray[Any]) -> None:
    with part.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)


def _run(cfg: DictConfig) -> None:
    clone(cfg, Path(HydraConfig.get().runtime.output_dir))


def main() -> None:
    """Run ``python -m agents.clone``."""
    one_thread()
    run_command(_run, "clone")
