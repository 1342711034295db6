"""A closed loop of users: each request comes exactly when the one before it ends."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sim.cost.memory import budget_for_kv_blocks
from sim.cost.plan import dense_plan
from sim.engine.pricing_executor import PricedWeights, PricingExecutor, SimulatedClock
from sim.engine.protocol import Request
from sim.engine.replica import Replica
from sim.errors import ConfigError
from sim.replay.closed_loop import closed_loop
from sim.results.records import Status
from tests.sim.serving import TINY, linear_latency, tiny_engine

LENGTHS = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 12)), min_size=1, max_size=25)
LATENCY = linear_latency(0.25, 0.0078125, 0.001)


@given(rows=LENGTHS, users=st.integers(1, 6), blocks=st.integers(14, 60), ahead=st.booleans(), swaps=st.booleans())
def test_each_request_comes_when_one_ends_and_a_plain_engine_that_is_called_at_each_end_agrees(
    rows: list[tuple[int, int]], users: int, blocks: int, ahead: bool, swaps: bool
) -> None:
    host = {"preemption": "swap", "host_kv_blocks": 6} if swaps else {}
    engine = tiny_engine(kv_blocks=blocks, latency=LATENCY, schedules_ahead=ahead, **host)  # type: ignore[arg-type]
    prompts, outputs = (np.array(column, dtype=np.int64) for column in zip(*rows, strict=True))
    closed_loop(engine, prompts, outputs, users)
    records = engine.records()
    assert (records.status == Status.FINISHED).all()
    assert records.arrival_s[:users].max() == 0.0
    assert sorted(records.arrival_s[users:]) == sorted(records.finish_s)[: max(len(rows) - users, 0)]
    plain = plain_loop(engine.config, rows, users, blocks)
    for name in ("arrival_s", "first_token_s", "finish_s"):
        assert np.allclose(getattr(records, name), getattr(plain.records(), name), rtol=1e-9), name


def plain_loop(config: object, rows: list[tuple[int, int]], users: int, blocks: int) -> Replica:
    """Serve the same loop on the plain replica, which is handed the next request in the callback of a last token."""
    clock, sent = SimulatedClock(), []

    def send(now_s: float) -> None:
        if len(sent) < len(rows):
            prompt, output = rows[len(sent)]
            sent.append(Request(request_id=len(sent), arrival_s=now_s, prompt_tokens=prompt, output_tokens=output))
            replica.submit([sent[-1]])

    def on_token(request_id: int, token: int | None, last: bool) -> None:
        if last:
            send(replica._time_s)

    replica = Replica(
        model=TINY,
        config=config,  # type: ignore[arg-type]
        plan=dense_plan(TINY),
        budget=budget_for_kv_blocks(TINY, dense_plan(TINY), blocks, 0, 4),
        executor=PricingExecutor(LATENCY, 0.0, 1e6),
        weights=PricedWeights(1e6, clock),
        clock=clock,
        on_token=on_token,
    )
    for _ in range(users):
        send(0.0)
    replica.run_until(math.inf)
    return replica


def test_users_without_bound_are_an_open_loop_at_0_s_and_none_are_refused() -> None:
    prompts, outputs = np.full(9, 10), np.full(9, 5)
    loop, opened = tiny_engine(), tiny_engine()
    closed_loop(loop, prompts, outputs, 100)
    opened.submit_arrays(np.zeros(9), prompts, outputs)
    opened.run_until(math.inf)
    assert loop.records().finish_s.tolist() == opened.records().finish_s.tolist()
    with pytest.raises(ConfigError, match="users is 0; a closed loop needs at least 1"):
        closed_loop(tiny_engine(), prompts, outputs, 0)


def test_a_rejected_request_lets_the_next_one_come() -> None:
    engine = tiny_engine(max_context_tokens=50)
    closed_loop(engine, np.array([10, 60, 70, 10]), np.array([3, 3, 3, 3]), 1)
    records = engine.records()
    assert records.status.tolist() == [Status.FINISHED, Status.REJECTED, Status.REJECTED, Status.FINISHED]
    assert records.arrival_s[3] == pytest.approx(records.finish_s[0])
