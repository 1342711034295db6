"""``python -m agents.export run=...``: write a trained policy as two files that NumPy runs, without torch or ray."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import re
import shlex
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
from sim.config import option_names, run_command
from sim.cost.quality import QUALITIES
from sim.engine.server_spec import find_calibration
from sim.errors import ConfigError, nearest
from sim.policies.learned import Network, read_learned
from sim.policies.learned_files import read_about
from sim.results.run_folder import commit, write_json


@dataclass(kw_only=True)
class ExportConfig:
    """What to export.

    run: run folder of a training. name: of the exported policy. out: folder to write to; the run folder if empty.
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
        about["slo"] = dataclasses.asdict(setting.slo)
        about["low_loss"] = setting.low_loss(1.0)
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


def export(run: Path, name: str, out: Path | None = None) -> Path:
    """Copy the best policy of a training as NAME.safetensors and NAME.json; return the JSON file.

    Args:
        run: run folder of the training. name: of the policy. out: folder to write to; None is the run folder.
    Raises:
        ConfigError: for a name that is no file name, or a run folder without a usable policy.
    """
    if not re.fullmatch(r"[\w.-]+", name) or name.startswith("."):
        raise ConfigError(f"name is {name!r}; it may have letters, digits, '_', '-' and '.', such as name=mine")
    best = run / "best" / "policy.json"
    if not best.exists():
        raise ConfigError(
            f"run: {run} has no best/policy.json; set run to the folder of a training, such as "
            "runs/train/ppo_prune/seed_0"
        )
    read_learned(best, policy_task(best))
    target = (out or run) / f"{name}.json"
    if target.resolve() != best.resolve():
        for suffix in (".safetensors", ".json"):
            source = best.with_suffix(suffix)
            write_whole(target.with_suffix(suffix), lambda part, source=source: shutil.copyfile(source, part))  # type: ignore[misc]
    return target


def policy_task(path: Path) -> str:
    """Return the environment in which the policy of a JSON file was trained.

    Raises:
        ConfigError: for a file that is no policy, or of an environment that no command runs.
    """
    try:
        task = str(read_about(path)["task"])
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} is not a learned policy ({error}); train one: python -m agents.train") from error
    if task not in POLICIES:
        raise ConfigError(f"{path} was trained in {task!r}; {nearest(task, POLICIES)}")
    return task


POLICIES = {
    "PruneToBudget": ("sim.replay", "learned_prune"),
    "ServeTrace": ("sim.replay", "learned_serve"),
    "ServeCluster": ("sim.cluster", "learned_cluster"),
}
"""Environment: the command and the option of ``policy`` that run what was trained in it."""


def next_command(path: Path) -> str:
    """Return a command that runs an exported policy, on the model and device of its training."""
    about = read_about(path)
    command, policy = POLICIES[about["task"]]
    environment = about.get("environment", {})
    keys = {"model": about["model"]}
    if about["task"] == "PruneToBudget":
        keys |= dict(zip(("gpu",), calibrated_gpus(str(about["model"])), strict=False))
    else:
        keys |= {key: environment[key] for key in ("gpu", "latency", "engine", "slo", "tick_s") if key in environment}
        keys |= {"quality_table": environment["quality"]} if "quality" in environment else {}
    file = path.resolve()
    shown = str(file.relative_to(Path.cwd()) if file.is_relative_to(Path.cwd()) else file)
    if not re.fullmatch(r"[\w./@-]+", shown):
        shown = f'"{shown}"'  # Hydra reads quoted text as it stands
    # Names come from the file, which may come from anywhere, and the line is meant to be pasted into a shell.
    settings = [
        shlex.quote(f"{key}={value}") for key, value in {**keys, "policy": policy, "policy.path": shown}.items()
    ]
    return f"python -m {command} trace=burst {' '.join(settings)}"


def calibrated_gpus(model: str) -> list[str]:
    """Return the files of conf/gpu on which a model is calibrated."""
    found = []
    for gpu in option_names("gpu"):
        with contextlib.suppress(ConfigError):
            find_calibration(model, gpu)
            found.append(gpu)
    return found


def _run(cfg: DictConfig) -> None:
    target = export(Path(cfg.run), str(cfg.name), Path(cfg.out) if cfg.out else None)
    learned = read_learned(target, policy_task(target))
    utility = learned.about.get("training", {}).get("validation_utility")
    validated = "" if utility is None else f", validation utility {utility:.4f}"
    print(f"{target}: {learned.network.parameters:,} parameters{validated}")
    print(f"run it:\n  {next_command(target)}")


def main() -> None:
    """Run ``python -m agents.export``."""
    run_command(_run, "export")
