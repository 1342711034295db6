"""Rows of a trace file: columns to checked numbers and a trace, and the handling of bad rows."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from sim.errors import TraceError
from sim.traces.readers.arguments import check_choice, check_flag, check_number
from sim.traces.readers.cells import (
    dates_ns,
    empty_cells,
    from_earliest,
    holds_dates,
    kind_of_bad_number,
    to_floats,
)
from sim.traces.readers.csv_table import read_csv
from sim.traces.readers.files import PARQUET_MAGIC, TraceFile, read_content
from sim.traces.readers.json_table import read_json
from sim.traces.readers.parquet_table import read_parquet
from sim.traces.readers.table import ENOUGH_BAD_ROWS, BadRow, BadRows, RawTable, cell_text
from sim.traces.sessions import turns_to_keep
from sim.traces.trace import MAX_ARRIVAL_S, MAX_TOKENS, Trace
from sim.types import Floats, Ints

log = logging.getLogger(__name__)

TimeUnit = Literal["s", "ms", "us", "ns", "iso"]
"""What a column of times holds: numbers in a unit, or dates with a time of day."""
PER_SECOND = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}
UNIT_NAMES = {"s": "seconds", "ms": "milliseconds", "us": "microseconds", "ns": "nanoseconds"}
Failed = Literal["drop", "error"]
"""Requests that ended without an answer: "drop" leaves them out and counts them, "error" treats them as bad rows."""


def read_table(file: TraceFile, *, required: Sequence[str], optional: Sequence[str] = ()) -> RawTable:
    """Return the named columns of a CSV, JSONL, JSON or Parquet file; its content decides, not its name.

    Args:
        required: columns that the file must have. optional: columns that may be missing.
    Raises:
        TraceError: if the file is wrong.
    """
    content = read_content(file)
    if content.startswith(PARQUET_MAGIC):
        return read_parquet(file, content, required=required, optional=optional)
    if content.lstrip().startswith((b"{", b"[")):
        return read_json(file, required=required, optional=optional, content=content)
    return read_csv(file, required=required, optional=optional, content=content)


@dataclass(slots=True)
class Rows:
    """Checks the columns of one table, records every bad row, and makes a trace of the good ones.

    A row that is bad for several reasons counts once, under the first column checked.
    """

    table: RawTable
    bad: BadRows = field(default_factory=BadRows)  # rows that could not be split into columns are in table.broken
    is_bad: NDArray[np.bool_] = field(init=False)  # bool[rows]
    origin_s: float = 0.0  # what ``times`` subtracted

    def __post_init__(self) -> None:
        self.is_bad = np.zeros(len(self.table.line), dtype=bool)

    def has(self, name: str) -> bool:
        """Return whether the file has an optional column."""
        return name in self.table.columns

    def text(self, name: str) -> list[str]:
        """Return a column as text without blanks around it."""
        return [text.strip() for text in self.table.text_column(name).to_pylist()]

    def tokens(self, name: str, *, minimum: int = 1, missing: bool = False) -> Ints:
        """Return a column of token counts, 0 for bad rows and, if cells may be ``missing``, for empty ones."""
        allowed = f"a whole number from {minimum} to {MAX_TOKENS:,}"
        values = self._numbers(
            name, minimum=minimum, maximum=MAX_TOKENS, integers=True, allowed=allowed, missing=missing
        )
        return values.astype(np.int64)

    def numbers(self, name: str, *, minimum: float, maximum: float = 1e30) -> Floats:
        """Return a column of numbers, 0 for bad rows."""
        allowed = f"a number from {minimum:g} to {maximum:g}"
        return self._numbers(name, minimum=minimum, maximum=maximum, integers=False, allowed=allowed)

    def seconds(self, name: str, *, unit: TimeUnit = "s") -> Floats:
        """Return a column of durations in seconds, 0 for bad rows; the file holds numbers of ``unit``."""
        scale = PER_SECOND[unit]
        maximum = MAX_ARRIVAL_S * scale
        allowed = f"a number of {UNIT_NAMES[unit]} from 0 to {maximum:g}"
        # Dividing rounds once; multiplying by 0.001 would round twice.
        return self._numbers(name, minimum=0, maximum=maximum, integers=False, allowed=allowed) / scale

    def times(self, name: str, *, unit: TimeUnit = "s", rebase: bool = True, missing: bool = False) -> Floats:
        """Return a column of times in seconds, 0 for bad rows.

        Dates count from the earliest. Numbers too large for seconds since a start, such as Unix times, count from the
        earliest too if ``rebase``; ``origin_s`` is then what was subtracted.

        Args:
            unit: what numbers count. A column that holds dates is recognized.
            rebase: whether the caller makes the first arrival time 0.
            missing: whether a cell may be empty; it becomes NaN.
        """
        check_choice("time_unit", unit, TimeUnit)
        column = self.table.columns[name]
        if unit == "iso" or holds_dates(column):
            return self.timestamps(name)
        scale = PER_SECOND[unit]
        maximum = MAX_ARRIVAL_S * scale
        allowed = f"a number of {UNIT_NAMES[unit]} from 0 to {maximum:g}"
        values = to_floats(column)
        usable = np.isfinite(values) & (values >= 0) & ~self.is_bad
        if rebase and usable.any() and values[usable].max() > maximum:
            values, origin = from_earliest(column, values, usable)
            self.origin_s = origin / scale
            allowed = f"at most {maximum:g} {UNIT_NAMES[unit]} after the earliest, {origin:.17g}"
        elif not rebase:
            allowed += "; set trace.rebase=true to count Unix times from the first"
        with np.errstate(invalid="ignore"):
            good = (values >= 0) & (values <= maximum)
        empty = empty_cells(column) if missing else np.zeros(len(values), dtype=bool)

        def kind(text: str) -> str:
            return kind_of_bad_number(text, minimum=0, maximum=maximum)

        self._reject(name, np.flatnonzero(~good & ~empty), allowed, kind)
        return np.where(empty, np.nan, np.where(good, values, 0.0)) / scale

    def first_fraction(self, name: str) -> int | None:
        """Return the first row whose number in a column is not whole, or None."""
        if holds_dates(self.table.columns[name]):
            return None
        values = to_floats(self.table.columns[name])
        fraction = np.flatnonzero(np.isfinite(values) & (values != np.floor(values)))
        return int(fraction[0]) if len(fraction) else None

    def timestamps(self, name: str) -> Floats:
        """Return a column of wall-clock times as seconds since the earliest, exact to 1 ns; 0 for bad rows."""
        column = self.table.columns[name]
        if isinstance(column, pa.ChunkedArray) and pa.types.is_timestamp(column.type):
            text = column.cast(pa.string())
            column = pc.if_else(pc.is_null(text), "", text)
        else:
            column = self.table.text_column(name)
        times_ns, good, zoned = dates_ns(column)
        self._reject(
            name,
            np.flatnonzero(~good),
            "a time such as 2023-11-16 18:17:03.9799600",
            lambda value: "not a time" if value.strip() else "missing value",
        )
        if good.any():
            unlike = good & (zoned != zoned[np.argmax(good)])
            self.reject(unlike, name, "a time zone unlike other rows", "a time zone in all rows, or in none")
            good = good & ~unlike
        start_ns = times_ns[good].min() if good.any() else 0
        return np.where(good, times_ns - start_ns, 0) / 1e9

    def reject(self, mask: NDArray[np.bool_], name: str, kind: str, allowed: str) -> None:
        """Mark rows as bad for a reason that a reader gives."""
        new = np.flatnonzero(mask & ~self.is_bad)
        if len(new):
            line, value = int(self.table.line[new[0]]), cell_text(self.table.columns[name][new[0]])[:80]
            self.bad.add(BadRow(line, name, value, kind, allowed), len(new))
            self.is_bad[new] = True

    def failed(self, mask: NDArray[np.bool_], reason: str, history: list[str]) -> NDArray[np.bool_]:
        """Return which good rows are requests that failed, for ``trace(leave_out=...)``; ``history`` counts them."""
        failed: NDArray[np.bool_] = mask & ~self.is_bad
        if failed.any():
            history.append(f"dropped {int(failed.sum()):,} failed requests ({reason})")
        return failed

    def check_total(self, name: str, prompt_tokens: Ints, output_tokens: Ints) -> None:
        """Mark rows as bad whose column ``name``, if there is one, is not the sum of prompt and output."""
        if self.has(name):
            total = self.tokens(name, minimum=0)
            self.reject(total != prompt_tokens + output_tokens, name, "not the sum", "prompt plus output tokens")

    def check_duration(self, name: str, *, unit: TimeUnit = "s") -> None:
        """Mark rows as bad whose duration in column ``name``, if there is one and the cell has a value, is negative."""
        if self.has(name):
            self.times(name, unit=unit, rebase=False, missing=True)

    def check_end(self, name: str, start_s: Floats, *, unit: TimeUnit = "s") -> None:
        """Mark rows as bad that end, at the time in column ``name`` if there is one, before their start.

        Args:
            start_s: the starts, from ``times`` with the same origin.
        """
        if self.has(name):
            values = to_floats(self.table.columns[name]) / PER_SECOND[unit] - self.origin_s
            with np.errstate(invalid="ignore"):
                # A microsecond is more than rounding of a Unix time moves it.
                early = values < start_s - 1e-6
            self.reject(early, name, "ends before it starts", "a time from the start of the request on")

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
        hash_block_tokens: int | None = None,
        session: Ints | None = None,
        think_s: Floats | None = None,
    ) -> Trace:
        """Return the trace of the good rows.

        Args:
            leave_out: valid rows that do not belong to this trace.
            sort: sort rows by arrival; if False, a row out of order is an error.
            rebase: make the first arrival time 0.
            history: steps that the reader took.
            session, think_s: as in ``Trace``, one entry per row of the file.
        Raises:
            TraceError: for the first bad row, unless bad rows are skipped; for a row out of order, unless ``sort``;
                and if no row is left.
        """
        check_flag("sort", sort)
        check_flag("rebase", rebase)
        check_number("time_quantum_s", time_quantum_s)
        steps = [f"read {len(self.table.line) + len(self.table.broken):,} rows of {self.table.path}"]
        keep = self.good_rows(steps)
        if session is not None:  # a turn whose predecessor was skipped has nothing to follow
            followed = turns_to_keep(session, keep)
            if (lost := int((keep & ~followed).sum())) > 0:
                steps.append(f"left out {lost:,} turns that come after a bad row of their session")
            keep &= followed
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
                "order of arrival: sort the file, or set trace.sort=true"
            )
        if len(late):
            index = index[np.argsort(arrivals, kind="stable")]
            arrivals = arrival_s[index]
            steps.append(f"sorted by arrival ({len(late):,} rows came before the row ahead of them)")
        if rebase and arrivals[0] + self.origin_s != 0:
            steps.append(f"arrivals counted from the first one, at {arrivals[0] + self.origin_s:.16g} s")
            arrivals = arrivals - arrivals[0]
        return Trace(
            arrival_s=arrivals,
            prompt_tokens=prompt_tokens[index],
            output_tokens=output_tokens[index],
            hash_ids=None if hash_ids is None else tuple(hash_ids[i] for i in index.tolist()),
            name=str(name),
            source=self.table.path,
            history=tuple(steps),
            time_quantum_s=time_quantum_s,
            hash_block_tokens=hash_block_tokens,
            session=None if session is None else session[index],
            think_s=None if think_s is None else think_s[index],
        )

    def good_rows(self, steps: list[str]) -> NDArray[np.bool_]:
        """Return which rows are good, bool[rows]; report the others in ``steps`` and the log.

        Raises:
            TraceError: for the first bad row of the file, unless bad rows are skipped.
        """
        rows = self.table.broken.merged(self.bad)
        if rows and self.table.file.on_bad_row == "error":
            first = min((row for row, _ in rows), key=lambda row: row.line)
            others = len(rows) - 1
            at_least = "at least " if len(self.table.broken) >= ENOUGH_BAD_ROWS else ""
            more = f" ({at_least}{others:,} more rows are bad)" if others else ""
            raise TraceError(
                f"{self.table.path}, {self.table.unit} {first.line}, column {first.column!r}: {first.kind}: "
                f"{first.value!r}; allowed: {first.allowed}. Correct the row, or set trace.on_bad_row=skip to leave "
                f"out and count such rows{more}"
            )
        for row, count in rows:
            steps.append(
                f"skipped {count:,} bad row{'s' * (count > 1)}: {row.kind} in column {row.column!r}, "
                f"first at {self.table.unit} {row.line}"
            )
            log.warning("%s: %s", self.table.path, steps[-1])
        return ~self.is_bad

    def _numbers(
        self, name: str, *, minimum: float, maximum: float, integers: bool, allowed: str, missing: bool = False
    ) -> Floats:
        column = self.table.columns[name]
        values = to_floats(column)
        with np.errstate(invalid="ignore"):
            good = (values >= minimum) & (values <= maximum)
            if integers:
                good &= values == np.floor(values)

        def kind(text: str) -> str:
            return kind_of_bad_number(text, minimum=minimum, maximum=maximum)

        wrong = ~good & ~empty_cells(column) if missing else ~good
        self._reject(name, np.flatnonzero(wrong), allowed, kind)
        return np.where(good, values, 0.0)

    def _reject(self, name: str, index: Ints, allowed: str, kind: Callable[[str], str]) -> None:
        """Mark rows as bad; ``kind`` says what is wrong with the text of a cell."""
        new = index[~self.is_bad[index]]
        if len(new) == 0:
            return
        self.is_bad[new] = True
        column = self.table.columns[name]
        if self.table.file.on_bad_row == "error":
            text = cell_text(column[new[0]])
            self.bad.add(BadRow(int(self.table.line[new[0]]), name, text[:80], kind(text), allowed), len(new))
            return
        cells = (
            [column[i] for i in new.tolist()] if isinstance(column, list) else column.take(pa.array(new)).to_pylist()
        )
        texts = [cell_text(cell) for cell in cells]
        kinds = list(map(cache(kind), texts))
        for name_of_kind, count in Counter(kinds).items():
            first = kinds.index(name_of_kind)
            row = BadRow(int(self.table.line[new[first]]), name, texts[first][:80], name_of_kind, allowed)
            self.bad.add(row, count)
