"""Vidur's request traces: CSV with an index, times in seconds, and the tokens of prefill and decode."""

from __future__ import annotations

from pathlib import Path

from sim.traces.readers.files import MAX_BYTES, MAX_ROWS, OnBadRow, TraceFile
from sim.traces.readers.rows import Rows, read_table
from sim.traces.trace import Trace

ORIGIN = "https://github.com/microsoft/vidur (data/processed_traces, commit 7d47513363ec447a741ac5e47241580b47724fbf)"
COLUMNS = ("arrived_at", "num_prefill_tokens", "num_decode_tokens")


def read_vidur(
    path: str | Path,
    *,
    on_bad_row: OnBadRow = "error",
    sort: bool = False,
    max_rows: int = MAX_ROWS,
    max_bytes: int = MAX_BYTES,
    name: str = "vidur",
) -> Trace:
    """Return a trace that Vidur replays; the first arrival is at time 0.

    Args:
        path: CSV (plain or packed), JSON lines or Parquet with ``arrived_at`` in seconds, ``num_prefill_tokens`` and
            ``num_decode_tokens``. Where ``num_total_tokens`` is there, it must be their sum.
        on_bad_row, sort, max_rows, max_bytes, name: as ``read_azure``.
    Raises:
        TraceError: if the file or a row of it cannot be used.
    Source:
        Agrawal et al., Vidur (MLSys 2024); microsoft/vidur, vidur/request_generator, MIT.
    """
    file = TraceFile(path=path, on_bad_row=on_bad_row, max_rows=max_rows, max_bytes=max_bytes, origin=ORIGIN)
    rows = Rows(read_table(file, required=COLUMNS, optional=("num_total_tokens",)))
    arrival_s = rows.times("arrived_at")
    prompt_tokens = rows.tokens("num_prefill_tokens")
    output_tokens = rows.tokens("num_decode_tokens")
    rows.check_total("num_total_tokens", prompt_tokens, output_tokens)
    return rows.trace(
        arrival_s=arrival_s, prompt_tokens=prompt_tokens, output_tokens=output_tokens, sort=sort, name=name
    )
