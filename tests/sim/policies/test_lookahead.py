"""Look-ahead: its trials use only what a server can observe, and its choices are good."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import replace
from typing import Any

import hydra
import numpy as np
import pytest
from omegaconf import DictConfig, OmegaConf

from sim.config import CONF_DIR
from sim.cost.plan import Plan
from sim.engine.protocol import EngineState, Request
from sim.engine.server_spec import ServerSpec
from sim.errors import ConfigError
from sim.policies.base import PolicyContext
from sim.policies.lookahead import Lookahead, lookahead
from sim.replay.run import build_parts, server_spec
from tests.sim.serving import TINY

ACTIONS: dict[str, Any] = {
    "order": ["MHA25", "MHA27", "MHA24", "MHA23"],
    "drops": [0, 4],
    "low_layers": [0, 32],
    "admits": [None, 4],
    "dwell_s": 4.0,
}
BUDGET_BYTES = int(30e9)


def configuration(*overrides: str) -> DictConfig:
    with hydra.initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        return hydra.compose("replay", overrides=["latency=llama2_7b_a100_trtllm", *overrides])


@pytest.fixture(scope="module")
def server() -> ServerSpec:
    cfg = configuration()
    return server_spec(cfg)


def policy_on(server: ServerSpec, **changed: Any) -> Lookahead:
    served = PolicyContext.of(server)
    return lookahead(served, actions=ACTIONS, **changed)


def arrivals(rate_rps: float, seconds: float, output_tokens: int = 300) -> list[Request]:
    return [
        Request(request_id=i, arrival_s=i / rate_rps, prompt_tokens=1000, output_tokens=output_tokens)
        for i in range(int(rate_rps * seconds))
    ]


def decided(
    server: ServerSpec, requests: list[Request], ticks: int, policy: Lookahead | None = None
) -> tuple[list[EngineState], list[Plan]]:
    policy = policy or policy_on(server)
    engine = server.build_engine(policy.first_plan, BUDGET_BYTES)
    engine.submit(requests)
    states, plans = [], []
    for tick in range(1, ticks + 1):
        states.append(engine.run_until(float(tick)))
        plans.append(policy(states[-1]))
        engine.apply(plans[-1])
    return states, plans


def test_law_7_it_decides_alike_where_output_lengths_differ_that_have_not_been_observed_yet(server: ServerSpec) -> None:
    short, long = (arrivals(12.0, 30.0, output_tokens) for output_tokens in (400, 2000))
    (seen, ours), (others, theirs) = (decided(server, requests, 20) for requests in (short, long))
    equal = [a.finished == b.finished == 0 for a, b in zip(seen, others, strict=True)]
    alike = equal.index(False) if False in equal else len(equal)
    assert alike >= 5
    assert ours[:alike] == theirs[:alike]
    assert ours[alike - 1] != policy_on(server).first_plan  # and it did decide something


def test_it_decides_alike_where_arrivals_differ_that_have_not_come_yet(server: ServerSpec) -> None:
    calm = arrivals(8.0, 12.0)
    rush = [replace(r, request_id=len(calm) + r.request_id, arrival_s=12.0 + r.arrival_s) for r in arrivals(40.0, 5.0)]
    _, ours = decided(server, calm, 12)
    _, theirs = decided(server, calm + rush, 12)
    assert ours == theirs


def test_trying_plans_leaves_no_trace_in_the_next_decision(server: ServerSpec) -> None:
    states, _ = decided(server, arrivals(12.0, 30.0), 20)
    policy = policy_on(server)
    for state in states[:10]:
        policy._remember(state)
    legal = policy.actions.legal(states[9], policy.choice)
    first = policy.values(states[9], legal)
    policy.values(states[3], legal)
    np.testing.assert_array_equal(policy.values(states[9], legal), first)


def test_with_nothing_to_do_it_stays_dense_and_expects_nothing(server: ServerSpec) -> None:
    policy = policy_on(server)
    states, plans = decided(server, [], 3, policy)
    assert set(plans) == {policy.first_plan}
    legal = policy.actions.legal(states[-1], policy.choice)
    assert (policy.values(states[-1], legal)[legal] == 0.0).all()


def test_what_it_expects_of_steady_arrivals_is_about_what_happens(server: ServerSpec) -> None:
    policy = policy_on(server, factors=[1.0])
    engine = server.build_engine(policy.first_plan, BUDGET_BYTES)
    engine.submit(arrivals(4.0, 60.0, 100))
    for tick in range(1, 31):
        policy._remember(state := engine.run_until(float(tick)))
    expected = policy.values(state, policy.actions.legal(state, policy.choice))[0]
    came = state.running + 4.0 * policy.horizon_s  # and at this rate everyone is served in time
    assert expected == pytest.approx(came, abs=3.0)


def test_memory_that_shrinks_below_what_is_held_counts_in_the_trial(server: ServerSpec) -> None:
    policy = policy_on(server, factors=[1.0])
    states, _ = decided(server, arrivals(3.0, 60.0, 400), 20, policy)
    assert states[-1].running_tokens > 10_000
    legal = np.ones(len(policy.actions.plans), dtype=np.bool_)
    expected = [
        policy.values(replace(states[-1], budget_bytes=budget, next_budget_bytes=budget), legal)[0]
        for budget in (BUDGET_BYTES, int(15.5e9), 10**9)
    ]
    assert expected[0] > expected[1] + 5.0 > expected[2]


def test_it_limits_the_queue_when_more_comes_than_can_be_served(server: ServerSpec) -> None:
    _, plans = decided(server, arrivals(30.0, 30.0), 25)
    assert any(plan.max_waiting == 4 for plan in plans)


def test_it_limits_what_runs_only_for_a_target_of_the_time_per_token(server: ServerSpec) -> None:
    # All prompts fit the memory and start at once, but many running requests slow each other down.
    actions = {"order": [], "runs": [None, 24], "dwell_s": 4.0}
    limits = []
    for tpot_s in (None, 0.03):
        policy = lookahead(PolicyContext.of(server), actions=actions, tpot_s=tpot_s)
        engine = server.build_engine(policy.first_plan, int(70e9))
        engine.submit(arrivals(4.0, 40.0, output_tokens=600))
        for tick in range(1, 40):
            plan = policy(engine.run_until(float(tick)))
            engine.apply(plan)
        limits.append(plan.max_running)
    assert limits == [None, 24]


def test_it_leaves_a_plan_at_once_that_no_longer_fits(server: ServerSpec) -> None:
    policy = policy_on(server)
    states, _ = decided(server, arrivals(2.0, 10.0), 5, policy)
    smaller = min(policy.actions.weights_bytes) + server.workspace_bytes + 10**9
    plan = policy(dataclasses.replace(states[-1], time_s=6.0, budget_bytes=smaller, next_budget_bytes=smaller))
    assert policy.actions.weights_bytes[policy.actions.plans.index(plan)] + server.workspace_bytes <= smaller


def test_the_conf_file_builds_it_for_a_replay() -> None:
    policy = build_parts(configuration("policy=lookahead")).policy
    assert isinstance(policy, Lookahead)
    assert policy.actions.names[0] == "drop 0, W4 0, queue any"
    greedy = OmegaConf.load(CONF_DIR / "policy" / "greedy_stop.yaml")
    configured = OmegaConf.load(CONF_DIR / "policy" / "lookahead.yaml")
    assert list(greedy.order)[: len(configured.actions.order)] == list(configured.actions.order)


def test_without_a_model_of_the_server_or_with_numbers_out_of_range_it_says_so(server: ServerSpec) -> None:
    with pytest.raises(ConfigError, match="model of the server"):
        lookahead(PolicyContext(model=TINY), actions={})
    for wrong in (
        {"horizon_s": 0.0},
        {"horizon_s": math.nan},  # a trial that never ends
        {"horizon_s": math.inf},
        {"margin": -1.0},
        {"margin": math.nan},
        {"factors": []},
        {"factors": [0.0]},
        {"factors": [math.nan]},
        {"grace_s": "long"},
    ):
        with pytest.raises(ConfigError, match=r"policy\.horizon_s"):
            policy_on(server, **wrong)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"policy\.tpot_s is 0\.0; it must be above 0"):
        policy_on(server, tpot_s=0.0)
