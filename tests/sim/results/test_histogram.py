"""Distributions in bins: as exact as stated, and the same however the values are divided."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sim.results.histogram import BIN_RATIO, Histogram
from sim.results.metrics import QUANTILES

VALUES = st.lists(
    st.one_of(st.just(0.0), st.floats(1e-6, 1e6), st.sampled_from([1.0, BIN_RATIO, float("nan"), float("inf")])),
    max_size=60,
)


@given(VALUES)
def test_mean_and_maximum_are_exact_and_quantiles_within_half_a_bin(
    found: list[float],
) -> None:
    values = np.array(found, dtype=np.float64)
    shown, finite = Histogram.of(values).distribution(), np.sort(values[np.isfinite(values)])
    if not len(finite):
        assert set(shown.values()) == {None}
        return
    assert shown["mean"] == pytest.approx(finite.mean())
    assert shown["max"] == finite[-1]
    for name, share in QUANTILES.items():
        exact = finite[max(1, int(np.ceil(share * len(finite)))) - 1]
        assert shown[name] == pytest.approx(exact, rel=BIN_RATIO**0.5 - 1.0 + 1e-9)


@given(st.lists(VALUES, min_size=1, max_size=4))
def test_parts_add_up_to_the_whole(parts: list[list[float]]) -> None:
    whole, added = Histogram.of(np.array([one for part in parts for one in part], dtype=np.float64)), Histogram()
    for part in parts:
        added.add(Histogram.of(np.array(part, dtype=np.float64)))
    assert len(added) == len(whole)
    assert added.bins.tolist() == whole.bins.tolist()
    assert added.counts.tolist() == whole.counts.tolist()
    assert (added.zeros, added.largest) == (whole.zeros, whole.largest)
    assert added.total == pytest.approx(whole.total)


def test_a_value_counts_as_often_as_stated() -> None:
    counted = Histogram.of(np.array([1.0, 2.0, 3.0]), np.array([5, 0, 95]))
    assert len(counted) == 100
    assert counted.distribution()["mean"] == pytest.approx(2.9)
    assert counted.distribution()["p50"] == pytest.approx(3.0, rel=1e-3)
