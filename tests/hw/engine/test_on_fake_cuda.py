"""The CUDA paths of the real engine, on a fake device that fails where a GPU would silently go wrong."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest

from hw.elastic.compressed_kv import PromptCompressor
from hw.elastic.device import Event
from hw.elastic.model import ElasticModel
from hw.engine.hw_engine import HwEngine
from hw.engine.prompts import RandomPrompts
from hw.engine.torch_executor import NumericsError
from sim.cost.memory import budget_for_kv_blocks, weight_bytes
from sim.cost.plan import KV_METHODS, KVCompression, Plan, dense_plan, drop, with_mask
from sim.engine.budget import Budget
from sim.engine.replica import MOST_REFUSALS, RETRY_S
from sim.errors import BudgetError
from sim.results.records import Status
from tests.hw.engine.runs import (
    Audited,
    assert_blocks_are_as_counted,
    moving_budget,
    plain_tokens,
    plan_schedule,
    some_rows,
)
from tests.hw.fake_cuda import FakeCuda, FakeEvent
from tests.hw.serving import (
    LAYERS,
    VOCABULARY,
    PricedClock,
    engine_config,
    flat_latency,
    requests,
    tiny,
    tiny_spec,
    torch,
)
from tests.hw.tiny_models import few_channels  # noqa: F401 - a fixture
from tests.sample import quick

ALL_STREAMED = replace(dense_plan(tiny_spec()), streamed=(True,) * LAYERS)
WORKSPACE_BYTES = 1 << 20
"""What a pass of the tiny model may take for a moment, with the host's tensors, which the fake takes for the GPU's."""


def engine_on(
    device: FakeCuda,
    *,
    plan: Plan | None = None,
    kv_blocks: int = 60,
    budget: Budget | None = None,
    piece_bytes: int = 4096,
    kind: type[HwEngine] = HwEngine,
    ordered: bool = False,
    **more: Any,
) -> HwEngine:
    """Return an engine on the fake device; the caller has entered it. ordered: whether plans may cut FFN blocks."""
    elastic = ElasticModel(tiny(), name="tiny", hardware=device)
    if ordered:
        elastic.order_channels()
    spec, config = elastic.spec, more.pop("config", engine_config())
    plan = plan or dense_plan(spec)
    device.piece_bytes = piece_bytes
    bytes_ = budget_for_kv_blocks(spec, dense_plan(spec), kv_blocks, 0, config.kv_block_tokens)
    budget = budget or Budget((0.0,), (bytes_,))
    return kind(
        elastic=elastic,
        config=config,
        plan=plan,
        budget_bytes=replace(budget, budget_bytes=tuple(b + WORKSPACE_BYTES for b in budget.budget_bytes)),
        workspace_bytes=WORKSPACE_BYTES,
        prompts=RandomPrompts(VOCABULARY),
        clock=PricedClock(flat_latency(), plan),
        **more,
    )


def serve_through(engine: HwEngine, plans: list[Plan], rng: random.Random, rows: list[tuple[float, int, int]]) -> None:
    """Serve requests while plans change at random moments; check after every look that nothing is lost."""
    engine.submit(requests(rows))
    at_s = 0.0
    while not engine.drained:
        at_s += rng.choice([0.4, 1.1, 2.5])
        engine.run_until(at_s)
        engine.check()
        assert_blocks_are_as_counted(engine)
        if rng.random() < 0.5:
            engine.apply(rng.choice(plans))
    for step in range(60):  # what is under way comes, though no request is there
        engine.run_until(at_s + step)
    engine.check()
    assert engine._changes.copy is None
    assert engine.elastic.bytes() == weight_bytes(engine.model, engine._changes.wanted)
    assert (engine.records().status == Status.FINISHED).all()


@pytest.mark.parametrize("writes", [False, True])
@pytest.mark.parametrize("seed", quick(range(8), 4))
def test_any_plans_and_budgets_give_the_tokens_of_a_plain_model_and_stay_within_memory(seed: int, writes: bool) -> None:
    rng = random.Random(seed)
    Audited.plain, kv_blocks, precision = tiny(), rng.choice([15, 24, 60]), seed % 3 == 2
    plans = list(plan_schedule(seed, 8, bits=precision, kv=precision, streams=seed % 2 == 0, writes=writes).plans)
    with FakeCuda(polls=rng.choice([1, 2, 5, 20])) as device:
        engine = engine_on(
            device,
            kind=HwEngine if precision else Audited,  # plain passes have neither precisions nor kept tokens
            piece_bytes=rng.choice([512, 4096, 65536]),
            kv_blocks=kv_blocks,
            budget=moving_budget(seed, kv_blocks) if rng.random() < 0.6 else None,
            config=engine_config(
                rng.choice(["chunked", "prefill_first"]),
                restore=rng.choice(["new_requests", "recompute"]),
                reuse_preempted_kv=rng.random() < 0.5,
            ),
        )
        serve_through(engine, plans, rng, some_rows(seed, 8))
    assert engine.out_of_memory == 0
    for row in engine.memory_rows():
        assert row.allocated_bytes == row.predicted_bytes
    assert isinstance(engine, Audited) != precision


def test_the_fake_shows_a_copy_that_is_read_too_early() -> None:
    class Hasty(FakeCuda):
        def join(self, event: Event, tensors: Any) -> None:
            """Wait for nothing."""

        def mark(self) -> Event:
            return FakeEvent(self, [])

    spec = tiny_spec()
    with Hasty(polls=1000) as device:
        engine = engine_on(device, plan=with_mask(dense_plan(spec), drop(spec, ffn=[1])))
        engine.submit(requests([(0.0, 8, 30)]))
        engine.run_until(2.0)
        engine._copier.complete = lambda: True  # type: ignore[method-assign]
        engine.apply(dense_plan(spec))
        with pytest.raises(NumericsError, match="FFN1"):
            engine.run_until(60.0)


def test_a_streaming_pass_reads_no_slot_before_its_copy_is_complete() -> None:
    class Hasty(FakeCuda):
        def join(self, event: Event, tensors: Any) -> None:
            """Wait for nothing."""

    with Hasty(polls=1000) as device:
        engine = engine_on(device, plan=ALL_STREAMED)
        engine.submit(requests([(0.0, 8, 30)]))
        with pytest.raises(NumericsError, match="MHA0"):
            engine.run_until(60.0)


def test_slots_that_no_pass_has_allocated_do_not_count_as_memory_of_others() -> None:
    others = []
    for plan in (None, ALL_STREAMED):
        with FakeCuda() as device:
            foreign = torch.empty(400_000, dtype=torch.uint8)
            engine = engine_on(device, plan=plan)
            others.append(engine.memory._others_bytes)
            engine.close()
            del foreign
    assert others[0] == others[1] > 399_000


def test_slots_that_are_refused_for_a_while_hold_the_next_iteration_up_and_lose_nothing() -> None:
    rows = [(0.0, 6, 20)] * 3
    with FakeCuda() as device:
        engine = engine_on(device, plan=None)
        reserve, left = engine.elastic.streams.reserve, 5

        def refusing() -> None:
            nonlocal left
            if not engine.elastic.streams._slots and engine.elastic.streams.layers and left:
                left -= 1
                raise torch.OutOfMemoryError("CUDA out of memory: slots")
            reserve()

        engine.elastic.streams.reserve = refusing  # type: ignore[method-assign]
        engine.submit(requests(rows))
        engine.run_until(3.0)
        engine.apply(ALL_STREAMED)
        engine.run_until(math.inf)
        engine.check()
    assert left == 0
    assert engine.out_of_memory == 5
    assert engine.records().preemptions.sum() == 0
    assert [engine.tokens(i) for i in range(3)] == plain_tokens("llama", rows)


def test_a_plan_that_was_not_listed_waits_for_the_memory_to_quantize_its_layers() -> None:
    dense = dense_plan(tiny_spec())
    with FakeCuda() as device:
        engine = engine_on(device, plans=[dense])
        engine.submit(requests([(0.0, 6, 60)]))
        engine.run_until(3.0)
        engine.apply(ALL_STREAMED)
        engine.run_until(6.0)
        engine.apply(replace(ALL_STREAMED, weight_bits=(8,) * LAYERS))
        before = device.allocations
        device.refuse = frozenset(range(before, before + 3))
        engine.run_until(math.inf)
        engine.check()
    assert engine.out_of_memory > 0
    assert len(engine.tokens(0)) == 60


@pytest.mark.usefixtures("few_channels")
@pytest.mark.parametrize("refused", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_widths_change_on_a_device_that_refuses_memory_now_and_then(seed: int, refused: bool) -> None:
    plans = list(plan_schedule(seed, 8, bits=seed > 0, cuts=True).plans)
    with FakeCuda(polls=2) as device:
        engine = engine_on(device, ordered=True, plans=plans)
        first = device.allocations
        device.refuse = frozenset(range(first + 5 + seed, first + 40_000, 991)) if refused else frozenset()
        serve_through(engine, plans, random.Random(seed), some_rows(seed, 8))
        for row in engine.memory_rows():
            assert row.allocated_bytes == row.predicted_bytes
        assert refused or engine.out_of_memory == 0
        engine.close()


# --- A device that refuses memory ------------------------------------------------------------------------------------


class Refusals:
    """Runs one scenario again and again, each time with other allocations refused."""

    def __init__(self, *, change: bool, seed: int = 3, count: int = 4) -> None:
        """Run it once without refusals; ``change``: whether plans change, with precisions and kept tokens."""
        self._seed, self._rows = seed, some_rows(seed, count, longest_prompt=24, longest_output=8)
        changing = plan_schedule(seed, 6, bits=True, kv=True, streams=True).plans
        self._plans = list(changing) if change else [dense_plan(tiny_spec())]
        self.in_forward: set[int] = set()
        self.between: set[int] = set()
        self.run(frozenset(), watch=True)

    def run(self, refuse: frozenset[int], *, watch: bool = False) -> HwEngine:
        """Serve all requests and check that none is lost; return the engine."""
        tiny_spec()
        with FakeCuda(polls=2) as device:

            @contextmanager
            def watched() -> Iterator[None]:
                first = device.allocations
                yield
                if watch:
                    self.in_forward.update(range(first, device.allocations))

            budget = moving_budget(self._seed, 24)
            engine = engine_on(device, kv_blocks=24, piece_bytes=1024, budget=budget, during_forward=watched)
            first = device.allocations
            device.refuse = refuse
            serve_through(engine, self._plans, random.Random(self._seed), self._rows)
            if watch:
                self.between = set(range(first, device.allocations)) - self.in_forward
            engine.close()
            assert device.limits[-1] is None
        assert [len(engine.tokens(i)) for i in range(len(self._rows))] == [output for _, _, output in self._rows]
        if len(self._plans) == 1:
            assert [engine.tokens(i) for i in range(len(self._rows))] == plain_tokens("llama", self._rows)
        return engine


@pytest.mark.parametrize("change", [False, True])
def test_no_request_is_lost_when_the_device_refuses_an_allocation(change: bool) -> None:
    """Between iterations (pool, copies, kept tokens) and in the middle of a pass."""
    case, rng = Refusals(change=change), random.Random(7)
    for numbers, most in ((case.between, 4), (case.in_forward, 2)):
        for number in rng.sample(sorted(numbers), most):
            engine = case.run(frozenset([number]))
            assert engine.out_of_memory == 1, number
            assert engine._retry_s == math.inf, number


@pytest.mark.slow
@pytest.mark.parametrize("change", [False, True])
def test_no_request_is_lost_whichever_allocation_the_device_refuses(change: bool) -> None:
    """At most 60 allocations between iterations and 20 within them, evenly spread over the run."""
    case = Refusals(change=change, count=3)
    for numbers, most in ((case.between, 60), (case.in_forward, 20)):
        for number in sorted(numbers)[:: max(1, math.ceil(len(numbers) / most))]:
            assert case.run(frozenset([number])).out_of_memory == 1, number


def test_no_request_is_lost_when_the_device_refuses_again_and_again() -> None:
    case = Refusals(change=True)
    last = max(case.in_forward | case.between)
    engine = case.run(frozenset(range(min(case.between), 2 * last, last // 9)))  # never two in a row in one pass
    assert engine.out_of_memory > 4


def test_memory_that_never_comes_ends_the_run_with_advice_and_an_idle_engine_just_stops_trying() -> None:
    high = budget_for_kv_blocks(tiny_spec(), dense_plan(tiny_spec()), 60, 0, 4)
    budget = Budget((0.0, 2.0, 5.0), (high, high - 60 * 4 * 4 * 2 * 2 * 8 * 4, high))  # no KV block from 2 s on
    for waits in (False, True):
        with FakeCuda() as device:
            engine = engine_on(device, budget=budget)
            engine.expects_more = True
            engine.run_until(3.0)
            assert engine.pool.layer_blocks < 8
            device.limits.append(device.in_use)
            device.limit = lambda _most: None  # type: ignore[method-assign]
            if not waits:
                engine.run_until(60.0)
                assert engine.out_of_memory == MOST_REFUSALS
                assert engine.drained
                continue
            engine.submit(requests([(6.0, 40, 4)]))
            with pytest.raises(BudgetError, match="other programs"):
                engine.run_until(60.0)
            assert engine._now_s() >= 6.0 + 0.5 * MOST_REFUSALS * RETRY_S


# --- Memory ----------------------------------------------------------------------------------------------------------


class Journal(FakeCuda):
    """Remembers the order of copies and of returns of memory."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[str] = []

    def give_back(self) -> None:
        super().give_back()
        self.events.append("give back")

    def copy_in(self, stored: Any) -> Any:
        self.events.append("copy")
        return super().copy_in(stored)


