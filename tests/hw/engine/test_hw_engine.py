"""The real engine: its tokens against plain models, its schedule against the simulator's, its memory against counts."""

from __future__ import annotations

import math
import random
import threading
import weakref
from dataclasses import replace
from itertools import product
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hw.elastic.blocks import DiskStore
from hw.elastic.copies import LayerCopier
from hw.elastic.device_memory import out_of_memory
from hw.elastic.model import ElasticModel
from hw.engine.clock import RealClock
from hw.engine.hw_engine import HwEngine
from hw.engine.iteration_log import passes_table
from hw.engine.prompts import RandomPrompts
from hw.engine.torch_executor import NumericsError, TorchExecutor
from sim.cost.latency import calibration_from_dict
from sim.cost.memory import budget_for_kv_blocks, layer_weight_bytes, weight_bytes
from sim.cost.plan import KeepMask, KVKeep, check_plan, dense_plan, drop, with_mask
from sim.engine.budget import Budget
from sim.engine.executor import Iteration
from sim.engine.pricing_executor import PricingExecutor
from sim.engine.protocol import EngineConfig
from sim.engine.sim_engine import SimEngine
from sim.engine.transition import LayerCopy
from sim.errors import BudgetError, ConfigError, ModelError
from sim.policies import Fixed, PolicyContext
from sim.policies.greedy_stop import greedy_stop
from sim.policies.schedule import Schedule
from sim.replay.loop import replay
from sim.results.metrics import Slo, iterations_frame, records_frame, transitions_frame
from sim.results.records import Status
from sim.traces.trace import Trace
from tests.hw import serving
from tests.hw.serving import (
    HOST_TO_DEVICE_BYTES_PER_S,
    LAYERS,
    VOCABULARY,
    engine_config,
    flat_latency,
    flat_latency_content,
    hw_engine,
    requests,
    tiny,
    tiny_spec,
    torch,
    transformers,
)
from tests.hw.tiny_models import FAMILIES, SHORT_TOKENS
from tests.sample import quick

Rows = list[tuple[float, int, int]]
UNLIKE = ("sliding", "qwen2", "gemma3", "opt")
"""Families that differ in windows, biases, norms and positions from llama and from each other."""
RESTORES = ("new_requests", "recompute")
POLLS = (1, 3, 7, 20)
"""How often a copy is asked for before it is complete."""


def some_rows(seed: int, count: int, longest_prompt: int = 40, longest_output: int = 12) -> Rows:
    rng = random.Random(seed)
    at_s = 0.0
    rows = []
    for _ in range(count):
        at_s += rng.choice((0.0, 0.0, 0.4, 2.0))
        rows.append((at_s, rng.randint(1, longest_prompt), rng.randint(1, longest_output)))
    return rows


def serve(engine: HwEngine, rows: Rows) -> list[list[int]]:
    """Serve until nothing is left; check after every iteration that all memory is accounted for."""
    engine.submit(requests(rows))
    looks = 0
    while not engine.drained:
        looks += 1
        state = engine.run_until(0.7 * looks)
        engine.check()
        assert state.kv_used_layer_blocks <= state.kv_layer_blocks
    return [engine.tokens(i) for i in range(len(rows))]


def plain_tokens(family: str, rows: Rows) -> list[list[int]]:
    """Return what ``generate`` of the plain model gives for each request alone."""
    model, prompts = tiny(family), RandomPrompts(VOCABULARY)
    made = []
    for i, (_, prompt, output) in enumerate(rows):
        ids = torch.tensor([prompts(i, prompt)])
        config = transformers.GenerationConfig(
            max_new_tokens=output, min_new_tokens=output, do_sample=False, pad_token_id=0
        )
        with torch.inference_mode():
            generated = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
        made.append(generated[0, prompt:].tolist())
    return made


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


@pytest.mark.parametrize("scheduler", ["chunked", "prefill_first"])
def test_swapped_requests_compute_nothing_again_and_give_the_tokens_of_plain_generate(scheduler: str) -> None:
    rows = some_rows(2, 12, longest_output=24)
    swapping = {"preemption": "swap", "host_kv_blocks": 200}
    engine, again = (hw_engine(kv_blocks=16, config=engine_config(scheduler, **more)) for more in (swapping, {}))
    tokens = serve(engine, rows)
    assert tokens == serve(again, rows) == plain_tokens("llama", rows)
    assert engine.records().preemptions.sum() > 3
    prompts = sum(prompt for _, prompt, _ in rows)
    assert engine.iterations().prefill_tokens.sum() == prompts < again.iterations().prefill_tokens.sum()
    assert engine.host_layer_blocks[0] == 0
    assert not engine._storage.host.saved  # the host holds nothing more


