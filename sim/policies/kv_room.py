"""A correction to the values of plans: those that leave too little room for the KV that is demanded are worth less.

When requests wait for KV, weights and KV fill the memory, and where memory bandwidth limits decode, an iteration reads
all of it. So iterations take about as long under every plan, and throughput grows with the tokens that fit. A network
learns this for loads like those of its training; this term states it for any load.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sim.cost.kv_format import token_kv_bytes
from sim.cost.model_spec import ModelSpec
from sim.engine.protocol import EngineState
from sim.immutable import Immutable
from sim.policies.load_table import budget_of
from sim.policies.observation.serve import ServeActions
from sim.types import Floats

ENOUGH = 0.5
"""Share of the demanded tokens for which a plan must have room; below it, the plan is worth less."""


@dataclass(frozen=True, slots=True)
class KvRoom(Immutable):
    """What too little room for KV adds to the value of each plan.

    The demand is the tokens in the KV of running requests and in the prompts of waiting ones, all counted as the plan
    would store them, though running requests keep their KV as it is.

    weight: a plan loses ``weight * ln(ENOUGH * demand / room)`` if its room, in tokens, is below ``ENOUGH * demand``.
    held_bytes: weights and workspace of each plan, float64[a]. kv_bytes: of a token under each plan, float64[a].
    """

    weight: float
    held_bytes: Floats
    kv_bytes: Floats

    def __call__(self, state: EngineState) -> Floats:
        """Return what is added to the values, float64[a], at most 0; an announced decrease of the budget counts now.

        A plan counts as having room for at least one token.
        """
        needed = max(1.0, ENOUGH * (state.running_tokens + state.waiting_tokens))
        room = np.maximum((budget_of(state) - self.held_bytes) / self.kv_bytes, 1.0)
        added: Floats = self.weight * np.log(np.minimum(room / needed, 1.0))
        return added


def kv_room(model: ModelSpec, actions: ServeActions, weight: float) -> KvRoom:
    """Return the correction for a table of plans; ``weight`` as in ``KvRoom``."""
    kv_bytes = np.array([max(1.0, token_kv_bytes(model, plan)) for plan in actions.plans])
    return KvRoom(weight, np.array(actions.weights_bytes, dtype=np.float64) + actions.workspace_bytes, kv_bytes)
