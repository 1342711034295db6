"""The knapsack: it finds the cheapest plan, and its policy stays within memory."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
from scipy.optimize import Bounds, LinearConstraint, milp

from sim.cost.model_spec import load_model
from sim.engine.protocol import EngineState
from sim.errors import ConfigError, PlanError
from sim.policies.base import PolicyContext
from sim.policies.knapsack import cheapest_mask, knapsack, sorted_costs
from sim.policies.observation.prune import removed_blocks
from tests.sim.serving import TINY, tiny_engine


def seen(budget_bytes: int) -> EngineState:
    """An idle engine with this budget."""
    return dataclasses.replace(tiny_engine().run_until(0.0), budget_bytes=budget_bytes, next_budget_bytes=budget_bytes)


@pytest.mark.parametrize("seed", range(30))
def test_no_set_of_blocks_that_frees_enough_costs_less(seed: int) -> None:
    rng = np.random.default_rng(seed)
    costs = rng.exponential(1.0, 10)
    sizes = np.array([int(rng.integers(1, 9)), int(rng.integers(1, 9))] * 5)
    needed = int(rng.integers(1, sizes.sum() + 1))
    chosen = removed_blocks(cheapest_mask(sorted_costs(costs), needed, int(sizes[0]), int(sizes[1])))
    best = min(
        costs[list(subset)].sum()
        for count in range(11)
        for subset in map(list, itertools.combinations(range(10), count))
        if sizes[subset].sum() >= needed
    )
    assert sizes[chosen].sum() >= needed
    assert costs[chosen].sum() == pytest.approx(best)


@pytest.mark.parametrize("seed", range(5))
def test_it_equals_an_integer_program_on_sixty_blocks(seed: int) -> None:
    rng = np.random.default_rng(seed)
    costs = rng.exponential(1.0, 60)
    sizes = np.array([3 + seed, 5] * 30)
    needed = int(sizes.sum() * rng.uniform(0.1, 0.9))
    chosen = removed_blocks(cheapest_mask(sorted_costs(costs), needed, 3 + seed, 5))
    solved = milp(costs, integrality=np.ones(60), bounds=Bounds(0, 1), constraints=LinearConstraint(sizes, needed))
    assert costs[chosen].sum() == pytest.approx(solved.fun)


def test_everything_goes_when_nothing_less_frees_enough() -> None:
    mask = cheapest_mask(sorted_costs(np.ones(8)), 1_000, 2, 3)
    assert not any(mask.mha)
    assert not any(mask.ffn)


def test_nothing_goes_when_nothing_is_needed() -> None:
    mask = cheapest_mask(sorted_costs(np.ones(8)), 0, 2, 3)
    assert all(mask.mha)
    assert all(mask.ffn)


def test_the_policy_drops_at_once_and_restores_only_after_its_patience() -> None:
    served = PolicyContext(model=TINY)
    policy = knapsack(served, costs=[1.0, 2.0] * TINY.num_layers, headroom=1.0, patience=3)
    dense_bytes = policy.dense_bytes
    assert policy(seen(dense_bytes)) == policy.dense
    short = policy(seen(dense_bytes - 1))
    assert not all(short.decode.mha)
    roomy = seen(dense_bytes)
    assert [policy(roomy) == policy.dense for _ in range(3)] == [False, False, True]


def test_the_policy_needs_costs_of_the_models_size_and_a_table_with_a_loss_for_each_block() -> None:
    with pytest.raises(PlanError, match="has 3 entries"):
        knapsack(PolicyContext(model=TINY), costs=[1.0, 2.0, 3.0])
    with pytest.raises(ConfigError, match="no loss for each block"):
        knapsack(PolicyContext(model=load_model("llama2_7b")), quality="llama2_7b_published")
    with pytest.raises(ConfigError, match="headroom"):
        knapsack(PolicyContext(model=TINY), costs=[1.0] * 2 * TINY.num_layers, headroom=0.5)