@pytest.mark.parametrize("scheduler", ["chunked", "prefill_first"])
def test_swapped_kv_may_lie_in_several_pieces_of_host_memory(scheduler: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hw.elastic.host_kv.PIECE_BYTES", 3000)
    rows = some_rows(2, 12, longest_output=24)
    config = engine_config(scheduler, preemption="swap", host_kv_blocks=200)
    engine = hw_engine(kv_blocks=16, config=config)
    host, crossed = engine._storage.host, 0
    save = host.save

    def counted(request_id: int, blocks: list[int]) -> None:
        nonlocal crossed
        save(request_id, blocks)
        crossed += len({block // host._piece_blocks for block in host.saved[request_id]}) > 1

    monkeypatch.setattr(host, "save", counted)
    assert serve(engine, rows) == plain_tokens("llama", rows)
    assert 1 < host._piece_blocks < 10
    assert crossed > 3
    assert not host.saved


@pytest.mark.parametrize("host_kv_blocks", [1, 5, 100])
@pytest.mark.parametrize("seed", range(3))
def test_plans_and_budgets_may_change_while_kv_is_on_the_host(host_kv_blocks: int, seed: int) -> None:
    rng, spec = random.Random(seed), tiny_spec()
    rows = some_rows(seed, 12, longest_output=24)
    dense = dense_plan(spec)
    plans = [dense, replace(dense, weight_bits=(16, *dense.weight_bits[1:])), with_mask(dense, drop(spec, ffn=[1]))]
    plans.append(with_mask(dense, drop(spec, mha=[2])))
    more, less = (budget_for_kv_blocks(spec, dense, blocks, 0, 4) for blocks in (22, 16))
    budget = Budget((0.0, 20.0, 40.0, 60.0), (more, less, more, less))
    engine = hw_engine(budget=budget, config=engine_config(preemption="swap", host_kv_blocks=host_kv_blocks))
    engine.submit(requests(rows))
    swapped = 0
    for step in range(200):
        engine.run_until(step * 2.0)
        engine.check()
        held = {live.request_id: live.host_layer_blocks for live in engine.queues.waiting if live.swapped}
        saved = engine._storage.host.saved
        assert {i: len(blocks) for i, blocks in saved.items()} == held  # what the host holds is what was counted
        swapped += len(held)
        if step % 7 == 6:
            engine.apply(rng.choice(plans))
    engine.run_until(1e9)
    assert engine.drained
    assert not engine._storage.host.saved
    assert swapped or host_kv_blocks < 100


@pytest.mark.parametrize("scheduler", ["chunked", "prefill_first"])
@pytest.mark.parametrize("seed", range(8))
def test_requests_that_ran_out_of_memory_are_swapped_without_what_they_did_not_compute(
    seed: int, scheduler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng, rows = random.Random(seed), some_rows(seed, 12, longest_output=24)
    config = engine_config(scheduler, preemption="swap", host_kv_blocks=rng.choice([6, 20, 200]))
    engine = hw_engine(kv_blocks=24, config=config)
    forward = engine._torch.forward

    def fails_at_times(iteration: Iteration) -> dict[int, int]:
        if len(iteration.batch.scheduled) > 1 and rng.random() < 0.3:
            raise torch.OutOfMemoryError("no memory")
        return forward(iteration)

    save = engine._storage.save_on_host

    def saves_what_is_computed(request_id: int, blocks: list[int]) -> None:
        live = engine.queues.all[request_id]
        assert live.computed_tokens > 0
        assert len(blocks) == live.table.own_blocks_needed(live.computed_tokens)
        save(request_id, blocks)

    monkeypatch.setattr(engine._torch, "forward", fails_at_times)
    monkeypatch.setattr(engine._storage, "save_on_host", saves_what_is_computed)
    assert serve(engine, rows) == plain_tokens("llama", rows)
    assert engine.out_of_memory > 0


def engine_with_kv_on_the_host() -> tuple[HwEngine, int]:
    """Return an engine in the middle of its work, and a request whose KV is on the host."""
    engine = hw_engine(kv_blocks=16, config=engine_config(preemption="swap", host_kv_blocks=200))
    engine.submit(requests(some_rows(2, 12, longest_output=24)))
    time_s = 0.0
    while not engine._storage.host.saved:
        time_s += 0.1
        engine.run_until(time_s)
    return engine, min(engine._storage.host.saved)


def test_a_request_that_is_canceled_frees_its_kv_on_the_host() -> None:
    engine, request_id = engine_with_kv_on_the_host()
    engine.cancel(request_id)
    engine.check()
    assert request_id not in engine._storage.host.saved
    engine.run_until(math.inf)
    assert engine.records([request_id]).status[0] == Status.REJECTED
    assert engine.host_layer_blocks[0] == 0


def test_a_closed_engine_holds_no_memory_of_the_host() -> None:
    engine, _ = engine_with_kv_on_the_host()
    memory = [weakref.ref(piece) for piece in engine._storage.host._pieces]
    engine.close()
    assert [piece() for piece in memory] == [None]


def test_a_host_without_memory_for_swapped_kv_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hw.elastic.host_kv.HostKV._piece", Mock(side_effect=RuntimeError("can't allocate memory")))
    with pytest.raises(BudgetError, match=r"the host has no 0.02 GiB of memory .* lower engine.host_kv_blocks"):
        hw_engine(config=engine_config(preemption="swap", host_kv_blocks=10_000))


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


class AuditedExecutor(TorchExecutor):
    """An executor that compares every other token with a plain model, gated position by position as the request ran.

    The gates of the plain model say which MHA and FFN blocks each position ran; attention then reads earlier keys as
    they were made. That states the KV hole, stage-wise masks and recomputation without any cache.
    """

    audited = 0

    def forward(self, iteration: Iteration) -> dict[int, int]:
        from tests.hw.elastic.test_model import plain_logits

        self._seen: dict[int, list[tuple[frozenset[int], tuple[bool, ...]]]] = getattr(self, "_seen", {})
        chosen = super().forward(iteration)
        plan = iteration.plan
        work = [(live, 1, plan.decode.ffn) for live in iteration.decodes]
        work += [(live, tokens, plan.prefill.ffn) for live, tokens in iteration.prefills]
        for live, tokens, ffn in work:
            seen = self._seen.setdefault(live.request_id, [])
            del seen[live.computed_tokens :]
            # In a layer of kv_only the keys of all are made, but only the last token of a prompt gains anything.
            writes = frozenset(layer for layer, flag in enumerate(plan.kv_only) if flag and not live.decoding)
            whole = live.computed_tokens + tokens == live.target_tokens
            little = live.mha - writes, tuple(runs and layer not in writes for layer, runs in enumerate(ffn))
            seen += [little] * (tokens - whole) + [(live.mha, ffn)] * whole
            token = chosen.get(live.request_id)
            if token is None or live.produced_tokens % 2:  # every other token: plain passes are slow
                continue
            mha_gates = torch.tensor([[float(layer in mha) for mha, _ in seen] for layer in range(LAYERS)])
            ffn_gates = torch.tensor([[float(ffn[layer]) for _, ffn in seen] for layer in range(LAYERS)])
            # A block counts for a later token's KV hole too: what a request lost, none of its tokens runs again.
            logits = plain_logits(Audited.plain, self.tokens_of(live)[: len(seen)], mha_gates, ffn_gates)
            assert logits[-1, token] >= logits[-1].max() - 1e-3
            self.audited += 1
        return chosen


class Audited(HwEngine):
    executor_type = AuditedExecutor


def plan_schedule(
    seed: int,
    steps: int,
    *,
    period_s: float = 2.0,
    bits: bool = False,
    kv: bool = False,
    streams: bool = False,
    writes: bool = False,
) -> Schedule:
    rng, spec, crossing = random.Random(seed), tiny_spec(), random.Random(-seed - 1)
    writing = random.Random(-seed - 2)
    plans = [dense_plan(spec)]
    while len(plans) < steps:
        prefill = KeepMask(
            mha=tuple(rng.random() < 0.75 for _ in range(LAYERS)), ffn=tuple(rng.random() < 0.75 for _ in range(LAYERS))
        )
        decode = KeepMask(
            mha=tuple(k and rng.random() < 0.8 for k in prefill.mha),
            ffn=tuple(k and rng.random() < 0.8 for k in prefill.ffn),
        )
        plan = replace(dense_plan(spec), prefill=prefill, decode=decode)
        if bits:
            plan = replace(plan, weight_bits=tuple(rng.choice((16, 8, 4)) for _ in range(LAYERS)))
        if kv:
            keeps = (KVKeep(), KVKeep(first_tokens=2, last_tokens=5), KVKeep(first_tokens=0, last_tokens=9))
            kv_bits = tuple(rng.choice((16, 16, 8, 4)) for _ in range(LAYERS))
            plan = replace(plan, kv_keep=tuple(rng.choice(keeps) for _ in range(LAYERS)), kv_bits=kv_bits)
        if rng.random() < 0.3:
            plan = replace(plan, max_running=3)
        if streams and crossing.random() < 0.6:
            layers = crossing.sample(range(LAYERS), crossing.choice((3, LAYERS)))
            plan = replace(plan, streamed=tuple(layer in layers for layer in range(LAYERS)))
        if writes and writing.random() < 0.7:
            plan = replace(plan, kv_only=tuple(writing.random() < 0.5 for _ in range(LAYERS)))
        check_plan(spec, plan)
        plans.append(plan)
    return Schedule(tuple(period_s * i for i in range(steps)), tuple(plans))


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
    from hw.elastic.kv import RequestKV

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
    from hw.elastic.kv import RequestKV

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
    from hw.elastic.kv import RequestKV

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


# --- Law 8: the simulator's schedule ---------------------------------------------------------------------------------


def trace_of(rows: Rows) -> Trace:
    arrival_s, prompt, output = (np.array(column) for column in zip(*rows, strict=True))
    return Trace(arrival_s=arrival_s, prompt_tokens=prompt, output_tokens=output)


def sim_engine(
    config: EngineConfig, budget: Budget | int, link_bytes_per_s: float = HOST_TO_DEVICE_BYTES_PER_S
) -> SimEngine:
    return SimEngine(
        model=tiny_spec(),
        latency=flat_latency(),
        config=config,
        plan=dense_plan(tiny_spec()),
        budget_bytes=budget,
        host_to_device_bytes_per_s=link_bytes_per_s,
    )


def assert_same_replay(found: HwEngine, expected: SimEngine) -> None:
    import pandas as pd

    slo = Slo(ttft_s=5.0)
    pd.testing.assert_frame_equal(records_frame(found.records(), slo), records_frame(expected.records(), slo))
    columns = [c for c in iterations_frame(expected.iterations()).columns if c != "extrapolated"]
    pd.testing.assert_frame_equal(
        iterations_frame(found.iterations())[columns], iterations_frame(expected.iterations())[columns]
    )
    pd.testing.assert_frame_equal(transitions_frame(found.transitions()), transitions_frame(expected.transitions()))
    np.testing.assert_allclose(found.kept_share(), expected.kept_share(), rtol=1e-6)
    assert found.budget_violation_s == pytest.approx(expected.budget_violation_s)


def moving_budget(seed: int, kv_blocks: int, *, steps: int = 5) -> Budget:
    rng, spec = random.Random(seed), tiny_spec()
    most = budget_for_kv_blocks(spec, dense_plan(spec), kv_blocks, 0, 4)
    low = budget_for_kv_blocks(spec, dense_plan(spec), kv_blocks // 2, 0, 4)
    values = [most] + [rng.choice((low, low - 40_000, (most + low) // 2, most)) for _ in range(steps)] + [most]
    kept = [i for i in range(len(values)) if i == 0 or values[i] != values[i - 1]]
    return Budget(tuple(3.0 * i for i in kept), tuple(values[i] for i in kept), notice_s=1.0)


@given(
    seed=st.integers(0, 10_000),
    scheduler=st.sampled_from(["chunked", "prefill_first"]),
    restore=st.sampled_from(["new_requests", "recompute"]),
    kv_blocks=st.sampled_from([15, 24, 60]),
    reuse=st.booleans(),
    watermark=st.sampled_from([0.0, 0.05]),
    policy=st.sampled_from(["schedule", "greedy"]),
    budget_moves=st.booleans(),
)
@settings(max_examples=20, deadline=None)
def test_both_engines_admit_preempt_and_finish_alike_for_the_same_decisions(
    seed: int,
    scheduler: str,
    restore: str,
    kv_blocks: int,
    reuse: bool,
    watermark: float,
    policy: str,
    budget_moves: bool,
) -> None:
    """Law 8: who is admitted when, preempted when and finished when, iteration by iteration."""
    config = engine_config(scheduler, restore=restore, reuse_preempted_kv=reuse, kv_watermark_share=watermark)
    spec, rows = tiny_spec(), some_rows(seed, 10)
    budget = (
        moving_budget(seed, kv_blocks)
        if budget_moves
        else budget_for_kv_blocks(spec, dense_plan(spec), kv_blocks, 0, 4)
    )

    def make_policy() -> Any:
        if policy == "schedule":
            return plan_schedule(seed, 8, bits=True, kv=True)
        return greedy_stop(
            PolicyContext(model=spec, kv_block_tokens=4), order=["FFN2", "MHA1", "FFN1", "MHA2"], patience=2
        )

    engines = []
    for engine in (
        hw_engine(config=config, budget=budget if budget_moves else None, kv_blocks=kv_blocks),
        sim_engine(config, budget),
    ):
        replay(trace_of(rows), engine, make_policy(), tick_s=0.7, also_at_s=engine.budget.change_s[1:])
        engines.append(engine)
    assert_same_replay(*engines)


@pytest.mark.parametrize("restore", RESTORES)
@pytest.mark.parametrize("seed", range(4))
def test_both_engines_admit_alike_while_layers_are_streamed(
    seed: int, restore: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Law 8 with streamed layers, which take no time on the clock of these tests."""
    monkeypatch.setattr(serving, "HOST_TO_DEVICE_BYTES_PER_S", 1e12)
    config, spec = engine_config(restore=restore), tiny_spec()
    budget = budget_for_kv_blocks(spec, dense_plan(spec), 20, 0, 4)
    engines = hw_engine(config=config, kv_blocks=20), sim_engine(config, budget, link_bytes_per_s=1e12)
    for engine in engines:
        policy = plan_schedule(seed, 8, bits=seed % 2 == 0, streams=True, writes=seed > 1)
        assert any(any(plan.streamed) for plan in policy.plans)
        replay(trace_of(some_rows(seed, 12)), engine, policy, tick_s=0.7)
    assert_same_replay(*engines)


@given(
    seed=st.integers(0, 10_000),
    scheduler=st.sampled_from(["chunked", "prefill_first"]),
    kv_blocks=st.sampled_from([14, 18, 24]),
    host_kv_blocks=st.sampled_from([1, 4, 100]),
    budget_moves=st.booleans(),
)
@example(seed=2, scheduler="chunked", kv_blocks=18, host_kv_blocks=100, budget_moves=False)
@example(seed=2, scheduler="prefill_first", kv_blocks=18, host_kv_blocks=100, budget_moves=False)
@settings(max_examples=15, deadline=None)
def test_both_engines_swap_alike(
    seed: int, scheduler: str, kv_blocks: int, host_kv_blocks: int, budget_moves: bool
) -> None:
    """Law 8 with KV that goes to the host and back, which takes no time on the clock of these tests."""
    config = engine_config(scheduler, preemption="swap", host_kv_blocks=host_kv_blocks)
    spec, rows = tiny_spec(), some_rows(seed, 10, longest_output=20)
    dense = dense_plan(spec)
    budget = moving_budget(seed, kv_blocks) if budget_moves else budget_for_kv_blocks(spec, dense, kv_blocks, 0, 4)
    engines = (
        hw_engine(config=config, budget=budget if isinstance(budget, Budget) else None, kv_blocks=kv_blocks),
        sim_engine(config, budget, link_bytes_per_s=1e15),
    )
    for engine in engines:
        replay(trace_of(rows), engine, Fixed(dense), also_at_s=engine.budget.change_s[1:])
    assert_same_replay(*engines)
    for engine in engines if host_kv_blocks == 100 else ():  # enough for every request
        assert engine.iterations().prefill_tokens.sum() == sum(prompt for _, prompt, _ in rows)
        assert engine.records().preemptions.sum() > 0 or seed != 2


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


# --- Copies under way ------------------------------------------------------------------------------------------------


class HoldingCopier(LayerCopier):
    """Copies that are complete only after ``polls`` checks, as on a GPU: iterations run meanwhile.

    The blocks hold the tensors of the copy from the start, as with a CUDA copy.
    """

    def __init__(self, elastic: ElasticModel, polls: int) -> None:
        super().__init__(elastic)
        self._polls, self._left = polls, 0

    def start(self, copy: LayerCopy) -> None:
        super().start(copy)
        assert self._future is not None
        self._future.result()
        self._left = self._polls

    def complete(self) -> bool:
        self._left -= 1
        return self._left < 0

    def wait(self, timeout_s: float) -> float:
        return 0.0


def assert_blocks_are_as_counted(engine: HwEngine) -> None:
    """Check that every block has the bits that the engine counts, and that a copy under way is still there."""
    resident, copy = engine._changes.resident, engine._changes.copy
    for kind, bits, copied in (
        ("mha", resident.mha_bits, copy.mha_bits if copy is not None else 0),
        ("ffn", resident.ffn_bits, copy.ffn_bits if copy is not None else 0),
    ):
        for layer, (block, counted) in enumerate(zip(engine.elastic.blocks[kind], bits, strict=True)):
            assert block.bits == (0 if resident.streamed[layer] else counted), f"{kind} block {layer}"
            # A copy that the device has refused waits to start again, with nothing pending.
            under_way = engine._changes.copying and copy is not None and copy.layer == layer and copied
            assert (block.pending is not None) == bool(under_way), f"{kind} block {layer}"


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
