"""The real engine: its tokens against plain models, its memory against counts, its clock, and what a real run meets."""

from __future__ import annotations

import math
import threading
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from hw.elastic.blocks import DiskStore
from hw.elastic.copies import LayerCopier
from hw.elastic.device_memory import out_of_memory
from hw.elastic.model import ElasticModel
from hw.engine.clock import RealClock
from hw.engine.hw_engine import HwEngine
from hw.engine.iteration_log import passes_table
from hw.engine.torch_executor import NumericsError, TorchExecutor
from sim.cost.latency import calibration_from_dict
from sim.cost.memory import budget_for_kv_blocks, layer_weight_bytes, weight_bytes
from sim.cost.plan import dense_plan, drop, with_mask
from sim.engine.budget import Budget
from sim.engine.executor import Iteration
from sim.engine.pricing_executor import PricingExecutor
from sim.engine.transition import LayerCopy
from sim.errors import BudgetError, ConfigError, ModelError
from sim.policies import PolicyContext
from sim.policies.greedy_stop import greedy_stop
from sim.replay.loop import replay
from sim.results.records import Status
from tests.hw.engine.runs import moving_budget, plain_tokens, plan_schedule, serve, some_rows, trace_of
from tests.hw.serving import (
    LAYERS,
    engine_config,
    flat_latency,
    flat_latency_content,
    hw_engine,
    requests,
    tiny,
    tiny_spec,
    torch,
)
from tests.hw.tiny_models import FAMILIES, SHORT_TOKENS

# --- Tokens ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scheduler", ["chunked", "prefill_first"])
def test_batched_paged_chunked_serving_gives_the_tokens_of_plain_generate(family: str, scheduler: str) -> None:
    rows = some_rows(1, 9)
    config = engine_config(scheduler, max_context_tokens=SHORT_TOKENS)
    assert serve(hw_engine(family=family, config=config), rows) == plain_tokens(family, rows)


def test_a_policy_sees_what_the_calibration_expects_of_the_iterations_that_ended() -> None:
    # The clock runs at the flat prices, so a calibration of half those prices is twice too fast.
    half = PricingExecutor(flat_latency(5e5, 1.5e4))
    for prices, factor in ((half, 2.0), (None, 1.0)):
        engine = hw_engine(prices=prices)
        engine.submit(requests(some_rows(1, 6)))
        state = engine.run_until(math.inf)
        assert state.busy_s == pytest.approx(factor * state.priced_s)
        assert state.busy_s > 0


@pytest.mark.parametrize("faster", [0.25, 4.0])
def test_the_calibration_expects_the_same_of_streaming_passes_however_fast_the_device_is(faster: float) -> None:
    """Copies go on from the end of each iteration, not from the end that was expected."""
    plan = replace(dense_plan(tiny_spec()), streamed=(True,) * LAYERS)
    layer_s = 0.5
    link = layer_weight_bytes(tiny_spec()) / layer_s
    prices = PricingExecutor(flat_latency(1e6 * faster, 0.0), 0.0, link, model=tiny_spec())
    seen: list[float] = []
    price = prices.price
    prices.price = lambda iteration: (found := price(iteration), seen.append(found[0]))[0]  # type: ignore[method-assign]
    engine = hw_engine(plan=plan, prices=prices)
    serve(engine, [(0.0, 6, 40)])
    assert max(seen[3:]) == pytest.approx(min(seen[3:]))
    assert seen[-1] <= max(LAYERS * layer_s, faster) * 1.01
    engine.close()


def test_a_calibration_that_lacks_a_precision_expects_what_iterations_take() -> None:
    content = flat_latency_content(5e5, 1.5e4)
    del content["tables"]["linear_us"]["8"]
    engine = hw_engine(
        plan=replace(dense_plan(tiny_spec()), weight_bits=(8,) * LAYERS),
        prices=PricingExecutor(calibration_from_dict(content)),
    )
    engine.submit(requests(some_rows(1, 3)))
    state = engine.run_until(math.inf)
    assert state.priced_s == state.busy_s > 0


def test_an_engine_for_long_contexts_uses_the_long_factors_of_longrope() -> None:
    rows = [(0.0, SHORT_TOKENS + 1, 9), (0.4, SHORT_TOKENS + 40, 5)]
    engine = hw_engine(family="phi3_longrope", kv_blocks=600)
    assert serve(engine, rows) == plain_tokens("phi3_longrope", rows)


def test_a_prefix_cache_which_only_the_simulator_has_is_refused() -> None:
    with pytest.raises(ConfigError, match="the real engine has no prefix cache"):
        hw_engine(config=replace(engine_config(), prefix_caching=True))


def test_scheduling_ahead_which_only_the_simulator_has_is_refused() -> None:
    with pytest.raises(ConfigError, match="the real engine forms a batch when the iteration before it has ended"):
        hw_engine(config=replace(engine_config(), schedules_ahead=True))


