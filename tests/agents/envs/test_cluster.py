"""ServeCluster: its two views are one, a cluster of one is ServeTrace, and a policy sees in sim what it saw here."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import simpy
from gymnasium.utils.env_checker import check_env
from safetensors.numpy import save_file

from agents.envs.cluster import ClusterSetting, ServeCluster
from agents.envs.cluster_vector import ServeReplicas
from agents.envs.serve import ServeTrace
from agents.envs.serve_vector import ServeTraceVector
from agents.envs.serve_windows import Window, serve_windows
from agents.evaluation.cluster import mean_cluster_utility, play_cluster, test_clusters, train_clusters
from agents.evaluation.serve import conf_policy, fixed_plan, policy_context
from agents.training.imitate import widen_inputs
from agents.training.validation import serve, serve_clusters, validation_clusters
from sim.cluster.cluster import Cluster, Replica
from sim.cost.plan import dense_plan
from sim.engine.protocol import EngineState
from sim.engine.sim_engine import SimEngine
from sim.errors import ConfigError
from sim.policies.base import ClusterPolicy, Policy
from sim.policies.learned import read_learned
from sim.policies.learned_cluster import LearnedCluster, learned_cluster
from sim.policies.observation.cluster import CLUSTER_ENTRIES, replica_features
from sim.results.metrics import met_slo

test_clusters.__test__ = False  # type: ignore[attr-defined]  # it is no test

WINDOWS = [
    Window(source="burst", start_s=300.0, rate=1.1, budget="cotenant", budget_seed=4),
    Window(source="burst", start_s=900.0, rate=1.1, budget="full", budget_seed=5),
    Window(source="burst", start_s=2400.0, rate=1.1, budget="random_walk", budget_seed=6),
]
OWN = [*range(27)]  # entries of ServeTrace
AMONG = len(CLUSTER_ENTRIES)


def random_actions(rng: np.random.Generator, before: np.ndarray[Any, Any], count: int) -> np.ndarray[Any, Any]:
    return np.where(rng.random(len(before)) < 0.2, rng.integers(count, size=len(before)), before)


def write_policy(folder: Path, setting: ClusterSetting, seed: int, at: np.ndarray[Any, Any]) -> Path:
    """Write a policy with random weights for which at an observation all actions are about equally good."""
    features, rng = setting.table.features, np.random.default_rng(seed)
    weight = rng.normal(size=(len(setting.actions.plans), features)).astype(np.float32)
    bias = rng.normal(scale=0.01, size=len(weight)).astype(np.float32) - weight @ at[:features]
    about = {
        "task": "ServeCluster",
        "model": setting.model.name,
        "layers": [list(weight.shape)],
        "activation": "relu",
        "plans": setting.action_options,
        "environment": {"hide": []},
        "observation": setting.table.rows(),
        "actions": list(setting.table.actions),
    }
    save_file({"0.weight": weight, "0.bias": bias}, folder / "p.safetensors")
    (folder / "p.json").write_text(json.dumps(about))
    return folder / "p.json"


def test_both_views_are_registered_and_pass_gymnasiums_check() -> None:
    check_env(gym.make("agents.envs.registration:ServeCluster-v0", replicas=2, render_mode="rgb_array").unwrapped)
    vector = gym.make_vec("ServeCluster-v0", num_envs=4, vectorization_mode="vector_entry_point", replicas=2)
    observations, _ = vector.reset(seed=1)
    assert vector.observation_space.contains(observations)
    with pytest.raises(ConfigError, match="must be a multiple of replicas, 4"):
        ServeReplicas(6)


@pytest.mark.parametrize("reward", [{"kind": "lost", "late_weight": 2.0}, {"kind": "earned"}])
def test_the_rows_of_the_vector_play_the_plain_cluster_step_by_step(reward: dict[str, Any]) -> None:
    words: dict[str, Any] = {"replicas": 3, "own_share": 0.6, "reward": reward}
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


def test_a_cluster_of_one_plays_the_episodes_of_serve_trace() -> None:
    for window in WINDOWS[0], WINDOWS[2]:
        alone, one = ServeTrace(), ServeCluster(replicas=1)
        fast_alone, fast_one = ServeTraceVector(1), ServeReplicas(1, replicas=1)
        seen = alone.reset(options={"window": window})[0], one.reset(options={"windows": [window]})[0][0]
        fast_alone.reset(options={"windows": [window]})
        fast_one.reset(options={"windows": [[window]]})
        shared = np.array([*OWN, *range(27 + AMONG, len(seen[1]))])
        rng, actions, over = np.random.default_rng(0), np.zeros(1, dtype=np.int64), False
        while not over:
            np.testing.assert_array_equal(seen[0], seen[1][shared])
            actions = random_actions(rng, actions, 24)
            first, reward, over, _, info = alone.step(actions[0])
            second, gained, _, _, told = one.step(actions)
            seen = first, second[0]
            assert gained == pytest.approx(reward, abs=1e-12)
            assert told["utility"] == info["utility"] or not over
            assert fast_one.step(actions)[1][0] == pytest.approx(fast_alone.step(actions)[1][0], abs=1e-12)


@pytest.mark.parametrize("own_share", [0.0, 0.5, 1.0])
def test_whatever_a_row_is_paid_for_a_cluster_earns_its_utility(own_share: float) -> None:
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


def test_a_clusters_utility_counts_every_request_of_its_windows_once() -> None:
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


def test_what_one_replica_runs_changes_what_the_router_sends_to_the_others() -> None:
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
    assert counts[1][0] > 1.05 * counts[0][0]  # more room, more requests
    assert counts[1].sum() == counts[0].sum()


def test_a_replica_is_shown_the_others_and_not_itself() -> None:
    setting = ClusterSetting(replicas=3)
    names = [entry.name for entry in CLUSTER_ENTRIES]
    state = setting.idle_engine(WINDOWS[1], setting.actions.plans[0]).run_until(0.0)

    def shown(**kwargs: Any) -> dict[str, float]:
        others = [_changed(state, **kwargs), _changed(state, waiting=3, running=4)]
        values = replica_features(_changed(state, waiting=7, running=4), others, float(state.weight_bytes))
        return dict(zip(names, values.tolist(), strict=True))

    first = shown(waiting=0, kv_used_layer_blocks=state.kv_layer_blocks // 2)
    assert first["share_waiting"] == pytest.approx(0.7)
    assert first["share_running"] == pytest.approx(0.5)
    assert first["others_waiting"] == pytest.approx(np.log2(1.0 + 1.5) / 10.0)
    assert first["others_kv_used"] == pytest.approx(0.25, abs=1e-3)
    assert first["least_kv_used"] == pytest.approx(0.0)
    assert first["others_weights"] == pytest.approx(1.0)
    changed = shown(incoming_bytes=1, weight_bytes=state.weight_bytes // 2, oldest_wait_s=1.0)
    assert changed["others_copying"] == pytest.approx(0.5)
    assert changed["others_weights"] == pytest.approx(0.75)
    assert changed["others_oldest_wait"] == pytest.approx(0.25)
    alone = replica_features(state, (), float(state.weight_bytes))
    assert not alone.any()  # log2(1) replicas, nothing waits, no others


def _changed(state: EngineState, **kwargs: Any) -> EngineState:
    from dataclasses import replace

    return replace(state, **kwargs)


def test_hidden_entries_stay_0_and_an_unknown_one_is_an_error() -> None:
    hidden = [entry.name for entry in CLUSTER_ENTRIES]
    vector, env = ServeReplicas(2, replicas=2, hide=hidden), ServeCluster(replicas=2, hide=hidden)
    seen = vector.reset(options={"windows": [WINDOWS[:2]]})[0]
    np.testing.assert_allclose(seen, env.reset(options={"windows": WINDOWS[:2]})[0], rtol=1e-6, atol=1e-7)
    for _ in range(20):
        seen, *_ = vector.step([0, 0])
        assert not seen[:, 27 : 27 + AMONG].any()
    assert seen[:, :27].any()
    with pytest.raises(ConfigError, match=r"hide: there is no entry 'other'"):
        ClusterSetting(hide=["other"])


def test_a_cluster_asks_the_policy_that_the_environment_would_have_chosen_by(tmp_path: Path) -> None:
    env = ServeCluster(replicas=3)
    setting = env.setting
    seen, _ = env.reset(options={"windows": WINDOWS})
    path = write_policy(tmp_path, setting, 0, seen[0])
    network, features = read_learned(path, "ServeCluster").network, setting.table.features
    chosen, over = set(), False
    while not over:
        actions = network.act(seen[:, :features], seen[:, features:] > 0.5)
        seen, _, over, _, info = env.step(actions)
        chosen |= {*actions.tolist()}
    assert len(chosen) > 3
    played = play_cluster(setting, WINDOWS, lambda served: learned_cluster(served, path=str(path)))
    assert played["utility"] == pytest.approx(info["utility"], abs=1e-12)
    assert serve_clusters(network.act, {"replicas": 3}, [WINDOWS]) == pytest.approx([info["utility"]], abs=1e-12)
    assert isinstance(learned_cluster(policy_context(setting), path=str(path)), ClusterPolicy)
    assert not isinstance(conf_policy("dense")(policy_context(setting)), ClusterPolicy)


def test_a_policy_is_shown_only_the_others_that_accept_requests() -> None:
    setting = ClusterSetting(replicas=3)
    told: list[tuple[float, int]] = []

    class Curious(LearnedCluster):
        def among(self, state: EngineState, others: Any) -> Any:
            told.append((state.time_s, len(others)))
            return self.first_plan

    policy = Curious(None, setting.actions, None, None)  # type: ignore[arg-type]

    def make(env: simpy.Environment) -> tuple[SimEngine, Policy]:
        return setting.idle_engine(WINDOWS[1], policy.first_plan, env=env, external_clock=True), policy

    def times() -> Iterator[float]:
        return iter((5.0, 15.0, 115.0))

    from sim.cluster.outages import Outage

    away = (Outage(from_s=10.0, until_s=40.0, notice_s=0.0),)
    several = [
        Replica(name="0", build=make, decisions_s=times),
        Replica(name="1", build=make),
        Replica(name="2", build=make, outages=away),
    ]
    Cluster(setting.trace(WINDOWS), several, setting.router, start_s=1.0, load_bytes_per_s=1e9).run()
    assert told == [(5.0, 2), (15.0, 1), (115.0, 2)]


def test_training_and_test_clusters_share_no_minute_and_each_replica_has_its_own_budget() -> None:
    setting = ClusterSetting()
    windows = serve_windows()
    for cluster in train_clusters(setting):
        assert max(one.start_s + windows.window_s * one.rate for one in cluster) <= windows.span_s("burst", "train")[1]
        assert len({one.rate for one in cluster}) == 1  # one load
    held_out = test_clusters(setting, ["burst"], 4)
    assert len(held_out) == 8
    for _, cluster in held_out:
        assert min(one.start_s for one in cluster) >= windows.span_s("burst", "test")[0]
    kinds = [{one.budget for one in cluster} for _, cluster in held_out]
    assert max(map(len, kinds)) > 1
    assert len({one.budget_seed for _, cluster in held_out for one in cluster}) > 24
    validated = validation_clusters(setting)
    assert validated == validation_clusters(setting)
    assert all(one.start_s >= windows.span_s("burst", "validation")[0] for cluster in validated for one in cluster)
    with pytest.raises(ConfigError, match="2 windows for 4 replicas"):
        setting.check_windows(WINDOWS[:2])


def test_a_policy_of_one_replica_begins_in_a_cluster_as_itself() -> None:
    network = read_learned("learned_serve_llama2", "ServeTrace").network
    wider = widen_inputs(network, 27 + AMONG)
    rng = np.random.default_rng(0)
    rows = rng.random((50, 27 + AMONG)).astype(np.float32)
    np.testing.assert_allclose(wider(rows), network(rows[:, :27]), rtol=1e-5, atol=1e-5)
    alone = serve(network.act, {}, WINDOWS[:1])
    assert serve_clusters(wider.act, {"replicas": 1}, [WINDOWS[:1]]) == pytest.approx(alone, abs=1e-12)


def test_the_policy_that_ships_serves_clusters_better_than_dense_on_windows_it_was_not_trained_on() -> None:
    setting = ClusterSetting(load=[0.7, 1.0])
    clusters = validation_clusters(setting)[:4]
    shipped = mean_cluster_utility(setting, clusters, conf_policy("learned_cluster"))
    assert shipped > mean_cluster_utility(setting, clusters, conf_policy("dense")) + 0.1


def test_render_shows_every_replica_and_writes_its_picture(tmp_path: Path) -> None:
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
