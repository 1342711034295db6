"""Observations with target action probabilities, for imitation: what a solver, a teacher or one fixed plan would do.

A solver returns a set of blocks, not an order. Every block of the set that is still kept is an equally good action, so
the target is uniform over them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from agents.baselines.prune import solver
from agents.envs.prune_loads import prune_loads
from agents.envs.prune_vector import PruneToBudgetVector
from agents.envs.roles import RolesSetting
from agents.envs.roles_vector import ServeRolesVector
from agents.envs.serve_vector import ServeTraceVector
from sim.disaggregate.roles import ByLoad
from sim.errors import ConfigError, nearest
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
    names = vector.setting.actions.names
    if plan not in names:
        raise ConfigError(f"imitate.plan: there is no {plan!r}; {nearest(plan, names)}")
    chosen, features = names.index(plan), vector.setting.table.features
    rng = np.random.default_rng(seed)
    observed, _ = vector.reset(seed=seed)
    observations, targets = [], []
    for _ in range(vector.setting.ticks - 1):
        legal = observed[:, features:]
        target = (1.0 - share) * legal / legal.sum(axis=1, keepdims=True)
        target[:, chosen] += share * legal[:, chosen]
        observations.append(observed)
        targets.append((target / target.sum(axis=1, keepdims=True)).astype(np.float32))
        other = (rng.random(legal.shape) * legal).argmax(axis=1)
        keep = (rng.random(windows) < share) & (legal[:, chosen] > 0.5)
        observed, *_ = vector.step(np.where(keep, chosen, other))
    return np.concatenate(observations), np.concatenate(targets)


def roles_demonstrations(
    env_kwargs: Mapping[str, Any],
    *,
    seed: int,
    counts: Sequence[Mapping[str, int]],
    by_load: Mapping[str, float],
    share: float,
    episodes: int,
    discount: float,
) -> tuple[Floats32, Floats32, Floats32]:
    """Return observations [n, o], target probabilities [n, a] and returns [n] of the best of several teachers.

    The teachers of ``ServeRoles`` are the rule ``by_load``, and for each table of ``counts`` one that knows which
    source plays now and lets its number of replicas prefill, where that is legal. All play every episode; of each, the
    teacher with the highest utility is kept, the rule unless another one is better by more than ``MARGIN``.

    Args:
        env_kwargs: arguments of ``ServeRoles``. seed: of episodes. counts: tables SOURCE: PREFILL REPLICAS.
        by_load: fields of ``sim.disaggregate.roles.ByLoad``; it decides every tick.
        share: probability of the teacher's action; the rest is uniform over the legal actions.
        episodes: number of them. discount: per tick, of the returns, which are in units of reward.
    Raises:
        ConfigError: for a source without a number that the system can have, or thresholds out of range.
    """
    vector = ServeRolesVector(episodes, **env_kwargs)
    setting = vector.setting
    for table in counts:
        _check_counts(setting, table)
    rule = ByLoad(**by_load, period_s=setting.tick_s)
    vector.reset(seed=seed)
    windows, features = vector.windows, setting.table.features
    teachers: list[Callable[[int, int], int]] = [lambda row, tick: rule(vector.states[row])]
    teachers += [
        partial(lambda table, row, tick: table[setting.source_at(windows[row], tick * setting.tick_s)], table)
        for table in counts
    ]
    best = np.full(episodes, -np.inf)
    shape = (setting.ticks - 1, episodes)
    seen = np.zeros((*shape, setting.table.size), dtype=np.float32)
    actions, rewards = np.zeros(shape, dtype=np.int64), np.zeros(shape)
    for teacher in teachers:
        observed, _ = vector.reset(options={"windows": windows})
        now_seen, now_actions, now_rewards = np.empty_like(seen), np.empty_like(actions), np.empty_like(rewards)
        for at in range(setting.ticks - 1):
            wanted = np.array([teacher(row, at + 1) for row in range(episodes)]) - 1
            present = np.array([state.to_prefill for state in vector.states]) - 1
            legal = observed[:, features:] > 0.5
            now_seen[at], now_actions[at] = observed, np.where(legal[np.arange(episodes), wanted], wanted, present)
            observed, now_rewards[at], _, _, infos = vector.step(now_actions[at])
        better = infos["utility"] > best + MARGIN
        best[better] = infos["utility"][better]
        for kept, now in ((seen, now_seen), (actions, now_actions), (rewards, now_rewards)):
            kept[:, better] = now[:, better]
    legal_flags = seen[..., features:]
    targets = (1.0 - share) * legal_flags / legal_flags.sum(axis=-1, keepdims=True)
    np.put_along_axis(targets, actions[..., None], np.take_along_axis(targets, actions[..., None], -1) + share, -1)
    value, returns = np.zeros(episodes), np.zeros(shape)
    for at in reversed(range(setting.ticks - 1)):
        returns[at] = value = rewards[at] + discount * value
    rows = setting.table.size
    return (
        seen.reshape(-1, rows),
        targets.reshape(-1, targets.shape[-1]).astype(np.float32),
        returns.ravel().astype(np.float32),
    )


MARGIN = 0.005
"""By how much the utility of another teacher must be above that of the rule, or of those before it."""


def _check_counts(setting: RolesSetting, table: Mapping[str, int]) -> None:
    for source in setting.sources:
        if not 1 <= table.get(source, 0) < setting.replicas:
            raise ConfigError(
                f"imitate.counts has {table.get(source)} for {source}; each source of the traffic needs a number from "
                f"1 to {setting.replicas - 1} in each table"
            )
