"""Runs the policies on the held-out loads and clusters, and writes the result files of the agents page.

``agents.evaluation.measure_serve`` does so for windows.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from omegaconf import DictConfig, OmegaConf

from agents.baselines.prune import baselines, learned_prune_policies, solver
from agents.envs.prune_loads import Split, prune_loads
from agents.envs.reward import kept_quality
from agents.envs.surrogate import mask_losses, quality_on
from agents.evaluation.ablation import shuffled_loads
from agents.evaluation.chosen import chosen_rules, glob_files
from agents.evaluation.prune import evaluate_prune, with_losses
from agents.evaluation.prune_report import unseen_loads
from agents.evaluation.tables import read_rows
from sim.cost.model_spec import load_model
from sim.cost.quality import QUALITIES
from sim.errors import ConfigError, nearest
from sim.json_file import read_json_object
from sim.policies.learned import read_learned
from sim.results.run_folder import provenance, write_json, write_parquet


def network_seconds(paths: list[Path]) -> dict[str, float]:
    """Return median and P99 seconds of one evaluation of the first file's network, over 10,000 on random features."""
    if not paths:
        return {"network_p50_s": 0.0, "network_p99_s": 0.0}
    network = read_learned(paths[0], "PruneToBudget").network
    out, size = network.actions, network.inputs
    rng = np.random.default_rng(0)
    features, legal = rng.random((10_000, size)).astype(np.float32), np.ones(out, dtype=np.bool_)
    durations_s = []
    for row in features:
        started_s = time.perf_counter()
        network.act(row, legal)
        durations_s.append(time.perf_counter() - started_s)
    p50, p99 = np.quantile(durations_s, (0.5, 0.99)).tolist()
    return {"network_p50_s": p50, "network_p99_s": p99}


def sources_of(about: Mapping[str, Any]) -> list[str]:
    """Return the traces that a policy was trained on; none if its file does not state them."""
    return list(about.get("environment", {}).get("sources", ()))


def training_seconds(abouts: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, list[float]]:
    """Return the seconds that each policy's trainings took until its best state, for those whose files state them."""
    found = {
        name: [about["training"]["seconds"] for about in seeds if "seconds" in about.get("training", {})]
        for name, seeds in abouts.items()
    }
    return {name: seconds for name, seconds in found.items() if seconds}


def check_any(policies: Mapping[str, Any], task: str) -> None:
    if not policies:
        raise ConfigError(
            f"task {task} has no policy to play; name rules of this task in baselines=[...], or learned policies"
        )


def measure_prune(cfg: DictConfig, folder: Path) -> None:
    """Evaluate the policies of ``PruneToBudget``; write prune*.parquet, training.parquet and prune.json."""
    model = load_model(cfg.prune_model)
    policies = chosen_rules(baselines(model), cfg.baselines)
    oracle = policies.pop("oracle", None)
    for name, glob in cfg.learned.items():
        policies[str(name)] = learned_prune_policies(model, glob_files(str(glob)))
    if oracle is not None:
        policies["oracle"] = oracle
    check_any(policies, "prune")
    if cfg.only:
        _measure_prune_only(cfg, folder, policies)
        return
    write_parquet(folder / "prune.parquet", evaluate_prune(cfg.prune_model, policies, prune_loads().test))
    write_parquet(folder / "prune_unseen.parquet", evaluate_prune(cfg.prune_model, policies, unseen_loads()))
    write_curves(cfg, folder / "training.parquet", cfg.curves)
    paths = [path for glob in cfg.learned.values() for path in glob_files(str(glob))]
    if paths:
        write_parquet(folder / "prune_ablation.parquet", shuffled_loads(paths))
    quality = quality_on(cfg.prune_model, "calibration")
    solved = np.stack([solver(model, quality.blocks)(load) for load in prune_loads().validation])
    table = QUALITIES / f"{cfg.prune_model}.json"
    write_json(
        folder / "prune.json",
        {
            **provenance(0),
            "model": cfg.prune_model,
            **network_seconds(paths),
            "trained_on": sorted(
                {str(read_learned(path, "PruneToBudget").about.get("quality_sha256", "unknown")) for path in paths}
            ),
            "knapsack_validation": float(kept_quality(mask_losses(quality, solved)).mean()),
            "quality_sha256": hashlib.sha256(table.read_bytes()).hexdigest(),
        },
    )


