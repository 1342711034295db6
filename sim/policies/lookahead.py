"""Look-ahead: try every plan on a model of the server, keep the one under which most requests are served well.

Model-predictive control without learning. At each decision a simulated server is brought to what ``EngineState`` says:
so many requests run and hold so many tokens, so many wait. Then every plan of a table runs on it for ``horizon_s``
while the arrivals of the recent past come again, as fast as they did and faster. It knows nothing that a server could
not: output lengths are those of a memoryless law whose mean is what has been produced a finished request, the budget
stays as it is (an announced smaller one counts already), and what is to come is what came.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sim.cost.plan import Plan, dense_plan
from sim.engine.budget import Budget, constant_budget
from sim.engine.plan_graph import PlanGraph
from sim.engine.protocol import EngineState
from sim.engine.server_spec import ServerSpec
from sim.engine.sim_engine import SimEngine
from sim.errors import ConfigError
from sim.policies.base import PolicyContext
from sim.policies.observation.serve import Choice, ServeActions, actions_from
from sim.results.records import Records, Status
from sim.types import Floats, Ints

# Shapes: [r] requests of a trial: those that run, those that wait, those that come; [a] plans of the table.


GOLDEN = (math.sqrt(5.0) - 1.0) / 2.0
PLENTY_BYTES = 1 << 50
MOST_STEPS = 2048
"""States of the weights that are remembered from one decision to the next."""
MOMENT_S = 1e-3
WARM_STEP_S, WARM_MOST_S = 0.25, 30.0
"""A trial begins by prefilling what runs: looked at so often, for so long at most."""


@dataclass(frozen=True, slots=True)
class Past:
    """What arrived between two decisions."""

    seconds: float
    requests: int
    prompt_tokens: int


@dataclass(slots=True)
class Lookahead:
    """Chooses the plan of a table that a trial rates best; the present one unless another is better by ``margin``.

    horizon_s: how far a trial goes. ttft_s: the target. grace_s: a request that waits at the horizon counts as late
        this much before its target. margin: in requests that meet the target.
    memory_s: how much of the past comes again. factors: how many times as fast; the mean over them counts.
    prior_tokens: mean output before anything has finished.
    """

    server: ServerSpec
    actions: ServeActions
    horizon_s: float
    ttft_s: float
    grace_s: float
    margin: float
    memory_s: float
    prior_tokens: float
    factors: tuple[float, ...]
    graph: PlanGraph
    choice: Choice = field(default_factory=Choice)
    past: list[Past] = field(default_factory=list)
    before: EngineState | None = None
    dense_nll: float = math.nan

    @property
    def first_plan(self) -> Plan:
        """The first plan of the table."""
        return self.actions.plans[0]

    def __call__(self, state: EngineState) -> Plan:
        """Try every legal plan; take the best."""
        self._remember(state)
        legal = self.actions.legal(state, self.choice)
        values = self.values(state, legal)
        best, present = int(np.nanargmax(values)), self.choice.action
        if not legal[present] or values[best] > values[present] + self.margin:
            self.choice = self.actions.chosen(state, self.choice, best)
        return self.actions.plans[self.choice.action]

    def values(self, state: EngineState, legal: NDArray[np.bool_]) -> Floats:
        """Return how many requests each plan is expected to serve well, each by its quality [a]; NaN if not legal."""
        found = np.where(legal, 0.0, np.nan)
        engine = self._running(state)
        warm = engine.snapshot()
        for factor in self.factors:
            engine.restore(warm)
            deadline_s = self._expect(engine, state, factor)
            end_s = warm.time_s + self.horizon_s
            saved = engine.snapshot()
            for action in np.flatnonzero(legal).tolist():
                engine.apply(self.actions.plans[action])
                engine.run_until(end_s)
                found[action] += self._value(engine.records(), deadline_s, end_s + self.grace_s) / len(self.factors)
                engine.restore(saved)
        return found

    def _remember(self, state: EngineState) -> None:
        """Note what has arrived since the decision before."""
        before, self.before = self.before, state
        since_s = state.time_s - (before.time_s if before is not None else 0.0)
        if since_s <= 0.0:
            return
        requests = state.arrived - (before.arrived if before is not None else 0)
        tokens = state.arrived_prompt_tokens - (before.arrived_prompt_tokens if before is not None else 0)
        self.past.append(Past(since_s, requests, tokens))
        while len(self.past) > 1 and sum(part.seconds for part in self.past[1:]) >= self.memory_s:
            del self.past[0]

    def _arrivals(self, factor: float) -> tuple[Floats, Ints]:
        """Return when, from now, requests come within the horizon if the past comes again, and their prompts."""
        times: list[float] = []
        prompts: list[int] = []
        now_s, at = 0.0, 0
        while self.past and now_s < self.horizon_s:
            part = self.past[at % len(self.past)]
            seconds = part.seconds / factor
            for i in range(part.requests):
                times.append(now_s + seconds * (i + 0.5) / part.requests)
                prompts.append(_each(part.prompt_tokens, part.requests))
            now_s, at = now_s + seconds, at + 1
        count = sum(time_s < self.horizon_s for time_s in times)
        return np.array(times[:count], dtype=np.float64), np.array(prompts[:count], dtype=np.int64)

    def _running(self, state: EngineState) -> SimEngine:
        """Return a server at the moment at which the requests that run have their KV, and memory is what it is."""
        if len(self.graph) > MOST_STEPS:
            self.graph = PlanGraph(self.server.model, self.server.quality_nll)
        # Memory is plenty until then; what does not fit afterwards is preempted, as the server would.
        plenty = self._warm(state, constant_budget(PLENTY_BYTES), WARM_MOST_S)
        budget_bytes = max(1, min(state.budget_bytes, state.next_budget_bytes))
        now_s = plenty.env.now
        return self._warm(state, Budget((0.0, now_s), (PLENTY_BYTES, budget_bytes)), now_s)

    def _warm(self, state: EngineState, budget: Budget, until_s: float) -> SimEngine:
        """Return a server that has prefilled the requests that run, or has tried to until then."""
        plan = replace(self.actions.plans[self.choice.action], admit=None)
        config = replace(self.server.config, prefix_caching=False)  # nobody can see which prompts begin alike
        engine = self.server.build_engine(plan, budget, config=config, graph=self.graph, keep_iterations=False)
        running = state.running
        engine.submit_arrays(
            np.zeros(running),
            np.full(running, _each(state.running_tokens, running), dtype=np.int64),
            _outputs(running, self._mean_tokens(state)),
        )
        time_s, begun = 0.0, -1
        while time_s < until_s and begun < running:
            time_s = min(time_s + WARM_STEP_S, until_s)
            begun = engine.run_until(time_s).first_tokens
        return engine

    def _expect(self, engine: SimEngine, state: EngineState, factor: float) -> Floats:
        """Submit what waits and what is expected.

        Returns:
            Until when each request must begin to answer [r], in seconds of the trial; ``inf`` for those that run.
        """
        now_s, waiting = engine.env.now, state.waiting
        later_s, prompts = self._arrivals(factor)
        waited_s = state.oldest_wait_s * (1.0 - np.arange(waiting) / max(1, waiting))
        arrival_s = now_s + np.concatenate([np.zeros(waiting), later_s])
        engine.submit_arrays(
            arrival_s,
            np.concatenate([np.full(waiting, _each(state.waiting_tokens, waiting), dtype=np.int64), prompts]),
            _outputs(len(arrival_s), self._mean_tokens(state)),
        )
        engine.run_until(now_s + MOMENT_S)  # those that wait are in the queue before a plan limits it
        deadline_s = arrival_s + self.ttft_s - np.concatenate([waited_s, np.zeros(len(later_s))])
        return np.concatenate([np.full(state.running, math.inf), deadline_s])

    def _mean_tokens(self, state: EngineState) -> float:
        """Return what has been produced a finished request: the mean of a memoryless law, runners counted."""
        return state.produced_tokens / state.finished if state.finished else self.prior_tokens

    def _value(self, records: Records, deadline_s: Floats, end_s: float) -> float:
        """Return how many requests of a trial that has ended are or can be on time, each by the quality it kept."""
        first_s = np.where(np.isfinite(records.first_token_s), records.first_token_s, end_s)
        good = (first_s <= deadline_s[: len(records)]) & (records.status != Status.REJECTED)
        if self.server.quality_nll is None:
            return float(good.sum())
        if math.isnan(self.dense_nll):
            self.dense_nll = self.server.quality_nll(dense_plan(self.server.model))
        loss = np.nan_to_num(records.quality_nll - self.dense_nll, nan=0.0)
        return float(np.exp(-np.maximum(loss, 0.0))[good].sum())


def _each(tokens: int, requests: int) -> int:
    return max(1, tokens // max(1, requests))


def _outputs(count: int, mean_tokens: float) -> Ints:
    """Return output lengths of a memoryless law with this mean, spread evenly over it and in no order."""
    share = (np.arange(1, count + 1) * GOLDEN) % 1.0
    lengths: Ints = np.maximum(1, np.ceil(-mean_tokens * np.log1p(-share))).astype(np.int64)
    return lengths


def lookahead(
    served: PolicyContext,
    *,
    actions: Mapping[str, Any],
    horizon_s: float = 12.0,
    ttft_s: float = 2.0,
    grace_s: float = 1.0,
    margin: float = 0.1,
    memory_s: float = 5.0,
    prior_tokens: float = 200.0,
    factors: Sequence[float] = (1.0, 1.5),
) -> Lookahead:
    """Build the policy.

    Args:
        served: what is decided for; its ``server`` says what plans are tried on.
        actions: the table of plans, in the words of ``sim.policies.observation.serve.serve_actions``.
        horizon_s, ttft_s, grace_s, margin, memory_s, prior_tokens, factors: as in ``Lookahead``.
    Raises:
        ConfigError: for numbers out of range, or where there is no model of the server.
    """
    if min(horizon_s, ttft_s, memory_s, prior_tokens, *factors) <= 0 or min(grace_s, margin) < 0 or not factors:
        raise ConfigError(
            f"policy.horizon_s is {horizon_s}, ttft_s {ttft_s}, memory_s {memory_s}, prior_tokens {prior_tokens}, "
            f"factors {list(factors)}, grace_s {grace_s}, margin {margin}; grace_s and margin must be at least 0, the "
            "others above it, and there must be a factor"
        )
    if served.server is None:
        raise ConfigError("policy=lookahead tries plans on a model of the server, and there is none here")
    server = served.server
    return Lookahead(
        server=server,
        actions=actions_from(served.model, actions, served.workspace_bytes),
        graph=PlanGraph(server.model, server.quality_nll),
        horizon_s=horizon_s,
        ttft_s=ttft_s,
        grace_s=grace_s,
        margin=margin,
        memory_s=memory_s,
        prior_tokens=prior_tokens,
        factors=tuple(factors),
    )