def test_the_memory_of_kv_blocks_is_given_back_before_a_copy_takes_their_place() -> None:
    spec = tiny_spec()
    pruned = with_mask(dense_plan(spec), drop(spec, ffn=[1]))
    with Journal() as device:
        engine = engine_on(device, plan=pruned)
        engine.submit(requests([(0.0, 8, 30)]))
        engine.run_until(2.0)
        blocks = engine.pool.layer_blocks
        device.events.clear()
        engine.apply(dense_plan(spec))
        engine.run_until(4.0)
    assert engine.pool.layer_blocks < blocks
    assert device.events[:2] == ["give back", "copy"]


def test_the_limit_follows_each_step_of_the_budget_even_where_the_blocks_stay() -> None:
    spec = tiny_spec()
    bytes_ = budget_for_kv_blocks(spec, dense_plan(spec), 60, 0, 4)
    budget = Budget((0.0, 2.0, 4.0), (bytes_, bytes_ + 1, bytes_ - 50_000))
    with FakeCuda() as device:
        engine = engine_on(device, budget=budget)
        engine.submit(requests([(0.0, 8, 30)]))
        found, blocks = [], []
        for time_s in (1.0, 3.0, 6.0):
            engine.run_until(time_s)
            found.append(device.limits[-1])
            blocks.append(engine.pool.layer_blocks)
        engine.close()
    others = found[0] - bytes_ - WORKSPACE_BYTES
    assert found == [b + WORKSPACE_BYTES + others for b in budget.budget_bytes]
    assert blocks[0] == blocks[1] > blocks[2]
    assert device.limits[-1] is None
    peaks = [row.in_use_bytes for row in engine.memory_rows()]
    assert max(peaks) <= max(found)
    assert min(peaks) > engine.elastic.bytes()


