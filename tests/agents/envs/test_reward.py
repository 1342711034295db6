"""Rewards: their values, and that shaping does not change the best policy, checked by exact search."""

from __future__ import annotations

import itertools
import re
from functools import cache
from typing import Any

import gymnasium as gym
import numpy as np
import pytest

import agents  # noqa: F401 - registers the environments
from agents.envs.reward import PruneReward, PruneStep, ServeReward, kept_quality, utility
from agents.envs.serve import ServeSetting
from sim.errors import ConfigError

SIZES, BUDGET = (3, 2, 4, 1, 2), 6
"""Bytes of five blocks, and how many bytes may stay."""


def losses(seed: int) -> dict[frozenset[int], float]:
    """A random loss for every set of dropped blocks, never lower than that of a subset."""
    rng = np.random.default_rng(seed)
    loss: dict[frozenset[int], float] = {frozenset(): 0.0}
    for count in range(1, len(SIZES) + 1):
        for chosen in map(frozenset, itertools.combinations(range(len(SIZES)), count)):
            loss[chosen] = max(loss[chosen - {b}] for b in chosen) + float(rng.exponential(0.2))
    return loss


def best_actions(seed: int, reward: PruneReward) -> dict[frozenset[int], frozenset[int]]:
    """The optimal actions of every state before the end, by dynamic programming."""
    loss = losses(seed)
    chosen: dict[frozenset[int], frozenset[int]] = {}

    @cache
    def value(dropped: frozenset[int]) -> float:
        q = {}
        for block in set(range(len(SIZES))) - dropped:
            after = dropped | {block}
            fits = sum(SIZES[b] for b in range(len(SIZES)) if b not in after) <= BUDGET
            step = PruneStep(
                loss_before=np.array([loss[dropped]]),
                loss_after=np.array([loss[after]]),
                fitting=np.array([int(fits)]),
                failed=np.array([0]),
                ended=np.array([fits]),
                worst_loss=9.0,
                loads=1,
            )
            q[block] = float(reward(step)[0]) + (0.0 if fits else reward.discount * value(after))
        best = max(q.values())
        chosen[dropped] = frozenset(block for block, x in q.items() if x > best - 1e-9)
        return best

    value(frozenset())
    return chosen


@pytest.mark.parametrize("kind", ["utility", "negative_loss"])
@pytest.mark.parametrize("discount", [1.0, 0.9])
@pytest.mark.parametrize("seed", range(5))
def test_shaping_does_not_change_the_best_actions_of_any_state(kind: str, discount: float, seed: int) -> None:
    plain = best_actions(seed, PruneReward(kind, shaping=False, discount=discount))
    assert best_actions(seed, PruneReward(kind, shaping=True, discount=discount)) == plain


@pytest.mark.parametrize("seed", range(5))
def test_for_one_load_negative_loss_and_utility_have_the_same_best_actions(seed: int) -> None:
    assert best_actions(seed, PruneReward("negative_loss")) == best_actions(seed, PruneReward("utility"))


def test_utility_is_the_quality_kept_if_the_plan_fits_and_0_if_it_does_not() -> None:
    step = PruneStep(
        loss_before=np.zeros(3),
        loss_after=np.array([np.log(2.0), np.log(2.0), 0.5]),
        fitting=np.array([1, 0, 0]),
        failed=np.array([0, 1, 0]),
        ended=np.array([True, True, False]),
        worst_loss=4.0,
        loads=1,
    )
    np.testing.assert_allclose(utility(step), [0.5, 0.0, 0.0])
    np.testing.assert_allclose(PruneReward("negative_loss", shaping=False)(step), [-np.log(2.0), -4.0, 0.0])


def test_a_plan_that_measured_better_than_dense_keeps_a_quality_of_1() -> None:
    np.testing.assert_allclose(kept_quality(np.array([-0.1, 0.0])), 1.0)


def test_an_unknown_reward_is_an_error_that_suggests_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'utility'"):
        PruneReward("utilty")


class Doubled(ServeReward):
    """A reward of one's own: twice the usual one, and less for every tick."""

    def __call__(self, gained: Any, before: Any, after: Any) -> Any:
        return 2.0 * super().__call__(gained, before, after) - 0.5


def test_a_reward_of_ones_own_is_paid_by_the_plain_and_the_vector_environment() -> None:
    usual, own = ({"kind": "lost", "scale": 10.0}, {"_target_": f"{__name__}.Doubled", "kind": "lost", "scale": 10.0})
    paid = []
    for reward in (usual, own):
        env = gym.make("ServeTrace-v0", reward=reward)
        env.reset(seed=4)
        paid.append([env.step(0)[1] for _ in range(5)])
        many = gym.make_vec("ServeTrace-v0", num_envs=2, vectorization_mode="vector_entry_point", reward=reward)
        many.reset(seed=4)
        paid.append([many.step(np.zeros(2, dtype=np.int64))[1].tolist() for _ in range(5)])
    np.testing.assert_allclose(paid[2], 2.0 * np.array(paid[0]) - 0.5)
    np.testing.assert_allclose(paid[3], 2.0 * np.array(paid[1]) - 0.5)


@pytest.mark.parametrize(
    ("reward", "said"),
    [
        ({"_target_": "agents.envs.reward.PruneReward"}, "makes a PruneReward; it must make an instance of a subclass"),
        ({"_target_": "agents.envs.reward.ServeReward", "scal": 1.0}, "takes no 'scal'; did you mean 'scale'"),
        ({"_target_": "not_there.Reward"}, "cannot be imported"),
    ],
)
def test_a_reward_that_is_none_is_refused(reward: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        ServeSetting(reward=reward)
