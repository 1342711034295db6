"""Rows of a trace file: bytes to columns to checked numbers, and the handling of bad rows."""

from __future__ import annotations

import csv
import gzip
import io
import json
import logging
import re
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.json as pa_json
from numpy.typing import NDArray

from sim.errors import TraceError, nearest
from sim.paths import DATA_VARIABLE, data_dir, find_data
from sim.traces.trace import MAX_ARRIVAL_S, MAX_TOKENS, Trace
from sim.types import Floats, Ints

log = logging.getLogger(__name__)

OnBadRow = Literal["error", "skip"]

GZIP_MAGIC = b"\x1f\x8b"
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
NUMBER = re.compile(r"\s*[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?\s*")
NOT_FINITE = frozenset({"nan", "inf", "infinity"})
# Years are limited to what a nanosecond clock in 64 bits can hold.
TIMESTAMP = r"^(19|20)\d\d-\d\d-\d\d[ T]\d\d:\d\d:\d\d(\.\d{1,9})?(Z|[+-]\d\d:?\d\d)?$"

KNOWN_HEADERS = {
    "Azure 2023 CSV (trace=azure_conv or azure_code)": {"TIMESTAMP", "ContextTokens", "GeneratedTokens"},
    "BurstGPT CSV (trace=burstgpt)": {"Timestamp", "Request tokens", "Response tokens"},
    "Mooncake JSONL (trace=mooncake_conversation)": {"timestamp", "input_length", "output_length"},
    "lengths without arrivals (trace=arxiv_lengths)": {"num_prefill_tokens", "num_decode_tokens"},
    "this project's own format (trace=file)": {"arrival_s", "prompt_tokens", "output_tokens"},
}
"""The columns that identify each format, so that an error of the wrong reader can name the right format."""


def read_bytes(path: str | Path, *, origin: str | None = None) -> bytes:
    """Return the content of a data file, decompressed if it is gzip (by its first bytes, not its name).

    Args:
        path: absolute, or relative to the current folder or the data folder (see ``sim.paths.find_data``).
        origin: the public repository of the file, for the message when it is missing.
    Raises:
        TraceError: if the file is missing, unreadable, empty, or a broken gzip.
    """
    found = find_data(path)
    try:
        content = found.read_bytes()
    except FileNotFoundError as error:
        raise missing_data(path, origin) from error
    except OSError as error:
        raise TraceError(f"{path} cannot be read: {error.strerror}; give the path of a readable file") from error
    if content.startswith(GZIP_MAGIC):
        try:
            content = gzip.decompress(content)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise TraceError(
                f"{path} is a broken gzip file ({error}); it is truncated or damaged: download it again"
            ) from error
    if not content.strip():
        raise TraceError(f"{path} is empty; it needs a header and at least one request")
    return content


def missing_data(path: str | Path, origin: str | None) -> TraceError:
    """Return the error for a missing data file: where it was searched, and where to get it."""
    if origin is None:
        return TraceError(f"{path} does not exist, neither here nor in {data_dir()}; give the path of a trace file")
    return TraceError(
        f"{path} does not exist, neither here nor in {data_dir()}. Published traces are not part of this project: "
        f"get this one from {origin}, put it at that path below a folder of your own and set {DATA_VARIABLE} to "
        "that folder; or use trace=burst, which needs no file"
    )


def check_on_bad_row(on_bad_row: str) -> None:
    """Raise a TraceError if ``on_bad_row`` is not a known choice."""
    if on_bad_row not in get_args(OnBadRow):
        raise TraceError(f"on_bad_row is {on_bad_row!r}; {nearest(str(on_bad_row), get_args(OnBadRow))}")


@dataclass(frozen=True, slots=True)
class BadRow:
    """One row that cannot be used, and the reason."""

    line: int
    column: str
    value: str
    kind: str
    allowed: str


@dataclass(frozen=True, slots=True)
class RawTable:
    """The columns of a file, not checked yet.

    path: as the user wrote it, for messages.
    unit: what ``line`` counts, "line" or (Parquet) "row"; both start at 1.
    line: int64[rows], the line number of each row.
    columns: an Arrow array each, or a list of JSON values.
    broken: rows that could not be split into columns.
    """

    path: str
    unit: str
    line: Ints
    columns: Mapping[str, pa.ChunkedArray | list[Any]]
    broken: tuple[BadRow, ...] = ()

    def text_column(self, name: str) -> pa.ChunkedArray:
        """Return a column of a CSV file, which is text."""
        column = self.columns[name]
        assert isinstance(column, pa.ChunkedArray), f"{name} is no column of a CSV file"
        return column


