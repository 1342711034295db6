"""Begin with imitation: fit the network to what a baseline does, before reinforcement learning takes over.

Behaviour cloning by cross-entropy on the actions of a solver. A solver names a set of blocks, not an order; every block
of the set that is still kept is an equally good action, so the target is uniform over them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from agents.draws import prune_draws
from agents.episodes import FILE, read_episodes
from agents.modules import MaskedDQN, actor_logits
from agents.prune_contest import solver
from agents.prune_env import PruneToBudgetVector
from agents.serve_vector import ServeTraceVector
from sim.data import REPOSITORY
from sim.errors import ConfigError, nearest


def imitate_knapsack(
    algorithm: Any, env: str, words: Mapping[str, Any], *, seed: int, draws: int, epochs: int, batch: int, lr: float
) -> float:
    """Clone the knapsack's plans of ``draws`` training loads into the module of an algorithm; return the last loss.

    Raises:
        ConfigError: for an environment in which a solver's plan is no sequence of drops.
    """
    if isinstance(algorithm.get_module(), MaskedDQN):
        raise ConfigError("imitation fits action probabilities, which DQN does not have; use algorithm=ppo")
    if env != "PruneToBudget-v0" or words.get("restore") or words.get("sequence", 1) != 1:
        raise ConfigError("imitate=knapsack knows PruneToBudget with one load an episode and no restoring")
    observations, targets = knapsack_demonstrations(words, seed=seed, draws=draws)
    return _fit(algorithm, observations, targets, seed=seed, epochs=epochs, batch=batch, lr=lr)


def imitate_plan(
    algorithm: Any,
    env: str,
    words: Mapping[str, Any],
    *,
    seed: int,
    plan: str,
    share: float,
    windows: int,
    epochs: int,
    batch: int,
    lr: float,
) -> float:
    """Begin with one plan of ``ServeTrace``'s table at ``share``, the other legal ones alike; return the last loss.

    A network that begins at random changes weights at every tick that it may, and learns little from what follows.

    Raises:
        ConfigError: for another environment, an algorithm without action probabilities, or a plan that is not there.
    """
    if isinstance(algorithm.get_module(), MaskedDQN) or env != "ServeTrace-v0":
        raise ConfigError("imitate=plan needs ServeTrace and an algorithm with action probabilities, such as ppo")
    vector = ServeTraceVector(windows, **words)
    names = vector.setting.actions.names
    if plan not in names:
        raise ConfigError(f"imitate.plan: there is no {plan!r}; {nearest(plan, names)}")
    chosen, features = names.index(plan), vector.setting.table.features
    rng = np.random.default_rng(seed)
    seen, _ = vector.reset(seed=seed)
    observations, targets = [], []
    for _ in range(vector.setting.ticks - 1):
        legal = seen[:, features:]
        target = (1.0 - share) * legal / legal.sum(axis=1, keepdims=True)
        target[:, chosen] += share * legal[:, chosen]
        observations.append(seen)
        targets.append((target / target.sum(axis=1, keepdims=True)).astype(np.float32))
        stray = (rng.random(legal.shape) * legal).argmax(axis=1)
        seen, *_ = vector.step(np.where((rng.random(windows) < share) & (legal[:, chosen] > 0.5), chosen, stray))
    shown, wanted = np.concatenate(observations), np.concatenate(targets)
    return _fit(algorithm, shown, wanted, seed=seed, epochs=epochs, batch=batch, lr=lr)


def imitate_offline(
    algorithm: Any, env: str, words: Mapping[str, Any], *, seed: int, data: str, epochs: int, batch: int, lr: float
) -> float:
    """Clone what episodes show that anybody wrote (``agents.offline``); return the last loss.

    Raises:
        ConfigError: for an algorithm without action probabilities, or a folder without episodes of this environment.
    """
    if isinstance(algorithm.get_module(), MaskedDQN):
        raise ConfigError("imitation fits action probabilities, which DQN does not have; use algorithm=ppo")
    module = algorithm.get_module()
    observations, actions = read_episodes(REPOSITORY / data / FILE, module.observation_space.shape)
    done = np.eye(int(module.action_space.n), dtype=np.float32)[actions]
    return _fit(
        algorithm,
        observations,
        done,
        seed=seed,
        epochs=epochs,
        batch=batch,
        lr=lr,
    )


def _fit(
    algorithm: Any,
    observations: np.ndarray[Any, np.dtype[np.float32]],
    targets: np.ndarray[Any, np.dtype[np.float32]],
    *,
    seed: int,
    epochs: int,
    batch: int,
    lr: float,
) -> float:
    """Fit the policy of an algorithm to target shares of actions by cross-entropy."""
    import torch

    learner = algorithm.learner_group._learner
    module = learner.module["default_policy"]
    module = module.unwrapped() if hasattr(module, "unwrapped") else module
    optimiser = torch.optim.Adam(module.parameters(), lr=lr)
    rng = np.random.default_rng(seed)
    loss = torch.zeros(())
    for _ in range(epochs):
        for chosen in np.array_split(rng.permutation(len(observations)), max(1, len(observations) // batch)):
            logits = actor_logits(module, torch.from_numpy(observations[chosen]))
            wanted = torch.from_numpy(targets[chosen])
            loss = -(wanted * torch.log_softmax(logits, dim=-1).clamp(min=-30.0)).sum(dim=-1).mean()
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
    algorithm.env_runner_group.sync_weights(from_worker_or_learner_group=algorithm.learner_group)
    return float(loss.detach())


def knapsack_demonstrations(
    words: Mapping[str, Any], *, seed: int, draws: int
) -> tuple[np.ndarray[Any, np.dtype[np.float32]], np.ndarray[Any, np.dtype[np.float32]]]:
    """Return observations and target shares of actions, along one random order of each solution."""
    rng = np.random.default_rng(seed)
    split = prune_draws()
    loads = [split.sample(rng, "train") for _ in range(draws)]
    vector = PruneToBudgetVector(draws, **words)
    solve = solver(vector.setting.model, vector.setting.quality.blocks)
    wanted = np.stack([solve(draw) for draw in loads])
    seen, _ = vector.reset(options={"draws": [[draw] for draw in loads]})
    over = np.zeros(draws, dtype=np.bool_)
    observations, targets = [], []
    while not over.all():
        left = wanted & ~vector.removed
        going = ~over & left.any(axis=1)
        observations.append(seen[going])
        targets.append((left[going] / left[going].sum(axis=1, keepdims=True)).astype(np.float32))
        actions = np.where(left, rng.random(left.shape), -1.0).argmax(axis=1)
        seen, _, terminated, truncated, _ = vector.step(actions)
        over |= terminated | truncated | ~going
    return np.concatenate(observations), np.concatenate(targets)
