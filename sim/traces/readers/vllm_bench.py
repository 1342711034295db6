"""Results of ``vllm bench serve``: one JSON object with a list for each field, one entry per request."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from sim.errors import TraceError
from sim.traces.readers.arguments import check_choice
from sim.traces.readers.files import MAX_BYTES, MAX_ROWS, OnBadRow, TraceFile, read_content
from sim.traces.readers.json_table import load_document
from sim.traces.readers.rows import Failed, Rows
from sim.traces.readers.table import RawTable
from sim.traces.trace import MAX_ARRIVAL_S, Trace
from sim.types import Floats

REQUIRED = ("start_times", "input_lens", "output_lens")
OPTIONAL = ("errors", "ttfts", "itls")
ONE_RESULT = "name a file with one result; of those that --append-result wrote, keep one"


def read_vllm_bench(
    path: str | Path,
    *,
    failed: Failed = "drop",
    on_bad_row: OnBadRow = "error",
    max_rows: int = MAX_ROWS,
    max_bytes: int = MAX_BYTES,
    name: str = "vllm_bench",
) -> Trace:
    """Return the requests that a benchmark sent, as seen by it: when each started, its prompt and its output.

    Args:
        path: what ``vllm bench serve --save-result --save-detailed`` wrote, plain or packed, with ``start_times``.
        failed: handling of requests with an error or without output: "drop" leaves them out and counts them; "error"
            treats them as bad rows.
        on_bad_row, max_rows, max_bytes, name: as ``read_azure``. Rows are always sorted by arrival.
    Raises:
        TraceError: if the file or an entry of it cannot be used.
    Source:
        vllm-project/vllm, vllm/benchmarks/serve.py, Apache-2.0.
    """
    check_choice("failed", failed, Failed)
    file = TraceFile(path=path, on_bad_row=on_bad_row, max_rows=max_rows, max_bytes=max_bytes)
    result = load_document(file, read_content(file), hint=ONE_RESULT)
    rows = Rows(_table(file, result))
    arrival_s = rows.times("start_times")
    prompt_tokens = rows.tokens("input_lens")
    output_tokens = rows.tokens("output_lens", minimum=0 if failed == "drop" else 1)
    is_failed = output_tokens == 0
    if rows.has("errors"):
        erred = np.array([bool(text) for text in rows.text("errors")], dtype=bool)
        if failed == "error":
            rows.reject(erred, "errors", "failed request", "an empty text")
        is_failed |= erred
    _check_latencies(rows, arrival_s, result.get("duration"))
    history: list[str] = []
    return rows.trace(
        arrival_s=arrival_s,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        leave_out=rows.failed(is_failed, "an error or no output", history),
        sort=True,
        name=name,
        history=history,
    )


def _table(file: TraceFile, result: Any) -> RawTable:
    if not isinstance(result, dict) or "input_lens" not in result:
        raise TraceError(
            f"{file.path} has no input_lens, so it is no detailed result of vllm bench serve; "
            "run it with --save-result --save-detailed"
        )
    columns = {name: result[name] for name in (*REQUIRED, *OPTIONAL) if result.get(name) is not None}
    missing = [name for name in REQUIRED if name not in columns]
    if missing:
        raise TraceError(
            f"{file.path} has no {missing[0]}, so its requests cannot be placed in time; run vllm bench serve of a "
            "version that writes start_times, with --save-detailed"
        )
    lengths = {name: len(column) if isinstance(column, list) else -1 for name, column in columns.items()}
    if len(set(lengths.values())) != 1 or -1 in lengths.values():
        raise TraceError(
            f"{file.path}: lists of different length: {lengths} (-1: no list); each needs one entry per request"
        )
    requests = lengths["input_lens"]
    if requests == 0:
        raise TraceError(f"{file.path} has no requests; it needs at least one")
    return RawTable(file=file, unit="entry", line=np.arange(1, requests + 1), columns=columns)


def _check_latencies(rows: Rows, arrival_s: Floats, duration_s: Any) -> None:
    """Mark entries as bad that end after the benchmark, or whose latencies are no times."""
    end_s = arrival_s - arrival_s[~rows.is_bad].min(initial=np.inf)
    if rows.has("ttfts"):
        end_s = end_s + rows.seconds("ttfts")
    if rows.has("itls"):
        gaps = [_total(cell) for cell in rows.table.columns["itls"]]
        rows.reject(np.isnan(gaps), "itls", "not a list of seconds", "a list of numbers from 0")
        end_s = end_s + np.nan_to_num(gaps)
    known = (
        isinstance(duration_s, int | float) and not isinstance(duration_s, bool) and 0 <= duration_s <= MAX_ARRIVAL_S
    )
    if known and rows.has("ttfts"):
        # One percent and a second for the clock of the benchmark, which starts a little before the first request.
        rows.reject(
            end_s > 1.01 * duration_s + 1.0, "ttfts", "ends after the benchmark", f"an end within {duration_s:g} s"
        )


def _total(cell: Any) -> float:
    """Return the sum of a list of seconds, NaN for anything else."""
    if not isinstance(cell, list) or any(isinstance(gap, bool) or not isinstance(gap, int | float) for gap in cell):
        return math.nan
    if not all(gap >= 0 for gap in cell):
        return math.nan
    return math.inf if any(gap > MAX_ARRIVAL_S for gap in cell) else float(sum(cell))
