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

from sim.engine.budget import KINDS, Budget, BudgetContext, dense_share_bytes, moving
from sim.errors import ConfigError, nearest

BUDGETS = KINDS
"""The kinds of budgets of a window; conf/split/serve.yaml names those that are sampled."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BudgetRange:
    """The most and the least memory of a scenario, in multiples of the model's dense weight bytes.

    The defaults are 72 and 24 GB for Llama-2-7B.

    high_share: the most. low_share: the least; not above high_share.
    notice_s: how long before its start the next step is announced to the server, in seconds; 0 for no announcement.
    pace: how many times as fast as usual it moves.
    """

    high_share: float = 5.343
    low_share: float = 1.781
    notice_s: float = 0.0
    pace: float = 1.0

    def __post_init__(self) -> None:
        for name in ("high_share", "low_share", "notice_s", "pace"):
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
        if self.pace <= 0.0:
            raise ConfigError(f"budget.pace is {self.pace}; it must be above 0: 2 moves twice as fast as usual")

    def bytes_of(self, context: BudgetContext) -> tuple[int, int]:
        """Return the most and the least bytes for a server, neither above 90 % of its device's memory."""
        return dense_share_bytes(context, self.high_share), dense_share_bytes(context, self.low_share)


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
    """Return the budget of a window of ``horizon_s`` seconds (``sim.engine.budget.moving``).

    Raises:
        ConfigError: for an unknown kind.
    """
    if kind not in BUDGETS:
        raise ConfigError(f"there is no budget {kind!r}; {nearest(kind, BUDGETS)}")
    high, low = limits.bytes_of(context)
    return moving(high, low, kind=kind, seed=seed, horizon_s=horizon_s, notice_s=limits.notice_s, pace=limits.pace)


__all__ = ["BUDGETS", "BudgetRange", "budget_range", "window_budget"]
