"""Least loss: of all plans that fit and are in time it takes the one that loses least, and it does not hurry back."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from sim.cost.kv_format import stored_kv_bytes
from sim.cost.memory import weight_bytes
from sim.cost.plan import Plan, dense_plan
from sim.engine.protocol import EngineState
from sim.engine.server_spec import ServerSpec, named_quality
from sim.engine.steady_decode import steady_decode_s
from sim.errors import ConfigError
from sim.policies.base import PolicyContext
from sim.policies.least_loss import LeastLoss, least_loss

QUALITY = "llama2_7b_transferred"
SERVER = replace(
    ServerSpec.from_names(model="llama2_7b", gpu="a100_80gb", latency="llama2_7b_a100_trtllm", quality=QUALITY),
    workspace_bytes=0,
)
MODEL = SERVER.model
DENSE_BYTES = weight_bytes(MODEL, dense_plan(MODEL))
ACTIONS: dict[str, Any] = {
    "order": ["MHA25", "MHA27", "MHA24", "MHA23"],
    "drops": [0, 2, 4],
    "low_layers": [0, 8, 16, 32],
    "kv_bits": [16, 8, 4],
    "kv_compression": [None, {"method": "think", "percent": 90}],
    "streamed": [0, 4],
}


def policy(**changed: Any) -> LeastLoss:
    return least_loss(PolicyContext.of(SERVER), **{"actions": ACTIONS, "headroom": 1.0, **changed})


def seen(
    budget_bytes: float, running: int = 0, tokens: int = 0, waiting_tokens: int = 0, time_s: float = 1.0
) -> EngineState:
    idle = SERVER.build_engine(dense_plan(MODEL), int(80e9)).run_until(0.0)
    return replace(
        idle,
        time_s=time_s,
        running=running,
        running_tokens=tokens,
        waiting_tokens=waiting_tokens,
        budget_bytes=int(budget_bytes),
        next_budget_bytes=int(budget_bytes),
    )


def loss(plan: Plan) -> float:
    assert SERVER.quality_nll is not None
    return SERVER.quality_nll(plan) - SERVER.quality_nll(dense_plan(MODEL))


@pytest.mark.parametrize("seed", range(20))
def test_no_plan_that_fits_and_is_in_time_loses_less(seed: int) -> None:
    rng = np.random.default_rng(seed)
    running = int(rng.integers(1, 100))
    state = seen(
        DENSE_BYTES * rng.uniform(0.4, 3.0), running, running * int(rng.integers(1, 2000)), int(rng.integers(0, 9000))
    )
    bound_s = None if seed % 4 == 0 else float(rng.uniform(0.008, 0.08))
    made = policy(tpot_s=bound_s, patience=1)
    chosen = made(state)
    tokens = state.running_tokens + state.waiting_tokens
    held = [weight_bytes(MODEL, plan) + tokens * stored_kv_bytes(MODEL, plan, 1024) / 1024 for plan in made.plans]
    fits = [at for at, size in enumerate(held) if size <= state.budget_bytes]
    timely = [at for at in fits if made.in_time(state, at)]
    at = made.plans.index(chosen)
    if timely:
        assert at in timely
        assert loss(chosen) == min(loss(made.plans[each]) for each in timely)
    elif fits:
        assert made.decode_s(state, at) == min(made.decode_s(state, each) for each in fits)
    else:
        # A plan whose weights alone do not fit is not legal, unless none fits.
        assert held[at] == min(
            size for plan, size in zip(made.plans, held, strict=True) if weight_bytes(MODEL, plan) <= state.budget_bytes
        )


def test_seconds_are_those_of_the_load_rounded_up_on_the_server_as_fast_as_it_is() -> None:
    made = policy()
    state = replace(seen(80e9, 101, 101 * 1000), busy_s=3.0, priced_s=2.0)
    assert made.decode_s(state, 0) == pytest.approx(1.5 * steady_decode_s(SERVER, made.plans[0], 110, 1100))
    assert made.decode_s(seen(80e9), 0) == pytest.approx(steady_decode_s(SERVER, made.plans[0], 1, 1))


@pytest.mark.parametrize("kept", [["hidden", 16], [16, "hidden"]])
@pytest.mark.parametrize("running", [0, 1, 20])
@pytest.mark.parametrize("tpot_s", [None, 0.5])
def test_of_equal_losses_it_takes_the_fastest(kept: list[Any], running: int, tpot_s: float | None) -> None:
    """Streamed layers and hidden states lose nothing and hold less, but take time."""
    actions = {**ACTIONS, "kv_bits": kept, "kv_compression": [None], "streamed": [8, 0]}
    made = policy(actions=actions, patience=1, tpot_s=tpot_s)
    assert made(seen(80e9, running, running * 500)) == dense_plan(MODEL)
    short = seen(DENSE_BYTES * 1.2, 20, 20 * 500)
    if tpot_s is None:  # dense weights with all KV do not fit
        assert loss(made(short)) == 0.0
        assert made.plans[made.choice.action] != dense_plan(MODEL)


def test_it_changes_at_once_for_memory_and_returns_after_some_decisions() -> None:
    made = policy(patience=3)
    assert made.first_plan == dense_plan(MODEL)
    assert made(seen(80e9)) == dense_plan(MODEL)
    low = made(seen(0.5 * DENSE_BYTES, time_s=2.0))
    assert weight_bytes(MODEL, low) <= 0.5 * DENSE_BYTES
    assert [made(seen(80e9, time_s=3.0 + at)) == low for at in range(4)] == [True, True, False, False]


def test_an_announced_decrease_counts_before_it_comes() -> None:
    made = policy()
    announced = replace(seen(80e9), next_budget_bytes=int(0.5 * DENSE_BYTES), next_budget_s=30.0)
    assert weight_bytes(MODEL, made(announced)) <= 0.5 * DENSE_BYTES


def test_prices_are_kept_and_forgotten() -> None:
    made = policy()
    for batch in range(1, 40):
        made.decode_s(seen(80e9, batch, 100 * batch), 0)
    assert 1 <= len(made.prices) <= 40


def test_it_serves_a_budget_that_moves() -> None:
    made = least_loss(PolicyContext.of(SERVER), actions=ACTIONS, tpot_s=0.05)
    engine = SERVER.build_engine(made.first_plan, int(20e9))
    engine.submit_arrays(np.arange(60) * 0.3, np.full(60, 800), np.full(60, 100))
    for tick in range(1, 30):
        engine.apply(made(engine.run_until(float(tick))))
    engine.run_until(math.inf)
    assert engine.records().finish_s.size == 60


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"headroom": 0.9}, "policy.headroom is 0.9; it must be a finite number from 1 on"),
        ({"headroom": math.inf}, "policy.headroom is inf"),
        ({"headroom": "a"}, "policy.headroom is 'a'"),
        ({"patience": 0}, "policy.patience is 0; it must be a whole number of decisions from 1 on"),
        ({"patience": 1.5}, "policy.patience is 1.5"),
        ({"waiting_share": -1.0}, "policy.waiting_share is -1.0; it must be a finite number from 0 on"),
        ({"waiting_share": math.inf}, "policy.waiting_share is inf"),
        ({"tpot_s": 0.0}, "policy.tpot_s is 0.0; it must be above 0 seconds"),
        ({"actions": {**ACTIONS, "compute_bits": [8]}}, "is unknown; choose other plans"),
        ({"actions": {"drop": [1]}}, "actions has no option .drop.; did you mean .drops."),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        policy(**options)


def test_an_unknown_loss_is_refused_with_the_tables_that_know_it() -> None:
    published = replace(SERVER, quality_nll=named_quality("llama2_7b_published").charge)
    with pytest.raises(
        ConfigError, match=r"is unknown; choose other plans .policy.actions.; set quality_table="
    ) as one:
        least_loss(PolicyContext.of(published), actions=ACTIONS)
    assert str(one.value).endswith("to one that knows all of them: llama2_7b_transferred, llama2_7b_transferred_w4")
    cut = {**ACTIONS, "compute_bits": [8]}
    with pytest.raises(ConfigError, match=r"no table of conf/quality knows all of them; python -m hw.score kind=table"):
        policy(actions=cut)


def test_it_needs_a_model_of_the_server_and_a_quality() -> None:
    with pytest.raises(ConfigError, match="weighs plans by their seconds, and this command has no model of the server"):
        least_loss(PolicyContext(model=MODEL), actions=ACTIONS)
    with pytest.raises(ConfigError, match="weighs plans by their loss, and this command knows no quality; set"):
        least_loss(PolicyContext.of(replace(SERVER, quality_nll=None)), actions=ACTIONS)
