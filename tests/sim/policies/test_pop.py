"""POP as a policy: which layers it takes, and what a server gains by it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from sim.cost.latency import load_calibration
from sim.cost.model_spec import load_model
from sim.cost.plan import Plan, dense_plan
from sim.engine.protocol import EngineConfig
from sim.engine.sim_engine import SimEngine
from sim.errors import ConfigError
from sim.policies import PolicyContext
from sim.policies.pop import layer_order, pop

LLAMA = load_model("llama2_7b")


def served(name: str) -> PolicyContext:
    return PolicyContext(model=load_model(name))


def chosen(plan: Plan) -> list[int]:
    return [layer for layer, flag in enumerate(plan.kv_only) if flag]


def test_without_a_measured_order_it_takes_the_deepest_layers() -> None:
    assert chosen(pop(served("llama2_7b"), layers=3).first_plan) == [29, 30, 31]
    assert len(chosen(pop(served("llama2_7b")).first_plan)) == 11
    assert chosen(pop(served("llama2_7b"), layers=0).first_plan) == []
    plan = pop(served("llama2_7b"), layers=32).first_plan
    assert replace(plan, kv_only=()) == dense_plan(LLAMA)


def test_with_one_it_takes_those_that_prompts_need_least() -> None:
    model = load_model("smollm2_135m")
    order = layer_order(model, None)
    assert sorted(order) == list(range(30))
    assert order == layer_order(model, "measured")
    assert order[0] == 29  # no later layer reads what the last one adds to a prompt's tokens
    assert chosen(pop(served("smollm2_135m"), layers=4).first_plan) == sorted(order[:4])
    assert layer_order(model, "deepest") == list(range(30))[::-1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": 33}, "policy.layers is 33; llama2_7b has 32"),
        ({"layers": -1}, "policy.layers is -1"),
        ({"layers": 2.5}, "policy.layers is 2.5"),
        ({"order": "deep"}, "did you mean 'deepest'"),
        ({"order": "measured"}, r"was not; set policy\.order=deepest, or measure it"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        pop(served("llama2_7b"), **options)  # type: ignore[arg-type]


def first_tokens_s(plan: Plan, changed_s: float | None = None, then: Plan | None = None) -> list[float]:
    """Return the TTFT of prompts that come one after another, with a change of the plan on the way."""
    engine = SimEngine(
        model=LLAMA,
        latency=load_calibration("llama2_7b_a100"),
        config=EngineConfig(),
        plan=plan,
        budget_bytes=80_000_000_000,
        host_to_device_bytes_per_s=25e9,
    )
    engine.submit_arrays(np.arange(4.0), np.full(4, 1500), np.full(4, 2))
    if changed_s is not None and then is not None:
        engine.run_until(changed_s)
        engine.apply(then)
    engine.run_until(np.inf)
    return (engine.records().ttft_s).tolist()


def test_prompts_are_faster_from_the_next_iteration_on_and_slower_again_as_soon() -> None:
    dense, faster = dense_plan(LLAMA), pop(served("llama2_7b"), layers=10).first_plan
    slow_s, fast_s = first_tokens_s(dense)[0], first_tokens_s(faster)[0]
    assert fast_s < 0.8 * slow_s
    assert first_tokens_s(dense, 1.9, faster) == pytest.approx([slow_s, slow_s, fast_s, fast_s])
    assert first_tokens_s(faster, 1.9, dense) == pytest.approx([fast_s, fast_s, slow_s, slow_s])
