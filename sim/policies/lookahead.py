"""Look-ahead: try every plan on a model of the server, and keep the one under which most requests are served well.

Model-predictive control without learning. At each decision, a simulated server is brought to the load of
``EngineState``: the number of running requests and their tokens, and the number of waiting ones. Then every plan of a
table runs on it for ``horizon_s`` seconds, while the arrivals of the recent past repeat, at their own rate and faster.
It uses nothing that a server could not know: output lengths follow a memoryless (exponential) distribution whose mean
is the tokens produced per finished request; the budget stays as it is (an announced decrease counts now); future
arrivals repeat past ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sim.cost.plan import Plan, dense_plan, describe, is_positive
from sim.engine.budget import Budget, constant_budget
from sim.engine.plan_graph import PlanGraph
from sim.engine.protocol import EngineState
from sim.engine.server_spec import ServerSpec, which_quality
from sim.engine.sim_engine import SimEngine
from sim.errors import ConfigError
from sim.policies.base import PolicyContext
from sim.policies.observation.serve import Choice, ServeActions, actions_from
from sim.results.metrics import behind_pace
from sim.results.records import Records, Status
from sim.types import Floats, Ints

# Shapes: [r] requests of a trial: running, waiting, expected; [a] plans of the table.


GOLDEN = (math.sqrt(5.0) - 1.0) / 2.0
PLENTY_BYTES = 1 << 50
MOST_STEPS = 2048
"""Nodes of the plan graph that are kept from one decision to the next."""
MOMENT_S = 1e-3
WARM_STEP_S, WARM_MOST_S = 0.25, 30.0
"""A trial first prefills the running requests: seconds between checks whether it is done, and the longest time."""


@dataclass(frozen=True, slots=True)
class Past:
    """The requests that arrived between two decisions."""

    seconds: float
    requests: int
    prompt_tokens: int


@dataclass(slots=True)
class Lookahead:
    """Chooses the plan that a trial rates best; keeps the current plan unless another is better by ``margin``.

    horizon_s: duration of a trial. ttft_s, tpot_s: the targets; None for no target of the time per output token.
    grace_s: a request that still waits at the end of a trial counts as on time if its deadline is at least this much
        later.
    margin: in requests that meet the target.
    memory_s: duration of the past that repeats. factors: rates at which it repeats, as multiples of its own; the value
        of a plan is the mean over them.
    prior_tokens: mean output length until a request has finished.
    """

    server: ServerSpec
    actions: ServeActions
    horizon_s: float
    ttft_s: float
    tpot_s: float | None
    grace_s: float
    margin: float
    memory_s: float
    prior_tokens: float
    factors: tuple[float, ...]
    graph: PlanGraph
    choice: Choice = field(init=False)
    past: list[Past] = field(default_factory=list)
    before: EngineState | None = None
    dense_nll: float = math.nan

    def __post_init__(self) -> None:
        self.choice = Choice(self.actions.start)

    @property
    def first_plan(self) -> Plan:
        """The plan with which the table says to start."""
        return self.actions.plans[self.actions.start]

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
        """Return the requests that each plan should serve well, weighted by quality, float64[a]; NaN if not legal."""
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
        """Record what has arrived since the previous decision."""
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
        """Return arrivals within the horizon, in seconds from now, if the past repeats, and their prompt tokens."""
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
        """Return a server in which the running requests have their KV, under the current budget."""
        if len(self.graph) > MOST_STEPS:
            self.graph = PlanGraph(self.server.model, self.server.quality_nll)
        # Prefill with ample memory; what then does not fit the budget is preempted, as on the server.
        plenty = self._warm(state, constant_budget(PLENTY_BYTES), WARM_MOST_S)
        budget_bytes = max(1, min(state.budget_bytes, state.next_budget_bytes))
        now_s = plenty.env.now
        return self._warm(state, Budget((0.0, now_s), (PLENTY_BYTES, budget_bytes)), now_s)

    def _warm(self, state: EngineState, budget: Budget, until_s: float) -> SimEngine:
        """Return a server that has prefilled the running requests, as far as it could until ``until_s``."""
        plan = replace(self.actions.plans[self.choice.action], max_waiting=None, max_wait_s=None, max_running=None)
        config = replace(self.server.config, prefix_caching=False)  # which prompts share a prefix is not observable
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
        """Submit the waiting and the expected requests.

        Returns:
            The deadline of each request's first token, float64[r], in seconds of the trial; ``inf`` for running ones.
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
        engine.run_until(now_s + MOMENT_S)  # so that waiting requests are in the queue before a plan limits it
        deadline_s = arrival_s + self.ttft_s - np.concatenate([waited_s, np.zeros(len(later_s))])
        return np.concatenate([np.full(state.running, math.inf), deadline_s])

    def _mean_tokens(self, state: EngineState) -> float:
        """Return all produced tokens per finished request: the mean of a memoryless distribution of lengths."""
        return state.produced_tokens / state.finished if state.finished else self.prior_tokens

    def _value(self, records: Records, deadline_s: Floats, end_s: float) -> float:
        """Return the number of a trial's requests that are or can still be on time, weighted by their quality."""
        first_s = np.where(np.isfinite(records.first_token_s), records.first_token_s, end_s)
        good = (first_s <= deadline_s[: len(records)]) & (records.status != Status.REJECTED)
        if self.tpot_s is not None:
            good &= ~behind_pace(records, self.tpot_s, end_s - self.grace_s)
        if self.server.quality_nll is None:
            return float(good.sum())
        if math.isnan(self.dense_nll):
            self.dense_nll = self.server.quality_nll(dense_plan(self.server.model))
        loss = np.nan_to_num(records.quality_nll - self.dense_nll, nan=0.0)
        return float(np.exp(-np.maximum(loss, 0.0))[good].sum())


