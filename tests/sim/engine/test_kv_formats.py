"""KV that is quantized after prefill, in the simulator: what a request holds, what its decodes cost, by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sim.cost.memory import budget_for_kv_blocks
from sim.cost.plan import Plan, dense_plan
from sim.engine.protocol import EngineConfig, Limits
from sim.engine.sim_engine import SimEngine
from sim.results.records import Status
from tests.sim.serving import TINY, linear_latency, requests

DENSE = dense_plan(TINY)
MIXED = replace(DENSE, kv_bits=(16, 8, 4))
"""A token of one layer takes 128 bytes; 80 at 8 bits, 48 at 4: a KV block of 4 tokens holds 6 and 10."""


def engine(plan: Plan, *, context_s: float = 0.0, kv_blocks: int = 100) -> SimEngine:
    return SimEngine(
        model=TINY,
        latency=linear_latency(base_s=1.0, context_s=context_s),
        config=EngineConfig(limits=Limits(max_batch_tokens=64, max_running=8), kv_block_tokens=4),
        plan=plan,
        budget_bytes=budget_for_kv_blocks(TINY, DENSE, kv_blocks, 0, 4),
    )


def test_a_request_holds_full_kv_in_prefill_and_its_own_bits_after_it() -> None:
    served = engine(MIXED)
    served.submit(requests((0.0, 32, 40)))
    assert served.run_until(0.5).kv_used_layer_blocks == 3 * 8
    assert served.run_until(1.5).kv_used_layer_blocks == 9 + 6 + 4  # for 33 tokens, in the second iteration
    served.apply(DENSE)
    assert served.run_until(20.5).kv_used_layer_blocks == 13 + 9 + 6  # 52 tokens: it keeps its bits
    served.run_until(1e9)
    assert served.records().status.tolist() == [Status.FINISHED]


def test_a_later_request_has_the_bits_of_the_plan_that_ran_when_its_prefill_ended() -> None:
    served = engine(DENSE)
    served.submit(requests((0.0, 32, 40)))
    served.run_until(1.5)
    served.apply(replace(DENSE, kv_bits=(4, 4, 4)))
    first = served.run_until(4.5).kv_used_layer_blocks
    served.submit([replace(requests((5.0, 32, 40))[0], request_id=1)])
    both = served.run_until(7.5).kv_used_layer_blocks
    assert first == 3 * 9  # 36 tokens
    assert both == 3 * 10 + 3 * 4  # 39 tokens at 16 bits, 34 at 4


def test_a_decode_reads_the_bytes_of_its_kv() -> None:
    full, mixed = (engine(plan, context_s=3e-2) for plan in (DENSE, MIXED))
    for served in (full, mixed):
        served.submit(requests((0.0, 32, 3)))
        served.run_until(1e9)
    # context_s is for all layers together; the prompt is at its beginning, and decodes read 32 and 33 tokens.
    rows = full.iterations(), mixed.iterations()
    decodes = [(run.end_s - run.start_s)[1:] for run in rows]
    assert decodes[0] == pytest.approx([1.0 + 3e-2 * tokens for tokens in (32, 33)])
    read = [tokens + tokens * 80 // 128 + tokens * 48 // 128 for tokens in (32, 33)]
    assert decodes[1] == pytest.approx([1.0 + 1e-2 * tokens for tokens in read])


def test_more_requests_run_in_the_same_memory() -> None:
    most = {}
    for name, plan in (("full", DENSE), ("8 bits", replace(DENSE, kv_bits=(8,) * 3))):
        served = engine(plan)  # 300 KV blocks of one layer
        served.submit([replace(one, request_id=i) for i, one in enumerate(requests((0.0, 12, 60)) * 8)])
        served.run_until(1e9)
        most[name] = served.records().preemptions.sum()
    assert most["8 bits"] == 0 < most["full"]