def read_csv(
    path: str | Path,
    *,
    required: Sequence[str],
    optional: Sequence[str] = (),
    header: Sequence[str] | None = None,
    on_bad_row: OnBadRow = "error",
    origin: str | None = None,
    content: bytes | None = None,
) -> RawTable:
    """Return the named columns of a CSV file as text.

    Args:
        required: columns that the file must have.
        optional: columns that the file may have.
        header: the column names, for a file without a header line.
        on_bad_row: with "skip", bytes that are not UTF-8 make only their own row bad.
        origin: see ``read_bytes``.
        content: the file's bytes, if they were read already.
    Raises:
        TraceError: if the file or its header is wrong.
    """
    check_on_bad_row(on_bad_row)
    content = read_bytes(path, origin=origin) if content is None else content
    # Blank lines at the end are normal; blank lines in the middle are bad rows.
    content = _utf8(path, content.removeprefix(BYTE_ORDER_MARK), on_bad_row).rstrip(b"\r\n \t")
    names = list(header) if header else _header(content)
    _check_header(path, names, required)
    first_line = 1 if header else 2
    rows = content.count(b"\n") + 2 - first_line
    if rows < 1:
        raise TraceError(f"{path} has a header and no requests; it needs at least one row")
    wanted = [name for name in (*required, *optional) if name in names]
    table, broken = _split_csv(path, content, names, wanted, first_line)
    lines = np.setdiff1d(np.arange(first_line, first_line + rows), [row.line for row in broken])
    if len(lines) != table.num_rows:
        raise TraceError(f"{path} has values that contain line breaks; write each request on one line")
    columns = {name: table.column(name) for name in wanted}
    return RawTable(path=str(path), unit="line", line=lines, columns=columns, broken=tuple(broken))


def _split_csv(
    path: str | Path, content: bytes, names: Sequence[str], wanted: Sequence[str], first_line: int
) -> tuple[pa.Table, list[BadRow]]:
    """Return the wanted columns as text, and the rows that have another number of values than ``names``."""
    broken: list[BadRow] = []

    def skip_row(row: pa_csv.InvalidRow) -> str:
        broken.append(
            BadRow(
                line=row.number,
                column="all",
                value=f"{row.actual_columns} values",
                kind="wrong number of values",
                allowed=f"{row.expected_columns} values, one for each of {','.join(names)}",
            )
        )
        return "skip"

    try:
        table = pa_csv.read_csv(
            io.BytesIO(content),
            # One thread, because only then does Arrow report the line numbers of rows that it cannot split.
            read_options=pa_csv.ReadOptions(use_threads=False, column_names=list(names), skip_rows=first_line - 1),
            parse_options=pa_csv.ParseOptions(invalid_row_handler=skip_row, ignore_empty_lines=False),
            convert_options=pa_csv.ConvertOptions(
                include_columns=list(wanted), column_types=dict.fromkeys(wanted, pa.string()), strings_can_be_null=False
            ),
        )
    except pa.ArrowInvalid as error:
        raise TraceError(f"{path} is not a CSV file: {error}; check its quotes and line endings") from error
    return table, broken


def _utf8(path: str | Path, content: bytes, on_bad_row: OnBadRow) -> bytes:
    """Return ``content`` as valid UTF-8; a byte that is not UTF-8 is an error, or replaced if bad rows are skipped."""
    try:
        content.decode()
    except UnicodeDecodeError as error:
        if on_bad_row == "skip":
            # The replacement character is not a number, so the cell counts as a bad one.
            return content.decode(errors="replace").encode()
        line_start = content.rfind(b"\n", 0, error.start) + 1
        line = content.count(b"\n", 0, error.start) + 1
        value_number = content.count(b",", line_start, error.start) + 1
        raise TraceError(
            f"{path}, line {line}, value {value_number}: byte 0x{content[error.start]:02x} is not UTF-8; "
            "save the file as UTF-8, or set on_bad_row=skip to leave out such rows"
        ) from error
    return content


def _header(content: bytes) -> list[str]:
    first_line = content.split(b"\n", 1)[0].decode().strip()
    return next(csv.reader([first_line], skipinitialspace=True))


