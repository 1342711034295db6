"""A run as a timeline for Perfetto or Chrome, in the trace event format.

Format: "Trace Event Format" of the Chromium project, which Perfetto reads as Chrome JSON: complete events ``X`` with
``ts`` and ``dur`` in microseconds, counters ``C``, instants ``i`` and names ``M``.

Each run is a process for its engine and one for its requests. Requests lie in lanes, each in the lowest that is free,
so the number of lanes is the most requests that were in the system at once.
"""

from __future__ import annotations

import gzip
import heapq
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sim.atomic import write_whole
from sim.report.run_data import RunData
from sim.types import Floats, Ints

Event = dict[str, Any]
ITERATIONS, CHANGES, TRANSFERS = 1, 2, 1000
"""Threads of the engine: its iterations, its plan changes, and KV transfers from this number on."""


def trace_events(runs: Sequence[RunData]) -> Iterator[Event]:
    """Yield the events of runs: iterations, plan changes, counters, requests, and transfers of KV."""
    for rank, run in enumerate(runs):
        engine, requests = 2 * rank + 1, 2 * rank + 2
        yield _name("process_name", engine, f"{run.label}: engine")
        yield _name("process_name", requests, f"{run.label}: requests")
        yield from _iterations(run, engine)
        yield from _plan_changes(run, engine)
        yield from _counters(run, engine)
        yield from _transfers(run, engine)
        yield from _requests(run, requests)


def write_chrome_trace(path: Path, runs: Sequence[RunData]) -> int:
    """Write the timeline of runs as JSON, compressed if the name ends with ``.gz``; return the number of events."""
    events = list(trace_events(runs))
    content = {
        "traceEvents": events,
        "displayTimeUnit": "ms",
        "otherData": {
            run.label: {name: str(run.provenance.get(name, "")) for name in ("command", "commit")} for run in runs
        },
    }
    text = json.dumps(content, separators=(",", ":"), allow_nan=False).encode()
    packed = gzip.compress(text, mtime=0) if path.suffix == ".gz" else text
    write_whole(path, lambda part: part.write_bytes(packed))
    return len(events)


def _name(kind: str, process: int, name: str, thread: int = 0) -> Event:
    return {"ph": "M", "name": kind, "pid": process, "tid": thread, "args": {"name": name}}


def _us(seconds: float) -> float:
    """Return microseconds to the nanosecond."""
    return round(seconds * 1e6, 3)


def _span(name: str, process: int, thread: int, start_s: float, end_s: float, **args: Any) -> Event:
    ts = _us(start_s)
    # From rounded ends: a span that outlasts the one around it by a nanosecond would break the nesting.
    span = {"ph": "X", "name": name, "pid": process, "tid": thread, "ts": ts, "dur": round(_us(end_s) - ts, 3)}
    return {**span, "args": args} if args else span


def _iterations(run: RunData, process: int) -> Iterator[Event]:
    if run.iterations is None:
        return
    yield _name("thread_name", process, "iterations", ITERATIONS)
    names = ("start_s", "end_s", "prefill_tokens", "decode_requests", "running", "waiting", "preemptions")
    for row in zip(*(run.iterations[name].tolist() for name in names), strict=True):
        start_s, end_s, prefill, decode = row[:4]
        kind = "prefill and decode" if prefill and decode else "prefill" if prefill else "decode"
        yield _span(kind, process, ITERATIONS, start_s, end_s, **dict(zip(names[2:], row[2:], strict=True)))


def _plan_changes(run: RunData, process: int) -> Iterator[Event]:
    """Yield each plan change from its decision until it ran in full, or the next decision superseded it."""
    if run.transitions is None or not len(run.transitions):
        return
    yield _name("thread_name", process, "plan changes and copies", CHANGES)
    names = ("time_s", "ready_s", "from", "to", "bytes_in", "bytes_freed", "preempted", "recomputed_tokens")
    rows = list(zip(*(run.transitions[name].tolist() for name in names), strict=True))
    for at, (time_s, ready_s, before, after, bytes_in, *others) in enumerate(rows):
        superseded = not np.isfinite(ready_s)
        later = [rows[at + 1][0]] if at + 1 < len(rows) else [run.end_s]
        end_s = max(later[0], time_s) if superseded else ready_s
        name = f"copy {bytes_in / 1e9:.2f} GB" if bytes_in else "plan change"
        args = {"from": before, "to": after, "bytes_in": bytes_in, **dict(zip(names[5:], others, strict=True))}
        yield _span(name, process, CHANGES, time_s, end_s, **args, superseded=superseded)


