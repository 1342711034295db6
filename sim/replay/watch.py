"""Watches the decisions of a policy: the share of layers below 16 bits, and what is known of the plans' quality."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from sim.cost.plan import Plan, describe
from sim.cost.quality import FittedQuality, PublishedQuality
from sim.engine.protocol import EngineState
from sim.policies import Policy
from sim.results.records import Iterations
from sim.types import Floats


class Watched:
    """A policy that also logs its plans, and the share of layers below 16 bits at each decision, as changes over time.

    plans: (time_s, plan), one entry per plan that differs from the one before. low: (time_s, share), the same.
    """

    def __init__(self, policy: Policy) -> None:
        """Watch a policy."""
        self.policy = policy
        self.plans: list[tuple[float, Plan]] = [(0.0, policy.first_plan)]
        self.low = [(0.0, _low_share(policy.first_plan))]

    @property
    def first_plan(self) -> Plan:
        """The plan that runs first."""
        return self.policy.first_plan

    def __call__(self, state: EngineState) -> Plan:
        """Return the policy's decision."""
        share = _low_share(state.plan)
        if share != self.low[-1][1]:
            self.low.append((state.time_s, share))
        plan = self.policy(state)
        if plan is not self.plans[-1][1] and plan != self.plans[-1][1]:
            self.plans.append((state.time_s, plan))
        return plan


def _low_share(plan: Plan) -> float:
    return sum(bits < 16 for bits in plan.product_bits) / len(plan.weight_bits)


def outside_share(
    quality: FittedQuality | PublishedQuality, plans: list[tuple[float, Plan]], iterations: Iterations
) -> float | None:
    """Return the share of computed tokens while the chosen plan was outside of the range of a quality; None for none.

    Args:
        plans: (time_s, plan) of each change, the first at 0 (``Watched.plans``).
        iterations: those of the run.
    """
    tokens: Floats = (iterations.prefill_tokens + iterations.decode_requests).astype(np.float64)
    if not tokens.sum():
        return None
    outside = np.array([not quality.in_range(plan) for _, plan in plans])
    at = np.searchsorted([time_s for time_s, _ in plans], iterations.start_s, side="right") - 1
    return float(tokens[outside[np.maximum(at, 0)]].sum() / tokens.sum())


def quality_note(
    quality: FittedQuality | PublishedQuality | None, plans: list[tuple[float, Plan]], outside: float | None
) -> str | None:
    """Return the sentence that a report owes its readers on the quality of the plans of a run; None if all is known."""
    if quality is None:
        return None
    unpriced = [plan for _, plan in plans if np.isnan(quality.charge(plan))]
    unknown = sorted({describe(replace(p, max_waiting=None, max_wait_s=None, max_running=None)) for p in unpriced})
    if unknown:
        return f"quality unknown: nothing is published or measured on {unknown[0]}; times and memory are not affected"
    if outside:
        return (
            f"{100 * outside:.1f} % of tokens ran under plans outside the range that the quality was fitted on; they "
            "are charged its upper bound"
        )
    return None
