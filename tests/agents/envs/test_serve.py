"""ServeTrace: rewards, observation, legal actions, and that its splits do not overlap in time."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agents.baselines.serve import conf_policy
from agents.envs.reward import ServeReward
from agents.envs.serve import DEFAULT_ACTIONS, ServeSetting, ServeTrace
from agents.envs.serve_vector import ServeTraceVector
from agents.envs.serve_windows import Window, serve_windows, source_trace
from agents.evaluation.tuning import mean_utility
from agents.training.validation import validation_windows
from sim.cost.kv_format import token_kv_bytes
from sim.cost.memory import kv_block_layer_bytes
from sim.cost.model_spec import load_model
from sim.cost.plan import dense_plan
from sim.engine.protocol import EngineState
from sim.engine.sim_engine import SimEngine
from sim.errors import ConfigError
from sim.policies.admission import Limited, PaceLimit
from sim.policies.base import PolicyContext
from sim.policies.learned_serve import learned_serve, own_plan
from sim.policies.observation.serve import Choice, ServeObserver, serve_actions
from sim.results.metrics import met_slo
from tests.agents.helpers import check_environment, write_linear_policy

WINDOW = Window(source="burst", start_s=300.0, rate=1.0, budget="cotenant", budget_seed=4)


def test_both_environments_are_registered_and_pass_the_check_of_gymnasium() -> None:
    check_environment("ServeTrace-v0", 2)


def test_the_vector_environment_equals_the_plain_one_at_every_step() -> None:
    envs = [ServeTrace() for _ in range(2)]
    vector = ServeTraceVector(2)
    rng = np.random.default_rng(3)
    plain = np.stack([env.reset(seed=20 + i)[0] for i, env in enumerate(envs)])
    fast, _ = vector.reset(seed=20)
    actions, ended = np.zeros(2, dtype=np.int64), 0
    for _ in range(vector.setting.ticks + 5):
        np.testing.assert_allclose(fast, plain, rtol=1e-6, atol=1e-7)
        actions = np.where(rng.random(2) < 0.2, rng.integers(vector.setting.action_space.n, size=2), actions)
        fast, reward, terminated, _, infos = vector.step(actions)
        rows = []
        for i, env in enumerate(envs):
            if ended == 1:
                rows.append(env.reset()[0])
                continue
            observation, plain_reward, end, _, info = env.step(actions[i])
            rows.append(observation)
            assert reward[i] == pytest.approx(plain_reward, rel=1e-9, abs=1e-9)
            assert end == terminated[i]
            if end:
                assert infos["utility"][i] == pytest.approx(info["utility"], rel=1e-12)
        ended = 2 if ended == 1 else ended + int(terminated.all())
        plain = np.stack(rows)
    assert ended == 2


@pytest.mark.parametrize("reward", [{"kind": "earned"}, {"kind": "lost"}, {"kind": "lost", "late_weight": 3.0}])
def test_the_rewards_of_an_episode_add_up_to_its_utility(reward: dict[str, Any]) -> None:
    env = ServeTrace(reward=reward)
    env.reset(options={"window": WINDOW})
    total, over, rng = 0.0, False, np.random.default_rng(0)
    while not over:
        _, reward_of_tick, over, _, info = env.step(rng.integers(env.action_space.n) if rng.random() < 0.1 else 5)
        total += reward_of_tick
    constant = 1.0 if reward["kind"] == "lost" else 0.0
    assert total / env.setting.reward.scale == pytest.approx(info["utility"] - constant, abs=1e-9)
    records = env.core.engine.records()
    assert len(records) == info["requests"]
    kept = np.exp(-np.maximum(records.quality_nll - env.setting.dense_nll, 0.0))
    expected = np.where(met_slo(records, env.setting.slo), kept, 0.0).mean()
    assert info["utility"] == pytest.approx(expected)
    assert 0.0 < expected < 1.0


def test_rejecting_pruning_and_late_requests_each_cost_utility() -> None:
    def utility(action: int, window: Window) -> float:
        env = ServeTrace(actions=actions)
        env.reset(options={"window": window})
        over = False
        while not over:
            *_, over, _, info = env.step(action)
        return float(info["utility"])

    actions = {**DEFAULT_ACTIONS, "waits": [None, 1.5], "runs": [None]}
    names = ServeTrace(actions=actions).setting.actions.names
    quiet, busy = replace(WINDOW, rate=0.4, budget="full"), replace(WINDOW, rate=1.3)
    dense, pruned = names.index("drop 0, W4 0, queue any"), names.index("drop 10, W4 0, queue any")
    limited = names.index("drop 0, W4 0, queue any, wait 1.5 s")
    assert utility(dense, quiet) > utility(pruned, quiet) + 0.05
    assert utility(dense, quiet) >= utility(limited, quiet)
    # Under overload, a server without a wait limit misses the target of nearly every request.
    assert utility(limited, busy) > utility(dense, busy) + 0.05


def test_a_plan_whose_weights_do_not_fit_is_illegal_and_the_smallest_plan_is_always_legal() -> None:
    setting = ServeSetting()
    state = SimEngine(
        model=setting.model,
        latency=setting.latency,
        config=setting.engine,
        plan=dense_plan(setting.model),
        budget_bytes=int(40e9),
    ).run_until(0.0)
    weights = np.array(setting.actions.weights_bytes)
    between = int(np.median(weights)) + setting.workspace_bytes
    legal = setting.actions.legal(replace(state, budget_bytes=between), Choice())
    np.testing.assert_array_equal(legal, weights + setting.workspace_bytes <= between)
    assert 0 < legal.sum() < len(legal)
    none = setting.actions.legal(replace(state, budget_bytes=1), Choice())
    np.testing.assert_array_equal(none, weights == weights.min())


def test_changed_weights_stay_for_the_dwell_time_and_the_wait_limit_may_change() -> None:
    env = ServeTrace()
    setting = env.setting
    names = setting.actions.names
    env.reset(options={"window": replace(WINDOW, budget="full")})
    low, limited = (names.index(f"drop 2, W4 32, queue any, wait {wait:g} s") for wait in (1.0, 1.5))
    observation, *_ = env.step(low)
    flags = {name: flag > 0.5 for name, flag in zip(names, observation[-len(names) :], strict=True)}
    assert {name for name, flag in flags.items() if flag} == {name for name in names if "drop 2, W4 32" in name}
    env.step(limited)
    assert env.core.choice.action == limited
    env.step(0)
    assert env.core.illegal == 1
    for _ in range(int(setting.actions.dwell_s)):
        env.step(limited)
    env.step(0)
    assert env.core.choice.action == 0
    tight = replace(env.core.state, budget_bytes=setting.workspace_bytes + min(setting.actions.weights_bytes))
    left = setting.actions.legal(tight, env.core.choice)
    assert left.any()  # a plan that no longer fits may be left before the dwell time ends
    assert not left[0]


def test_an_illegal_action_keeps_the_plan_and_is_counted() -> None:
    env = ServeTrace()
    env.reset(options={"window": WINDOW})
    env.core.state = replace(env.core.state, budget_bytes=1)
    env.step(1)
    assert env.core.choice.action == env.setting.actions.start
    assert env.core.illegal == 1


@pytest.mark.parametrize("low_bits", [True, False])
def test_a_server_starts_with_little_weight_in_both_environments(low_bits: bool) -> None:
    window = replace(WINDOW, low_bits=low_bits, high_share=1.2, low_share=1.2)
    env, vector = ServeTrace(), ServeTraceVector(1)
    observation, info = env.reset(options={"window": window})
    observations, _ = vector.reset(seed=0, options={"windows": [window]})
    np.testing.assert_allclose(observations[0], observation, atol=1e-6)
    started = info["actions"][env.core.choice.action]
    assert started.startswith("drop 0, W4 32" if low_bits else "drop 6, W4 0")
    weights = env.setting.actions.weights_bytes
    assert env.core.state.weight_bytes == weights[env.core.choice.action] < weights[0]


def test_a_bound_of_the_pace_lowers_what_runs_and_nothing_else(tmp_path: Path) -> None:
    setting = ServeSetting(slo="ttft_2s_tpot_100ms")
    features, outputs = setting.table.features, len(setting.actions.plans)
    weight, bias = np.zeros((outputs, features), dtype=np.float32), np.zeros(outputs, dtype=np.float32)
    bias[setting.actions.start] = 1.0  # it always chooses the start, which does not limit what runs
    path, about = write_linear_policy(tmp_path, "ServeTrace", setting, weight, bias)
    context = PolicyContext.of(setting.server)
    crowded = replace(WINDOW, source="gamma", rate=3.0, budget="full")
    most_running: dict[float | None, int | None] = {}
    pace_s: dict[float | None, float] = {}
    for share in (None, 0.5):
        path.write_text(json.dumps(about if share is None else {**about, "pace_share": share}))
        policy = learned_serve(context, path=str(path))
        engine = setting.build_engine(crowded, policy.first_plan)
        plans = []
        for tick in range(1, 60):
            plans.append(policy(engine.run_until(tick * setting.tick_s)))
            engine.apply(plans[-1])
        start = setting.actions.plans[setting.actions.start]
        assert all(replace(plan, max_running=None) == start for plan in plans)
        most_running[share] = min((plan.max_running for plan in plans if plan.max_running is not None), default=None)
        state = engine.run_until(60.0)
        pace_s[share] = state.busy_s / state.iterations
    assert most_running[None] is None
    assert most_running[0.5] is not None
    assert pace_s[0.5] < pace_s[None]
    path.write_text(json.dumps({**about, "pace_share": 0.0}))
    with pytest.raises(ConfigError, match=r"pace_share is 0\.0; it must be a share of the TPOT target, above 0"):
        learned_serve(context, path=str(path))


def a_second_later(state: EngineState, running: int, iteration_s: float) -> EngineState:
    """Return the state after a second with ten iterations of this length."""
    return replace(
        state,
        time_s=state.time_s + 1.0,
        running=running,
        iterations=state.iterations + 10,
        busy_s=state.busy_s + 10 * iteration_s,
    )


def test_a_limit_by_the_pace_replaces_that_of_the_network_once_the_pace_is_known(tmp_path: Path) -> None:
    setting = ServeSetting(slo="ttft_2s_tpot_100ms")
    features, outputs = setting.table.features, len(setting.actions.plans)
    weight, bias = np.zeros((outputs, features), dtype=np.float32), np.zeros(outputs, dtype=np.float32)
    few = next(at for at, plan in enumerate(setting.actions.plans) if plan.max_running == 16)
    bias[few] = 1.0
    path, about = write_linear_policy(tmp_path, "ServeTrace", setting, weight, bias)
    path.write_text(json.dumps({**about, "run_share": 0.5}))  # iterations of 50 ms
    policy = learned_serve(PolicyContext.of(setting.server), path=str(path))
    seen = replace(setting.build_engine(WINDOW, policy.first_plan).run_until(0.0), time_s=1.0, running=10)

    def limit(running: int, iteration_s: float) -> int | None:
        nonlocal seen
        seen = a_second_later(seen, running, iteration_s)
        plan = policy(seen)
        assert replace(plan, max_running=16) == setting.actions.plans[few]
        return plan.max_running

    assert policy(seen) == setting.actions.plans[few]  # nothing is measured yet
    assert limit(10, 0.026) == 19  # one point shows no line: 10 x 50 / 26 in proportion
    assert limit(30, 0.0355) == 35  # a line through (10, 26 ms) and (20, 35.5 ms)
    path.write_text(json.dumps({**about, "run_share": 0.5, "pace_share": 0.5}))
    with pytest.raises(ConfigError, match="pace_share and run_share both limit what runs"):
        learned_serve(PolicyContext.of(setting.server), path=str(path))


@pytest.mark.parametrize(
    ("running", "iteration_ms", "own", "limit"),
    [
        ((), (), 7, 7),  # nothing is measured yet
        ((), (), None, None),
        ((40, 40), (20.0, 20.0), 7, 100),  # no line: 40 x 50 / 20 in proportion
        ((40, 40), (20.0, 20.0), 200, 200),  # which lowers nothing
        ((40, 40), (20.0, 20.0), None, None),
        ((20, 40), (20.0, 30.5), 7, 48),  # a line through (20, 20 ms) and (30, 30.5 ms)
        ((40, 41), (20.0, 20.01), 7, 82),  # a flat line: twice as many as ever ran
        ((40, 41), (20.0, 20.01), 90, 90),  # or the plan's own limit
        ((20, 40), (40.0, 60.0), 90, 25),  # a line lowers the own limit
    ],
)
def test_a_measured_limit_stands_in_place_of_a_plans_own(
    running: tuple[int, ...], iteration_ms: tuple[float, ...], own: int | None, limit: int | None
) -> None:
    pace, plan = PaceLimit(0.05), replace(dense_plan(load_model("llama2_7b")), max_running=own)
    seen = ServeSetting().server.build_engine(plan, int(80e9)).run_until(0.0)
    pace.measure(replace(seen, running=running[0] if running else 0))
    for each, took_ms in zip(running, iteration_ms, strict=True):
        seen = a_second_later(seen, each, took_ms / 1000.0)
        pace.measure(seen)
    assert pace.replaced(plan) == replace(plan, max_running=limit)


def test_a_bound_of_the_wait_replaces_the_limit_of_the_network(tmp_path: Path) -> None:
    setting = ServeSetting(slo="ttft_2s_tpot_100ms")
    features, outputs = setting.table.features, len(setting.actions.plans)
    weight, bias = np.zeros((outputs, features), dtype=np.float32), np.zeros(outputs, dtype=np.float32)
    bias[setting.actions.start] = 1.0
    path, about = write_linear_policy(tmp_path, "ServeTrace", setting, weight, bias)
    path.write_text(json.dumps({**about, "wait_share": 0.8}))
    policy = learned_serve(PolicyContext.of(setting.server), path=str(path))
    start = setting.actions.plans[setting.actions.start]
    assert start.max_wait_s == 1.0
    assert policy.first_plan == replace(start, max_wait_s=pytest.approx(1.6))  # 0.8 of 2 s: nothing is measured yet
    engine = setting.build_engine(replace(WINDOW, source="gamma", rate=3.0, budget="full"), policy.first_plan)
    before = engine.run_until(setting.tick_s)
    engine.apply(policy(before))
    state = engine.run_until(2.0 * setting.tick_s)
    plan = policy(state)
    waited_s = (before.oldest_wait_s + state.oldest_wait_s) / 2.0
    begun = state.first_tokens - before.first_tokens
    started_s = max(0.0, (state.ttft_sum_s - before.ttft_sum_s) / begun - waited_s)
    assert started_s > 0.1
    assert plan.max_wait_s == pytest.approx(math.floor(0.8 * (2.0 - started_s) / 0.05 + 1e-9) * 0.05)
    assert replace(plan, max_wait_s=1.0) == start
    assert own_plan(Limited(policy, 3), plan) == start  # what a demonstration records is the network's own choice
    assert own_plan(conf_policy("dense")(PolicyContext.of(setting.server)), plan) is plan
    for bad in (0.0, -1.0, "x"):
        path.write_text(json.dumps({**about, "wait_share": bad}))
        with pytest.raises(ConfigError, match=r"wait_share is .*; it must be a share of the TTFT target, above 0"):
            learned_serve(PolicyContext.of(setting.server), path=str(path))


def test_the_room_for_kv_is_added_to_the_values_of_the_network(tmp_path: Path) -> None:
    setting = ServeSetting(slo="ttft_2s_tpot_100ms")
    features, outputs = setting.table.features, len(setting.actions.plans)
    weight, bias = np.zeros((outputs, features), dtype=np.float32), np.zeros(outputs, dtype=np.float32)
    dense, pruned = setting.actions.groups.index(0), setting.actions.named("drop 20, W4 32, queue any, wait 1 s")
    bias[dense], bias[pruned] = 2.0, 1.0
    path, about = write_linear_policy(tmp_path, "ServeTrace", setting, weight, bias)
    context = PolicyContext.of(setting.server)
    first = setting.actions.plans[dense]
    left = round(100 * token_kv_bytes(setting.model, first))  # dense weights leave room for a hundred tokens
    budget_bytes = setting.actions.weights_bytes[dense] + context.workspace_bytes + left
    idle = replace(setting.build_engine(WINDOW, first).run_until(0.0), budget_bytes=budget_bytes, waiting_tokens=200)
    full = replace(idle, waiting_tokens=10_000)
    chosen = {}
    for room_weight in (None, 4.0):
        path.write_text(json.dumps(about if room_weight is None else {**about, "room_weight": room_weight}))
        plans = [learned_serve(context, path=str(path))(state) for state in (idle, full)]
        chosen[room_weight] = [setting.actions.plans.index(plan) for plan in plans]
    assert chosen[None] == [dense, dense]
    assert chosen[4.0] == [dense, pruned]
    for bad in (0.0, -1.0, "x"):
        path.write_text(json.dumps({**about, "room_weight": bad}))
        with pytest.raises(ConfigError, match=r"room_weight is .*; it must be a number above 0"):
            learned_serve(context, path=str(path))


def test_no_training_window_overlaps_the_time_of_validation_or_test() -> None:
    windows, rng = serve_windows(), np.random.default_rng(0)
    spans = {split: windows.span_s("burst", split) for split in ("train", "validation", "test")}  # type: ignore[arg-type]
    assert spans["train"][1] <= spans["validation"][0] < spans["validation"][1] <= spans["test"][0]
    sampled = [windows.sample(rng, "train", ("burst",)) for _ in range(3000)]
    ends = [window.start_s + windows.window_s * window.rate for window in sampled]
    assert min(window.start_s for window in sampled) >= spans["train"][0]
    assert max(ends) <= spans["train"][1]
    assert max(ends) > 0.97 * spans["train"][1]  # they reach its end
    seeds = {split: windows.budget_seeds[split] for split in ("train", "validation", "test")}
    assert all(seeds["train"][0] <= window.budget_seed < seeds["train"][1] for window in sampled)
    assert seeds["train"][1] <= seeds["validation"][0]
    assert seeds["validation"][1] <= seeds["test"][0]
    tested = [windows.sample(rng, "test", ("burst",)) for _ in range(300)]
    assert min(window.start_s for window in tested) >= spans["test"][0]


def test_a_window_holds_the_requests_of_its_time_span_sped_up_by_its_rate() -> None:
    windows, trace = serve_windows(), source_trace("burst")
    twice = windows.requests(replace(WINDOW, rate=2.0))
    inside = (trace.arrival_s >= 300.0) & (trace.arrival_s < 300.0 + 2.0 * windows.window_s)
    assert len(twice) == int(inside.sum())
    np.testing.assert_allclose([r.arrival_s for r in twice], (trace.arrival_s[inside] - 300.0) / 2.0)
    assert [r.output_tokens for r in twice] == trace.output_tokens[inside].tolist()


def test_a_load_narrows_the_range_of_rates_and_nothing_else() -> None:
    all_loads, rng = serve_windows(), np.random.default_rng(0)
    low, high = all_loads.rates["burst"]
    upper = ServeSetting(load=[0.5, 1.0]).windows
    rates = [upper.sample(rng, "train", ("burst",)).rate for _ in range(300)]
    assert math.sqrt(low * high) <= min(rates) < max(rates) <= high
    assert replace(upper, rates=all_loads.rates) == all_loads
    with pytest.raises(ConfigError, match=r"load is \[0.9, 0.2\]"):
        all_loads.at_load(0.9, 0.2)


def test_the_observation_does_not_depend_on_output_lengths_before_a_request_finishes() -> None:
    setting = ServeSetting()
    observed = []
    for factor in (1, 3):
        engine = setting.build_engine(WINDOW, setting.actions.plans[0])
        longer = SimEngine(
            model=setting.model,
            latency=setting.latency,
            config=setting.engine,
            plan=setting.actions.plans[0],
            budget_bytes=engine.budget,
            workspace_bytes=setting.workspace_bytes,
            quality_nll=setting.nll,
        )
        requests = [r for r in setting.windows.requests(WINDOW) if r.output_tokens >= 60]
        longer.submit([replace(r, output_tokens=r.output_tokens * factor) for r in requests])
        observer = ServeObserver(setting.model, setting.actions, setting.kv_block_layer_bytes)
        rows = []
        for step in range(1, 200):
            state = longer.run_until(0.02 * step)
            if state.finished:
                break
            rows.append(observer(state, Choice()))
        observed.append(rows)
    count = min(map(len, observed))
    assert count >= 20
    np.testing.assert_array_equal(observed[0][:count], observed[1][:count])


def test_the_table_names_every_entry_in_its_range_and_is_in_info() -> None:
    env = ServeTrace()
    observation, info = env.reset(options={"window": WINDOW})
    rows = info["observation_table"]
    assert len({row["name"] for row in rows}) == len(rows) == len(observation)
    over = False
    while not over:
        assert all(row["low"] <= value <= row["high"] for row, value in zip(rows, observation, strict=True))
        observation, _, over, _, _ = env.step(0)
    named = {row["name"]: value for row, value in zip(rows, observation, strict=True)}
    assert named["arrivals_60s"] > 0


def test_the_table_of_plans_combines_every_level() -> None:
    model = ServeSetting().model
    actions = serve_actions(model, order=["MHA1", "FFN2"], drops=(0, 2), low_layers=(0, 32), admits=(None, 4))
    assert len(actions.plans) == len(set(actions.plans)) == len(set(actions.names)) == 8
    assert actions.plans[0] == dense_plan(model)
    assert actions.levels[0] == (0.0, 0.0, 0.0)
    assert actions.levels[-1] == (1.0, 1.0, 1.0)
    with pytest.raises(ConfigError, match=r"from 0 to 1, the length of actions\.order"):
        serve_actions(model, order=["MHA1"], drops=(2,))


MORE_ACTIONS = {"drops": [0, 2], "low_layers": [0], "waits": [1.5], "kv_bits": [16, 8], "streamed": [0, 4, 8]}


def test_streamed_layers_and_bits_of_kv_can_be_chosen() -> None:
    env = ServeTrace(actions=MORE_ACTIONS, quality="llama2_7b_transferred")
    observation, _ = env.reset(options={"window": WINDOW})
    assert observation.shape == env.observation_space.shape == (ServeTrace().observation_space.shape[0] + 2
                                                               - len(ServeTrace().setting.actions.plans)
                                                               + len(env.setting.actions.plans),)  # fmt: skip
    rng, over, ran = np.random.default_rng(1), False, set()
    while not over:
        legal = np.flatnonzero(observation[-len(env.setting.actions.plans) :])
        observation, _, over, _, info = env.step(int(rng.choice(legal)))
        plan = env.core.state.plan
        ran.add((sum(plan.streamed), plan.kv_bits[0]))
    assert {count for count, _ in ran} >= {0, 4, 8}
    assert {bits for _, bits in ran} == {16, 8}
    assert info["illegal_actions"] == 0


def test_bits_of_kv_need_a_quality_table_that_knows_them() -> None:
    with pytest.raises(ConfigError, match=r"actions: drop 0.*KV"):
        ServeSetting(actions=MORE_ACTIONS, quality="llama2_7b_published")


def test_a_learned_policy_chooses_the_same_plans_in_sim_as_in_the_environment(tmp_path: Path) -> None:
    env = ServeTrace()
    setting = env.setting
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(len(setting.actions.plans), setting.table.features)).astype(np.float32)
    # With this bias all actions are rated equally at first, so every later change of the state can change the choice.
    bias = -weight @ env.reset(options={"window": WINDOW})[0][: setting.table.features]
    path, about = write_linear_policy(tmp_path, "ServeTrace", setting, weight, bias)
    context = PolicyContext(
        model=setting.model,
        workspace_bytes=setting.workspace_bytes,
        kv_block_tokens=setting.engine.kv_block_tokens,
    )
    policy = learned_serve(context, path=str(path))
    engine = setting.build_engine(WINDOW, policy.first_plan)
    observation, _ = env.reset(options={"window": WINDOW})
    chosen = set()
    for tick in range(1, 40):
        plan = policy(engine.run_until(tick * setting.tick_s))
        features = setting.table.features
        action = int(policy.network.act(observation[:features], observation[features:] > 0.5))
        assert plan == setting.actions.plans[action]
        engine.apply(plan)
        observation, *_ = env.step(action)
        chosen.add(action)
    assert len(chosen) > 1
    path.write_text(json.dumps({**about, "plans": {**setting.action_options, "drops": [0, 2, 4, 6, 8, 10]}}))
    with pytest.raises(ConfigError, match="other actions"):
        learned_serve(context, path=str(path))


def test_the_shaping_potential_is_the_share_of_requests_about_to_be_late() -> None:
    setting = ServeSetting()
    reward = ServeReward(scale=1.0, late_weight=2.0)
    state = setting.build_engine(WINDOW, setting.actions.plans[0]).run_until(0.0)
    late = replace(state, waiting=5, oldest_wait_s=1.0)
    assert reward.potential(late, 100, 2.0) == pytest.approx(-2.0 * 0.5 * 5 / 100)
    assert reward.potential(state, 100, 2.0) == 0.0
    assert reward(0.25, -0.05, 0.0) == pytest.approx(0.30)
    assert math.isclose(kv_block_layer_bytes(setting.model, 16), setting.kv_block_layer_bytes)
    with pytest.raises(ConfigError, match=r"reward\.scale"):
        ServeReward(scale=0.0)


def test_render_returns_an_image_that_changes_and_save_render_writes_it(tmp_path: Path) -> None:
    env = ServeTrace(render_mode="rgb_array")
    env.reset(options={"window": WINDOW})
    before = env.render()
    for action in (0, 5, 5, 0):
        env.step(action)
    after = env.render()
    assert before is not None
    assert after is not None
    assert (before != after).any()
    env.save_render(tmp_path / "episode.png")
    assert (tmp_path / "episode.png").read_bytes().startswith(b"\x89PNG")


def test_the_shipped_policy_serves_held_out_windows_better_than_dense() -> None:
    setting = ServeSetting(split="validation")
    windows = validation_windows(6, ["burst"])
    shipped = mean_utility(setting, windows, conf_policy("learned_serve"))
    assert shipped > mean_utility(setting, windows, conf_policy("dense")) + 0.05


def test_a_model_divided_among_gpus_is_served_by_what_one_of_them_holds() -> None:
    options = {"model": "llama2_7b", "latency": "llama2_7b_a100_tp2", "tp": 2}
    divided, alone = ServeSetting(**options), ServeSetting()
    assert divided.model == alone.model.shard(2)
    assert divided.server.gpu.tp == 2
    assert divided.stated["server"] == [
        *alone.stated["server"][:2],
        "llama2_7b_a100_tp2",
        *alone.stated["server"][3:],
        2,
    ]
    assert ServeSetting(model="llama2_7b", latency=None, tp=2).latency.name == "llama2_7b_a100_tp2"
    with pytest.raises(ConfigError, match=r"was made for gpu.tp=2, not 1"):
        ServeSetting(latency="llama2_7b_a100_tp2")
    env = ServeTrace(**options)
    env.reset(seed=0)
    for _ in range(3):
        *_, info = env.step(int(np.flatnonzero(env.action_masks())[0]))
    assert info["action_mask"].any()


@pytest.mark.parametrize("knob", [{"ffn_width": (7,) * 32}, {"kv_bits": (4,) * 32}, {"weight_bits": (4,) * 32}])
def test_plans_are_charged_for_what_runs_and_not_for_limits(knob: dict[str, Any]) -> None:
    setting = ServeSetting(quality="llama2_7b_transferred")
    dense = dense_plan(setting.model)
    limited = replace(dense, max_running=3, max_wait_s=1.0)
    assert setting.nll(limited) == setting.nll(dense)  # the loss of dense is known from here on
    assert setting.nll(replace(limited, **knob)) == setting.nll(replace(dense, **knob)) > setting.nll(dense)
