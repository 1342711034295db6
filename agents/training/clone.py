"""``python -m agents.clone experiment=clone_serve``: learn from a planner that may look ahead, without looking ahead.

On training windows the engine is stopped at a tick, every legal plan is tried from there for some seconds on the very
requests that come (``SimEngine.snapshot``), and what utility each put out of reach is written down. The network learns
to predict that from what a server can observe. Trained by least squares, it predicts the mean over futures that look
the same so far, so that the plan it rates best is best on average; a copy of the planner's choices would not be.

The planner knows arrivals and output lengths of the next seconds. It is a teacher on training windows only.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
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
from agents.training.export import export_network
from agents.training.train import environment_words
from agents.training.validation import validation_utilities
from sim.config import build, one_thread, run_command
from sim.errors import ConfigError
from sim.policies.learned import Network, network_of
from sim.results.run_folder import provenance, write_json, write_text
from sim.types import Floats32


@dataclass(frozen=True, slots=True, kw_only=True)
class LookaheadClone:
    """How to look ahead and how to learn from it.

    windows: training windows. every: ticks from one look ahead to the next. horizon_s: how far. grace_s: a request that
        waits at the horizon counts as late this much before its target. stray: share of ticks at which another legal
        plan runs on, so that the network sees what it will come to when it errs.
    epochs, batch, lr, weight_decay: of the fit.
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


def look_ahead(core: ServeCore, horizon_s: float, grace_s: float) -> NDArray[np.float64]:
    """Return how many requests' utility each plan loses within the horizon [a]; NaN where it is not legal."""
    setting, engine = core.setting, core.engine
    legal = setting.actions.legal(core.state, core.choice)
    end_s = core.state.time_s + horizon_s
    saved = engine.snapshot()
    lost = np.full(len(legal), np.nan)
    for action in np.flatnonzero(legal).tolist():
        engine.apply(setting.actions.plans[action])
        engine.run_until(end_s)
        lost[action] = utility_lost(engine.records(), setting.slo, setting.dense_nll, end_s + grace_s, 1)
        engine.restore(saved)
    return lost


def demonstrations(setting: ServeSetting, how: LookaheadClone, seed: int) -> tuple[Floats32, NDArray[np.float64]]:
    """Return features [n, o] and what each plan loses from there [n, a], in requests."""
    rng = np.random.default_rng(seed)
    core = ServeCore(setting)
    features, losses = [], []
    for _ in range(how.windows):
        core.begin(setting.windows.sample(rng, setting.split, setting.sources))
        offset = int(rng.integers(how.every))
        action = 0
        for tick in range(1, setting.ticks - 1):
            legal = setting.actions.legal(core.state, core.choice)
            seen = core.observe()[: setting.table.features]
            if tick % how.every == offset:
                lost = look_ahead(core, how.horizon_s, how.grace_s)
                features.append(seen)
                losses.append(lost)
                action = int(np.nanargmin(lost))
                if rng.random() < how.stray:
                    action = int(rng.choice(np.flatnonzero(legal)))
            core.step(action if legal[action] else core.choice.action)
    return np.stack(features), np.stack(losses)


def fit(
    features: Floats32, losses: NDArray[np.float64], how: LookaheadClone, cfg: DictConfig, words: dict[str, Any]
) -> tuple[Network, float, list[tuple[int, float, float]]]:
    """Return the network with the best validation utility, that utility, and (epoch, error, utility) on the way."""
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(int(cfg.seed))
    known = ~np.isnan(losses)
    mean = np.nanmean(losses, axis=1, keepdims=True)
    target = torch.from_numpy(np.where(known, mean - losses, 0.0).astype(np.float32))
    mask, seen = torch.from_numpy(known), torch.from_numpy(features)
    sizes = [features.shape[1], *cfg.hidden, losses.shape[1]]
    layers: list[torch.nn.Module] = []
    for i, (size, out) in enumerate(pairwise(sizes)):
        layers += [torch.nn.Linear(size, out)] + ([torch.nn.ReLU()] if i < len(sizes) - 2 else [])
    model = torch.nn.Sequential(*layers)
    optimiser = torch.optim.Adam(model.parameters(), lr=how.lr, weight_decay=how.weight_decay)
    rng = np.random.default_rng(int(cfg.seed))
    best: tuple[float, Network] | None = None
    history = []
    for epoch in range(1, how.epochs + 1):
        error = 0.0
        for chosen in np.array_split(rng.permutation(len(features)), max(1, len(features) // how.batch)):
            # Losses have long tails: a burst can cost forty requests whatever is done.
            off = torch.nn.functional.huber_loss(model(seen[chosen]), target[chosen], reduction="none", delta=3.0)
            loss = (off * mask[chosen]).sum() / mask[chosen].sum()
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            error += float(loss.detach()) * len(chosen) / len(features)
        if epoch % 10 == 0 or epoch == how.epochs:
            linear = [layer for layer in model if isinstance(layer, torch.nn.Linear)]
            pairs = [(x.weight.detach().numpy().copy(), x.bias.detach().numpy().copy()) for x in linear]
            network = network_of(pairs, "relu")
            reached = float(validation_utilities(cfg.env.id, words, network).mean())
            history.append((epoch, error, reached))
            if best is None or reached > best[0]:
                best = reached, network
    assert best is not None
    return best[1], best[0], history


def clone(cfg: DictConfig, folder: Path) -> float:
    """Look ahead, learn, export to a folder; return the validation utility.

    Raises:
        ConfigError: for an algorithm that is not this one, or another environment.
    """
    how = build(cfg.algorithm)
    if not isinstance(how, LookaheadClone) or cfg.env.id != "ServeTrace-v0":
        raise ConfigError(
            "agents.clone needs algorithm=lookahead_clone and env=serve_trace; use experiment=clone_serve"
        )
    console = Console()
    words = environment_words(cfg)
    write_text(folder / "config.yaml", OmegaConf.to_yaml(cfg, resolve=True))
    write_json(folder / "provenance.json", provenance(cfg.seed))
    begun_s = time.monotonic()
    features, losses = demonstrations(ServeSetting(**words), how, int(cfg.seed))
    looked_s = time.monotonic() - begun_s
    console.print(f"looked ahead at {len(features):,} moments in {looked_s:.0f} s", highlight=False)
    network, reached, history = fit(features, losses, how, cfg, words)
    seconds = time.monotonic() - begun_s
    noted = {"iteration": max(history, key=lambda row: row[2])[0], "seconds": seconds}
    export_network(folder / "best" / "policy.json", network, cfg, words, noted, reached)
    rows = [f"{epoch},{error:.5f},{utility:.5f}" for epoch, error, utility in history]
    write_text(folder / "fit.csv", "\n".join(["epoch,error,validation_utility", *rows]) + "\n")
    console.print(f"validation utility {reached:.4f} after {seconds:.0f} s; files: {folder}", highlight=False)
    return reached


def _run(cfg: DictConfig) -> None:
    clone(cfg, Path(HydraConfig.get().runtime.output_dir))


def clone_command() -> None:
    """Run ``python -m agents.clone``."""
    one_thread()
    run_command(_run, "train")
