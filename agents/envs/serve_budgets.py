"""How much memory a window of ``ServeTrace`` has over time.

A scenario says how much memory there is in its best and its worst moments (``BudgetRange``); a window says how it moves
between the two, and its seed says when (``BUDGETS``). Amounts are multiples of the served model's dense weight bytes,
so that one scenario is as tight for a small model as for a large one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from sim.cost.memory import weight_bytes
from sim.cost.plan import dense_plan
from sim.engine.budget import Budget, BudgetContext, cotenant_between, stepped, walk_between
from sim.errors import ConfigError, nearest

MOST_SHARE = 0.9
"""Share of device memory that serving may use at most, like vLLM's gpu_memory_utilization."""

BUDGETS = ("full", "cotenant", "random_walk", "steps")
"""The kinds of budgets of ``window_budget``; conf/split/serve.yaml names those that are sampled."""

MEAN_AWAY_S, MEAN_STAY_S = 40.0, 30.0
WALK_PERIOD_S, WALK_STEPS = 10.0, 6


@dataclass(frozen=True, slots=True, kw_only=True)
class BudgetRange:
    """The most and the least memory of a scenario, in multiples of the model's dense weight bytes.

    The defaults are 72 and 24 GB for Llama-2-7B.

    high_share: the most. low_share: the least; not above high_share.
    notice_s: how long before its start the next step is announced to the server, in seconds; 0 for no announcement.
    """

    high_share: float = 5.343
    low_share: float = 1.781
    notice_s: float = 0.0

    def __post_init__(self) -> None:
        for name in ("high_share", "low_share", "notice_s"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise ConfigError(f"budget.{name} is {value!r}; it must be a finite number")
        if not 0.0 < self.low_share <= self.high_share:
            raise ConfigError(
                f"budget.low_share is {self.low_share} and budget.high_share {self.high_share}; low_share must be "
                "above 0 and at most high_share (both in multiples of the model's dense weight bytes)"
            )
        if self.notice_s < 0.0:
            raise ConfigError(f"budget.notice_s is {self.notice_s}; it must be at least 0 seconds")

    def bytes_of(self, context: BudgetContext) -> tuple[int, int]:
        """Return the most and the least bytes for a server, neither above ``MOST_SHARE`` of its device's memory."""
        dense_bytes = weight_bytes(context.model, dense_plan(context.model))
        most = int(MOST_SHARE * context.gpu.memory_bytes)
        return min(most, round(self.high_share * dense_bytes)), min(most, round(self.low_share * dense_bytes))


def budget_range(value: BudgetRange | Mapping[str, Any] | None) -> BudgetRange:
    """Return a range, or one made of its fields; None stands for the roomy default.

    Raises:
        ConfigError: for an unknown field, or one out of range.
    """
    if isinstance(value, BudgetRange):
        return value
    fields = dict(value or {})
    for name in fields:
        known = tuple(BudgetRange.__dataclass_fields__)
        if name not in known:
            raise ConfigError(f"budget has no field {name!r}; {nearest(str(name), known)}")
    return BudgetRange(**fields)


def window_budget(context: BudgetContext, limits: BudgetRange, kind: str, seed: int, horizon_s: float) -> Budget:
    """Return the budget of a window of ``horizon_s`` seconds; it ends at its most, so that waiting requests finish.

    full: always the most.
    cotenant: the most, and the least while a co-tenant is present; 40 s away and 30 s present on average.
    random_walk: steps up or down by a sixth of the range every 10 s, from the most.
    steps: the most, once the least, then the most again; the least begins after 10 to 50 % of the window and lasts for
        20 to 40 % of it.

    Raises:
        ConfigError: for an unknown kind.
    """
    high, low = limits.bytes_of(context)
    if kind == "full":
        return stepped([(0.0, high)], limits.notice_s)
    if kind == "cotenant":
        return cotenant_between(
            high,
            low,
            mean_away_s=MEAN_AWAY_S,
            mean_stay_s=MEAN_STAY_S,
            horizon_s=horizon_s,
            seed=seed,
            notice_s=limits.notice_s,
        )
    if kind == "random_walk":
        return walk_between(
            high,
            low,
            step_bytes=(high - low) // WALK_STEPS,
            period_s=WALK_PERIOD_S,
            horizon_s=horizon_s,
            seed=seed,
            notice_s=limits.notice_s,
        )
    if kind == "steps":
        rng = np.random.default_rng(seed)
        begin_s = float(rng.uniform(0.1, 0.5)) * horizon_s
        end_s = begin_s + float(rng.uniform(0.2, 0.4)) * horizon_s
        return stepped([(0.0, high), (begin_s, low), (end_s, high)], limits.notice_s)
    raise ConfigError(f"there is no budget {kind!r}; {nearest(kind, BUDGETS)}")


__all__ = ["BUDGETS", "BudgetRange", "budget_range", "window_budget"]
