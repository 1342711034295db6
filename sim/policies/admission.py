"""Admission limits: keep the queue as short as can still meet the targets, and reject other requests at once.

``Saber`` follows SABER (arXiv 2506.19677), which admits a request only if a speed curve, fitted while serving, predicts
that its target will be met. This version wraps any policy. It measures how long requests take from their admission to
their first token, and rejects a request once it has waited so long that its first token can no longer come in time
(``limit: seconds``). With a target for the time per output token, it also fits that time against the number of running
requests, and limits how many run: an iteration gives each of them a token, so this keeps the target of every running
request. ``limit: requests`` is an earlier form: it limits the length of the queue to what the server can start within
the target. Margins and bounds are our choice.
``Limited`` adds fixed limits, in requests or in seconds, to any other policy, so that policies can be compared with and
without a limit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from hydra.utils import instantiate

from sim.config import build_option
from sim.cost.plan import LARGEST, Plan, is_positive
from sim.engine.protocol import EngineState
from sim.errors import ConfigError, nearest
from sim.limits import is_whole
from sim.policies.base import Policy, PolicyContext, plans_of

LIMITS = ("seconds", "requests")
WAIT_STEP_S = 0.05
"""Limits on the wait are multiples of this, so that a plan does not change with every decision, and at least this: with
none at all a server that was slow for a moment would reject all later requests."""


@dataclass(slots=True)
class Mean:
    """An exponential average over time; NaN until something was seen."""

    smoothing_s: float
    value: float = math.nan

    def add(self, seen: float, passed_s: float) -> float:
        """Add what was seen during ``passed_s`` seconds; return the average."""
        known = seen if math.isnan(self.value) else self.value
        self.value = known + (1.0 - math.exp(-passed_s / self.smoothing_s)) * (seen - known)
        return self.value


@dataclass(slots=True)
class SpeedCurve:
    """A line through (running requests, seconds per iteration), by least squares; older points count less.

    smoothing_s: a point's weight falls by a factor of e in this time.
    """

    smoothing_s: float
    sums: list[float] = field(default_factory=lambda: [0.0] * 5)

    def add(self, running: float, iteration_s: float, passed_s: float) -> None:
        """Add a point."""
        kept = math.exp(-passed_s / self.smoothing_s)
        point = (1.0, running, iteration_s, running * running, running * iteration_s)
        self.sums = [kept * old + new for old, new in zip(self.sums, point, strict=True)]

    def most_running(self, iteration_s: float) -> int | None:
        """Return how many requests can run at this time per iteration, at least 1; None if the points do not say."""
        weight, x, y, xx, xy = self.sums
        spread = weight * xx - x * x
        if weight <= 0.0 or spread <= 1e-6 * weight * xx:
            return None
        slope = (weight * xy - x * y) / spread
        if slope <= 0.0:
            return None
        return min(LARGEST, max(1, math.floor((iteration_s - (y - slope * x) / weight) / slope)))

    def in_proportion(self, iteration_s: float) -> int | None:
        """Return how many requests would run if the time grew in proportion to them; None without a point."""
        _, x, y, _, _ = self.sums
        return min(LARGEST, max(1, math.floor(iteration_s * x / y))) if x > 0.0 and y > 0.0 else None


GROWTH = 2
"""How many times as many requests as ever ran a measured limit may allow beyond a plan's own."""


@dataclass(slots=True)
class PaceLimit:
    """Limits how many requests run, so that an iteration takes at most ``iteration_s`` seconds.

    curve: seconds per iteration against running requests, fitted while serving. seen: the most requests that ran.
    """

    iteration_s: float
    curve: SpeedCurve = field(default_factory=lambda: SpeedCurve(60.0))
    before: EngineState | None = None
    seen: int = 0

    def measure(self, state: EngineState) -> None:
        """Add what was seen since the last state."""
        before, self.before = self.before, state
        self.seen = max(self.seen, state.running)
        if before is None or state.time_s <= before.time_s or state.iterations <= before.iterations:
            return
        iteration_s = (state.busy_s - before.busy_s) / (state.iterations - before.iterations)
        self.curve.add((before.running + state.running) / 2.0, iteration_s, state.time_s - before.time_s)

    def limited(self, plan: Plan) -> Plan:
        """Return the plan with the tighter of its own limit and this one."""
        limits = [limit for limit in (self.curve.most_running(self.iteration_s), plan.max_running) if limit is not None]
        return replace(plan, max_running=min(limits, default=None))

    def replaced(self, plan: Plan) -> Plan:
        """Return the plan with this limit in place of its own.

        A line through points close to each other says little about points far from them. So it raises the plan's own
        limit to at most ``GROWTH`` times the most requests that ever ran. Where the points show no line, the own limit
        holds, raised to what would run if the time grew in proportion, which is too low rather than too high.
        """
        own, line = plan.max_running, self.curve.most_running(self.iteration_s)
        if own is None:
            return replace(plan, max_running=line)
        if line is None:
            return replace(plan, max_running=max(own, self.curve.in_proportion(self.iteration_s) or own))
        return replace(plan, max_running=min(line, max(own, GROWTH * self.seen)))


