"""Values of a training are checked before Ray starts, and a resumed training keeps the values it began with."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import pytest
from hydra.utils import get_method
from omegaconf import OmegaConf

from agents.training.checkpoints import Checkpoints
from agents.training.checks import VALUES, check_resumed, check_training
from agents.training.train import train, without_none
from sim.config import CONF_DIR
from sim.errors import ConfigError, RapLabError
from sim.results.run_folder import write_json, write_text
from tests.agents.helpers import composed, run_module
from tests.agents.training.test_train import trainings

BURST = "env.kwargs.sources=[burst]"  # needs no published trace


@pytest.mark.parametrize("name", [name for name in trainings() if name not in ("finetune_serve", "marwil_serve")])
def test_every_training_experiment_passes_the_checks(name: str) -> None:
    check_training(
        composed("train", f"experiment={name}", "env.kwargs.sources=[burst]" if "cluster" in name else "++a=1")
    )


@pytest.mark.parametrize("name", sorted(VALUES))
def test_every_key_of_a_target_has_its_allowed_values(name: str) -> None:
    passed = {"setup", "algorithm", "env", "env_kwargs", "seed"}
    assert set(inspect.signature(get_method(name)).parameters) - passed == set(VALUES[name])


def test_every_algorithm_and_imitation_of_conf_passes_the_checks_of_its_values() -> None:
    for path in [*(CONF_DIR / "algorithm").glob("*.yaml"), *(CONF_DIR / "imitate").glob("*.yaml")]:
        node = OmegaConf.to_container(OmegaConf.create({"seed": 0, "x": OmegaConf.load(path)}), resolve=True)
        assert isinstance(node, dict)
        values = node["x"]
        for key, (check, allowed) in VALUES[values["_target_"]].items():
            assert check(values[key]), f"{path.name}: {key}, {allowed}"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("algorithm.lr=fast", "algorithm.lr is 'fast'"),
        ("algorithm.lr=-1e-3", "algorithm.lr is -0.001"),
        ("algorithm.lr=nan", "algorithm.lr is nan"),
        ("algorithm.lr=[[5,0.1]]", "algorithm.lr is"),
        ("algorithm.lr=[[0,0.1],[0,0.2]]", "algorithm.lr is"),
        ("algorithm.lr=[[0,fast]]", "algorithm.lr is"),
        ("algorithm.lr=null", "algorithm.lr is None"),
        ("algorithm.discount=1.5", "algorithm.discount is 1.5; it must be a number from 0 to 1"),
        ("algorithm.gae_lambda=2", "algorithm.gae_lambda"),
        ("algorithm.minibatch=0", "algorithm.minibatch is 0"),
        ("algorithm.minibatch=1.5", "algorithm.minibatch is 1.5"),
        ("algorithm.minibatch=100000", "algorithm.minibatch is 100000, but algorithm.steps_an_iteration is only 8192"),
        ("algorithm.epochs=true", "algorithm.epochs is True"),
        ("+algorithm.gamma=0.9", "there is no key algorithm.gamma"),
        ("minutes=0", "minutes is 0"),
        ("iterations=0", "iterations is 0"),
        ("num_envs=0", "num_envs is 0"),
        ("hidden=[0]", r"hidden is \[0\]"),
        ("activation=relou", "activation is 'relou'; it must be one of relu, tanh"),
        ("validate_every=0", "validate_every is 0"),
        ("seed=-1", "seed is -1"),
        ("ray.runners=-1", "ray.runners is -1"),
        ("env.id=Chess-v0", "env.id is 'Chess-v0'"),
        ("env.kwargs.model=llama9", "llama9"),
        ("env.kwargs.sequence=0", "sequence is 0"),
        ("+env.kwargs.colour=1", "env.kwargs or reward do not fit"),
        ("+env.kwargs.split=test", "env.kwargs.split is 'test'; policies learn from the split train alone"),
        ("reward.discount=2", "reward.discount is 2"),
        ("+reward.colour=1", "env.kwargs or reward do not fit"),
    ],
)
def test_a_value_out_of_range_is_an_error_that_says_what_is_allowed(override: str, message: str) -> None:
    with pytest.raises(RapLabError, match=message) as caught:
        check_training(composed("train", override))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["experiment=dqn_prune", "algorithm.epsilon=[[0,2.0]]"], "algorithm.epsilon"),
        (["experiment=dqn_prune", "algorithm.n_step=4"], "algorithm.n_step is 4; it must be 1, 2 or 3"),
        (
            ["experiment=dqn_prune", "algorithm.n_step=3", "num_envs=128"],
            r"n_step is 3, but each of num_envs=128 .*takes 2",
        ),
        (["experiment=dqn_knapsack", "imitate.margin_weight=-1"], "imitate.margin_weight is -1"),
        (["experiment=dqn_prune", "algorithm.tau=0"], "algorithm.tau is 0; it must be a number above 0, at most 1"),
        (["experiment=dqn_prune", "algorithm.batch=200000"], "buffer_steps is only 100000"),
        (["experiment=ppo_serve", "imitate.share=0"], "imitate.share is 0"),
        (
            ["experiment=ppo_serve", "imitate.plan=drop everything"],
            "imitate.plan: there is no plan 'drop everything'",
        ),
        (["experiment=ppo_serve", "env.kwargs.tick_s=soon"], "tick_s|do not fit"),
        (["experiment=ppo_serve", "env.kwargs.sources=[bust]"], "did you mean 'burst'"),
        (["experiment=finetune_serve", BURST, "imitate.path=nowhere"], "no learned policy 'nowhere'"),
        (
            ["experiment=finetune_serve", BURST, "imitate.path=runs/none/policy.json"],
            r"there is no .*runs/none/policy\.json; a clone of the same seed writes it \(python -m agents\.clone",
        ),
        (
            ["experiment=finetune_serve", BURST, "imitate.path=learned_replica_llama2", "hidden=[16]"],
            r"hidden is \[16\], but",
        ),
        (
            ["experiment=finetune_serve", BURST, "imitate.path=learned_replica_llama2", "hidden=[84,84]"],
            r"chooses from 24 plans, and this training from 216, of which some differ; set env\.kwargs\.actions",
        ),
        (["experiment=ppo_cluster", BURST, "imitate.member=null"], "averages 10 networks; .* imitate.member=0 to 9"),
        (
            ["experiment=ppo_cluster", BURST, "seed=10"],
            "imitate.member is 10, but .* has 10 networks; set imitate.member=0 to 9",
        ),
        (["experiment=ppo_cluster", BURST, "imitate.member=-1"], "imitate.member is -1; it must be the number"),
        (["experiment=ppo_serve", "+env.kwargs.foresight=true"], "set algorithm.foresight=true in its place"),
        (["experiment=ppo_cluster", BURST, "+env.kwargs.foresight=true"], "for a critic alone; leave it out"),
        (["experiment=ppo_prune", "algorithm.foresight=true"], "algorithm.foresight is for env=serve_trace"),
        (
            ["experiment=ppo_serve", "imitate=offline", "algorithm.foresight=true"],
            "recorded episodes .imitate.data. do not say what came",
        ),
        (["experiment=marwil_serve", "algorithm.data=nowhere"], r"agents\.offline"),
        (["experiment=ppo_cluster", BURST, "num_envs=7"], "a multiple of env.kwargs.replicas, 4"),
    ],
)
def test_what_a_training_starts_from_is_checked_too(overrides: list[str], message: str) -> None:
    with pytest.raises(RapLabError, match=message):
        check_training(composed("train", *overrides))


def test_the_command_refuses_a_value_without_starting_ray(tmp_path: Path) -> None:
    run = run_module("agents.train", "algorithm.clip=-1", f"hydra.run.dir={tmp_path}")
    assert run.returncode == 2
    assert run.stderr.strip().splitlines() == ["error: algorithm.clip is -1; it must be a number above 0"]


def began(folder: Path, *overrides: str) -> Path:
    """A run folder with a checkpoint, of a training that began with these values."""
    write_text(folder / "config.yaml", OmegaConf.to_yaml(composed("train", *overrides), resolve=True))
    write_json(Checkpoints(folder).pointer, {"iteration": 3, "checkpoint": "checkpoint_000003"})
    return folder


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("hidden=[32,32]", r"hidden is \[32, 32\], but the run began with \[84, 84\]"),
        ("seed=1", "seed is 1, but the run began with 0"),
        ("algorithm.lr=0.5", r"algorithm.lr is 0.5, but the run began with \[\[0, 0.001\]"),
        ("algorithm=dqn", "algorithm._target_ is 'agents.training.algorithms.dqn', but"),
        ("env.kwargs.hide=[kept]", r"env.kwargs.hide is \['kept'\], but the run began with \[\]"),
        ("env.kwargs.scores=true", "env.kwargs.scores is True, but the run began with False"),
        ("reward=utility", "reward.kind is 'utility', but the run began with 'negative_loss'"),
        ("activation=tanh", "activation is 'tanh', but the run began with 'relu'"),
        ("num_envs=8", "num_envs is 8, but the run began with 64"),
        ("+env.kwargs.split=train", "env.kwargs.split is 'train', but the run began without it"),
        ("~env.kwargs.hide", r"env.kwargs.hide is not set, but the run began with \[\]"),
        ("imitate=knapsack", "imitate is 'agents.training.imitate.imitate_knapsack', but the run began with None"),
    ],
)
def test_a_resumed_training_with_another_value_is_refused_and_both_are_named(
    tmp_path: Path, override: str, message: str
) -> None:
    cfg = composed("train", override, "resume=true")
    with pytest.raises(ConfigError, match=f"cannot resume: .*{message}"):
        train(cfg, began(tmp_path))


@pytest.mark.parametrize("experiment", ["ppo_cluster", "dqn_knapsack", "ppo_roles"])
def test_every_experiment_can_start_without_imitation(experiment: str) -> None:
    cfg = without_none(composed("train", f"experiment={experiment}", "imitate=none"))
    assert cfg.imitate is None
    check_training(OmegaConf.merge(cfg, {"env": {"kwargs": {"sources": ["burst"]}}} if "cluster" in experiment else {}))
    left = composed("train", f"experiment={experiment}")
    assert without_none(left) is left


def test_limits_may_change_when_a_training_resumes(tmp_path: Path) -> None:
    changed = ["minutes=99", "iterations=7", "patience=3", "validate_every=2", "checkpoint_minutes=3", "ray.runners=2"]
    check_resumed(composed("train", "resume=true", *changed), began(tmp_path))


def test_a_run_that_began_before_there_was_foresight_resumes_without_it(tmp_path: Path) -> None:
    cfg = OmegaConf.to_container(composed("train", "experiment=ppo_serve"), resolve=True)
    assert isinstance(cfg, dict)
    del cfg["algorithm"]["foresight"]
    write_text(tmp_path / "config.yaml", json.dumps(cfg))
    check_resumed(composed("train", "experiment=ppo_serve"), tmp_path)
    with pytest.raises(ConfigError, match=r"algorithm.foresight is True, but the run began with False"):
        check_resumed(composed("train", "experiment=ppo_serve", "algorithm.foresight=true"), tmp_path)


def test_a_dqn_that_began_before_updates_kept_a_margin_resumes_without_it(tmp_path: Path) -> None:
    cfg = OmegaConf.to_container(composed("train", "experiment=dqn_knapsack"), resolve=True)
    assert isinstance(cfg, dict)
    del cfg["imitate"]["margin_weight"]
    write_text(tmp_path / "config.yaml", json.dumps(cfg))
    check_resumed(composed("train", "experiment=dqn_knapsack", "imitate.margin_weight=0"), tmp_path)
    with pytest.raises(ConfigError, match=r"imitate.margin_weight is 1.0, but the run began with 0.0"):
        check_resumed(composed("train", "experiment=dqn_knapsack"), tmp_path)


def test_an_algorithm_of_ones_own_may_have_returns_of_any_length() -> None:
    mine = ("algorithm._target_=mine.dqn", "algorithm.n_step=50", "~algorithm.steps_an_update")
    check_training(composed("train", "experiment=dqn_prune", *mine))


def test_a_key_that_an_earlier_version_did_not_have_does_not_stop_a_resume(tmp_path: Path) -> None:
    cfg = OmegaConf.to_container(composed("train"), resolve=True)
    assert isinstance(cfg, dict)
    del cfg["activation"]
    write_text(tmp_path / "config.yaml", json.dumps(cfg))
    check_resumed(composed("train", "activation=tanh"), tmp_path)
    for text in ("a: [", "7", "? !!python/object/apply:os.system ['touch it_ran']"):
        write_text(tmp_path / "config.yaml", text)
        with pytest.raises(ConfigError, match="is no configuration of a training"):
            check_resumed(composed("train"), tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"checkpoint"', '{"checkpoint": "checkpoint_000009"}'])
def test_a_damaged_or_missing_checkpoint_is_an_error_that_says_what_to_do(
    local_ray: None, tmp_path: Path, text: str
) -> None:
    write_text(tmp_path / "checkpoint.json", text)
    with pytest.raises(ConfigError, match=r"delete .*checkpoint\.json"):
        train(composed("train", "resume=true", "num_envs=2", "hidden=[4]"), tmp_path)


def test_a_folder_with_a_run_that_was_killed_before_its_first_checkpoint_is_not_overwritten(tmp_path: Path) -> None:
    write_text(tmp_path / "progress.csv", "iteration\n1\n")
    with pytest.raises(ConfigError, match="already holds a run"):
        train(composed("train"), tmp_path)
