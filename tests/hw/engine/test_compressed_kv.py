"""Compressed KV of prompts on the real engine, against plain attention over what each method stores."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import pytest

from hw.elastic.compressed_kv import PromptCompressor
from hw.elastic.forward import forward
from hw.elastic.kv import RequestKV
from hw.elastic.kv_compression.lorc import key_and_value_directions
from hw.elastic.kv_compression.packing import OBSERVED
from hw.elastic.kv_storage import ArenaStorage
from hw.elastic.model import ElasticModel
from hw.elastic.paged_attention import Packed, PagedBatch
from hw.elastic.quantized_kv import stored as rounded
from hw.engine.hw_engine import HwEngine, arena_of
from hw.engine.torch_executor import TorchExecutor
from hw.score.kv_compression.continuation import continuation, read_prompt
from sim.cost.kv_format import kv_formats, saved_tokens
from sim.cost.memory import budget_for_kv_blocks
from sim.cost.plan import KV_METHODS, KeepMask, KVCompression, Plan, dense_plan, drop, with_mask
from sim.engine.block_table import BlockTable
from sim.engine.executor import Iteration
from sim.engine.kv_pool import KVPool
from sim.errors import PlanError
from sim.policies.schedule import Schedule
from sim.replay.loop import replay
from tests.hw.elastic.kv_compression.plain import plain_stored
from tests.hw.elastic.test_model import some_tokens
from tests.hw.engine.runs import serve, some_rows, trace_of
from tests.hw.engine.test_same_schedule import assert_same_replay, sim_engine
from tests.hw.serving import LAYERS, engine_config, hw_engine, requests, tiny, tiny_spec, torch
from tests.sample import quick

FAMILIES = ("llama", "llama without gqa", "opt", "sliding", "phi3", "smollm3", "gemma3", "qwen3")
NORMED = ("gemma3", "qwen3")  # they normalize keys
SHORT_SIGHTED = ("sliding", "phi3")  # every layer looks back 9 tokens, which token choosers and ThinK keep as they are
DENSE = dense_plan(tiny_spec())
PROMPT, OUTPUT = 90, 8


def way_of(method: str, percent: int = 70) -> KVCompression:
    return KVCompression(method=method, percent=percent)


def compressing(method: str, percent: int = 70, **more: Any) -> Plan:
    return replace(DENSE, kv_compression=way_of(method, percent), **more)


@cache
def plain_model(family: str) -> tuple[ElasticModel, Any]:
    """Return a dense model, and the directions of its weights."""
    elastic = ElasticModel(tiny(family), name="tiny")
    directions = None if family in NORMED else key_and_value_directions(elastic.layers, elastic.spec)
    return elastic, directions


def plain_logits(
    family: str, tokens: Sequence[int], prompt: int, plan: Plan | None, dropped: Sequence[int] = ()
) -> Any:
    """Return the logits of the last prompt token and of all after it, [1 + c, vocabulary], by plain attention.

    The KV of the first ``prompt`` tokens is what the plan's method stores; None: all of it.
    """
    elastic, directions = plain_model(family)
    window = torch.tensor(tokens)
    read = read_prompt(elastic, window[:prompt], min(64, prompt))
    stored: list[Any] = []
    for number, layer in enumerate(read.layers):
        pair = None if directions is None else (directions[0][number], directions[1][number])
        one = plain_stored(None if plan is None else plan.kv_compression, layer, pair)
        if plan is not None and plan.kv_bits[number] < 16:
            keys, values = rounded(one.keys, one.values, plan.kv_bits[number])
            one = replace(one, keys=keys, values=values)
        stored.append(None if number in dropped else one)
    return elastic.head(continuation(elastic, read, window, stored))[0]


class Drive:
    """Requests whose prompts are computed in chunks and compressed, and tokens that follow them."""

    def __init__(self, family: str, plans: Sequence[Plan | None], prompts: Sequence[int]) -> None:
        """Begin; ``plans``: of each request when its prefill ends."""
        self.elastic = ElasticModel(tiny(family), name="tiny")
        self.plans = [plan or dense_plan(self.elastic.spec) for plan in plans]
        self.elastic.find_directions(self.plans)
        arena = self.arena = arena_of(self.elastic, 800, block_tokens=4)
        self.storage = ArenaStorage(arena, compressor=PromptCompressor(arena, self.elastic))
        self.pool = KVPool(800, self.storage)
        self.prompts = prompts
        self.tokens = [some_tokens(prompt + OUTPUT, seed=i) for i, prompt in enumerate(prompts)]
        self.tables = [BlockTable(mha=frozenset(range(LAYERS)), block_tokens=4) for _ in prompts]
        self.done = [0] * len(prompts)
        self.logits: list[list[Any]] = [[] for _ in prompts]
        self.uniform = True

    def run(self, decodes: Sequence[int], chunk: tuple[int, int] | None = None) -> None:
        """Run one iteration: a token of some requests, and a chunk of ``(request, tokens)``."""
        packed, wanted = [], []
        for one, count in [*((request, 1) for request in decodes), *([chunk] if chunk else [])]:
            self.tables[one].hold(self.pool, self.done[one] + count)
            way, observed = self.plans[one].kv_compression, None
            if way is not None and way.method in OBSERVED and one not in decodes:
                observed = self.prompts[one] - OBSERVED[way.method]
            start, self.done[one] = self.done[one], self.done[one] + count
            packed.append(Packed(self.tables[one], self.tokens[one][start : self.done[one]], start, observed))
            wanted.append(sum(len(each.tokens) for each in packed) - 1)
        split, keep = len(decodes), dense_plan(self.elastic.spec).decode
        batch = PagedBatch(self.arena, packed[:split], packed[split:], self.elastic.windows, wanted)
        found = forward(self.elastic, batch, prefill=keep, decode=keep)
        self.uniform = batch.uniform
        for one, logits in zip([*decodes, *([chunk[0]] if chunk else [])], found, strict=True):
            if self.done[one] >= self.prompts[one]:
                self.logits[one].append(logits)

    def end_prefill(self, one: int) -> None:
        """End the prefill of a request as ``sim.engine.kv_manager`` does."""
        table, plan, done = self.tables[one], self.plans[one], self.done[one]
        assert done == self.prompts[one]
        formats, saved = kv_formats(self.elastic.spec, plan, 4), saved_tokens(plan, done)
        if saved:
            assert formats is not None
            assert plan.kv_compression is not None
            table.packed = self.storage.compress(table, done, plan.kv_compression, formats)
        table.formats, table.saved_tokens = formats, saved
        table.hold(self.pool, done)


@pytest.mark.parametrize("percent", [55, 90])
@pytest.mark.parametrize(
    ("family", "method"),
    [(family, method) for family in FAMILIES for method in KV_METHODS if method != "lorc" or family not in NORMED],
)
def test_logits_are_those_of_plain_attention_to_what_the_method_stores(family: str, method: str, percent: int) -> None:
    spec = ElasticModel(tiny(family), name="tiny").spec
    plan = replace(dense_plan(spec), kv_compression=way_of(method, percent))
    drive = Drive(family, [plan, None], [PROMPT, 21])
    for count in (40, 30, 20):  # the observed tokens lie in two chunks and in three
        drive.run([], (0, count))
    drive.end_prefill(0)
    drive.run([0], (1, 21))  # next to a prompt that keeps all of its KV
    drive.end_prefill(1)
    for _ in range(OUTPUT - 1):
        drive.run([0, 1])
    for one, prompt in enumerate(drive.prompts):
        tokens = drive.tokens[one][: drive.done[one]]
        expected = plain_logits(family, tokens, prompt, plan if one == 0 else None)
        torch.testing.assert_close(torch.stack(drive.logits[one]), expected, rtol=1e-4, atol=1e-4)
    if method == "lorc" or family not in SHORT_SIGHTED:
        whole = plain_logits(family, drive.tokens[0], PROMPT, None)
        assert (torch.stack(drive.logits[0]) - whole).abs().max() > 1e-3, "compression changes nothing"
    slots = math.ceil(PROMPT * percent / 100)
    assert drive.pool.used_layer_blocks == LAYERS * (math.ceil((slots + OUTPUT) / 4) + math.ceil((21 + OUTPUT - 1) / 4))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("method", ["ada_kv", "refree_kv"])
def test_chosen_tokens_may_be_stored_at_fewer_bits(method: str, bits: int) -> None:
    plan = compressing(method, 60, kv_bits=(bits, 16, bits, 8))
    drive = Drive("llama", [plan], [PROMPT])
    drive.run([], (0, PROMPT))
    drive.end_prefill(0)
    drive.run([0])
    expected = plain_logits("llama", drive.tokens[0][: PROMPT + 1], PROMPT, plan)
    exact = plain_logits("llama", drive.tokens[0][: PROMPT + 1], PROMPT, compressing(method, 60))
    # The new token's KV is at fewer bits too, which the plain form does not have.
    found, off = drive.logits[0][1], (expected[1] - exact[1]).abs().max()
    assert (found - expected[1]).abs().max() < 0.5 * off
    spec = drive.elastic.spec
    for layer, form in enumerate(kv_formats(spec, plan, 4) or ()):
        assert len(drive.tables[0].blocks[layer]) == form.blocks(54 + 1)


def test_one_batch_may_hold_prompts_of_every_form_and_is_not_recorded() -> None:
    plans: list[Plan | None] = [compressing(method, 60) for method in KV_METHODS]
    plans += [None, compressing("ada_kv", 80, kv_bits=(8,) * LAYERS), replace(DENSE, kv_bits=(4,) * LAYERS)]
    prompts = [50, 41, 66, 33, 20, 47, 38]
    drive = Drive("llama", plans, prompts)
    for one, prompt in enumerate(prompts):
        drive.run(list(range(one)), (one, prompt))
        assert drive.uniform == (one == 0)
        drive.end_prefill(one)
    drive.run(list(range(len(prompts))))
    for one, plan in enumerate(plans[:5]):
        tokens = drive.tokens[one][: drive.done[one]]
        expected = plain_logits("llama", tokens, prompts[one], plan)
        torch.testing.assert_close(torch.stack(drive.logits[one]), expected, rtol=1e-4, atol=1e-4)


# --- Engines ---------------------------------------------------------------------------------------------------------


class AuditedExecutor(TorchExecutor):
    """An executor that compares tokens of decodes with plain attention to what the method stores of their prompts.

    The prompt of a preempted request has the tokens that it had produced by then.
    """

    family, every = "llama", 5
    audited = 0
    compressed_audited = 0

    def forward(self, iteration: Iteration) -> dict[int, int]:
        self._ended: dict[int, tuple[int, Plan]] = getattr(self, "_ended", {})
        assert all(live.table.observed is None for live in iteration.decodes), "queries are not freed"
        chosen = super().forward(iteration)
        for live, tokens in iteration.prefills:
            if live.computed_tokens + tokens == live.target_tokens:
                self._ended[live.request_id] = live.target_tokens, iteration.plan
        for live in iteration.decodes:
            prompt, plan = self._ended[live.request_id]
            if (live.produced_tokens + live.request_id) % self.every:
                continue
            seen = self.tokens_of(live)[: live.computed_tokens + 1]
            logits = plain_logits(self.family, seen, prompt, plan)[-1]
            assert logits[chosen[live.request_id]] >= logits.max() - 1e-3
            self.audited += 1
            self.compressed_audited += isinstance(live.table.packed, dict)
        return chosen


class Audited(HwEngine):
    executor_type = AuditedExecutor


def some_plans(seed: int, count: int, *, methods: Sequence[str] = KV_METHODS, bits: bool = False) -> Schedule:
    rng = random.Random(seed)
    plans = [DENSE]
    for _ in range(count - 1):
        method = rng.choice([*methods, None])
        if method is None:
            plans.append(DENSE)
            continue
        kv_bits = (rng.choice((16, 8)),) * LAYERS if bits and method in ("ada_kv", "refree_kv") else ()
        plans.append(compressing(method, rng.choice((52, 60, 75, 95)), kv_bits=kv_bits))
    return Schedule(tuple(9.0 * i for i in range(count)), tuple(plans))


@pytest.mark.parametrize("scheduler", ["chunked", "prefill_first"])
@pytest.mark.parametrize("method", KV_METHODS)
def test_tokens_are_those_of_plain_attention_also_after_preemptions(method: str, scheduler: str) -> None:
    plan, config = compressing(method, 60), engine_config(scheduler, max_batch_tokens=16)
    engine = hw_engine(plan=plan, config=config, kv_blocks=18, kind=Audited)
    serve(engine, some_rows(4, 10, longest_output=30))
    executor = engine._torch
    assert isinstance(executor, AuditedExecutor)
    assert executor.compressed_audited > 5
    assert engine.records().preemptions.sum() > 0
    assert all(row.predicted_bytes == row.allocated_bytes for row in engine.memory_rows())


@pytest.mark.parametrize("seed", range(3))
def test_requests_keep_the_form_of_the_plan_under_which_their_prefill_ended(seed: int) -> None:
    """Plans change in the middle of prompts too: then the tokens before the change are not observed."""
    policy = some_plans(seed, 12, methods=("refree_kv", "lorc"))
    engine = hw_engine(kv_blocks=40, kind=Audited, plans=list(policy.plans))
    replay(trace_of(some_rows(seed, 14, longest_output=20)), engine, policy, tick_s=0.7)
    engine.check()
    executor = engine._torch
    assert isinstance(executor, AuditedExecutor)
    assert 0 < executor.compressed_audited < executor.audited
    assert engine.pool.used_layer_blocks == 0


@pytest.mark.parametrize("preemption", ["recompute", "swap"])
@pytest.mark.parametrize("seed", quick(range(6), 3))
def test_both_engines_serve_alike_while_kv_is_compressed(seed: int, preemption: str) -> None:
    """Law 8: who is admitted when, preempted when and finished when; memory is as predicted throughout."""
    host_kv_blocks = 100 if preemption == "swap" else 0
    config = engine_config(
        ("chunked", "prefill_first")[seed % 2],
        preemption=preemption,
        host_kv_blocks=host_kv_blocks,
        reuse_preempted_kv=preemption == "recompute" and seed > 2,
    )
    spec, policy = tiny_spec(), some_plans(seed, 12, bits=True)
    real = hw_engine(config=config, kv_blocks=20, plans=list(policy.plans))
    budget = budget_for_kv_blocks(spec, DENSE, 20, 0, 4)
    engines = real, sim_engine(config, budget, link_bytes_per_s=1e15)
    for engine in engines:
        replay(trace_of(some_rows(seed, 14, longest_output=40)), engine, policy, tick_s=0.7)
    assert_same_replay(*engines)
    assert real.records().preemptions.sum() > 0
    assert all(row.predicted_bytes == row.allocated_bytes for row in real.memory_rows())
    real.check()


@pytest.mark.parametrize("method", KV_METHODS)
def test_a_request_holds_the_slots_of_its_compressed_prompt_and_of_later_tokens(method: str) -> None:
    for plan, saved in ((DENSE, 0), (compressing(method, 55), 18)):
        engine = hw_engine(plan=plan)
        engine.submit(requests([(0.0, 40, 30)] * 4))
        engine.run_until(20.0)
        assert len(engine.queues.running) == 4
        for live in engine.queues.running:
            assert live.decoding
            slots = live.computed_tokens + 1 - saved  # with the token of the iteration under way
            assert {layer: len(ids) for layer, ids in live.table.blocks.items()} == dict.fromkeys(
                range(LAYERS), math.ceil(slots / 4)
            )


@pytest.mark.parametrize(
    "plan",
    [
        replace(DENSE, weight_bits=(8,) * LAYERS),
        replace(DENSE, streamed=(True,) * LAYERS),
        with_mask(DENSE, drop(tiny_spec(), mha=[1], ffn=[2])),
        replace(DENSE, decode=KeepMask(mha=(True, False, True, True), ffn=DENSE.decode.ffn)),
        replace(DENSE, kv_only=(False, True, True, False)),
    ],
    ids=["W8", "streamed", "dropped", "dropped in decode", "only write KV"],
)
@pytest.mark.parametrize("method", KV_METHODS)
def test_compression_goes_with_the_other_fields_of_a_plan(plan: Plan, method: str) -> None:
    rows = some_rows(5, 8)
    engine = hw_engine(plan=replace(plan, kv_compression=way_of(method, 60)))
    found = serve(engine, rows)
    assert [len(tokens) for tokens in found] == [output for _, _, output in rows]
    assert all(row.predicted_bytes == row.allocated_bytes for row in engine.memory_rows())


def test_an_mha_block_that_a_later_plan_drops_takes_its_compressed_kv_along() -> None:
    plan = compressing("ada_kv", 60)
    engine = hw_engine(plan=plan)
    engine.submit(requests([(0.0, 40, 60)]))
    engine.run_until(5.0)
    (live,) = engine.queues.running
    before = live.table.held_layer_blocks
    engine.apply(with_mask(plan, drop(tiny_spec(), mha=[0, 2])))
    engine.run_until(8.0)
    engine.check()
    assert set(live.table.blocks) == {1, 3}
    assert live.table.held_layer_blocks <= before // 2 + 2
    engine.run_until(math.inf)
    assert len(engine.tokens(0)) == 60


def test_directions_are_found_for_listed_plans_and_no_others() -> None:
    small, large = compressing("lorc", 40), compressing("lorc", 80)
    engine = hw_engine(plans=[small])
    directions = engine.elastic.directions
    assert directions is not None
    numbers = tiny_spec().num_kv_heads * tiny_spec().head_dim
    assert [each.count for listed in directions for each in listed] == [numbers * 40 // 100] * 2 * LAYERS
    engine.apply(small)
    with pytest.raises(PlanError, match=r"has found 6 directions.*and 80 percent take 12.*policy.kv_percent=80"):
        engine.apply(large)
    assert hw_engine().elastic.directions is None
    plan = replace(dense_plan(ElasticModel(tiny("qwen3"), name="tiny").spec), kv_compression=way_of("lorc"))
    with pytest.raises(PlanError, match="normalizes its keys"):
        hw_engine(family="qwen3", plan=plan)


def test_the_pass_by_modules_refuses_compressed_kv_that_it_does_not_store() -> None:
    elastic = ElasticModel(tiny(), name="tiny")
    elastic.apply(compressing("ada_kv"))
    with pytest.raises(PlanError, match=r"the plan compresses KV by ada_kv; .* Leave kv_compression out here"):
        elastic.forward([[1, 2, 3]], [RequestKV()])
    assert elastic.forward([[1, 2, 3]]).shape == (1, elastic.spec.vocab_size)
