"""BurstGPT: requests from a university campus to GPT-3.5 and GPT-4; CSV with times in full seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

import numpy as np

from sim.errors import TraceError, nearest
from sim.traces.readers.rows import OnBadRow, RawTable, Rows, read_csv
from sim.traces.trace import Trace

ORIGIN = "https://github.com/HPMLL/BurstGPT (data/, or its releases)"
TIME_QUANTUM_S = 1.0

Failed = Literal["drop", "error"]


def read_burstgpt(
    path: str | Path,
    *,
    failed: Failed = "drop",
    model: str | None = None,
    log_type: str | None = None,
    on_bad_row: OnBadRow = "error",
    sort: bool = False,
    name: str = "burstgpt",
) -> Trace:
    """Return a BurstGPT trace; the first kept request arrives at time 0.

    Its clock has steps of one second, so most arrivals are tied; ``sim.traces.transforms.spread_ties`` spreads them.

    Args:
        path: CSV, plain or gzip: ``Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type``.
        failed: handling of rows with 0 response tokens, which the authors publish as failed requests. "drop"
            leaves them out and counts them in the history; "error" treats them as bad rows.
        model: keep only rows of this model, as the file spells it (ChatGPT, GPT-4); None keeps all.
        log_type: keep only "Conversation log" or "API log"; None keeps both.
        on_bad_row, sort, name: as ``read_azure``.
    Raises:
        TraceError: if the file or a row of it cannot be used, or no row has the requested model or log type.
    Source:
        Wang et al., BurstGPT (KDD 2025, arXiv 2401.17644), section 3; HPMLL/BurstGPT, CC-BY 4.0.
    """
    if failed not in get_args(Failed):
        raise TraceError(f"failed is {failed!r}; {nearest(str(failed), get_args(Failed))}")
    required = ("Timestamp", "Request tokens", "Response tokens")
    filters = {"Model": model, "Log Type": log_type}
    wanted = [column for column, value in filters.items() if value is not None]
    table = read_csv(path, required=(*required, *wanted), on_bad_row=on_bad_row, origin=ORIGIN)
    rows = Rows(table, on_bad_row)
    history = []
    leave_out = np.zeros(len(table.line), dtype=bool)
    for column in wanted:
        other = _differs(table, column, str(filters[column]))
        history.append(f"left out {int((other & ~leave_out).sum()):,} rows whose {column} is not {filters[column]!r}")
        leave_out |= other
    arrival_s = rows.seconds("Timestamp")
    output_tokens = rows.tokens("Response tokens", minimum=0 if failed == "drop" else 1)
    # A failed request was never served, so its prompt may be 0 too. A bad row also reads 0, but is not a failed one.
    answered = output_tokens > 0
    is_failed = ~answered & ~leave_out
    is_failed[list(rows.bad)] = False
    prompt_tokens = rows.tokens("Request tokens", minimum=0)
    rows.reject(answered & (prompt_tokens == 0), "Request tokens", "zero", "a whole number from 1")
    if is_failed.any():
        history.append(f"dropped {int(is_failed.sum()):,} failed requests (0 response tokens)")
    return rows.trace(
        arrival_s=arrival_s,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        leave_out=leave_out | is_failed,
        sort=sort,
        name=name,
        history=history,
        time_quantum_s=TIME_QUANTUM_S,
    )


def _differs(table: RawTable, column: str, value: str) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    values = np.array([text.strip() for text in table.text_column(column).to_pylist()])
    if value not in values:
        raise TraceError(f"{table.path}: no row has {column} {value!r}; {nearest(value, sorted(set(values.tolist())))}")
    different: np.ndarray[tuple[int], np.dtype[np.bool_]] = values != value
    return different
