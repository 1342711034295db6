"""The numbers that a report draws: few enough for a page, and each of them a value that the run recorded.

A line of a long run keeps the first, the lowest, the highest and the last value in each of BINS bins of time, so no
peak is lost, whatever the length of the run.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sim.cost.ffn_width import FULL_WIDTH
from sim.cost.plan import Plan
from sim.report.run_data import RunData
from sim.types import Floats, Ints

BINS = 500
"""Bins of time in which a long line keeps four values."""
SLO_BINS = 100
"""Most bins of time in which arrivals and SLO attainment are counted."""
PLAN_COLUMNS = 300
"""Most columns of a map of plans, and most marks of plan changes."""
QUANTILES: Floats = np.unique(
    np.round(np.concatenate([np.linspace(0.0, 1.0, 201), 1 - np.geomspace(0.001, 0.1, 41)]), 6)
)
"""Where a cumulative distribution of many values is drawn: densely near 1."""

DROPPED, PREFILL_ONLY, BITS_4, BITS_8, BITS_16, STREAMED, KV_ONLY, NESTED, NARROW = range(9)
"""States of a block in a map of plans."""
STATE_OF_BITS = {4: BITS_4, 8: BITS_8, 16: BITS_16}


@dataclass(frozen=True, slots=True)
class Steps:
    """Values over time; each holds until the next. NaN: no value.

    time_s: float64[n], ascending. values: float64[n].
    """

    time_s: Floats
    values: Floats

    def thinned(self, end_s: float, bins: int = BINS) -> Steps:
        """Return at most four steps per bin of time: the first, lowest, highest and last value of each."""
        if len(self.time_s) <= 4 * bins or not end_s > 0:
            return self
        at = np.clip((self.time_s / end_s * bins).astype(np.int64), 0, bins - 1)
        first = np.flatnonzero(np.diff(at, prepend=-1))
        last = np.append(first[1:], len(at)) - 1
        lowest = np.lexsort((np.nan_to_num(self.values, nan=math.inf), at))[first]
        highest = np.lexsort((np.nan_to_num(self.values, nan=-math.inf), at))[last]
        kept = np.unique(np.concatenate([first, lowest, highest, last]))
        return Steps(self.time_s[kept], self.values[kept])

    def until(self, end_s: float) -> Steps:
        """Return the steps with the last value held until ``end_s``."""
        if not len(self.time_s) or self.time_s[-1] >= end_s:
            return self
        return Steps(np.append(self.time_s, end_s), np.append(self.values, self.values[-1]))


def _count(begin_s: Floats, finish_s: Floats) -> Steps:
    """Return how many spans are open over time; one that does not end (NaN) stays open."""
    begin_s, finish_s = begin_s[np.isfinite(begin_s)], finish_s[np.isfinite(finish_s)]
    times_s = np.concatenate([begin_s, finish_s])
    steps = np.repeat([1.0, -1.0], [len(begin_s), len(finish_s)])
    order = np.argsort(times_s, kind="stable")
    at_s, values = times_s[order], np.cumsum(steps[order])
    final = np.append(at_s[1:] != at_s[:-1], True) if len(at_s) else np.empty(0, dtype=np.bool_)
    return Steps(at_s[final], values[final])


def _rejected(run: RunData) -> NDArray[np.bool_]:
    return np.asarray(run.records["status"].astype(str) == "rejected", dtype=np.bool_)


def _with_idle(run: RunData, values: Floats, idle: float) -> Steps:
    """Return a value per iteration, and ``idle`` from the end of each after which no request was in the system."""
    assert run.iterations is not None
    start_s, end_s = (run.iterations[name].to_numpy(dtype=np.float64) for name in ("start_s", "end_s"))
    arrival_s, finish_s, rejected = run.column("arrival_s"), run.column("finish_s"), _rejected(run)
    arrived = np.searchsorted(np.sort(arrival_s), end_s, side="right")
    ended = np.searchsorted(np.sort(finish_s[np.isfinite(finish_s)]), end_s, side="right")
    refused = np.searchsorted(np.sort(arrival_s[rejected]), end_s, side="right")
    gap = np.append(start_s[1:] > end_s[:-1], True) if len(start_s) else np.empty(0, dtype=np.bool_)
    empty = gap & (arrived <= ended + refused)
    times_s = np.concatenate([start_s, end_s[empty]])
    order = np.argsort(times_s, kind="stable")
    return Steps(times_s[order], np.concatenate([values, np.full(int(empty.sum()), idle)])[order])


def running(run: RunData) -> Steps:
    """Return the running requests: at the start of each iteration, or from admission to end without iterations."""
    if run.iterations is not None:
        return _with_idle(run, run.iterations["running"].to_numpy(dtype=np.float64), 0.0)
    return _count(run.column("admitted_s"), run.column("finish_s"))


def waiting(run: RunData) -> Steps:
    """Return the waiting requests; counted from the records, rejected ones are left out: their end is unknown."""
    if run.iterations is not None:
        return _with_idle(run, run.iterations["waiting"].to_numpy(dtype=np.float64), 0.0)
    stays = ~_rejected(run)
    return _count(run.column("arrival_s")[stays], run.column("admitted_s")[stays])


def kv_share(run: RunData) -> Steps | None:
    """Return the share of KV blocks in use at the start of each iteration; no value while nothing runs."""
    if run.iterations is None:
        return None
    return _with_idle(run, run.iterations["kv_used_share"].to_numpy(dtype=np.float64), math.nan)


def weight_share(run: RunData) -> Steps | None:
    """Return the bytes of the weights in memory over those of the dense model."""
    if run.kept_share is None:
        return None
    return Steps(*(run.kept_share[name].to_numpy(dtype=np.float64) for name in ("time_s", "kept_share")))


def bin_width_s(end_s: float, bins: int) -> float:
    """Return the shortest of 1, 2 and 5 times a power of ten with which at most ``bins`` bins last until ``end_s``."""
    if not end_s > 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(end_s / bins))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power * bins >= end_s)


@dataclass(frozen=True, slots=True)
class Arrivals:
    """Requests by their arrival: bins of ``width_s`` seconds, from 0 s.

    arrived: int64[b]. met: int64[b], those that met the SLO.
    """

    width_s: float
    arrived: Ints
    met: Ints

    @property
    def start_s(self) -> Floats:
        """When each bin begins."""
        return np.arange(len(self.arrived), dtype=np.float64) * self.width_s

    @property
    def attainment(self) -> Floats:
        """The share that met the SLO; NaN in a bin without arrivals."""
        share = np.full(len(self.arrived), np.nan)
        np.divide(self.met, self.arrived, out=share, where=self.arrived > 0)
        return share


def arrivals(run: RunData, end_s: float) -> Arrivals:
    """Return the requests of a run by their arrival, in bins that fit a time axis until ``end_s``."""
    width_s = bin_width_s(end_s, SLO_BINS)
    at = np.maximum((run.column("arrival_s") / width_s).astype(np.int64), 0)
    met = run.records["met_slo"].to_numpy(dtype=np.bool_)
    size = int(at.max()) + 1 if len(at) else 0
    return Arrivals(
        width_s, np.bincount(at, minlength=size).astype(np.int64), np.bincount(at[met], minlength=size).astype(np.int64)
    )


def distribution(values: Floats) -> tuple[Floats, Floats]:
    """Return (values, shares): the cumulative distribution of the finite values, with linear interpolation.

    It has a point at P50, P90, P95 and P99, with the values that a summary states.
    """
    values = values[np.isfinite(values)]
    if not len(values):
        return np.empty(0), np.empty(0)
    return np.quantile(values, QUANTILES), QUANTILES


@dataclass(frozen=True, slots=True)
class PlanMap:
    """The state of every block over time.

    edges_s: float64[c + 1], bounds of the columns in seconds. state: int8[2 * layers, c], first all MHA blocks by
    layer, then all FFN blocks. exact: whether each column is one plan; if not, it shows the plan at its start.
    """

    edges_s: Floats
    state: NDArray[np.int8]
    exact: bool


def plan_map(run: RunData, end_s: float) -> PlanMap | None:
    """Return the map of the decided plans until ``end_s``; None if the plan is unknown."""
    plans = [(at_s, plan) for at_s, plan in run.plans if at_s < end_s or at_s == 0.0]
    if not plans:
        return None
    begin_s = np.array([at_s for at_s, _ in plans])
    exact = len(plans) <= PLAN_COLUMNS
    if exact:
        shown = np.flatnonzero(np.diff(begin_s, append=math.inf) > 0)  # of several at one time, the last
        starts_s = begin_s[shown]
    else:
        starts_s = np.arange(PLAN_COLUMNS) * end_s / PLAN_COLUMNS
        shown = np.searchsorted(begin_s, starts_s, side="right") - 1
    states = np.stack([block_states(plans[at][1]) for at in shown], axis=1)
    return PlanMap(np.append(starts_s, max(end_s, starts_s[-1] + 1e-9)), states, exact)


def block_states(plan: Plan) -> NDArray[np.int8]:
    """Return the state of each block under a plan: int8[2 * layers], first MHA, then FFN."""
    found = []
    full = (FULL_WIDTH,) * len(plan.ffn_width)
    for prefill, decode, widths in (
        (plan.prefill.mha, plan.decode.mha, full),
        (plan.prefill.ffn, plan.decode.ffn, plan.ffn_width),
    ):
        more = plan.weight_bits, plan.streamed, plan.kv_only, plan.nested, widths
        for in_prefill, in_decode, bits, streamed, kv_only, nested, width in zip(prefill, decode, *more, strict=True):
            there = STREAMED if streamed else KV_ONLY if kv_only else NESTED if nested else STATE_OF_BITS[bits]
            there = NARROW if width < FULL_WIDTH and not streamed else there
            found.append(there if in_decode else PREFILL_ONLY if in_prefill else DROPPED)
    return np.array(found, dtype=np.int8)


@dataclass(frozen=True, slots=True)
class Change:
    """One plan change, or several that share a mark.

    ready_s: when the last of them ran in full; NaN if it was superseded. count: how many there are.
    """

    time_s: float
    ready_s: float
    to_plan: str
    bytes_in: float
    bytes_freed: float
    preempted: int
    count: int


def changes(run: RunData, end_s: float) -> list[Change]:
    """Return the plan changes: each, or one mark per bin of time with those in it if there are many."""
    if run.transitions is None or not len(run.transitions):
        return []
    frame = run.transitions
    time_s = frame["time_s"].to_numpy(dtype=np.float64)
    groups: Any = np.arange(len(frame))
    if len(frame) > PLAN_COLUMNS:
        groups = np.minimum((time_s / max(end_s, 1e-9) * PLAN_COLUMNS).astype(np.int64), PLAN_COLUMNS - 1)
    return [
        Change(
            float(rows["time_s"].iloc[0]),
            float(rows["ready_s"].iloc[-1]),
            str(rows["to"].iloc[-1]),
            float(rows["bytes_in"].sum()),
            float(rows["bytes_freed"].sum()),
            int(rows["preempted"].sum()),
            len(rows),
        )
        for _, rows in frame.groupby(groups)
    ]


def undominated(points: Floats) -> NDArray[np.bool_]:
    """Return bool[n]: which points no other is at least as good as in every column and better in one.

    Args:
        points: float64[n, k]; smaller is better.
    """
    no_worse = (points[:, None, :] <= points[None, :, :]).all(axis=2)
    better = (points[:, None, :] < points[None, :, :]).any(axis=2)
    return np.asarray(~(no_worse & better).any(axis=0), dtype=np.bool_)
