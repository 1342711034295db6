"""Engines that are stepped together leave the same records and states as on SimPy's clock."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from sim.cost.ffn_width import LEAST_CHANNELS
from sim.cost.plan import KV_KEEP_ALL
from sim.engine import batch_step
from sim.engine.batch_step import VectorEngines
from sim.engine.plan_graph import PlanGraph
from sim.engine.protocol import EngineState, Request
from sim.engine.sim_engine import SimEngine
from sim.errors import BudgetError, ConfigError
from tests.sample import quick
from tests.sim.engine.kernel_cases import Case, quality_nll, random_case, random_plan, unequal

TICK_S, TICKS = 2.5, 25


def build(case: Case, **words: Any) -> SimEngine:
    engine = SimEngine(
        model=case.model,
        latency=case.latency,
        config=case.config,
        plan=case.first_plan,
        budget_bytes=case.budget(),
        host_to_device_bytes_per_s=case.host_to_device_bytes_per_s,
        slowdown=case.slowdown,
        copy_slowdown=case.copy_slowdown,
        quality_nll=quality_nll,
        **words,
    )
    engine.submit(
        [
            Request(request_id=i, arrival_s=arrival_s, prompt_tokens=prompt, output_tokens=output)
            for i, (arrival_s, prompt, output) in enumerate(case.requests)
        ]
    )
    return engine


def assert_seen(row: Any, state: EngineState) -> None:
    for column, name in enumerate(
        name.lower() for name in vars(batch_step) if name.isupper() and name not in ("SEEN_COLUMNS",)
    ):
        assert row[column] == pytest.approx(getattr(state, name), rel=1e-12), name


@pytest.mark.parametrize("first", quick(range(0, 60, 4), 6))
@pytest.mark.parametrize("memory", [2, 16384])
def test_engines_stepped_together_serve_as_on_simpy(first: int, memory: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sim.engine.sim_engine.MEMORY_OF_PLANS", memory)
    rng = np.random.default_rng(first)
    cases, shared = [], random_case(first)
    plans = [random_plan(rng) for _ in range(5)]
    if not shared.gqa:
        plans[:3] = [replace(plan, kv_hidden=set(plan.kv_keep) == {KV_KEEP_ALL}) for plan in plans[:3]]
    cuts = shared.intermediate_size >= LEAST_CHANNELS
    if cuts:
        plans[2:] = [replace(plan, ffn_width=(5, 7, 8)) for plan in plans[2:]]
    for seed in range(first, first + 4):
        # They share a plan graph, which is that of one model.
        size = shared.intermediate_size
        case = replace(random_case(seed), tp=shared.tp, gqa=shared.gqa, intermediate_size=size)
        if shared.gqa:
            case = replace(case, first_plan=replace(case.first_plan, kv_hidden=False))
        if not cuts:
            case = replace(case, first_plan=replace(case.first_plan, ffn_width=()))
        try:
            build(case)
            cases.append(case)
        except BudgetError:
            continue
    together, alone = VectorEngines(len(cases), plans), [build(case) for case in cases]
    graph = PlanGraph(shared.model, quality_nll)
    for at, case in enumerate(cases):
        together.place(at, build(case, graph=graph, external_clock=True))
    wanted = np.full(len(cases), -1)
    for tick in range(1, TICKS + 1):
        until_s = np.full(len(cases), math.inf if tick == TICKS else tick * TICK_S)
        seen = together.step(wanted, until_s)
        for row, engine, time_s in zip(seen, alone, until_s.tolist(), strict=True):
            state = engine.run_until(time_s)
            if tick < TICKS:
                assert_seen(row, state)
        wanted = np.where(rng.random(len(cases)) < 0.3, rng.integers(0, len(plans), len(cases)), -1)
        for engine, plan in zip(alone, wanted.tolist(), strict=True):
            if plan >= 0 and tick < TICKS - 1:
                engine.apply(plans[plan])
        if tick >= TICKS - 1:
            wanted[:] = -1
    for at, engine in enumerate(alone):
        for name in ("records", "iterations", "transitions"):
            assert list(unequal(getattr(engine, name)(), getattr(together.engine(at), name)())) == [], name
    assert sum(len(engine.transitions()) for engine in alone) > 0


def test_an_empty_place_is_named() -> None:
    with pytest.raises(ConfigError, match="place 1 has no engine"):
        VectorEngines(2, []).engine(1)
