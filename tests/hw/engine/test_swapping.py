"""KV of preempted requests on the host: nothing is computed again, the tokens stay, the memory is accounted for."""

from __future__ import annotations

import math
import random
import weakref
from dataclasses import replace
from unittest.mock import Mock

import pytest

from hw.engine.hw_engine import HwEngine
from sim.cost.memory import budget_for_kv_blocks
from sim.cost.plan import dense_plan, drop, with_mask
from sim.engine.budget import Budget
from sim.engine.executor import Iteration
from sim.errors import BudgetError
from sim.results.records import Status
from tests.hw.engine.runs import plain_tokens, serve, some_rows
from tests.hw.serving import engine_config, hw_engine, requests, tiny_spec, torch


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
