"""Episodes that any policy wrote: what is in them is what it did, and training can begin with them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import hydra
import numpy as np
import pytest
from omegaconf import DictConfig

from agents.envs.prune import PruneToBudget
from agents.envs.serve import ServeSetting
from agents.evaluation.prune import baselines
from agents.training.episodes import FILE, read_episodes, write_episodes
from agents.training.offline import episodes, nearest_action
from agents.training.train import build_algorithm, current_network, environment_kwargs
from agents.training.validation import validation_utilities
from sim.config import CONF_DIR, build
from sim.errors import ConfigError
from sim.paths import REPOSITORY
from sim.policies.fixed import static_plan


def composed(config: str, *overrides: str) -> DictConfig:
    with hydra.initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        return hydra.compose(config, overrides=list(overrides))


def written(folder: Path, *overrides: str) -> tuple[Path, list[Any]]:
    played = list(episodes(composed("offline", *overrides)))
    write_episodes(folder / FILE, [episode.get_state() for episode in played])
    return folder / FILE, played


PRUNE = ("env=prune_to_budget", "reward=negative_loss")


def test_a_file_of_episodes_holds_what_was_played(tmp_path: Path) -> None:
    path, played = written(tmp_path, *PRUNE, "by=knapsack", "episodes=3")
    seen, actions = read_episodes(path, played[0].observation_space.shape)
    assert len(seen) == len(actions) == sum(map(len, played)) > 3
    np.testing.assert_array_equal(seen[: len(played[0])], np.stack(played[0].get_observations())[:-1])
    features = seen.shape[1] - played[0].action_space.n
    assert (np.take_along_axis(seen[:, features:], actions[:, None], axis=1) > 0.5).all()  # each was legal
    assert all(episode.is_terminated for episode in played)


def test_an_episode_by_the_knapsack_drops_the_knapsacks_blocks() -> None:
    env = PruneToBudget(**environment_kwargs(composed("offline", *PRUNE, "by=knapsack")))
    env.reset(seed=0)
    (episode,) = episodes(composed("offline", *PRUNE, "by=knapsack", "episodes=1", "seed=0"))
    wanted = baselines(env.setting.model)["knapsack"][0](env.draw)
    assert set(episode.get_actions().tolist()) <= set(np.flatnonzero(wanted).tolist())


def test_an_episode_of_serving_adds_up_to_the_utility_of_its_policy() -> None:
    (episode,) = episodes(composed("offline", "by=dense", "episodes=1"))
    assert set(episode.get_actions().tolist()) == {0}
    assert -10.0 <= episode.get_return() <= 0.0


def test_a_plan_that_is_not_in_the_table_becomes_the_nearest_legal_one() -> None:
    setting = ServeSetting()
    names, legal = setting.actions.names, np.ones(len(setting.actions.plans), dtype=np.bool_)

    def named(**kwargs: Any) -> str:
        plan = static_plan(setting.model, **kwargs)
        return names[nearest_action(setting.actions, setting.model, plan, legal)]

    assert named(admit=8) == "drop 0, W4 0, queue 8"
    assert named(weight_bits=[4] * 30 + [16] * 2, admit=5) == "drop 0, W4 32, queue 4"
    assert named(drop_mha=[25, 27, 24], admit=100) == "drop 4, W4 0, queue 16"
    legal[names.index("drop 0, W4 0, queue 8")] = False
    assert named(admit=8) != "drop 0, W4 0, queue 8"


def test_what_is_no_file_of_episodes_or_no_policy_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"agents\.offline"):
        read_episodes(tmp_path / FILE, (3,))
    (tmp_path / FILE).write_bytes(b"nothing")
    with pytest.raises(ConfigError, match=r"agents\.offline"):
        read_episodes(tmp_path / FILE, (3,))
    path, _ = written(tmp_path, *PRUNE, "by=knapsack", "episodes=1")
    with pytest.raises(ConfigError, match="same env="):
        read_episodes(path, (3,))
    for overrides in (("by=densee",), (*PRUNE, "by=oracle"), (*PRUNE, "by=knapsak")):
        with pytest.raises(ConfigError, match="there is no such"):
            list(episodes(composed("offline", "episodes=1", *overrides)))


def test_episodes_of_a_cluster_are_refused_because_they_are_not_one_agents() -> None:
    with pytest.raises(ConfigError, match=r"env\.id is ServeCluster-v0; episodes are written of one agent"):
        list(episodes(composed("offline", "env=serve_cluster", "by=dense", "episodes=1")))


def test_training_can_begin_with_what_somebody_wrote(local_ray: None, tmp_path: Path) -> None:
    written(tmp_path, *PRUNE, "by=knapsack", "episodes=150")
    small = ["algorithm=ppo", "num_envs=8", "hidden=[64]", "algorithm.steps_an_iteration=512"]
    cfg = composed("train", *small, "imitate=offline", f"imitate.data={tmp_path}", "imitate.epochs=15")
    words = environment_kwargs(cfg)
    algorithm = build_algorithm(cfg)
    before = validation_utilities(cfg.env.id, words, current_network(algorithm, "relu")).mean()
    build(cfg.imitate)(algorithm, cfg.env.id, words, seed=0)
    after = validation_utilities(cfg.env.id, words, current_network(algorithm, "relu")).mean()
    algorithm.stop()
    assert after > before + 0.1


@pytest.mark.slow
def test_marwil_learns_from_written_episodes_alone(tmp_path: Path) -> None:
    written(tmp_path / "data", *PRUNE, "by=knapsack", "episodes=200")
    small = ["algorithm.batch=500", "algorithm.updates_an_iteration=100", "hidden=[64]", "validate_every=1"]
    words = ["algorithm=marwil", f"algorithm.data={tmp_path / 'data'}", "iterations=3", f"hydra.run.dir={tmp_path}"]
    run = subprocess.run(
        [sys.executable, "-m", "agents.train", *small, *words],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=580,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    about = json.loads((tmp_path / "best" / "policy.json").read_text(encoding="utf-8"))
    assert about["training"]["validation_utility"] > 0.15  # a random network has 0.04
