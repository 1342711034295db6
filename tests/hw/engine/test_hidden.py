"""Hidden states in place of keys and values on the real engine: what it answers is what the model answers without."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from hw.elastic.forward import forward
from hw.elastic.kv_storage import ArenaStorage
from hw.elastic.model import ElasticModel
from hw.elastic.paged_attention import Packed, PagedBatch
from hw.engine.hw_engine import arena_of
from sim.cost.kv_format import kv_formats
from sim.cost.memory import budget_for_kv_blocks
from sim.cost.plan import KeepMask, Plan, dense_plan, drop, with_mask
from sim.engine.block_table import BlockTable
from sim.engine.kv_pool import KVPool
from sim.errors import PlanError
from sim.policies.fixed import Fixed
from sim.replay.loop import replay
from tests.hw.elastic.test_model import some_tokens
from tests.hw.engine.runs import plain_tokens, serve, some_rows, trace_of
from tests.hw.engine.test_same_schedule import assert_same_replay, sim_engine
from tests.hw.serving import LAYERS, engine_config, hw_engine, tiny, torch
from tests.sample import quick

FAMILIES = ("llama without gqa", "opt", "phi3 without gqa")
SPEC = ElasticModel(tiny(FAMILIES[0]), name="tiny").spec
DENSE = dense_plan(SPEC)
HIDDEN = replace(DENSE, kv_hidden=True)
EIGHT = (8,) * LAYERS


def logits_of(family: str, plan: Plan) -> list[Any]:
    """Return the logits of two requests: chunks of their prompts next to decodes, then decodes alone."""
    elastic = ElasticModel(tiny(family), name="tiny")
    arena = arena_of(elastic, 400, block_tokens=4)
    storage = ArenaStorage(arena)
    pool, keep = KVPool(400, storage), plan.decode
    tokens = [some_tokens(40, seed=1), some_tokens(40, seed=2)]
    tables = [BlockTable(mha=frozenset(range(LAYERS)), block_tokens=4) for _ in tokens]
    done, found = [0, 0], []

    def run(decodes: list[int], chunk: tuple[int, int] | None = None) -> None:
        packed = []
        for one, count in [*((request, 1) for request in decodes), *([chunk] if chunk else [])]:
            tables[one].hold(pool, done[one] + count)
            packed.append(Packed(tables[one], tokens[one][done[one] : done[one] + count], done[one]))
            done[one] += count
        wanted = [*range(len(decodes)), *([len(decodes) + chunk[1] - 1] if chunk else [])]
        split = len(decodes)
        batch = PagedBatch(
            arena, packed[:split], packed[split:], elastic.windows, wanted, hidden=plan.kv_hidden, kv_only=plan.kv_only
        )
        found.extend(forward(elastic, batch, prefill=plan.prefill, decode=keep))

    def end_prefill(one: int) -> None:
        formats = kv_formats(elastic.spec, plan, 4)
        if formats is not None:
            for layer, form in enumerate(formats):
                source, target = tables[one].end_prefill(layer, done[one], form)
                storage.copy(source, target, form.bits, hidden=form.hidden)
            tables[one].formats = formats
        tables[one].hold(pool, done[one])

    run([], (0, 9))
    run([], (0, 8))
    end_prefill(0)
    run([0], (1, 5))
    run([0], (1, 12))
    end_prefill(1)
    for _ in range(6):
        run([0, 1])
    assert pool.used_layer_blocks == sum(LAYERS * -(-count // (8 if plan.kv_hidden else 4)) for count in done)
    return found


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kv_only", [(), (False, True) * (LAYERS // 2)], ids=["all layers", "some only write"])
def test_logits_are_those_with_keys_and_values(family: str, kv_only: tuple[bool, ...]) -> None:
    expected, found = (logits_of(family, replace(plan, kv_only=kv_only)) for plan in (DENSE, HIDDEN))
    assert len(found) == len(expected) == 18
    for ours, theirs in zip(found, expected, strict=True):  # products of other shapes round in another order
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("family", quick(FAMILIES, 2))
@pytest.mark.parametrize("scheduler", ["chunked", "prefill_first"])
@pytest.mark.parametrize("kv_blocks", [18, 200])
def test_tokens_are_those_of_the_plain_model_also_after_preemptions(
    family: str, scheduler: str, kv_blocks: int
) -> None:
    rows = some_rows(4, 14, longest_output=30)
    config = engine_config(scheduler, max_batch_tokens=16, reuse_preempted_kv=True)
    engine = hw_engine(family=family, plan=HIDDEN, config=config, kv_blocks=kv_blocks)
    assert serve(engine, rows) == plain_tokens(family, rows)
    assert (engine.records().preemptions.sum() > 0) == (kv_blocks == 18)


@pytest.mark.parametrize(
    "plan",
    [
        replace(DENSE, weight_bits=EIGHT),
        replace(DENSE, weight_bits=(4,) * LAYERS),
        replace(DENSE, compute_bits=EIGHT),
        replace(DENSE, streamed=(True,) * LAYERS),
        with_mask(DENSE, drop(SPEC, mha=[1], ffn=[2])),
        replace(DENSE, decode=KeepMask(mha=(True, False, True, True), ffn=DENSE.decode.ffn)),
    ],
    ids=["W8", "W4", "half of the bits", "streamed", "dropped", "dropped in decode"],
)
def test_tokens_are_those_of_the_same_plan_with_keys_and_values(plan: Plan) -> None:
    rows = some_rows(5, 8)
    family = "llama without gqa"
    assert serve(hw_engine(family=family, plan=replace(plan, kv_hidden=True)), rows) == serve(
        hw_engine(family=family, plan=plan), rows
    )


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("preemption", ["recompute", "swap"])
def test_both_engines_serve_alike(seed: int, preemption: str) -> None:
    """Law 8: who is admitted when, preempted when and finished when."""
    host_kv_blocks = 100 if preemption == "swap" else 0
    config = engine_config(preemption=preemption, host_kv_blocks=host_kv_blocks)
    budget = budget_for_kv_blocks(SPEC, DENSE, 20, 0, 4)
    rows = some_rows(seed, 14, longest_output=40)
    engines = (
        hw_engine(family="llama without gqa", config=config, plan=HIDDEN, kv_blocks=20),
        sim_engine(config, budget, link_bytes_per_s=1e15, model=SPEC, plan=HIDDEN),
    )
    for engine in engines:
        replay(trace_of(rows), engine, Fixed(HIDDEN))
    assert_same_replay(*engines)
    assert engines[0].records().preemptions.sum() > 0


def test_an_engine_stays_with_what_it_stores() -> None:
    for first, later, message in (
        (HIDDEN, DENSE, "starts with kv_hidden=true, and cannot serve with kv_hidden=false later"),
        (DENSE, HIDDEN, "starts with kv_hidden=false, and cannot serve with kv_hidden=true later"),
    ):
        engine = hw_engine(family="llama without gqa", plan=first)
        with pytest.raises(PlanError, match=message):
            engine.apply(later)
        engine.apply(replace(first, max_running=3))
        with pytest.raises(PlanError, match=message):  # at the start, where it is known what may run
            hw_engine(family="llama without gqa", plan=first, plans=[first, later])


def test_the_pass_by_modules_refuses_what_it_does_not_store() -> None:
    from hw.elastic.kv import RequestKV

    elastic = ElasticModel(tiny("opt"), name="tiny")
    elastic.apply(replace(dense_plan(elastic.spec), kv_hidden=True))
    with pytest.raises(PlanError, match="keeps hidden states in place of keys and values"):
        elastic.forward([[1, 2, 3]], [RequestKV()])
    assert elastic.forward([[1, 2, 3]]).shape == (1, elastic.spec.vocab_size)
