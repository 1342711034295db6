"""Recorded episodes: they hold what the policy did, and training can start from them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agents.baselines.prune import baselines
from agents.envs.prune import PruneToBudget
from agents.envs.serve import ServeSetting
from agents.training.episodes import FILE, read_episodes, write_episodes
from agents.training.offline import episodes, nearest_action
from agents.training.train import environment_kwargs
from sim.cost.model_spec import load_model
from sim.errors import ConfigError
from sim.policies.fixed import static_plan
from sim.policies.observation.serve import actions_from
from tests.agents.helpers import composed, run_module, utilities_around_imitation


def write(folder: Path, *overrides: str) -> tuple[Path, list[Any]]:
    """Play and write the episodes of agents.offline with these overrides; return the file and the episodes."""
    played = list(episodes(composed("offline", *overrides)))
    write_episodes(folder / FILE, [episode.get_state() for episode in played])
    return folder / FILE, played


PRUNE = ("env=prune_to_budget", "reward=negative_loss")


def test_a_file_of_episodes_holds_the_played_observations_and_actions(tmp_path: Path) -> None:
    path, played = write(tmp_path, *PRUNE, "by=knapsack", "episodes=3")
    observations, actions = read_episodes(path, played[0].observation_space.shape)
    assert len(observations) == len(actions) == sum(map(len, played)) > 3
    np.testing.assert_array_equal(observations[: len(played[0])], np.stack(played[0].get_observations())[:-1])
    features = observations.shape[1] - played[0].action_space.n
    legal = np.take_along_axis(observations[:, features:], actions[:, None], axis=1)
    assert (legal > 0.5).all()
    assert all(episode.is_terminated for episode in played)


def test_an_episode_by_the_knapsack_drops_the_blocks_of_its_solution() -> None:
    env = PruneToBudget(**environment_kwargs(composed("offline", *PRUNE, "by=knapsack")))
    env.reset(seed=0)
    (episode,) = episodes(composed("offline", *PRUNE, "by=knapsack", "episodes=1", "seed=0"))
    solution = baselines(env.setting.model)["knapsack"][0](env.load)
    assert set(episode.get_actions().tolist()) <= set(np.flatnonzero(solution).tolist())


def test_an_episode_of_dense_serving_holds_its_action_and_a_return_in_range() -> None:
    (episode,) = episodes(composed("offline", "by=dense", "episodes=1"))
    assert set(episode.get_actions().tolist()) == {0}
    assert -10.0 <= episode.get_return() <= 0.0


def test_a_plan_outside_the_table_becomes_the_nearest_legal_one() -> None:
    limits = {"admits": [None, 4, 8, 16], "waits": [None, 1.5], "runs": [None, 20]}
    setting = ServeSetting(actions={"drops": [0, 4, 8], "low_layers": [0, 32], **limits})
    names, legal = setting.actions.names, np.ones(len(setting.actions.plans), dtype=np.bool_)

    def nearest(**changes: Any) -> str:
        plan = static_plan(setting.model, **changes)
        return names[nearest_action(setting.actions, setting.model, plan, legal)]

    assert nearest(max_waiting=8) == "drop 0, W4 0, queue 8"
    assert nearest(weight_bits=[4] * 30 + [16] * 2, max_waiting=5) == "drop 0, W4 32, queue 4"
    assert nearest(drop_mha=[25, 27, 24], max_waiting=100) == "drop 4, W4 0, queue 16"
    legal[names.index("drop 0, W4 0, queue 8")] = False
    assert nearest(max_waiting=8) != "drop 0, W4 0, queue 8"
    assert nearest(max_waiting=16, max_wait_s=1.2, max_running=30) == "drop 0, W4 0, queue 16, wait 1.5 s, run 20"


def test_a_plan_is_nearest_to_one_that_runs_as_it_does_whatever_their_limits() -> None:
    knobs = {
        "kv_bits": [16, 8, "hidden"],
        "compute_bits": [16, 8],
        "kv_only": [0, 10],
        "streamed": [0, 8],
    }
    actions = actions_from(load_model("llama2_7b"), {"waits": [1.5], "kv_compression": [None], **knobs}, 0)
    legal = np.ones(len(actions.plans), dtype=np.bool_)
    for number, plan in enumerate(actions.plans):
        free = replace(plan, max_wait_s=None, max_running=77)
        assert nearest_action(actions, load_model("llama2_7b"), free, legal) == number


def test_a_plan_between_two_entries_of_a_list_is_nearest_to_the_closer_one() -> None:
    model = load_model("llama2_7b")
    ways = [None, {"method": "ada_kv", "percent": 70}, {"method": "think", "percent": 90}]
    actions = actions_from(model, {"kv_bits": [16, 8], "kv_compression": ways}, 0)
    legal = np.ones(len(actions.plans), dtype=np.bool_)

    def nearest(**options: Any) -> str:
        plan = static_plan(model, **options)
        return actions.names[nearest_action(actions, model, plan, legal)].partition("any, ")[2]

    assert nearest(kv_bits=4) == "KV8, KV whole"
    assert nearest(kv_bits=[4] * 4 + [16] * 28) == "KV16, KV whole"
    assert nearest(kv_method="ada_kv", kv_percent=60) == "KV16, KV ada_kv 70%"
    assert nearest(kv_method="think", kv_percent=70) == "KV16, KV think 90%"
    assert nearest(kv_method="ada_kv", kv_percent=90) == "KV16, KV whole"


def test_a_wrong_file_or_policy_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"agents\.offline"):
        read_episodes(tmp_path / FILE, (3,))
    (tmp_path / FILE).write_bytes(b"nothing")
    with pytest.raises(ConfigError, match=r"agents\.offline"):
        read_episodes(tmp_path / FILE, (3,))
    path, _ = write(tmp_path, *PRUNE, "by=knapsack", "episodes=1")
    with pytest.raises(ConfigError, match="same env="):
        read_episodes(path, (3,))
    for overrides in (("by=densee",), (*PRUNE, "by=oracle"), (*PRUNE, "by=knapsak")):
        with pytest.raises(ConfigError, match="there is no such"):
            list(episodes(composed("offline", "episodes=1", *overrides)))


def test_episodes_of_a_cluster_are_an_error_because_it_has_several_agents() -> None:
    with pytest.raises(ConfigError, match=r"env\.id is ServeCluster-v0, but episodes are written for one agent"):
        list(episodes(composed("offline", "env=serve_cluster", "by=dense", "episodes=1")))


def test_training_can_start_from_recorded_episodes(local_ray: None, tmp_path: Path) -> None:
    write(tmp_path, *PRUNE, "by=knapsack", "episodes=150")
    small = ["algorithm=ppo", "num_envs=8", "hidden=[64]", "algorithm.steps_an_iteration=512"]
    cfg = composed("train", *small, "imitate=offline", f"imitate.data={tmp_path}", "imitate.epochs=15")
    before, after = utilities_around_imitation(cfg)
    assert after > before + 0.1


@pytest.mark.slow
def test_marwil_learns_from_recorded_episodes_alone(tmp_path: Path) -> None:
    write(tmp_path / "data", *PRUNE, "by=knapsack", "episodes=200")
    small = ["algorithm.batch=500", "algorithm.updates_an_iteration=100", "hidden=[64]", "validate_every=1"]
    paths = [f"algorithm.data={tmp_path / 'data'}", f"hydra.run.dir={tmp_path}"]
    run = run_module("agents.train", "algorithm=marwil", "iterations=3", *small, *paths)
    assert run.returncode == 0, run.stderr[-3000:]
    about = json.loads((tmp_path / "best" / "policy.json").read_text(encoding="utf-8"))
    assert about["training"]["validation_utility"] > 0.15  # a random network has 0.04


def test_no_episodes_of_another_split_are_written() -> None:
    # A policy that learned from them would not state it.
    with pytest.raises(ConfigError, match="policies learn from the split train alone"):
        next(episodes(composed("offline", *PRUNE, "by=knapsack", "+env.kwargs.split=test")))
