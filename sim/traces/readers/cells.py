"""Cells of a column as numbers and as times; a cell that is neither is marked, not an error."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from sim.traces.readers.table import cell_text
from sim.types import Floats, Ints

# No digit may match in two ways, or a long cell of digits would take hours.
# ASCII: neither Arrow nor float() takes all the characters that count as blank in Unicode.
NUMBER = re.compile(r"\s*[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?\s*", re.ASCII)
NOT_FINITE = frozenset({"nan", "inf", "infinity"})
# Years are limited to what a nanosecond clock in 64 bits can hold.
TIMESTAMP = r"^(19|20)\d\d-\d\d-\d\d[ T]\d\d:\d\d:\d\d(\.\d{1,9})?(Z|[+-]\d\d:?\d\d)?$"
TIME_ZONE = r"(Z|[+-]\d\d:?\d\d)$"

EXACT_FLOAT = 2.0**53
"""Whole numbers up to this have an exact float64."""


def empty_cells(column: pa.ChunkedArray | list[Any]) -> NDArray[np.bool_]:
    """Return which cells have no value: bool[rows]."""
    return np.array([not cell_text(cell).strip() for cell in column], dtype=bool)


def holds_dates(column: pa.ChunkedArray | list[Any]) -> bool:
    """Return whether the first cell with a value is a date with a time of day."""
    if isinstance(column, pa.ChunkedArray):
        if pa.types.is_timestamp(column.type):
            return True
        if not pa.types.is_string(column.type):
            return False
    first = next((text for cell in column if (text := cell_text(cell).strip())), "")
    return re.match(TIMESTAMP, first) is not None


def from_earliest(
    column: pa.ChunkedArray | list[Any], values: Floats, usable: NDArray[np.bool_]
) -> tuple[Floats, float]:
    """Return times minus the earliest usable one, and that one; whole numbers beyond 2**53 are subtracted exactly."""
    origin = float(values[usable].min())
    if values[usable].max() > EXACT_FLOAT:
        cells = column if isinstance(column, list) else column.to_pylist()
        whole = [_whole(cell) for cell in cells]
        known = [number for number, use in zip(whole, usable.tolist(), strict=True) if use]
        if None not in known:
            first = min(number for number in known if number is not None)
            exact = [float(number - first) if number is not None else np.nan for number in whole]
            return np.where(usable, exact, values - origin), origin
    return values - origin, origin


def _whole(cell: Any) -> int | None:
    text = cell_text(cell).strip()
    return int(text) if text.isascii() and text.isdigit() and len(text) < 40 else None


def to_floats(column: pa.ChunkedArray | list[Any]) -> Floats:
    """Return the cells as numbers, NaN for a cell that is not a number."""
    if isinstance(column, list):
        if set(map(type, column)) == {float}:
            return np.array(column, dtype=np.float64)
        return np.array([_float_of_json(cell) for cell in column], dtype=np.float64)
    if any(kind(column.type) for kind in (pa.types.is_integer, pa.types.is_floating, pa.types.is_decimal)):
        # safe=False: an integer beyond 2**53 loses digits, but it is out of range anyway.
        return np.asarray(column.cast(pa.float64(), safe=False).to_numpy(), dtype=np.float64)
    if not pa.types.is_string(column.type):
        return np.array([_float_of_json(cell) for cell in column.to_pylist()], dtype=np.float64)
    try:
        return np.asarray(column.cast(pa.float64()).to_numpy(), dtype=np.float64)
    except pa.ArrowInvalid:  # some cell is not a number; Arrow does not report which
        shaped = pc.match_substring_regex(column, f"^({NUMBER.pattern})$")
        numbers = pc.if_else(shaped, pc.ascii_trim(column, " \t+"), "nan")
    try:
        return np.asarray(numbers.cast(pa.float64()).to_numpy(), dtype=np.float64)
    except pa.ArrowInvalid:  # Arrow reads fewer numbers than Python
        pass
    return np.array([float(t) if NUMBER.fullmatch(t) else np.nan for t in column.to_pylist()], dtype=np.float64)


def _float_of_json(cell: Any) -> float:
    # Python converts JSON's true to 1 and "12" to 12; in a trace neither is a number.
    if type(cell) is not int and type(cell) is not float:
        return float("nan")
    try:
        return float(cell)
    except OverflowError:
        return float("inf")


def kind_of_bad_number(text: str, *, minimum: float, maximum: float) -> str:
    """Return what is wrong with the text of a cell that is no allowed number."""
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


def dates_ns(column: pa.ChunkedArray) -> tuple[Ints, NDArray[np.bool_], NDArray[np.bool_]]:
    """Return texts as nanoseconds since 1970, UTC where no zone is stated; which are dates; which state a time zone."""
    shaped = pc.match_substring_regex(column, TIMESTAMP).to_numpy().astype(bool)
    if shaped.all():
        for zone in (None, "UTC"):  # fast, and an error if some state a time zone and some do not
            try:
                times_ns = column.cast(pa.timestamp("ns", tz=zone)).cast(pa.int64()).to_numpy()
            except pa.ArrowInvalid:
                continue
            return np.asarray(times_ns, dtype=np.int64), shaped, np.full(len(shaped), zone is not None)
    text = np.where(shaped, column.to_numpy(), "")
    times = pd.to_datetime(pd.Series(text), format="ISO8601", errors="coerce", utc=True).dt.as_unit("ns")
    zoned = pc.match_substring_regex(column, TIME_ZONE).to_numpy().astype(bool)
    return np.asarray(times.astype("int64"), dtype=np.int64), np.asarray(times.notna(), dtype=bool), zoned
