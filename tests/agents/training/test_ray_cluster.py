"""A training continues after its env runners are killed and after a node of the Ray cluster is lost."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from agents.training.on_ray import join_ray
from sim.config.failures import sigterm_as_ctrl_c
from sim.errors import ConfigError
from sim.paths import REPOSITORY
from tests.agents.helpers import run_module, run_python

JOIN = "import sys; from agents.training.on_ray import join_ray; join_ray(sys.argv[1]); print('joined')"


def test_a_cluster_that_refuses_the_token_is_an_error_that_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    def refuse(address: str) -> None:
        raise ray.exceptions.AuthenticationError("InvalidAuthToken")

    monkeypatch.setattr("agents.training.on_ray._check_token", refuse)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with pytest.raises(ConfigError, match=r"address=auto wants its token.*RAY_AUTH_MODE=token.*RAY_AUTH_TOKEN"):
        join_ray("auto")


@pytest.mark.parametrize("address", ["nonsense", "127.0.0.1:99999", "127.0.0.1:1", "ray://127.0.0.1:1"])
def test_an_address_without_a_cluster_is_an_error_that_names_it(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with pytest.raises(ConfigError, match=f"no Ray cluster answers at address={address}"):
        join_ray(address)


def test_after_ray_has_started_sigterm_interrupts_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    def start(**_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # Ray sets a handler of its own

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", start)
    with sigterm_as_ctrl_c():
        join_ray(None)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)


@pytest.mark.slow
def test_a_cluster_with_a_token_is_joined_with_it_and_names_it_otherwise(tmp_path: Path) -> None:
    token = "a" * 64
    environment = {**os.environ, "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.agents.training.token_cluster"]
    with subprocess.Popen(
        command,
        cwd=REPOSITORY,
        env={**environment, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as cluster:
        assert cluster.stdout is not None
        address = cluster.stdout.readline().strip()
        joins = [
            run_python("-c", JOIN, address, HOME=str(tmp_path), **variables)
            for variables in (
                {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token},
                {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "b" * 64},
                {"RAY_AUTH_MODE": "token"},
                {},
            )
        ]
        cluster.communicate()
    assert "joined" in joins[0].stdout
    for run in joins[1:]:
        assert "RAY_AUTH_TOKEN" in run.stderr.splitlines()[-1]


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
