"""What a policy is, and what it may know of the server for which it decides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast, runtime_checkable

from sim.cost.model_spec import ModelSpec
from sim.cost.plan import Plan
from sim.engine.protocol import EngineState
from sim.engine.server_spec import ServerSpec
from sim.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyContext:
    """What a policy may know of its server when it is built; none of it changes while the policy decides.

    model, workspace_bytes, kv_block_tokens: what is served, and how its memory is counted.
    server: the server itself, for policies that try plans out on a simulated copy; None where there is none.
    """

    model: ModelSpec
    workspace_bytes: int = 0
    kv_block_tokens: int = 16
    server: ServerSpec | None = None

    @classmethod
    def of(cls, server: ServerSpec) -> PolicyContext:
        """Return the context of the policies of a server."""
        return cls(
            model=server.model,
            workspace_bytes=server.workspace_bytes,
            kv_block_tokens=server.config.kv_block_tokens,
            server=server,
        )


class Policy(Protocol):
    """Chooses the plan for the next decision period from what a server could really see.

    A policy may remember what it saw; each replay builds its own.
    """

    @property
    def first_plan(self) -> Plan:
        """The plan that runs before the first decision."""
        ...

    def __call__(self, state: EngineState) -> Plan:
        """Return the plan to run from now on."""
        ...


def checked_policy(policy: Any) -> Policy:
    """Return what a configuration built as a policy.

    Raises:
        ConfigError: if it cannot be called, or has no Plan as ``first_plan``.
    """
    first = getattr(policy, "first_plan", None)
    if not callable(policy) or not isinstance(first, Plan):
        lacks = f"first_plan is {first!r}" if callable(policy) else "it cannot be called"
        raise ConfigError(
            f"{type(policy).__name__} is no policy: {lacks}; give it a Plan as self.first_plan, and a "
            "__call__(self, state) that returns a Plan"
        )
    return cast(Policy, policy)


def plans_of(policy: Policy) -> tuple[Plan, ...] | None:
    """Return all plans that a policy can choose, up to admission limits; None if it does not list them as ``plans``.

    The real engine keeps only those copies of the weights ready that these plans need.
    """
    plans: Sequence[Plan] | None = getattr(policy, "plans", None)
    return None if plans is None else tuple(plans)


@runtime_checkable
class ClusterPolicy(Policy, Protocol):
    """A policy of one replica that also looks at the other replicas of its cluster; alone it is a plain ``Policy``."""

    def among(self, state: EngineState, others: Sequence[EngineState]) -> Plan:
        """Return the plan to run from now on; ``others``: the states of the other replicas that accept requests."""
        ...