def _check_header(path: str | Path, names: Sequence[str], required: Sequence[str]) -> None:
    doubled = [name for name, count in Counter(names).items() if count > 1]
    if doubled:
        raise TraceError(f"{path}, line 1: column {doubled[0]!r} appears twice in the header; name each column once")
    missing = [name for name in required if name not in names]
    if not missing:
        return
    shown = ",".join(names)
    shown = shown if len(shown) <= 200 else shown[:200] + "..."
    for format_name, columns in KNOWN_HEADERS.items():
        if columns <= set(names):
            raise TraceError(f"{path}, line 1: this is {format_name}, not a file with columns {','.join(required)}")
    spare = [name for name in names if name not in required]
    hint = nearest(spare[0], missing) if spare else f"add {', '.join(missing)}"
    for name in spare:
        if "did you mean" in (better := nearest(name, missing)):
            hint = f"for {name!r}: {better}"
            break
    raise TraceError(f"{path}, line 1: no column {missing[0]!r} in the header {shown!r}; {hint}")


def read_jsonl(
    path: str | Path,
    *,
    schema: pa.Schema,
    optional: Sequence[str] = (),
    on_bad_row: OnBadRow = "error",
    origin: str | None = None,
    content: bytes | None = None,
) -> RawTable:
    """Return the named fields of a file with one JSON object per line.

    Arrow reads a clean file in one pass, but does not report the line of an error; then the file is read again line
    by line. Both give the same result on every file that Arrow accepts (tests/sim/traces/test_readers.py).

    Args:
        schema: the fields and their types; all are required except those in ``optional``.
        optional: fields that may be missing from the entire file, but not from some lines only.
        on_bad_row: as ``read_csv``.
        origin: see ``read_bytes``.
        content: the file's bytes, if they were read already.
    Raises:
        TraceError: if the file is wrong, or no line has the required fields.
    """
    check_on_bad_row(on_bad_row)
    content = read_bytes(path, origin=origin) if content is None else content
    content = _utf8(path, content.removeprefix(BYTE_ORDER_MARK), on_bad_row).rstrip(b"\r\n \t")
    table = _read_jsonl_clean(content, schema, optional)
    return table_from_arrow(path, table, unit="line") if table else _read_jsonl_by_line(path, content, schema, optional)


def _read_jsonl_clean(content: bytes, schema: pa.Schema, optional: Sequence[str]) -> pa.Table | None:
    """Return the table if every line is one object with every field of the right type, else None."""
    options = pa_json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore")
    # One chunk for the entire file, because a line longer than a chunk is an error in Arrow.
    read_options = pa_json.ReadOptions(use_threads=False, block_size=min(len(content) + 1, 2**31 - 1))
    try:
        table = pa_json.read_json(io.BytesIO(content), read_options=read_options, parse_options=options)
    except pa.ArrowInvalid:
        return None
    for name in optional:
        if table.column(name).null_count == table.num_rows:
            table = table.drop_columns([name])
    # Two objects on a line, or a blank line, would shift every line number after it.
    one_a_line = table.num_rows == content.count(b"\n") + 1
    complete = all(column.null_count == 0 for column in table.columns)
    return table if one_a_line and complete else None


def _read_jsonl_by_line(path: str | Path, content: bytes, schema: pa.Schema, optional: Sequence[str]) -> RawTable:
    rows: list[dict[str, Any]] = []
    lines: list[int] = []
    broken: list[BadRow] = []
    for line, text in enumerate(content.decode().split("\n"), start=1):
        try:
            row = json.loads(text)
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict):
            rows.append(row)
            lines.append(line)
        else:
            kind = "not a JSON object" if text.strip() else "blank line"
            broken.append(BadRow(line=line, column="all", value=text[:80], kind=kind, allowed="one {...} per line"))
    seen = set().union(*rows[:1000]) if rows else set()
    if rows:
        _check_header(path, sorted(seen), [name for name in schema.names if name not in optional])
    present = [name for name in schema.names if name not in optional or any(name in row for row in rows)]
    columns = {name: [row.get(name) for row in rows] for name in present}
    line_numbers = np.array(lines, dtype=np.int64)
    return RawTable(path=str(path), unit="line", line=line_numbers, columns=columns, broken=tuple(broken))


def table_from_arrow(path: str | Path, table: pa.Table, *, unit: str) -> RawTable:
    """Return an Arrow table as a ``RawTable`` whose rows are numbered from 1."""
    columns = {name: table.column(name) for name in table.column_names}
    return RawTable(path=str(path), unit=unit, line=np.arange(1, table.num_rows + 1), columns=columns)


