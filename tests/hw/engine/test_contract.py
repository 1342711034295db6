"""The contract of engines, kept by the real one: on a CPU, and on a GPU where there is one."""

from __future__ import annotations

from typing import Any

import pytest

from hw.elastic.model import ElasticModel
from hw.engine.hw_engine import HwEngine
from hw.engine.prompts import RandomPrompts
from sim.cost.latency import LatencyModel
from sim.cost.model_spec import ModelSpec
from sim.cost.plan import Plan
from sim.engine.budget import Budget
from sim.engine.protocol import EngineConfig
from tests.contract import BASE_S, COPY_BYTES_PER_S, TOKEN_S, EngineContract
from tests.hw.serving import (
    HOST_TO_DEVICE_BYTES_PER_S,
    VOCABULARY,
    PricedClock,
    TimedCopier,
    flat_latency,
    tiny,
    tiny_spec,
    torch,
)

assert HOST_TO_DEVICE_BYTES_PER_S == COPY_BYTES_PER_S


class TestHwEngine(EngineContract):
    """A tiny model that really computes, on a clock that advances by the prices of the contract."""

    device = "cpu"
    seeds = range(3)
    refuses_late = False  # on a wall clock every request arrived before it is submitted

    @property
    def spec(self) -> ModelSpec:
        return tiny_spec()

    @property
    def latency(self) -> LatencyModel:
        return flat_latency(BASE_S * 1e6, TOKEN_S * 1e6)

    def make(self, *, config: EngineConfig, plan: Plan, budget: Budget) -> Any:
        elastic = ElasticModel(tiny().to(self.device), name="tiny")
        clock = PricedClock(self.latency, plan)
        return HwEngine(
            elastic=elastic,
            config=config,
            plan=plan,
            budget_bytes=budget,
            prompts=RandomPrompts(VOCABULARY),
            clock=clock,
            copier=TimedCopier(elastic, clock),
        )

    def check(self, engine: Any, state: Any) -> None:
        super().check(engine, state)
        engine.check()  # and the memory behind the counts


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
class TestHwEngineOnCuda(TestHwEngine):
    device = "cuda"
