"""How far a simulation is from a measured run: the relative error of each statistic of each latency."""

from __future__ import annotations

from typing import Any

import numpy as np

from hw.fit.measured import MeasuredRun
from hw.fit.server import Simulated
from sim.results.records import Moments
from sim.types import Floats, Ints

STATISTICS = ("mean", "p50", "p95", "p99")
LATENCIES = ("ttft_s", "itl_s", "tpot_s", "e2e_s")
"""itl_s: gaps between tokens, here each request's mean gap as often as it has gaps; tpot_s: one mean gap a request."""


def statistics(moments: Moments, which: Ints | None = None) -> dict[str, dict[str, float | None]]:
    """Return mean, P50, P95 and P99 of each latency over some requests, seconds."""
    rows = slice(None) if which is None else which
    gaps = np.maximum(moments.produced_tokens - 1, 0)[rows]
    tpot_s = moments.tpot_s[rows]
    ones = np.ones(len(tpot_s), dtype=np.int64)
    return {
        "ttft_s": _of(moments.ttft_s[rows], ones),
        "itl_s": _of(tpot_s, gaps),
        "tpot_s": _of(tpot_s, ones),
        "e2e_s": _of(moments.e2e_s[rows], ones),
    }


def _of(values: Floats, weight: Ints) -> dict[str, float | None]:
    known = np.isfinite(values) & (weight > 0)
    if not known.any():
        return dict.fromkeys(STATISTICS)
    values, weight = values[known], weight[known]
    if np.all(weight == 1):
        points = np.quantile(values, (0.5, 0.95, 0.99)).tolist()
    else:
        order = np.argsort(values, kind="stable")
        rank = np.cumsum(weight[order])
        at = np.searchsorted(rank, np.ceil(np.array((0.5, 0.95, 0.99)) * rank[-1]))
        points = values[order][at].tolist()
    mean = float(np.average(values, weights=weight))
    return {"mean": mean, **dict(zip(STATISTICS[1:], map(float, points), strict=True))}


def throughput(moments: Moments) -> dict[str, float]:
    """Return the time from the first sending to the last token, and output tokens per second of it."""
    last_s = float(np.nanmax(moments.finish_s)) - float(moments.arrival_s.min())
    done = np.isfinite(moments.finish_s)
    tokens = float(moments.produced_tokens[done].sum())
    return {"makespan_s": last_s, "output_tokens_per_s": tokens / last_s if last_s > 0 else 0.0}


def errors(
    run: MeasuredRun, done: Simulated, which: Ints | None = None
) -> dict[str, dict[str, dict[str, float | None]]]:
    """Return real, simulated and relative error of each statistic of each latency; of throughput over all requests."""
    real, ours = statistics(run, which), statistics(done, which)
    found: dict[str, Any] = {
        name: {s: compared(real[name][s], ours[name][s]) for s in STATISTICS} for name in LATENCIES
    }
    if which is None:
        both = throughput(run), throughput(done)
        found |= {name: {"mean": compared(both[0][name], both[1][name])} for name in both[0]}
    return found


def compared(real: float | None, ours: float | None) -> dict[str, float | None]:
    """Return a figure of both sides and the relative error."""
    return {"real": real, "simulated": ours, "error": ours / real - 1 if real and ours is not None else None}
