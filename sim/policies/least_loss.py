"""Of all plans of a table, the one that loses least while memory suffices and tokens come in time.

A knapsack over every way to save at once: dropped blocks, weights, KV and products at fewer bits, compressed KV and
streamed layers have two costs, bytes and seconds, and one price, the loss. The plans are all combinations of a table,
and all of them are weighed at every decision, so the choice is exact for the table. It looks only at the present load,
by formula, and counts the KV of running requests as new ones would keep it, though they keep what they have;
``lookahead`` also tries what the load becomes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from typing import Any

import numpy as np

from sim.cost.kv_format import token_kv_bytes
from sim.cost.plan import Plan, describe, is_positive
from sim.engine.protocol import EngineState
from sim.engine.server_spec import ServerSpec, which_quality
from sim.engine.steady_decode import steady_decode_s
from sim.errors import ConfigError
from sim.limits import is_whole
from sim.policies.base import PolicyContext
from sim.policies.load_table import budget_of
from sim.policies.observation.serve import Choice, ServeActions, actions_from
from sim.types import Bools, Floats

MOST_PRICES = 4096
"""Prices that are kept, so that a load that recurs is not priced again."""


@dataclass(slots=True)
class LeastLoss:
    """Runs the plan of the table with the least loss that fits; a better one than the present has to stay better.

    losses: nats per token of each plan, float64[a]. order: the plans by loss, then by bytes of weights.
    kv_bytes: of each token, float64[a].
    tpot_s: the longest decode iteration; None for no bound. headroom: factor on the KV demand. waiting_share: share of
    the queue's tokens that counts as demand.
    patience: decisions that must agree before a plan is left that still fits.
    """

    server: ServerSpec
    actions: ServeActions
    losses: Floats
    kv_bytes: Floats
    tpot_s: float | None
    headroom: float
    waiting_share: float
    patience: int
    choice: Choice = field(init=False)
    order: list[int] = field(init=False)
    calm: int = 0
    prices: dict[tuple[int, int, int], float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.choice = Choice(self.actions.start)
        self.order = np.lexsort((np.array(self.actions.weights_bytes), self.losses)).tolist()

    @property
    def plans(self) -> tuple[Plan, ...]:
        """All plans of the table."""
        return self.actions.plans

    @property
    def first_plan(self) -> Plan:
        """The plan with which the table says to start."""
        return self.actions.plans[self.actions.start]

    def __call__(self, state: EngineState) -> Plan:
        """Weigh all plans; change at once if the present one does not fit, otherwise after ``patience`` decisions."""
        present, legal = self.choice.action, self.actions.legal(state, self.choice)
        fits = self.fits(state, legal)
        best = self.best(state, legal, fits)
        kept = fits[present] and self.in_time(state, present)
        self.calm = self.calm + 1 if best != present else 0
        if best != present and (not kept or self.calm >= self.patience):
            self.choice, self.calm = self.actions.chosen(state, self.choice, best), 0
        return self.actions.plans[self.choice.action]

    def fits(self, state: EngineState, legal: Bools) -> Bools:
        """Return which legal plans have room for the KV that is demanded, bool[a]."""
        found: Bools = legal & (self.held_bytes(state) <= budget_of(state))
        return found

    def held_bytes(self, state: EngineState) -> Floats:
        """Return what each plan holds for the KV that is demanded, with weights and workspace, float64[a]."""
        tokens = self.headroom * (state.running_tokens + self.waiting_share * state.waiting_tokens)
        held: Floats = np.array(self.actions.weights_bytes) + tokens * self.kv_bytes + self.actions.workspace_bytes
        return held

    def in_time(self, state: EngineState, action: int) -> bool:
        """Return whether the running requests get their next token in time under a plan."""
        return self.tpot_s is None or self.decode_s(state, action) <= self.tpot_s

    def decode_s(self, state: EngineState, action: int) -> float:
        """Return the seconds of a decode iteration of the running requests, as fast as the server turned out to be.

        Where none runs: of one request that begins.
        """
        running = max(1, state.running)
        # Loads are rounded up to two digits, so that prices can be kept.
        batch, context = _rounded_up(running), _rounded_up(state.running_tokens // running + 1)
        key = (action, batch, context)
        if key not in self.prices:
            if len(self.prices) >= MOST_PRICES:
                self.prices.clear()
            self.prices[key] = steady_decode_s(self.server, self.actions.plans[action], batch, context)
        slower = state.busy_s / state.priced_s if state.priced_s > 0.0 else self.server.slowdown
        return self.prices[key] * slower

    def best(self, state: EngineState, legal: Bools, fits: Bools) -> int:
        """Return the number of the best plan.

        That of the least loss which fits and is in time; if none is in time, the fastest that fits; if none fits, the
        one that holds least for the demand. Of equal losses the fastest, then the one with fewer bytes of weights, then
        the first: streamed layers and hidden states lose nothing, but take time.
        """
        if not fits.any():
            return int(np.where(legal, self.held_bytes(state), np.inf).argmin())
        candidates: list[int] = [action for action in self.order if fits[action]]
        seconds = partial(self.decode_s, state)
        for _, alike in groupby(candidates, key=self.losses.__getitem__):
            if timely := [action for action in alike if self.in_time(state, action)]:
                return min(timely, key=seconds)
        return min(candidates, key=seconds)


def _rounded_up(count: int) -> int:
    """Return a count rounded up to two decimal digits."""
    unit: int = 10 ** max(0, len(str(count)) - 2)
    return -(-count // unit) * unit


def least_loss(
    served: PolicyContext,
    *,
    actions: Mapping[str, Any],
    tpot_s: float | None = None,
    headroom: float = 1.1,
    waiting_share: float = 1.0,
    patience: int = 5,
) -> LeastLoss:
    """Build the policy.

    Args:
        served: what the policy knows of the server; plans are priced on its ``server``.
        actions: the table of plans, as options of ``sim.policies.observation.serve.serve_actions``.
        tpot_s, headroom, waiting_share, patience: as in ``LeastLoss``.
    Raises:
        ConfigError: for numbers out of range, if there is no model of the server, or for a plan whose loss is unknown.
    """
    if not (is_positive(headroom) and headroom >= 1.0):
        raise ConfigError(f"policy.headroom is {headroom!r}; it must be a finite number from 1 on")
    if not is_positive(waiting_share) and waiting_share != 0.0:
        raise ConfigError(f"policy.waiting_share is {waiting_share!r}; it must be a finite number from 0 on")
    if not (is_whole(patience) and patience >= 1):
        raise ConfigError(f"policy.patience is {patience!r}; it must be a whole number of decisions from 1 on")
    if tpot_s is not None and not is_positive(tpot_s):
        raise ConfigError(f"policy.tpot_s is {tpot_s!r}; it must be above 0 seconds, or null for no bound")
    server = served.server
    if server is None:
        raise ConfigError(
            "policy=least_loss weighs plans by their seconds, and this command has no model of the server; use "
            "sim.replay, or another policy"
        )
    if server.quality_nll is None:
        raise ConfigError(
            "policy=least_loss weighs plans by their loss, and this command knows no quality; set quality_table=, or "
            "use another policy"
        )
    table = actions_from(served.model, actions, served.workspace_bytes)
    losses = np.array([server.quality_nll(plan) for plan in table.plans])
    if np.isnan(losses).any():
        unknown = table.plans[int(np.isnan(losses).argmax())]
        raise ConfigError(
            f"policy=least_loss: the loss of the plan {describe(unknown)} of {server.model.name} is unknown; choose "
            f"other plans (policy.actions); {which_quality(server.model.name, table.plans)}"
        )
    return LeastLoss(
        server=server,
        actions=table,
        losses=losses,
        kv_bytes=np.array([token_kv_bytes(served.model, plan) for plan in table.plans]),
        tpot_s=tpot_s,
        headroom=headroom,
        waiting_share=waiting_share,
        patience=patience,
    )
