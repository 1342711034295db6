"""A training outlives what it runs on: a killed env runner comes back, and so do those of a node that was lost."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from sim.paths import REPOSITORY


@pytest.mark.slow
def test_training_goes_on_when_an_env_runner_and_then_a_node_is_killed() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "tests.agents.training.cluster_training"],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1", "RAY_AUTH_MODE": "disabled"},
        capture_output=True,
        text=True,
        timeout=580,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    told = json.loads(run.stdout.strip().splitlines()[-1])
    assert told["nodes"]["alive"] == 2  # ray.address joined the cluster; nothing was started here
    assert told["begun"]["healthy"] == 2
    assert told["runner_killed"]["healthy"] < 2
    assert told["node_killed"]["healthy"] < 2
    assert told["runner_back"]["healthy"] == 2
    assert told["node_back"]["healthy"] == 2
    steps = [told[moment]["steps"] for moment in ("begun", "runner_killed", "runner_back", "node_killed", "node_back")]
    assert steps == sorted(steps)
    assert steps[-1] > steps[0]
