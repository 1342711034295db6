"""Search: which spaces are valid, and that the trials are trainings sorted by utility."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from omegaconf import DictConfig

from agents.training.tune import search_space, with_values
from sim.errors import ConfigError
from tests.agents.helpers import composed, run_module


def search_cfg(*overrides: str) -> DictConfig:
    """The configuration of a search over trainings of PruneToBudget."""
    return composed("tune", "experiment=ppo_prune", *overrides)


def test_a_space_maps_keys_of_the_training_to_distributions() -> None:
    cfg = search_cfg("+space={algorithm.discount: [0.9, 1.0], algorithm.clip: {low: 0.1, high: 0.3, log: true}}")
    space = search_space(cfg)
    assert set(space) == {"algorithm.discount", "algorithm.clip"}
    assert 0.1 <= space["algorithm.clip"].sample() <= 0.3
    trial = with_values(cfg, {"algorithm.discount": 0.9})
    assert trial.algorithm.discount == 0.9
    assert cfg.algorithm.discount == 1.0


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ("{}", "space is empty"),
        ("{algorithm.discont: [0.9]}", "discount"),
        ("{algorithm.clip: 0.3}", "a list of values"),
        ("{algorithm.clip: {low: 0.1}}", "a list of values"),
    ],
)
def test_an_invalid_space_is_an_error_that_says_why(space: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        search_space(search_cfg(f"+space={space}"))


@pytest.mark.slow
def test_a_search_runs_its_trials_and_sorts_them_by_utility(tmp_path: Path) -> None:
    small = ["num_envs=8", "hidden=[16]", "iterations=2", "validate_every=1", "algorithm.steps_an_iteration=512"]
    space = "+space={algorithm.lr: {low: 1e-4, high: 1e-2, log: true}}"
    run = run_module("agents.tune", "experiment=ppo_prune", "samples=2", *small, space, f"hydra.run.dir={tmp_path}")
    assert run.returncode == 0, run.stderr[-3000:]
    trials = json.loads((tmp_path / "search.json").read_text(encoding="utf-8"))["trials"]
    assert len(trials) == 2
    assert trials[0]["utility"] >= trials[1]["utility"] > 0.0
    assert trials[0]["values"]["algorithm.lr"] != trials[1]["values"]["algorithm.lr"]
    about = json.loads((tmp_path / trials[0]["folder"] / "best" / "policy.json").read_text(encoding="utf-8"))
    assert about["training"]["validation_utility"] == pytest.approx(trials[0]["utility"], abs=1e-4)
