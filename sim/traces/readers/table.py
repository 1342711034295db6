"""The columns of a trace file before they are checked, and the rows that could not be split into columns."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from sim.errors import TraceError, nearest
from sim.traces.readers.files import TraceFile
from sim.traces.readers.formats import format_of
from sim.types import Ints

COMPARED_NAMES = 100
"""How many names of a file are compared with a missing one, which takes about 0.1 ms each."""
ENOUGH_BAD_ROWS = 1000
"""A reader that reports the first bad row stops to count them here."""


@dataclass(frozen=True, slots=True)
class BadRow:
    """One row that cannot be used, and the reason."""

    line: int
    column: str
    value: str
    kind: str
    allowed: str


@dataclass(slots=True)
class BadRows:
    """Bad rows by kind and column: their number and the first of each, so that millions need no memory."""

    count: Counter[tuple[str, str]] = field(default_factory=Counter)
    first: dict[tuple[str, str], BadRow] = field(default_factory=dict)

    def add(self, row: BadRow, count: int = 1) -> None:
        """Count rows like ``row``, which is the first of them."""
        key = (row.kind, row.column)
        self.count[key] += count
        if key not in self.first or row.line < self.first[key].line:
            self.first[key] = row

    def merged(self, other: BadRows) -> BadRows:
        """Return the rows of both."""
        both = BadRows()
        for rows in (self, other):
            for key, row in rows.first.items():
                both.add(row, rows.count[key])
        return both

    def __len__(self) -> int:
        return self.count.total()

    def __iter__(self) -> Iterator[tuple[BadRow, int]]:
        """Yield the first row and the number of rows of each kind, sorted by kind and column."""
        return ((self.first[key], count) for key, count in sorted(self.count.items()))


@dataclass(frozen=True, slots=True)
class RawTable:
    """The columns of a file, not checked yet.

    unit: what ``line`` counts: "line" in CSV and JSONL, "row" in Parquet, "entry" in a JSON list. They start at 1.
    line: int64[rows], the number of each row.
    columns: an Arrow array each, or a list of JSON values, by the name that the reader wanted for.
    broken: rows that could not be split into columns.
    """

    file: TraceFile
    unit: str
    line: Ints
    columns: Mapping[str, pa.ChunkedArray | list[Any]]
    broken: BadRows = field(default_factory=BadRows)

    @property
    def path(self) -> str:
        """The file as the user wrote it."""
        return str(self.file.path)

    def text_column(self, name: str) -> pa.ChunkedArray:
        """Return a column as text; a cell without a value is empty."""
        column = self.columns[name]
        if isinstance(column, list) or not pa.types.is_string(column.type):
            cells = column if isinstance(column, list) else column.to_pylist()
            column = pa.chunked_array([pa.array([cell_text(cell) for cell in cells], type=pa.string())])
        return column


def cell_text(cell: Any) -> str:
    """Return a cell as text; a cell without a value is empty.

    Half a pair of surrogates, which JSON can escape but no UTF-8 text holds, becomes a question mark.
    """
    value = cell.as_py() if isinstance(cell, pa.Scalar) else cell
    if value is None:
        return ""
    try:
        return str(value).encode("utf-8", "replace").decode("utf-8")
    except RecursionError:
        return "nested too deeply"


def table_from_arrow(file: TraceFile, table: pa.Table, *, unit: str) -> RawTable:
    """Return an Arrow table as a ``RawTable`` whose rows are numbered from 1."""
    columns = {name: table.column(name) for name in table.column_names}
    return RawTable(file=file, unit=unit, line=np.arange(1, table.num_rows + 1), columns=columns)


def find_columns(names: Sequence[str], wanted: Iterable[str]) -> dict[str, int]:
    """Return the positions of wanted columns in a header: an exact name, else the one that differs only in case."""
    stripped = [name.strip() for name in names]
    found = {}
    for name in wanted:
        exact = [i for i, other in enumerate(stripped) if other == name]
        similar = exact or [i for i, other in enumerate(stripped) if other.casefold() == name.casefold()]
        if len(similar) == 1:
            found[name] = similar[0]
    return found


def check_header(file: TraceFile, names: Sequence[str], required: Sequence[str], *, where: str) -> None:
    """Raise a TraceError if a required column is missing or ambiguous; it names the nearest name or the right format.

    Args:
        where: the place of the header in the file, such as ", line 1".
    """
    found = find_columns(names, required)
    missing = [name for name in required if name not in found]
    if not missing:
        return
    for name in missing:
        if sum(other.strip().casefold() == name.casefold() for other in names) > 1:
            raise TraceError(f"{file.path}{where}: column {name!r} appears twice in the header; name each column once")
    shown = ",".join(names)
    shown = shown if len(shown) <= 200 else shown[:200] + "..."
    known = format_of(names)
    wanted = {name.casefold() for name in required}
    # A file whose own columns the reader asks for, among others, is of the right format.
    right = known is not None and (known.columns <= wanted or (known.option == "file" and known.columns & wanted))
    if known is not None and not right:
        raise TraceError(
            f"{file.path}{where}: this is {known.title} (trace={known.option}), not a file with columns "
            f"{','.join(required)}; use trace={known.option} trace.path={file.path}"
        )
    spare = [name for name in names if name not in required]
    hint = nearest(spare[0], missing) if spare else f"add {', '.join(missing)}"
    for name in spare[:COMPARED_NAMES]:
        if "did you mean" in (better := nearest(name, missing)):
            hint = f"for {name!r}: {better}"
            break
    hint += f"; {file.naming}" if file.naming else ""
    raise TraceError(f"{file.path}{where}: no column {missing[0]!r} in the header {shown!r}; {hint}")
