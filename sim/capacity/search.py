"""Search for a capacity: the rate up to which a curve, SLO attainment against rate, stays at or above a target.

The curve need not fall monotonously: a higher rate fills batches better, or moves a burst away from a shortage. So the
search first scans rates in steps of a factor `SCAN`, from some below the first miss to some above the first at which
every replay misses, and then halves the gap below the first miss. What it reports is a bracket: the target was met at
its lower end and at every scanned rate below, and missed at its upper end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy import stats

SCAN = math.sqrt(2.0)
"""Factor between two scanned rates."""
STEPS_DOWN = 6
"""Steps below the start, a factor of 8, after which much lower rates are tried: if they miss, so do those between."""
LEAP = 8.0
"""Factor between the lower rates that are tried there before the lowest."""
STEPS_UP = 16
"""How far above the start the scan goes: a factor of 256."""
STEPS_BEYOND = 2
"""Scanned rates below the highest that all replays meet, and above the lowest that all miss: is the curve monotone?"""
CONFIDENCE = 0.95


@dataclass(slots=True)
class Curve:
    """SLO attainment of one replay against its rate; each rate is measured once.

    measure: rate in requests per second -> attainment. points: what was measured so far.
    most_below: a measured rate -> the most that the attainment can be at any lower rate.
    """

    measure: Callable[[float], float]
    points: dict[float, float] = field(default_factory=dict)
    most_below: Callable[[float], float] = lambda _rate_rps: 1.0

    def __call__(self, rate_rps: float) -> float:
        """Return the attainment at a rate."""
        if rate_rps not in self.points:
            self.points[rate_rps] = self.measure(rate_rps)
        return self.points[rate_rps]


@dataclass(frozen=True, slots=True, kw_only=True)
class Bracket:
    """Where one curve falls below the target.

    met_rps: the highest rate at which it was met, with all measured rates below it; 0 if it was met at none.
    missed_rps: the lowest measured rate above that at which it was missed; ``inf`` if it was missed at none.
    met_again_rps: measured rates above ``missed_rps`` at which it was met: there the curve is not monotone.
    """

    met_rps: float
    missed_rps: float
    met_again_rps: tuple[float, ...] = ()


def scan_rates(curves: Sequence[Curve], target: float, start_rps: float, least_rps: float) -> list[float]:
    """Measure every curve at common rates around the place where it falls below the target; return these rates.

    They reach down until every curve meets the target, but not below ``least_rps``, and up until every curve misses it,
    at most ``STEPS_UP`` steps above ``start_rps``; ``STEPS_BEYOND`` more rates follow on either side. They stop where
    no lower rate can meet the target: a replay at a low rate is long, and a policy may decide at every second of it.
    """
    start_rps = max(start_rps, least_rps)
    down, up = _scan_down(curves, target, start_rps, least_rps), _scan_up(curves, target, start_rps)
    return sorted({*down, *up})


def _scan_down(curves: Sequence[Curve], target: float, low: float, least_rps: float) -> list[float]:
    rates = [low]
    while not _all_meet(curves, low, target):
        if low <= least_rps or _no_lower_rate_meets(curves, low, target):
            return rates
        if len(rates) == STEPS_DOWN:
            leaps = _leaps(curves, target, low, least_rps)
            rates += leaps
            if not _all_meet(curves, leaps[-1], target):
                return rates
        low = max(low / SCAN, least_rps)
        rates.append(low)
    for _ in range(STEPS_BEYOND):
        if low > least_rps:
            low = max(low / SCAN, least_rps)
            _measured(curves, low)
            rates.append(low)
    return rates


def _leaps(curves: Sequence[Curve], target: float, low: float, least_rps: float) -> list[float]:
    """Return much lower rates, down to the first at which every curve meets the target, or below which none can."""
    rates: list[float] = []
    while low > least_rps:
        low = max(low / LEAP, least_rps)
        rates.append(low)
        if _all_meet(curves, low, target) or _no_lower_rate_meets(curves, low, target):
            break
    return rates


def _scan_up(curves: Sequence[Curve], target: float, high: float) -> list[float]:
    rates, missed = [], 0
    for _ in range(STEPS_UP):
        missed = 0 if max(_measured(curves, high)) >= target else missed + 1
        if missed > STEPS_BEYOND:
            break
        high *= SCAN
        rates.append(high)
        _measured(curves, high)
    return rates


def _measured(curves: Sequence[Curve], rate_rps: float) -> list[float]:
    return [curve(rate_rps) for curve in curves]


def _all_meet(curves: Sequence[Curve], rate_rps: float, target: float) -> bool:
    return min(_measured(curves, rate_rps)) >= target


def _no_lower_rate_meets(curves: Sequence[Curve], rate_rps: float, target: float) -> bool:
    return any(curve.most_below(rate_rps) < target for curve in curves)


def bracket_of(curve: Curve, target: float, precision: float) -> Bracket:
    """Halve the gap below the first miss of a scanned curve until it is at most ``precision`` of its lower end."""
    rates = sorted(curve.points)
    missed = next((at for at, rate in enumerate(rates) if curve(rate) < target), len(rates))
    if missed == 0:
        return Bracket(met_rps=0.0, missed_rps=rates[0], met_again_rps=_met_above(curve, target, rates[0]))
    if missed == len(rates):
        return Bracket(met_rps=rates[-1], missed_rps=math.inf)
    low, high = rates[missed - 1], rates[missed]
    while high / low - 1.0 > precision:
        middle = math.sqrt(low * high)
        if curve(middle) >= target:
            low = middle
        else:
            high = middle
    return Bracket(met_rps=low, missed_rps=high, met_again_rps=_met_above(curve, target, high))


def _met_above(curve: Curve, target: float, rate_rps: float) -> tuple[float, ...]:
    return tuple(sorted(rate for rate, met in curve.points.items() if rate > rate_rps and met >= target))


def interval(capacities: Sequence[float]) -> tuple[float, float] | None:
    """Return the 95 % t-interval of the geometric mean of the capacities of several replays; None for fewer than two.

    Replays count as independent samples: seeds of a generator are, windows of one trace nearly.
    """
    if len(capacities) < 2:
        return None
    logs = np.log(capacities)
    spread = float(logs.std(ddof=1)) / math.sqrt(len(logs)) * float(stats.t.ppf(0.5 + CONFIDENCE / 2, len(logs) - 1))
    return math.exp(float(logs.mean()) - spread), math.exp(float(logs.mean()) + spread)


def geometric_mean(capacities: Sequence[float]) -> float:
    """Return the geometric mean: rates differ by factors."""
    return math.exp(float(np.log(capacities).mean()))
