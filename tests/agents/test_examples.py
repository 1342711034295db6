"""The examples of docs/examples/rl run as they are, and what they export is a policy."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from agents.training.export import export_layers
from sim.errors import ConfigError
from sim.paths import REPOSITORY
from sim.policies.learned import network_of, read_learned
from tests.agents.helpers import run_python

EXAMPLES = REPOSITORY / "docs" / "examples" / "rl"


def test_the_plain_loop_of_gymnasium_plays_both_environments() -> None:
    done = run_python(str(EXAMPLES / "gymnasium_loop.py"), "--episodes", "1")
    assert done.returncode == 0, done.stderr
    assert re.findall(r"^(\S+) episode 0: \d+ steps, utility [01]\.\d{4}$", done.stdout, re.MULTILINE) == [
        "PruneToBudget-v0",
        "ServeTrace-v0",
    ]


def test_maskable_ppo_of_sb3_contrib_learns() -> None:
    pytest.importorskip("sb3_contrib")
    done = run_python(str(EXAMPLES / "maskable_ppo.py"), "--steps", "2048", "--episodes", "20")
    assert done.returncode == 0, done.stderr
    before, after = (float(text) for text in re.findall(r"utility ([01]\.\d{4})", done.stdout))
    assert after > before


def test_ppo_in_one_file_learns_and_exports_a_policy(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    script = str(EXAMPLES / "masked_ppo.py")
    done = run_python(script, "--steps", "30000", "--export", str(path))
    assert done.returncode == 0, done.stderr
    utilities = [float(text) for text in re.findall(r"validation utility ([01]\.\d{4})", done.stdout)]
    learned = read_learned(path, "PruneToBudget")
    assert learned.about["training"]["validation_utility"] == pytest.approx(utilities[-1], abs=1e-4)
    assert utilities[-1] > 0.05  # legal random actions reach 0.02


def test_ppo_in_one_file_learns_from_the_fewest_steps_that_it_allows_and_refuses_fewer() -> None:
    least = (str(EXAMPLES / "masked_ppo.py"), "--steps", "60", "--horizon", "2", "--minibatches", "8", "--envs")
    done = run_python(*least, "8")
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    refused = run_python(*least, "7")
    assert refused.returncode == 2
    assert "--horizon times --envs twice --minibatches" in refused.stderr


def test_a_network_that_does_not_fit_the_environment_is_not_exported(tmp_path: Path) -> None:
    network = network_of([(np.zeros((60, 70), np.float32), np.zeros(60, np.float32))], "relu")
    with pytest.raises(ConfigError, match="the network has 70 inputs and 60 actions; PruneToBudget-v0 has 71 entries"):
        export_layers(tmp_path / "mine.json", network, "PruneToBudget-v0")
    assert list(tmp_path.iterdir()) == []
