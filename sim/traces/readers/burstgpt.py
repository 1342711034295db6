"""BurstGPT: requests from a university campus to GPT-3.5 and GPT-4; CSV with times in full seconds.

Its first release has six columns; later ones add ``Session ID`` and ``Elapsed time`` and may write seconds as 5.0.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from sim.errors import TraceError, nearest
from sim.traces.readers.arguments import check_choice
from sim.traces.readers.files import MAX_BYTES, MAX_ROWS, OnBadRow, TraceFile
from sim.traces.readers.rows import Failed, Rows, read_table
from sim.traces.trace import Trace

ORIGIN = "https://github.com/HPMLL/BurstGPT (data/, or its releases)"
TIME_QUANTUM_S = 1.0
COLUMNS = ("Timestamp", "Request tokens", "Response tokens")
OPTIONAL = ("Total tokens", "Elapsed time")


def read_burstgpt(
    path: str | Path,
    *,
    failed: Failed = "drop",
    model: str | None = None,
    log_type: str | None = None,
    on_bad_row: OnBadRow = "error",
    sort: bool = False,
    max_rows: int = MAX_ROWS,
    max_bytes: int = MAX_BYTES,
    name: str = "burstgpt",
) -> Trace:
    """Return a BurstGPT trace; the first kept request arrives at time 0.

    Its clock has steps of one second, so most arrivals are tied; ``sim.traces.transforms.spread_ties`` spreads them.

    Args:
        path: CSV (plain or packed), JSON lines or Parquet:
            ``Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type``.
        failed: handling of rows with 0 response tokens, which the authors publish as failed requests. "drop"
            leaves them out and counts them in the history; "error" treats them as bad rows.
        model: keep only rows of this model, as the file spells it (ChatGPT, GPT-4); None keeps all.
        log_type: keep only "Conversation log" or "API log"; None keeps both.
        on_bad_row, sort, max_rows, max_bytes, name: as ``read_azure``.
    Raises:
        TraceError: if the file or a row of it cannot be used, or no row has the requested model or log type.
    Source:
        Wang et al., BurstGPT (KDD 2025, arXiv 2401.17644), section 3; HPMLL/BurstGPT, CC-BY 4.0.
    """
    check_choice("failed", failed, Failed)
    filters = {"Model": model, "Log Type": log_type}
    wanted = [column for column, value in filters.items() if value is not None]
    file = TraceFile(path=path, on_bad_row=on_bad_row, max_rows=max_rows, max_bytes=max_bytes, origin=ORIGIN)
    rows = Rows(read_table(file, required=(*COLUMNS, *wanted), optional=OPTIONAL))
    history = []
    leave_out = np.zeros(len(rows.table.line), dtype=bool)
    for column in wanted:
        other = _differs(rows, column, str(filters[column]))
        history.append(f"left out {int((other & ~leave_out).sum()):,} rows whose {column} is not {filters[column]!r}")
        leave_out |= other
    arrival_s = rows.times("Timestamp")
    output_tokens = rows.tokens("Response tokens", minimum=0 if failed == "drop" else 1)
    # A failed request was never served, so its prompt may be 0 too. A bad row also reads 0, but is not a failed one.
    answered = output_tokens > 0
    prompt_tokens = rows.tokens("Request tokens", minimum=0)
    rows.reject(answered & (prompt_tokens == 0), "Request tokens", "zero", "a whole number from 1")
    rows.check_total("Total tokens", prompt_tokens, output_tokens)
    rows.check_duration("Elapsed time")
    return rows.trace(
        arrival_s=arrival_s,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        leave_out=leave_out | rows.failed(~answered & ~leave_out, "0 response tokens", history),
        sort=sort,
        name=name,
        history=history,
        time_quantum_s=TIME_QUANTUM_S,
    )


def _differs(rows: Rows, column: str, value: str) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    values = np.array(rows.text(column))
    if value not in values:
        raise TraceError(
            f"{rows.table.path}: no row has {column} {value!r}; {nearest(value, sorted(set(values.tolist())))}"
        )
    different: np.ndarray[tuple[int], np.dtype[np.bool_]] = values != value
    return different
