"""The room for KV: plans under which less than half of the demanded tokens fit are worth less."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from sim.cost.memory import weight_bytes
from sim.cost.model_spec import load_model
from sim.cost.plan import dense_plan, drop, with_mask
from sim.engine.protocol import EngineState
from sim.engine.server_spec import ServerSpec
from sim.policies.kv_room import kv_room

MODEL = load_model("llama2_7b")
DENSE = dense_plan(MODEL)
PRUNED = with_mask(DENSE, drop(MODEL, mha=range(16), ffn=range(8)))
PLANS = (DENSE, PRUNED)
SIZES = tuple(weight_bytes(MODEL, plan) for plan in PLANS)
WORKSPACE_BYTES = 1 << 30
TOKEN_BYTES = 2 * 2 * 32 * 4096  # keys and values of two bytes, in 32 layers with 4,096 channels
ROOM = kv_room(MODEL, PLANS, SIZES, WORKSPACE_BYTES, weight=3.0)


def seen(free_bytes: int, running_tokens: int, waiting_tokens: int) -> EngineState:
    """Return a state in which the dense plan leaves ``free_bytes`` for KV."""
    server = ServerSpec.from_names(model="llama2_7b", gpu="a100_80gb", latency="llama2_7b_a100_trtllm")
    budget_bytes = SIZES[0] + WORKSPACE_BYTES + free_bytes
    return replace(
        server.build_engine(DENSE, int(80e9)).run_until(0.0),
        running_tokens=running_tokens,
        waiting_tokens=waiting_tokens,
        budget_bytes=budget_bytes,
        next_budget_bytes=budget_bytes,
    )


def test_each_plan_loses_the_logarithm_of_its_room_over_half_of_the_demand() -> None:
    state = seen(1000 * TOKEN_BYTES, running_tokens=9000, waiting_tokens=31_000)
    pruned_tokens = (1000 * TOKEN_BYTES + SIZES[0] - SIZES[1]) / (TOKEN_BYTES / 2)  # half of its layers store KV
    assert 2000 < pruned_tokens < 20_000
    np.testing.assert_allclose(ROOM(state), [3.0 * math.log(1000 / 20_000), 3.0 * math.log(pruned_tokens / 20_000)])


@pytest.mark.parametrize("demanded", [0, 1, 2000])
def test_nothing_is_lost_while_half_of_the_demand_has_room(demanded: int) -> None:
    np.testing.assert_array_equal(ROOM(seen(1000 * TOKEN_BYTES, 0, demanded)), [0.0, 0.0])


def test_an_announced_decrease_counts_now_and_an_increase_not_yet() -> None:
    state = seen(1000 * TOKEN_BYTES, 4000, 0)
    less, more = (replace(state, next_budget_bytes=state.budget_bytes + change * TOKEN_BYTES) for change in (-500, 500))
    assert ROOM(less)[0] == pytest.approx(3.0 * math.log(500 / 2000))
    assert ROOM(more)[0] == ROOM(state)[0] == pytest.approx(3.0 * math.log(1000 / 2000))


def test_weights_that_do_not_fit_leave_room_for_one_token() -> None:
    assert ROOM(seen(-(1 << 30), 4000, 0))[0] == pytest.approx(3.0 * math.log(1 / 2000))