@dataclass(slots=True)
class Rows:
    """Checks the columns of one table, records every bad row, and makes a trace of the good ones.

    A row that is bad for several reasons counts once, under the first column checked.
    """

    table: RawTable
    on_bad_row: OnBadRow
    # Keyed by row position in the table. Rows that could not be split into columns are in table.broken.
    bad: dict[int, BadRow] = field(default_factory=dict)

    def tokens(self, name: str, *, minimum: int = 1) -> Ints:
        """Return a column of token counts, 0 for bad rows."""
        allowed = f"a whole number from {minimum} to {MAX_TOKENS:,}"
        values = self._numbers(name, minimum=minimum, maximum=MAX_TOKENS, integers=True, allowed=allowed)
        return values.astype(np.int64)

    def seconds(self, name: str, *, unit_s: float = 1.0) -> Floats:
        """Return a column of times in seconds, 0 for bad rows; the file holds units of ``unit_s`` seconds."""
        maximum = MAX_ARRIVAL_S / unit_s
        unit = {1.0: "seconds", 1e-3: "milliseconds"}[unit_s]
        allowed = f"a number of {unit} from 0 to {maximum:g}"
        # Dividing rounds once; multiplying by 0.001 would round twice.
        return self._numbers(name, minimum=0, maximum=maximum, integers=False, allowed=allowed) / round(1 / unit_s)

    def timestamps(self, name: str) -> Floats:
        """Return a column of wall-clock times as seconds since the earliest, exact to 1 ns; 0 for bad rows."""
        column = self.table.text_column(name)
        shaped = pc.match_substring_regex(column, TIMESTAMP).to_numpy().astype(bool)
        text = np.where(shaped, column.to_numpy(), "")
        times = pd.to_datetime(pd.Series(text), format="ISO8601", errors="coerce", utc=True).dt.as_unit("ns")
        good = times.notna().to_numpy()
        self._reject(
            name,
            np.flatnonzero(~good),
            "a time such as 2023-11-16 18:17:03.9799600",
            lambda value: "not a time" if value.strip() else "missing value",
        )
        times_ns = times.astype("int64").to_numpy()
        start_ns = times_ns[good].min() if good.any() else 0
        return np.where(good, times_ns - start_ns, 0) / 1e9

    def reject(self, mask: NDArray[np.bool_], name: str, kind: str, allowed: str) -> None:
        """Mark rows as bad for a reason that a reader gives."""
        self._reject(name, np.flatnonzero(mask), allowed, lambda _: kind)

    def trace(
        self,
        *,
        arrival_s: Floats,
        prompt_tokens: Ints,
        output_tokens: Ints,
        hash_ids: Sequence[Ints] | None = None,
        leave_out: NDArray[np.bool_] | None = None,
        sort: bool = False,
        rebase: bool = True,
        name: str,
        history: Sequence[str] = (),
        time_quantum_s: float = 0.0,
    ) -> Trace:
        """Return the trace of the good rows.

        Args:
            leave_out: valid rows that do not belong to this trace.
            sort: sort rows by arrival; if False, a row out of order is an error.
            rebase: make the first arrival time 0.
            history: steps that the reader took.
        Raises:
            TraceError: for the first bad row, unless bad rows are skipped; for a row out of order, unless ``sort``;
                and if no row is left.
        """
        steps = [f"read {len(self.table.line) + len(self.table.broken):,} rows of {self.table.path}"]
        keep = self.good_rows(steps)
        if leave_out is not None:
            keep &= ~leave_out
        steps.extend(history)
        index = np.flatnonzero(keep)
        if len(index) == 0:
            raise TraceError(f"{self.table.path} has no usable request ({'; '.join(steps)})")
        arrivals = arrival_s[index]
        late = np.flatnonzero(arrivals[1:] < arrivals[:-1]) + 1
        if len(late) and not sort:
            row = index[late[0]]
            raise TraceError(
                f"{self.table.path}, {self.table.unit} {self.table.line[row]}: arrives at {arrival_s[row]:g} s, before "
                f"the request ahead of it ({arrivals[late[0] - 1]:g} s), as do {len(late) - 1} more; rows must be in "
                "order of arrival: sort the file, or set sort=true"
            )
        if len(late):
            index = index[np.argsort(arrivals, kind="stable")]
            arrivals = arrival_s[index]
            steps.append(f"sorted by arrival ({len(late):,} rows came before the row ahead of them)")
        if rebase and arrivals[0] != 0:
            steps.append(f"arrivals counted from the first one, at {arrivals[0]:.9g} s")
            arrivals = arrivals - arrivals[0]
        return Trace(
            arrival_s=arrivals,
            prompt_tokens=prompt_tokens[index],
            output_tokens=output_tokens[index],
            hash_ids=None if hash_ids is None else tuple(hash_ids[i] for i in index.tolist()),
            name=name,
            source=self.table.path,
            history=tuple(steps),
            time_quantum_s=time_quantum_s,
        )

    def good_rows(self, steps: list[str]) -> NDArray[np.bool_]:
        """Return which rows are good, bool[rows]; report the others in ``steps`` and the log.

        Raises:
            TraceError: for the first bad row of the file, unless bad rows are skipped.
        """
        rows = [*self.table.broken, *self.bad.values()]
        if rows and self.on_bad_row == "error":
            first = min(rows, key=lambda row: row.line)
            more = f" ({len(rows) - 1:,} more rows are bad)" if len(rows) > 1 else ""
            raise TraceError(
                f"{self.table.path}, {self.table.unit} {first.line}, column {first.column!r}: {first.kind}: "
                f"{first.value!r}; allowed: {first.allowed}. Correct the row, or set on_bad_row=skip to leave out and "
                f"count such rows{more}"
            )
        for (kind, column), count in sorted(Counter((row.kind, row.column) for row in rows).items()):
            first_line = min(row.line for row in rows if (row.kind, row.column) == (kind, column))
            steps.append(
                f"skipped {count:,} bad row{'s' * (count > 1)}: {kind} in column {column!r}, "
                f"first at {self.table.unit} {first_line}"
            )
            log.warning("%s: %s", self.table.path, steps[-1])
        keep = np.ones(len(self.table.line), dtype=bool)
        keep[list(self.bad)] = False
        return keep

    def _numbers(self, name: str, *, minimum: float, maximum: float, integers: bool, allowed: str) -> Floats:
        values = _to_floats(self.table.columns[name])
        with np.errstate(invalid="ignore"):
            good = (values >= minimum) & (values <= maximum)
            if integers:
                good &= values == np.floor(values)

        def kind(text: str) -> str:
            return _kind_of_bad_number(text, minimum=minimum, maximum=maximum)

        self._reject(name, np.flatnonzero(~good), allowed, kind)
        return np.where(good, values, 0.0)

    def _reject(self, name: str, index: Ints, allowed: str, kind: Any) -> None:
        column = self.table.columns[name]
        for i in index.tolist():
            if i not in self.bad:
                text = _text(column[i])
                self.bad[i] = BadRow(int(self.table.line[i]), name, text[:80], kind(text), allowed)


