"""``python -m agents.export run=...``: write a trained policy as two files that NumPy runs, without torch or ray."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf
from safetensors.numpy import save_file

from sim.atomic import write_whole
from sim.config import run_command
from sim.cost.quality import QUALITIES
from sim.errors import ConfigError
from sim.policies.learned import SHIPPED, Network, read_learned
from sim.results.run_folder import commit, write_json


@dataclass(kw_only=True)
class ExportConfig:
    """What to export.

    run: run folder of a training. name: of the exported policy. out: folder to write to; conf/policy if empty.
    """

    run: str
    name: str
    out: str = ""


ConfigStore.instance().store(name="export_schema", node=ExportConfig)


def about_network(
    network: Network, cfg: DictConfig, env_kwargs: Mapping[str, Any], status: Mapping[str, Any], utility: float
) -> dict[str, Any]:
    """Return the JSON next to the weights: the tables of observations and actions, and how the policy was trained."""
    from agents.envs.cluster import ClusterSetting
    from agents.envs.prune import PruneSetting
    from agents.envs.serve import ServeSetting

    task = str(cfg.env.id).removesuffix("-v0")
    kinds: dict[str, type[ServeSetting | PruneSetting]] = {"ServeTrace": ServeSetting, "ServeCluster": ClusterSetting}
    setting = kinds.get(task, PruneSetting)(**{**env_kwargs, "split": "validation"})
    about: dict[str, Any] = {
        "task": task,
        "model": setting.model.name,
        "layers": [list(weight.shape) for weight in network.weights],
        "parameters": network.parameters,
        "activation": network.activation,
        "environment": {key: value for key, value in env_kwargs.items() if key != "split"},
        "training": {
            "label": cfg.label,
            "seed": int(cfg.seed),
            "algorithm": OmegaConf.to_container(cfg.algorithm, resolve=True),
            "iteration": int(status["iteration"]),
            "seconds": round(float(status["seconds"]), 1),
            "validation_utility": round(utility, 6),
        },
        "quality_sha256": hashlib.sha256(_quality_file(setting).read_bytes()).hexdigest(),
        "commit": commit(),
        "actions": list(setting.table.actions),
        "observation": setting.table.rows(),
    }
    if isinstance(setting, ServeSetting):
        about["plans"] = setting.action_options
        about["tick_s"] = setting.tick_s
    elif setting.scores is not None:
        about["scores"] = [float(x) for x in setting.scores]
    return about


def _quality_file(setting: Any) -> Path:
    """Return the file of conf/quality whose losses an environment uses."""
    name = setting.quality_name
    return next(path for path in QUALITIES.glob(f"{name}.*") if path.suffix in (".json", ".yaml"))


def export_network(
    path: Path,
    network: Network,
    cfg: DictConfig,
    env_kwargs: Mapping[str, Any],
    status: Mapping[str, Any],
    utility: float,
) -> None:
    """Write NAME.safetensors, then NAME.json: a policy whose JSON file exists is complete."""
    arrays = {}
    for i, (weight, bias) in enumerate(zip(network.weights, network.biases, strict=True)):
        # safetensors writes the memory of an array as it lies, so a transposed view must become contiguous first.
        arrays[f"{i}.weight"], arrays[f"{i}.bias"] = np.ascontiguousarray(weight), np.ascontiguousarray(bias)
    write_whole(path.with_suffix(".safetensors"), lambda part: save_file(arrays, part))
    write_json(path, about_network(network, cfg, env_kwargs, status, utility))


def _run(cfg: DictConfig) -> None:
    best = Path(cfg.run) / "best" / "policy.json"
    if not best.exists():
        raise ConfigError(
            f"run: {cfg.run} has no best/policy.json; set run to the folder of a training, such as "
            "runs/train/ppo_prune/seed_0"
        )
    target = Path(cfg.out or SHIPPED) / f"{cfg.name}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(best.with_suffix(".safetensors"), target.with_suffix(".safetensors"))
    shutil.copyfile(best, target)
    task = json.loads(target.read_text(encoding="utf-8"))["task"]
    learned = read_learned(target, task)
    print(
        f"{target}: {learned.network.parameters:,} parameters, validation utility "
        f"{learned.about['training']['validation_utility']:.4f}"
    )


def main() -> None:
    """Run ``python -m agents.export``."""
    run_command(_run, "export")
