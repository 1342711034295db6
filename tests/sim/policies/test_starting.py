"""Another first plan for a policy, and why tight memory needs one."""

from __future__ import annotations

import math

import numpy as np
import pytest

from sim.config import build_option
from sim.cost.model_spec import load_model
from sim.cost.plan import dense_plan
from sim.engine.server_spec import ServerSpec, named_calibration
from sim.errors import PlanError
from sim.policies.base import PolicyContext
from sim.policies.fixed import static_plan
from sim.policies.starting import starting
from sim.results.records import Status

MODEL = load_model("llama2_7b")
SERVER = ServerSpec(
    model=MODEL,
    gpu=build_option("gpu", "a100_80gb"),
    config=build_option("engine", "vllm_v1"),
    workspace_bytes=int(1.24e9),
    latency=named_calibration("llama2_7b_a100_trtllm"),
)
CONTEXT = PolicyContext.of(SERVER)


def test_the_first_plan_runs_first_and_then_the_other_policy_decides() -> None:
    policy = starting(CONTEXT, policy="dense", weight_bits=4, drop_mha=[25])
    assert policy.first_plan == static_plan(MODEL, weight_bits=4, drop_mha=[25])
    assert policy.plans == (policy.first_plan, dense_plan(MODEL))  # the real engine keeps copies for both
    engine = SERVER.build_engine(policy.first_plan, int(40e9))
    assert policy(engine.run_until(1.0)) == dense_plan(MODEL)


def test_a_plan_that_is_not_legal_is_refused() -> None:
    with pytest.raises(PlanError, match="MHA32 does not exist"):
        starting(CONTEXT, policy="dense", drop_mha=[32])


@pytest.mark.parametrize("start_bits", [16, 4])
def test_an_engine_that_starts_with_full_weights_refuses_long_prompts_after_they_would_fit(start_bits: int) -> None:
    low = static_plan(MODEL, weight_bits=4, max_wait_s=1.5)
    engine = SERVER.build_engine(static_plan(MODEL, weight_bits=start_bits), int(16e9))
    engine.submit_arrays(np.array([10.0, 20.0]), np.array([3072, 200]), np.array([50, 50]))
    engine.run_until(1.0)
    engine.apply(low)
    engine.run_until(math.inf)
    wanted = [Status.REJECTED, Status.FINISHED] if start_bits == 16 else [Status.FINISHED, Status.FINISHED]
    assert list(engine.records().status) == wanted
