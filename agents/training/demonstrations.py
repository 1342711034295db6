"""What a training starts from: what a solver, a teacher or one fixed plan would do, or the network of a policy.

The first three give observations with target action probabilities.

A solver returns a set of blocks, not an order. Every block of the set that is still kept is an equally good action, so
the target is uniform over them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from agents.baselines.prune import solver
from agents.envs.prune_loads import prune_loads
from agents.envs.prune_vector import PruneToBudgetVector
from agents.envs.roles_vector import ServeRolesVector
from agents.envs.serve_vector import ServeTraceVector
from sim.errors import ConfigError
from sim.paths import REPOSITORY
from sim.policies.learned import Learned, Network, read_learned
from sim.policies.observation.serve import ServeActions
from sim.types import Floats32

# Shapes: n rows, o entries of an observation, a actions.


def knapsack_demonstrations(
    env_kwargs: Mapping[str, Any], *, seed: int, loads: int, discount: float = 1.0
) -> tuple[Floats32, Floats32, Floats32]:
    """Return observations [n, o], target probabilities [n, a] and returns [n] along one order of each solution.

    Args:
        env_kwargs: arguments of ``PruneToBudget``. seed: of loads and of the random orders.
        loads: number of training loads. discount: per step, of the returns, which are in units of reward.
    """
    rng = np.random.default_rng(seed)
    split = prune_loads()
    sampled = [split.sample(rng, "train") for _ in range(loads)]
    vector = PruneToBudgetVector(loads, **env_kwargs)
    solve = solver(vector.setting.model, vector.setting.quality.blocks)
    solutions = np.stack([solve(load) for load in sampled])
    observed, _ = vector.reset(options={"loads": [[load] for load in sampled]})
    over = np.zeros(loads, dtype=np.bool_)
    observations, targets, rewards, played = [], [], [], []
    while not over.all():
        left = solutions & ~vector.removed
        active = ~over & left.any(axis=1)
        observations.append(observed[active])
        targets.append((left[active] / left[active].sum(axis=1, keepdims=True)).astype(np.float32))
        actions = np.where(left, rng.random(left.shape), -1.0).argmax(axis=1)
        observed, reward, terminated, truncated, _ = vector.step(actions)
        rewards.append(np.where(active, reward, 0.0))
        played.append(active)
        over |= terminated | truncated | ~active
    value, returns = np.zeros(loads), []
    for reward, active in zip(reversed(rewards), reversed(played), strict=True):
        value = reward + discount * value
        returns.append(value[active].astype(np.float32))
    return np.concatenate(observations), np.concatenate(targets), np.concatenate(returns[::-1])


def imitated_plan(actions: ServeActions, name: str) -> int:
    """Return the number of the plan that ``imitate.plan`` names.

    Raises:
        ConfigError: if the table does not have it.
    """
    try:
        return actions.named(name)
    except ConfigError as error:
        raise ConfigError(f"imitate.plan: {error}; imitate=none starts without one") from error


def plan_demonstrations(
    env_kwargs: Mapping[str, Any], *, seed: int, plan: str, share: float, windows: int
) -> tuple[Floats32, Floats32]:
    """Return observations [n, o] and target probabilities [n, a] of running mostly one plan of ``ServeTrace``.

    Args:
        env_kwargs: arguments of ``ServeTrace``. seed: of windows and actions. plan: its name in the table.
        share: probability of the plan; the rest is uniform over the legal actions. windows: played at once.
    Raises:
        ConfigError: for a plan that the table does not have.
    """
    vector = ServeTraceVector(windows, **env_kwargs)
    chosen, plans = imitated_plan(vector.setting.actions, plan), len(vector.setting.actions.plans)
    rng = np.random.default_rng(seed)
    observed, _ = vector.reset(seed=seed)
    observations, targets = [], []
    for _ in range(vector.setting.ticks - 1):
        legal = observed[:, -plans:]
        target = (1.0 - share) * legal / legal.sum(axis=1, keepdims=True)
        target[:, chosen] += share * legal[:, chosen]
        observations.append(observed)
        targets.append((target / target.sum(axis=1, keepdims=True)).astype(np.float32))
        other = (rng.random(legal.shape) * legal).argmax(axis=1)
        keep = (rng.random(windows) < share) & (legal[:, chosen] > 0.5)
        observed, *_ = vector.step(np.where(keep, chosen, other))
    return np.concatenate(observations), np.concatenate(targets)


def phase_demonstrations(
    env_kwargs: Mapping[str, Any], *, seed: int, counts: Mapping[str, int], share: float, episodes: int, discount: float
) -> tuple[Floats32, Floats32, Floats32]:
    """Return observations [n, o], target probabilities [n, a] and returns [n] of a teacher of ``ServeRoles``.

    The teacher knows which source plays now, and runs its number of prefill replicas where that is legal.

    Args:
        env_kwargs: arguments of ``ServeRoles``. seed: of episodes and actions. counts: for each source, the teacher's
            number. share: probability of the teacher's action; the rest is uniform over the legal actions.
        episodes: played at once. discount: per tick, of the returns, which are in units of reward.
    Raises:
        ConfigError: for a source without a number that the system can have.
    """
    vector = ServeRolesVector(episodes, **env_kwargs)
    setting, rows = vector.setting, np.arange(episodes)
    for source in setting.sources:
        if not 1 <= counts.get(source, 0) < setting.replicas:
            raise ConfigError(
                f"imitate.counts has {counts.get(source)} for {source}; each source of the traffic needs a number from "
                f"1 to {setting.replicas - 1}, such as imitate.counts.{source}=3"
            )
    rng, features = np.random.default_rng(seed), setting.table.features
    observed, _ = vector.reset(seed=seed)
    observations, targets, rewards = [], [], []
    for tick in range(1, setting.ticks):
        playing = [setting.source_at(windows, tick * setting.tick_s) for windows in vector.windows]
        chosen, legal = np.array([counts[source] for source in playing]) - 1, observed[:, features:]
        target = (1.0 - share) * legal / legal.sum(axis=1, keepdims=True)
        target[rows, chosen] += share * legal[rows, chosen]
        observations.append(observed)
        targets.append((target / target.sum(axis=1, keepdims=True)).astype(np.float32))
        other = (rng.random(legal.shape) * legal).argmax(axis=1)
        keep = (rng.random(episodes) < share) & (legal[rows, chosen] > 0.5)
        observed, reward, *_ = vector.step(np.where(keep, chosen, other))
        rewards.append(reward)
    value, returns = np.zeros(episodes), []
    for reward in reversed(rewards):
        value = reward + discount * value
        returns.append(value)
    return np.concatenate(observations), np.concatenate(targets), np.concatenate(returns[::-1]).astype(np.float32)


def starting_policy(path: str, member: int | None) -> tuple[Learned, Network]:
    """Return the policy of ``imitate.path``, and the network of it that a training starts with.

    Raises:
        ConfigError: for a file that does not exist, a policy that averages several networks without a member, or a
            member that is not there.
    """
    file = REPOSITORY / path if path.endswith(".json") else path
    if isinstance(file, Path) and not file.is_file():
        raise ConfigError(
            f"imitate.path: there is no {file}; a clone of the same seed writes it (python -m agents.clone seed=N), or "
            "start from a shipped policy: imitate.path=learned_serve_llama2 imitate.member=0"
        )
    learned = read_learned(file, "ServeTrace")
    count = learned.network.members
    if member is None and count > 1:
        raise ConfigError(
            f"imitate.path: {path} averages {count} networks; a training starts from one of them: imitate.member=0 to "
            f"{count - 1}, or runs/train/LABEL/seed_N/best/policy.json"
        )
    if member is not None and not 0 <= member < count:
        networks, last = ("1 network", "") if count == 1 else (f"{count} networks", f" to {count - 1}")
        raise ConfigError(f"imitate.member is {member}, but {path} has {networks}; set imitate.member=0{last}")
    return learned, learned.network.member(member or 0)
