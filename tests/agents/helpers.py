"""What several tests of agents share: composed configurations, commands in a subprocess, and random policies."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import hydra
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from omegaconf import DictConfig
from safetensors.numpy import save_file

from agents.envs.prune_loads import PruneLoad
from agents.envs.roles import RolesSetting
from agents.envs.serve import ServeSetting
from agents.training.train import build_algorithm, current_network, environment_kwargs
from agents.training.validation import validation_utilities
from sim.config import CONF_DIR, build
from sim.cost.model_spec import load_model
from sim.errors import ConfigError
from sim.paths import REPOSITORY

SMALL_MODEL = load_model("smollm2_135m")
FEW_LOADS = [
    PruneLoad(batch=batch, sequence_tokens=tokens, budget_share=share)
    for batch, tokens in ((1, 4096), (8, 2048), (16, 512))
    for share in (0.8, 0.5)
]


def check_environment(name: str, num_envs: int, **kwargs: Any) -> None:
    """Check both registered forms of an environment as Gymnasium does."""
    check_env(gym.make(f"agents.envs.registration:{name}", render_mode="rgb_array", **kwargs).unwrapped)
    vector = gym.make_vec(name, num_envs=num_envs, vectorization_mode="vector_entry_point", **kwargs)
    observations, _ = vector.reset(seed=1)
    assert vector.observation_space.contains(observations)


def composed(config: str, *overrides: str) -> DictConfig:
    """The configuration of conf/CONFIG.yaml with these overrides."""
    with hydra.initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        return hydra.compose(config, overrides=list(overrides))


def run_module(module: str, *arguments: str, timeout_s: float = 580.0, **variables: str) -> Any:
    """The finished process of ``python -m MODULE ARGUMENTS``."""
    return run_python("-m", module, *arguments, timeout_s=timeout_s, **variables)


def run_python(*arguments: str, timeout_s: float = 580.0, **variables: str) -> Any:
    """The finished process of ``python ARGUMENTS``, with these environment variables added."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1", **variables},
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


def utilities_around_imitation(cfg: DictConfig) -> tuple[float, float]:
    """The mean validation utility of a configuration's network before and after its imitation."""
    env_kwargs = environment_kwargs(cfg)
    algorithm = build_algorithm(cfg)

    def utility() -> float:
        return float(validation_utilities(cfg.env.id, env_kwargs, current_network(algorithm, "relu")).mean())

    before = utility()
    build(cfg.imitate)(algorithm, cfg.env.id, env_kwargs, seed=0)
    after = utility()
    algorithm.stop()
    return before, after


def write_linear_policy(
    folder: Path, task: str, setting: ServeSetting, weight: np.ndarray[Any, Any], bias: np.ndarray[Any, Any]
) -> tuple[Path, dict[str, Any]]:
    """Write a policy of one layer as agents.export would; return its JSON file and the contents."""
    about = {
        "task": task,
        "model": setting.model.name,
        "layers": [list(weight.shape)],
        "activation": "relu",
        "plans": setting.action_options,
        "environment": {"hide": []},
        "observation": setting.table.rows(),
        "actions": list(setting.table.actions),
        "slo": {"ttft_s": setting.slo.ttft_s, "tpot_s": setting.slo.tpot_s},
        "low_loss": setting.low_loss(1.0),
    }
    save_file({"0.weight": weight, "0.bias": bias}, folder / "p.safetensors")
    (folder / "p.json").write_text(json.dumps(about))
    return folder / "p.json", about


def write_roles_policy(folder: Path, setting: RolesSetting, at: np.ndarray[Any, Any], seed: int) -> Path:
    """Write a policy of ``ServeRoles`` with random weights that rates all actions about equally at features ``at``."""
    rng, table = np.random.default_rng(seed), setting.table
    weight = rng.normal(size=(len(table.actions), table.features)).astype(np.float32)
    bias = rng.normal(scale=0.01, size=len(weight)).astype(np.float32) - weight @ at
    about = {
        "task": "ServeRoles",
        "model": setting.model.name,
        "layers": [list(weight.shape)],
        "activation": "relu",
        "environment": {
            "hide": [entry.name for entry, shown in zip(table.entries, setting.visible, strict=False) if not shown]
        },
        "observation": table.rows(),
        "actions": list(table.actions),
        "tick_s": setting.tick_s,
    }
    save_file({"0.weight": weight, "0.bias": bias.astype(np.float32)}, folder / "p.safetensors")
    (folder / "p.json").write_text(json.dumps(about))
    return folder / "p.json"


def git(folder: Path, *arguments: str) -> None:
    """Run a command of git in a folder."""
    subprocess.run(["git", "-C", str(folder), *arguments], check=True, capture_output=True)


def begin_checkout(folder: Path) -> None:
    """Make a folder a git checkout with one empty commit."""
    git(folder, "init", "-q")
    git(folder, "config", "user.email", "a@b.c")
    git(folder, "config", "user.name", "A")
    git(folder, "commit", "-q", "--allow-empty", "-m", "begin")


def commit_claim(folder: Path, named: str, play: Callable[[], None], write: Callable[[], Path]) -> Path:
    """Write and commit a claim; return its path. Check that nothing is played before it is written and committed.

    Args:
        folder: the checkout. named: what the error of a missing claim names of its command.
        play: plays what the claim is for. write: writes it.
    """
    with pytest.raises(ConfigError, match=rf"there is no claim .*agents\.claim {re.escape(named)}"):
        play()
    path = write()
    with pytest.raises(ConfigError, match="not committed as it is"):
        play()
    git(folder, "add", "-A")
    git(folder, "commit", "-q", "-m", "claim")
    return path
