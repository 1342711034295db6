"""Budgets in multiples of the served model's dense weight bytes, so that one option is as tight for every model."""

from __future__ import annotations

import math

import numpy as np

from sim.cost.memory import weight_bytes
from sim.cost.plan import dense_plan
from sim.engine.budget import Budget, BudgetContext, stepped
from sim.errors import BudgetError
from sim.limits import MOST_CHANGES, check_count


def weights_walk(
    context: BudgetContext,
    *,
    low_share: float,
    high_share: float,
    step_share: float,
    period_s: float,
    horizon_s: float,
    seed: int,
    notice_s: float = 0.0,
) -> Budget:
    """Return a budget that steps up or down by ``step_share`` each period, between two bounds.

    Shares are multiples of the dense weight bytes. It starts at the upper bound, and returns there at the horizon.

    Raises:
        BudgetError: for bounds that are not 0 < low <= high, a step or times that are not above 0, or too many changes.
    """
    high, low = _bounds(context, low_share, high_share)
    if not (step_share > 0 and period_s > 0 and 0 < horizon_s < math.inf):
        raise BudgetError("budget.step_share, period_s and horizon_s must be above 0; the horizon must be finite")
    check_count(
        horizon_s / period_s,
        "changes of the budget",
        MOST_CHANGES,
        "lower budget.horizon_s, or raise budget.period_s",
        BudgetError,
    )
    rng = np.random.default_rng(seed)
    step = int(step_share * _dense_bytes(context))
    rows, value = [(0.0, high)], high
    for k in range(1, math.ceil(horizon_s / period_s)):
        value = min(high, max(low, value + (step if rng.random() < 0.5 else -step)))
        rows.append((k * period_s, value))
    rows.append((math.ceil(horizon_s / period_s) * period_s, high))
    return stepped(rows, notice_s)


def weights_cotenant(
    context: BudgetContext,
    *,
    low_share: float,
    high_share: float,
    mean_away_s: float,
    mean_stay_s: float,
    horizon_s: float,
    seed: int,
    notice_s: float = 0.0,
) -> Budget:
    """Return ``low_share`` while a co-tenant is present, else ``high_share``, in multiples of the dense weight bytes.

    It comes and goes as a two-state Markov process with exponential times; it is away at the start and at the horizon.

    Raises:
        BudgetError: for bounds that are not 0 < low <= high, times that are not above 0, or too many changes.
    """
    high, low = _bounds(context, low_share, high_share)
    if not (mean_away_s > 0 and mean_stay_s > 0 and 0 < horizon_s < math.inf):
        raise BudgetError("budget.mean_away_s, mean_stay_s and horizon_s must be above 0; the horizon must be finite")
    check_count(
        2 * horizon_s / (mean_away_s + mean_stay_s),
        "changes of the budget",
        MOST_CHANGES,
        "lower budget.horizon_s, or raise budget.mean_away_s or mean_stay_s",
        BudgetError,
    )
    rng = np.random.default_rng(seed)
    rows, time_s, there = [(0.0, high)], 0.0, False
    while True:
        time_s += float(rng.exponential(mean_stay_s if there else mean_away_s))
        if time_s >= horizon_s:
            break
        there = not there
        rows.append((time_s, low if there else high))
    if there:
        rows.append((horizon_s, high))  # it leaves in the end, so that waiting requests can be served
    return stepped(rows, notice_s)


def _bounds(context: BudgetContext, low_share: float, high_share: float) -> tuple[int, int]:
    """Return the upper and the lower bound in bytes."""
    if not 0.0 < low_share <= high_share < math.inf:
        raise BudgetError(
            f"budget.low_share is {low_share} and high_share {high_share}; low_share must be above 0 and at most "
            "high_share (both in multiples of the model's dense weight bytes)"
        )
    dense = _dense_bytes(context)
    return int(high_share * dense), int(low_share * dense)


def _dense_bytes(context: BudgetContext) -> int:
    return weight_bytes(context.model, dense_plan(context.model))
