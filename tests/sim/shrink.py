"""Shrinking of failing random cases, shared by the comparisons of engines, clusters and disaggregated systems."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

C = TypeVar("C")
T = TypeVar("T")


def shrunk_case(case: C, smaller: Callable[[C], Iterable[C]], differences: Callable[[C], list[str]]) -> C:
    """Return a case that still differs and of which no smaller one does.

    Args:
        case: a case that differs. smaller: yields smaller cases. differences: what differs in a case; empty for none.
    """
    while True:
        found = next((candidate for candidate in smaller(case) if differences(candidate)), None)
        if found is None:
            return case
        case = found


def without_some(rows: tuple[T, ...]) -> Iterator[tuple[T, ...]]:
    """Yield the rows without one run of them: without a half, then without a quarter, down to a single row."""
    size = len(rows) // 2
    while size:
        for start in range(0, len(rows), size):
            yield rows[:start] + rows[start + size :]
        size //= 2
