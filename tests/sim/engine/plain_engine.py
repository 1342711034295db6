"""The plain engine of the tests: ``sim.engine.replica.Replica`` with the executor of ``sim.engine.pricing_executor``.

It is slow and obvious on purpose: Python objects, real block tables, no shortcuts. ``SimEngine`` must leave the same
records; where the two differ, one of them is wrong.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import simpy

from sim.cost.latency import LatencyModel
from sim.cost.model_spec import ModelSpec
from sim.cost.plan import Plan
from sim.engine.budget import Budget
from sim.engine.pricing_executor import PricedWeights, PricingExecutor, SimulatedClock
from sim.engine.protocol import EngineConfig
from sim.engine.replica import Replica


class PlainEngine(Replica):
    """The reference engine, built as ``SimEngine`` is."""

    def __init__(
        self,
        *,
        model: ModelSpec,
        latency: LatencyModel,
        config: EngineConfig,
        plan: Plan,
        budget_bytes: int | Budget,
        workspace_bytes: int = 0,
        host_to_device_bytes_per_s: float = 25e9,
        slowdown: float = 1.0,
        copy_slowdown: float = 0.0,
        copy_layer_s: float = 0.0,
        quality_nll: Callable[[Plan], float] | None = None,
        env: simpy.Environment | None = None,
    ) -> None:
        """Build an idle engine; it starts at the present time of ``env`` and then keeps its own clock."""
        start_s = float(env.now) if env is not None else 0.0
        clock = SimulatedClock(start_s)
        self.copies = PricedWeights(host_to_device_bytes_per_s, clock, copy_layer_s)
        self.latency = latency
        super().__init__(
            model=model,
            config=config,
            plan=plan,
            budget=budget_bytes,
            executor=PricingExecutor(latency, copy_slowdown, host_to_device_bytes_per_s, slowdown),
            weights=self.copies,
            clock=clock,
            workspace_bytes=workspace_bytes,
            quality_nll=quality_nll,
            check_bits=latency.check_bits,
            start_s=start_s,
        )

    @property
    def held(self) -> bool:
        """Whether it is held between two iterations, so that a policy can decide before the next."""
        return self._held

    @property
    def in_iteration(self) -> bool:
        """Whether an iteration is under way."""
        return self._under_way is not None

    def next_s(self) -> float:
        """Return when it next acts without another call; ``inf`` for never, or while it is held."""
        if self._under_way is not None:
            return self._under_way.ran.end_s
        if not self._idle:
            return math.inf if self._held else self._time_s
        return min(self._next_event_s(), self.copies.end_s)
