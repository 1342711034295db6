"""``python -m agents.evaluate``: learned policies beside every baseline; one table, one figure, agents/RESULTS.md."""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig
from rich.console import Console

from agents.draws import prune_draws
from agents.prune_contest import baselines, contest, learned, shuffled_entries, solver
from agents.prune_report import prune_table_markdown, unseen_loads, write_report
from agents.reward import kept_quality
from agents.surrogate import mask_losses, quality_on
from sim.config import one_thread, run_command
from sim.data import REPOSITORY
from sim.errors import ConfigError
from sim.model import load_model
from sim.policies.learned import read_learned
from sim.quality import QUALITIES
from sim.runs import provenance, write_json, write_parquet

RESULTS = REPOSITORY / "agents" / "results"


@dataclass(kw_only=True)
class EvaluateConfig:
    """What to evaluate.

    model: whose measured table. learned: name -> glob of exported policies, one a training seed.
    curves: name -> glob of the progress.csv of those trainings. measure: play; false only writes the report again.
    out: folder of the result files.
    """

    model: str = "smollm2_135m"
    learned: dict[str, Any] = field(default_factory=dict)
    curves: dict[str, Any] = field(default_factory=dict)
    measure: bool = True
    out: str = ""


ConfigStore.instance().store(name="evaluate_schema", node=EvaluateConfig)


def found(glob: str) -> list[Path]:
    """Return the files of a glob inside the project.

    Raises:
        ConfigError: if there is none.
    """
    paths = sorted(REPOSITORY.glob(glob))
    if not paths:
        raise ConfigError(f"learned: {glob} matches no file; train first: python -m agents.train experiment=ppo_prune")
    return paths


def network_seconds(paths: list[Path]) -> dict[str, float]:
    """Return what one evaluation of a network takes, median and P99 of 10,000 on random features."""
    if not paths:
        return {"network_p50_s": 0.0, "network_p99_s": 0.0}
    network = read_learned(paths[0], "PruneToBudget").network
    out, size = network.weights[-1].shape[0], network.weights[0].shape[1]
    rng = np.random.default_rng(0)
    features, legal = rng.random((10_000, size)).astype(np.float32), np.ones(out, dtype=np.bool_)
    took_s = []
    for row in features:
        begun_s = time.perf_counter()
        network.act(row, legal)
        took_s.append(time.perf_counter() - begun_s)
    p50, p99 = np.quantile(took_s, (0.5, 0.99)).tolist()
    return {"network_p50_s": p50, "network_p99_s": p99}


def _measure(cfg: DictConfig, folder: Path) -> None:
    model = load_model(cfg.model)
    policies = baselines(model)
    oracle = policies.pop("oracle")
    for name, glob in cfg.learned.items():
        policies[str(name)] = learned(model, found(str(glob)))
    policies["oracle"] = oracle
    write_parquet(folder / "prune.parquet", contest(cfg.model, policies, prune_draws().test))
    write_parquet(folder / "prune_unseen.parquet", contest(cfg.model, policies, unseen_loads()))
    if cfg.curves:
        curves = [
            pd.read_csv(path).assign(policy=str(name), seed=seed)
            for name, glob in cfg.curves.items()
            for seed, path in enumerate(found(str(glob)))
        ]
        write_parquet(folder / "training.parquet", pd.concat(curves, ignore_index=True))
    paths = [path for glob in cfg.learned.values() for path in found(str(glob))]
    if paths:
        write_parquet(folder / "prune_ablation.parquet", shuffled_entries(paths))
    quality = quality_on(cfg.model, "calibration")
    solved = np.stack([solver(model, quality.blocks)(draw) for draw in prune_draws().validation])
    table = QUALITIES / f"{cfg.model}.json"
    write_json(
        folder / "prune.json",
        {
            **provenance(0),
            "model": cfg.model,
            **network_seconds(paths),
            "trained_on": sorted({read_learned(path, "PruneToBudget").about["quality_sha256"] for path in paths}),
            "knapsack_validation": float(kept_quality(mask_losses(quality, solved)).mean()),
            "quality_sha256": hashlib.sha256(table.read_bytes()).hexdigest(),
        },
    )


def _run(cfg: DictConfig) -> None:
    folder = Path(cfg.out) if cfg.out else RESULTS
    if cfg.measure:
        _measure(cfg, folder)
    page = write_report(folder)
    console = Console()
    console.print(prune_table_markdown(pd.read_parquet(folder / "prune.parquet")), highlight=False, soft_wrap=True)
    console.print(f"files: {page}, {folder}", highlight=False, soft_wrap=True)


def main() -> None:
    """Run ``python -m agents.evaluate``."""
    one_thread()
    run_command(_run, "evaluate")


if __name__ == "__main__":
    main()