def test_blocking_copies_which_only_the_simulator_has_are_refused() -> None:
    with pytest.raises(ConfigError, match="the real engine serves while it copies weights in: set it to overlapped"):
        hw_engine(config=replace(engine_config(), copying="blocking"))


@pytest.mark.parametrize("reuse", [False, True])
def test_preempted_requests_still_give_the_tokens_of_plain_generate(reuse: bool) -> None:
    rows = some_rows(2, 12, longest_output=24)
    engine = hw_engine(kv_blocks=16, config=engine_config(reuse_preempted_kv=reuse))
    tokens = serve(engine, rows)
    assert engine.records().preemptions.sum() > 3
    fits = [output for (_, prompt, output) in rows if prompt + output <= 64]
    assert len(fits) == len(rows), "none is cut at the context limit"
    assert tokens == plain_tokens("llama", rows)


def test_a_request_may_end_at_the_models_own_end_of_text() -> None:
    rows = [(0.0, 10, 30)]
    full = serve(hw_engine(), rows)[0]
    stop = full[4]
    engine = hw_engine(ends=lambda request_id, token: token == stop)
    assert serve(engine, rows)[0] == full[: full.index(stop) + 1]
    assert engine.records().status.tolist() == [Status.FINISHED]


def test_a_run_without_iterations_has_the_columns_of_any_other() -> None:
    engine = hw_engine()
    empty = passes_table(engine.shapes(), engine.iterations())
    serve(engine, some_rows(1, 3))
    full = passes_table(engine.shapes(), engine.iterations())
    assert len(empty) == 0 < len(full) == len(engine.iterations().start_s)
    assert list(empty.columns) == list(full.columns)


# --- Memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("streams", [False, True])
def test_allocated_bytes_are_those_of_the_memory_model_after_every_change_of_the_plan(streams: bool) -> None:
    policy, spec = plan_schedule(9, 10, bits=True, streams=streams), tiny_spec()
    budget = budget_for_kv_blocks(spec, dense_plan(spec), 60, 0, 4)
    engine = hw_engine(budget=Budget((0.0,), (budget,)))
    engine.submit(requests(some_rows(6, 12)))
    for i, plan in enumerate(policy.plans):
        engine.apply(plan)
        state = engine.run_until(30.0 * (i + 1))
        engine.check()
        assert state.plan == plan
        assert state.weight_bytes == weight_bytes(spec, plan)
        row = engine.memory_rows()[-1]
        if row.time_s > 30.0 * i:
            assert row.predicted_bytes == row.allocated_bytes <= budget
    assert engine.drained


def test_what_is_allocated_never_exceeds_a_budget_that_moves() -> None:
    spec = tiny_spec()
    budget = moving_budget(3, 40)
    engine = hw_engine(budget=budget)
    served = PolicyContext(model=spec, kv_block_tokens=4)
    replay(
        trace_of(some_rows(7, 20)),
        engine,
        greedy_stop(served, order=["FFN2", "MHA1", "FFN1", "MHA2"]),
        tick_s=0.5,
        also_at_s=budget.change_s[1:],
    )
    assert (engine.records().status == Status.FINISHED).all()
    starts_s = engine.iterations().start_s
    for row, start_s in zip(engine.memory_rows(), starts_s, strict=True):
        step = np.searchsorted(budget.change_s, start_s, side="right") - 1
        if budget.budget_bytes[step] >= weight_bytes(spec, dense_plan(spec)):
            assert row.allocated_bytes <= budget.budget_bytes[step]


# --- What a real run meets -------------------------------------------------------------------------------------------


class StarvedExecutor(TorchExecutor):
    """A device that runs out of memory while an iteration computes for more than two requests."""

    def forward(self, iteration: Iteration) -> dict[int, int]:
        if len(iteration.batch.scheduled) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().forward(iteration)


class Starved(HwEngine):
    executor_type = StarvedExecutor


