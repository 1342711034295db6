"""Plans that change while requests run: the tokens stay those of plain models, and no copy under way is lost."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import product
from unittest.mock import Mock

import pytest

from hw.elastic.kv import RequestKV
from hw.elastic.model import ElasticModel
from hw.engine.hw_engine import HwEngine
from hw.engine.prompts import RandomPrompts
from sim.cost.memory import budget_for_kv_blocks, weight_bytes
from sim.cost.plan import KVKeep, dense_plan, drop, with_mask
from sim.engine.budget import Budget
from sim.replay.loop import replay
from sim.results.records import Status
from tests.hw.engine.runs import (
    RESTORES,
    Audited,
    HoldingCopier,
    assert_blocks_are_as_counted,
    plan_schedule,
    serve,
    some_rows,
    trace_of,
)
from tests.hw.serving import LAYERS, VOCABULARY, engine_config, hw_engine, requests, tiny, tiny_spec
from tests.hw.tiny_models import FAMILIES, SHORT_TOKENS
from tests.sample import quick

UNLIKE = ("sliding", "qwen2", "gemma3", "opt")
"""Families that differ in windows, biases, norms and positions from llama and from each other."""
POLLS = (1, 3, 7, 20)
"""How often a copy is asked for before it is complete."""


@pytest.mark.parametrize(
    ("family", "restore", "kv_blocks", "host_kv_blocks", "streams", "writes"),
    quick(
        [
            *(("llama", restore, blocks, 0, False, False) for restore in RESTORES for blocks in (10, 200)),
            *(("llama", restore, 10, 100, False, False) for restore in RESTORES),
            *(("llama", restore, blocks, 0, True, False) for restore in RESTORES for blocks in (10, 200)),
            *((family, "new_requests", 200, 0, False, False) for family in UNLIKE),
            *(("llama", restore, blocks, 0, False, True) for restore in RESTORES for blocks in (10, 200)),
            *((family, "new_requests", 200, 0, False, True) for family in UNLIKE),
            *((family, "new_requests", 200, 0, True, False) for family in FAMILIES if family not in ("llama", *UNLIKE)),
            *((family, "new_requests", 200, 0, True, True) for family in FAMILIES if family not in ("llama", *UNLIKE)),
        ],
        14 + 2 * len(UNLIKE),
    ),
)
def test_tokens_stay_those_of_a_plain_model_gated_alike_through_changes_of_the_plan(
    family: str, restore: str, kv_blocks: int, host_kv_blocks: int, streams: bool, writes: bool
) -> None:
    policy = plan_schedule(5, 12, period_s=1.0, streams=streams, writes=writes)
    rows = some_rows(3, 16, longest_prompt=24, longest_output=14)
    Audited.plain = tiny(family)
    preemption = "swap" if host_kv_blocks else "recompute"
    swapping = {"preemption": preemption, "host_kv_blocks": host_kv_blocks}
    config = engine_config(restore=restore, max_context_tokens=SHORT_TOKENS, **swapping)
    engine = hw_engine(family=family, kind=Audited, kv_blocks=kv_blocks, config=config)
    replay(trace_of(rows), engine, policy, tick_s=0.9)
    assert engine._torch.audited >= sum(output // 2 for _, _, output in rows)
    assert len(engine.transitions()) >= 5
    assert engine.records().preemptions.sum() > 0 or (restore, kv_blocks) != ("recompute", 10)


@pytest.mark.parametrize("kv_bits", [(16, 16, 16, 16), (8, 4, 8, 16)])
@pytest.mark.parametrize("family", FAMILIES)
def test_precision_and_kept_kv_change_tokens_as_the_plain_cache_of_the_model_does(
    family: str, kv_bits: tuple[int, ...]
) -> None:
    spec = tiny_spec()
    plan = replace(
        dense_plan(spec),
        weight_bits=(8, 16, 4, 4),
        kv_keep=(KVKeep(first_tokens=2, last_tokens=6), KVKeep(), KVKeep(first_tokens=0, last_tokens=3), KVKeep()),
        kv_bits=kv_bits,
        prefill=drop(spec, ffn=[3]),
        decode=drop(spec, mha=[2], ffn=[1, 3]),
    )
    rows = some_rows(4, 8, longest_output=20)
    config = engine_config(max_context_tokens=SHORT_TOKENS)
    tokens = serve(hw_engine(family=family, plan=plan, config=config), rows)
    elastic = ElasticModel(tiny(family), name="tiny")
    elastic.apply(plan)
    for i, (_, prompt, output) in enumerate(rows):
        kv = RequestKV()
        logits = elastic.forward([RandomPrompts(VOCABULARY)(i, prompt)], [kv], "prefill")
        elastic.end_prefill(kv)
        for made, token in enumerate(tokens[i], start=1):
            assert logits[0, token] >= logits[0].max() - 1e-3
            if made < output:
                logits = elastic.forward([[token]], [kv], "decode")


@pytest.mark.parametrize("family", ["llama", "sliding"])
@pytest.mark.parametrize("seed", range(3))
def test_quantized_kv_stays_what_it_is_while_the_pool_shrinks_and_blocks_move(
    seed: int, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng, elastic = random.Random(seed), ElasticModel(tiny(family), name="tiny")
    spec, keeps = elastic.spec, (KVKeep(), KVKeep(), KVKeep(first_tokens=2, last_tokens=6))
    plan = replace(
        dense_plan(spec),
        kv_bits=(4, *(rng.choice((16, 8, 4)) for _ in range(LAYERS - 1))),
        kv_keep=tuple(rng.choice(keeps) for _ in range(LAYERS)),
    )
    rows = some_rows(seed, 14, longest_output=24)
    sizes = [budget_for_kv_blocks(spec, plan, blocks, 0, 4) for blocks in (50, 25, 50, 17, 50)]
    budget = Budget(tuple(4.0 * i for i in range(len(sizes))), tuple(sizes))
    engine = hw_engine(family=family, plan=plan, budget=budget, config=engine_config(max_context_tokens=SHORT_TOKENS))
    move, moved = engine._storage.move, Mock()
    monkeypatch.setattr(engine._storage, "move", lambda blocks: (moved(), move(blocks)))
    tokens = serve(engine, rows)
    assert moved.called
    elastic.apply(plan)
    compared = 0
    for i, (_, prompt, output) in enumerate(rows):
        if engine.records().preemptions[i]:  # what it computed again, it computed from KV at 16 bits
            continue
        kv = RequestKV()
        logits = elastic.forward([RandomPrompts(VOCABULARY)(i, prompt)], [kv], "prefill")
        elastic.end_prefill(kv)
        for made, token in enumerate(tokens[i], start=1):
            assert logits[0, token] >= logits[0].max() - 1e-3
            compared += 1
            if made < output:
                logits = elastic.forward([[token]], [kv], "decode")
    assert compared > 50


class BlocksAtFewerBits:
    """Follows which KV blocks hold quantized KV, from the tables of the requests, and spoils them once released."""

    def __init__(self, engine: HwEngine, monkeypatch: pytest.MonkeyPatch) -> None:
        self.engine, self.arena = engine, engine.arena
        self.quantized: set[int] = set()
        self.spoiled = self.moved = 0
        move = engine._storage.move

        def follow(moved: dict[int, int]) -> None:
            move(moved)
            self.quantized = {moved.get(block, block) for block in self.quantized - set(moved.values())}
            self.moved += len(moved)

        monkeypatch.setattr(engine._storage, "move", follow)

    def look(self) -> None:
        """Check what the arena notes against the tables; fill released blocks with bytes that are no number."""
        filled: dict[bool, set[int]] = {True: set(), False: set()}
        held: set[int] = set()
        for live in self.engine.queues.all.values():
            table = live.table
            for layer, blocks in table.blocks.items():
                tokens = table.keep_of(layer).tokens(live.computed_tokens)
                used = blocks[: -(-tokens // table.block_tokens_of(layer))]
                filled[table.bits_of(layer) < 16].update(used)
                held.update(blocks)
        assert not filled[False] & self.arena.packed
        assert bool(self.arena.kv[list(filled[False])].isfinite().all())  # also where no token is yet
        assert filled[True] <= self.arena.packed
        released = [block for block in self.quantized - held if block < self.arena.blocks]
        self.arena.memory[released] = 0xFF
        self.spoiled += len(released)
        self.quantized = filled[True]


@pytest.mark.parametrize(("scheduler", "host_kv_blocks"), [("chunked", 0), ("chunked", 100), ("prefill_first", 0)])
@pytest.mark.parametrize("seed", range(2))
def test_what_quantized_kv_leaves_in_a_block_reaches_no_later_request(
    seed: int, scheduler: str, host_kv_blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    elastic, rows = ElasticModel(tiny(), name="tiny"), some_rows(seed, 24, longest_output=24)
    spec, dense = elastic.spec, dense_plan(elastic.spec)
    plans = [replace(dense, kv_bits=bits) for bits in ((8, 16, 4, 16), (16, 16, 16, 16), (4, 4, 16, 8))]
    sizes = [budget_for_kv_blocks(spec, dense, blocks, 0, 4) for blocks in (40, 22, 40, 18, 40)]
    budget = Budget(tuple(9.0 * i for i in range(len(sizes))), tuple(sizes))
    swapping = {"preemption": "swap", "host_kv_blocks": host_kv_blocks} if host_kv_blocks else {}
    engine = hw_engine(plan=plans[0], budget=budget, config=engine_config(scheduler, **swapping))
    blocks = BlocksAtFewerBits(engine, monkeypatch)
    engine.submit(requests(rows))
    kv_bits: dict[int, tuple[int, ...]] = {}
    step = 0
    while not engine.drained:
        step += 1
        engine.run_until(0.5 * step)  # at most one iteration
        engine.check()
        blocks.look()
        for request_id, live in engine.queues.all.items():
            if live.table.formats is not None:
                kv_bits[request_id] = tuple(live.table.bits_of(layer) for layer in range(LAYERS))
        if step % 8 == 0:
            engine.apply(plans[step // 8 % len(plans)])
    assert blocks.spoiled > 20
    assert blocks.moved > 0
    preemptions, compared = engine.records().preemptions, set()
    for i, (_, prompt, output) in enumerate(rows):
        if preemptions[i]:  # what it computed again, it computed from KV at 16 bits
            continue
        kv = RequestKV()
        logits = elastic.forward([RandomPrompts(VOCABULARY)(i, prompt)], [kv], "prefill")
        kv.end_prefill(dense.kv_keep, kv_bits.get(i, dense.kv_bits))
        compared.add(kv_bits.get(i, dense.kv_bits))
        for made, token in enumerate(engine.tokens(i), start=1):
            assert logits[0, token] >= logits[0].max() - 1e-3
            if made < output:
                logits = elastic.forward([[token]], [kv], "decode")
    assert len(compared) == len(plans)


# --- Copies under way ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seed", "polls"),
    quick(sorted(product(range(10), POLLS), key=lambda case: case[1] != POLLS[case[0] % len(POLLS)]), 10),
)
def test_a_later_plan_never_loses_a_copy_that_is_under_way_and_still_wanted(seed: int, polls: int) -> None:
    rng, spec = random.Random(100 * seed + polls), tiny_spec()
    plans = plan_schedule(seed, 12, bits=seed % 2 == 1, streams=seed % 3 == 0).plans
    engine = hw_engine(
        plan=plans[0],
        copies=lambda elastic: HoldingCopier(elastic, polls),
        config=engine_config(restore=rng.choice(["new_requests", "recompute"])),
        budget=Budget((0.0,), (budget_for_kv_blocks(spec, dense_plan(spec), 60, 0, 4),)),
    )
    engine.submit(requests(some_rows(seed, 12, longest_output=20)))
    at_s, wanted = 0.0, plans[0]
    while not engine.drained:
        at_s += rng.choice([0.4, 1.1, 2.5])
        engine.run_until(at_s)
        assert_blocks_are_as_counted(engine)
        if rng.random() < 0.7:
            wanted = rng.choice(plans)
            engine.apply(wanted)
    for step in range(200):  # what is under way comes, though no request is there
        state = engine.run_until(at_s + step)
        assert_blocks_are_as_counted(engine)
    assert state.plan == wanted
    assert engine.elastic.bytes() == weight_bytes(spec, wanted)
    assert (engine.records().status == Status.FINISHED).all()


def test_a_plan_that_still_wants_a_block_under_way_keeps_its_copy() -> None:
    spec = tiny_spec()
    dense = dense_plan(spec)
    pruned, other = with_mask(dense, drop(spec, ffn=[1])), with_mask(dense, drop(spec, mha=[3]))
    engine = hw_engine(plan=pruned, copies=lambda elastic: HoldingCopier(elastic, 6))
    engine.submit(requests([(0.0, 8, 30)]))
    engine.run_until(2.0)
    engine.apply(dense)  # FFN1 is copied in
    engine.run_until(4.0)
    block = engine.elastic.blocks["ffn"][1]
    under_way = block.pending
    assert under_way is not None
    engine.apply(other)  # drops MHA3, still wants FFN1
    engine.run_until(6.0)
    assert block.pending is under_way
    state = engine.run_until(40.0)
    assert (state.plan, block.bits, block.pending) == (other, 16, None)
    assert engine.transitions().bytes_in.tolist() == [0, weight_bytes(spec, dense) - weight_bytes(spec, pruned)]
