"""Parquet to columns. Row and byte counts are checked before and while the file is read."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pa_parquet

from sim.errors import TraceError
from sim.traces.readers.files import TraceFile
from sim.traces.readers.table import RawTable, check_header, find_columns, table_from_arrow

BATCH_ROWS = 2**16


def read_parquet(file: TraceFile, content: bytes, *, required: Sequence[str], optional: Sequence[str] = ()) -> RawTable:
    """Return the named columns of a Parquet file.

    Args:
        content: the bytes of the file.
        required: columns that the file must have. A name that differs only in case is accepted.
        optional: columns that the file may have.
    Raises:
        TraceError: if the file is broken or too large, or a column is missing.
    """
    try:
        footer = pa_parquet.read_metadata(pa.BufferReader(content))
        names = footer.schema.to_arrow_schema().names
        check_header(file, names, required, where="")
        places = find_columns(names, (*required, *optional))
        wanted = [names[place] for place in places.values()]
        texts = _check_size(file, footer, wanted)
        table = _read(file, content, wanted, texts)
    except (pa.ArrowException, OSError, MemoryError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise TraceError(
            f"{file.path} is a broken Parquet file ({reason}); it is truncated or damaged: write it again"
        ) from error
    if table.num_rows == 0:
        raise TraceError(f"{file.path} has columns and no requests; it needs at least one row")
    return table_from_arrow(file, table.rename_columns(list(places)), unit="row")


def _check_size(file: TraceFile, footer: pa_parquet.FileMetaData, wanted: Sequence[str]) -> list[str]:
    """Check what the footer says about the wanted columns; return those that hold text.

    Raises:
        TraceError: if there are too many rows, values or bytes.
    """
    if footer.num_rows > file.max_rows:
        raise file.too_many_rows(footer.num_rows)
    values: dict[str, int] = {}
    total_bytes = 0
    texts = []
    for group in range(footer.num_row_groups):
        row_group = footer.row_group(group)
        for place in range(row_group.num_columns):
            column = row_group.column(place)
            path = column.path_in_schema
            if path.split(".")[0] not in wanted:
                continue
            values[path] = values.get(path, 0) + column.num_values
            total_bytes += column.total_uncompressed_size
            if column.physical_type in ("BYTE_ARRAY", "FIXED_LEN_BYTE_ARRAY") and path not in texts:
                texts.append(path)
    file.check_values(max(values.values(), default=0))
    if total_bytes > file.max_bytes:
        raise file.too_large()
    return texts


def _read(file: TraceFile, content: bytes, wanted: Sequence[str], texts: Sequence[str]) -> pa.Table:
    # Text stays a dictionary and numbers: one long value in every row would need the memory of all of them.
    parquet = pa_parquet.ParquetFile(pa.BufferReader(content), read_dictionary=list(texts))
    batches, rows, size = [], 0, 0
    for batch in parquet.iter_batches(batch_size=BATCH_ROWS, columns=list(wanted), use_threads=False):
        batches.append(batch)
        rows += batch.num_rows
        size += batch.nbytes
        if rows > file.max_rows:
            raise file.too_many_rows(rows)
        if size > file.max_bytes:
            raise file.too_large()
    table = pa.Table.from_batches(batches) if batches else parquet.read(columns=list(wanted))
    for place, field in enumerate(table.schema):
        if pa.types.is_dictionary(field.type):
            column = table.column(place)
            expanded = sum(_expanded_bytes(chunk) for chunk in column.chunks)
            if expanded > file.max_bytes:
                raise file.too_large(f"column {field.name!r}")
            table = table.set_column(place, field.name, column.cast(pa.string()))
    return table.select(list(wanted))


def _expanded_bytes(chunk: pa.DictionaryArray) -> int:
    lengths = pc.binary_length(chunk.dictionary).take(chunk.indices)
    return int(pc.sum(lengths).as_py() or 0)
