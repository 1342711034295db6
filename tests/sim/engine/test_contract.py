"""The contract of engines, run on the plain and the compiled engine."""

from __future__ import annotations

from typing import Any

from sim.cost.latency import LatencyModel
from sim.cost.model_spec import ModelSpec
from sim.cost.plan import Plan
from sim.engine.budget import Budget
from sim.engine.protocol import EngineConfig
from sim.engine.sim_engine import SimEngine
from tests.contract import BASE_S, COPY_BYTES_PER_S, TOKEN_S, EngineContract
from tests.sim.engine.plain_engine import PlainEngine
from tests.sim.serving import TINY, linear_latency


class SimulatedContract(EngineContract):
    """Both simulated engines are built with the same arguments."""

    kind: type[Any]

    @property
    def spec(self) -> ModelSpec:
        return TINY

    @property
    def latency(self) -> LatencyModel:
        return linear_latency(base_s=BASE_S, token_s=TOKEN_S)

    def make(self, *, config: EngineConfig, plan: Plan, budget: Budget) -> Any:
        return self.kind(
            model=TINY,
            latency=self.latency,
            config=config,
            plan=plan,
            budget_bytes=budget,
            host_to_device_bytes_per_s=COPY_BYTES_PER_S,
        )


class TestPlainEngine(SimulatedContract):
    kind = PlainEngine


class TestSimEngine(SimulatedContract):
    kind = SimEngine
