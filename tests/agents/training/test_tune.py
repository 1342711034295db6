"""Search: what may be searched, and that its trials are trainings whose best one is found."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import hydra
import pytest
from omegaconf import DictConfig

from agents.training.tune import search_space, with_values
from sim.config import CONF_DIR
from sim.errors import ConfigError
from sim.paths import REPOSITORY


def composed(*overrides: str) -> DictConfig:
    with hydra.initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        return hydra.compose("tune", overrides=["experiment=ppo_prune", *overrides])


def test_a_space_is_of_keys_that_the_training_has() -> None:
    cfg = composed("+space={algorithm.discount: [0.9, 1.0], algorithm.clip: {low: 0.1, high: 0.3, log: true}}")
    space = search_space(cfg)
    assert set(space) == {"algorithm.discount", "algorithm.clip"}
    assert 0.1 <= space["algorithm.clip"].sample() <= 0.3
    one = with_values(cfg, {"algorithm.discount": 0.9})
    assert one.algorithm.discount == 0.9
    assert cfg.algorithm.discount == 1.0


@pytest.mark.parametrize(
    ("space", "said"),
    [
        ("{}", "space is empty"),
        ("{algorithm.discont: [0.9]}", "discount"),
        ("{algorithm.clip: 0.3}", "a list of values"),
        ("{algorithm.clip: {low: 0.1}}", "a list of values"),
    ],
)
def test_what_cannot_be_searched_is_an_error_that_says_why(space: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        search_space(composed(f"+space={space}"))


@pytest.mark.slow
def test_a_search_runs_its_trials_and_names_the_best(tmp_path: Path) -> None:
    small = ["num_envs=8", "hidden=[16]", "iterations=2", "validate_every=1", "algorithm.steps_an_iteration=512"]
    run = subprocess.run(
        [
            *(sys.executable, "-m", "agents.tune", "experiment=ppo_prune", "samples=2", *small),
            *("+space={algorithm.lr: {low: 1e-4, high: 1e-2, log: true}}", f"hydra.run.dir={tmp_path}"),
        ],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=580,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    trials = json.loads((tmp_path / "search.json").read_text(encoding="utf-8"))["trials"]
    assert len(trials) == 2
    assert trials[0]["utility"] >= trials[1]["utility"] > 0.0
    assert trials[0]["values"]["algorithm.lr"] != trials[1]["values"]["algorithm.lr"]
    about = json.loads((tmp_path / trials[0]["folder"] / "best" / "policy.json").read_text(encoding="utf-8"))
    assert about["training"]["validation_utility"] == pytest.approx(trials[0]["utility"], abs=1e-4)
