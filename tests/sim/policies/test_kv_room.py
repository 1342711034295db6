"""The room for KV: plans under which less than half of the demanded tokens fit are worth less."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from sim.cost.model_spec import load_model
from sim.engine.protocol import EngineState
from sim.engine.server_spec import ServerSpec
from sim.policies.kv_room import kv_room
from sim.policies.observation.serve import serve_actions

MODEL = load_model("llama2_7b")
WORKSPACE_BYTES = 1 << 30
TOKEN_BYTES = 2 * 2 * 32 * 4096  # keys and values of two bytes, in 32 layers with 4,096 channels
HALF = [*(f"MHA{layer}" for layer in range(16)), *(f"FFN{layer}" for layer in range(8))]
ACTIONS = serve_actions(MODEL, order=HALF, drops=[0, 24], workspace_bytes=WORKSPACE_BYTES)
SIZES = ACTIONS.weights_bytes
ROOM = kv_room(MODEL, ACTIONS, weight=3.0)


def seen(free_bytes: int, running_tokens: int, waiting_tokens: int) -> EngineState:
    """Return a state in which the dense plan leaves ``free_bytes`` for KV."""
    server = ServerSpec.from_names(model="llama2_7b", gpu="a100_80gb", latency="llama2_7b_a100_trtllm")
    budget_bytes = SIZES[0] + WORKSPACE_BYTES + free_bytes
    return replace(
        server.build_engine(ACTIONS.plans[0], int(80e9)).run_until(0.0),
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


def test_tokens_are_counted_as_a_plan_stores_them() -> None:
    stored = kv_room(MODEL, serve_actions(MODEL, kv_bits=[16, 8], workspace_bytes=WORKSPACE_BYTES), weight=1.0)
    whole, halved = stored(seen(1000 * TOKEN_BYTES, 0, 8000))
    assert whole == pytest.approx(math.log(1000 / 4000))
    assert halved == pytest.approx(math.log(2000 / 4000), rel=0.05)  # with the scales of 8 bits


def test_a_plan_that_stores_no_kv_has_room_for_every_demand() -> None:
    no_attention = serve_actions(
        MODEL, order=[f"MHA{layer}" for layer in range(32)], drops=[0, 32], workspace_bytes=WORKSPACE_BYTES
    )
    dense, without = kv_room(MODEL, no_attention, weight=1.0)(seen(1000 * TOKEN_BYTES, 0, 1_000_000))
    assert dense == pytest.approx(math.log(1000 / 500_000))
    assert without == 0.0
