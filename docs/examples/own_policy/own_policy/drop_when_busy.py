"""Drop FFN blocks while many requests wait."""

from collections.abc import Sequence

from sim.cost.plan import Plan
from sim.engine.protocol import EngineState
from sim.errors import ConfigError
from sim.policies.base import PolicyContext
from sim.policies.fixed import static_plan


class DropWhenBusy:
    """Drop the FFN blocks of some layers while more than ``limit`` requests wait."""

    def __init__(self, context: PolicyContext, *, layers: Sequence[int], limit: int = 20) -> None:
        if limit < 0:
            raise ConfigError(f"policy.limit is {limit}; it must be at least 0 requests")
        self.limit = limit
        self.first_plan = static_plan(context.model)
        self.small_plan = static_plan(context.model, drop_ffn=layers)

    def __call__(self, state: EngineState) -> Plan:
        """Decide, at every tick of the replay."""
        return self.small_plan if state.waiting > self.limit else self.first_plan
