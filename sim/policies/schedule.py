"""Plans at stated times: to replay recorded decisions, or to try a plan change by hand."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from sim.cost.plan import Plan
from sim.engine.protocol import EngineState
from sim.errors import ConfigError
from sim.policies.base import PolicyContext
from sim.policies.fixed import plan_of


@dataclass(frozen=True, slots=True)
class Schedule:
    """Switches to ``plans[i]`` at the first decision at or after ``at_s[i]``."""

    at_s: tuple[float, ...]
    plans: tuple[Plan, ...]

    @property
    def first_plan(self) -> Plan:
        """The plan of time 0."""
        return self.plans[0]

    def __call__(self, state: EngineState) -> Plan:
        """Return the latest plan whose time is at or before the state's."""
        return self.plan_at(state.time_s)

    def plan_at(self, time_s: float) -> Plan:
        """Return the latest plan whose time is at or before ``time_s``."""
        return self.plans[bisect_right(self.at_s, time_s) - 1]


def schedule(served: PolicyContext, *, steps: Sequence[Mapping[str, Any]]) -> Schedule:
    """Build a schedule from steps, each with ``at_s`` and options of ``static_plan``; the first is at 0.

    Raises:
        ConfigError: if the first step is not at 0 or times do not ascend. PlanError: for a plan that is not legal.
    """
    given = [step.get("at_s") if isinstance(step, Mapping) else None for step in steps]
    if not all(isinstance(time_s, int | float) and not isinstance(time_s, bool) for time_s in given):
        raise ConfigError(f"policy.steps have at_s {given}; each step needs a number of seconds")
    at_s = tuple(float(time_s) for time_s in given)  # type: ignore[arg-type]
    if not at_s or at_s[0] != 0.0 or not all(a < b < math.inf for a, b in pairwise(at_s)):
        raise ConfigError(f"policy.steps have at_s {list(at_s)}; the first must be 0, all finite and ascending")
    plans = tuple(plan_of(served.model, {k: v for k, v in step.items() if k != "at_s"}) for step in steps)
    return Schedule(at_s, plans)
