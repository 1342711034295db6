"""A batch formed while the iteration before it runs (vLLM's asynchronous scheduling): what comes too late for it.

Each iteration takes one second here. That the compiled engine follows the plain one is tested in test_kernel.py.
"""

from __future__ import annotations

import math

import numpy as np
import pytest

from sim.engine.protocol import EngineConfig
from sim.engine.sim_engine import SimEngine
from sim.results.records import Records, Status
from tests.sim.engine.kernel_cases import random_case, serve
from tests.sim.serving import requests, tiny_engine

Row = tuple[float, int, int]


def served(*rows: Row, ahead: bool = True, **settings: object) -> SimEngine:
    engine = tiny_engine(schedules_ahead=ahead, **settings)  # type: ignore[arg-type]
    engine.submit(requests(*rows))
    engine.run_until(math.inf)
    return engine


def records(*rows: Row, ahead: bool = True, **settings: object) -> Records:
    return served(*rows, ahead=ahead, **settings).records()


def test_an_engine_does_not_schedule_ahead_unless_it_is_set() -> None:
    assert not EngineConfig().schedules_ahead


def test_a_lone_request_on_an_idle_engine_waits_no_longer() -> None:
    row = (2.0, 10, 5)
    assert records(row).ttft_s.tolist() == [1.0]
    assert records(row).finish_s.tolist() == records(row, ahead=False).finish_s.tolist()


@pytest.mark.parametrize("arrival_s", [0.25, 0.5, 1.0])  # an arrival at the end of an iteration is too late as well
def test_a_request_that_comes_during_an_iteration_waits_one_iteration_more(arrival_s: float) -> None:
    rows = ((0.0, 10, 8), (arrival_s, 10, 1))
    assert records(*rows, ahead=False).first_token_s[1] == 2.0
    assert records(*rows).first_token_s[1] == 3.0


def test_a_prompt_in_chunks_waits_once() -> None:
    rows = ((0.0, 10, 20), (0.5, 150, 1))
    assert records(*rows).first_token_s[1] == records(*rows, ahead=False).first_token_s[1] + 1.0


def test_a_request_starts_at_once_when_the_batch_formed_ahead_is_empty() -> None:
    assert records((0.0, 10, 1), (0.5, 10, 1)).first_token_s.tolist() == [1.0, 2.0]


def test_the_place_of_a_request_that_ends_is_taken_one_iteration_later() -> None:
    rows = ((0.0, 4, 2), (0.0, 4, 9), (0.0, 4, 1))
    assert records(*rows, max_running=2, ahead=False).first_token_s[2] == 3.0
    assert records(*rows, max_running=2).first_token_s[2] == 4.0


def test_the_memory_of_a_request_that_ends_is_taken_one_iteration_later() -> None:
    rows = ((0.0, 8, 2), (0.0, 4, 4), (0.0, 12, 1))  # 3, 2 and 3 KV blocks
    assert records(*rows, kv_blocks=5, ahead=False).first_token_s[2] == 3.0
    assert records(*rows, kv_blocks=5).first_token_s[2] == 4.0


def test_a_request_is_preempted_where_memory_is_freed_too_late() -> None:
    # At 2 s the first request frees two KV blocks, and the second needs one more.
    rows = ((0.0, 4, 2), (0.0, 7, 6))
    assert records(*rows, kv_blocks=4, ahead=False).preemptions.tolist() == [0, 0]
    assert records(*rows, kv_blocks=4).preemptions.tolist() == [0, 1]


def test_the_token_that_a_preempted_request_gets_from_the_iteration_before_counts() -> None:
    found = records((0.0, 4, 2), (0.0, 7, 6), kv_blocks=4)
    assert found.produced_tokens.tolist() == [2, 6]
    assert (found.status == Status.FINISHED).all()


def test_decodes_alone_take_the_time_that_they_take_without() -> None:
    rows = tuple((0.0, 8, 3 + i) for i in range(6))
    assert np.array_equal(records(*rows).finish_s, records(*rows, ahead=False).finish_s)


@pytest.mark.parametrize("scheduler", ["chunked", "prefill_first"])
def test_no_request_is_lost_and_memory_stays_in_its_pool(scheduler: str) -> None:
    rng = np.random.default_rng(3)
    for _ in range(10):
        rows = [(float(t), int(p), int(o)) for t, p, o in zip(
            np.cumsum(rng.exponential(1.0, 30)), rng.integers(1, 30, 30), rng.integers(1, 30, 30), strict=True
        )]  # fmt: skip
        engine = served(*rows, scheduler=scheduler, kv_blocks=20, max_running=4, prefix_caching=False)
        assert (engine.records().status == Status.FINISHED).all()
        assert engine.iterations().kv_used_share.max() <= 1.0
        assert engine.run_until(1e6).kv_used_layer_blocks == 0


def test_random_cases_schedule_ahead_and_differ_by_it() -> None:
    """Otherwise the comparison of the two engines would not cover it."""
    cases = [case for case in map(random_case, range(40)) if case.config.schedules_ahead]
    assert len(cases) >= 8
    assert sum(bool(serve(SimEngine, case)[0].records().preemptions.any()) for case in cases[:8]) >= 1
