"""``python -m agents.evaluate``: compare learned policies with every baseline; writes docs/results/agents."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig
from rich.console import Console

from agents.evaluation.ablation import shuffled_windows
from agents.evaluation.cluster_report import cluster_table_markdown
from agents.evaluation.measure import glob_files, measure_cluster, measure_prune, measure_serve
from agents.evaluation.page import FOLDER, write_report
from agents.evaluation.prune_report import prune_table_markdown
from agents.evaluation.serve_report import serve_table_markdown
from sim.config import one_thread, run_command
from sim.errors import ConfigError, nearest
from sim.results.run_folder import write_parquet


def _measure_ablation(cfg: DictConfig, folder: Path) -> None:
    """Shuffle entries of the policies of ``serve_ablation``; write serve_ablation.parquet."""
    if cfg.serve_ablation:
        write_parquet(folder / "serve_ablation.parquet", shuffled_windows(glob_files(cfg.serve_ablation)))


TASKS: dict[str, Callable[[DictConfig, Path], None]] = {
    "prune": measure_prune,
    "serve": measure_serve,
    "ablation": _measure_ablation,
    "cluster": measure_cluster,
}


@dataclass(kw_only=True)
class EvaluateConfig:
    """What to evaluate.

    tasks: any of prune, serve, ablation (which entries of the observation the policies of serve depend on), cluster.
    model: the model whose measured losses prune uses.
    measure: play the policies; false only writes the page again from the result files.
    learned, serve_learned: name -> glob of exported policies, one file for each training seed.
    curves, serve_curves: name -> glob of the progress.csv files of these trainings.
    serve_sources: traces of the test windows. serve_windows: windows for each trace, budget and load.
    serve_elsewhere: name -> glob of policies that were trained on other traces or loads.
    serve_ablation: glob of the policies whose entries are shuffled; empty for none.
    cluster_learned, cluster_curves: like serve_learned and serve_curves, for ServeCluster; policies of one replica too.
    cluster_each: clusters for each trace of serve_sources and each load.
    only: names of serve_learned or cluster_learned to play again; the rows of all other policies stay.
    out: folder of the result files; docs/results/agents if empty.
    """

    tasks: list[str] = field(default_factory=lambda: list(TASKS))
    model: str = "smollm2_135m"
    learned: dict[str, Any] = field(default_factory=dict)
    curves: dict[str, Any] = field(default_factory=dict)
    serve_learned: dict[str, Any] = field(default_factory=dict)
    serve_curves: dict[str, Any] = field(default_factory=dict)
    serve_sources: list[str] = field(default_factory=lambda: ["burst"])
    serve_windows: int = 3
    serve_elsewhere: dict[str, Any] = field(default_factory=dict)
    serve_ablation: str = ""
    cluster_learned: dict[str, Any] = field(default_factory=dict)
    cluster_curves: dict[str, Any] = field(default_factory=dict)
    cluster_each: int = 6
    only: list[str] = field(default_factory=list)
    measure: bool = True
    out: str = ""


ConfigStore.instance().store(name="evaluate_schema", node=EvaluateConfig)


def _run(cfg: DictConfig) -> None:
    folder = Path(cfg.out) if cfg.out else FOLDER
    if unknown := sorted(set(cfg.tasks) - set(TASKS)):
        raise ConfigError(f"tasks: there is no task {unknown[0]!r}; {nearest(unknown[0], TASKS)}")
    for name, measure in TASKS.items():
        if cfg.measure and name in cfg.tasks:
            measure(cfg, folder)
    page = write_report(folder)
    tables = [prune_table_markdown(pd.read_parquet(folder / "prune.parquet"))]
    if "serve" in cfg.tasks and (folder / "serve.parquet").exists():
        tables.append(serve_table_markdown(pd.read_parquet(folder / "serve.parquet")))
    if "cluster" in cfg.tasks and (folder / "cluster.json").exists():
        tables.append(cluster_table_markdown(pd.read_parquet(folder / "cluster.parquet")))
    console = Console()
    for table in tables:
        console.print(table, highlight=False, soft_wrap=True)
    console.print(f"files: {page}, {folder}", highlight=False, soft_wrap=True)


def main() -> None:
    """Run ``python -m agents.evaluate``."""
    one_thread()
    run_command(_run, "evaluate")
