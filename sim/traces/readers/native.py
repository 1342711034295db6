"""This project's own trace format, as CSV, JSONL or Parquet: arrival_s, prompt_tokens, output_tokens, hash_ids.

Files with the same content under other names and in another unit of time are read too.
"""

from __future__ import annotations

import gzip
import io
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pa_parquet

from sim.atomic import write_whole
from sim.errors import TraceError, nearest
from sim.traces.readers.arguments import check_choice, check_name
from sim.traces.readers.files import MAX_BYTES, MAX_ROWS, OnBadRow, TraceFile
from sim.traces.readers.hash_ids import read_hash_ids
from sim.traces.readers.rows import Rows, TimeUnit, read_table
from sim.traces.readers.sessions import think_sessions
from sim.traces.trace import HASH_BLOCK_TOKENS, Trace

REQUIRED = ("arrival_s", "prompt_tokens", "output_tokens")
COLUMNS = {
    "arrival": "arrival_s",
    "prompt": "prompt_tokens",
    "output": "output_tokens",
    "hash_ids": "hash_ids",
    "session": "session_id",
    "think": "think_s",
}
"""What ``columns`` of ``read_trace`` may rename, with the names of the own format."""
NAMING = "other names: 'trace.columns={arrival: NAME, prompt: NAME, output: NAME}'"
BLOCK_COLUMN = "hash_block_tokens"
"""Written only for ids of another number of tokens than 512; every row has the same value."""


def read_trace(
    path: str | Path,
    *,
    columns: Mapping[str, str | None] | None = None,
    time_unit: TimeUnit = "s",
    on_bad_row: OnBadRow = "error",
    sort: bool = False,
    rebase: bool = False,
    time_quantum_s: float = 0.0,
    max_rows: int = MAX_ROWS,
    max_bytes: int = MAX_BYTES,
    name: str | None = None,
) -> Trace:
    """Return a trace in the project's own format; the content, not the name, decides between CSV, JSON and Parquet.

    Columns: ``arrival_s`` (seconds), ``prompt_tokens``, ``output_tokens`` and, optionally, ``hash_ids`` (a list of
    ids; in CSV separated by spaces). With ``session_id`` and ``think_s`` rows are turns of sessions, in their order.
    One with a think time arrives that long after the turn before it has ended, whatever its ``arrival_s``, which may be
    empty; a first turn with one, after any session that has ended (sim/traces/sessions.py). Other columns are ignored.
    CSV may have comma, semicolon, tab or bar between values; JSON is one object a line or one list of objects.

    Args:
        path: the file; plain, gzip, bz2, xz or zstd.
        columns: how the file names ``arrival``, ``prompt``, ``output``, ``hash_ids``, ``session`` and ``think``, where
            it has other names; None takes the own name.
        time_unit: what arrivals and think times count: s, ms, us or ns; iso for dates, which are recognized without it
            and always count from the first.
        on_bad_row, sort, max_rows, max_bytes: as ``read_azure``.
        rebase: shift arrivals so that the first is at 0. Off by default, because time 0 has a meaning in this format;
            Unix times need it.
        time_quantum_s: step of the clock that recorded the arrivals, 0 for a fine one.
        name: the trace's name; None takes the file's name.
    Raises:
        TraceError: if the file or a row of it cannot be used.
    """
    check_choice("time_unit", time_unit, TimeUnit)
    file = TraceFile(path=path, on_bad_row=on_bad_row, max_rows=max_rows, max_bytes=max_bytes, naming=NAMING)
    named = column_names(columns)
    required, optional = [named[own] for own in REQUIRED], [BLOCK_COLUMN]
    for key in ("hash_ids", "session", "think"):
        (required if columns and columns.get(key) else optional).append(named[COLUMNS[key]])
    rows = Rows(read_table(file, required=required, optional=optional))
    history: list[str] = []
    hash_ids = read_hash_ids(rows, history, name=named["hash_ids"]) if rows.has(named["hash_ids"]) else None
    in_sessions = rows.has(named["think_s"])
    arrival_s = rows.times(named["arrival_s"], unit=time_unit, rebase=rebase, missing=in_sessions)
    sessions = None
    if in_sessions:
        sessions = think_sessions(
            rows,
            arrival_s,
            rows.times(named["think_s"], unit="s" if time_unit == "iso" else time_unit, rebase=False, missing=True),
            time=named["arrival_s"],
            session=named["session_id"],
            think=named["think_s"],
        )
        arrival_s = sessions.arrival_s
    return rows.trace(
        arrival_s=arrival_s,
        prompt_tokens=rows.tokens(named["prompt_tokens"]),
        output_tokens=rows.tokens(named["output_tokens"]),
        hash_ids=hash_ids,
        sort=sort or in_sessions,  # a file may list one session after the other
        session=None if sessions is None else sessions.session,
        think_s=None if sessions is None else sessions.think_s,
        rebase=rebase,
        name=name or Path(path).name.split(".")[0],
        history=history,
        time_quantum_s=time_quantum_s,
        hash_block_tokens=_block_tokens(rows),
    )


