"""What a policy is, and what it may know of the server it decides for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol, runtime_checkable

from sim.cost.latency import LatencyModel
from sim.cost.model_spec import ModelSpec
from sim.cost.plan import Plan
from sim.engine.budget import Budget
from sim.engine.protocol import EngineConfig, EngineState
from sim.engine.sim_engine import SimEngine


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerModel:
    """A server without its requests: how it serves, what it costs, what a plan loses; enough to try plans out.

    latency: the price of a model on one device. config, workspace_bytes, host_to_device_bytes_per_s, copy_slowdown,
    quality_nll: as in ``SimEngine``.
    """

    model: ModelSpec
    latency: LatencyModel
    config: EngineConfig
    workspace_bytes: int
    host_to_device_bytes_per_s: float
    copy_slowdown: float
    quality_nll: Callable[[Plan], float] | None

    def engine(self, plan: Plan, budget_bytes: int | Budget, **words: Any) -> SimEngine:
        """Build an idle engine that is such a server, under a budget.

        Args:
            plan, budget_bytes: as ``SimEngine``. words: what else it takes, such as ``keep_iterations`` or ``book``,
                and in the place of the server's own.

        Raises:
            BudgetError: when the budget cannot hold the weights and one request.
        """
        own = {field.name: getattr(self, field.name) for field in fields(self)}
        return SimEngine(plan=plan, budget_bytes=budget_bytes, **{**own, **words})


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyContext:
    """What stays the same while a policy decides: the model, and how its memory is counted.

    server: returns a model of the whole server, for policies that try plans out; None where there is none.
    """

    model: ModelSpec
    workspace_bytes: int = 0
    kv_block_tokens: int = 16
    server: Callable[[], ServerModel] | None = None


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


@runtime_checkable
class ClusterPolicy(Policy, Protocol):
    """A policy of one replica that looks at the other replicas of its cluster too; without any it is a ``Policy``."""

    def among(self, state: EngineState, others: Sequence[EngineState]) -> Plan:
        """Return what shall run from now on; ``others``: the states of the other replicas that accept requests."""
        ...
