"""The contract of every engine: one suite, run on the plain, the compiled and the real engine.

    class TestMyEngine(EngineContract):
        def make(self, **settings): return MyEngine(...)

On every engine, an iteration takes ``BASE_S`` seconds plus ``TOKEN_S`` per token, and weights are copied in at
``COPY_BYTES_PER_S``. The laws are those of the design's section 6 that one engine can hold.
"""

from __future__ import annotations

import dataclasses
import math
import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from sim.cost.latency import LatencyModel
from sim.cost.memory import budget_for_kv_blocks, kv_block_layer_bytes, weight_bytes
from sim.cost.model_spec import ModelSpec
from sim.cost.plan import KeepMask, KVKeep, Plan, dense_plan, drop, with_mask
from sim.engine.budget import Budget
from sim.engine.protocol import EngineConfig, EngineState, Request
from sim.engine.scheduler import Limits
from sim.engine.sim_engine import SimEngine
from sim.errors import ConfigError, PlanError
from sim.policies.schedule import Schedule
from sim.replay.loop import replay
from sim.results.records import Records, Status
from sim.traces.trace import Trace

BASE_S, TOKEN_S = 1.0, 0.03
COPY_BYTES_PER_S = 1e5
BLOCK_TOKENS = 4
Rows = Sequence[tuple[float, int, int]]


def requests(rows: Rows, first: int = 0) -> list[Request]:
    """Return ``(arrival_s, prompt_tokens, output_tokens)`` rows as requests."""
    return [
        Request(request_id=first + i, arrival_s=arrival_s, prompt_tokens=prompt, output_tokens=output)
        for i, (arrival_s, prompt, output) in enumerate(rows)
    ]


def random_rows(seed: int, count: int = 12) -> Rows:
    """Return requests of a seed: some together, some with pauses between them."""
    rng, at_s, rows = random.Random(seed), 0.0, []
    for _ in range(count):
        at_s += rng.choice((0.0, 0.0, 0.4, 2.0, 9.0))
        rows.append((at_s, rng.randint(1, 40), rng.randint(1, 14)))
    return rows


def random_plans(spec: ModelSpec, seed: int, count: int = 6) -> list[Plan]:
    """Return plans of a seed: masks of both stages, precisions, kept tokens."""
    rng, layers, plans = random.Random(seed), spec.num_layers, []
    keeps = (KVKeep(), KVKeep(first_tokens=2, last_tokens=5), KVKeep(first_tokens=0, last_tokens=9))
    for _ in range(count):
        prefill = KeepMask(
            mha=tuple(rng.random() < 0.75 for _ in range(layers)), ffn=tuple(rng.random() < 0.75 for _ in range(layers))
        )
        decode = KeepMask(
            mha=tuple(keep and rng.random() < 0.8 for keep in prefill.mha),
            ffn=tuple(keep and rng.random() < 0.8 for keep in prefill.ffn),
        )
        plan = replace(dense_plan(spec), prefill=prefill, decode=decode if rng.random() < 0.5 else prefill)
        if rng.random() < 0.5:
            plan = replace(plan, weight_bits=tuple(rng.choice((16, 8, 4)) for _ in range(layers)))
        if rng.random() < 0.3:
            plan = replace(plan, kv_keep=tuple(rng.choice(keeps) for _ in range(layers)))
        plans.append(plan)
    return plans


def assert_same(ours: Any, theirs: Any, *, without: Sequence[str] = ()) -> None:
    """Check that two tables of records agree up to rounding."""
    for field in dataclasses.fields(ours):
        a, b = getattr(ours, field.name), getattr(theirs, field.name)
        if field.name in without:
            continue
        if isinstance(a, tuple):
            assert a == b, field.name
        else:
            assert np.allclose(np.asarray(a, float), np.asarray(b, float), rtol=1e-9, atol=1e-9, equal_nan=True), (
                field.name
            )


