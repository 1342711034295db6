"""The fit: few numbers, careful losses, held-out errors and ranges.

For each request, two ratios of real to simulated are used as logarithms: TTFT, in units of 0.2, and the mean gap
between tokens, in units of 0.05. A pseudo-Huber loss keeps outliers from deciding. Where requests cannot be matched,
because a router chose among several servers, the quartiles P25 and P50 of both take their place. Priors count 0.3. The
last third of the requests is held back, and a fit that does not predict it better than no fit is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy.optimize import least_squares, minimize
from scipy.special import pseudo_huber

from hw.fit.measured import Bools, MeasuredRun
from hw.fit.parameters import FLOOR, FRONT_END, PRIORS, Point, point_of, server_at
from hw.fit.server import Server, simulate
from sim.results.records import Moments
from sim.types import Floats, Ints

TTFT_SCALE, GAP_SCALE = 0.2, 0.05
PRIOR_WEIGHT = 0.3
FIT_SHARE = 2 / 3
QUARTILES = (0.25, 0.50)
COPIES, FEW_COPIES = 4, 2
"""Simulations for each point; few with several servers, whose simulation takes longer, and for a quick fit."""
WORST_RATIO = 10.0
"""Stands for a request that the simulated server did not answer."""
STEP, WIDE_STEP = 0.3, 0.5
"""Of the differences that approximate derivatives, in deviations (1 is 10 % of memory_bound): for the fit and for its
ranges. Smaller steps would see how single requests jump to another iteration, as if a run told more than it does."""
ORIGIN = 10.0
"""Added to deviations for the optimizer, whose first steps are as long as its starting point is far from 0."""
POLISH_STEP, POLISH_SIMULATIONS = 0.3, 25
"""Of the search without derivatives at the end: its first steps, in deviations, and its simulations for each number."""
FLOOR_SHARE = 0.8
"""A least time of an iteration counts if the loss with it is below this share of the loss without. A single number more
always fits noise a little better, and then lies at the shortest iterations."""
SHORT_GAPS = 0.1
"""The quantile of requests' mean gaps between tokens at which the search for the least time of an iteration starts."""
BLOCKS, REPEATS = 20, 200
"""Of the bootstrap. Requests that follow each other depend on each other, so blocks are sampled."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Case:
    """A run to fit, on its server. first: requests before it are warm-up. quick: for a rough fit."""

    run: MeasuredRun
    server: Server
    first: int = 0
    quick: bool = False

    @property
    def copies(self) -> int:
        """Simulations for each point."""
        return FEW_COPIES if self.quick or not self.matched else COPIES

    @property
    def matched(self) -> bool:
        """Whether each request can be compared with its own simulation: only one server could have served it."""
        return self.server.replicas == 1

    @property
    def fitted(self) -> Ints:
        """The requests that are fitted."""
        return np.arange(self.first, self.cut)

    @property
    def held_out(self) -> Ints:
        """The last third of the requests, which no fit sees."""
        return np.arange(self.cut, len(self.run))

    @property
    def cut(self) -> int:
        """The first request that is held out."""
        return self.first + round(FIT_SHARE * (len(self.run) - self.first))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Fitted:
    """A fit. nothing, fitted: mean loss of the held-out requests, of the description as it is and of the point.

    ranges: name -> P5 and P95 of the bootstrap. samples: some of its points.
    """

    point: Point
    ranges: dict[str, tuple[float, float]]
    samples: tuple[Point, ...]
    nothing: float
    fitted: float
    simulations: int

    @property
    def accepted(self) -> bool:
        """Whether the fit predicts the held-out requests better than no fit."""
        return self.fitted < self.nothing


@dataclass(frozen=True, slots=True, eq=False)
class Expected:
    """TTFT and mean gap of each request over several simulations, float64[copies, n].

    Whether a request just catches an iteration or just misses it is chance. The copies differ in that: their arrivals
    move within the duration of an iteration. Their mean is smooth in the fitted numbers.
    """

    ttft_s: Floats
    tpot_s: Floats

    def of(self, name: str, which: Ints, *, matched: bool) -> Floats:
        """Return the figures of some requests: the mean of each over the copies, or all of them if not matched."""
        values: Floats = getattr(self, name)[:, which]
        if not matched:
            return values.ravel()
        known = np.isfinite(values)
        count = known.sum(axis=0)
        total = np.where(known, values, 0.0).sum(axis=0)
        return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def expected(server: Server, run: MeasuredRun, copies: int) -> Expected:
    """Return what a server would do with a run, by so many simulations."""
    done = [simulate(replace(server, seed=server.seed + k), _moved(run, k)) for k in range(copies)]
    return Expected(np.stack([one.ttft_s for one in done]), np.stack([one.tpot_s for one in done]))


def _moved(run: MeasuredRun, copy: int) -> MeasuredRun:
    """Return a run whose requests are sent up to half a gap between tokens earlier or later, in the same order."""
    gaps_s = run.tpot_s[np.isfinite(run.tpot_s)]
    if not len(gaps_s) or run.arrival_s[-1] <= 0:
        return run
    move_s = np.random.default_rng(copy).uniform(-0.5, 0.5, size=len(run)) * float(np.median(gaps_s))
    arrival_s = np.sort(np.maximum(run.arrival_s + move_s, 0.0))
    return replace(run, arrival_s=arrival_s)


def loss(case: Case, server: Server, which: Ints) -> float:
    """Return the mean loss of some requests on a server; 0 if all agree, about 1.7 if both are off by their scale."""
    found = expected(server, case.run, case.copies)
    return float(np.sum(residuals(case.run, found, which, matched=case.matched) ** 2))


def residuals(real: Moments, simulated: Expected, which: Ints, *, matched: bool) -> Floats:
    """Return what least squares minimizes: root losses over the root of their number, for TTFT and gaps."""
    parts = []
    for name, scale in (("ttft_s", TTFT_SCALE), ("tpot_s", GAP_SCALE)):
        ours, theirs = simulated.of(name, which, matched=matched), getattr(real, name)[which]
        used = np.isfinite(theirs) & (theirs > 0)
        if not matched:
            ours = np.quantile(ours[np.isfinite(ours)], QUARTILES) if np.isfinite(ours).any() else np.full(2, np.nan)
            theirs = np.quantile(theirs[used], QUARTILES) if used.any() else np.full(2, np.nan)
            used = np.isfinite(theirs)
        parts.append(_root_losses(ours, theirs, used, scale))
    return np.concatenate(parts)


def _root_losses(ours: Floats, theirs: Floats, used: Bools, scale: float) -> Floats:
    """Return signed roots of the losses, 0 for requests without this figure."""
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.log(theirs / ours)
    logs = np.where(np.isfinite(logs), np.clip(logs, -np.log(WORST_RATIO), np.log(WORST_RATIO)), np.log(WORST_RATIO))
    roots = np.sign(logs) * np.sqrt(2.0 * pseudo_huber(1.0, logs / scale))
    count = max(int(used.sum()), 1)
    result: Floats = np.where(used, roots, 0.0) / np.sqrt(count)
    return result


def fit(
    cases: Sequence[Case], free: Sequence[str], *, most_steps: int = 15, polish: bool = True
) -> tuple[Point, _Problem, Floats]:
    """Return the best point, the problem and the point in deviations."""
    problem = _Problem(cases, free)
    if not free:
        return Point(values={}), problem, np.zeros(0)
    low = np.array([PRIORS[name].deviations(PRIORS[name].least) for name in free])
    high = np.array([PRIORS[name].deviations(PRIORS[name].most) for name in free])

    def at(x: Floats) -> Floats:
        return problem.residuals(x - ORIGIN)

    def slopes(x: Floats) -> Floats:
        return problem.jacobian(x - ORIGIN)

    tried = [
        least_squares(
            at,
            np.clip(start, low + 1e-6, high - 1e-6) + ORIGIN,
            jac=slopes,
            bounds=(low + ORIGIN, high + ORIGIN),
            max_nfev=most_steps,
            xtol=1e-3,
            ftol=1e-4,
        )
        for start in _starts(cases, free)
    ]
    found = min(tried, key=lambda one: float(one.cost))
    best = problem.polished(found.x - ORIGIN, low, high) if polish else found.x - ORIGIN
    return point_of(free, best), problem, best


def _starts(cases: Sequence[Case], free: Sequence[str]) -> list[Floats]:
    """Return where a fit starts, in deviations: at the description.

    A least time of an iteration that is below all iterations changes nothing, so the data have no slope there. With it,
    a second fit starts at the shortest gaps between tokens.
    """
    server = cases[0].server
    values = {name: PRIORS[name].middle for name in free}
    values |= {name: float(getattr(server.front_end, name)) for name in FRONT_END if name in free}
    starts = [values]
    if FLOOR in free:
        described_s = max(server.spec.priced().host_floor_s, PRIORS[FLOOR].least)
        floors_s = [described_s, _shortest_gaps_s(cases)]
        starts = [values | {FLOOR: floor_s} for floor_s in floors_s if floor_s > 0]
    return [np.array([PRIORS[name].deviations(one[name]) for name in free]) for one in starts]


def _shortest_gaps_s(cases: Sequence[Case]) -> float:
    """Return how long the shortest gaps between tokens take, in the run with the shortest; 0 if there are none."""
    gaps_s = [case.run.tpot_s[case.fitted] for case in cases]
    known = [one[np.isfinite(one)] for one in gaps_s if np.isfinite(one).any()]
    return min((float(np.quantile(one, SHORT_GAPS)) for one in known), default=0.0)


class _Problem:
    """Residuals of all cases as a function of the free numbers in deviations."""

    def __init__(self, cases: Sequence[Case], free: Sequence[str]) -> None:
        self.cases, self.free, self.simulations = cases, free, 0

    def simulated(self, deviations: Floats) -> list[Expected]:
        point = point_of(self.free, deviations)
        self.simulations += sum(case.copies for case in self.cases)
        return [expected(server_at(case.server, point), case.run, case.copies) for case in self.cases]

    def residuals(self, deviations: Floats) -> Floats:
        """Return those of the fitted requests of all cases, and the priors."""
        parts = self.of_data(self.simulated(deviations), [case.fitted for case in self.cases])
        return np.concatenate([*parts, PRIOR_WEIGHT * deviations])

    def of_data(self, simulated: Sequence[Expected], which: Sequence[Ints]) -> list[Floats]:
        share = 1.0 / np.sqrt(len(self.cases))
        return [
            share * residuals(case.run, one, rows, matched=case.matched)
            for case, one, rows in zip(self.cases, simulated, which, strict=True)
        ]

    def polished(self, deviations: Floats, low: Floats, high: Floats) -> Floats:
        """Return a better point near a good one, without derivatives: single requests that jump make the loss rough."""
        size = len(deviations)
        corners = np.concatenate([np.zeros((1, size)), POLISH_STEP * np.eye(size)]) - POLISH_STEP / 3
        simplex = np.clip(deviations + corners, low, high)
        simplex[0] = deviations
        options: Any = {"initial_simplex": simplex, "maxfev": POLISH_SIMULATIONS * size, "xatol": 0.01, "fatol": 1e-5}

        def cost(x: Any) -> float:
            return float(np.sum(self.residuals(np.clip(x, low, high)) ** 2))

        found = minimize(cost, deviations, method="Nelder-Mead", options=options)
        best: Floats = np.clip(found.x, low, high)
        return best

    def jacobian(self, deviations: Floats, size: float = STEP) -> Floats:
        """Return central differences over a step of this size."""
        columns = []
        for i in range(len(deviations)):
            step = np.zeros(len(deviations))
            step[i] = size
            columns.append((self.residuals(deviations + step) - self.residuals(deviations - step)) / (2 * size))
        return np.stack(columns, axis=1)


def fit_and_judge(cases: Sequence[Case], free: Sequence[str], *, seed: int = 0) -> Fitted:
    """Fit on the first two thirds of each run, judge on the last; return the fit with its ranges.

    A least time of an iteration that is not described counts if it explains the fitted requests much better than the
    other numbers do; else it is 0.
    """
    polish = all(case.matched for case in cases)
    found = fit(cases, free, polish=polish)
    if FLOOR not in free or cases[0].server.spec.priced().host_floor_s > 0:
        return _judged(*found, seed)
    others = fit(cases, [name for name in free if name != FLOOR], polish=polish)
    loss, without = (float(np.sum(problem.residuals(at) ** 2)) for _, problem, at in (found, others))
    if loss < FLOOR_SHARE * without:
        return _judged(*found, seed)
    fitted = _judged(*others, seed)
    return replace(
        fitted,
        point=_at_no_floor(fitted.point),
        ranges={**fitted.ranges, FLOOR: (0.0, _shortest_gaps_s(cases))},
        samples=tuple(map(_at_no_floor, fitted.samples)),
    )


def _at_no_floor(point: Point) -> Point:
    return Point(values={**point.values, FLOOR: 0.0})


def _judged(point: Point, problem: _Problem, deviations: Floats, seed: int) -> Fitted:
    """Return a fit with its ranges, judged on the last third of each run."""
    cases = problem.cases
    held = [case.held_out for case in cases]
    nothing = problem.of_data([expected(case.server, case.run, case.copies) for case in cases], held)
    fitted = problem.of_data(problem.simulated(deviations), held)
    ranges, samples = _bootstrap(problem, deviations, seed) if problem.free else ({}, (point,))
    return Fitted(
        point=point,
        ranges=ranges,
        samples=samples,
        nothing=float(sum(np.sum(part**2) for part in nothing)),
        fitted=float(sum(np.sum(part**2) for part in fitted)),
        simulations=problem.simulations,
    )


def _bootstrap(
    problem: _Problem, deviations: Floats, seed: int
) -> tuple[dict[str, tuple[float, float]], tuple[Point, ...]]:
    """Return the range of each number over samples of blocks of requests, and some of the points.

    Each sample takes one step of Gauss and Newton from the best point, with the requests weighted by how often they
    come in it: no further simulation is needed. The middles of the priors are sampled too, each from its prior, so that
    a number that the run hardly tells has the range of its prior.
    """
    random = np.random.default_rng(seed)
    rest, jacobian = problem.residuals(deviations), problem.jacobian(deviations, WIDE_STEP)
    weigh = _weights(problem.cases, random)
    found = []
    for _ in range(REPEATS):
        weight = np.concatenate([*weigh(), np.ones(len(deviations))])
        scaled, sampled = jacobian * weight[:, None], rest.copy()
        sampled[-len(deviations) :] += PRIOR_WEIGHT * random.standard_normal(len(deviations))
        step = np.linalg.lstsq(scaled.T @ jacobian, -scaled.T @ sampled, rcond=None)[0]
        found.append(deviations + np.clip(step, -3.0, 3.0))
    points = [point_of(problem.free, one) for one in found]
    ranges = {}
    for name in problem.free:
        low, high = np.quantile([point[name] for point in points], (0.05, 0.95)).tolist()
        best = point_of(problem.free, deviations)[name]
        ranges[name] = (min(float(low), best), max(float(high), best))
    return ranges, tuple(points[:8])


def _weights(cases: Sequence[Case], random: np.random.Generator) -> Callable[[], list[Floats]]:
    """Return a function that samples the weights of all residuals: how often each request's block comes."""

    def sample() -> list[Floats]:
        found = []
        for case in cases:
            count = len(case.fitted)
            if not case.matched:  # its quartiles: the spread of a median over samples is a part of the deviation of one
                found.append(random.exponential(size=2 * len(QUARTILES)))
                continue
            blocks = min(BLOCKS, count)
            times = np.bincount(random.integers(blocks, size=blocks), minlength=blocks).astype(np.float64)
            rows = times[np.arange(count) * blocks // count]
            found.append(np.concatenate([rows, rows]))
        return found

    return sample
