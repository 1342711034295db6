"""Fields of a file's requests as numbers, whatever the file holds there."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from sim.errors import ConfigError, TraceError
from sim.types import Floats

PER_SECOND = {"s": 1.0, "ms": 1e3, "us": 1e6, "ns": 1e9}
LARGEST = 1e30
"""No time or count is larger, in any unit; sums of such numbers stay finite."""
TRACE_ADVICE = re.compile(r",? (or|and) (raise|set|lower) trace\.\w+(=\w+)?( \(bytes\))?")


def number(value: Any) -> float:
    """Return a value of a file as a number; NaN if it is none."""
    if isinstance(value, bool) or value is None:
        return np.nan
    if isinstance(value, str | bytes):
        text = value.decode(errors="replace") if isinstance(value, bytes) else value
        if len(text) > 60:
            return np.nan
        value = text.strip().replace(" ", "x")
    try:
        found = float(value)
    except (TypeError, ValueError, OverflowError):
        return np.nan
    return found if abs(found) <= LARGEST else np.nan


def numbers(values: Sequence[Any], per_second: float = 1.0) -> Floats:
    """Return values of a file as numbers divided by ``per_second``; NaN where there is none."""
    return np.array([number(value) for value in values], dtype=np.float64) / per_second


def field(entries: Sequence[Mapping[str, Any]], *names: str) -> list[Any]:
    """Return one field of all entries, under the first of its names that any entry has; None where there is none.

    ``a.b`` looks for b in the object a.
    """
    for name in names:
        found = [_inside(entry, name.split(".")) for entry in entries]
        if any(value is not None for value in found):
            return found
    return [None] * len(entries)


def _inside(value: Any, path: Sequence[str]) -> Any:
    for name in path:
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def objects(values: Any, source: Path, what: str) -> list[Mapping[str, Any]]:
    """Return a list of a file as objects; what is none becomes an empty one, whose request cannot be used.

    Raises:
        ConfigError: if the value is no list, or an empty one.
    """
    if not isinstance(values, list) or not values:
        raise ConfigError(f"{source} has no {what}; it needs one entry per request")
    return [value if isinstance(value, Mapping) else {} for value in values]


def gaps_of(values: Sequence[Any]) -> list[list[float]]:
    """Return the gaps between tokens of each request in seconds; none where a value is no list of times."""
    return [[gap for gap in map(number, cell) if gap >= 0] if isinstance(cell, list) else [] for cell in values]


@contextmanager
def as_run_errors() -> Iterator[None]:
    """Raise errors of the readers of traces as errors of hw.fit, without advice on keys that it does not have."""
    try:
        yield
    except TraceError as error:
        message = TRACE_ADVICE.sub("", str(error)).replace("give the path of a trace file", "check run=")
        raise ConfigError(message.replace("trace.path", "run")) from error


Reader = Callable[[Path], Any]
