"""The way of a request to the engine's queue and back: two delays, and two sides from which TTFT and E2E are seen."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from sim.cost.front_end import NO_FRONT_END, FrontEnd, into_queue
from sim.errors import ConfigError
from sim.results.metrics import Slo, as_clients_see, met_slo, records_frame, summarise
from sim.results.records import Records
from sim.traces.trace import Trace
from tests.sim.serving import requests, tiny_engine

FRONT = FrontEnd(front_s=0.25, front_token_s=0.125, back_s=0.5)


def trace(*rows: tuple[float, int, int], **more: Any) -> Trace:
    arrival_s, prompts, outputs = (np.array(column) for column in zip(*rows, strict=True))
    return Trace(arrival_s=arrival_s, prompt_tokens=prompts, output_tokens=outputs, **more)


def served(sent: Trace, front_end: FrontEnd) -> tuple[Records, dict[str, Any]]:
    engine = tiny_engine()
    engine.submit_trace(into_queue(sent, front_end))
    engine.run_until(math.inf)
    slo = Slo(ttft_s=2.0)
    return engine.records(), summarise(
        engine.records(), engine.iterations(), engine.token_gaps(), slo, front_end=front_end
    )


def test_a_request_reaches_the_queue_later_by_a_constant_and_by_its_prompt() -> None:
    assert into_queue(trace((1.0, 4, 9), (3.0, 8, 9)), FRONT).arrival_s.tolist() == [1.75, 4.25]


def test_a_short_prompt_overtakes_a_long_one_and_keeps_its_lengths_and_ids() -> None:
    ids = (np.array([1, 2]), np.array([3]))
    queued = into_queue(trace((1.0, 80, 7), (2.0, 8, 9), hash_ids=ids, name="two", hash_block_tokens=40), FRONT)
    assert queued.arrival_s.tolist() == [3.25, 11.25]
    assert (queued.prompt_tokens.tolist(), queued.output_tokens.tolist()) == ([8, 80], [9, 7])
    assert queued.hash_ids is not None
    assert [row.tolist() for row in queued.hash_ids] == [[3], [1, 2]]
    assert (queued.name, queued.hash_block_tokens) == ("two", 40)
    assert "front end" in queued.history[-1]


def test_requests_that_reach_the_queue_together_keep_their_order() -> None:
    tied = into_queue(trace((0.0, 16, 5), (1.0, 8, 6)), FRONT)
    assert tied.arrival_s.tolist() == [2.25, 2.25]
    assert tied.output_tokens.tolist() == [5, 6]


def test_without_a_front_end_the_trace_is_the_same_one() -> None:
    sent = trace((1.0, 4, 9))
    assert into_queue(sent, NO_FRONT_END) is sent
    assert into_queue(sent, FrontEnd(back_s=1.0)) is sent


def test_clients_see_the_way_in_and_back_and_the_engine_neither() -> None:
    records, summary = served(trace((1.0, 4, 3)), FRONT)
    assert (records.ttft_s.tolist(), records.e2e_s.tolist()) == ([1.0], [3.0])
    seen = as_clients_see(records, FRONT)
    assert (seen.ttft_s.tolist(), seen.e2e_s.tolist()) == ([2.25], [4.25])  # 0.25 + 4 x 0.125 in, 0.5 back
    assert seen.tpot_s.tolist() == records.tpot_s.tolist()
    assert (summary["ttft_s"]["mean"], summary["client_ttft_s"]["mean"]) == (1.0, 2.25)
    assert (summary["e2e_s"]["mean"], summary["client_e2e_s"]["mean"]) == (3.0, 4.25)


def test_without_a_front_end_both_sides_see_the_same() -> None:
    records, summary = served(trace((1.0, 4, 3)), NO_FRONT_END)
    assert as_clients_see(records, NO_FRONT_END) is records
    assert summary["client_ttft_s"] == summary["ttft_s"]
    assert "client_ttft_s" not in records_frame(records, Slo())


def test_a_target_holds_for_the_side_that_the_slo_states() -> None:
    records, summary = served(trace((1.0, 4, 3)), FRONT)
    assert summary["slo_attainment"] == 1.0
    assert met_slo(records, Slo(ttft_s=2.0, side="client"), FRONT).tolist() == [False]
    assert met_slo(records, Slo(ttft_s=2.25, side="client"), FRONT).tolist() == [True]
    assert met_slo(records, Slo(ttft_s=None, e2e_s=4.0), FRONT).tolist() == [True]
    assert met_slo(records, Slo(ttft_s=None, e2e_s=4.0, side="client"), FRONT).tolist() == [False]


def test_the_table_of_requests_has_both_sides() -> None:
    records, _ = served(trace((1.0, 4, 3)), FRONT)
    frame = records_frame(records, Slo(ttft_s=2.0, side="client"), FRONT)
    assert frame[["ttft_s", "client_ttft_s", "e2e_s", "client_e2e_s"]].to_numpy().tolist() == [[1.0, 2.25, 3.0, 4.25]]
    assert frame.met_slo.tolist() == [False]


def test_a_request_that_never_got_a_token_has_no_time_on_either_side() -> None:
    engine = tiny_engine(kv_blocks=5)
    engine.submit(requests((0.0, 3000, 1)))
    engine.run_until(math.inf)
    assert np.isnan(as_clients_see(engine.records(), FRONT).ttft_s).all()


@pytest.mark.parametrize("name", ["front_s", "front_token_s", "back_s"])
@pytest.mark.parametrize("value", [-1e-3, math.nan, math.inf])
def test_a_delay_that_is_no_time_is_refused(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=rf"frontend\.{name} is .*; it must be a number of seconds from 0"):
        FrontEnd(**{name: value})


def test_an_unknown_side_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"slo\.side is 'clint'; .*client"):
        Slo(side="clint")  # type: ignore[arg-type]
