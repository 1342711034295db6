"""What a policy is, and what it may know of the server it decides for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from sim.engine import EngineState
from sim.model import ModelSpec
from sim.plan import Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """What stays the same while a policy decides: the model, and how its memory is counted."""

    model: ModelSpec
    workspace_bytes: int = 0
    kv_block_tokens: int = 16


class Policy(Protocol):
    """Chooses the plan for the next decision period from what a server could really see.

    ``first_plan`` is what runs before the first decision. A policy may remember what it saw; each replay builds its
    own.
    """

    @property
    def first_plan(self) -> Plan:
        """What runs before the first decision."""
        ...

    def __call__(self, state: EngineState) -> Plan:
        """Return what shall run from now on."""
        ...
