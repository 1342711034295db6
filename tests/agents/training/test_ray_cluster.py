"""A training continues after its env runners are killed and after a node of the Ray cluster is lost."""

from __future__ import annotations

import json

import pytest

from tests.agents.helpers import run_module


@pytest.mark.slow
def test_training_continues_after_an_env_runner_and_then_a_node_is_killed() -> None:
    run = run_module("tests.agents.training.cluster_training", RAY_AUTH_MODE="disabled")
    assert run.returncode == 0, run.stderr[-3000:]
    measured = json.loads(run.stdout.strip().splitlines()[-1])
    assert measured["nodes"]["alive"] == 2  # ray.address joined the cluster instead of starting one
    assert measured["start"]["healthy"] == 2
    assert measured["runner_killed"]["healthy"] < 2
    assert measured["node_killed"]["healthy"] < 2
    assert measured["runner_back"]["healthy"] == 2
    assert measured["node_back"]["healthy"] == 2
    steps = [
        measured[moment]["steps"] for moment in ("start", "runner_killed", "runner_back", "node_killed", "node_back")
    ]
    assert steps == sorted(steps)
    assert steps[-1] > steps[0]
