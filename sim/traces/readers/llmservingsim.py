"""LLMServingSim's datasets: JSON lines with arrivals in nanoseconds."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from sim.traces.readers.files import MAX_BYTES, MAX_ROWS, OnBadRow, TraceFile
from sim.traces.readers.rows import Rows, read_table
from sim.traces.trace import Trace

ORIGIN = "https://github.com/casys-kaist/LLMServingSim (dataset/)"
COLUMNS = ("arrival_time_ns", "input_toks", "output_toks")
IDS = {"input_tok_ids": "input_toks", "output_tok_ids": "output_toks"}


def read_llmservingsim(
    path: str | Path,
    *,
    on_bad_row: OnBadRow = "error",
    sort: bool = False,
    max_rows: int = MAX_ROWS,
    max_bytes: int = MAX_BYTES,
    name: str = "llmservingsim",
) -> Trace:
    """Return an LLMServingSim dataset as a trace; the first arrival is at time 0.

    Args:
        path: JSON lines (plain or packed), CSV or Parquet with ``arrival_time_ns``, ``input_toks`` and
            ``output_toks``. The ids of tokens are not used; a row must not have more of them than tokens.
        on_bad_row, sort, max_rows, max_bytes, name: as ``read_azure``.
    Raises:
        TraceError: if the file or a row of it cannot be used.
    Source:
        Cho et al., LLMServingSim (IISWC 2024); casys-kaist/LLMServingSim, MIT.
    """
    file = TraceFile(path=path, on_bad_row=on_bad_row, max_rows=max_rows, max_bytes=max_bytes, origin=ORIGIN)
    rows = Rows(read_table(file, required=COLUMNS, optional=tuple(IDS)))
    arrival_s = rows.times("arrival_time_ns", unit="ns")
    tokens = {column: rows.tokens(column) for column in IDS.values()}
    history = []
    for ids, column in IDS.items():
        if rows.has(ids):
            cells = rows.table.columns[ids]
            lists = cells if isinstance(cells, list) else cells.to_pylist()
            count = np.array([len(cell) if isinstance(cell, list) else 0 for cell in lists], dtype=np.int64)
            rows.reject(count > tokens[column], ids, f"more ids than {column}", f"at most {column} ids")
            history.append(f"{ids} are not used")
    return rows.trace(
        arrival_s=arrival_s,
        prompt_tokens=tokens["input_toks"],
        output_tokens=tokens["output_toks"],
        sort=sort,
        name=name,
        history=history,
    )
