"""CSV to columns of text: comma, semicolon, tab or bar between values, a header line with the names."""

from __future__ import annotations

import csv
from array import array
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv

from sim.errors import TraceError
from sim.traces.readers.files import TraceFile, read_content
from sim.traces.readers.table import ENOUGH_BAD_ROWS, BadRow, BadRows, RawTable, check_header, find_columns

DELIMITERS = (",", ";", "\t", "|")
MAX_LINE_BYTES = 16 * 2**20
MAX_HEADER_BYTES = 2**20
MAX_COLUMNS = 10_000


def read_csv(
    file: TraceFile,
    *,
    required: Sequence[str],
    optional: Sequence[str] = (),
    header: Sequence[str] | None = None,
    content: bytes | None = None,
) -> RawTable:
    """Return the named columns of a CSV file as text.

    Args:
        required: columns that the file must have. A name that differs only in case is accepted.
        optional: columns that the file may have.
        header: the column names, for a file without a header line.
        content: the file's content, if it was read already.
    Raises:
        TraceError: if the file or its header is wrong.
    """
    content = read_content(file) if content is None else content
    # Blank lines at the end are normal; blank lines in the middle are bad rows.
    end = content.find(b"\n", len(content.rstrip(b" \t\n")))
    content = content if end < 0 else content[:end]
    delimiter, names = (",", list(header)) if header else _header(file, content, required)
    first_line = 1 if header else 2
    rows = content.count(b"\n") + 2 - first_line
    if rows < 1:
        raise TraceError(f"{file.path} has a header and no requests; it needs at least one row")
    if rows > file.max_rows:
        raise file.too_many_rows(rows)
    places = find_columns(names, (*required, *optional))
    table, broken_lines, broken = _split(file, content, names, delimiter, places, first_line)
    whole = np.ones(rows, dtype=bool)
    whole[np.frombuffer(broken_lines, dtype=np.int64) - first_line] = False
    lines = np.flatnonzero(whole) + first_line
    if len(lines) != table.num_rows:
        raise TraceError(f"{file.path} has values that contain line breaks; write each request on one line")
    columns = {name: table.column(str(place)) for name, place in places.items()}
    return RawTable(file=file, unit="line", line=lines, columns=columns, broken=broken)


def _header(file: TraceFile, content: bytes, required: Sequence[str]) -> tuple[str, list[str]]:
    """Return the delimiter and the names of the header: the first delimiter with which it has the required names.

    If none is required, the delimiter that gives the most names.
    """
    first_line = content.split(b"\n", 1)[0]
    if len(first_line) > MAX_HEADER_BYTES:
        raise TraceError(
            f"{file.path}, line 1: longer than {MAX_HEADER_BYTES // 2**20} MiB; the first line must name the columns"
        )
    text = first_line.decode(errors="replace").strip(" ")
    try:
        headers = {d: next(csv.reader([text], delimiter=d, skipinitialspace=True), []) for d in DELIMITERS}
    except csv.Error as error:
        raise TraceError(
            f"{file.path}, line 1: not a CSV header ({error}); the first line must name the columns"
        ) from error
    tried = headers.items() if required else sorted(headers.items(), key=lambda item: -len(item[1]))
    for delimiter, names in tried:
        if len(find_columns(names, required)) == len(required) and len(names) <= MAX_COLUMNS:
            return delimiter, names
    delimiter = max(DELIMITERS, key=lambda d: len(headers[d]))
    names = headers[delimiter]
    if names and all(_is_value(name) for name in names):
        raise TraceError(
            f"{file.path}, line 1: no column {required[0]!r}, because {text[:80]!r} holds values, not names; "
            f"write the header {','.join(required)} above it"
        )
    if len(names) > MAX_COLUMNS:
        raise TraceError(f"{file.path}, line 1: {len(names):,} columns, more than the limit of {MAX_COLUMNS:,}")
    check_header(file, names, required, where=", line 1")
    return delimiter, names


def _is_value(name: str) -> bool:
    return not name.strip() or name.strip()[0] in "+-.0123456789"


def _split(
    file: TraceFile,
    content: bytes,
    names: Sequence[str],
    delimiter: str,
    places: dict[str, int],
    first_line: int,
) -> tuple[pa.Table, array[int], BadRows]:
    """Return the wanted columns, named by their place, and the rows that have another number of values than names."""
    broken, lines = BadRows(), array("q")
    allowed = f"{len(names)} values, one for each of {','.join(names)}"[:500]

    def skip_row(row: pa_csv.InvalidRow) -> str:
        value = f"{row.actual_columns} values"
        broken.add(BadRow(line=row.number, column="all", value=value, kind="wrong number of values", allowed=allowed))
        lines.append(row.number)
        return "error" if file.on_bad_row == "error" and len(lines) >= ENOUGH_BAD_ROWS else "skip"

    wanted = [str(place) for place in places.values()]
    try:
        table = pa_csv.read_csv(
            pa.BufferReader(content),
            # One thread, because only then does Arrow report the line numbers of rows that it cannot split.
            read_options=pa_csv.ReadOptions(
                use_threads=False,
                column_names=[str(i) for i in range(len(names))],
                skip_rows=first_line - 1,
                block_size=MAX_LINE_BYTES,
            ),
            parse_options=pa_csv.ParseOptions(
                delimiter=delimiter, invalid_row_handler=skip_row, ignore_empty_lines=False
            ),
            convert_options=pa_csv.ConvertOptions(
                include_columns=wanted, column_types=dict.fromkeys(wanted, pa.string()), strings_can_be_null=False
            ),
        )
    except pa.ArrowInvalid as error:
        if len(lines) >= ENOUGH_BAD_ROWS:
            first = min(row.line for row, _ in broken)
            raise TraceError(
                f"{file.path}, line {first}, column 'all': wrong number of values; allowed: {allowed}. Correct the "
                "rows, or set trace.on_bad_row=skip to leave out and count them (at least "
                f"{len(lines) - 1:,} more rows are bad)"
            ) from error
        if "straddling" in str(error):
            raise TraceError(
                f"{file.path} has a line longer than {MAX_LINE_BYTES // 2**20} MiB; write one request a line"
            ) from error
        reason = " ".join(str(error).split())[:200]
        raise TraceError(f"{file.path} is not a CSV file: {reason}; check its quotes and line endings") from error
    return table, lines, broken
