"""Prefill and decode of a real model in two engines: tokens, bytes, back-pressure, and the death of one side."""

from __future__ import annotations

import json
import random
import socket
import struct
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest

from hw.disaggregate import sides
from hw.disaggregate.kv_link import Channel, Header, LinkError
from hw.disaggregate.sides import (
    Connection,
    DecodeSide,
    GuardedEngine,
    PrefillSide,
    Side,
    gather,
    handover_from,
    scatter,
    serve,
)
from hw.elastic.kv_storage import ArenaStorage
from hw.elastic.model import ElasticModel
from hw.elastic.paged_kv import KVArena
from hw.engine.clock import RealClock
from hw.engine.prompts import RandomPrompts
from hw.score.full_test import greedy_tokens
from sim.cost.kv_format import stored_kv_bytes
from sim.cost.memory import budget_for_kv_blocks
from sim.cost.plan import KVKeep, Plan, dense_plan, drop, with_mask
from sim.disaggregate.disaggregate import decode_side
from sim.engine.block_table import BlockTable
from sim.engine.kv_pool import KVPool
from sim.engine.protocol import EngineConfig
from sim.results.records import Records, Status
from sim.traces.trace import Trace
from tests.hw.fake_cuda import FakeCuda
from tests.hw.serving import VOCABULARY, engine_config, hw_engine, requests, tiny, tiny_spec, torch

Rows = Sequence[tuple[float, int, int]]
WAIT_S = 60.0


@dataclass
class Pair:
    """Both sides in two threads of this process, and what they reported."""

    prefill: PrefillSide
    decode: DecodeSide
    records: dict[int, Records] = field(default_factory=dict)
    reports: list[tuple[str, str, Any]] = field(default_factory=list)
    errors: dict[str, BaseException] = field(default_factory=dict)
    most_held: int = 0

    def tokens(self, request_id: int) -> list[int]:
        side = self.decode if request_id in self.decode.engine.request_ids else self.prefill
        return side.engine.tokens(request_id)

    def transfers(self) -> dict[int, dict[str, Any]]:
        return {value["request_id"]: value for _, kind, value in self.reports if kind == "transfer"}