def _measure_prune_only(cfg: DictConfig, folder: Path, policies: Mapping[str, Any]) -> None:
    """Play the policies of ``cfg.only`` and replace their rows; give all rows the losses of the present quality."""
    summary, chosen = read_summary(folder / "prune.json", cfg), selected(cfg.only, policies)
    for file, loads in (("prune.parquet", prune_loads().test), ("prune_unseen.parquet", unseen_loads())):
        played = evaluate_prune(cfg.prune_model, chosen, loads)
        write_parquet(folder / file, with_losses(cfg.prune_model, _replaced_rows(folder / file, played)))
    write_curves(cfg, folder / "training.parquet", cfg.curves)
    write_json(folder / "prune.json", summary | {"losses_commit": provenance(0)["commit"]})


def selected(names: Sequence[str], policies: Mapping[str, Any]) -> dict[str, Any]:
    """Return the policies that ``only`` names.

    Raises:
        ConfigError: for a name that is none of these policies.
    """
    for name in names:
        if name not in policies:
            raise ConfigError(f"only: there is no policy {name!r} to play; {nearest(name, policies)}")
    return {name: policies[name] for name in names}


def split_of(cfg: DictConfig, claim: str) -> Split:
    """Return the split that a task plays: validation if its claim is none, else test.

    Args:
        claim: the key of the task's claim; ``claim=none`` holds for all tasks.
    """
    return "validation" if "none" in (cfg.claim, cfg[claim]) else "test"


def check_same_played(before: Mapping[str, Any], split: Split, what: str, now: Any, folder: Path) -> None:
    """Check that ``only`` plays what the other rows of its result file played.

    Args:
        before: the contents of the JSON file of the results. what: a key of it, such as windows, which files of earlier
            versions lack. now: what is played now, as that key states it.
    Raises:
        ConfigError: if the split or what is played differ.
    """
    if (before.get("split"), before.get(what, now)) != (split, now):
        raise ConfigError(
            f"only: {folder} has results of other {what} (split {before.get('split')}); play these again, with their "
            "keys and claim, or set out=FOLDER to another folder and leave out only="
        )


def write_rows(cfg: DictConfig, path: Path, played: pd.DataFrame) -> None:
    """Write a result file: what was played, or with ``cfg.only`` the file with the rows of these policies replaced."""
    write_parquet(path, _replaced_rows(path, played) if cfg.only else played)


def _replaced_rows(path: Path, played: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of a result file in which those of the policies just played replace the old ones, in place."""
    before = read_rows(path)
    names = list(dict.fromkeys([*before["policy"], *played["policy"]]))
    rows = pd.concat([before[~before["policy"].isin(played["policy"])], played])
    return rows.sort_values("policy", key=lambda policy: policy.map(names.index), kind="stable", ignore_index=True)


def read_summary(path: Path, cfg: DictConfig) -> dict[str, Any]:
    """Return the contents of a result file in JSON, with the policies of ``cfg.only`` under ``replayed``.

    Raises:
        ConfigError: if it is missing.
    """
    if not path.is_file():
        raise ConfigError(f"only: {path} is missing, so there are no rows to replace; run without only= first")
    summary = read_json_object(path, ConfigError, "run without only= first")
    if not isinstance(summary.get("replayed", []), list):
        raise ConfigError(f"{path} has no list under replayed; delete it, and run without only= first")
    earlier = [
        {**replay, "policies": [name for name in replay["policies"] if name not in cfg.only]}
        for replay in summary.get("replayed", [])
    ]
    latest = {"policies": list(cfg.only), "commit": provenance(0)["commit"]}
    return summary | {"replayed": [replay for replay in [*earlier, latest] if replay["policies"]]}


def write_curves(cfg: DictConfig, path: Path, globs: DictConfig) -> None:
    """Write the training curves that ``globs`` names, if any; with ``cfg.only`` those of other policies stay."""
    chosen = OmegaConf.create({name: glob for name, glob in globs.items() if not cfg.only or name in cfg.only})
    if chosen:
        curves = training_curves(chosen)
        write_parquet(path, _replaced_rows(path, curves) if cfg.only and path.is_file() else curves)


def _read_curve(path: Path) -> pd.DataFrame:
    try:
        return pd.read_csv(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} is no progress.csv of a training ({str(error).partition(chr(10))[0]})") from error


def tuned_before(summary: Mapping[str, Any], path: Path) -> Mapping[str, Any]:
    """Return the rules and their parameters that a result file states, for ``only``.

    Raises:
        ConfigError: if it states none.
    """
    if not isinstance(summary.get("tuned"), Mapping):
        raise ConfigError(f"{path} states no parameters of rules; run without only= first")
    return summary["tuned"]  # type: ignore[no-any-return]


def training_curves(globs: DictConfig) -> pd.DataFrame:
    """Return the rows of several progress.csv, with the columns policy and seed added."""
    curves = [
        _read_curve(path).assign(policy=str(name), seed=seed)
        for name, glob in globs.items()
        for seed, path in enumerate(glob_files(str(glob)))
    ]
    return pd.concat(curves, ignore_index=True)