def _counters(run: RunData, process: int) -> Iterator[Event]:
    def counter(name: str, time_s: float, **values: float) -> Event:
        return {"ph": "C", "name": name, "pid": process, "tid": 0, "ts": _us(time_s), "args": values}

    if run.iterations is not None:
        columns = ("start_s", "running", "waiting", "kv_used_share")
        before: tuple[Any, ...] = ()
        for start_s, running, waiting, share in zip(*(run.iterations[c].tolist() for c in columns), strict=True):
            if before != (running, waiting):
                before = (running, waiting)
                yield counter("requests", start_s, running=running, waiting=waiting)
            yield counter("KV blocks in use [%]", start_s, share=round(100 * share, 3))
    if run.kept_share is not None:
        for time_s, share in zip(run.kept_share["time_s"].tolist(), run.kept_share["kept_share"].tolist(), strict=True):
            if run.server is not None:
                yield counter("weights in memory [GB]", time_s, weights=share * run.server.dense_weight_bytes / 1e9)
            else:
                yield counter("weights in memory [% of dense]", time_s, weights=100 * share)
    if run.server is not None:
        for time_s, size in run.server.budget:
            if time_s <= run.end_s:
                yield counter("memory budget [GB]", time_s, budget=size / 1e9)


def _transfers(run: RunData, process: int) -> Iterator[Event]:
    """Yield the transfers of KV from prefill to decode; each in the lowest free lane."""
    if not {"send_s", "sent_s", "sent_bytes"} <= set(run.records):
        return
    send_s, sent_s, sizes = (run.column(name) for name in ("send_s", "sent_s", "sent_bytes"))
    sent = np.flatnonzero(np.isfinite(send_s) & np.isfinite(sent_s))
    lanes = lowest_lanes(send_s[sent], sent_s[sent])
    for lane in range(int(lanes.max()) + 1 if len(lanes) else 0):
        yield _name("thread_name", process, f"KV transfers {lane}", TRANSFERS + lane)
    for row, lane in zip(sent.tolist(), lanes.tolist(), strict=True):
        args = {"request": _id(run, row), "bytes": int(sizes[row])}
        yield _span("KV transfer", process, TRANSFERS + lane, send_s[row], sent_s[row], **args)


def _requests(run: RunData, process: int) -> Iterator[Event]:
    """Yield each request from arrival to end, with its phases inside; a rejected one is an instant."""
    columns = ("arrival_s", "admitted_s", "first_token_s", "finish_s")
    times_s = np.column_stack([run.column(name) for name in columns])
    status = run.records["status"].astype(str).to_numpy()
    end_s = np.where(np.isfinite(times_s[:, 3]), times_s[:, 3], max(run.end_s, 0.0))
    inside = np.flatnonzero(status != "rejected")
    lanes = lowest_lanes(times_s[inside, 0], end_s[inside])
    for lane in range(int(lanes.max()) + 1 if len(lanes) else 0):
        yield _name("thread_name", process, f"lane {lane}", lane + 1)
    for row in np.flatnonzero(status == "rejected").tolist():
        arrival_s = times_s[row, 0]
        yield {
            "ph": "i",
            "name": f"rejected {_id(run, row)}",
            "pid": process,
            "tid": 0,
            "s": "p",
            "ts": _us(arrival_s),
        }
    details = ("prompt_tokens", "produced_tokens", "preemptions", "met_slo", "replica", "prefill_replica")
    shown = {name: run.records[name].tolist() for name in details if name in run.records}
    for row, lane in zip(inside.tolist(), lanes.tolist(), strict=True):
        thread, args = lane + 1, {name: values[row] for name, values in shown.items()}
        arrival_s, admitted_s, first_s, _ = times_s[row]
        yield _span(f"request {_id(run, row)}", process, thread, arrival_s, end_s[row], **args, status=str(status[row]))
        begin_s = arrival_s
        for phase, until_s in (("queued", admitted_s), ("prefill", first_s), ("decode", end_s[row])):
            if not np.isfinite(until_s):  # it was in this phase when the run ended
                yield _span(phase, process, thread, begin_s, end_s[row])
                break
            if until_s > begin_s:
                yield _span(phase, process, thread, begin_s, until_s)
                begin_s = until_s


def _id(run: RunData, row: int) -> int:
    return int(run.records["request_id"].iloc[row]) if "request_id" in run.records else row


def lowest_lanes(start_s: Floats, end_s: Floats) -> Ints:
    """Return the lane of each span: the lowest that no other span holds at its start.

    Args:
        start_s, end_s: float64[n], starts in any order.
    """
    lanes = np.zeros(len(start_s), dtype=np.int64)
    free: list[int] = []
    busy: list[tuple[float, int]] = []
    used = 0
    for at in np.argsort(start_s, kind="stable").tolist():
        while busy and busy[0][0] <= start_s[at]:
            heapq.heappush(free, heapq.heappop(busy)[1])
        if free:
            lane = heapq.heappop(free)
        else:
            lane, used = used, used + 1
        lanes[at] = lane
        heapq.heappush(busy, (float(end_s[at]), lane))
    return lanes