class EngineContract(ABC):
    """The suite; a subclass makes its engine.

    spec: the model. latency: BASE_S and TOKEN_S for that model.
    seeds: random cases of each law. refuses_late: whether a request may not be submitted after its arrival.
    """

    seeds: Sequence[int] = range(10)
    refuses_late = True

    @property
    @abstractmethod
    def spec(self) -> ModelSpec:
        """The model that is served."""

    @property
    @abstractmethod
    def latency(self) -> LatencyModel:
        """The prices of this contract, for the model."""

    @abstractmethod
    def make(self, *, config: EngineConfig, plan: Plan, budget: Budget) -> Any:
        """Return an idle engine."""

    # -- what the tests build on ---------------------------------------------------------------------------------

    def engine(
        self,
        *,
        kv_blocks: int = 60,
        plan: Plan | None = None,
        budget: Budget | None = None,
        make: Any = None,
        max_batch_tokens: int = 24,
        max_running: int = 6,
        **config: Any,
    ) -> Any:
        """Return an idle engine; its budget holds the dense weights and ``kv_blocks`` KV blocks over all layers."""
        settings = EngineConfig(
            limits=Limits(max_batch_tokens=max_batch_tokens, max_running=max_running),
            kv_block_tokens=BLOCK_TOKENS,
            **config,
        )
        plan = plan or dense_plan(self.spec)
        return (make or self.make)(config=settings, plan=plan, budget=budget or self.budget(kv_blocks))

    def budget(self, *kv_blocks: int, every_s: float = 6.0) -> Budget:
        """Return a budget that holds the dense weights and these numbers of KV blocks, one after the other."""
        dense = dense_plan(self.spec)
        values = [budget_for_kv_blocks(self.spec, dense, blocks, 0, BLOCK_TOKENS) for blocks in kv_blocks]
        return Budget(tuple(every_s * i for i in range(len(values))), tuple(values))

    def reference(self, *, config: EngineConfig, plan: Plan, budget: Budget) -> SimEngine:
        """Return the compiled engine with the prices of this contract."""
        return SimEngine(
            model=self.spec,
            latency=self.latency,
            config=config,
            plan=plan,
            budget_bytes=budget,
            host_to_device_bytes_per_s=COPY_BYTES_PER_S,
        )

    def serve(self, engine: Any, rows: Rows, plans: Sequence[Plan] = (), period_s: float = 3.1) -> Records:
        """Serve rows to the end, applying a plan at each of the first ticks; check laws 1 and 2 at every tick."""
        engine.submit(requests(rows))
        ahead, tick = list(plans), 0
        while not engine.drained:
            tick += 1
            self.check(engine, engine.run_until(tick * period_s))
            if ahead:
                engine.apply(ahead.pop(0))
            assert tick < 10_000, "the engine makes no progress"
        return engine.records()  # type: ignore[no-any-return]

    def check(self, engine: Any, state: EngineState) -> None:
        """Check that no request and no KV block is lost."""
        assert state.arrived == state.waiting + state.running + state.finished + state.rejected
        held = sum(holder.layer_blocks for holder in engine.holders()) + engine.shared_layer_blocks
        assert state.kv_used_layer_blocks == held
        assert state.kv_layer_blocks >= 0

    def copying(self, engine: Any, from_s: float) -> EngineState:
        """Serve until a layer is being copied in."""
        for tick in range(1, 200):
            state: EngineState = engine.run_until(from_s + 0.05 * tick)
            if state.incoming_bytes:
                return state
        raise AssertionError("no copy started")

    def bytes_in_use(self, state: EngineState) -> int:
        """Return the bytes in use in a state."""
        block_bytes = kv_block_layer_bytes(self.spec, BLOCK_TOKENS)
        return state.weight_bytes + state.incoming_bytes + state.kv_used_layer_blocks * block_bytes

    # -- laws ----------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("scheduler", ["chunked", "prefill_first"])
    @pytest.mark.parametrize("restore", ["new_requests", "recompute"])
    def test_every_request_ends_once_whatever_plans_do(self, scheduler: str, restore: str) -> None:
        """Laws 1 and 2."""
        for seed in self.seeds:
            rows = random_rows(seed)
            kv_blocks = 20 + 5 * (seed % 5)
            engine = self.engine(scheduler=scheduler, restore=restore, kv_blocks=kv_blocks, reuse_preempted_kv=True)
            records = self.serve(engine, rows, random_plans(self.spec, seed))
            assert len(records) == len(rows)
            assert set(records.status.tolist()) <= {Status.FINISHED, Status.REJECTED}
            done = records.status == Status.FINISHED
            limit = engine.context_limit
            expected = [min(output, limit - prompt) for _, prompt, output in rows]
            assert records.produced_tokens[done].tolist() == np.array(expected)[done].tolist()

    def test_a_context_is_never_longer_than_the_positions_of_the_model(self) -> None:
        most = self.spec.max_context_tokens
        blocks = self.spec.num_layers * (2 * most // BLOCK_TOKENS)
        assert self.engine(kv_blocks=blocks, max_context_tokens=2 * most).context_limit == most
        assert self.engine(kv_blocks=blocks, max_context_tokens=most // 2).context_limit == most // 2

    def test_a_request_is_in_flight_until_it_ends(self) -> None:
        engine = self.engine()
        engine.submit(requests([(0.0, 8, 20), (0.0, 8, 20)]))
        state = engine.run_until(5.0)
        assert (state.arrived, state.running, state.finished) == (2, 2, 0)
        assert set(engine.records().status.tolist()) == {Status.RUNNING}

    def test_tokens_are_ordered_and_time_never_runs_backwards(self) -> None:
        """Law 4."""
        for seed in self.seeds:
            engine = self.engine(kv_blocks=20)
            records = self.serve(engine, random_rows(seed), random_plans(self.spec, seed))
            done = records.status == Status.FINISHED
            assert np.all(records.ttft_s[done] > 0)
            assert np.all(records.admitted_s[done] >= records.arrival_s[done])
            assert np.all(records.finish_s[done] >= records.first_token_s[done])
            gaps, iterations = engine.token_gaps(), engine.iterations()
            assert np.all(gaps.itl_s > 0)
            assert gaps.count.sum() == (records.produced_tokens[done] - 1).sum()
            assert np.all(iterations.end_s > iterations.start_s)
            assert np.all(iterations.start_s[1:] >= iterations.end_s[:-1])
            assert np.all(np.diff(engine.transitions().time_s) >= 0)

    def test_bytes_in_use_stay_within_the_budget_while_the_weights_fit_it(self) -> None:
        """Law 3: only the iteration that runs as the budget shrinks may exceed it."""
        for seed in self.seeds:
            budget = self.budget(60, 25, 40, 18, 60)
            engine = self.engine(budget=budget)
            engine.submit(requests(random_rows(seed)))
            longest_s = BASE_S + 24 * TOKEN_S
            for tick in range(60):
                state = engine.run_until(0.5 * tick)
                since_s = state.time_s - max(s for s in budget.change_s if s <= state.time_s)
                if since_s > longest_s or state.time_s < budget.change_s[1]:
                    assert self.bytes_in_use(state) <= state.budget_bytes
            assert engine.budget_violation_s <= 2 * longest_s, "twice the budget shrinks"

    def test_a_budget_below_the_weights_is_counted_and_loses_no_request(self) -> None:
        spec, dense = self.spec, dense_plan(self.spec)
        first = self.budget(40).budget_bytes[0]
        small = with_mask(dense, drop(spec, ffn=[0, 1]))
        low = weight_bytes(spec, small) + (first - weight_bytes(spec, dense)) // 2
        engine = self.engine(budget=Budget((0.0, 4.0), (first, low)))
        engine.submit(requests([(0.0, 8, 10), (0.0, 8, 10)]))
        state = engine.run_until(8.0)
        assert (state.running, state.waiting) == (0, 2)
        assert state.budget_violation_s > 0
        engine.apply(small)
        engine.run_until(9.0)
        engine.run_until(math.inf)
        assert engine.records().produced_tokens.tolist() == [10, 10]

    @pytest.mark.parametrize(
        ("row", "said"),
        [
            ((math.inf, 8, 2), "arrives at inf s"),
            ((math.nan, 8, 2), "arrives at nan s"),
            ((0.0, 0, 2), "prompt_tokens is 0"),
            ((0.0, -5, 2), "prompt_tokens is -5"),
            ((0.0, 8, 0), "output_tokens is 0"),
            ((0.0, 8.5, 2), "prompt_tokens is 8.5"),
            ((0.0, 8, math.nan), "output_tokens is nan"),
            ((None, 8, 2), "arrival_s of the requests is"),
            ((0.0, "8", 2), "prompt_tokens of the requests is"),
            ((0.0, 8, 1j), "output_tokens of the requests is"),
            ((0.0, 10**30, 2), "prompt_tokens of the requests is"),
        ],
    )
    def test_a_request_that_cannot_be_is_refused_and_none_of_its_call_is_accepted(
        self, row: tuple[Any, Any, Any], said: str
    ) -> None:
        engine = self.engine()
        with pytest.raises(ConfigError, match=said):
            engine.submit(requests([(0.0, 8, 2), row]))
        with pytest.raises(ConfigError, match=said):
            engine.submit_arrays(*(np.array([part]) for part in row))
        engine.run_until(math.inf)
        assert len(engine.records()) == 0

    def test_looking_at_an_engine_changes_nothing(self) -> None:
        """Law 11."""
        for seed in self.seeds:
            rows, engines = random_rows(seed), []
            moments = [3.1 * i for i in range(1, 5)]
            for look_s in (math.inf, 0.37):
                engine = self.engine(kv_blocks=20)
                engine.submit(requests(rows))
                engine.apply_at(moments, random_plans(self.spec, seed, len(moments)))
                tick = 1
                while not engine.drained:
                    engine.run_until(tick * look_s)
                    tick += 1
                engines.append(engine)
            for name in ("records", "iterations", "transitions", "token_gaps"):
                assert_same(*(getattr(engine, name)() for engine in engines))

    def test_the_same_moment_twice_shows_the_same_state(self) -> None:
        engine = self.engine()
        engine.submit(requests(random_rows(1)))
        for tick in range(1, 20):
            assert engine.run_until(0.9 * tick) == engine.run_until(0.9 * tick)

    def test_two_runs_leave_the_same_records(self) -> None:
        """Law 5, of one engine."""
        for seed in self.seeds:
            plans = random_plans(self.spec, seed)
            first, second = (self.serve(self.engine(), random_rows(seed), plans) for _ in range(2))
            assert_same(first, second)

    @pytest.mark.parametrize("scheduler", ["chunked", "prefill_first"])
    @pytest.mark.parametrize("restore", ["new_requests", "recompute"])
    def test_it_admits_preempts_and_finishes_as_the_compiled_engine_does(self, scheduler: str, restore: str) -> None:
        """Laws 6 and 8: for equal decisions, iteration by iteration."""
        for seed in self.seeds:
            plans = random_plans(self.spec, seed, 8)
            schedule = Schedule(tuple(2.3 * i for i in range(9)), (dense_plan(self.spec), *plans))
            arrival_s, prompt, output = (np.array(column) for column in zip(*random_rows(seed), strict=True))
            trace = Trace(arrival_s=arrival_s, prompt_tokens=prompt, output_tokens=output)
            budget = self.budget(60, 30, 45, 60) if seed % 2 else self.budget(30)
            engines = [
                self.engine(make=make, scheduler=scheduler, restore=restore, budget=budget, kv_watermark_share=0.05)
                for make in (self.make, self.reference)
            ]
            for engine in engines:
                replay(trace, engine, schedule, tick_s=0.7)
            for name in ("records", "iterations", "transitions"):
                assert_same(*(getattr(engine, name)() for engine in engines), without=["extrapolated"])
            assert engines[0].budget_violation_s == pytest.approx(engines[1].budget_violation_s)

    def test_a_state_shows_no_output_length_before_an_output_ends(self) -> None:
        """Law 7."""
        long, short = self.engine(), self.engine()
        long.submit(requests([(0.0, 10, 50), (0.0, 30, 40), (3.0, 9, 70)]))
        short.submit(requests([(0.0, 10, 20), (0.0, 30, 30), (3.0, 9, 40)]))
        for tick in range(40):
            assert long.run_until(0.5 * tick) == short.run_until(0.5 * tick)

    # -- requests ------------------------------------------------------------------------------------------------

    def test_requests_out_of_order_are_refused_and_none_is_taken(self) -> None:
        engine = self.engine()
        with pytest.raises(ConfigError, match=r"request 1 arrives at 0\.5 s, before 1\.0 s"):
            engine.submit(requests([(1.0, 4, 1), (0.5, 4, 1)]))
        engine.submit(requests([(0.2, 4, 1)]))
        engine.run_until(math.inf)
        assert engine.records().arrival_s.tolist() == [0.2]

    def test_a_request_before_the_last_one_submitted_is_refused(self) -> None:
        engine = self.engine()
        engine.submit(requests([(5.0, 4, 1)]))
        with pytest.raises(ConfigError, match=r"in order of arrival|finite time in seconds"):
            engine.submit(requests([(4.0, 4, 1)], first=1))

    def test_an_arrival_that_is_not_a_number_is_refused(self) -> None:
        with pytest.raises(ConfigError, match=r"in order of arrival|finite time in seconds"):
            self.engine().submit(requests([(math.nan, 4, 1)]))

    def test_a_request_in_the_past_is_refused_unless_time_runs_by_itself(self) -> None:
        engine = self.engine()
        engine.run_until(5.0)
        if self.refuses_late:
            with pytest.raises(ConfigError, match="not in the past"):
                engine.submit(requests([(4.0, 4, 1)]))
        else:
            engine.submit(requests([(4.0, 4, 1)]))
            engine.run_until(math.inf)
            assert engine.records().admitted_s.tolist() == [5.0]

    def test_requests_may_come_as_arrays(self) -> None:
        rows, engines = random_rows(3), [self.engine(), self.engine()]
        arrival_s, prompt, output = (np.array(column) for column in zip(*rows, strict=True))
        engines[0].submit(requests(rows))
        engines[1].submit_arrays(arrival_s[:5], prompt[:5], output[:5])
        engines[1].submit_arrays(arrival_s[5:], prompt[5:], output[5:])
        for engine in engines:
            engine.run_until(math.inf)
        assert_same(*(engine.records() for engine in engines))

    def test_a_prompt_that_can_never_fit_is_rejected_and_the_rest_is_served(self) -> None:
        engine = self.engine(kv_blocks=5)
        records = self.serve(engine, [(0.0, 21, 1), (0.0, 8, 2)])
        assert records.status.tolist() == [Status.REJECTED, Status.FINISHED]

    def test_an_arrival_is_rejected_when_as_many_wait_as_the_plan_admits(self) -> None:
        plan = replace(dense_plan(self.spec), max_running=1, max_waiting=1)
        records = self.serve(self.engine(plan=plan), [(0.0, 4, 3), (0.1, 4, 1), (0.2, 4, 1)])
        assert records.status.tolist() == [Status.FINISHED, Status.FINISHED, Status.REJECTED]

    def test_a_request_that_waits_too_long_for_its_admission_is_rejected_at_that_moment(self) -> None:
        plan = replace(dense_plan(self.spec), max_running=1, max_wait_s=float(1.5 * BASE_S))
        engine = self.engine(plan=plan)
        engine.submit(requests([(0.0, 4, 3), (0.25, 4, 1), (float(2.5 * BASE_S), 4, 1)]))
        states = [engine.run_until(float(0.25 + 1.5 * BASE_S) + moved_s) for moved_s in (-0.01, 0.01)]
        assert [(state.waiting, state.rejected) for state in states] == [(1, 0), (0, 1)]
        engine.run_until(math.inf)
        records = engine.records()
        assert records.status.tolist() == [Status.FINISHED, Status.REJECTED, Status.FINISHED]
        assert math.isnan(records.admitted_s[1])

    def test_a_preempted_request_waits_as_long_as_it_takes(self) -> None:
        engine = self.engine(kv_blocks=9, plan=replace(dense_plan(self.spec), max_wait_s=0.01))
        records = self.serve(engine, [(0.0, 6, 12), (0.0, 6, 12)])
        assert records.preemptions.sum() > 0
        assert records.status.tolist() == [Status.FINISHED, Status.FINISHED]

    def test_a_plan_that_allows_less_waiting_rejects_those_that_waited_longer(self) -> None:
        plan = replace(dense_plan(self.spec), max_running=1)
        engine = self.engine(plan=plan)
        engine.submit(requests([(0.0, 4, 8), (0.1, 4, 1), (0.2, 4, 1)]))
        assert engine.run_until(float(2 * BASE_S)).waiting == 2
        engine.apply(replace(plan, max_wait_s=0.5))
        assert engine.run_until(float(4 * BASE_S)).rejected == 2

    # -- plans ---------------------------------------------------------------------------------------------------

    def test_a_plan_takes_effect_between_two_iterations(self) -> None:
        spec = self.spec
        pruned = with_mask(dense_plan(spec), drop(spec, ffn=[1]))
        engine = self.engine()
        engine.submit(requests([(0.0, 8, 20)]))
        end_s = float(BASE_S + 8 * TOKEN_S)
        engine.run_until(end_s + 0.5)
        engine.apply(pruned)
        state = engine.run_until(end_s + 0.9)
        assert (state.plan, state.target) == (dense_plan(spec), pruned)
        assert engine.run_until(end_s + BASE_S + TOKEN_S + 0.5).plan == pruned
        rows = engine.transitions()
        assert rows.time_s.tolist() == [pytest.approx(end_s + 0.5)]
        assert rows.ready_s.tolist() == [pytest.approx(end_s + BASE_S + TOKEN_S)]

    def test_an_idle_engine_changes_its_plan_at_once(self) -> None:
        pruned = with_mask(dense_plan(self.spec), drop(self.spec, mha=[1]))
        engine = self.engine()
        engine.run_until(1.25)
        engine.apply(pruned)
        state = engine.run_until(1.5)
        assert (state.plan, state.weight_bytes) == (pruned, weight_bytes(self.spec, pruned))

    def test_a_plan_that_is_wanted_already_is_no_change(self) -> None:
        pruned = with_mask(dense_plan(self.spec), drop(self.spec, mha=[1]))
        engine = self.engine()
        engine.submit(requests([(0.0, 8, 20)]))
        for tick, plan in enumerate((dense_plan(self.spec), pruned, pruned), start=1):
            engine.run_until(2.0 * tick)
            engine.apply(plan)
        engine.run_until(math.inf)
        assert len(engine.transitions()) == 1

    def test_an_illegal_plan_is_refused_and_what_runs_goes_on(self) -> None:
        dense = dense_plan(self.spec)
        engine = self.engine()
        engine.submit(requests([(0.0, 8, 5)]))
        engine.run_until(1.0)
        with pytest.raises(PlanError, match="MHA1"):
            engine.apply(replace(dense, prefill=drop(self.spec, mha=[1])))
        assert engine.run_until(2.5).plan == dense

    def test_decisions_known_beforehand_are_those_made_at_their_moments(self) -> None:
        for seed in self.seeds:
            rows, plans = random_rows(seed), random_plans(self.spec, seed)
            moments, engines = [2.1 * i + 0.3 for i in range(len(plans))], [self.engine(), self.engine()]
            for engine in engines:
                engine.submit(requests(rows))
            engines[0].apply_at(moments, plans)
            for moment_s, plan in zip(moments, plans, strict=True):
                if engines[1].drained:
                    break  # with no request left, known decisions are skipped
                engines[1].run_until(moment_s)
                if not engines[1].drained:
                    engines[1].apply(plan)
            for engine in engines:
                engine.run_until(math.inf)
            assert_same(*(engine.records() for engine in engines))
            assert_same(*(engine.iterations() for engine in engines))

    def test_known_decisions_out_of_order_or_illegal_are_refused_and_none_is_taken(self) -> None:
        spec, dense = self.spec, dense_plan(self.spec)
        pruned = with_mask(dense, drop(spec, mha=[0]))
        engine = self.engine()
        engine.submit(requests([(0.0, 20, 10)]))
        with pytest.raises(ConfigError, match="decision 1 is for"):
            engine.apply_at([2.0, 1.0], [pruned, dense])
        with pytest.raises(ConfigError, match="2 moments for 1 plans"):
            engine.apply_at([1.0, 2.0], [pruned])
        with pytest.raises(PlanError):
            engine.apply_at([1.0, 2.0], [pruned, replace(dense, weight_bits=(3,) * spec.num_layers)])
        engine.run_until(math.inf)
        assert len(engine.transitions()) == 0

    def test_known_decisions_are_skipped_while_no_request_is_queued_or_to_come(self) -> None:
        pruned = with_mask(dense_plan(self.spec), drop(self.spec, mha=[0]))
        engine = self.engine()
        engine.submit(requests([(0.0, 8, 2)]))
        engine.apply_at([50.0], [pruned])
        state = engine.run_until(math.inf)
        assert engine.drained
        assert (state.plan, len(engine.transitions())) == (dense_plan(self.spec), 0)

    def test_a_restored_block_joins_at_the_first_iteration_after_its_copy_is_complete(self) -> None:
        spec, dense = self.spec, dense_plan(self.spec)
        pruned = with_mask(dense, drop(spec, ffn=[1]))
        engine = self.engine(plan=pruned)
        engine.submit(requests([(0.0, 8, 30)]))
        engine.run_until(3.0)
        engine.apply(dense)
        copied = weight_bytes(spec, dense) - weight_bytes(spec, pruned)
        assert self.copying(engine, 3.0).incoming_bytes == copied
        engine.run_until(math.inf)
        rows, iterations = engine.transitions(), engine.iterations()
        starts = iterations.start_s
        began_s = starts[starts > 3.0][0]
        assert rows.ready_s[0] == pytest.approx(starts[starts >= began_s + copied / COPY_BYTES_PER_S - 1e-9][0])
        assert rows.bytes_in.tolist() == [copied]

    def test_a_later_plan_keeps_the_copy_that_is_under_way_and_that_it_still_wants(self) -> None:
        spec, dense = self.spec, dense_plan(self.spec)
        pruned, other = with_mask(dense, drop(spec, ffn=[1])), with_mask(dense, drop(spec, mha=[0]))
        copied = weight_bytes(spec, dense) - weight_bytes(spec, pruned)
        engine = self.engine(plan=pruned)
        engine.submit(requests([(0.0, 8, 30)] * 6))
        engine.run_until(2.0)
        engine.apply(dense)
        self.copying(engine, 2.0)
        engine.apply(other)
        engine.run_until(math.inf)
        rows = engine.transitions()
        assert rows.bytes_in.sum() == copied, "it came once"
        assert engine.run_until(1000.0).plan == other

    def test_requests_that_run_go_on_without_a_restored_mha_block_unless_they_are_computed_again(self) -> None:
        spec, dense = self.spec, dense_plan(self.spec)
        pruned = with_mask(dense, drop(spec, mha=[1]))
        for restore, preemptions in (("new_requests", [0, 0]), ("recompute", [1, 1])):
            engine = self.engine(plan=pruned, restore=restore)
            engine.submit(requests([(0.0, 8, 40), (0.0, 8, 40)]))
            engine.run_until(4.0)
            engine.apply(dense)
            engine.run_until(math.inf)
            records = engine.records()
            assert records.preemptions.tolist() == preemptions
            assert records.produced_tokens.tolist() == [40, 40]

    # -- when it is done -----------------------------------------------------------------------------------------

    def test_it_is_drained_when_no_request_can_make_progress_and_wakes_with_the_next(self) -> None:
        engine = self.engine()
        assert engine.run_until(math.inf).arrived == 0
        assert engine.drained
        engine.submit(requests([(0.0, 4, 1)]))
        assert not engine.drained
        engine.run_until(math.inf)
        assert engine.drained
        engine.submit(requests([(9.0, 4, 1)], first=1))
        assert not engine.drained
        engine.run_until(math.inf)
        assert engine.drained
        assert (engine.records().status == Status.FINISHED).all()

    def test_requests_that_no_memory_will_ever_hold_wait_and_the_engine_is_drained(self) -> None:
        engine = self.engine(budget=self.budget(40, 3, every_s=2.0))
        engine.submit(requests([(3.0, 30, 2)]))
        state = engine.run_until(math.inf)
        assert (state.waiting, state.running) == (1, 0)
        assert engine.drained
