"""The claims of the loop, from utilities alone: arrays in, verdicts out.

``real[p]`` is float64[windows, repeats], the utilities of a policy's judged runs, ``simulated[p]`` float64[windows],
those that were predicted (`hw.loop.predictions.predicted_utility`). Repeat r of all policies is of the same
round, so two policies are compared run by run.

**Noise of a difference.** For two policies, ``d[w, r]`` is the difference of their utilities in window w and repeat r.
The standard deviation s of one difference is pooled over windows: its square is the sum of the squares of
``d[w, r] - mean_r d[w, r]`` over ``W (R - 1)``. A mean over R repeats differs from 0 by more than its noise if it
exceeds ``t s / sqrt(R)``, one over all windows and repeats if it exceeds ``t s / sqrt(W R)``; t is the 97.5 % quantile
of Student's t with W (R - 1) degrees of freedom.

**Claims.**

* order: wherever a real difference exceeds its noise, in a window or over all windows, the simulated difference has the
  same sign; at least one must exceed it, because otherwise no order was seen.
* level: each simulated utility is within ``points`` of the mean of the repeats, or within the noise floor of its cell,
  the largest distance of a repeat from that mean.
* learner: the learned policy is not below the best rule over all windows by more than the noise of that difference. A
  single repeat shows no noise, so this claim does not hold with one.
* changes: plans of a policy that can change them change ``least`` times a minute in which requests arrive, as the mean
  over the real runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
from scipy.stats import t as student_t

from sim.types import Floats

CONFIDENCE = 0.975


def noise_of(differences: Floats) -> tuple[float, float]:
    """Return the noise of a window's mean difference and of the mean over all windows; NaN for a single repeat.

    differences: float64[windows, repeats].
    """
    windows, repeats = differences.shape
    freedom = windows * (repeats - 1)
    if not freedom:
        return float("nan"), float("nan")
    centered = differences - differences.mean(axis=1, keepdims=True)
    deviation = float(np.sqrt((centered**2).sum() / freedom))
    reach = float(student_t.ppf(CONFIDENCE, freedom)) * deviation
    return reach / float(np.sqrt(repeats)), reach / float(np.sqrt(windows * repeats))


def compared_pairs(
    simulated: Mapping[str, Floats], real: Mapping[str, Floats], windows: Sequence[str]
) -> list[dict[str, Any]]:
    """Return every comparison of two policies: in each window, and over all (``window`` is None)."""
    rows = []
    for one, other in combinations(real, 2):
        differences = real[one] - real[other]
        of_window, of_all = noise_of(differences)
        predicted = simulated[one] - simulated[other]
        parts = [
            (None, float(differences.mean()), float(predicted.mean()), of_all),
            *(
                (label, float(row.mean()), float(expected), of_window)
                for label, row, expected in zip(windows, differences, predicted, strict=True)
            ),
        ]
        for label, difference, expected, noise in parts:
            beyond = abs(difference) > noise  # False for NaN
            rows.append(
                {
                    "window": label,
                    "policies": [one, other],
                    "real": difference,
                    "noise": None if np.isnan(noise) else noise,
                    "simulated": expected,
                    "beyond_noise": bool(beyond),
                    "agrees": bool(difference * expected > 0) if beyond else None,
                }
            )
    return rows


def levels(
    simulated: Mapping[str, Floats],
    real: Mapping[str, Floats],
    windows: Sequence[str],
    points: float,
    ranges: Mapping[str, Sequence[Sequence[float]]] | None = None,
) -> list[dict[str, Any]]:
    """Return the error of every predicted utility, with the noise floor of its cell and whether it holds.

    ranges: policy -> for each window, the utilities that were predicted at other speeds of the machine; a row then also
        says from where to where they and the prediction reach, and whether the mean of the repeats lies there.
    """
    rows = []
    for policy, values in real.items():
        for at, window in enumerate(windows):
            mean = float(values[at].mean())
            floor = float(np.abs(values[at] - mean).max())
            error = float(simulated[policy][at]) - mean
            row = {
                "window": window,
                "policy": policy,
                "simulated": float(simulated[policy][at]),
                "real": mean,
                "repeats": values[at].tolist(),
                "error": error,
                "noise_floor": floor,
                "holds": abs(error) <= max(points, floor),
            }
            if ranges:
                predicted = [*ranges[policy][at], float(simulated[policy][at])]
                row |= {"least": min(predicted), "most": max(predicted)}
                row["in_range"] = row["least"] <= mean <= row["most"]
            rows.append(row)
    return rows


def against_best_rule(real: Mapping[str, Floats], learner: str) -> dict[str, Any]:
    """Return the learned policy's difference from the best other policy over all windows, and what it says."""
    best = max((name for name in real if name != learner), key=lambda name: float(real[name].mean()))
    differences = real[learner] - real[best]
    _, noise = noise_of(differences)
    difference = float(differences.mean())
    verdict = "above" if difference > noise else "below" if difference < -noise else "not distinguishable"
    if np.isnan(noise):
        verdict = "unknown"
    return {
        "learner": learner,
        "best_rule": best,
        "difference": difference,
        "noise": None if np.isnan(noise) else noise,
        "verdict": verdict,
        "holds": verdict not in ("below", "unknown"),
    }


def judge(
    simulated: Mapping[str, Floats],
    real: Mapping[str, Floats],
    windows: Sequence[str],
    *,
    points: float,
    learner: str | None,
    changes: Mapping[str, float],
    least_changes: float,
    ranges: Mapping[str, Sequence[Sequence[float]]] | None = None,
) -> dict[str, Any]:
    """Return all claims, each with its rows and whether it holds.

    Args:
        simulated, real: as in the module's docstring. windows: their labels.
        points, learner, least_changes: settings of the command.
        changes: mean plan changes a minute in the real runs, for each policy that can change plans.
        ranges: as in `levels`; no claim depends on them.
    """
    pairs = compared_pairs(simulated, real, windows)
    cells = levels(simulated, real, windows, points, ranges)
    beyond = [row for row in pairs if row["beyond_noise"]]
    found: dict[str, Any] = {
        "order": {
            "pairs": pairs,
            "beyond_noise": len(beyond),
            "agree": sum(row["agrees"] for row in beyond),
            "holds": bool(beyond) and all(row["agrees"] for row in beyond),
        },
        "level": {"cells": cells, "points": points, "holds": all(row["holds"] for row in cells)},
        "changes": {
            "per_minute": dict(changes),
            "least": least_changes,
            "holds": all(value >= least_changes for value in changes.values()),
        },
    }
    if learner is not None:
        found["learner"] = against_best_rule(real, learner)
    return found | {"holds": all(claim["holds"] for claim in found.values())}
