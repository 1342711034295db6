"""Another first plan for a policy.

An engine refuses prompts that do not fit the memory that its first plan leaves for KV (as vLLM does at its start), and
goes on to do so after the plan has changed. Under tight memory a server that starts with full weights refuses most long
prompts forever, so a policy that changes plans should start with little weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sim.cost.plan import Plan
from sim.engine.protocol import EngineState
from sim.policies.admission import built
from sim.policies.base import Policy, PolicyContext, plans_of
from sim.policies.fixed import static_plan


@dataclass(slots=True)
class Starting:
    """Follows another policy; before its first decision, ``first_plan`` runs."""

    policy: Policy
    first_plan: Plan

    @property
    def plans(self) -> tuple[Plan, ...] | None:
        """Those of the other policy, and the first."""
        plans = plans_of(self.policy)
        return None if plans is None else (self.first_plan, *plans)

    def __call__(self, state: EngineState) -> Plan:
        """Return the other policy's plan."""
        return self.policy(state)


def starting(
    served: PolicyContext,
    *,
    policy: Any,
    drop_mha: Sequence[int] = (),
    drop_ffn: Sequence[int] = (),
    weight_bits: int | Sequence[int] | None = None,
) -> Starting:
    """Build the policy around another one: a file of conf/policy by name or by content (``built``).

    Args:
        drop_mha, drop_ffn, weight_bits: the first plan, as in ``sim.policies.fixed.static_plan``.
    Raises:
        PlanError: if the plan is not legal for the model.
    """
    plan = static_plan(served.model, drop_mha=drop_mha, drop_ffn=drop_ffn, weight_bits=weight_bits)
    return Starting(built(policy, served), plan)
