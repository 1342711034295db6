"""The timeline for Perfetto: valid JSON, and spans that add up to what the run recorded."""

from __future__ import annotations

import gzip
import itertools
import json
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from sim.report.chrome_trace import ITERATIONS, lowest_lanes, trace_events, write_chrome_trace
from sim.report.run_data import RunData


def events_of(run: RunData, kind: str, process: int) -> list[dict[str, Any]]:
    return [event for event in trace_events([run]) if event["ph"] == kind and event["pid"] == process]


def starts_ns(span: dict[str, Any]) -> int:
    return round(span["ts"] * 1000)


def ends_ns(span: dict[str, Any]) -> int:
    return round((span["ts"] + span["dur"]) * 1000)


def test_the_file_is_json_and_a_compressed_one_holds_the_same(run: RunData, tmp_path: Path) -> None:
    number = write_chrome_trace(tmp_path / "a.json", [run])
    write_chrome_trace(tmp_path / "a.json.gz", [run])
    text = (tmp_path / "a.json").read_text()
    content = json.loads(text)
    assert len(content["traceEvents"]) == number
    assert gzip.decompress((tmp_path / "a.json.gz").read_bytes()).decode() == text
    for event in content["traceEvents"]:
        assert event.keys() >= {"ph", "pid", "tid", "name"}
        assert event["ph"] == "M" or event["ts"] >= 0
        assert event["ph"] != "X" or event["dur"] >= 0


def test_the_durations_of_iterations_add_up_to_the_time_that_they_took(run: RunData) -> None:
    assert run.iterations is not None
    spans = [event for event in events_of(run, "X", 1) if event["tid"] == ITERATIONS]
    assert len(spans) == run.summary["iterations"]
    busy_s = (run.iterations["end_s"] - run.iterations["start_s"]).sum()
    assert sum(span["dur"] for span in spans) / 1e6 == pytest.approx(busy_s, rel=1e-6)
    assert sum(span["args"]["prefill_tokens"] for span in spans) == run.iterations["prefill_tokens"].sum()
    for before, after in itertools.pairwise(spans):
        assert ends_ns(before) <= starts_ns(after)


def test_the_phases_of_a_request_add_up_to_its_latencies(run: RunData) -> None:
    lanes: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for event in events_of(run, "X", 2):
        lanes[event["tid"]].append(event)
    total: dict[str, float] = defaultdict(float)
    for spans in lanes.values():
        free_from_ns = 0
        for span in spans:
            name = span["name"].split(" ")[0]
            total[name] += span["dur"] / 1e6
            if name == "request":  # its phases follow, inside it
                assert starts_ns(span) >= free_from_ns
                free_from_ns = ends_ns(span)
            else:
                assert ends_ns(span) <= free_from_ns
    finished = run.records[run.records["status"].astype(str) == "finished"]
    assert len(finished) + run.summary["rejected"] == run.summary["requests"]
    assert total["request"] == pytest.approx(finished["e2e_s"].sum(), rel=1e-6)
    assert total["queued"] + total["prefill"] == pytest.approx(finished["ttft_s"].sum(), rel=1e-6)
    assert total["decode"] == pytest.approx((finished["finish_s"] - finished["first_token_s"]).sum(), rel=1e-6)


def test_rejected_requests_plan_changes_and_the_budget_are_there(run: RunData) -> None:
    assert len(events_of(run, "i", 2)) == run.summary["rejected"] > 0
    copied = [e for e in events_of(run, "X", 1) if e["tid"] != ITERATIONS]
    assert run.transitions is not None
    assert sum(e["args"]["bytes_in"] for e in copied) == run.transitions["bytes_in"].sum() > 0
    assert run.server is not None
    budgets = [e["args"]["budget"] * 1e9 for e in events_of(run, "C", 1) if e["name"] == "memory budget [GB]"]
    assert budgets == pytest.approx([size for time_s, size in run.server.budget if time_s <= run.end_s])


def test_an_unfinished_request_ends_with_the_run_and_transfers_have_lanes(run: RunData) -> None:
    frame = pd.DataFrame(
        {
            **{name: [0.0, 1.0, 1.0] for name in ("ttft_s", "tpot_s", "e2e_s")},
            "arrival_s": [0.0, 1.0, 1.0],
            "admitted_s": [0.0, 1.5, np.nan],
            "first_token_s": [1.0, np.nan, np.nan],
            "finish_s": [4.0, np.nan, np.nan],
            "prompt_tokens": [1, 2, 3],
            "produced_tokens": [1, 0, 0],
            "preemptions": 0,
            "met_slo": False,
            "status": ["finished", "running", "waiting"],
            "send_s": [1.0, 1.2, np.nan],
            "sent_s": [2.0, 1.5, np.nan],
            "sent_bytes": [10, 20, 0],
        }
    )
    short = replace(run, records=frame, iterations=None, transitions=None, kept_share=None, server=None)
    spans = [(e["name"], e["ts"] / 1e6, e["dur"] / 1e6) for e in events_of(short, "X", 2)]
    assert spans == [
        ("request 0", 0.0, 4.0),
        ("prefill", 0.0, 1.0),
        ("decode", 1.0, 3.0),
        ("request 1", 1.0, 3.0),
        ("queued", 1.0, 0.5),
        ("prefill", 1.5, 2.5),
        ("request 2", 1.0, 3.0),
        ("queued", 1.0, 3.0),
    ]
    sent = [(e["tid"], e["args"]["bytes"]) for e in events_of(short, "X", 1)]
    assert sent == [(1000, 10), (1001, 20)]


def test_a_span_takes_the_lowest_lane_that_is_free_at_its_start() -> None:
    start_s, end_s = np.array([0.0, 1.0, 2.0, 3.0, 3.0]), np.array([2.0, 9.0, 3.0, 4.0, 5.0])
    assert lowest_lanes(start_s, end_s).tolist() == [0, 1, 0, 0, 2]
