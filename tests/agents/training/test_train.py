"""Training: it learns, it goes on where it was killed, and every experiment of conf/experiment can be built."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import hydra
import numpy as np
import pandas as pd
import pytest
from omegaconf import DictConfig

from agents.envs.cluster import ClusterSetting
from agents.envs.serve import ServeCore, ServeSetting
from agents.envs.serve_windows import Window
from agents.evaluation.cluster import learned_cluster_policies, mean_cluster_utility
from agents.training.train import BUFFER, Checkpoints, build_algorithm, current_network, environment_kwargs, train
from agents.training.validation import validation_clusters, validation_utilities
from sim.config import CONF_DIR, build
from sim.errors import ConfigError
from sim.paths import REPOSITORY
from sim.policies.learned import read_learned

SMALL = ["num_envs=8", "hidden=[16]", "validate_every=1", "minutes=10"]
SMALL_PPO = ["algorithm=ppo", "algorithm.steps_an_iteration=256", "algorithm.minibatch=128", "algorithm.epochs=2"]
SMALL_DQN = ["algorithm=dqn", "algorithm.learning_starts=100", "algorithm.steps_an_update=64", "algorithm.batch=64"]


def composed(*overrides: str) -> DictConfig:
    with hydra.initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        return hydra.compose("train", overrides=[*SMALL, *overrides])


def trainings() -> list[str]:
    """The experiments whose first command is agents.train."""
    return sorted(
        path.stem
        for path in (CONF_DIR / "experiment").glob("*.yaml")
        if "agents.train " in path.read_text(encoding="utf-8").split("\ndefaults", 1)[0]
    )


def test_there_are_at_least_three_algorithms_to_train_with() -> None:
    kinds = {path.stem for path in (CONF_DIR / "algorithm").glob("*.yaml")}
    assert {"dqn", "double_dqn", "ppo"} <= kinds
    assert {"dqn_prune", "double_dqn_prune", "ppo_prune", "ppo_serve"} <= set(trainings())


@pytest.mark.parametrize("name", trainings())
def test_every_training_experiment_builds_its_algorithms_configuration(name: str) -> None:
    from agents.training.algorithms import Setup

    with hydra.initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        cfg = hydra.compose("train", overrides=[f"experiment={name}"])
    setup = Setup(
        env=f"agents.envs.registration:{cfg.env.id}",
        words=environment_kwargs(cfg),
        seed=0,
        num_envs=4,
        runners=0,
        hidden=(84, 84),
        activation="relu",
    )
    config = build(cfg.algorithm)(setup)
    config.validate()
    assert config.num_envs_per_env_runner == 4


def test_training_writes_its_progress_and_a_policy_that_sim_can_run_and_resumes(
    local_ray: None, tmp_path: Path
) -> None:
    first = train(composed(*SMALL_PPO, "iterations=2"), tmp_path)
    rows = pd.read_csv(tmp_path / "progress.csv")
    assert rows["iteration"].tolist() == [1, 2]
    assert rows["sample_seconds"].gt(0).all()
    assert rows["learn_seconds"].gt(0).all()
    policy = read_learned(tmp_path / "best" / "policy.json", "PruneToBudget")
    assert policy.about["training"]["validation_utility"] == pytest.approx(first, abs=1e-6)
    with pytest.raises(ConfigError, match="resume=true"):
        train(composed(*SMALL_PPO, "iterations=3"), tmp_path)
    best = train(composed(*SMALL_PPO, "iterations=3", "resume=true"), tmp_path)
    rows = pd.read_csv(tmp_path / "progress.csv")
    assert rows["iteration"].tolist() == [1, 2, 3]
    assert rows["env_steps"].is_monotonic_increasing
    assert best >= first
    assert [path.name for path in tmp_path.glob("checkpoint_*")] == ["checkpoint_000003"]


def test_a_resumed_dqn_has_its_replay_buffer_and_its_network_again(local_ray: None, tmp_path: Path) -> None:
    cfg = composed(*SMALL_DQN)
    algorithm = build_algorithm(cfg)
    for _ in range(4):
        algorithm.train()
    Checkpoints(tmp_path).save(algorithm, {"iteration": 4})
    stored = algorithm.local_replay_buffer.get_num_timesteps()
    network = current_network(algorithm, "relu")
    algorithm.stop()
    other = build_algorithm(cfg)
    assert other.local_replay_buffer.get_num_timesteps() == 0
    assert Checkpoints(tmp_path).restore(other)["iteration"] == 4
    assert other.local_replay_buffer.get_num_timesteps() == stored > 0
    again = current_network(other, "relu")
    other.stop()
    assert all((a == b).all() for a, b in zip(network.weights, again.weights, strict=True))


def test_imitating_the_knapsack_gives_a_useful_policy_at_once(local_ray: None) -> None:
    cfg = composed(*SMALL_PPO, "hidden=[64]", "imitate=knapsack", "imitate.draws=400", "imitate.epochs=6")
    words = environment_kwargs(cfg)
    algorithm = build_algorithm(cfg)
    before = validation_utilities(cfg.env.id, words, current_network(algorithm, "relu")).mean()
    build(cfg.imitate)(algorithm, cfg.env.id, words, seed=0)
    after = validation_utilities(cfg.env.id, words, current_network(algorithm, "relu")).mean()
    algorithm.stop()
    assert before < 0.15
    assert after > 0.25


def test_training_can_go_on_where_a_policy_ended_with_a_critic_that_knows_what_it_earns(
    local_ray: None, tmp_path: Path
) -> None:
    shipped = read_learned("learned_serve_llama2", "ServeTrace")
    sizes = [layer[0] for layer in shipped.about["layers"][:-1]]
    words = ["imitate=policy", "imitate.path=learned_serve_llama2", "imitate.windows=4", f"hidden={sizes}"]
    cfg = composed("experiment=ppo_serve", "num_envs=2", *words)
    algorithm = build_algorithm(cfg)
    begin = build(cfg.imitate, epochs=1, temperature=0.5), build(cfg.imitate, epochs=40)
    errors = [made(algorithm, cfg.env.id, environment_kwargs(cfg), seed=0) for made in begin]
    network = current_network(algorithm, "relu")
    features = np.random.default_rng(0).random((50, network.weights[0].shape[1])).astype(np.float32)
    np.testing.assert_allclose(network(features), shipped.network(features), rtol=1e-4, atol=1e-4)
    assert errors[1] < errors[0]
    algorithm.stop()
    small = composed("experiment=ppo_serve", "num_envs=2", "hidden=[16]", *words[:3])
    other = build_algorithm(small)
    with pytest.raises(ConfigError, match="its layers are"):
        build(small.imitate)(other, small.env.id, environment_kwargs(small), seed=0)
    other.stop()


def test_training_stops_once_validation_has_not_got_better_for_long(local_ray: None, tmp_path: Path) -> None:
    train(composed(*SMALL_PPO, "patience=2", "min_gain=10.0", "iterations=9"), tmp_path)
    rows = pd.read_csv(tmp_path / "progress.csv")
    assert rows["iteration"].tolist() == [1, 2, 3]  # the first is better than nothing, the next two are not


def test_a_cluster_that_does_not_answer_is_an_error_that_names_its_address(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "agents.train", "ray.address=127.0.0.1:1", f"hydra.run.dir={tmp_path}"],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1", "RAY_gcs_rpc_server_reconnect_timeout_s": "1"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert run.returncode == 2
    assert "no Ray cluster answers at address=127.0.0.1:1" in run.stderr


def test_training_to_serve_begins_with_the_plan_that_it_is_told(local_ray: None) -> None:
    small = ["num_envs=2", "imitate.windows=2", "imitate.batch=32", "imitate.lr=0.01", "imitate.share=0.9"]
    cfg = composed("experiment=ppo_serve", *small)
    words = environment_kwargs(cfg)
    algorithm = build_algorithm(cfg)
    build(cfg.imitate)(algorithm, cfg.env.id, words, seed=0)
    network = current_network(algorithm, "relu")
    with pytest.raises(ConfigError, match="there is no 'drop everything'"):
        build(cfg.imitate)(algorithm, cfg.env.id, words, seed=0, plan="drop everything")
    algorithm.stop()
    core = ServeCore(ServeSetting(**kwargs))
    core.begin(Window(source="burst", start_s=300.0, rate=1.0, budget="full", budget_seed=0))
    features = core.setting.table.features
    seen = core.observe()
    assert core.setting.actions.names[int(network.act(seen[:features], seen[features:] > 0.5))] == cfg.imitate.plan


def test_training_in_clusters_begins_with_the_policy_of_one_replica_and_exports_one_for_each(
    local_ray: None, tmp_path: Path
) -> None:
    small = [
        "num_envs=4",
        "hidden=[84,84]",
        "imitate.windows=1",
        "imitate.epochs=1",
        "env.kwargs.replicas=2",
        "env.kwargs.sources=[burst]",
    ]
    cfg = composed("experiment=ppo_cluster", *SMALL_PPO, *small, "iterations=1", "algorithm.lr=0.0")
    reached = train(cfg, tmp_path)
    policy = read_learned(tmp_path / "best" / "policy.json", "ServeCluster")
    begun = read_learned("learned_serve_llama2", "ServeTrace").network
    features = begun.weights[0].shape[1]
    np.testing.assert_array_equal(policy.network.weights[0][:, :features], begun.weights[0])
    assert not policy.network.weights[0][:, features:].any()
    assert policy.about["environment"]["replicas"] == 2
    setting = ClusterSetting(**{**policy.about["environment"], "split": "validation"})
    (build_one,) = learned_cluster_policies([tmp_path / "best" / "policy.json"])
    assert mean_cluster_utility(setting, validation_clusters(setting), build_one) == pytest.approx(reached, abs=1e-3)


def _driver(folder: Path, *more: str) -> list[str]:
    overrides = [*SMALL, *SMALL_DQN, "checkpoint_minutes=0", "iterations=400", f"hydra.run.dir={folder}", *more]
    return [sys.executable, "-m", "agents.train", *overrides]


@pytest.mark.slow
def test_a_training_killed_with_signal_9_goes_on_at_its_last_checkpoint(tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    killed = subprocess.Popen(_driver(tmp_path), cwd=REPOSITORY, env=environment, start_new_session=True)
    pointer = tmp_path / "checkpoint.json"
    limit_s = time.monotonic() + 180
    while not (pointer.exists() and json.loads(pointer.read_text())["iteration"] >= 5):
        assert time.monotonic() < limit_s
        assert killed.poll() is None
        time.sleep(0.2)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    noted = json.loads(pointer.read_text())
    reached = noted["iteration"]
    assert (tmp_path / noted["checkpoint"] / BUFFER).stat().st_size > 1000
    done: Any = subprocess.run(
        _driver(tmp_path, "resume=true", f"iterations={reached + 3}"),
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"resumed at iteration {reached}" in done.stdout
    rows = pd.read_csv(tmp_path / "progress.csv")
    assert rows["iteration"].tolist() == list(range(1, reached + 4))
    assert rows["env_steps"].is_monotonic_increasing
    assert rows["best_utility"].is_monotonic_increasing