@dataclass(slots=True)
class WaitLimit:
    """Limits how long a request waits, so that its first token can still come in time.

    ttft_s: the target. margin: share of it that is used.
    start_s: measured seconds from admission to the first token, the mean TTFT of an interval minus the wait at the head
    of the queue.
    """

    ttft_s: float
    margin: float
    start_s: Mean = field(default_factory=lambda: Mean(10.0))
    before: EngineState | None = None

    def measure(self, state: EngineState) -> None:
        """Add what was seen since the last state."""
        before, self.before = self.before, state
        if before is None or state.time_s <= before.time_s:
            return
        begun = state.first_tokens - before.first_tokens
        if begun > 0:
            waited_s = (before.oldest_wait_s + state.oldest_wait_s) / 2.0
            start_s = max(0.0, (state.ttft_sum_s - before.ttft_sum_s) / begun - waited_s)
            self.start_s.add(start_s, state.time_s - before.time_s)

    def limited(self, plan: Plan) -> Plan:
        """Return the plan with the tighter of its own limit and this one; before anything was measured, of the target.

        No speed is known yet then.
        """
        start_s = 0.0 if math.isnan(self.start_s.value) else self.start_s.value
        wait_s = max(1, math.floor(self.margin * (self.ttft_s - start_s) / WAIT_STEP_S + 1e-9)) * WAIT_STEP_S
        return replace(plan, max_wait_s=wait_s if plan.max_wait_s is None else min(wait_s, plan.max_wait_s))


@dataclass(slots=True)
class Saber:
    """Follows another policy; rejects a request when its first token can no longer come in time.

    pace: the limit of running requests; None for no target per output token.
    """

    policy: Policy
    wait: WaitLimit
    pace: PaceLimit | None = None

    @property
    def first_plan(self) -> Plan:
        """The other policy's first plan, limited."""
        return self._limited(self.policy.first_plan)

    @property
    def plans(self) -> tuple[Plan, ...] | None:
        """Those of the other policy."""
        return plans_of(self.policy)

    def __call__(self, state: EngineState) -> Plan:
        """Measure since the last decision; return the other policy's plan with the limits that follow."""
        self.wait.measure(state)
        if self.pace is not None:
            self.pace.measure(state)
        return self._limited(self.policy(state))

    def _limited(self, plan: Plan) -> Plan:
        plan = self.wait.limited(plan)
        return plan if self.pace is None else self.pace.limited(plan)


@dataclass(slots=True)
class SaberQueue:
    """Follows another policy; limits the queue to ``margin`` x target x the measured rate of first tokens.

    margin: share of the TTFT target in which the queue must be served. least, most: bounds of the queue limit.
    speed_rps: the rate of first tokens; only time in which requests waited counts.
    """

    policy: Policy
    ttft_s: float
    margin: float
    least: int
    most: int
    speed_rps: Mean
    before: EngineState | None = None

    @property
    def first_plan(self) -> Plan:
        """The other policy's first plan with the longest allowed queue."""
        return replace(self.policy.first_plan, max_waiting=self.most)

    @property
    def plans(self) -> tuple[Plan, ...] | None:
        """Those of the other policy."""
        return plans_of(self.policy)

    def __call__(self, state: EngineState) -> Plan:
        """Measure the rate of first tokens and set the queue limit."""
        before, self.before = self.before, state
        if before is not None and state.time_s > before.time_s and before.waiting and state.waiting:
            passed_s = state.time_s - before.time_s
            self.speed_rps.add((state.first_tokens - before.first_tokens) / passed_s, passed_s)
        plan = self.policy(state)
        if math.isnan(self.speed_rps.value):
            return replace(plan, max_waiting=self.most)
        limit = math.floor(self.margin * self.ttft_s * self.speed_rps.value)
        return replace(plan, max_waiting=min(self.most, max(self.least, limit)))


