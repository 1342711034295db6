"""What a policy is."""

from __future__ import annotations

from typing import Protocol

from sim.engine import EngineState
from sim.plan import Plan


class Policy(Protocol):
    """Chooses the plan for the next decision period from what a server could really see.

    ``first_plan`` is what runs before the first decision.
    """

    @property
    def first_plan(self) -> Plan:
        """What runs before the first decision."""
        ...

    def __call__(self, state: EngineState) -> Plan:
        """Return what shall run from now on."""
        ...
