"""Tests of many random cases: the first ones run in `make test`, the others in `make test-slow`."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import Any

import pytest


def quick(values: Iterable[Any], count: int) -> list[Any]:
    """Return parameters of a test; those behind the first ``count`` are marked slow. A tuple holds several."""
    rest = iter(values)
    slow = (value if isinstance(value, tuple) else (value,) for value in rest)
    return [*islice(rest, count), *(pytest.param(*value, marks=pytest.mark.slow) for value in slow)]
