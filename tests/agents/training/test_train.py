"""Training: it learns, it resumes after being killed, and every training experiment of conf/experiment builds."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from omegaconf import DictConfig, OmegaConf

from agents.envs.cluster import ClusterSetting
from agents.envs.roles import RolesSetting
from agents.envs.serve import ServeCore, ServeSetting
from agents.envs.serve_windows import Window
from agents.evaluation.cluster import learned_cluster_policies, mean_cluster_utility
from agents.training.checkpoints import BUFFER, Checkpoints
from agents.training.demonstrations import phase_demonstrations
from agents.training.export import export_network
from agents.training.modules import actor_logits, learner_module
from agents.training.progress import COLUMNS, Progress
from agents.training.train import build_algorithm, current_network, environment_kwargs, limit_share, train
from agents.training.validation import CountedActs, validation_clusters, validation_systems
from sim.config import CONF_DIR, build
from sim.disaggregate.learned_roles import learned_roles
from sim.errors import ConfigError
from sim.paths import REPOSITORY
from sim.policies.base import PolicyContext
from sim.policies.learned import Network, read_learned
from sim.policies.learned_serve import learned_serve
from tests.agents.helpers import composed, run_module, utilities_around_imitation

BURST = Window(source="burst", start_s=300.0, rate=1.0, budget="cotenant", budget_seed=4)
SMALL = ["num_envs=8", "hidden=[16]", "validate_every=1", "minutes=10"]
SMALL_PPO = ["algorithm=ppo", "algorithm.steps_an_iteration=256", "algorithm.minibatch=128", "algorithm.epochs=2"]
SMALL_DQN = ["algorithm=dqn", "algorithm.learning_starts=100", "algorithm.steps_an_update=64", "algorithm.batch=64"]


def small(*overrides: str) -> DictConfig:
    """The configuration of a small training."""
    return composed("train", *SMALL, *overrides)


def trainings() -> list[str]:
    """The names of the experiments whose first command is agents.train."""
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

    cfg = composed("train", f"experiment={name}")
    setup = Setup(
        env=f"agents.envs.registration:{cfg.env.id}",
        env_kwargs=environment_kwargs(cfg),
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
    first = train(small(*SMALL_PPO, "iterations=2"), tmp_path)
    rows = pd.read_csv(tmp_path / "progress.csv")
    assert rows["iteration"].tolist() == [1, 2]
    assert rows["sample_seconds"].gt(0).all()
    assert rows["learn_seconds"].gt(0).all()
    policy = read_learned(tmp_path / "best" / "policy.json", "PruneToBudget")
    assert policy.about["training"]["validation_utility"] == pytest.approx(first, abs=1e-6)
    with pytest.raises(ConfigError, match="resume=true"):
        train(small(*SMALL_PPO, "iterations=3"), tmp_path)
    best = train(small(*SMALL_PPO, "iterations=3", "resume=true"), tmp_path)
    rows = pd.read_csv(tmp_path / "progress.csv")
    assert rows["iteration"].tolist() == [1, 2, 3]
    assert rows["env_steps"].is_monotonic_increasing
    assert best >= first
    assert [path.name for path in tmp_path.glob("checkpoint_*")] == ["checkpoint_000003"]


def test_a_resumed_dqn_has_the_same_replay_buffer_and_network(local_ray: None, tmp_path: Path) -> None:
    cfg = small(*SMALL_DQN)
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
    restored = current_network(other, "relu")
    other.stop()
    assert all((a == b).all() for a, b in zip(network.weights, restored.weights, strict=True))


SMALL_SERVE = ["experiment=ppo_serve", "imitate.windows=2", "imitate.epochs=1", *SMALL_PPO[1:]]


def test_a_training_on_sessions_with_a_prefix_cache_writes_a_policy_for_them(
    local_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agents.training.validation.VALIDATION_WINDOWS", 2)
    sessions = ["env.kwargs.sources=[chats]", "+env.kwargs.prefix_caching=true", "env.kwargs.load=[1.0,1.0]"]
    best = train(small(*SMALL_SERVE, "num_envs=4", *sessions, "iterations=2"), tmp_path)
    rows = pd.read_csv(tmp_path / "progress.csv")
    assert rows["iteration"].tolist() == [1, 2]
    assert 0.0 < best <= 1.0
    about = read_learned(tmp_path / "best" / "policy.json", "ServeTrace").about
    assert about["environment"]["sources"] == ["chats"]


KNOBS = (
    "env.kwargs.actions.drops=[0,2]",
    "env.kwargs.actions.runs=[null]",
    "+env.kwargs.actions.kv_bits=[16,8]",
    "+env.kwargs.actions.streamed=[0,4]",
    "+env.kwargs.actions.ffn_width=[8,7]",
    "+env.kwargs.actions.kv_compression=[null,{method:ada_kv,percent:70}]",
    "env.kwargs.quality=llama2_7b_transferred",
    "imitate=none",
)


def test_a_policy_that_chooses_from_every_knob_can_be_read_and_run(
    local_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agents.training.validation.VALIDATION_WINDOWS", 2)
    cfg = small("experiment=ppo_serve", *SMALL_PPO[1:], "num_envs=4", *KNOBS, "iterations=1")
    train(cfg, tmp_path)
    setting = ServeSetting(**environment_kwargs(cfg))
    policy = learned_serve(PolicyContext.of(setting.server), path=str(tmp_path / "best" / "policy.json"))
    engine = setting.build_engine(BURST, policy.first_plan)
    assert policy(engine.run_until(1.0)) in setting.actions.plans


def test_a_critic_with_foresight_trains_a_policy_that_needs_none(
    local_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agents.training.validation.VALIDATION_WINDOWS", 2)
    cfg = small(*SMALL_SERVE, "num_envs=4", "algorithm.foresight=true", "iterations=2")
    train(cfg, tmp_path)
    assert pd.read_csv(tmp_path / "progress.csv")["critic_explained"].between(-5.0, 1.0).all()
    learned = read_learned(tmp_path / "best" / "policy.json", "ServeTrace")
    setting = ServeSetting(**environment_kwargs(cfg))
    assert learned.network.inputs == setting.table.features
    assert "foresight" not in learned.about["environment"]
    assert learned.about["training"]["algorithm"]["foresight"] is True
    policy = learned_serve(PolicyContext.of(setting.server), path=str(tmp_path / "best" / "policy.json"))
    engine = setting.build_engine(BURST, policy.first_plan)
    assert policy(engine.run_until(1.0)) in setting.actions.plans


@pytest.mark.parametrize(
    ("overrides", "count"),
    [(SMALL_PPO, 3), ([*SMALL_DQN, "imitate=knapsack", "imitate.loads=20"], 4), (SMALL_SERVE, 2)],
    ids=["ppo", "dqn", "serve"],
)
def test_law_9_a_training_that_resumes_equals_the_unbroken_one(
    local_ray: None, tmp_path: Path, overrides: list[str], count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agents.training.validation.VALIDATION_WINDOWS", 2)
    results = []
    for name, parts in (("unbroken", [count]), ("broken", range(1, count + 1))):
        for part, iterations in enumerate(parts):
            more = ["resume=true"] if part else []
            train(small(*overrides, "num_envs=4", f"iterations={iterations}", *more), tmp_path / name)
        rows = pd.read_csv(tmp_path / name / "progress.csv").drop(
            columns=["seconds", "sample_seconds", "learn_seconds"]
        )
        results.append((rows, (tmp_path / name / "best" / "policy.safetensors").read_bytes()))
    pd.testing.assert_frame_equal(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]


def test_a_row_that_a_killed_run_cut_and_a_column_of_later_versions_do_not_stop_a_resume(tmp_path: Path) -> None:
    progress = Progress(tmp_path / "progress.csv")
    progress.path.write_text("iteration,seconds,env_steps,episode_return\n1,2.0,3,4.0\n2,2.5,4,5.0\n3,2.")
    progress.rewind(2)
    rows = pd.read_csv(progress.path)
    assert list(rows.columns) == list(COLUMNS)
    assert rows["iteration"].tolist() == [1, 2]
    assert rows["top_action_share"].isna().all()


def test_a_network_that_always_chooses_one_action_is_reported_as_such(capsys: pytest.CaptureFixture[str]) -> None:
    weights = np.zeros((3, 2), np.float32), np.array([0.0, 1.0, 0.0], np.float32)
    acts = CountedActs(Network((weights[0],), (weights[1],)))
    acts(np.zeros((5, 2), np.float32), np.ones((5, 3), np.bool_))
    assert acts.top_share == 1.0
    acts(np.zeros((5, 2), np.float32), np.array([[True, False, False]] * 5))
    assert acts.top_share == 0.5
    row = dict.fromkeys(COLUMNS, 1.0) | {"iteration": 1, "env_steps": 2}
    Progress(Path("unused")).print(row)
    assert "one action in every decision" in capsys.readouterr().out


@pytest.mark.parametrize("overrides", [SMALL_PPO, [*SMALL_DQN, "reward=utility_shaped"]], ids=["ppo", "dqn"])
def test_imitating_the_knapsack_gives_a_useful_policy_before_any_training(
    local_ray: None, overrides: list[str]
) -> None:
    cfg = small(*overrides, "hidden=[64]", "imitate=knapsack", "imitate.loads=400", "imitate.epochs=6")
    before, after = utilities_around_imitation(cfg)
    assert before < 0.15
    assert after > 0.2  # many of its masks lie outside the fitted range, and are charged the upper bound


def test_training_can_start_from_a_policy_with_a_critic_fitted_to_its_returns(local_ray: None, tmp_path: Path) -> None:
    first_cfg = small("experiment=ppo_serve", "num_envs=2", "hidden=[24,12]", "seed=5")
    first, path = build_algorithm(first_cfg), tmp_path / "first.json"
    status = {"iteration": 0, "seconds": 0.0}
    export_network(path, current_network(first, "relu"), first_cfg, environment_kwargs(first_cfg), status, 0.5)
    first.stop()
    shipped = read_learned(path, "ServeTrace")
    assert shipped.network.heads is not None
    overrides = ["imitate=policy", f"imitate.path={path}", "imitate.windows=4", "hidden=[24,12]"]
    cfg = small("experiment=ppo_serve", "num_envs=2", *overrides)
    algorithm = build_algorithm(cfg)
    imitations = build(cfg.imitate, epochs=1, temperature=0.5), build(cfg.imitate, epochs=40)
    errors = [imitate(algorithm, cfg.env.id, environment_kwargs(cfg), seed=0) for imitate in imitations]
    network = current_network(algorithm, "relu")
    features = np.random.default_rng(0).random((50, network.weights[0].shape[1])).astype(np.float32)
    np.testing.assert_allclose(network(features), shipped.network(features), rtol=1e-4, atol=1e-4)
    assert errors[1] < errors[0]
    algorithm.stop()
    other_cfg = small("experiment=ppo_serve", "num_envs=2", "hidden=[16]", *overrides[:3])
    other = build_algorithm(other_cfg)
    with pytest.raises(ConfigError, match="its layers are"):
        build(other_cfg.imitate)(other, other_cfg.env.id, environment_kwargs(other_cfg), seed=0)
    other.stop()


def test_training_stops_after_patience_validations_without_a_gain(local_ray: None, tmp_path: Path) -> None:
    train(small(*SMALL_PPO, "patience=2", "min_gain=10.0", "iterations=9"), tmp_path)
    rows = pd.read_csv(tmp_path / "progress.csv")
    assert rows["iteration"].tolist() == [
        1,
        2,
        3,
    ]  # the first validation is always the best so far, the next two are not


@pytest.mark.slow
def test_a_quiet_training_prints_its_results_alone(tmp_path: Path) -> None:
    small = ("num_envs=4", "hidden=[16]", "algorithm.steps_an_iteration=256", "algorithm.minibatch=128")
    arguments = ("experiment=ppo_prune", "iterations=1", *small, f"hydra.run.dir={tmp_path / 'run'}", "--quiet")
    run = run_module("agents.train", *arguments, RAY_AUTH_MODE="disabled")
    assert run.returncode == 0, run.stderr
    assert run.stderr == ""
    assert run.stdout.splitlines()[-1].startswith("best validation utility ")


def test_a_cluster_that_does_not_answer_is_an_error_that_names_its_address(tmp_path: Path) -> None:
    run = run_module(
        "agents.train",
        "ray.address=127.0.0.1:1",
        f"hydra.run.dir={tmp_path}",
        timeout_s=200,
        RAY_gcs_rpc_server_reconnect_timeout_s="1",
    )
    assert run.returncode == 2
    assert "no Ray cluster answers at address=127.0.0.1:1" in run.stderr


def test_training_can_start_with_one_plan_of_the_table(local_ray: None) -> None:
    overrides = ["num_envs=2", "imitate.windows=2", "imitate.batch=32", "imitate.lr=0.01", "imitate.share=0.9"]
    cfg = small("experiment=ppo_serve", *overrides)
    env_kwargs = environment_kwargs(cfg)
    algorithm = build_algorithm(cfg)
    build(cfg.imitate)(algorithm, cfg.env.id, env_kwargs, seed=0)
    network = current_network(algorithm, "relu")
    with pytest.raises(ConfigError, match="there is no plan 'drop everything'"):
        build(cfg.imitate)(algorithm, cfg.env.id, env_kwargs, seed=0, plan="drop everything")
    algorithm.stop()
    core = ServeCore(ServeSetting(**env_kwargs))
    core.begin(Window(source="burst", start_s=300.0, rate=1.0, budget="full", budget_seed=0))
    features = core.setting.table.features
    observation = core.observe()
    action = int(network.act(observation[:features], observation[features:] > 0.5))
    assert core.setting.actions.names[action] == cfg.imitate.plan


def test_training_in_clusters_starts_from_the_policy_of_one_replica_and_exports_a_policy_for_each(
    local_ray: None, tmp_path: Path
) -> None:
    overrides = [
        "num_envs=4",
        "hidden=[128,128]",
        "imitate.windows=1",
        "imitate.epochs=1",
        "env.kwargs.replicas=2",
        "env.kwargs.sources=[burst]",
    ]
    cfg = small("experiment=ppo_cluster", *SMALL_PPO, *overrides, "iterations=1", "algorithm.lr=0.0", "seed=3")
    utility = train(cfg, tmp_path)
    policy = read_learned(tmp_path / "best" / "policy.json", "ServeCluster")
    shipped = read_learned("learned_serve_llama2", "ServeTrace").network.member(3)
    features = shipped.weights[0].shape[1]
    np.testing.assert_array_equal(policy.network.weights[0][:, :features], shipped.weights[0])
    assert not policy.network.weights[0][:, features:].any()
    assert policy.about["environment"]["replicas"] == 2
    setting = ClusterSetting(**{**policy.about["environment"], "split": "validation"})
    (build_one,) = learned_cluster_policies([tmp_path / "best" / "policy.json"])
    assert mean_cluster_utility(setting, validation_clusters(setting), build_one) == pytest.approx(utility, abs=1e-3)


def test_a_checkpoint_before_the_first_validation_can_be_resumed(local_ray: None, tmp_path: Path) -> None:
    limits = ["validate_every=3", "checkpoint_minutes=0"]
    cfg = small("experiment=ppo_prune", *SMALL_PPO, *limits, "iterations=2")
    saved: list[float] = []
    with pytest.MonkeyPatch.context() as patch:
        save = Checkpoints.save
        patch.setattr(Checkpoints, "save", lambda *args: (save(*args), saved.append(args[2]["best"])))
        train(cfg, tmp_path)
    assert saved[0] < 0.0 <= saved[1]  # the last iteration validates
    assert read_learned(tmp_path / "best" / "policy.json", "PruneToBudget").network.actions == 60


ROLES = [
    "num_envs=2",
    "hidden=[16]",
    "env.kwargs.replicas=3",
    "env.kwargs.prefill=1",
    "env.kwargs.traffic=[{gamma_code: 1, gamma: 1}]",
    "env.kwargs.tick_s=20.0",
    "imitate.episodes=4",
    "imitate.epochs=400",
    "imitate.batch=16",
    "imitate.counts={gamma_code: 2, gamma: 1}",
]


def test_roles_are_learned_from_a_teacher_and_run_in_numpy_as_in_torch(local_ray: None, tmp_path: Path) -> None:
    small_ppo = ["algorithm.steps_an_iteration=12", "algorithm.minibatch=12", "algorithm.epochs=1"]
    cfg = composed("train", "experiment=ppo_roles", *ROLES, *small_ppo, "iterations=1", "minutes=10")
    utility = train(cfg, tmp_path)
    path = tmp_path / "best" / "policy.json"
    policy = read_learned(path, "ServeRoles")
    assert policy.about["training"]["validation_utility"] == pytest.approx(utility, abs=1e-6)
    assert "plans" not in policy.about
    env_kwargs = environment_kwargs(cfg)
    setting = RolesSetting(**{**env_kwargs, "split": "validation"})
    systems = [setting.build_system(one, roles=learned_roles(path=str(path))) for one in validation_systems(setting)]
    for system in systems:
        system.run()
    played = [setting.earned(system, len(system.trace)) for system in systems]
    assert np.mean(played) == pytest.approx(utility, abs=1e-6)

    algorithm = build_algorithm(cfg)
    build(cfg.imitate)(algorithm, cfg.env.id, env_kwargs, seed=0)
    network, module = current_network(algorithm, "tanh"), learner_module(algorithm)
    rng = np.random.default_rng(0)
    rows = np.concatenate([rng.random((50, network.inputs)), np.ones((50, 2))], axis=1).astype(np.float32)
    with torch.no_grad():
        logits = actor_logits(module, torch.from_numpy(rows)).numpy()
    np.testing.assert_allclose(network(rows[:, : network.inputs]), logits, rtol=1e-4, atol=1e-4)
    observations, targets, returns = phase_demonstrations(
        env_kwargs, seed=0, counts=cfg.imitate.counts, share=0.9, episodes=4, discount=0.95
    )
    assert len(observations) == len(targets) == len(returns) == 4 * (setting.ticks - 1)
    assert targets.sum(axis=1) == pytest.approx(1.0)
    chosen = network.act(observations[:, : network.inputs], observations[:, network.inputs :] > 0.5)
    assert (chosen == targets.argmax(axis=1)).mean() > 0.7
    with pytest.raises(ConfigError, match=r"imitate\.counts has 3 for gamma"):
        build(cfg.imitate)(algorithm, cfg.env.id, env_kwargs, seed=0, counts={"gamma_code": 2, "gamma": 3})
    algorithm.stop()


def dqn_overrides(folder: Path, *more: str) -> list[str]:
    return [*SMALL, *SMALL_DQN, "checkpoint_minutes=0", "iterations=400", f"hydra.run.dir={folder}", *more]


@pytest.mark.slow
def test_a_training_killed_with_signal_9_resumes_at_its_last_checkpoint(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "agents.train", *dqn_overrides(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    killed = subprocess.Popen(command, cwd=REPOSITORY, env=environment, start_new_session=True)
    pointer = tmp_path / "checkpoint.json"
    limit_s = time.monotonic() + 180
    while not (pointer.exists() and json.loads(pointer.read_text())["iteration"] >= 5):
        assert time.monotonic() < limit_s
        assert killed.poll() is None
        time.sleep(0.2)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    status = json.loads(pointer.read_text())
    reached = status["iteration"]
    assert (tmp_path / status["checkpoint"] / BUFFER).stat().st_size > 1000
    overrides = dqn_overrides(tmp_path, "resume=true", f"iterations={reached + 3}")
    done = run_module("agents.train", *overrides, timeout_s=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"resumed at iteration {reached}" in done.stdout
    rows = pd.read_csv(tmp_path / "progress.csv")
    assert rows["iteration"].tolist() == list(range(1, reached + 4))
    assert rows["env_steps"].is_monotonic_increasing
    assert rows["best_utility"].is_monotonic_increasing


def test_progress_counts_towards_the_limit_that_ends_the_training_first() -> None:
    limits = OmegaConf.create({"minutes": 10.0, "iterations": 6})
    assert limit_share(limits, {"seconds": 12.0, "iteration": 3}) == 0.5
    assert limit_share(limits, {"seconds": 450.0, "iteration": 3}) == 0.75
    assert limit_share(limits, {"seconds": 700.0, "iteration": 5}) == 1.0
    limits.iterations = None
    assert limit_share(limits, {"seconds": 60.0, "iteration": 3}) == 0.1