def serve_disaggregated(
    rows: Rows,
    plan: Plan,
    *,
    family: str = "llama",
    config: EngineConfig | None = None,
    prefill_blocks: int = 200,
    decode_blocks: int = 200,
    bytes_per_s: float | None = None,
    stop: Callable[[str, Pair], bool] = lambda _, __: False,
) -> Pair:
    """Serve rows of (arrival_s, prompt_tokens, output_tokens); check after every iteration that memory adds up."""
    config, clock, reports = config or engine_config(), RealClock(), []
    arrival_s, prompts, outputs = (np.array(column) for column in zip(*rows, strict=True))
    trace = Trace(arrival_s=arrival_s.astype(np.float64), prompt_tokens=prompts, output_tokens=outputs)

    def engine_of(own: Plan, blocks: int, config: EngineConfig) -> tuple[ElasticModel, Callable[..., GuardedEngine]]:
        elastic = ElasticModel(tiny(family), name="tiny")
        budget = budget_for_kv_blocks(elastic.spec, own, blocks, 0, config.kv_block_tokens)
        settings = {"elastic": elastic, "config": config, "plan": own, "budget_bytes": budget, "clock": clock}
        settings["prompts"] = RandomPrompts(VOCABULARY)
        return elastic, lambda **more: GuardedEngine(**{**settings, **more})

    def report(stage: str) -> Callable[[str, Any], None]:
        return lambda kind, value: reports.append((stage, kind, value))

    ends = socket.socketpair()
    elastic, build = engine_of(decode_side(plan), decode_blocks, config)
    decode = DecodeSide(
        build=build,
        elastic=elastic,
        plan=plan,
        connection=Connection(Channel(ends[1], "the prefill process")),
        clock=clock,
        report=report("decode"),
    )
    limit = decode.engine.context_limit
    _, build = engine_of(plan, prefill_blocks, replace(config, max_context_tokens=limit))
    prefill = PrefillSide(
        build=build,
        trace=trace,
        decode_limit=limit,
        connection=Connection(Channel(ends[0], "the decode process"), bytes_per_s=bytes_per_s),
        clock=clock,
        report=report("prefill"),
    )
    decode.listen()
    pair = Pair(prefill, decode, reports=reports)
    clock.start_at(time.perf_counter())

    def run(stage: str, side: Side) -> None:
        def stopped() -> bool:
            side.engine.check()
            pair.most_held = max(pair.most_held, len(prefill.engine.outside))
            return stop(stage, pair)

        complete = False
        try:
            serve(side, clock, stopped)
            complete = True
        except BaseException as error:
            pair.errors[stage] = error
        side.connection.close(complete=complete)

    threads = [threading.Thread(target=run, args=side) for side in (("prefill", prefill), ("decode", decode))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
        assert not thread.is_alive(), "a side does not end"
    for side in (prefill, decode):
        for i in side.engine.request_ids:
            pair.records[i] = side.engine.records([i])
        side.engine.close()
    return pair


def some_rows(seed: int, count: int = 16, longest_prompt: int = 40, longest_output: int = 12) -> Rows:
    rng = random.Random(seed)
    return [(0.005 * i, rng.randint(1, longest_prompt), rng.randint(1, longest_output)) for i in range(count)]


def plans() -> dict[str, Plan]:
    spec = tiny_spec()
    dense = dense_plan(spec)
    keep = (KVKeep(), KVKeep(first_tokens=2, last_tokens=5), KVKeep(), KVKeep(first_tokens=0, last_tokens=3))
    staged = replace(dense, prefill=drop(spec, ffn=[3]), decode=drop(spec, mha=[1], ffn=[0, 3]))
    return {
        "dense": dense,
        "unified": with_mask(dense, drop(spec, mha=[2], ffn=[1])),
        "blocks": staged,
        "kv": replace(dense, kv_keep=keep),
        "both": replace(staged, kv_keep=keep),
        "kv bits": replace(dense, kv_bits=(8, 16, 4, 4)),
        "all of it": replace(staged, kv_keep=keep, kv_bits=(8, 4, 16, 8)),
        "nothing to send": replace(dense, decode=drop(spec, mha=range(4))),
    }


@pytest.mark.parametrize("name", plans())
def test_greedy_tokens_are_those_of_one_process_and_of_the_plain_elastic_model(name: str) -> None:
    rows, plan = some_rows(1), plans()[name]
    pair = serve_disaggregated(rows, plan)
    assert not pair.errors
    together = hw_engine(plan=plan, timed=False)
    together.submit(requests(rows))
    together.run_until(float("inf"))
    elastic = ElasticModel(tiny(), name="tiny")
    for i, (_, prompt, output) in enumerate(rows):
        alone = greedy_tokens(elastic, plan, torch.tensor([RandomPrompts(VOCABULARY)(i, prompt)]), output)[0].tolist()
        assert pair.tokens(i) == together.tokens(i) == alone


def test_models_with_sliding_windows_and_other_families_decode_from_shipped_kv() -> None:
    rows = some_rows(2, count=8)
    for family in ("sliding", "qwen3", "opt"):
        pair = serve_disaggregated(rows, dense_plan(ElasticModel(tiny(family), name="tiny").spec), family=family)
        together = hw_engine(family=family, timed=False)
        together.submit(requests(rows))
        together.run_until(float("inf"))
        assert [pair.tokens(i) for i in range(8)] == [together.tokens(i) for i in range(8)]


@pytest.mark.parametrize("name", ["dense", "both"])
def test_every_request_ends_once_and_sends_the_bytes_of_the_plan(name: str) -> None:
    rows, plan = [*some_rows(3), (0.1, 300, 5)], plans()[name]  # the last one is too long for a pool of 50 KV blocks
    pair = serve_disaggregated(rows, plan, decode_blocks=50)
    assert not pair.errors
    transfers = pair.transfers()
    for i, (_, prompt, output) in enumerate(rows):
        record, sent = pair.records[i], transfers.get(i)
        assert record.status[0] == (Status.REJECTED if i == len(rows) - 1 else Status.FINISHED)
        assert record.produced_tokens[0] == (0 if i == len(rows) - 1 else output)
        if output == 1 or i == len(rows) - 1:
            assert sent is None
        else:
            assert sent is not None
            assert sent["sent_bytes"] == stored_kv_bytes(tiny_spec(), plan, prompt)
            assert record.first_token_s[0] <= sent["send_s"] <= sent["sent_s"] <= sent["joined_s"] <= record.finish_s[0]
    ends = [i for stage, kind, value in pair.reports if kind == "records" for i in value[0] if stage == "decode"]
    assert sorted(ends) == sorted(transfers)  # each ends once where it decodes
    assert pair.prefill.engine.pool.used_layer_blocks == pair.decode.engine.pool.used_layer_blocks == 0


def test_prefill_holds_kv_until_it_has_arrived_and_frees_it_then() -> None:
    rows = [(0.0, 30, 4)] * 6
    pair = serve_disaggregated(rows, plans()["dense"], bytes_per_s=2e6)
    released_s = {value[0]: value[1] for _, kind, value in pair.reports if kind == "released"}
    transfers = pair.transfers()
    assert released_s.keys() == transfers.keys() == set(range(6))
    assert all(released_s[i] >= transfers[i]["sent_s"] for i in transfers)
    begun_s = min(t["send_s"] for t in transfers.values())
    total_bytes = sum(t["sent_bytes"] for t in transfers.values())
    assert max(t["sent_s"] for t in transfers.values()) - begun_s >= total_bytes / 2e6  # the link's bandwidth


def test_a_decode_side_without_room_stops_prefill_in_the_end_and_no_request_is_lost() -> None:
    rows = [(0.0, 20, 10)] * 14
    config = engine_config(max_running=2)
    pair = serve_disaggregated(rows, plans()["dense"], config=config, prefill_blocks=30, decode_blocks=30)
    assert not pair.errors
    assert all(pair.records[i].status[0] == Status.FINISHED for i in range(14))
    admitted_s = [float(pair.records[i].admitted_s[0]) for i in range(14)]
    arrived_s = sorted(t["sent_s"] for t in pair.transfers().values())
    assert max(admitted_s) > arrived_s[0]  # the last prompts could only be computed as the first KV had gone
    assert pair.most_held <= 30 * 4 // 20  # the prefill pool holds no more prompts


@pytest.mark.parametrize("swaps", [False, True])
@pytest.mark.parametrize("name", ["dense", "unified"])
def test_requests_preempted_at_the_decode_side_go_on_there(name: str, swaps: bool) -> None:
    rows = [(0.0, 12, 24)] * 6
    config = engine_config(preemption="swap", host_kv_blocks=200) if swaps else engine_config()
    pair = serve_disaggregated(rows, plans()[name], config=config, decode_blocks=16)
    assert not pair.errors
    assert sum(int(pair.records[i].preemptions[0]) for i in range(6)) > 0
    computed_again = pair.decode.engine.iterations().prefill_tokens.sum()
    assert computed_again == 0 if swaps else computed_again > 0
    together = hw_engine(plan=plans()[name], timed=False)
    together.submit(requests(rows))
    together.run_until(float("inf"))
    assert [pair.tokens(i) for i in range(6)] == [together.tokens(i) for i in range(6)]


@pytest.mark.parametrize("dies", ["prefill", "decode"])
def test_a_side_that_dies_is_an_error_in_the_other_which_keeps_its_records(dies: str) -> None:
    rows = [(0.0, 20, 30)] * 8

    def stop(stage: str, pair: Pair) -> bool:
        if stage == dies and len(pair.transfers()) >= 3:
            raise RuntimeError("a bug")
        return False

    pair = serve_disaggregated(rows, plans()["dense"], bytes_per_s=2e5, stop=stop)
    other = {"prefill": "decode", "decode": "prefill"}[dies]
    assert isinstance(pair.errors[dies], RuntimeError)
    assert isinstance(pair.errors[other], LinkError)
    assert f"the {dies} process has gone" in str(pair.errors[other])
    assert set(pair.records) == set(range(8))


def test_a_side_that_is_stopped_ends_between_two_iterations() -> None:
    pair = serve_disaggregated([(0.0, 20, 40)] * 4, plans()["dense"], stop=lambda _, pair: len(pair.transfers()) >= 2)
    assert {type(error) for error in pair.errors.values()} <= {KeyboardInterrupt, LinkError}
    assert KeyboardInterrupt in {type(error) for error in pair.errors.values()}
    pair.prefill.engine.check()
    pair.decode.engine.check()


def test_an_offer_that_is_no_prompt_of_the_model_is_refused() -> None:
    request = {"request_id": 0, "arrival_s": 0.0, "prompt_tokens": 2, "output_tokens": 3}
    rest = {"output_limit": 3, "admitted_s": 0.0, "first_token_s": 0.1, "kept_params": 1, "nll_sum": 0.0}
    handover = {"request": request, "tokens": [1, 2, 3], "preemptions": 0, **rest}
    assert handover_from({"handover": handover}, tiny_spec()).tokens == (1, 2, 3)
    for wrong in ({"tokens": [1, 2]}, {"tokens": [1, 2, VOCABULARY]}):
        with pytest.raises(LinkError, match="not a prompt of tiny"):
            handover_from({"handover": {**handover, **wrong}}, tiny_spec())
    nan, inf = float("nan"), float("inf")
    numbers = [
        {name: value} for name in ("output_limit", "kept_params") for value in (-1, 1.5, nan, True, "1", None, [])
    ]
    numbers += [{"tokens": [1, 2, value]} for value in (True, 1.0, "1", nan)]
    numbers += [{name: value} for name in ("admitted_s", "first_token_s") for value in (nan, inf, "0", None, True)]
    numbers += [{"request": {**request, "request_id": value}} for value in ([], "0", -1, nan)]
    numbers += [{"admitted_s": 10**400}, {"nll_sum": 10**400}, {"nll_sum": inf}]
    numbers += [{"request": {**request, "arrival_s": value}} for value in (-0.5, 10**400)]
    numbers += [{"request": {**request, "arrival_s": nan}}, {"nll_sum": "0"}, {"tokens": 3}, {"unknown": 1}]
    for wrong in numbers:
        with pytest.raises(LinkError, match="cannot be read"):
            handover_from({"handover": {**handover, **wrong}}, tiny_spec())
    for content in ({"request": request}, None, 3, "text", [[]]):
        with pytest.raises(LinkError, match="cannot be read"):
            handover_from({"handover": content}, tiny_spec())


@pytest.mark.parametrize(
    "header",
    [
        {"kind": "kv", "request": []},
        {"kind": "kv", "request": 1.0},
        {"kind": ["kv"], "request": 1},
        {"kind": "over", "bytes": 5},
        {"kind": "offer", "bytes": 5},
        {"request": 1},
        {"kind": "unknown"},
        {"kind": "kv", "request": 7},
        {"kind": "offer"},
    ],
)
def test_a_frame_that_is_not_expected_ends_the_link_and_nothing_else(header: Header) -> None:
    ours, theirs = socket.socketpair()
    connection = Connection(Channel(ours, "the prefill process"))
    side = DecodeSide(
        build=lambda **more: hw_engine(timed=False, kind=GuardedEngine, **more),
        elastic=ElasticModel(tiny(), name="tiny"),
        plan=plans()["dense"],
        connection=connection,
        clock=RealClock(),
        report=lambda _kind, _content: None,
    )
    side.listen()
    text = json.dumps({"bytes": 0, **header}).encode()
    theirs.sendall(struct.pack("!I", len(text)) + text)
    with connection.guard:
        assert connection.guard.wait_for(lambda: connection.failure is not None, timeout=WAIT_S)
    assert isinstance(connection.failure, LinkError)
    connection.close(complete=False)
    theirs.close()
    side.engine.close()


def test_what_is_gathered_are_the_bytes_that_the_plan_says_for_any_prompt() -> None:
    for name, plan in plans().items():
        engine = hw_engine(plan=plan, timed=False, holds=lambda _: True)
        engine.submit(requests([(0.0, prompt, 1) for prompt in (1, 4, 7, 23)]))
        engine.run_until(float("inf"))
        for i, prompt in enumerate((1, 4, 7, 23)):
            content = gather(engine.arena, engine.outside[i], prompt)
            assert len(content) == stored_kv_bytes(tiny_spec(), plan, prompt), name
            engine.release(i)
        assert engine.pool.used_layer_blocks == 0
        engine.check()


def test_room_is_held_above_the_watermark_for_as_many_as_may_run_and_for_none_while_others_wait() -> None:
    layers = tiny_spec().num_layers
    engine = hw_engine(config=engine_config(kv_watermark_share=0.1, max_running=3), kv_blocks=20)
    assert engine.reserve(0, 4 * 19) is None  # 19 of 20 KV blocks, of which two stay free
    assert engine.reserve(0, 4 * 10) is not None
    assert engine.pool.used_layer_blocks == 10 * layers
    assert engine.reserve(1, 4 * 9) is None
    assert engine.reserve(1, 4) is not None
    assert engine.reserve(2, 4) is not None
    assert engine.reserve(3, 4) is None  # three may run
    engine.check()
    for request_id in range(3):
        engine.release(request_id)
    engine.submit(requests([(0.0, 30, 9)] * 9))
    assert engine.run_until(0.01).waiting > 0
    assert engine.pool.free_layer_blocks >= 3 * layers
    assert engine.reserve(9, 4) is None


def test_kv_is_read_and_written_in_parts_and_waits_for_memory_that_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sides, "SENT_BLOCKS", 2)
    monkeypatch.setattr(sides, "LOOK_S", 0.0)
    shape = {"block_tokens": 4, "heads": 2, "head_dim": 8, "dtype": torch.float32}
    elastic = ElasticModel(tiny(), name="tiny")
    tables, arenas, device = [], [], FakeCuda()
    for _ in range(2):
        arena = KVArena(device, capacity=200, **shape)
        pool = KVPool(100, ArenaStorage(arena))
        pool.take(7 * len(tables))
        table = BlockTable(mha=frozenset(range(elastic.spec.num_layers)), block_tokens=4)
        table.hold(pool, 21)
        tables.append(table)
        arenas.append(arena)
    arenas[0].kv[:100].normal_()
    with device:
        first = device.allocations
        content = gather(arenas[0], tables[0], 21)
        taken = device.allocations - first
        for refused in (1, taken // 2, taken - 2):  # the last one joins the parts in memory of the host
            device.refuse = frozenset([device.allocations + refused])
            assert gather(arenas[0], tables[0], 21) == content
        for refused in (0, 3, 9):
            arenas[1].kv[:100].zero_()
            device.refuse = frozenset([device.allocations + refused])
            scatter(arenas[1], tables[1], 21, bytearray(content), elastic)
            assert gather(arenas[1], tables[1], 21) == content
        monkeypatch.setattr(sides, "PATIENCE_S", 0.0)
        device.refuse = frozenset(range(device.allocations, device.allocations + 10_000))
        with pytest.raises(MemoryError):
            gather(arenas[0], tables[0], 21)