def test_a_read_that_fails_once_is_an_error_once(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, plan = [(0.0, 6, 20)], replace(dense_plan(tiny_spec()), streamed=(True,) * LAYERS)
    expected, before = serve(hw_engine(), rows), set(threading.enumerate())
    engine = hw_engine(plan=plan)
    load, calls = DiskStore.load, iter(range(1000))

    def failing(store: DiskStore, key: object, targets: Any) -> Any:
        if next(calls) == 30:
            raise ModelError("the file of stored weights ends")
        return load(store, key, targets)

    monkeypatch.setattr(DiskStore, "load", failing)
    engine.submit(requests(rows))
    with pytest.raises(ModelError, match="stored weights ends"):
        engine.run_until(math.inf)
    engine.run_until(math.inf)
    assert [engine.tokens(0)] == expected
    engine.close()
    assert set(threading.enumerate()) <= before


def test_a_model_whose_engine_is_closed_still_runs_its_streamed_layers() -> None:
    plan = replace(dense_plan(tiny_spec()), streamed=(True, True, False, True))
    engine = hw_engine(plan=plan)
    serve(engine, some_rows(3, 4))
    engine.close()
    elastic, dense = engine.elastic, ElasticModel(tiny(), name="tiny")
    torch.testing.assert_close(elastic.forward([[1, 2, 3]]), dense.forward([[1, 2, 3]]))
    assert elastic.bytes() == weight_bytes(tiny_spec(), plan)
    elastic.streams.close()


def test_running_out_of_memory_preempts_and_loses_no_request() -> None:
    rows = some_rows(8, 6)
    engine = hw_engine(kind=Starved)
    assert serve(engine, rows) == plain_tokens("llama", rows)
    assert engine.out_of_memory > 0
    assert engine.records().preemptions.sum() >= engine.out_of_memory


def test_errors_of_an_allocator_out_of_memory_are_recognized_and_no_others_are() -> None:
    with pytest.raises((RuntimeError, MemoryError)) as ran_out:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert out_of_memory(ran_out.value)
    with pytest.raises(RuntimeError) as other:
        torch.zeros(2) @ torch.zeros(3)
    assert not out_of_memory(other.value)


class HopelessExecutor(TorchExecutor):
    def forward(self, iteration: Iteration) -> dict[int, int]:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")


class Hopeless(HwEngine):
    executor_type = HopelessExecutor


def test_one_request_that_alone_runs_out_of_memory_ends_the_run_with_advice() -> None:
    engine = hw_engine(kind=Hopeless)
    with pytest.raises(BudgetError, match="raise workspace_bytes"):
        serve(engine, some_rows(8, 3))
    assert len(engine.records()) > 0


def test_a_value_that_is_no_number_stops_the_run_and_names_block_and_plan() -> None:
    spec = tiny_spec()
    engine = hw_engine(plan=with_mask(dense_plan(spec), drop(spec, mha=[1])))
    engine.elastic.blocks["ffn"][2].linears[0].weight.data[0, 0] = math.nan
    engine.submit(requests([(0.0, 5, 5)]))
    with pytest.raises(NumericsError, match=r"FFN2 .*'-MHA 1'"):
        engine.run_until(math.inf)
    assert engine.records().produced_tokens.tolist() == [0]


def test_an_interrupt_waits_for_the_end_of_an_iteration_and_leaves_complete_records() -> None:
    engine = hw_engine(on_token=lambda request_id, token, last: engine.interrupt() if request_id == 1 else None)
    engine.submit(requests([(0.0, 8, 6), (0.0, 8, 6)]))
    with pytest.raises(KeyboardInterrupt):
        engine.run_until(math.inf)
    assert engine.records().produced_tokens.tolist() == [1, 1]
    engine.check()


@pytest.mark.parametrize("kind", ["wall", "cpu"])
def test_times_on_a_real_clock_increase_and_idle_time_can_be_skipped(kind: str) -> None:
    engine = hw_engine(timed=False, clock=RealClock(kind, skip_idle=True))
    replay(
        trace_of([(0.0, 30, 5), (0.01, 30, 5), (500.0, 9, 3)]), engine, plan_schedule(5, 3, period_s=100.0), tick_s=60.0
    )
    records, iterations = engine.records(), engine.iterations()
    assert (records.status == Status.FINISHED).all()
    assert (records.ttft_s > 0).all()
    assert (records.first_token_s <= records.finish_s).all()
    assert (np.diff(iterations.start_s) > 0).all()
    assert (iterations.end_s[:-1] <= iterations.start_s[1:]).all()
    assert records.admitted_s[2] >= 500.0
    assert records.finish_s[2] < 505.0
    engine.close()


class SlowCopier(LayerCopier):
    """Copies that take a twentieth of a second of processor time."""

    def start(self, copy: LayerCopy) -> None:
        super().start(copy)
        inner = self._future
        assert inner is not None
        assert self._thread is not None
        self._future = self._thread.submit(lambda: inner.result() + self.spend(0.05))

    def spend(self, seconds: float) -> float:
        start_s = self._clock()
        while self._clock() - start_s < seconds:
            pass
        return seconds


@pytest.mark.parametrize("kind", ["wall", "cpu"])
def test_an_idle_engine_waits_for_weights_as_long_as_their_copy_takes(kind: str) -> None:
    elastic = ElasticModel(tiny(), name="tiny")
    clock, dense = RealClock(kind, skip_idle=True), dense_plan(elastic.spec)
    pruned = with_mask(dense, drop(elastic.spec, ffn=[1, 2]))
    engine = HwEngine(
        elastic=elastic,
        config=engine_config(),
        plan=pruned,
        budget_bytes=budget_for_kv_blocks(elastic.spec, dense, 200, 0, 4),
        clock=clock,
        copier=SlowCopier(elastic, clock.source),
    )
    engine.run_until(0.0)
    engine.apply(dense)
    engine.run_until(10.0)
    rows = engine.transitions()
    assert 0.1 <= rows.ready_s[0] - rows.time_s[0] < 5.0
    engine.close()
