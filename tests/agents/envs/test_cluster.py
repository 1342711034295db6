"""ServeCluster: both views play equal episodes, a cluster of one is ServeTrace, and policies decide alike in sim."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simpy
from omegaconf import OmegaConf

from agents.baselines.serve import conf_policy, fixed_plan, policy_context
from agents.envs.cluster import CLUSTER_ACTIONS, ClusterSetting, ServeCluster
from agents.envs.cluster_vector import ServeReplicas
from agents.envs.serve import ServeTrace
from agents.envs.serve_vector import ServeTraceVector
from agents.envs.serve_windows import Window, serve_windows
from agents.evaluation.cluster import LOADS, clusters_of, mean_cluster_utility, play_cluster
from agents.evaluation.tuning import train_clusters
from agents.training.imitate import widen_inputs
from agents.training.validation import serve, serve_clusters, validation_clusters
from sim.cluster.cluster import Cluster, Replica
from sim.cluster.outages import Outage
from sim.config import load_option
from sim.cost.plan import dense_plan
from sim.engine.protocol import EngineState
from sim.engine.sim_engine import SimEngine
from sim.errors import ConfigError
from sim.policies.base import ClusterPolicy, Policy
from sim.policies.learned import read_learned
from sim.policies.learned_cluster import LearnedCluster, learned_cluster
from sim.policies.observation.cluster import CLUSTER_ENTRIES, replica_features
from sim.policies.observation.serve import SERVE_ENTRIES
from sim.results.metrics import met_slo
from tests.agents.helpers import check_environment, write_linear_policy

WINDOWS = [
    Window(source="burst", start_s=300.0, rate=1.1, budget="cotenant", budget_seed=4),
    Window(source="burst", start_s=900.0, rate=1.1, budget="full", budget_seed=5),
    Window(source="burst", start_s=2400.0, rate=1.1, budget="random_walk", budget_seed=6),
]
OWN = len(SERVE_ENTRIES)
COMPARED = len(CLUSTER_ENTRIES)


def random_actions(rng: np.random.Generator, before: np.ndarray[Any, Any], count: int) -> np.ndarray[Any, Any]:
    return np.where(rng.random(len(before)) < 0.2, rng.integers(count, size=len(before)), before)


def write_policy(folder: Path, setting: ClusterSetting, seed: int, at: np.ndarray[Any, Any]) -> Path:
    """Write a policy with random weights that rates all actions about equally at observation ``at``."""
    features, rng = setting.table.features, np.random.default_rng(seed)
    weight = rng.normal(size=(len(setting.actions.plans), features)).astype(np.float32)
    bias = rng.normal(scale=0.01, size=len(weight)).astype(np.float32) - weight @ at[:features]
    path, _ = write_linear_policy(folder, "ServeCluster", setting, weight, bias)
    return path


def test_both_views_are_registered_and_pass_the_check_of_gymnasium() -> None:
    check_environment("ServeCluster-v0", 4, replicas=2)
    with pytest.raises(ConfigError, match="must be a multiple of replicas, 4"):
        ServeReplicas(6)


@pytest.mark.parametrize("reward", [{"kind": "lost", "late_weight": 2.0}, {"kind": "earned"}])
def test_the_vector_rows_equal_the_plain_cluster_at_every_step(reward: dict[str, Any]) -> None:
    kwargs: dict[str, Any] = {"replicas": 3, "own_share": 0.6, "reward": reward}
    envs = [ServeCluster(**kwargs) for _ in range(2)]
    vector = ServeReplicas(6, **kwargs)
    rng = np.random.default_rng(3)
    plain = np.concatenate([env.reset(seed=20 + c)[0] for c, env in enumerate(envs)])
    fast, _ = vector.reset(seed=20)
    actions, ended = np.zeros(6, dtype=np.int64), 0
    for _ in range(vector.setting.ticks + 3):
        np.testing.assert_allclose(fast, plain, rtol=1e-6, atol=1e-7)
        actions = random_actions(rng, actions, vector.setting.action_space.n)
        fast, rewards, terminated, _, infos = vector.step(actions)
        rows = []
        for c, env in enumerate(envs):
            mine = slice(3 * c, 3 * c + 3)
            if ended == 1:
                rows.append(env.reset()[0])
                assert not rewards[mine].any()
                continue
            observation, gained, end, _, info = env.step(actions[mine])
            rows.append(observation)
            assert rewards[mine].mean() == pytest.approx(gained, rel=1e-9, abs=1e-9)
            assert (terminated[mine] == end).all()
            if end:
                assert infos["utility"][mine] == pytest.approx(info["utility"], rel=1e-12)
        ended = 2 if ended == 1 else ended + int(terminated.all())
        plain = np.concatenate(rows)
    assert ended == 2


def test_a_cluster_of_one_replica_plays_the_episodes_of_serve_trace() -> None:
    for window in WINDOWS[0], WINDOWS[2]:
        alone, one = ServeTrace(actions=CLUSTER_ACTIONS), ServeCluster(replicas=1)
        fast_alone, fast_one = ServeTraceVector(1, actions=CLUSTER_ACTIONS), ServeReplicas(1, replicas=1)
        observations = alone.reset(options={"window": window})[0], one.reset(options={"windows": [window]})[0][0]
        fast_alone.reset(options={"windows": [window]})
        fast_one.reset(options={"windows": [[window]]})
        rng, actions, over = np.random.default_rng(0), np.zeros(1, dtype=np.int64), False
        while not over:
            np.testing.assert_array_equal(observations[0], np.delete(observations[1], range(OWN, OWN + COMPARED)))
            actions = random_actions(rng, actions, len(alone.setting.actions.plans))
            first, reward, over, _, info = alone.step(actions[0])
            second, cluster_reward, _, _, cluster_info = one.step(actions)
            observations = first, second[0]
            assert cluster_reward == pytest.approx(reward, abs=1e-12)
            assert cluster_info["utility"] == info["utility"] or not over
            assert fast_one.step(actions)[1][0] == pytest.approx(fast_alone.step(actions)[1][0], abs=1e-12)


@pytest.mark.parametrize("own_share", [0.0, 0.5, 1.0])
def test_the_mean_reward_of_the_rows_adds_up_to_the_cluster_utility_for_any_own_share(own_share: float) -> None:
    vector = ServeReplicas(3, replicas=3, own_share=own_share)
    vector.reset(options={"windows": [WINDOWS]})
    total, over, actions, rng = np.zeros(3), False, np.zeros(3, dtype=np.int64), np.random.default_rng(0)
    while not over:
        actions = random_actions(rng, actions, 24)
        _, rewards, ended, _, infos = vector.step(actions)
        total += rewards
        over = bool(ended.all())
    assert total.mean() / vector.setting.reward.scale == pytest.approx(infos["utility"][0] - 1.0, abs=1e-9)
    assert (np.ptp(total) < 1e-9) == (own_share == 0.0)


def test_the_utility_of_a_cluster_counts_every_request_of_its_windows_once() -> None:
    env = ServeCluster(replicas=3)
    _, info = env.reset(options={"windows": WINDOWS})
    over = False
    while not over:
        _, _, over, _, info = env.step([6, 2, 10])
    records = env.core.cluster.records()
    assert len(records) == info["requests"] == sum(len(serve_windows().arrays(window)[0]) for window in WINDOWS)
    kept = np.exp(-np.maximum(records.quality_nll - env.setting.dense_nll, 0.0))
    assert info["utility"] == pytest.approx(np.where(met_slo(records, env.setting.slo), kept, 0.0).mean())
    assert {*records.replica.tolist()} == {0, 1, 2}


def test_the_plan_of_one_replica_changes_what_the_router_sends_to_the_others() -> None:
    setting = ClusterSetting(replicas=3, router="least_kv")
    dense, low = (
        dense_plan(setting.model),
        setting.actions.plans[setting.actions.names.index("drop 8, W4 32, queue any")],
    )
    counts = []
    for first in dense, low:
        plans = iter([first, dense, dense])
        cluster = setting.build_cluster(WINDOWS, [fixed_plan(plan)(policy_context(setting)) for plan in plans])
        cluster.run()
        counts.append(np.bincount(cluster.records().replica, minlength=3))
    assert counts[1][0] > 1.05 * counts[0][0]  # more free KV, more requests
    assert counts[1].sum() == counts[0].sum()


def test_the_entries_on_other_replicas_leave_out_the_replica_itself() -> None:
    setting = ClusterSetting(replicas=3)
    names = [entry.name for entry in CLUSTER_ENTRIES]
    state = setting.idle_engine(WINDOWS[1], setting.actions.plans[0]).run_until(0.0)

    def entries(**changes: Any) -> dict[str, float]:
        others = [replace(state, **changes), replace(state, waiting=3, running=4)]
        values = replica_features(replace(state, waiting=7, running=4), others, float(state.weight_bytes))
        return dict(zip(names, values.tolist(), strict=True))

    first = entries(waiting=0, kv_used_layer_blocks=state.kv_layer_blocks // 2)
    assert first["share_waiting"] == pytest.approx(0.7)
    assert first["share_running"] == pytest.approx(0.5)
    assert first["others_waiting"] == pytest.approx(np.log2(1.0 + 1.5) / 10.0)
    assert first["others_kv_used"] == pytest.approx(0.25, abs=1e-3)
    assert first["least_kv_used"] == pytest.approx(0.0)
    assert first["others_weights"] == pytest.approx(1.0)
    changed = entries(incoming_bytes=1, weight_bytes=state.weight_bytes // 2, oldest_wait_s=1.0)
    assert changed["others_copying"] == pytest.approx(0.5)
    assert changed["others_weights"] == pytest.approx(0.75)
    assert changed["others_oldest_wait"] == pytest.approx(0.25)
    alone = replica_features(state, (), float(state.weight_bytes))
    assert not alone.any()  # log2(1) replicas, an empty queue, and no others


def test_hidden_entries_stay_0_and_an_unknown_one_is_an_error() -> None:
    hidden = [entry.name for entry in CLUSTER_ENTRIES]
    vector, env = ServeReplicas(2, replicas=2, hide=hidden), ServeCluster(replicas=2, hide=hidden)
    observations = vector.reset(options={"windows": [WINDOWS[:2]]})[0]
    np.testing.assert_allclose(observations, env.reset(options={"windows": WINDOWS[:2]})[0], rtol=1e-6, atol=1e-7)
    for _ in range(20):
        observations, *_ = vector.step([0, 0])
        assert not observations[:, OWN : OWN + COMPARED].any()
    assert observations[:, :OWN].any()
    with pytest.raises(ConfigError, match=r"hide: there is no entry 'other'"):
        ClusterSetting(hide=["other"])


def test_a_learned_policy_chooses_the_same_plans_in_a_cluster_of_sim_as_in_the_environment(tmp_path: Path) -> None:
    env = ServeCluster(replicas=3)
    setting = env.setting
    observations, _ = env.reset(options={"windows": WINDOWS})
    path = write_policy(tmp_path, setting, 0, observations[0])
    network, features = read_learned(path, "ServeCluster").network, setting.table.features
    chosen, over = set(), False
    while not over:
        actions = network.act(observations[:, :features], observations[:, features:] > 0.5)
        observations, _, over, _, info = env.step(actions)
        chosen |= {*actions.tolist()}
    assert len(chosen) > 3
    played = play_cluster(setting, WINDOWS, lambda context: learned_cluster(context, path=str(path)))
    assert played["utility"] == pytest.approx(info["utility"], abs=1e-12)
    assert serve_clusters(network.act, {"replicas": 3}, [WINDOWS]) == pytest.approx([info["utility"]], abs=1e-12)
    assert isinstance(learned_cluster(policy_context(setting), path=str(path)), ClusterPolicy)
    assert not isinstance(conf_policy("dense")(policy_context(setting)), ClusterPolicy)


def test_a_policy_observes_only_the_other_replicas_that_accept_requests() -> None:
    setting = ClusterSetting(replicas=3)
    observed: list[tuple[float, int]] = []

    class Recorder(LearnedCluster):
        def among(self, state: EngineState, others: Any) -> Any:
            observed.append((state.time_s, len(others)))
            return self.first_plan

    policy = Recorder(None, setting.actions, None, 0, shown=setting.visible)  # type: ignore[arg-type]

    def make(env: simpy.Environment) -> tuple[SimEngine, Policy]:
        return setting.idle_engine(WINDOWS[1], policy.first_plan, env=env, external_clock=True), policy

    def times() -> Iterator[float]:
        return iter((5.0, 15.0, 115.0))

    away = (Outage(from_s=10.0, until_s=40.0, notice_s=0.0),)
    several = [
        Replica(name="0", build=make, decisions_s=times),
        Replica(name="1", build=make),
        Replica(name="2", build=make, outages=away),
    ]
    Cluster(setting.trace(WINDOWS), several, setting.router, start_s=1.0, load_bytes_per_s=1e9).run()
    assert observed == [(5.0, 2), (15.0, 1), (115.0, 2)]


def test_training_and_test_clusters_do_not_overlap_in_time_and_each_replica_has_its_own_budget() -> None:
    setting = ClusterSetting(sources=["burst", "gamma", "mmpp"])
    windows = serve_windows()
    tuned_on = train_clusters(setting)
    assert sorted((one[0].source, one[0].rate) for one in tuned_on) == sorted(
        (source, windows.at_load(load, load).rates[source][0]) for source in setting.sources for load in LOADS
    )
    for cluster in tuned_on:
        assert len({(one.source, one.rate) for one in cluster}) == 1  # one source at one load, as in the test
        for one in cluster:
            assert one.start_s + windows.window_s * one.rate <= windows.span_s(one.source, "train")[1]
    first = [(cluster[0].source, cluster[0].rate) for cluster in tuned_on[:3]]  # what the trials begin on
    positions = [
        LOADS.index(load)
        for source, rate in first
        for load in LOADS
        if windows.at_load(load, load).rates[source][0] == rate
    ]
    assert ([source for source, _ in first], sorted(positions)) == (["burst", "gamma", "mmpp"], [0, 1, 2])
    assert len(train_clusters(setting, each=2)) == 18
    held_out = clusters_of(setting, "test", ["burst"], 4)
    assert len(held_out) == 12
    for _, cluster in held_out:
        assert min(one.start_s for one in cluster) >= windows.span_s("burst", "test")[0]
    kinds = [{one.budget for one in cluster} for _, cluster in held_out]
    assert max(map(len, kinds)) > 1
    assert len({one.budget_seed for _, cluster in held_out for one in cluster}) > 24
    validated = validation_clusters(setting)
    assert validated == validation_clusters(setting)
    for cluster in validated:
        assert len({one.source for one in cluster}) == 1
        for one in cluster:
            low, high = windows.span_s(one.source, "validation")
            assert low <= one.start_s <= high - windows.window_s * one.rate
    counts = Counter(cluster[0].source for cluster in validated)
    assert counts["burst"] == counts["gamma"] > 0
    assert len(set(counts.values())) == 1  # every trace equally often
    with pytest.raises(ConfigError, match="2 windows for 4 replicas"):
        setting.check_windows(WINDOWS[:2])


def test_a_policy_of_one_replica_with_widened_inputs_acts_as_before() -> None:
    network = read_learned("learned_serve_llama2", "ServeTrace").network.member(3)
    wider = widen_inputs(network, OWN + COMPARED)
    rng = np.random.default_rng(0)
    rows = rng.random((50, OWN + COMPARED)).astype(np.float32)
    np.testing.assert_allclose(wider(rows), network(rows[:, :OWN]), rtol=1e-5, atol=1e-5)
    served: Any = OmegaConf.to_container(load_option("env", "serve_cluster").kwargs)
    same = {key: served[key] for key in ("actions", "quality", "slo", "budget")}
    alone = serve(network.act, same, WINDOWS[:1])
    assert serve_clusters(wider.act, {"replicas": 1, **same}, [WINDOWS[:1]]) == pytest.approx(alone, abs=1e-12)


def test_the_replicas_of_a_cluster_may_differ_in_speed_and_in_what_low_precision_costs() -> None:
    servers = [
        replace(WINDOWS[0], slowdown=1.8),
        replace(WINDOWS[1], low_bits=False),
        replace(WINDOWS[2], low_bit_cost=4.0),
    ]
    actions = {**CLUSTER_ACTIONS, "start_drops": 4}
    vector, env = ServeReplicas(3, replicas=3, actions=actions), ServeCluster(replicas=3, actions=actions)
    observations = vector.reset(options={"windows": [servers]})[0]
    plain = env.reset(options={"windows": servers})[0]
    names = [entry.name for entry in env.setting.table.entries]
    chosen = np.zeros(3, dtype=np.int64)
    rng = np.random.default_rng(1)
    for _ in range(30):
        np.testing.assert_allclose(observations, plain, rtol=1e-6, atol=1e-7)
        chosen = random_actions(rng, chosen, len(env.setting.actions.plans))
        observations, plain = vector.step(chosen)[0], env.step(chosen)[0]
    seen = {name: plain[:, names.index(name)] for name in ("slowdown", "low_bits", "low_loss")}
    assert seen["slowdown"][0] == pytest.approx(np.log2(1.8) / 2.0, abs=0.02)
    assert seen["low_bits"].tolist() == [1.0, 0.0, 1.0]
    assert seen["low_loss"][2] == pytest.approx(4.0 * seen["low_loss"][0], rel=1e-5)
    assert seen["low_loss"][1] == 0.0


def test_the_shipped_policy_serves_held_out_clusters_better_than_dense() -> None:
    served: Any = OmegaConf.to_container(load_option("env", "serve_cluster").kwargs)
    setting = ClusterSetting(**{**served, "sources": ["burst", "gamma"], "load": [0.7, 1.0]})
    clusters = [cluster for cluster in validation_clusters(setting) if cluster[0].source in setting.sources][:4]
    assert len(clusters) == 4
    shipped = mean_cluster_utility(setting, clusters, conf_policy("learned_cluster"))
    assert shipped > mean_cluster_utility(setting, clusters, conf_policy("dense")) + 0.1


def test_render_returns_an_image_that_changes_and_save_render_writes_it(tmp_path: Path) -> None:
    env = ServeCluster(replicas=2, render_mode="rgb_array")
    env.reset(options={"windows": WINDOWS[:2]})
    before = env.render()
    for _ in range(4):
        env.step([5, 0])
    after = env.render()
    assert before is not None
    assert after is not None
    assert (before != after).any()
    env.save_render(tmp_path / "episode.png")
    assert (tmp_path / "episode.png").read_bytes().startswith(b"\x89PNG")
