"""A correction to the values of plans: those under which most of the demanded KV has no room are worth less.

Where requests wait for KV, the server finishes as many of them as it holds at once: an iteration reads all memory there
is, weights and KV together, however they share it. So what a plan serves falls with the tokens that it has room for. A
network learns this from windows like those of its training; this term states it for all loads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sim.cost.kv_format import token_kv_bytes
from sim.cost.model_spec import ModelSpec
from sim.cost.plan import Plan
from sim.engine.protocol import EngineState
from sim.immutable import Immutable
from sim.policies.load_table import budget_of
from sim.types import Floats

ENOUGH = 0.5
"""Share of the demanded tokens that must have room; below it a plan is worth less."""


@dataclass(frozen=True, slots=True)
class KvRoom(Immutable):
    """What a lack of room for KV adds to the value of each plan.

    weight: what a plan loses per e-fold by which its room is smaller than ``ENOUGH`` of the demand.
    weights_bytes: of each plan, with the workspace, float64[a]. kv_bytes: of a token under each plan, float64[a].
    """

    weight: float
    weights_bytes: Floats
    kv_bytes: Floats

    def __call__(self, state: EngineState) -> Floats:
        """Return what is added to the values, float64[a], at most 0.

        Demanded are the tokens of running and of waiting requests. A plan has room for at least one token.
        """
        needed = max(1.0, ENOUGH * (state.running_tokens + state.waiting_tokens))
        room = np.maximum((budget_of(state) - self.weights_bytes) / self.kv_bytes, 1.0)
        added: Floats = self.weight * np.log(np.minimum(room / needed, 1.0))
        return added


def kv_room(
    model: ModelSpec, plans: Sequence[Plan], weights_bytes: Sequence[int], workspace_bytes: int, weight: float
) -> KvRoom:
    """Return the correction for a table of plans.

    Args:
        model: that the plans are of. plans, weights_bytes: the table, as in ``ServeActions``.
        workspace_bytes: that neither weights nor KV may use. weight: as in ``KvRoom``.
    """
    kv_bytes = np.array([max(1.0, token_kv_bytes(model, plan)) for plan in plans])
    return KvRoom(weight, np.array(weights_bytes, dtype=np.float64) + workspace_bytes, kv_bytes)
