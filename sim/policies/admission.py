"""Admission limits: keep the queue as short as can still meet the TTFT target, and reject other requests at once.

``Saber`` follows SABER (arXiv 2506.19677), which admits a request only if a fitted speed curve predicts that its target
will be met. This version needs no fitted curve: it measures the rate of first tokens while requests wait, and limits
the queue to what the server can start within the target at that rate. Margin and bounds are our choice.
``Limited`` adds fixed limits, in requests or in seconds, to any other policy, so that policies can be compared with and
without a limit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from hydra.utils import instantiate

from sim.cost.plan import LARGEST, Plan, is_positive
from sim.engine.protocol import EngineState
from sim.errors import ConfigError
from sim.limits import is_whole
from sim.policies.base import Policy, PolicyContext, plans_of
from sim.policies.fixed import plan_of


@dataclass(slots=True)
class Saber:
    """Runs one plan; limits the queue to ``margin`` x target x the measured rate of first tokens.

    margin: share of the TTFT target in which the queue must be served. least, most: bounds of the queue limit.
    smoothing_s: time constant of the exponential average of the rate; only time in which requests waited counts.
    """

    plan: Plan
    ttft_s: float
    margin: float
    least: int
    most: int
    smoothing_s: float
    speed_rps: float = math.nan
    before: EngineState | None = None

    @property
    def first_plan(self) -> Plan:
        """The plan with the longest allowed queue."""
        return replace(self.plan, max_waiting=self.most)

    @property
    def plans(self) -> tuple[Plan, ...]:
        """The plan."""
        return (self.plan,)

    def __call__(self, state: EngineState) -> Plan:
        """Measure the rate of first tokens and set the queue limit."""
        before, self.before = self.before, state
        if before is not None and state.time_s > before.time_s and before.waiting and state.waiting:
            passed_s = state.time_s - before.time_s
            seen_rps = (state.first_tokens - before.first_tokens) / passed_s
            weight = 1.0 - math.exp(-passed_s / self.smoothing_s)
            known = seen_rps if math.isnan(self.speed_rps) else self.speed_rps
            self.speed_rps = known + weight * (seen_rps - known)
        if math.isnan(self.speed_rps):
            return self.first_plan
        limit = math.floor(self.margin * self.ttft_s * self.speed_rps)
        return replace(self.plan, max_waiting=min(self.most, max(self.least, limit)))


def saber(
    served: PolicyContext,
    *,
    ttft_s: float = 2.0,
    margin: float = 0.8,
    least: int = 1,
    most: int = 64,
    smoothing_s: float = 10.0,
    plan: Mapping[str, Any] | None = None,
) -> Saber:
    """Build the policy.

    Args:
        plan: options of ``sim.policies.fixed.static_plan``; None is dense.
        ttft_s, margin, least, most, smoothing_s: as in ``Saber``.
    Raises:
        ConfigError: for a target, margin or smoothing that is not above 0, or bounds that are not 0 <= least <= most.
    """
    positive = all(0 < number < math.inf for number in (ttft_s, margin, smoothing_s))
    if not positive or not (is_whole(least) and is_whole(most) and 0 <= least <= most <= LARGEST):
        raise ConfigError(
            f"policy.ttft_s is {ttft_s}, margin {margin}, smoothing_s {smoothing_s}, least {least!r}, most {most!r}; "
            f"the first three must be above 0, and the others whole numbers, 0 <= least <= most <= {LARGEST}"
        )
    return Saber(plan_of(served.model, plan or {}), ttft_s, margin, least, most, smoothing_s)


@dataclass(slots=True)
class Limited:
    """Follows another policy, with limits on the queue.

    max_waiting, max_wait_s: as in ``Plan``; None leaves what the other policy says.
    """

    policy: Policy
    max_waiting: int | None
    max_wait_s: float | None = None

    def _limited(self, plan: Plan) -> Plan:
        return replace(
            plan,
            max_waiting=plan.max_waiting if self.max_waiting is None else self.max_waiting,
            max_wait_s=plan.max_wait_s if self.max_wait_s is None else self.max_wait_s,
        )

    @property
    def first_plan(self) -> Plan:
        """The other policy's first plan, limited."""
        return self._limited(self.policy.first_plan)

    @property
    def plans(self) -> tuple[Plan, ...] | None:
        """Those of the other policy."""
        return plans_of(self.policy)

    def __call__(self, state: EngineState) -> Plan:
        """Return the other policy's plan, limited."""
        return self._limited(self.policy(state))


def limited(
    served: PolicyContext, *, policy: Any, max_waiting: int | None = None, max_wait_s: float | None = None
) -> Limited:
    """Build the policy around another one, which has the form of a file of conf/policy.

    A limit in seconds suits every load: a request that waits longer than its TTFT target allows is lost, and its place
    goes to one that can still meet the target. A limit in requests suits one arrival rate and one length of prompts.

    Raises:
        ConfigError: for a limit below 0, or none at all.
    """
    legal = max_waiting is None or (is_whole(max_waiting) and 0 <= max_waiting <= LARGEST)
    legal = legal and (max_wait_s is None or is_positive(max_wait_s))
    if not legal or (max_waiting is None and max_wait_s is None):
        raise ConfigError(
            f"policy.max_waiting is {max_waiting!r} and policy.max_wait_s {max_wait_s!r}; the first must be at least 0 "
            f"waiting requests, a whole number up to {LARGEST}, the second seconds above 0; set one of them or both"
        )
    made = instantiate(policy) if isinstance(policy, Mapping) else policy
    return Limited(made(served), max_waiting, max_wait_s)
