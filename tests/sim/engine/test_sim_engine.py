"""Laws of serving, and small cases computed by hand."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sim.cost.memory import budget_for_kv_blocks
from sim.cost.plan import dense_plan, drop, with_mask
from sim.engine.budget import stepped
from sim.engine.protocol import EngineConfig, EngineState
from sim.engine.scheduler import ADMISSION_ORDERS, Limits
from sim.engine.sim_engine import SimEngine
from sim.errors import BudgetError, ConfigError, PlanError
from sim.results.records import Records, Status
from tests.sim.serving import TINY, linear_latency, requests, tiny_engine


@pytest.mark.parametrize("wrong", [1.5, math.nan, True, "8", -1])
def test_a_setting_that_counts_is_a_whole_number(wrong: Any) -> None:
    for name in ("kv_block_tokens", "hash_block_tokens", "max_context_tokens"):
        with pytest.raises(ConfigError, match=rf"engine\.{name} is .* whole number from"):
            EngineConfig(**{name: wrong})
    for name in ("max_batch_tokens", "max_running", "long_prefill_tokens", "watermark_layer_blocks"):
        with pytest.raises(ConfigError, match=rf"{name} is .* whole number from"):
            Limits(**{name: wrong})


def serve(engine: SimEngine, *rows: tuple[float, int, int]) -> Records:
    engine.submit(requests(*rows))
    engine.run_until(math.inf)
    return engine.records()


def test_a_lone_request_takes_one_iteration_for_its_prompt_and_one_for_each_further_token() -> None:
    records = serve(tiny_engine(), (2.0, 10, 5))
    assert records.first_token_s.tolist() == [3.0]
    assert records.finish_s.tolist() == [7.0]
    assert records.tpot_s.tolist() == [1.0]


def test_a_prompt_longer_than_the_token_budget_takes_several_iterations() -> None:
    assert serve(tiny_engine(max_batch_tokens=64), (0.0, 130, 1)).ttft_s.tolist() == [3.0]


def test_a_request_that_arrives_during_an_iteration_joins_the_next() -> None:
    records = serve(tiny_engine(), (0.0, 10, 3), (0.5, 10, 1))
    assert records.admitted_s.tolist() == [0.0, 1.0]


def test_a_request_that_arrives_as_an_iteration_ends_joins_the_next() -> None:
    records = serve(tiny_engine(), (0.0, 10, 3), (1.0, 10, 1))
    assert records.admitted_s.tolist() == [0.0, 1.0]


def test_an_arrival_time_that_rounding_would_miss_is_met_exactly() -> None:
    rows = [(0.1 * 3 + i * 1.1, 1, 1) for i in range(200)]
    records = serve(tiny_engine(latency=linear_latency(base_s=0.1)), *rows)
    assert np.array_equal(records.admitted_s, records.arrival_s)


def test_requests_that_arrive_together_are_admitted_in_the_order_of_the_trace() -> None:
    records = serve(tiny_engine(max_running=1), *[(0.0, 4, 1)] * 4)
    assert records.first_token_s.tolist() == [1.0, 2.0, 3.0, 4.0]


def test_kv_pressure_preempts_the_newest_which_computes_its_tokens_again() -> None:
    # 5 KV blocks of 4 tokens: two prompts of 8 fill 4; the older takes the last, then the newer must go.
    engine = tiny_engine(kv_blocks=5)
    records = serve(engine, (0.0, 8, 8), (0.0, 8, 8))
    assert records.preemptions.tolist() == [0, 1]
    assert records.produced_tokens.tolist() == [8, 8]
    iterations = engine.iterations()
    assert iterations.prefill_tokens.sum() == 8 + 8 + 8 + 1, "the newer one had produced a token and computed it again"
    assert iterations.preemptions.sum() == 1


def test_the_first_token_of_a_preempted_request_stays_where_it_was() -> None:
    records = serve(tiny_engine(kv_blocks=5), (0.0, 8, 8), (0.0, 8, 8))
    assert records.first_token_s.tolist() == [1.0, 1.0]
    assert records.tpot_s[1] > records.tpot_s[0]


def test_prefill_first_stalls_decodes_while_prompts_come_in() -> None:
    rows = [(0.0, 8, 4), (0.5, 8, 1), (1.5, 8, 1)]
    assert serve(tiny_engine(scheduler="prefill_first"), *rows).finish_s[0] == 6.0
    assert serve(tiny_engine(scheduler="chunked"), *rows).finish_s[0] == 4.0


def test_by_value_a_short_prompt_overtakes_a_long_one_until_that_has_waited_long_enough() -> None:
    rows = [(0.0, 8, 3), (0.2, 40, 1), (0.5, 4, 1)]
    order = {order: serve(tiny_engine(max_running=1, admission_order=order), *rows) for order in ADMISSION_ORDERS}
    assert order["fcfs"].admitted_s.tolist() == [0.0, 3.0, 4.0]
    assert order["value"].admitted_s.tolist() == [0.0, 4.0, 3.0]
    late = [(0.0, 8, 30), (0.2, 40, 1), (28.0, 4, 1)]  # 29.8 s for 10 KV blocks are worth more than 2 s for one
    assert serve(tiny_engine(max_running=1, admission_order="value"), *late).admitted_s.tolist() == [0.0, 30.0, 31.0]


def test_by_value_a_prompt_that_does_not_fit_holds_up_no_other_while_nothing_runs() -> None:
    most, few = (budget_for_kv_blocks(TINY, dense_plan(TINY), blocks, 0, 4) for blocks in (20, 4))
    budget = stepped([(0.0, most), (5.0, few), (20.0, most)])
    rows = [(6.0, 40, 1), (6.0, 8, 1)]
    order = {order: serve(tiny_engine(budget=budget, admission_order=order), *rows) for order in ADMISSION_ORDERS}
    assert order["fcfs"].admitted_s.tolist() == [20.0, 20.0]
    assert order["value"].admitted_s.tolist() == [20.0, 6.0]


def test_dropping_mha_blocks_leaves_room_for_more_requests() -> None:
    rows = [(0.0, 16, 4)] * 12
    dense = tiny_engine(kv_blocks=12, max_running=64, max_batch_tokens=512)
    budget_bytes = dense.run_until(0.0).budget_bytes
    pruned = SimEngine(
        model=TINY,
        latency=linear_latency(),
        config=dense.config,
        plan=with_mask(dense_plan(TINY), drop(TINY, mha=[1, 2])),
        budget_bytes=budget_bytes,
    )
    assert pruned.run_until(0.0).kv_layer_blocks > dense.run_until(0.0).kv_layer_blocks
    assert serve(pruned, *rows).finish_s.max() < serve(dense, *rows).finish_s.max()


def test_a_plan_without_any_mha_block_needs_no_kv() -> None:
    plan = with_mask(dense_plan(TINY), drop(TINY, mha=[0, 1, 2]))
    engine = tiny_engine(plan=plan)
    assert serve(engine, (0.0, 100, 9)).status.tolist() == [Status.FINISHED]
    assert engine.iterations().kv_used_share.max() == 0.0


def test_a_prompt_that_can_never_fit_is_rejected_and_blocks_no_other_request() -> None:
    records = serve(tiny_engine(kv_blocks=5), (0.0, 21, 1), (0.0, 8, 2))
    assert records.status.tolist() == [Status.REJECTED, Status.FINISHED]


def test_an_output_ends_at_the_context_limit() -> None:
    records = serve(tiny_engine(max_context_tokens=12), (0.0, 8, 100))
    assert records.produced_tokens.tolist() == [4]
    assert records.status.tolist() == [Status.FINISHED]


def test_an_arrival_is_rejected_when_as_many_wait_as_the_plan_admits() -> None:
    plan = dataclasses.replace(dense_plan(TINY), max_running=1, max_waiting=1)
    records = serve(tiny_engine(plan=plan), (0.0, 4, 3), (0.1, 4, 1), (0.2, 4, 1))
    assert records.status.tolist() == [Status.FINISHED, Status.FINISHED, Status.REJECTED]


def test_a_budget_without_room_for_weights_is_an_error_that_says_what_to_do() -> None:
    with pytest.raises(BudgetError, match="prune or quantize"):
        SimEngine(model=TINY, latency=linear_latency(), config=EngineConfig(), plan=dense_plan(TINY), budget_bytes=1000)


def test_a_plan_for_another_model_is_refused() -> None:
    plan = dense_plan(dataclasses.replace(TINY, num_layers=4))
    with pytest.raises(PlanError, match="3 layers"):
        SimEngine(model=TINY, latency=linear_latency(), config=EngineConfig(), plan=plan, budget_bytes=10**9)


def test_requests_out_of_order_are_refused() -> None:
    with pytest.raises(ConfigError, match="in order of arrival"):
        tiny_engine().submit(requests((1.0, 4, 1), (0.5, 4, 1)))


def test_an_unknown_scheduler_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match="did you mean 'prefill_first'"):
        EngineConfig(scheduler="prefil_first")  # type: ignore[arg-type]


def test_no_policy_can_read_an_output_length() -> None:
    """Law 7: two traces that differ only in output lengths look the same until an output ends."""
    fields = {field.name for field in dataclasses.fields(EngineState)}
    assert not any("output" in name for name in fields)
    long, short = tiny_engine(), tiny_engine()
    long.submit(requests((0.0, 10, 50), (0.0, 30, 90), (3.0, 9, 70)))
    short.submit(requests((0.0, 10, 20), (0.0, 30, 30), (3.0, 9, 40)))
    for time_s in np.arange(0.0, 19.0, 0.5):
        assert long.run_until(float(time_s)) == short.run_until(float(time_s))


def test_a_state_at_the_end_of_an_iteration_sees_its_tokens_and_not_the_next_batch() -> None:
    engine = tiny_engine()
    engine.submit(requests((0.0, 10, 5), (1.0, 10, 5)))
    state = engine.run_until(1.0)
    assert (state.produced_tokens, state.running, state.waiting) == (1, 1, 1)
    assert engine.run_until(1.5).running == 2


def test_a_state_before_anything_arrived_is_empty() -> None:
    engine = tiny_engine()
    engine.submit(requests((5.0, 10, 5)))
    state = engine.run_until(2.0)
    assert (state.time_s, state.arrived, state.waiting, state.oldest_wait_s) == (2.0, 0, 0, 0.0)


def test_requests_submitted_to_an_idle_engine_are_served() -> None:
    engine = tiny_engine()
    assert engine.run_until(math.inf).arrived == 0
    assert engine.drained
    engine.submit(requests((0.0, 4, 1)))
    engine.run_until(math.inf)
    engine.submit(requests((9.0, 4, 1)))
    assert not engine.drained
    engine.run_until(math.inf)
    assert engine.records().finish_s.tolist() == [1.0, 10.0]


def test_a_constant_latency_server_matches_the_m_d_1_waiting_time() -> None:
    """Pollaczek-Khinchine for deterministic service in the mean, Lindley's recursion request by request."""
    rng = np.random.default_rng(1)
    for load in (0.3, 0.5):
        arrivals_s = np.cumsum(rng.exponential(1.0 / load, size=30_000))
        records = serve(tiny_engine(max_running=1), *[(float(t), 1, 1) for t in arrivals_s])
        waits_s = records.admitted_s - records.arrival_s
        expected_s, wait_s = [0.0], 0.0
        for gap_s in np.diff(arrivals_s):
            wait_s = max(0.0, wait_s + 1.0 - gap_s)
            expected_s.append(wait_s)
        assert waits_s == pytest.approx(expected_s, abs=1e-6)
        assert waits_s.mean() == pytest.approx(load / (2 * (1 - load)), rel=0.05)


