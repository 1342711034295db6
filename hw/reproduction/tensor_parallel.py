"""Published steps of models on several GPUs, next to what their calibrations say.

The engines measured are of 2023 and 2024. Their hosts launched operations one by one, so that on several GPUs a decode
step takes as long as its launches, however few bytes each GPU reads. Two numbers describe such a server: a factor on
all times of a calibration, and the least time of an iteration (``host_floor_us``). Both are fitted at the lowest and
the highest degree of tensor parallelism, and judged at those between.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import minimize

from sim.cost.bounds import Factors
from sim.cost.latency import LatencyModel
from sim.cost.plan import Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One published iteration, in milliseconds.

    kind: what of it is a row of a table. tp: GPUs. chunks: tokens of each prompt. decodes: sequences that decode.
    context_sum: tokens of KV that they read in total.
    """

    kind: str
    tp: int
    ms: float
    chunks: tuple[int, ...] = ()
    decodes: int = 0
    context_sum: int = 0

    def predicted_ms(self, latency: LatencyModel, plan: Plan) -> float:
        """Return what a calibration says of this iteration."""
        chunks = [(tokens, 0) for tokens in self.chunks]
        sequences = len(chunks) + self.decodes
        return 1e3 * latency.iteration_s(plan, chunks, self.decodes, self.context_sum, sequences)


def fitted(models: Mapping[int, LatencyModel], plan: Plan, steps: Sequence[Step]) -> dict[str, Any]:
    """Return the errors of steps by degree and kind, with nothing fitted and with a factor and a floor.

    Args:
        models: degree of tensor parallelism -> calibration. plan: what ran. steps: measured.
    Returns:
        factor, floor_ms: the fit. seen: degrees of the fit. rows: one a degree and kind, with the median of predicted
            over published time minus 1 before and after the fit, the median and largest absolute error after it, and
            the share of steps at the floor, which say nothing of the factor.
    """
    degrees = sorted({step.tp for step in steps})
    seen = (degrees[0], degrees[-1])
    predicted = np.array([step.predicted_ms(models[step.tp], plan) for step in steps])
    measured = np.array([step.ms for step in steps])
    used = np.array([step.tp in seen for step in steps])

    def loss(logs: Any) -> float:
        factor, floor = np.exp(logs)
        return float(np.abs(np.log(np.maximum(factor * predicted, floor) / measured))[used].mean())

    start = np.log([np.median(measured / predicted), np.median(measured)])
    best = minimize(loss, start, method="Nelder-Mead", options={"xatol": 1e-4, "fatol": 1e-6, "maxiter": 2000})
    factor, floor = (float(f"{value:.4g}") for value in np.exp(best.x))
    after = np.maximum(factor * predicted, floor)
    rows = []
    for tp in degrees:
        for kind in dict.fromkeys(step.kind for step in steps):
            some = np.array([step.tp == tp and step.kind == kind for step in steps])
            if not some.any():
                continue
            error = np.abs(after[some] / measured[some] - 1.0)
            rows.append(
                {
                    "GPUs": tp,
                    "step": kind,
                    "seen by the fit": tp in seen,
                    "published, ms": _span(measured[some]),
                    "nothing fitted, median": float(np.median(predicted[some] / measured[some] - 1.0)),
                    "fitted, median": float(np.median(after[some] / measured[some] - 1.0)),
                    "median error": float(np.median(error)),
                    "largest": float(error.max()),
                    "at the floor": float((factor * predicted[some] <= floor).mean()),
                }
            )
    return {"factor": factor, "floor_ms": floor, "seen": list(seen), "rows": rows}


def scaled(latency: LatencyModel, factor: float, floor_ms: float) -> LatencyModel:
    """Return a calibration of a server: all times multiplied by ``factor``, no iteration below ``floor_ms``."""
    slower = latency.with_factors(Factors(memory_bound=factor, compute_bound=factor))
    return slower.with_fixed(factor * latency.fixed_s, "hw.reproduction").with_host_floor(floor_ms / 1e3)


def _span(values: Any) -> list[float]:
    return [float(values.min()), float(values.max())]
