"""Tests of many random cases: the first ones run in `make test`, the others in `make test-slow`."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import Any

import pytest
from hypothesis import settings

EXAMPLES = 40
"""Random examples of a property in `make test`; `make test-slow` takes five times as many (tests/conftest.py)."""


def quick(values: Iterable[Any], count: int) -> list[Any]:
    """Return parameters of a test; those behind the first ``count`` are marked slow. A tuple holds several."""
    rest = iter(values)
    slow = (value if isinstance(value, tuple) else (value,) for value in rest)
    return [*islice(rest, count), *(pytest.param(*value, marks=pytest.mark.slow) for value in slow)]


def examples(count: int) -> settings:
    """Return the settings of a property that takes long: ``count`` random examples, five times as many in test-slow."""
    return settings(deadline=None, max_examples=count * settings().max_examples // EXAMPLES)
