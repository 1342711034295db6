"""The replica with executors and weights that tests control: copies, calls from outside, memory that moves."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from sim.cost.kv_format import kv_block_tokens_at
from sim.cost.memory import budget_for_kv_blocks
from sim.cost.plan import KV_BITS, Plan, dense_plan, drop, with_mask
from sim.engine.block_table import BlockTable
from sim.engine.budget import Budget
from sim.engine.executor import Iteration, Ran
from sim.engine.pricing_executor import PricedWeights, PricingExecutor, SimulatedClock
from sim.engine.protocol import EngineConfig
from sim.engine.replica import Replica
from sim.engine.scheduler import Limits
from sim.engine.transition import ABSENT, LayerCopy, Resident, resident_of
from sim.errors import BudgetError, ConfigError
from sim.results.records import Status
from tests.sample import quick
from tests.sim.engine.kernel_cases import random_case, random_plan, with_kv_bits
from tests.sim.serving import TINY, linear_latency, requests

DENSE = dense_plan(TINY)


class CountedWeights:
    """Blocks as a device would hold them; a copy is complete after ``queries`` further calls of ``arrived``."""

    def __init__(self, plan: Plan, queries: int) -> None:
        first = resident_of(plan)
        self.bits = {"mha": list(first.mha_bits), "ffn": list(first.ffn_bits)}
        self.queries, self.left = queries, 0
        self.copy: LayerCopy | None = None
        self.abandoned: list[LayerCopy] = []

    def drop(self, resident: Resident) -> None:
        for kind, bits in (("mha", resident.mha_bits), ("ffn", resident.ffn_bits)):
            for layer, wanted in enumerate(bits):
                if wanted == ABSENT:
                    self.bits[kind][layer] = ABSENT

    def start(self, copy: LayerCopy, now_s: float, *, shared: bool = False) -> None:
        assert self.copy is None, "one layer at a time"
        self.copy, self.left = copy, self.queries

    def arrived(self, now_s: float) -> bool:
        assert self.copy is not None
        self.left -= 1
        return self.left < 0

    def wait(self, now_s: float, until_s: float) -> None:
        pass

    def join(self) -> None:
        assert self.copy is not None
        for kind, bits in (("mha", self.copy.mha_bits), ("ffn", self.copy.ffn_bits)):
            if bits != ABSENT:
                self.bits[kind][self.copy.layer] = bits
        self.copy = None

    def abandon(self) -> None:
        assert self.copy is not None
        self.abandoned.append(self.copy)
        self.copy = None


def wants(plan: Plan, resident: Resident, copy: LayerCopy) -> bool:
    """Return whether a plan lacks exactly those blocks of the copied layer that the copy brings."""
    needed = resident_of(plan)
    lacking = [
        needs[copy.layer] if needs[copy.layer] != has[copy.layer] else ABSENT
        for needs, has in ((needed.mha_bits, resident.mha_bits), (needed.ffn_bits, resident.ffn_bits))
    ]
    return lacking == [copy.mha_bits, copy.ffn_bits]


def replica(
    *,
    plan: Plan = DENSE,
    kv_blocks: int = 40,
    queries: int = 3,
    budget: Budget | None = None,
    executor: PricingExecutor | None = None,
    **config: object,
) -> tuple[Replica, CountedWeights]:
    weights = CountedWeights(plan, queries)
    made = Replica(
        model=TINY,
        config=EngineConfig(**{"limits": Limits(max_batch_tokens=64, max_running=8), "kv_block_tokens": 4, **config}),  # type: ignore[arg-type]
        plan=plan,
        budget=budget or budget_for_kv_blocks(TINY, DENSE, kv_blocks, 0, 4),
        executor=executor or PricingExecutor(linear_latency()),
        weights=weights,
        clock=SimulatedClock(),
    )
    return made, weights


@pytest.mark.parametrize("seed", quick(range(40), 20))
def test_a_later_plan_never_loses_a_copy_that_is_under_way_and_still_wanted(seed: int) -> None:
    rng, numbers = random.Random(seed), np.random.default_rng(seed)
    plans = [replace(random_plan(numbers), max_running=None, max_waiting=None) for _ in range(6)] + [DENSE]
    engine, weights = replica(plan=plans[0], kv_blocks=60, queries=rng.choice([1, 2, 5, 12]))
    engine.submit(requests(*[(float(i), 10, 12) for i in range(10)]))
    at_s, wanted = 0.0, plans[0]
    while not engine.drained:
        at_s += rng.choice([0.5, 1.0, 3.0])
        state = engine.run_until(at_s)
        before = weights.copy
        resident = engine._changes.resident
        assert (tuple(weights.bits["mha"]), tuple(weights.bits["ffn"])) == (resident.mha_bits, resident.ffn_bits)
        if rng.random() < 0.8:
            wanted = rng.choice(plans)
            engine.apply(wanted)
            weights.abandoned.clear()
            engine.run_until(at_s + 1.0)
            at_s += 1.0
            if before is not None and wants(wanted, resident, before):
                assert before not in weights.abandoned
    for step in range(100):
        state = engine.run_until(at_s + step)
    assert state.plan == wanted
    assert (engine.records().status == Status.FINISHED).all()


def test_a_plan_that_drops_half_of_a_layer_under_way_starts_the_other_half_again() -> None:
    """Its copy would bring bytes that no plan wants; only then may a copy be abandoned."""
    without = with_mask(DENSE, drop(TINY, mha=[1], ffn=[1]))
    engine, weights = replica(plan=without, queries=50)
    engine.submit(requests((0.0, 8, 40)))
    engine.run_until(2.0)
    engine.apply(DENSE)
    engine.run_until(3.5)
    assert weights.copy is not None
    engine.apply(with_mask(DENSE, drop(TINY, ffn=[1])))
    engine.run_until(4.5)
    assert [copy.layer for copy in weights.abandoned] == [1]
    assert weights.copy is not None
    assert (weights.copy.mha_bits, weights.copy.ffn_bits) == (16, ABSENT)


class Memory:
    """The memory behind a pool: what was written into each slot of each block, at which bits."""

    def __init__(self, block_tokens: int) -> None:
        self.size = block_tokens
        self._sizes = {bits: kv_block_tokens_at(TINY, block_tokens, bits) for bits in KV_BITS}
        self._blocks: dict[int, tuple[int, dict[int, object]]] = {}  # block -> bits, and place -> content

    def resize(self, blocks: int) -> None:
        self._blocks = {block: content for block, content in self._blocks.items() if block < blocks}

    def move(self, moved: dict[int, int]) -> None:
        read = {target: self._blocks.get(source, (16, {})) for source, target in moved.items()}
        self._blocks.update({target: (bits, dict(content)) for target, (bits, content) in read.items()})

    def copy(self, source: Sequence[int], target: Sequence[int], bits: int = 16, *, hidden: bool = False) -> None:
        values = [self.read(slot) for slot in source]
        for slot, value in zip(target, values, strict=True):
            self.write(slot, value, bits)

    def read(self, slot: int, bits: int = 16) -> object:
        block, place = divmod(slot, self._sizes[bits])
        written, content = self._blocks.get(block, (bits, {}))
        return content.get(place) if written == bits else None

    def write(self, slot: int, value: object, bits: int = 16) -> None:
        block, place = divmod(slot, self._sizes[bits])
        if block not in self._blocks or self._blocks[block][0] != bits:
            self._blocks[block] = bits, {}
        self._blocks[block][1][place] = value


class WritingExecutor(PricingExecutor):
    """Writes into memory what a device would write, and checks that it reads back what was written."""

    def __init__(self, memory: Memory, latency: object) -> None:
        super().__init__(latency)  # type: ignore[arg-type]
        self.memory, self.tokens_read = memory, 0

    def run(self, iteration: Iteration) -> Ran:
        for live, tokens in iteration.batch.scheduled:
            table = live.table
            for layer in live.mha:
                for token in range(live.computed_tokens, live.computed_tokens + tokens):
                    (slot,) = self._slots(table, layer, token, 1)
                    key = self._key(live.request.hash_ids, live.request_id, layer, token)
                    self.memory.write(slot, key, table.bits_of(layer))
                self._read(live.request.hash_ids, live.request_id, table, layer, live.computed_tokens + tokens)
        return super().run(iteration)

    def _key(self, hash_ids: tuple[int, ...], request_id: int, layer: int, token: int) -> object:
        """The KV of a token: that of its prefix block if its prompt has one there, otherwise its request's own."""
        block = token // (2 * self.memory.size)
        return (layer, token, hash_ids[block] if block < len(hash_ids) else (request_id,))

    def _slots(self, table: BlockTable, layer: int, first: int, count: int) -> list[int]:
        if table.formats is not None:
            return table.slots(layer, first, count)
        size, per = self.memory.size, table.prefix_layer_blocks
        blocks: list[int] = []
        own = iter(table.blocks[layer])
        for place in range((first + count - 1) // size + 1):
            prefix = table.prefix.get(place // per) if per else None
            blocks.append(prefix.blocks[layer][place % per] if prefix is not None else next(own))
        return [blocks[t // size] * size + t % size for t in range(first, first + count)]

    def _read(self, hash_ids: tuple[int, ...], request_id: int, table: BlockTable, layer: int, tokens: int) -> None:
        keep = table.keep_of(layer)
        for token in range(tokens):
            first, last = keep.first_tokens, keep.last_tokens
            if first is not None and last is not None and first <= token < tokens - last:
                continue
            (slot,) = self._slots(table, layer, token, 1)
            assert self.memory.read(slot, table.bits_of(layer)) == self._key(hash_ids, request_id, layer, token)
            self.tokens_read += 1


@pytest.mark.parametrize("first", quick(range(0, 60, 10), 3))
def test_what_a_request_reads_from_its_kv_blocks_is_what_was_written_for_it(first: int) -> None:
    """Through plan changes, pools that shrink and move, preemption, shared prefixes and windows of kept tokens."""
    read = 0
    for seed in range(first, first + 10):
        case = with_kv_bits(seed, random_case(seed, later=False))  # no memory copies its blocks to a host yet
        config = replace(case.config, hash_block_tokens=2 * case.config.kv_block_tokens)
        memory, clock = Memory(config.kv_block_tokens), SimulatedClock()
        executor = WritingExecutor(memory, case.latency)
        try:
            engine = Replica(
                model=TINY,
                config=config,
                plan=case.first_plan,
                budget=case.budget(),
                executor=executor,
                weights=PricedWeights(case.host_to_device_bytes_per_s, clock),
                clock=clock,
                storage=memory,
            )
        except BudgetError:
            continue
        # Prompts that are alike for their first ids, each of 2 KV blocks.
        engine.submit(
            [
                replace(one, hash_ids=replace(case, config=config).hash_ids(one.prompt_tokens, one.output_tokens))
                for one in case.submitted()[:15]
            ]
        )
        for time_s, plan in case.plans:
            engine.run_until(time_s)
            engine.check()
            engine.apply(plan)
        engine.run_until(math.inf)
        engine.check()
        read += executor.tokens_read
    assert read > 1000


def test_running_out_of_memory_preempts_the_newer_half_and_runs_fewer_until_one_has_ended() -> None:
    class Starved(PricingExecutor):
        def run(self, iteration: Iteration) -> Ran | None:  # type: ignore[override]
            return super().run(iteration) if len(iteration.batch.scheduled) <= 2 else None

    engine, _ = replica(executor=Starved(linear_latency()))
    engine.submit(requests(*[(0.0, 8, 3)] * 6))
    engine.run_until(math.inf)
    records = engine.records()
    assert (records.status == Status.FINISHED).all()
    assert records.preemptions[0] == 0 < records.preemptions[5]
    assert engine.out_of_memory > 0


def test_one_request_that_alone_runs_out_of_memory_is_an_error_with_advice() -> None:
    class Hopeless(PricingExecutor):
        def run(self, iteration: Iteration) -> Ran | None:  # type: ignore[override]
            return None

    engine, _ = replica(executor=Hopeless(linear_latency()))
    engine.submit(requests((0.0, 8, 3), (0.0, 8, 3)))
    with pytest.raises(BudgetError, match="raise workspace_bytes"):
        engine.run_until(math.inf)


def test_a_canceled_request_ends_at_once_and_frees_its_kv_whether_it_runs_waits_or_is_yet_to_arrive() -> None:
    engine, _ = replica(limits=Limits(max_batch_tokens=64, max_running=1))
    engine.submit(requests((0.0, 8, 20), (0.0, 8, 20), (9.0, 8, 20), (9.5, 8, 2)))
    engine.run_until(2.5)
    assert engine.pool.used_layer_blocks > 0
    for request_id in range(3):  # runs, waits, is yet to arrive
        engine.cancel(request_id)
    assert engine.pool.used_layer_blocks == 0
    engine.check()
    engine.run_until(math.inf)
    records = engine.records()
    assert records.status.tolist() == [Status.REJECTED, Status.REJECTED, Status.FINISHED]
    assert records.produced_tokens.tolist() == [2, 0, 2]


def test_a_request_that_is_canceled_in_a_long_prefill_computes_no_more() -> None:
    engine, _ = replica(limits=Limits(max_batch_tokens=4, max_running=2))
    engine.submit(requests((0.0, 40, 5), (0.0, 8, 3)))
    engine.run_until(1.5)
    engine.cancel(0)
    engine.run_until(math.inf)
    assert engine.iterations().prefill_tokens.sum() == 8 + 8  # two iterations of the first, then the second alone
    assert engine.records().produced_tokens.tolist() == [0, 3]


def test_a_preempted_request_that_is_canceled_leaves_no_kv_to_find() -> None:
    engine, _ = replica(kv_blocks=8, reuse_preempted_kv=True)
    engine.submit(requests((0.0, 12, 20), (0.0, 12, 20)))
    while not engine.run_until(engine._time_s + 1.0).preemptions:
        pass
    (preempted,) = engine.queues.waiting
    engine.cancel(preempted.request_id)
    engine.forget_ended()
    engine.run_until(math.inf)  # takes the freed blocks again, whose owner is gone
    engine.check()
    assert engine.records().produced_tokens.tolist() == [20]


def test_what_has_ended_can_be_forgotten_and_the_counters_stay() -> None:
    engine, _ = replica()
    engine.submit(requests((0.0, 8, 3), (0.0, 8, 30)))
    before = engine.run_until(6.5)
    engine.forget_ended()
    assert engine.request_ids == [1]
    assert len(engine.iterations().start_s) == 0
    assert engine.run_until(6.5) == before
    state = engine.run_until(math.inf)
    assert (state.arrived, state.finished, state.produced_tokens, state.iterations) == (2, 2, 33, 30)


def test_an_interrupt_waits_for_the_end_of_an_iteration() -> None:
    engine, _ = replica()
    engine.submit(requests((0.0, 8, 20)))
    engine.run_until(2.5)
    engine.interrupt()
    with pytest.raises(KeyboardInterrupt):
        engine.run_until(math.inf)
    assert engine.records().produced_tokens.tolist() == [3]
    engine.run_until(math.inf)
    assert engine.records().status.tolist() == [Status.FINISHED]


def test_an_id_that_was_submitted_before_is_refused() -> None:
    engine, _ = replica()
    engine.submit(requests((0.0, 8, 3)))
    with pytest.raises(ConfigError, match="submitted before"):
        engine.submit(requests((1.0, 8, 3)))
    engine.run_until(math.inf)
    assert len(engine.records()) == 1


def test_a_request_whose_prompt_was_computed_elsewhere_decodes_where_room_was_held_for_it() -> None:
    first, _ = replica()
    first._holds = lambda request_id: True
    second, _ = replica(kv_blocks=6)
    first.submit(requests((0.0, 12, 1)))
    first.run_until(math.inf)
    assert first.pool.used_layer_blocks == 3 * TINY.num_layers
    live = first.queues.all[0]
    assert second.reserve(0, 24) is not None
    assert second.reserve(1, 12) is None, "all 6 KV blocks are held"
    second.release(0)
    assert second.reserve(0, 12) is not None
    second.join(replace(live, request=replace(live.request, output_tokens=4), output_limit=4, finish_s=math.nan))
    first.release(0)
    second.run_until(math.inf)
    assert second.records().produced_tokens.tolist() == [4]
    assert first.pool.used_layer_blocks == second.pool.used_layer_blocks == 0