def _each(tokens: int, requests: int) -> int:
    return max(1, tokens // max(1, requests))


def _outputs(count: int, mean_tokens: float) -> Ints:
    """Return output lengths, int64[count], that cover a memoryless distribution with this mean evenly, unordered."""
    # Multiples of the golden ratio spread evenly over [0, 1) without random numbers, in no particular order.
    share = (np.arange(1, count + 1) * GOLDEN) % 1.0
    lengths: Ints = np.maximum(1, np.ceil(-mean_tokens * np.log1p(-share))).astype(np.int64)
    return lengths


def lookahead(
    served: PolicyContext,
    *,
    actions: Mapping[str, Any],
    horizon_s: float = 12.0,
    ttft_s: float = 2.0,
    tpot_s: float | None = None,
    grace_s: float = 1.0,
    margin: float = 0.1,
    memory_s: float = 5.0,
    prior_tokens: float = 200.0,
    factors: Sequence[float] = (1.0, 1.5),
) -> Lookahead:
    """Build the policy.

    Args:
        served: what the policy knows of the server; plans are tried on its ``server``.
        actions: the table of plans, as options of ``sim.policies.observation.serve.serve_actions``.
        horizon_s, ttft_s, tpot_s, grace_s, margin, memory_s, prior_tokens, factors: as in ``Lookahead``.
    Raises:
        ConfigError: for numbers out of range, or if there is no model of the server.
    """
    above, from_0 = (horizon_s, ttft_s, memory_s, prior_tokens, *factors), (grace_s, margin)
    if not factors or not all(map(is_positive, above)) or not all(is_positive(one) or one == 0 for one in from_0):
        raise ConfigError(
            f"policy.horizon_s is {horizon_s}, ttft_s {ttft_s}, memory_s {memory_s}, prior_tokens {prior_tokens}, "
            f"factors {list(factors)}, grace_s {grace_s}, margin {margin}; grace_s and margin must be at least 0, the "
            "others above 0, all finite, with at least one factor"
        )
    if tpot_s is not None and not is_positive(tpot_s):
        raise ConfigError(f"policy.tpot_s is {tpot_s!r}; it must be above 0 seconds, or null for no target")
    if served.server is None:
        raise ConfigError(
            "policy=lookahead tries plans on a model of the server, and this command has none; use sim.replay or "
            "another policy"
        )
    server = served.server
    table = actions_from(served.model, actions, served.workspace_bytes)
    if server.quality_nll is not None:
        unknown = next((plan for plan in table.plans if math.isnan(server.quality_nll(plan))), None)
        if unknown is not None:
            raise ConfigError(
                f"policy=lookahead weighs requests by quality, but that of the plan {describe(unknown)} of "
                f"{server.model.name} is unknown; choose other plans (policy.actions); "
                f"{which_quality(server.model.name, table.plans)}"
            )
    return Lookahead(
        server=server,
        actions=table,
        graph=PlanGraph(server.model, server.quality_nll),
        horizon_s=horizon_s,
        ttft_s=ttft_s,
        tpot_s=tpot_s,
        grace_s=grace_s,
        margin=margin,
        memory_s=memory_s,
        prior_tokens=prior_tokens,
        factors=tuple(factors),
    )
