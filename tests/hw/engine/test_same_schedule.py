"""Law 8: the real engine admits, preempts, swaps and finishes requests as the simulator does."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from hw.engine.hw_engine import HwEngine
from sim.cost.memory import budget_for_kv_blocks
from sim.cost.model_spec import ModelSpec
from sim.cost.plan import Plan, dense_plan
from sim.engine.budget import Budget
from sim.engine.protocol import EngineConfig
from sim.engine.sim_engine import SimEngine
from sim.policies import Fixed, PolicyContext
from sim.policies.greedy_stop import greedy_stop
from sim.replay.loop import replay
from sim.results.metrics import Slo, iterations_frame, records_frame, transitions_frame
from tests.hw import serving
from tests.hw.engine.runs import RESTORES, moving_budget, plan_schedule, some_rows, trace_of
from tests.hw.serving import HOST_TO_DEVICE_BYTES_PER_S, engine_config, flat_latency, hw_engine, tiny_spec
from tests.hw.tiny_models import few_channels  # noqa: F401 - a fixture
from tests.sample import examples


def sim_engine(
    config: EngineConfig,
    budget: Budget | int,
    link_bytes_per_s: float = HOST_TO_DEVICE_BYTES_PER_S,
    *,
    model: ModelSpec | None = None,
    plan: Plan | None = None,
) -> SimEngine:
    model = model or tiny_spec()
    return SimEngine(
        model=model,
        latency=flat_latency(),
        config=config,
        plan=plan or dense_plan(model),
        budget_bytes=budget,
        host_to_device_bytes_per_s=link_bytes_per_s,
    )


def assert_same_replay(found: HwEngine, expected: SimEngine) -> None:
    slo = Slo(ttft_s=5.0)
    pd.testing.assert_frame_equal(records_frame(found.records(), slo), records_frame(expected.records(), slo))
    columns = [c for c in iterations_frame(expected.iterations()).columns if c != "extrapolated"]
    pd.testing.assert_frame_equal(
        iterations_frame(found.iterations())[columns], iterations_frame(expected.iterations())[columns]
    )
    pd.testing.assert_frame_equal(transitions_frame(found.transitions()), transitions_frame(expected.transitions()))
    np.testing.assert_allclose(found.kept_share(), expected.kept_share(), rtol=1e-6)
    # A swap takes no time on the clock of these tests, and some 1e-11 s on the fast link of the simulator.
    assert found.budget_violation_s == pytest.approx(expected.budget_violation_s, abs=1e-9)


@given(
    seed=st.integers(0, 10_000),
    scheduler=st.sampled_from(["chunked", "prefill_first"]),
    restore=st.sampled_from(["new_requests", "recompute"]),
    kv_blocks=st.sampled_from([15, 24, 60]),
    reuse=st.booleans(),
    watermark=st.sampled_from([0.0, 0.05]),
    policy=st.sampled_from(["schedule", "greedy"]),
    budget_moves=st.booleans(),
    order=st.sampled_from(["fcfs", "value"]),
)
@examples(10)
def test_both_engines_admit_preempt_and_finish_alike_for_the_same_decisions(
    seed: int,
    scheduler: str,
    restore: str,
    kv_blocks: int,
    reuse: bool,
    watermark: float,
    policy: str,
    budget_moves: bool,
    order: str,
) -> None:
    """Law 8: who is admitted when, preempted when and finished when, iteration by iteration."""
    config = engine_config(
        scheduler, restore=restore, reuse_preempted_kv=reuse, kv_watermark_share=watermark, admission_order=order
    )
    spec, rows = tiny_spec(), some_rows(seed, 10)
    budget = (
        moving_budget(seed, kv_blocks)
        if budget_moves
        else budget_for_kv_blocks(spec, dense_plan(spec), kv_blocks, 0, 4)
    )

    def make_policy() -> Any:
        if policy == "schedule":
            return plan_schedule(seed, 8, bits=True, kv=True)
        return greedy_stop(
            PolicyContext(model=spec, kv_block_tokens=4), order=["FFN2", "MHA1", "FFN1", "MHA2"], patience=2
        )

    engines = []
    for engine in (
        hw_engine(config=config, budget=budget if budget_moves else None, kv_blocks=kv_blocks),
        sim_engine(config, budget),
    ):
        replay(trace_of(rows), engine, make_policy(), tick_s=0.7, also_at_s=engine.budget.change_s[1:])
        engines.append(engine)
    assert_same_replay(*engines)


@pytest.mark.parametrize("restore", RESTORES)
@pytest.mark.parametrize("seed", range(4))
def test_both_engines_admit_alike_while_layers_are_streamed(
    seed: int, restore: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Law 8 with streamed layers, which take no time on the clock of these tests."""
    monkeypatch.setattr(serving, "HOST_TO_DEVICE_BYTES_PER_S", 1e12)
    config, spec = engine_config(restore=restore), tiny_spec()
    budget = budget_for_kv_blocks(spec, dense_plan(spec), 20, 0, 4)
    engines = hw_engine(config=config, kv_blocks=20), sim_engine(config, budget, link_bytes_per_s=1e12)
    for engine in engines:
        policy = plan_schedule(seed, 8, bits=seed % 2 == 0, streams=True, writes=seed > 1)
        assert any(any(plan.streamed) for plan in policy.plans)
        replay(trace_of(some_rows(seed, 12)), engine, policy, tick_s=0.7)
    assert_same_replay(*engines)


