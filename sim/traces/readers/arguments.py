"""Checks of a reader's arguments: what is wrong with a value, under the key as typed on a command line."""

from __future__ import annotations

import math
from typing import Any, get_args

from sim.errors import TraceError, nearest


def check_choice(key: str, value: Any, allowed: Any) -> None:
    """Raise a TraceError if ``value`` is none of the choices of a ``Literal``."""
    if value not in get_args(allowed):
        raise TraceError(f"trace.{key} is {value!r}; {nearest(str(value), get_args(allowed))}")


def check_flag(key: str, value: Any) -> None:
    """Raise a TraceError if ``value`` is not true or false."""
    if not isinstance(value, bool):
        raise TraceError(f"trace.{key} is {value!r}; it must be true or false")


def check_whole(key: str, value: Any) -> None:
    """Raise a TraceError if ``value`` is not a whole number from 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise TraceError(f"trace.{key} is {value!r}; it must be a whole number from 1")


def check_number(key: str, value: Any, *, above: float | None = None) -> None:
    """Raise a TraceError if ``value`` is not a finite number from 0, or above ``above``."""
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not number or (value < 0 if above is None else value <= above):
        allowed = "from 0" if above is None else f"above {above:g}"
        raise TraceError(f"trace.{key} is {value!r}; it must be a finite number {allowed}")


def check_name(key: str, value: Any) -> None:
    """Raise a TraceError if ``value`` is not the name of a column."""
    if not isinstance(value, str) or not value.strip():
        raise TraceError(f"trace.{key} is {value!r}; it must be the name of a column")
