"""Preemption by swapping to host memory, and weight copies that hold up the engine.

Each iteration takes one second here. That the compiled engine follows the plain one is tested in test_kernel.py.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sim.cost.memory import kv_block_layer_bytes
from sim.cost.plan import dense_plan, drop, with_mask
from sim.engine.protocol import EngineConfig
from sim.engine.sim_engine import SimEngine
from sim.errors import ConfigError
from sim.policies.fixed import static_plan
from sim.results.records import Status
from tests.sim.engine.plain_engine import PlainEngine
from tests.sim.serving import TINY, linear_latency, requests, tiny_engine

DENSE = dense_plan(TINY)
BLOCK_BYTES = TINY.num_layers * kv_block_layer_bytes(TINY, 4)
# Two requests of four KV blocks each fill the pool; the second one lacks a block when both have 16 tokens.
ROWS = ((0.0, 12, 20), (0.0, 12, 8))


def served(*rows: tuple[float, int, int], **settings: object) -> SimEngine:
    arguments = {"kv_blocks": 8, "preemption": "swap", "host_kv_blocks": 100, "host_to_device_bytes_per_s": 1e15}
    engine = tiny_engine(**{**arguments, **settings})  # type: ignore[arg-type]
    engine.submit(requests(*rows))
    engine.run_until(math.inf)
    return engine


@pytest.mark.parametrize("scheduler", ["chunked", "prefill_first"])
def test_a_swapped_request_computes_nothing_again_and_a_recomputed_one_all(scheduler: str) -> None:
    tokens = sum(prompt for _, prompt, _ in ROWS)
    swapped = served(*ROWS, scheduler=scheduler)
    assert swapped.records().preemptions.tolist() == [0, 1]
    assert swapped.iterations().prefill_tokens.sum() == tokens
    again = served(*ROWS, scheduler=scheduler, preemption="recompute", host_kv_blocks=0)
    assert again.records().preemptions.tolist() == [0, 1]
    assert again.iterations().prefill_tokens.sum() > tokens
    assert swapped.records().produced_tokens.tolist() == again.records().produced_tokens.tolist() == [20, 8]


def test_a_copy_out_and_one_back_each_lengthen_an_iteration_by_its_bytes() -> None:
    fast, slow = served(*ROWS), served(*ROWS, host_to_device_bytes_per_s=BLOCK_BYTES / 0.25)
    longer = np.diff(slow.iterations().start_s) - np.diff(fast.iterations().start_s)
    # 16 tokens in 4 blocks of 0.25 s each, out and back.
    assert longer[longer > 1e-6].tolist() == pytest.approx([1.0, 1.0])


def test_a_host_that_is_full_lets_the_request_be_computed_again() -> None:
    engine = served(*ROWS, host_kv_blocks=3)
    assert engine.records().preemptions.tolist() == [0, 1]
    assert engine.iterations().prefill_tokens.sum() > 24
    assert engine.host_layer_blocks == (0, 9)


@pytest.mark.parametrize("scheduler", ["chunked", "prefill_first"])
def test_a_swapped_request_comes_back_before_a_new_one_is_admitted(scheduler: str) -> None:
    """The new request would fit while the swapped one does not, and still waits for it."""
    rows = (*ROWS, (7.5, 2, 2))
    records = served(*rows, scheduler=scheduler).records()
    alone = served(*ROWS, scheduler=scheduler).records()
    assert records.finish_s[1] <= alone.finish_s[1] + 1.0  # one iteration for the new prompt alone
    assert records.first_token_s[2] > alone.finish_s[0]
    assert (records.status == Status.FINISHED).all()


def test_kv_on_the_host_is_dropped_when_other_mha_blocks_run_and_stays_when_only_ffn_blocks_change() -> None:
    for mask, recomputed in ((drop(TINY, mha=[0]), True), (drop(TINY, ffn=[0]), False)):
        engine = tiny_engine(kv_blocks=8, preemption="swap", host_kv_blocks=100)
        engine.submit(requests(*ROWS))
        engine.run_until(7.5)
        assert engine.host_layer_blocks[0] == 12
        engine.apply(with_mask(DENSE, mask))
        engine.run_until(math.inf)
        assert (engine.iterations().prefill_tokens.sum() > 24) == recomputed
        assert engine.host_layer_blocks == (0, 300)


def test_a_plan_change_that_swaps_requests_out_says_that_nothing_is_computed_again() -> None:
    for preemption, host in (("swap", 100), ("recompute", 0)):
        engine = tiny_engine(
            kv_blocks=8, preemption=preemption, host_kv_blocks=host, plan=static_plan(TINY, weight_bits=4),
            host_to_device_bytes_per_s=1e9,
        )  # fmt: skip
        engine.submit(requests((0.0, 12, 20), (0.0, 12, 20)))
        engine.run_until(2.5)
        engine.apply(static_plan(TINY, weight_bits=(16, 4, 4)))
        engine.run_until(math.inf)
        rows = engine.transitions()
        assert rows.preempted.sum() > 0
        assert (rows.recomputed_tokens.sum() > 0) == (preemption == "recompute")


ANY_ROWS = st.lists(
    st.tuples(st.floats(0, 20, allow_nan=False), st.integers(1, 60), st.integers(1, 25)), min_size=2, max_size=20
)


@given(rows=ANY_ROWS, host=st.integers(1, 30), first=st.booleans(), times=st.lists(st.floats(0, 60), max_size=8))
def test_held_and_free_kv_blocks_of_the_host_add_up(
    rows: list[tuple[float, int, int]], host: int, first: bool, times: list[float]
) -> None:
    engine = tiny_engine(
        kv_blocks=22, preemption="swap", host_kv_blocks=host, scheduler="prefill_first" if first else "chunked"
    )
    engine.submit(requests(*sorted(rows)))
    for time_s in sorted(times):
        engine.run_until(time_s)
        held, free = engine.host_layer_blocks
        assert held + free == TINY.num_layers * host
        assert min(held, free) >= 0
    engine.run_until(math.inf)
    assert engine.host_layer_blocks == (0, TINY.num_layers * host)
    assert (engine.records().status == Status.FINISHED).all()


def test_no_iteration_starts_during_a_blocking_copy_and_each_layer_takes_its_seconds_more() -> None:
    plan = static_plan(TINY, weight_bits=4)
    ends = []
    for copying, layer_s in (("overlapped", 2.0), ("blocking", 2.0), ("blocking", 4.0)):
        engine = tiny_engine(copying=copying, host_to_device_bytes_per_s=1e12, copy_layer_s=layer_s)  # type: ignore[arg-type]
        engine.submit(requests((0.0, 10, 10)))
        engine.run_until(2.5)
        engine.apply(plan)
        engine.run_until(math.inf)
        ends.append(float(engine.records().finish_s[0]))
        assert engine.transitions().bytes_in.sum() > 0
    assert ends == pytest.approx([10.0, 16.0, 22.0], abs=1e-3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"preemption": "swap"}, "the host has no room"),
        ({"host_kv_blocks": 5}, "set engine.preemption=swap, or engine.host_kv_blocks=0"),
        ({"preemption": "swapp"}, "did you mean 'swap'"),
        ({"copying": "block"}, "did you mean 'blocking'"),
        ({"preemption": "swap", "host_kv_blocks": -1}, "host_kv_blocks is -1; it must be a whole number from 0"),
        ({"preemption": "swap", "host_kv_blocks": 10**18}, "lower engine.host_kv_blocks"),
        ({"preemption": "swap", "host_kv_blocks": 8, "prefix_caching": True}, "set one of them otherwise"),
    ],
)
def test_settings_that_do_not_fit_together_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EngineConfig(**settings)  # type: ignore[arg-type]


def test_a_swapped_request_whose_client_leaves_frees_its_host_memory() -> None:
    arguments = {"kv_blocks": 8, "preemption": "swap", "host_kv_blocks": 100}
    model = tiny_engine(**arguments)  # type: ignore[arg-type]
    engine = PlainEngine(
        model=TINY, latency=linear_latency(), config=model.config, plan=DENSE, budget_bytes=model.budget
    )
    engine.submit(requests(*ROWS))
    engine.run_until(7.5)
    assert engine.host_layer_blocks == (12, 288)
    engine.cancel(1)
    assert engine.host_layer_blocks == (0, 300)
    engine.run_until(math.inf)
    engine.check()
    assert engine.records().status.tolist() == [Status.FINISHED, Status.REJECTED]
