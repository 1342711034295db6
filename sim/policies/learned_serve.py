"""A policy trained in ``ServeTrace``: a network picks the next plan from the table of its training."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from sim.cost.memory import kv_block_layer_bytes
from sim.cost.plan import Plan
from sim.engine.protocol import EngineState
from sim.errors import ConfigError
from sim.policies.admission import PaceLimit, WaitLimit
from sim.policies.base import Policy, PolicyContext
from sim.policies.kv_room import KvRoom, kv_room
from sim.policies.learned import Learned, Network, check_tables, read_learned
from sim.policies.observation.prune import ObservationSpec
from sim.policies.observation.serve import (
    SERVER_ENTRIES,
    Choice,
    ServeActions,
    ServeObserver,
    Terms,
    actions_from,
    low_precision_loss,
    replica_table,
    serve_table,
)
from sim.types import Floats32


@dataclass(slots=True)
class LearnedServe:
    """Chooses the legal plan with the highest value.

    reads: how many of the first entries of an observation the network reads.
    pace, run: limit what runs at once so that the TPOT target is met, ``pace`` in addition to the plan's own limit and
        ``run`` in place of it; None for neither. wait: limits the wait in place of the plan's own limit, so that the
        TTFT target is met; None leaves that. The network observes its own choice.
    room: what is added to the values of plans with too little room for KV; None adds nothing.
    trained_tick_s: how often the network decided in training; None if unknown.
    """

    network: Network
    actions: ServeActions
    observer: ServeObserver
    reads: int
    pace: PaceLimit | None = None
    run: PaceLimit | None = None
    wait: WaitLimit | None = None
    room: KvRoom | None = None
    trained_tick_s: float | None = None
    choice: Choice = field(init=False)

    def __post_init__(self) -> None:
        self.choice = Choice(self.actions.start)

    @property
    def first_plan(self) -> Plan:
        """The plan that training started with, bounded."""
        return self._bounded(self.actions.plans[self.actions.start])

    @property
    def plans(self) -> tuple[Plan, ...]:
        """The table."""
        return self.actions.plans

    def __call__(self, state: EngineState) -> Plan:
        """Observe and choose."""
        return self.decided(state, self.observer(state, self.choice)[: self.reads])

    def decided(self, state: EngineState, features: Floats32) -> Plan:
        """Choose by what was observed of a state, float32[entries]."""
        added = None if self.room is None else self.room(state)
        action = int(self.network.act(features, self.actions.legal(state, self.choice), added))
        self.choice = self.actions.chosen(state, self.choice, action)
        for bound in (self.wait, self.pace, self.run):
            if bound is not None:
                bound.measure(state)
        return self._bounded(self.actions.plans[action])

    def _bounded(self, plan: Plan) -> Plan:
        if self.wait is not None:
            plan = self.wait.limited(replace(plan, max_wait_s=None))
        if self.run is not None:
            plan = self.run.replaced(plan)
        return plan if self.pace is None else self.pace.limited(plan)


def own_plan(policy: Policy, plan: Plan) -> Plan:
    """Return the plan of its table that a learned policy has chosen, without bounds; of another policy ``plan``.

    Args:
        policy: may be a wrapper around a learned policy, such as ``Limited``. plan: what it decided now.
    """
    while not isinstance(policy, LearnedServe) and hasattr(policy, "policy"):
        policy = policy.policy
    return policy.actions.plans[policy.choice.action] if isinstance(policy, LearnedServe) else plan


def learned_serve(served: PolicyContext, *, path: str, low_bits: bool = True) -> LearnedServe:
    """Build the policy from an exported file; run it at the ``tick_s`` of its training, which is in the file.

    Args:
        served: what the policy knows of the server.
        path: a JSON file of ``agents.export``, or the name of one in conf/policy.
        low_bits: whether the server has low-precision copies of the weights; without, no plan with layers at low
            precision is chosen.
    Raises:
        ConfigError: for a file that was trained for another model, observation or table of plans.
    """
    learned = read_learned(path, "ServeTrace")
    table = replica_table if learned.network.inputs == len(SERVER_ENTRIES) else serve_table
    return LearnedServe(**parts_of(learned, served, table, low_bits))


def parts_of(
    learned: Learned,
    served: PolicyContext,
    table: Callable[[ServeActions], ObservationSpec],
    low_bits: bool,
) -> dict[str, Any]:
    """Return the arguments of ``LearnedServe`` for an exported policy.

    Args:
        learned, served, table: as in ``trained_actions``. low_bits: as in ``learned_serve``.
    Raises:
        ConfigError: as ``trained_actions``.
    """
    actions = trained_actions(learned, served, table)
    if not low_bits:
        actions = actions.without_low_bits()
    block_bytes = kv_block_layer_bytes(served.model, served.kv_block_tokens)
    terms = _terms(learned, served, actions)
    observer = ServeObserver(served.model, actions, block_bytes, terms)
    pace, run = (_pace(learned.about.get(key), terms.tpot_s) for key in ("pace_share", "run_share"))
    share, ttft_s = learned.about.get("wait_share"), (learned.about.get("slo") or {}).get("ttft_s")
    wait = None if share is None or ttft_s is None else WaitLimit(float(ttft_s), share)
    weight = learned.about.get("room_weight")
    return {
        "network": learned.network,
        "actions": actions,
        "observer": observer,
        "reads": learned.network.inputs,
        "pace": pace,
        "run": run,
        "wait": wait,
        "trained_tick_s": learned.about.get("tick_s"),
        "room": None if weight is None else kv_room(served.model, actions, float(weight)),
    }


def _pace(share: float | None, tpot_s: float) -> PaceLimit | None:
    """Return a limit of what runs by a share of a target; None without a share or a target."""
    return None if share is None or math.isinf(tpot_s) else PaceLimit(share * tpot_s)


def _terms(learned: Learned, served: PolicyContext, actions: ServeActions) -> Terms:
    """Return the SLO that a policy was trained for, and what low precision costs by the server's quality table.

    Without a quality table, low precision costs what it did in training.
    """
    slo = learned.about.get("slo", {})
    tpot_s = slo.get("tpot_s") or math.inf
    charge = served.server.quality_nll if served.server is not None else None
    low_loss = float(learned.about.get("low_loss", 0.0))
    if charge is not None:
        measured = low_precision_loss(served.model, actions, charge)
        low_loss = low_loss if math.isnan(measured) else measured
    return Terms(tpot_s=float(tpot_s), low_loss=low_loss)


def trained_actions(
    learned: Learned, served: PolicyContext, table: Callable[[ServeActions], ObservationSpec]
) -> ServeActions:
    """Return the plans that a policy was trained to choose from, for the served model.

    Args:
        learned, served: the policy, and what it knows of the server.
        table: builds its table of observations from the plans.
    Raises:
        ConfigError: if it was trained for another model, observation or table of plans.
    """
    if learned.about.get("model") != served.model.name:
        raise ConfigError(
            f"{learned.path.name} was trained on {learned.about.get('model')}, not on {served.model.name}"
        )
    if "plans" not in learned.about:
        raise ConfigError(f"{learned.path.name} has no plans; export it again: python -m agents.export")
    actions = actions_from(served.model, learned.about["plans"], served.workspace_bytes)
    check_tables(learned, table(actions))
    return actions
