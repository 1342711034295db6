"""One plan from beginning to end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sim.engine import EngineState
from sim.model import ModelSpec
from sim.plan import KVKeep, Plan, check_plan, drop


@dataclass(frozen=True, slots=True)
class Fixed:
    """Always the same plan: dense, or any static compression."""

    first_plan: Plan

    def __call__(self, state: EngineState) -> Plan:
        """Return the plan, whatever the state."""
        return self.first_plan


def fixed(
    model: ModelSpec,
    *,
    drop_mha: Sequence[int] = (),
    drop_ffn: Sequence[int] = (),
    prefill_drop_mha: Sequence[int] | None = None,
    prefill_drop_ffn: Sequence[int] | None = None,
    weight_bits: int | Sequence[int] = 16,
    max_running: int | None = None,
    admit: int | None = None,
) -> Fixed:
    """Build a fixed policy from the layers whose blocks are dropped.

    Args:
        model: what the plan is for.
        drop_mha, drop_ffn: layers whose block decode does not run.
        prefill_drop_mha, prefill_drop_ffn: the same for prefill; as decode when not given.
        weight_bits: 16, 8 or 4 for all layers, or one entry a layer.
        max_running, admit: as in ``Plan``.
    Raises:
        PlanError: when the plan is not legal for the model; the message names the block.
    """
    layers = model.num_layers
    plan = Plan(
        decode=drop(model, mha=drop_mha, ffn=drop_ffn),
        prefill=drop(
            model,
            mha=drop_mha if prefill_drop_mha is None else prefill_drop_mha,
            ffn=drop_ffn if prefill_drop_ffn is None else prefill_drop_ffn,
        ),
        weight_bits=(weight_bits,) * layers if isinstance(weight_bits, int) else tuple(weight_bits),
        kv_keep=(KVKeep(),) * layers,
        max_running=max_running,
        admit=admit,
    )
    check_plan(model, plan)
    return Fixed(plan)