def column_names(columns: Mapping[str, str | None] | None) -> dict[str, str]:
    """Return the name in the file of each column of the own format.

    Raises:
        TraceError: for an unknown key, or a name that is no text or stands for two columns.
    """
    columns = {} if columns is None else columns
    if not isinstance(columns, Mapping):
        raise TraceError(
            f"trace.columns is {columns!r}; write it as trace.columns={{arrival: NAME, prompt: NAME, output: NAME}}"
        )
    for key, value in columns.items():
        if key not in COLUMNS:
            raise TraceError(f"trace.columns has {key!r}; {nearest(str(key), COLUMNS)}")
        if value is not None:
            check_name(f"columns.{key}", value)
    named = {own: str(columns.get(key) or own).strip() for key, own in COLUMNS.items()}
    doubled = [value for value in named.values() if list(named.values()).count(value) > 1]
    if doubled:
        raise TraceError(f"trace.columns takes {doubled[0]!r} for two columns; name each column once")
    return named


def _block_tokens(rows: Rows) -> int | None:
    """Return the tokens per hash id that the file states, the same in every row, or None."""
    if not rows.has(BLOCK_COLUMN):
        return None
    stated = rows.tokens(BLOCK_COLUMN)
    good = stated[~rows.is_bad]
    if len(good) == 0:
        return None
    rows.reject(stated != good[0], BLOCK_COLUMN, "not that of the other rows", f"{good[0]} in every row")
    return int(good[0])


def write_trace(trace: Trace, path: str | Path) -> Path:
    """Write a trace in the project's own format and return the path; the file appears complete or not at all.

    The suffix chooses the format: ``.csv``, ``.jsonl`` or ``.parquet``, the first two also with ``.gz``. Reading the
    file gives an equal trace. Name, source and history are not written.

    Raises:
        TraceError: for another suffix.
    """
    path = Path(path)
    suffixes = [suffix for suffix in path.suffixes if suffix != ".gz"]
    writers: dict[str, Callable[[Trace], bytes]] = {
        ".csv": _csv_bytes,
        ".jsonl": _jsonl_bytes,
        ".parquet": _parquet_bytes,
    }
    kind = suffixes[-1] if suffixes else ""
    if kind not in writers or (kind == ".parquet" and path.suffix == ".gz"):
        raise TraceError(
            f"{path}: a trace cannot be written as {''.join(path.suffixes[-2:]) or 'a file without suffix'!r}; "
            f"{nearest(kind, [*writers, '.csv.gz', '.jsonl.gz'])}"
        )
    content = writers[kind](trace)
    if path.suffix == ".gz":
        content = gzip.compress(content, mtime=0)  # without a time stamp, equal traces give equal files
    write_whole(path, lambda part: part.write_bytes(content))
    return path


def _arrow(trace: Trace) -> pa.Table:
    columns = {name: pa.array(getattr(trace, name)) for name in REQUIRED}
    if trace.hash_ids is not None:
        counts = np.fromiter(map(len, trace.hash_ids), dtype=np.int64, count=len(trace))
        offsets = np.concatenate(([0], np.cumsum(counts))).astype(np.int32)
        flat = np.concatenate(trace.hash_ids)
        columns["hash_ids"] = pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat))
        if trace.block_tokens != HASH_BLOCK_TOKENS:
            columns[BLOCK_COLUMN] = pa.array(np.full(len(trace), trace.block_tokens, dtype=np.int64))
    if trace.session is not None and trace.think_s is not None:
        columns["session_id"] = pa.array(trace.session)
        columns["think_s"] = pa.array(trace.think_s, mask=np.isnan(trace.think_s))
    return pa.table(columns)


def _csv_bytes(trace: Trace) -> bytes:
    table = _arrow(trace)
    if trace.hash_ids is not None:
        ids = pa.array([" ".join(map(str, row.tolist())) for row in trace.hash_ids])
        table = table.set_column(table.column_names.index("hash_ids"), "hash_ids", ids)
    out = io.BytesIO()
    out.write((",".join(table.column_names) + "\n").encode())  # Arrow would put the names in quotes
    # Arrow writes the shortest digits that read back as the same float.
    pa_csv.write_csv(table, out, pa_csv.WriteOptions(include_header=False))
    return out.getvalue()


def _jsonl_bytes(trace: Trace) -> bytes:
    rows = zip(trace.arrival_s.tolist(), trace.prompt_tokens.tolist(), trace.output_tokens.tolist(), strict=True)
    lines = [f'{{"arrival_s": {a!r}, "prompt_tokens": {p}, "output_tokens": {o}' for a, p, o in rows]
    if trace.session is not None and trace.think_s is not None:
        thinks = ["null" if np.isnan(think_s) else repr(think_s) for think_s in trace.think_s.tolist()]
        turns = zip(lines, trace.session.tolist(), thinks, strict=True)
        lines = [f'{line}, "session_id": {session}, "think_s": {think}' for line, session, think in turns]
    if trace.hash_ids is None:
        return ("}\n".join(lines) + "}\n").encode()
    block = "" if trace.block_tokens == HASH_BLOCK_TOKENS else f', "{BLOCK_COLUMN}": {trace.block_tokens}'
    ids = (f'{line}, "hash_ids": {row.tolist()}{block}}}\n' for line, row in zip(lines, trace.hash_ids, strict=True))
    return "".join(ids).encode()


def _parquet_bytes(trace: Trace) -> bytes:
    out = io.BytesIO()
    pa_parquet.write_table(_arrow(trace), out)
    return out.getvalue()