def test_a_backlog_is_served_at_the_rate_of_its_bottleneck() -> None:
    """A closed system: n requests of k tokens, c at a time, one second per iteration, take n k / c seconds."""
    records = serve(tiny_engine(max_running=4, max_batch_tokens=512), *[(0.0, 2, 7)] * 40)
    assert records.finish_s.max() == 40 * 7 / 4


WORKLOAD = st.lists(
    st.tuples(st.floats(0, 30, allow_nan=False), st.integers(1, 60), st.integers(1, 25)), min_size=1, max_size=25
)


@given(
    rows=WORKLOAD,
    scheduler=st.sampled_from(["chunked", "prefill_first"]),
    kv_blocks=st.integers(3, 40),
    kv_block_tokens=st.sampled_from([1, 4, 16]),
    max_running=st.integers(1, 6),
    max_batch_tokens=st.integers(8, 80),
    long_prefill_tokens=st.sampled_from([0, 7]),
    reserve_full_prompt=st.booleans(),
    watermark=st.sampled_from([0.0, 0.1]),
    reuse=st.booleans(),
)
def test_nothing_is_lost_and_memory_and_time_stay_in_order(
    rows: list[tuple[float, int, int]],
    scheduler: str,
    kv_blocks: int,
    kv_block_tokens: int,
    max_running: int,
    max_batch_tokens: int,
    long_prefill_tokens: int,
    reserve_full_prompt: bool,
    watermark: float,
    reuse: bool,
) -> None:
    """Laws 1, 2 and 4: every request ends once, free and held KV blocks add up, time and tokens are ordered."""
    engine = tiny_engine(
        scheduler=scheduler,  # type: ignore[arg-type]
        kv_blocks=kv_blocks,
        kv_block_tokens=kv_block_tokens,
        max_running=max_running,
        max_batch_tokens=max_batch_tokens,
        long_prefill_tokens=long_prefill_tokens,
        reserve_full_prompt=reserve_full_prompt,
        kv_watermark_share=watermark,
        reuse_preempted_kv=reuse,
        latency=linear_latency(base_s=0.3, token_s=0.01, context_s=0.001),
    )
    rows = sorted(rows)
    engine.submit(requests(*rows))
    time_s = 0.0
    while not engine.drained:
        time_s += 1.7
        state = engine.run_until(time_s)
        held = sum(holder.layer_blocks for holder in engine.holders())
        assert state.kv_used_layer_blocks == held
        assert 0 <= held <= state.kv_layer_blocks
        assert state.arrived == state.waiting + state.running + state.finished + state.rejected
        assert time_s < 1e5, "the engine makes no progress"
    records, iterations = engine.records(), engine.iterations()
    assert len(records) == len(rows)
    assert set(records.status.tolist()) <= {Status.FINISHED, Status.REJECTED}
    done = records.status == Status.FINISHED
    assert np.all(np.isnan(records.finish_s[~done]))
    assert np.all(records.ttft_s[done] > 0)
    assert np.all(records.admitted_s[done] >= records.arrival_s[done])
    assert np.all(records.finish_s[done] >= records.first_token_s[done])
    assert np.all(iterations.end_s > iterations.start_s)
    assert np.all(iterations.start_s[1:] >= iterations.end_s[:-1])
    assert np.all(iterations.kv_used_share <= 1.0)
    assert np.all(records.produced_tokens[done] <= records.output_tokens[done])
    gaps = engine.token_gaps()
    assert int(gaps.count.sum()) == int((records.produced_tokens[done] - 1).sum())
    assert np.all(gaps.itl_s > 0)


@given(rows=WORKLOAD, period_s=st.floats(0.05, 5.0), kv_blocks=st.integers(16, 40))
def test_looking_at_the_engine_changes_nothing(
    rows: list[tuple[float, int, int]], period_s: float, kv_blocks: int
) -> None:
    rows = sorted(rows)
    price = linear_latency(base_s=0.25, token_s=0.01)
    unseen, seen = tiny_engine(kv_blocks=kv_blocks, latency=price), tiny_engine(kv_blocks=kv_blocks, latency=price)
    expected = serve(unseen, *rows)
    seen.submit(requests(*rows))
    step = 0
    while not seen.drained:
        step += 1
        seen.run_until(step * period_s)
    got = seen.records()
    for field in dataclasses.fields(Records):
        assert np.array_equal(getattr(got, field.name), getattr(expected, field.name), equal_nan=True)