def test_a_plan_that_saves_memory_is_reached_from_weights_above_the_budget() -> None:
    """The copies of a lower precision need room next to the weights that they replace, and the budget leaves none."""
    spec, dense = tiny_spec(), dense_plan(tiny_spec())
    high = budget_for_kv_blocks(spec, dense, 60, 0, 4)
    with FakeCuda() as device:
        engine = engine_on(device, budget=Budget((0.0, 2.0), (high, weight_bytes(spec, dense) - 20_000)))
        engine.submit(requests([(0.0, 8, 30)]))
        engine.run_until(3.0)
        small = replace(dense, weight_bits=(4,) * spec.num_layers)
        engine.apply(small)
        engine.run_until(60.0)
        assert engine.out_of_memory == 0
        assert engine.elastic.bytes() == weight_bytes(spec, small)
        assert engine.drained
    assert (engine.records().status == Status.FINISHED).all()


@pytest.mark.parametrize("method", KV_METHODS)
def test_no_request_is_lost_when_the_device_refuses_memory_to_compress_a_prompt(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = replace(dense_plan(tiny_spec()), kv_compression=KVCompression(method=method, percent=60))
    rows, compress, watched = some_rows(5, 5, longest_output=10), PromptCompressor.compress, []

    def run(refuse: frozenset[int]) -> HwEngine:
        with FakeCuda(polls=2) as device:

            def counted(*arguments: Any) -> Any:
                first = device.allocations
                found = compress(*arguments)
                watched.extend(range(first, device.allocations))
                return found

            monkeypatch.setattr(PromptCompressor, "compress", counted)
            engine = engine_on(device, plan=plan, plans=[plan], kv_blocks=24, piece_bytes=1024)
            device.refuse = refuse
            engine.submit(requests(rows))
            engine.run_until(math.inf)
            engine.check()
            assert [len(engine.tokens(i)) for i in range(len(rows))] == [output for _, _, output in rows]
            assert all(row.allocated_bytes == row.predicted_bytes for row in engine.memory_rows())
            assert all(live.table.packed is None for live in engine.queues.waiting)
            engine.close()
        return engine

    assert run(frozenset()).out_of_memory == 0
    inside = list(watched)
    assert len(inside) > 20
    for number in random.Random(3).sample(inside, 4):
        engine = run(frozenset([number]))
        assert engine.out_of_memory == 1
        assert engine.records().preemptions.sum() > 0