def saber(
    served: PolicyContext,
    *,
    policy: Any,
    limit: str = "seconds",
    ttft_s: float = 2.0,
    tpot_s: float | None = None,
    margin: float = 0.8,
    least: int = 1,
    most: int = 64,
    smoothing_s: float = 10.0,
) -> Saber | SaberQueue:
    """Build the policy around another one: a file of conf/policy by name or by content (``built``).

    Args:
        limit: ``seconds`` a request may wait (``Saber``), or ``requests`` that may wait (``SaberQueue``).
        ttft_s, tpot_s: targets for the time to the first token and per output token; None for no target of the latter.
        margin: share of the targets that is used. least, most: bounds of the queue with ``limit=requests``.
        smoothing_s: time constant of the averages of what is measured.
    Raises:
        ConfigError: for an unknown limit; for a target, margin or smoothing that is not above 0; for bounds that are
            not 0 <= least <= most; for a ``tpot_s`` with ``limit=requests``, which has no use for it.
    """
    if limit not in LIMITS:
        raise ConfigError(f"unknown policy.limit {limit!r}; {nearest(str(limit), LIMITS)}")
    positive = all(is_positive(number) for number in (ttft_s, margin, smoothing_s))
    if not positive or not (is_whole(least) and is_whole(most) and 0 <= least <= most <= LARGEST):
        raise ConfigError(
            f"policy.ttft_s is {ttft_s}, margin {margin}, smoothing_s {smoothing_s}, least {least!r}, most {most!r}; "
            f"the first three must be above 0, and the others whole numbers, 0 <= least <= most <= {LARGEST}"
        )
    if tpot_s is not None and (not is_positive(tpot_s) or limit == "requests"):
        raise ConfigError(
            f"policy.tpot_s is {tpot_s!r} with policy.limit={limit}; it must be seconds above 0 with limit=seconds, or "
            "null for no target"
        )
    inner = built(policy, served)
    if limit == "requests":
        return SaberQueue(inner, ttft_s, margin, least, most, Mean(smoothing_s))
    wait = WaitLimit(ttft_s, margin, Mean(smoothing_s))
    return Saber(inner, wait, None if tpot_s is None else PaceLimit(margin * tpot_s))


def built(policy: Any, served: PolicyContext) -> Policy:
    """Return the policy that a wrapper follows; ``policy`` as in ``maker``."""
    return maker(policy)(served)


def maker(policy: Any) -> Callable[[PolicyContext], Policy]:
    """Return what makes a policy.

    Args:
        policy: the name of a file of conf/policy; its name and other values of its keys (``{name: NAME, KEY: VALUE}``);
            its content; or a function that makes the policy.
    Raises:
        ConfigError: for an unknown name or key, or a value that is none of these.
    """
    if isinstance(policy, str):
        policy = {"name": policy}
    if isinstance(policy, Mapping) and "name" in policy and "_target_" not in policy:
        changed = {key: value for key, value in policy.items() if key != "name"}
        inner = changed.get("policy")
        if inner is None:
            made = build_option("policy", str(policy["name"]), changed)
        else:  # a policy around another one, which is read now too and not again for each replay
            made = partial(build_option("policy", str(policy["name"]), {**changed, "policy": ""}), policy=maker(inner))
    else:
        made = instantiate(policy) if isinstance(policy, Mapping) and "_target_" in policy else policy
    if not callable(made):
        raise ConfigError(
            f"policy.policy is {policy!r}; name a file of conf/policy, such as policy.policy=greedy_stop, with other "
            "values as policy.policy='{name: greedy_stop, headroom: 1.4}', or write its content"
        )
    function: Callable[[PolicyContext], Policy] = made
    return function


@dataclass(slots=True)
class Limited:
    """Follows another policy, with limits of admission.

    max_waiting, max_wait_s, max_running: as in ``Plan``; None leaves what the other policy says.
    """

    policy: Policy
    max_waiting: int | None
    max_wait_s: float | None = None
    max_running: int | None = None

    def _limited(self, plan: Plan) -> Plan:
        return replace(
            plan,
            max_waiting=plan.max_waiting if self.max_waiting is None else self.max_waiting,
            max_wait_s=plan.max_wait_s if self.max_wait_s is None else self.max_wait_s,
            max_running=plan.max_running if self.max_running is None else self.max_running,
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
    served: PolicyContext,
    *,
    policy: Any,
    max_waiting: int | None = None,
    max_wait_s: float | None = None,
    max_running: int | None = None,
) -> Limited:
    """Build the policy around another one: a file of conf/policy by name or by content (``built``).

    A limit in seconds suits every load: a request that waits longer than its TTFT target allows is lost, and its place
    goes to one that can still meet the target. A limit in requests suits one arrival rate and one length of prompts.

    Raises:
        ConfigError: for a limit below 0, or none at all.
    """
    legal = max_waiting is None or (is_whole(max_waiting) and 0 <= max_waiting <= LARGEST)
    legal = legal and (max_wait_s is None or is_positive(max_wait_s))
    legal = legal and (max_running is None or (is_whole(max_running) and 1 <= max_running <= LARGEST))
    if not legal or (max_waiting is None and max_wait_s is None and max_running is None):
        raise ConfigError(
            f"policy.max_waiting is {max_waiting!r}, policy.max_wait_s {max_wait_s!r} and policy.max_running "
            f"{max_running!r}; the first must be at least 0 waiting requests, a whole number up to {LARGEST}, the "
            "second seconds above 0, the third at least 1 running request; set at least one of them"
        )
    return Limited(built(policy, served), max_waiting, max_wait_s, max_running)
