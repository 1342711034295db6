"""Splitwise's simulator traces: CSV with times in seconds, prompt and output sizes in tokens."""

from __future__ import annotations

from pathlib import Path

from sim.traces.readers.files import MAX_BYTES, MAX_ROWS, OnBadRow, TraceFile
from sim.traces.readers.rows import Rows, read_table
from sim.traces.trace import Trace

ORIGIN = "https://github.com/Mutinifni/splitwise-sim (traces/)"
COLUMNS = ("arrival_timestamp", "prompt_size", "token_size")


def read_splitwise(
    path: str | Path,
    *,
    on_bad_row: OnBadRow = "error",
    sort: bool = False,
    max_rows: int = MAX_ROWS,
    max_bytes: int = MAX_BYTES,
    name: str = "splitwise",
) -> Trace:
    """Return a trace of Splitwise's simulator; the first arrival is at time 0.

    Args:
        path: CSV (plain or packed), JSON lines or Parquet with ``arrival_timestamp`` in seconds, ``prompt_size`` and
            ``token_size``. Where ``batch_size`` is there, it must be 1, because a row is one request here.
        on_bad_row, sort, max_rows, max_bytes, name: as ``read_azure``.
    Raises:
        TraceError: if the file or a row of it cannot be used.
    Source:
        Patel et al., Splitwise (ISCA 2024); Mutinifni/splitwise-sim, generate_trace.py, MIT.
    """
    file = TraceFile(path=path, on_bad_row=on_bad_row, max_rows=max_rows, max_bytes=max_bytes, origin=ORIGIN)
    rows = Rows(read_table(file, required=COLUMNS, optional=("batch_size",)))
    arrival_s = rows.times("arrival_timestamp")
    prompt_tokens = rows.tokens("prompt_size")
    output_tokens = rows.tokens("token_size")
    if rows.has("batch_size"):
        rows.reject(rows.tokens("batch_size") != 1, "batch_size", "not one request", "1")
    return rows.trace(
        arrival_s=arrival_s, prompt_tokens=prompt_tokens, output_tokens=output_tokens, sort=sort, name=name
    )
