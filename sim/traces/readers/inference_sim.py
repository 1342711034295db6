"""inference-sim's TraceV2: CSV with times in microseconds, next to a YAML file that states the version."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import yaml

from sim.errors import TraceError
from sim.paths import find_data
from sim.traces.readers.arguments import check_choice
from sim.traces.readers.files import MAX_BYTES, MAX_ROWS, OnBadRow, TraceFile, read_content
from sim.traces.readers.rows import Failed, Rows, read_table
from sim.traces.trace import Trace

ORIGIN = "https://github.com/inference-sim/inference-sim (blis observe, or blis run --trace-output)"
VERSION = 2
HEADER_BYTES = 2**20
STEPS = ("send_time_us", "first_chunk_time_us", "last_chunk_time_us")
COLUMNS = ("arrival_time_us", "input_tokens", "output_tokens")
GOOD_STATUS = ("ok", "")


def read_inference_sim(
    path: str | Path,
    *,
    header: str | Path | None = None,
    failed: Failed = "drop",
    on_bad_row: OnBadRow = "error",
    sort: bool = False,
    max_rows: int = MAX_ROWS,
    max_bytes: int = MAX_BYTES,
    name: str = "inference_sim",
) -> Trace:
    """Return a TraceV2; the first arrival is at time 0.

    Rounds of a session come at the times that the file records; their order is not enforced again.

    Args:
        path: the CSV file with ``arrival_time_us``, ``input_tokens`` and ``output_tokens``. Where the times of sending
            and of the first and last chunk are there, they must be in this order (0 means not recorded).
        header: the YAML file with ``trace_version: 2``; None takes the one with the name of the CSV file, if any.
        failed: handling of rows whose ``status`` is not ok: "drop" leaves them out and counts them; "error" treats
            them as bad rows.
        on_bad_row, sort, max_rows, max_bytes, name: as ``read_azure``.
    Raises:
        TraceError: if a file or a row cannot be used, or the header states another version.
    Source:
        inference-sim/inference-sim, sim/workload/tracev2.go, Apache-2.0.
    """
    check_choice("failed", failed, Failed)
    file = TraceFile(path=path, on_bad_row=on_bad_row, max_rows=max_rows, max_bytes=max_bytes, origin=ORIGIN)
    history = [_check_header(file, header)]
    rows = Rows(read_table(file, required=COLUMNS, optional=(*STEPS, "status")))
    arrival_s = rows.times("arrival_time_us", unit="us")
    is_failed = np.zeros(len(arrival_s), dtype=bool)
    if rows.has("status"):
        is_failed = np.array([status.lower() not in GOOD_STATUS for status in rows.text("status")], dtype=bool)
        if failed == "error":
            rows.reject(is_failed, "status", "failed request", "ok")
    # A request that failed has no tokens.
    prompt_tokens, output_tokens = rows.tokens("input_tokens", minimum=0), rows.tokens("output_tokens", minimum=0)
    for column, tokens in (("input_tokens", prompt_tokens), ("output_tokens", output_tokens)):
        rows.reject(~is_failed & (tokens == 0), column, "zero", "a whole number from 1")
    _check_steps(rows)
    return rows.trace(
        arrival_s=arrival_s,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        leave_out=rows.failed(is_failed, "status is not ok", history),
        sort=sort,
        name=name,
        history=history,
    )


def _check_steps(rows: Rows) -> None:
    """Mark rows as bad whose recorded times are not in order."""
    before = np.zeros(len(rows.table.line))
    for step in ("arrival_time_us", *STEPS):
        if rows.has(step):
            at = rows.numbers(step, minimum=0)
            rows.reject((at > 0) & (at < before), step, "before the step ahead of it", "0, or a time not before it")
            before = np.where(at > 0, at, before)


def _check_header(file: TraceFile, header: str | Path | None) -> str:
    """Check the version that the YAML header states; return what was found, for the history."""
    if header is not None and not isinstance(header, str | Path):
        raise TraceError(f"trace.header is {header!r}; it must be the path of a YAML file")
    csv = Path(file.path)
    if csv.suffix in (".yaml", ".yml"):
        raise TraceError(f"{csv} is the header of a TraceV2; trace.path names its CSV file, trace.header the header")
    if header is None:
        plain = csv.with_suffix("") if csv.suffix in (".gz", ".bz2", ".xz", ".zst") else csv
        found = [plain.with_suffix(suffix) for suffix in (".yaml", ".yml")]
        header = next((path for path in found if find_data(path).is_file()), None)
    if header is None:
        return f"no header file next to {csv}, so its version is not known; read as version {VERSION}"
    content = read_content(TraceFile(path=header, max_bytes=HEADER_BYTES))
    try:
        described: Any = yaml.safe_load(content)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise TraceError(
            f"{header} is not YAML ({' '.join(str(error).split())[:200]}); write trace_version: 2"
        ) from error
    version = described.get("trace_version") if isinstance(described, dict) else None
    if version != VERSION:
        raise TraceError(f"{header}: trace_version is {version!r}; allowed: {VERSION}; convert the trace, or mend it")
    unit = described.get("time_unit", "microseconds")
    if unit not in ("microseconds", "us"):
        raise TraceError(f"{header}: time_unit is {unit!r}; allowed: microseconds, as the names of the columns say")
    return f"version {version} by {header}"
