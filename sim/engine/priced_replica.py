"""A replica on simulated time, in plain Python: ``Replica`` with the parts of ``sim.engine.pricing_executor``.

Tests compare ``SimEngine`` with it: both leave the same records. It is slower, but requests can be canceled, and it
reports every token when it comes, which a server needs (sim/serve).
"""

from __future__ import annotations

from collections.abc import Callable

from sim.cost.latency import LatencyModel
from sim.cost.model_spec import ModelSpec
from sim.cost.plan import Plan
from sim.engine.budget import Budget
from sim.engine.pricing_executor import PricedWeights, PricingExecutor, SimulatedClock
from sim.engine.protocol import EngineConfig
from sim.engine.replica import Replica


class PricedReplica(Replica):
    """A replica whose iterations take the time of a latency model; the arguments are those of ``SimEngine``.

    latency: as passed to the constructor. copies: of weights; ``copies.end_s`` is when the one under way is complete.
    """

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
        start_s: float = 0.0,
        token_of: Callable[[int, int], int] | None = None,
        on_token: Callable[[int, int | None, bool], None] | None = None,
    ) -> None:
        """Build an idle replica.

        Args:
            start_s: time at which it starts.
            token_of: makes tokens, as in ``PricingExecutor``. on_token: gets them, as in ``Replica``.
        """
        clock = SimulatedClock(start_s)
        self.copies = PricedWeights(host_to_device_bytes_per_s, clock, copy_layer_s)
        self.latency = latency
        super().__init__(
            model=model,
            config=config,
            plan=plan,
            budget=budget_bytes,
            executor=PricingExecutor(
                latency, copy_slowdown, host_to_device_bytes_per_s, slowdown, token_of, model, copy_layer_s
            ),
            weights=self.copies,
            clock=clock,
            workspace_bytes=workspace_bytes,
            quality_nll=quality_nll,
            check_bits=latency.check_bits,
            start_s=start_s,
            on_token=on_token,
        )

    @property
    def next_event_s(self) -> float:
        """When ``run_until`` next has something to do without another call; ``inf`` for never."""
        if self._under_way is not None:
            return self._under_way.ran.end_s
        if not self._idle:
            return self._time_s
        return min(self._next_event_s(), self.copies.end_s)
