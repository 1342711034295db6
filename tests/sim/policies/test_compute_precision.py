"""Precision of products by load and by the age of requests: when it falls, when it rises, and what is refused."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf

from sim.config import CONF_DIR
from sim.cost.model_spec import load_model
from sim.cost.plan import Plan, dense_plan
from sim.engine.protocol import EngineState
from sim.engine.server_spec import ServerSpec
from sim.errors import ConfigError, PlanError
from sim.policies import PolicyContext
from sim.policies.compute_precision import ComputePrecision, Pmpd, compute_precision, pmpd
from sim.replay.loop import replay
from sim.traces.generate import poisson
from tests.sim.serving import TINY, tiny_engine

SERVED = PolicyContext(model=TINY)
STATE = tiny_engine().run_until(0.0)


def after(iterations: int, mean_s: float, before: EngineState = STATE, **changed: Any) -> EngineState:
    """Return the state after more iterations of this length."""
    return dataclasses.replace(
        before, iterations=before.iterations + iterations, busy_s=before.busy_s + iterations * mean_s, **changed
    )


def lowered(plan: Plan) -> int:
    """Return how many layers compute below their resident bits."""
    return sum(plan.nested)


def test_bits_fall_when_iterations_take_too_long_and_rise_when_they_are_well_in_time() -> None:
    policy = compute_precision(SERVED, tpot_s=0.1, wait_s=1.0, calm=0.5)
    assert policy.first_plan == dense_plan(TINY)
    state, seen = STATE, []
    for mean_s in (0.09, 0.11, 0.08, 0.051, 0.049, 0.2):
        state = after(10, mean_s, state)
        seen.append(lowered(policy(state)))
    assert seen == [0, 3, 3, 3, 0, 3]
    assert policy(state).compute_bits is None  # no iteration since, nothing waits


def test_a_long_wait_counts_like_a_long_iteration() -> None:
    policy = compute_precision(SERVED, tpot_s=0.1, wait_s=1.0, calm=0.5)
    waits_s = (0.9, 1.1, 0.6, 0.4)
    assert [lowered(policy(dataclasses.replace(STATE, oldest_wait_s=wait_s))) for wait_s in waits_s] == [0, 3, 3, 0]


def test_steps_lower_ever_more_layers_front_to_back_and_keep_the_resident_bits() -> None:
    policy = compute_precision(SERVED, weight_bits=8, levels=3, tpot_s=0.1)
    state, plans = STATE, []
    for mean_s in (0.2, 0.2, 0.2, 0.2, 0.01):
        state = after(1, mean_s, state)
        plans.append(policy(state))
    assert [plan.product_bits for plan in plans] == [(4, 8, 8), (4, 4, 8), (4, 4, 4), (4, 4, 4), (4, 4, 8)]
    assert {plan.weight_bits for plan in plans} == {(8, 8, 8)}


def test_bits_fall_once_few_running_requests_are_young() -> None:
    policy = pmpd(SERVED, high_tokens=10, most_young=0.25)
    state, seen = STATE, []
    # Iterations and first tokens so far, of eight running requests.
    for iterations, first_tokens in ((2, 8), (6, 8), (11, 8), (14, 8), (20, 10), (21, 11), (30, 11), (33, 11)):
        state = dataclasses.replace(STATE, iterations=iterations, first_tokens=first_tokens, running=8)
        seen.append(lowered(policy(state)) > 0)
    # Young since iteration 4, 10, 11, 20 and 23 are 0, 2, 3, 0 and 0 of eight, counted from the decision before that.
    assert seen == [False, False, False, True, True, False, True, True]
    assert policy(dataclasses.replace(state, running=0)).compute_bits is None


def test_no_high_tokens_are_all_low_bits_and_a_share_of_one_too() -> None:
    busy = dataclasses.replace(STATE, iterations=5, first_tokens=4, running=4)
    assert lowered(pmpd(SERVED, high_tokens=0)(busy)) == 3
    assert lowered(pmpd(SERVED, most_young=1.0)(busy)) == 3


@pytest.mark.parametrize(
    ("build", "wrong", "message"),
    [
        (compute_precision, {"levels": 0}, r"policy\.levels is 0"),
        (compute_precision, {"tpot_s": 0.0}, r"policy\.tpot_s is 0\.0"),
        (compute_precision, {"calm": 1.0}, r"calm 1\.0"),
        (pmpd, {"high_tokens": -1}, r"policy\.high_tokens is -1"),
        (pmpd, {"most_young": 1.5}, r"most_young 1\.5"),
    ],
)
def test_numbers_out_of_range_are_refused(build: Any, wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(SERVED, **wrong)


def test_weights_of_4_bits_have_no_half() -> None:
    for build in (compute_precision, pmpd):
        with pytest.raises(PlanError, match=r"compute_bits of layer 0 is 2; allowed are 16, 8 and 4"):
            build(SERVED, weight_bits=4)


NAMED = {"nestedfp": ComputePrecision, "flexquant": ComputePrecision, "pmpd": Pmpd}


@pytest.mark.parametrize("name", sorted(NAMED))
def test_every_file_builds_its_policy(name: str) -> None:
    node = OmegaConf.load(CONF_DIR / "policy" / f"{name}.yaml")
    policy = instantiate(node, _convert_="all")(PolicyContext(model=load_model("llama2_7b")))
    assert type(policy) is NAMED[name]
    assert set(policy.first_plan.weight_bits) == {16 if name == "nestedfp" else 8}


def test_under_load_lower_bits_shorten_the_wait_and_copy_nothing() -> None:
    trace = poisson(rate_rps=35.0, duration_s=60.0, seed=3)
    server = ServerSpec.from_names(model="llama3.1_8b", gpu="h100_80gb")
    means = []
    for policy in (compute_precision(PolicyContext.of(server), tpot_s=0.03), None):
        plan = dense_plan(server.model)
        engine = server.build_engine(plan, 70 * 10**9)
        if policy is None:
            engine.submit_arrays(trace.arrival_s, trace.prompt_tokens, trace.output_tokens)
            engine.run_until(1e9)
        else:
            replay(trace, engine, policy, tick_s=0.5)
            changes = engine.transitions()
            assert len(changes.time_s) > 0
            assert not changes.bytes_in.any()
            assert not changes.preempted.any()
        records = engine.records()
        means.append(float((records.first_token_s - records.arrival_s).mean()))
    assert means[0] < means[1]


def test_the_overhead_of_nested_weights_lengthens_products_at_full_bits_alone() -> None:
    one = ServerSpec.from_names(model="llama3.1_8b", gpu="h100_80gb")
    other = ServerSpec.from_parts(one.model, one.gpu, one.config, nested_overhead=0.039)
    for kind in ("mha", "ffn"):
        plain, nested = one.priced(), other.priced()
        assert nested.linear_s(kind, 16, 100) == pytest.approx(1.039 * plain.linear_s(kind, 16, 100), rel=1e-12)
        assert nested.linear_s(kind, 8, 100) == plain.linear_s(kind, 8, 100)
        assert nested.token_s(100) == plain.token_s(100)