@pytest.mark.usefixtures("few_channels")
@pytest.mark.parametrize("restore", RESTORES)
@pytest.mark.parametrize("seed", range(4))
def test_both_engines_admit_alike_while_ffn_blocks_are_cut(seed: int, restore: str) -> None:
    """Law 8 with FFN blocks at fewer channels, of which the tiny model has few; memory is as predicted throughout."""
    config, spec = engine_config(restore=restore), tiny_spec()
    budget = budget_for_kv_blocks(spec, dense_plan(spec), 20, 0, 4)
    real = hw_engine(config=config, kv_blocks=20, ordered=True)
    engines = real, sim_engine(config, budget)
    for engine in engines:
        policy = plan_schedule(seed, 8, bits=seed % 2 == 0, cuts=True)
        assert any(plan.cuts_ffn for plan in policy.plans)
        replay(trace_of(some_rows(seed, 12)), engine, policy, tick_s=0.7)
    assert_same_replay(*engines)
    assert all(row.predicted_bytes == row.allocated_bytes for row in real.memory_rows())
    real.check()


@given(
    seed=st.integers(0, 10_000),
    scheduler=st.sampled_from(["chunked", "prefill_first"]),
    kv_blocks=st.sampled_from([14, 18, 24]),
    host_kv_blocks=st.sampled_from([1, 4, 100]),
    budget_moves=st.booleans(),
)
@example(seed=2, scheduler="chunked", kv_blocks=18, host_kv_blocks=100, budget_moves=False)
@example(seed=2, scheduler="prefill_first", kv_blocks=18, host_kv_blocks=100, budget_moves=False)
@example(seed=6077, scheduler="chunked", kv_blocks=24, host_kv_blocks=100, budget_moves=True)  # swaps at a change
@examples(8)
def test_both_engines_swap_alike(
    seed: int, scheduler: str, kv_blocks: int, host_kv_blocks: int, budget_moves: bool
) -> None:
    """Law 8 with KV that goes to the host and back, which takes no time on the clock of these tests."""
    config = engine_config(scheduler, preemption="swap", host_kv_blocks=host_kv_blocks)
    spec, rows = tiny_spec(), some_rows(seed, 10, longest_output=20)
    dense = dense_plan(spec)
    budget = moving_budget(seed, kv_blocks) if budget_moves else budget_for_kv_blocks(spec, dense, kv_blocks, 0, 4)
    engines = (
        hw_engine(config=config, budget=budget if isinstance(budget, Budget) else None, kv_blocks=kv_blocks),
        sim_engine(config, budget, link_bytes_per_s=1e15),
    )
    for engine in engines:
        replay(trace_of(rows), engine, Fixed(dense), also_at_s=engine.budget.change_s[1:])
    assert_same_replay(*engines)
    for engine in engines if host_kv_blocks == 100 else ():  # enough for every request
        assert engine.iterations().prefill_tokens.sum() == sum(prompt for _, prompt, _ in rows)
        assert engine.records().preemptions.sum() > 0 or seed != 2
