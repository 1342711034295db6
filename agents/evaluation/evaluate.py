"""``python -m agents.evaluate``: compare learned policies with every baseline; writes docs/results/agents."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from agents.evaluation.ablation import shuffled_windows
from agents.evaluation.chosen import allow_new_names, check_learned_names, check_rules, glob_files, present, replaced
from agents.evaluation.claim import policy_hashes
from agents.evaluation.cluster_report import cluster_table_markdown
from agents.evaluation.measure import measure_prune
from agents.evaluation.measure_cluster import measure_cluster
from agents.evaluation.measure_roles import measure_roles
from agents.evaluation.measure_serve import measure_serve
from agents.evaluation.page import is_complete, write_report
from agents.evaluation.prune_report import NOT_LEARNED, prune_table_markdown
from agents.evaluation.roles_report import roles_table_markdown
from agents.evaluation.rules import RULES
from agents.evaluation.serve import ORACLES
from agents.evaluation.serve_report import serve_table_markdown
from agents.evaluation.tables import read_rows
from sim.atomic import sole_writer
from sim.config import CONF_DIR, one_thread, run_command
from sim.errors import ConfigError, nearest
from sim.results.run_folder import provenance, write_json, write_parquet


def _measure_ablation(cfg: DictConfig, folder: Path) -> None:
    """Shuffle entries of the policies of ``serve_ablation``; write serve_ablation.parquet and serve_ablation.json."""
    if cfg.serve_ablation:
        files = glob_files(cfg.serve_ablation)
        write_parquet(folder / "serve_ablation.parquet", shuffled_windows(files))
        write_json(folder / "serve_ablation.json", provenance(0) | policy_hashes({"policies": files}))


TASKS: dict[str, Callable[[DictConfig, Path], None]] = {
    "prune": measure_prune,
    "serve": measure_serve,
    "ablation": _measure_ablation,
    "cluster": measure_cluster,
    "roles": measure_roles,
}


@dataclass(kw_only=True)
class EvaluateConfig:
    """What to evaluate.

    tasks: any of prune, serve, ablation (which entries of the observation the policies of serve depend on), cluster,
        roles (how many replicas prefill).
    baselines: rules to play, by name; null plays all, [] none.
    prune_model: the model whose measured losses prune uses.
    tuned_rules: folder with the parameters of the rules of serve and cluster (``python -m agents.tune_rules``).
    measure: play the policies; false only writes the page again from the result files of ``out``.
    learned, serve_learned: name -> glob of exported policies, one file for each training seed. ``learned={...}``
        replaces the names, ``learned={}`` plays none.
    curves, serve_curves: name -> glob of the progress.csv files of these trainings.
    claim: the committed file that states what the test windows are played with (``python -m agents.claim``); none
        plays what is held out for validation instead, in all tasks. compared: the policy that it compares with every
        rule.
    scenarios: MEMORY/LOW_BITS, such as tight/none (conf/scenario, conf/low_bits); null for all.
    serve_sources: traces; null for all whose data is here. serve_windows: at most this many of each trace in each
        scenario; null for all. serve_oracle: how many of these windows the oracles play, because they are slow.
    workers: processes that play windows and clusters.
    serve_ablation: glob of the policies whose entries are shuffled; empty for none.
    cluster_learned, cluster_curves: like serve_learned and serve_curves, for ServeCluster; policies of one replica too.
    cluster_sources: traces of clusters; null for all whose data is here. cluster_each: clusters for each of them and
        each load. cluster_claim, cluster_compared: like claim and compared, for ServeCluster
        (``agents.evaluation.measure_cluster``); none is for this task alone.
    roles_learned: name -> glob of exported policies of ServeRoles. roles_each: episodes of each traffic. roles_claim,
        roles_compared: like claim and compared, for ServeRoles (``agents.evaluation.measure_roles``).
    only: policies to play again: rules or learned ones. The rows of all other policies stay; in prune, their plans get
        the losses of the present quality.
    out: folder of the result files. The published page is docs/results/agents.
    """

    tasks: list[str] = field(default_factory=lambda: list(TASKS))
    baselines: list[str] | None = None
    prune_model: str = "smollm2_135m"
    tuned_rules: str = "conf/rules"
    learned: dict[str, Any] = field(default_factory=dict)
    curves: dict[str, Any] = field(default_factory=dict)
    serve_learned: dict[str, Any] = field(default_factory=dict)
    serve_curves: dict[str, Any] = field(default_factory=dict)
    claim: str = "docs/results/agents/claim.json"
    compared: str = "learned_serve"
    scenarios: list[str] | None = None
    serve_sources: list[str] | None = None
    serve_windows: int | None = None
    serve_oracle: int = 1
    workers: int = 1
    serve_ablation: str = ""
    cluster_learned: dict[str, Any] = field(default_factory=dict)
    cluster_curves: dict[str, Any] = field(default_factory=dict)
    cluster_sources: list[str] | None = None
    cluster_each: int = 1
    cluster_claim: str = "docs/results/agents/cluster_claim.json"
    cluster_compared: str = "learned_cluster"
    roles_learned: dict[str, Any] = field(default_factory=dict)
    roles_each: int = 10
    roles_claim: str = "docs/results/agents/roles_claim.json"
    roles_compared: str = "learned_roles"
    only: list[str] = field(default_factory=list)
    measure: bool = True
    out: str = "runs/evaluate"


ConfigStore.instance().store(name="evaluate_schema", node=EvaluateConfig)


TABLES: dict[str, Callable[[pd.DataFrame], str]] = {
    "prune": prune_table_markdown,
    "serve": serve_table_markdown,
    "cluster": cluster_table_markdown,
    "roles": roles_table_markdown,
}


def evaluate(cfg: DictConfig, console: Console) -> None:
    """Play the policies of a configuration, write result files, and print a table for each task.

    The page is written where the folder has what it compares: all rules of each task that it holds.

    Raises:
        ConfigError: for an unknown task or rule, a missing file, or a folder without results.
    """
    folder = Path(cfg.out or EvaluateConfig.out)
    for task in cfg.tasks:
        if task not in TASKS:
            raise ConfigError(f"tasks: there is no task {task!r}; {nearest(task, TASKS)}")
    if not cfg.tasks:
        raise ConfigError(f"tasks is empty; name at least one of {', '.join(TASKS)}")
    rules = sorted({*NOT_LEARNED, *RULES, *ORACLES})
    check_rules(cfg.baselines, rules)
    check_learned_names(cfg, rules)
    with sole_writer(folder, instead="set out=FOLDER to another folder"):
        _evaluate_into(cfg, folder, console)


def _evaluate_into(cfg: DictConfig, folder: Path, console: Console) -> None:
    if cfg.measure:
        default: Any = OmegaConf.to_container(OmegaConf.load(CONF_DIR / "evaluate.yaml"), resolve=False)
        cfg, notes = present(cfg, default)
        for note in notes:
            console.print(note, highlight=False, soft_wrap=True, markup=False)
        for name, measure in TASKS.items():
            if name in cfg.tasks:
                measure(cfg, folder)
    measured = [name for name in TABLES if name in cfg.tasks and (folder / f"{name}.parquet").exists()]
    if not measured and not (folder / "serve_ablation.parquet").exists():
        raise ConfigError(
            f"{folder} has no results of {', '.join(cfg.tasks)}; name policies, and run with measure=true"
        )
    page = f"{write_report(folder)}, " if is_complete(folder) else ""
    for name in measured:
        frame = read_rows(folder / f"{name}.parquet")
        console.print(TABLES[name](frame), highlight=False, soft_wrap=True, markup=False)
    console.print(f"files: {page}{folder}", highlight=False, soft_wrap=True, markup=False)


def _run(cfg: DictConfig) -> None:
    evaluate(replaced(cfg, HydraConfig.get().overrides.task), Console())


def main() -> None:
    """Run ``python -m agents.evaluate``."""
    one_thread()
    allow_new_names()
    run_command(_run, "evaluate")