def _text(cell: Any) -> str:
    value = cell.as_py() if isinstance(cell, pa.Scalar) else cell
    if value is None:
        return ""
    return value if isinstance(value, str) else str(value)


def _to_floats(column: pa.ChunkedArray | list[Any]) -> Floats:
    """Return the cells as numbers, NaN for a cell that is not a number."""
    if isinstance(column, list):
        return np.array([_float_of_json(cell) for cell in column], dtype=np.float64)
    if pa.types.is_integer(column.type) or pa.types.is_floating(column.type):
        # safe=False: an integer beyond 2**53 loses digits, but it is out of range anyway.
        return np.asarray(column.cast(pa.float64(), safe=False).to_numpy(), dtype=np.float64)
    if not pa.types.is_string(column.type):
        return np.array([_float_of_json(cell) for cell in column.to_pylist()], dtype=np.float64)
    try:
        return np.asarray(column.cast(pa.float64()).to_numpy(), dtype=np.float64)
    except pa.ArrowInvalid:
        # Some cell is not a number; Arrow does not report which, so each is parsed.
        texts = column.to_pylist()
        return np.array([float(text) if NUMBER.fullmatch(text) else np.nan for text in texts], dtype=np.float64)


def _float_of_json(cell: Any) -> float:
    # Python converts JSON's true to 1 and "12" to 12; in a trace neither is a number.
    if isinstance(cell, bool) or not isinstance(cell, int | float):
        return float("nan")
    try:
        return float(cell)
    except OverflowError:
        return float("inf")


def _kind_of_bad_number(text: str, *, minimum: float, maximum: float) -> str:
    if not text.strip():
        return "missing value"
    if text.strip().lower().lstrip("+-") in NOT_FINITE:
        return "not finite"
    if not NUMBER.fullmatch(text):
        return "not a number"
    value = float(text)
    if value > maximum:
        return "too large"
    if value < 0:
        return "negative"
    if value == 0 and minimum > 0:
        return "zero"
    return "too small" if value < minimum else "not a whole number"
