"""TensorBoard's file and the run of Weights & Biases that a training leaves."""

from __future__ import annotations

import math
import re
import resource
from pathlib import Path

import numpy as np
import pytest

from agents.training.dashboards import FOLDER, EventFile, check_wandb, learner_scalars
from agents.training.export import write_policy
from agents.training.train import train
from sim.errors import ConfigError
from sim.policies.learned import network_of
from tests.agents.helpers import composed


def test_numbers_of_the_learners_are_scalars_and_nothing_else_is() -> None:
    learners = {
        "__all_modules__": {"learner_update_timer": 0.5},
        "default_policy": {
            "policy_loss": -0.25,
            "entropy": 1,
            "nested": {"norm": 2.0},
            "name": "ppo",
            "flag": True,
            "unknown": math.nan,
        },
    }
    expected = {"learner/policy_loss": -0.25, "learner/entropy": 1.0, "learner/nested/norm": 2.0}
    assert learner_scalars({"learners": learners}) == expected
    assert learner_scalars({}) == {}


def test_a_full_disk_is_an_error_that_names_the_file_of_tensorboard_or_of_a_policy(tmp_path: Path) -> None:
    events = EventFile(tmp_path / FOLDER)
    network = network_of([(np.zeros((64, 64), np.float32), np.zeros(64, np.float32))], "relu")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000, before[1]))
    try:
        with pytest.raises(OSError, match=re.escape(str(events.path))):
            events.append({f"tag_{number}": 1.0 for number in range(100)}, 0)
        with pytest.raises(OSError, match=re.escape(str(tmp_path / "policy.safetensors"))):
            write_policy(tmp_path / "policy.json", network, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in tmp_path.iterdir()] == [FOLDER]


def test_without_a_login_nothing_starts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setattr(wandb, "login", lambda prompt: False)
    check_wandb(None)
    with pytest.raises(ConfigError, match="wandb=mine: no login was found; run wandb login"):
        check_wandb("mine")


def test_a_training_writes_losses_divergence_entropy_and_utility(
    local_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator").EventAccumulator
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    size = ("num_envs=4", "hidden=[8]", "algorithm.steps_an_iteration=256", "algorithm.minibatch=64")
    overrides = ["experiment=ppo_prune", "iterations=4", "validate_every=2", "wandb=test", *size]
    train(composed("train", *overrides), tmp_path)
    events = accumulator(str(tmp_path / FOLDER))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert {f"learner/{name}" for name in ("policy_loss", "vf_loss", "entropy", "mean_kl_loss")} <= tags
    steps = [event.step for event in events.Scalars("learner/entropy")]
    assert len(steps) == 4
    assert steps == sorted(set(steps))
    assert all(0 < event.value < 1 for event in events.Scalars("learner/mean_kl_loss"))
    last = events.Scalars("validation/utility")[-1]
    row = (tmp_path / "progress.csv").read_text().splitlines()[-1].split(",")
    assert (last.step, round(last.value, 4)) == (int(row[2]), round(float(row[4]), 4))
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
