"""This project's own trace format, as CSV, JSONL or Parquet: arrival_s, prompt_tokens, output_tokens, hash_ids."""

from __future__ import annotations

import gzip
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pa_parquet

from sim.atomic import write_whole
from sim.errors import TraceError, nearest
from sim.traces.readers.rows import (
    OnBadRow,
    RawTable,
    Rows,
    check_on_bad_row,
    read_bytes,
    read_csv,
    read_jsonl,
    table_from_arrow,
)
from sim.traces.trace import Trace
from sim.types import Ints

PARQUET_MAGIC = b"PAR1"
REQUIRED = ("arrival_s", "prompt_tokens", "output_tokens")
SCHEMA = pa.schema(
    [
        ("arrival_s", pa.float64()),
        ("prompt_tokens", pa.int64()),
        ("output_tokens", pa.int64()),
        ("hash_ids", pa.list_(pa.int64())),
    ]
)
NO_IDS = np.empty(0, dtype=np.int64)


def read_trace(
    path: str | Path,
    *,
    on_bad_row: OnBadRow = "error",
    sort: bool = False,
    rebase: bool = False,
    time_quantum_s: float = 0.0,
    name: str | None = None,
) -> Trace:
    """Return a trace in the project's own format; the content, not the name, decides between CSV, JSONL and Parquet.

    Columns: ``arrival_s`` (seconds), ``prompt_tokens``, ``output_tokens`` and, optionally, ``hash_ids`` (a list of
    ids; in CSV separated by spaces). Other columns are ignored.

    Args:
        path: the file; CSV and JSONL may be gzip.
        on_bad_row, sort: as ``read_azure``.
        rebase: shift arrivals so that the first is at 0. Off by default, because time 0 has a meaning in this format.
        time_quantum_s: step of the clock that recorded the arrivals, 0 for a fine one.
        name: the trace's name; None takes the file's name.
    Raises:
        TraceError: if the file or a row of it cannot be used.
    """
    check_on_bad_row(on_bad_row)
    content = read_bytes(path)
    rows = Rows(_table(path, content, on_bad_row), on_bad_row)
    return rows.trace(
        arrival_s=rows.seconds("arrival_s"),
        prompt_tokens=rows.tokens("prompt_tokens"),
        output_tokens=rows.tokens("output_tokens"),
        hash_ids=read_hash_ids(rows) if "hash_ids" in rows.table.columns else None,
        sort=sort,
        rebase=rebase,
        name=name or Path(path).name.split(".")[0],
        time_quantum_s=time_quantum_s,
    )


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


def read_hash_ids(rows: Rows) -> list[Ints]:
    """Return the column ``hash_ids`` as one array per row; a row whose ids are not a list of numbers is marked bad."""
    column = rows.table.columns["hash_ids"]
    if isinstance(column, pa.ChunkedArray) and pa.types.is_list(column.type) and column.null_count == 0:
        array = column.combine_chunks()
        if pa.types.is_integer(array.type.value_type) and array.values.null_count == 0:
            flat = np.asarray(array.values.to_numpy(), dtype=np.int64)
            ends = array.offsets.to_numpy()
            ids = [flat[start:end] for start, end in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True)]
            return _without_negative(rows, ids)
    cells = column if isinstance(column, list) else column.to_pylist()
    ids = []
    bad = np.zeros(len(cells), dtype=bool)
    for i, cell in enumerate(cells):
        parsed = _ids_of_cell(cell)
        bad[i] = parsed is None
        ids.append(NO_IDS if parsed is None else parsed)
    rows.reject(bad, "hash_ids", "not a list of ids", "a list of whole numbers from 0 (in CSV separated by spaces)")
    return _without_negative(rows, ids)


def _without_negative(rows: Rows, ids: list[Ints]) -> list[Ints]:
    bad = np.fromiter((len(row) > 0 and bool(row.min() < 0) for row in ids), dtype=bool, count=len(ids))
    rows.reject(bad, "hash_ids", "negative", "ids from 0")
    return ids


def _ids_of_cell(cell: Any) -> Ints | None:
    if isinstance(cell, str):
        cell = [int(part) if part.isascii() and part.isdigit() else None for part in cell.split()]
    if not isinstance(cell, list) or any(not isinstance(i, int) or isinstance(i, bool) or i >= 2**63 for i in cell):
        return None
    return np.array(cell, dtype=np.int64)


def _table(path: str | Path, content: bytes, on_bad_row: OnBadRow) -> RawTable:
    if content.startswith(PARQUET_MAGIC):
        return _parquet_table(path, content)
    if content.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{"):
        return read_jsonl(path, schema=SCHEMA, optional=("hash_ids",), on_bad_row=on_bad_row, content=content)
    return read_csv(path, required=REQUIRED, optional=("hash_ids",), on_bad_row=on_bad_row, content=content)


def _parquet_table(path: str | Path, content: bytes) -> RawTable:
    try:
        file = pa_parquet.ParquetFile(io.BytesIO(content))
        names = file.schema_arrow.names
        missing = [name for name in REQUIRED if name not in names]
        if missing:
            raise TraceError(
                f"{path}: no column {missing[0]!r}; for {names[0] if names else 'none'!r}: "
                f"{nearest(names[0] if names else '', missing)}; it has {', '.join(names)}"
            )
        table = file.read(columns=[name for name in SCHEMA.names if name in names])
    except (pa.ArrowException, OSError) as error:
        raise TraceError(
            f"{path} is a broken Parquet file ({error}); it is truncated or damaged: write it again"
        ) from error
    if table.num_rows == 0:
        raise TraceError(f"{path} has columns and no requests; it needs at least one row")
    return table_from_arrow(path, table, unit="row")


def _arrow(trace: Trace) -> pa.Table:
    columns = {name: pa.array(getattr(trace, name)) for name in REQUIRED}
    if trace.hash_ids is not None:
        counts = np.fromiter(map(len, trace.hash_ids), dtype=np.int64, count=len(trace))
        offsets = np.concatenate(([0], np.cumsum(counts))).astype(np.int32)
        flat = np.concatenate(trace.hash_ids)
        columns["hash_ids"] = pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat))
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
    if trace.hash_ids is None:
        return ("}\n".join(lines) + "}\n").encode()
    ids = (f'{line}, "hash_ids": {row.tolist()}}}\n' for line, row in zip(lines, trace.hash_ids, strict=True))
    return "".join(ids).encode()


def _parquet_bytes(trace: Trace) -> bytes:
    out = io.BytesIO()
    pa_parquet.write_table(_arrow(trace), out)
    return out.getvalue()
