"""The search for a capacity on known curves: where it stops, and what it says of curves that are not monotone."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sim.capacity.search import LEAP, SCAN, Bracket, Curve, bracket_of, geometric_mean, interval, scan_rates


def step(at_rps: float) -> Curve:
    return Curve(lambda rate: 1.0 if rate <= at_rps else 0.0)


def found(curve: Curve, *, start: float = 1.0, least: float = 0.01, precision: float = 0.02) -> Bracket:
    scan_rates([curve], 0.9, start, least)
    return bracket_of(curve, 0.9, precision)


@given(at=st.floats(0.02, 100), start=st.floats(0.5, 20), precision=st.floats(0.002, 0.2))
def test_the_bracket_contains_the_fall_of_a_falling_curve_and_is_as_narrow_as_wanted(
    at: float, start: float, precision: float
) -> None:
    bracket = found(step(at), start=start, precision=precision)
    assert bracket.met_rps <= at < bracket.missed_rps
    assert bracket.missed_rps / bracket.met_rps - 1 <= precision
    assert bracket.met_again_rps == ()


def test_a_curve_that_rises_again_is_reported_and_its_first_fall_is_the_capacity() -> None:
    curve = Curve(lambda rate: 0.0 if 1.0 < rate < 2.0 or rate > 4.0 else 1.0)
    bracket = found(curve, start=1.5)
    assert bracket.met_rps == pytest.approx(1.0, rel=0.02)
    assert bracket.met_again_rps
    assert all(2.0 <= rate <= 4.0 for rate in bracket.met_again_rps)


def test_a_target_missed_at_the_lowest_rate_has_no_capacity_and_one_never_missed_no_end() -> None:
    assert found(Curve(lambda rate: 0.1)) == Bracket(met_rps=0.0, missed_rps=0.01)
    assert math.isinf(found(Curve(lambda rate: 1.0)).missed_rps)


def test_no_rate_is_measured_twice_and_all_curves_are_measured_at_the_scanned_rates() -> None:
    calls: list[float] = []
    curves = [Curve(lambda rate: calls.append(rate) or float(rate < 3)), step(0.7)]  # type: ignore[func-returns-value]
    rates = scan_rates(curves, 0.9, 2.0, 0.01)
    assert len(calls) == len(set(calls))
    assert all(set(rates) <= set(curve.points) for curve in curves)
    assert rates[0] < 0.7 < 3 < rates[-1]
    assert max(b / a for a, b in itertools.pairwise(rates)) == pytest.approx(SCAN)


def test_the_interval_is_that_of_students_t_on_the_logarithms() -> None:
    assert interval([2.0]) is None
    low, high = interval([1.0, 2.0, 4.0])  # type: ignore[misc]
    assert math.sqrt(low * high) == pytest.approx(geometric_mean([1.0, 2.0, 4.0])) == pytest.approx(2.0)
    assert math.log(high / 2.0) == pytest.approx(4.302653 * math.log(2) / math.sqrt(3), rel=1e-6)


def test_a_target_that_no_rate_meets_is_found_without_trying_all_of_them() -> None:
    curve = Curve(lambda rate: 0.5)
    assert found(curve, start=10.0).met_rps == 0.0
    assert len(curve.points) < 12


def test_the_search_stops_where_no_lower_rate_can_meet_the_target() -> None:
    curve = Curve(lambda rate: 0.5, most_below=lambda rate: 0.6 if rate < 0.5 else 1.0)
    bracket = found(curve, start=8.0, least=1e-6)
    assert bracket.met_rps == 0.0
    assert 0.5 / LEAP <= bracket.missed_rps < 0.5


@given(at=st.floats(1e-5, 1e-1))
def test_a_target_that_only_very_low_rates_meet_is_found_by_leaps(at: float) -> None:
    bracket = found(step(at), start=100.0, least=1e-6)
    assert bracket.met_rps <= at < bracket.missed_rps


def test_a_target_that_only_higher_rates_meet_is_seen_although_the_search_down_gave_up() -> None:
    curve = Curve(lambda rate: float(2.0 < rate < 4.0), most_below=lambda rate: 0.0)
    assert found(curve).met_again_rps
