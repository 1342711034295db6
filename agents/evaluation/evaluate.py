"""``python -m agents.evaluate``: learned policies and every baseline on the same scenarios."""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from agents.envs.cluster import ROUTERS, ClusterSetting
from agents.envs.prune_loads import prune_loads
from agents.envs.reward import kept_quality
from agents.envs.surrogate import mask_losses, quality_on
from agents.evaluation.ablation import shuffled_loads, shuffled_windows
from agents.evaluation.cluster import (
    cluster_rules,
    evaluate_cluster,
    learned_cluster_policies,
    mean_cluster_utility,
    read_about,
    test_clusters,
)
from agents.evaluation.cluster_report import COMPARED as CLUSTER_COMPARED
from agents.evaluation.cluster_report import cluster_table_markdown
from agents.evaluation.page import FOLDER, write_report
from agents.evaluation.prune import baselines, contest, learned, solver
from agents.evaluation.prune_report import prune_table_markdown, unseen_loads
from agents.evaluation.serve import (
    conf_policy,
    evaluate_serve,
    evaluation_setting,
    learned_policies,
    rules,
    test_windows,
    with_low_bits_of,
)
from agents.evaluation.serve_report import COMPARED, serve_table_markdown
from agents.training.validation import validation_clusters
from sim.config import load_option, one_thread, run_command
from sim.cost.model_spec import load_model
from sim.cost.quality import QUALITIES
from sim.errors import ConfigError, nearest
from sim.paths import REPOSITORY
from sim.policies.learned import read_learned
from sim.results.run_folder import provenance, write_json, write_parquet

TASKS = ("prune", "serve", "ablation", "cluster")
OTHER_QUALITY = "llama3_8b_published"
"""Whose losses of low precision the policies meet that were trained on those of the served model."""


@dataclass(kw_only=True)
class EvaluateConfig:
    """What to evaluate.

    tasks: prune, serve, ablation (which entries the policies of serve live by) and cluster.
    model: whose measured table, of prune. measure: play; false only writes the page again.
    learned, serve_learned: name -> glob of exported policies, one a training seed. curves, serve_curves: name -> glob
        of the progress.csv of those trainings.
    serve_sources: traces of the test windows. serve_windows: windows for each trace, budget and load.
    serve_elsewhere: name -> glob of policies trained on other traces or loads, for the tables of generalisation.
    serve_ablation: glob of the policies of which entries are shuffled; empty for none.
    cluster_learned, cluster_curves: as serve_learned and serve_curves, of ServeCluster; policies of one replica too.
    cluster_each: clusters for each trace of serve_sources and each load.
    only: names of serve_learned or cluster_learned to play anew, everybody else's rows staying as the files have them.
    out: folder of the result files.
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
    write_parquet(folder / "prune.parquet", contest(cfg.model, policies, prune_loads().test))
    write_parquet(folder / "prune_unseen.parquet", contest(cfg.model, policies, unseen_loads()))
    if cfg.curves:
        write_parquet(folder / "training.parquet", _curves(cfg.curves))
    paths = [path for glob in cfg.learned.values() for path in found(str(glob))]
    if paths:
        write_parquet(folder / "prune_ablation.parquet", shuffled_loads(paths))
    quality = quality_on(cfg.model, "calibration")
    solved = np.stack([solver(model, quality.blocks)(draw) for draw in prune_loads().validation])
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


def _measure_serve(cfg: DictConfig, folder: Path) -> None:
    paths = {str(name): found(str(glob)) for name, glob in cfg.serve_learned.items()}
    trained = [read_learned(path, "ServeTrace").about for several in paths.values() for path in several]
    env_kwargs: dict[str, Any] = dict(trained[0]["environment"]) if trained else {}
    sources = sorted({str(source) for about in trained for source in about["environment"]["sources"]}) or ["burst"]
    setting = evaluation_setting({**env_kwargs, "sources": sources})
    windows = test_windows(list(cfg.serve_sources), int(cfg.serve_windows))
    other = with_low_bits_of(setting, OTHER_QUALITY)
    policies: dict[str, Any] = {name: learned_policies(several) for name, several in paths.items()}
    if cfg.only:
        for name in cfg.only:
            if name not in policies:
                raise ConfigError(f"only: {name!r} is none of serve_learned; {nearest(name, policies)}")
        anew = {name: policies[name] for name in cfg.only}
        for file, place in (("serve.parquet", setting), ("serve_quality.parquet", other)):
            before = pd.read_parquet(folder / file)
            kept = before[~before["policy"].isin(cfg.only)]
            write_parquet(folder / file, pd.concat([kept, evaluate_serve(place, anew, windows, oracles=False)]))
        made = json.loads((folder / "serve.json").read_text(encoding="utf-8"))
        made["anew"] = {"policies": list(cfg.only), "commit": provenance(0)["commit"]}
    else:
        made = provenance(0)
        tuned_rules, made["tuned"] = rules(setting)
        policies = {name: [build] for name, build in tuned_rules.items()} | policies
        write_parquet(folder / "serve.parquet", evaluate_serve(setting, policies, windows))
        elsewhere = {name: learned_policies(found(str(glob))) for name, glob in cfg.serve_elsewhere.items()}
        if elsewhere:
            write_parquet(
                folder / "serve_elsewhere.parquet", evaluate_serve(setting, elsewhere, windows, oracles=False)
            )
        shown = {name: policies[name] for name in policies if name in paths or name in COMPARED}
        write_parquet(folder / "serve_quality.parquet", evaluate_serve(other, shown, windows, oracles=False))
    if cfg.serve_curves:
        write_parquet(folder / "serve_training.parquet", _curves(cfg.serve_curves))
    seconds = {
        name: [read_learned(path, "ServeTrace").about["training"]["seconds"] for path in several]
        for name, several in paths.items()
    }
    write_json(
        folder / "serve.json",
        {**made, "trained_on": sources, "seconds": seconds, "other_quality": OTHER_QUALITY},
    )


def _measure_cluster(cfg: DictConfig, folder: Path) -> None:
    paths = {str(name): found(str(glob)) for name, glob in cfg.cluster_learned.items()}
    env_kwargs: Any = OmegaConf.to_container(load_option("env", "serve_cluster").kwargs)
    env_kwargs["split"] = "test"
    setting = ClusterSetting(**env_kwargs)
    clusters = test_clusters(setting, list(cfg.serve_sources), int(cfg.cluster_each))
    policies: dict[str, Any] = {name: learned_cluster_policies(several) for name, several in paths.items()}
    others = {router: ClusterSetting(**{**env_kwargs, "router": router}) for router in ROUTERS}
    curves = _curves(cfg.cluster_curves) if cfg.cluster_curves else None
    made = provenance(0)
    if cfg.only:
        policies = {name: policies[name] for name in cfg.only if name in policies}
        files = ("cluster.parquet", "cluster_routers.parquet")
        kept = [frame[~frame["policy"].isin(cfg.only)] for frame in (pd.read_parquet(folder / name) for name in files)]
        rules_made = json.loads((folder / "cluster.json").read_text(encoding="utf-8"))
        made |= {"tuned": rules_made["tuned"], "rules_commit": rules_made.get("rules_commit", rules_made["commit"])}
        shown = everybody = policies
    else:
        kept = [pd.DataFrame(), pd.DataFrame()]
        tuned, made["tuned"] = cluster_rules(setting)
        everybody = {name: [build] for name, build in tuned.items()} | policies
        shown = {name: builds for name, builds in everybody.items() if name in policies or name in CLUSTER_COMPARED}
    played = evaluate_cluster(setting, everybody, clusters, oracle=not cfg.only)
    write_parquet(folder / "cluster.parquet", pd.concat([kept[0], played], ignore_index=True))
    behind = [evaluate_cluster(one, shown, clusters, oracle=False).assign(router=name) for name, one in others.items()]
    write_parquet(folder / "cluster_routers.parquet", pd.concat([kept[1], *behind], ignore_index=True))
    if curves is not None:
        write_parquet(folder / "cluster_training.parquet", curves)
    about = {name: [read_about(path) for path in several] for name, several in paths.items()}
    made |= {
        "replicas": setting.replicas,
        "router": str(env_kwargs["router"]),
        "sources": {name: many[0]["environment"]["sources"] for name, many in about.items()},
        "seconds": {name: [one["training"]["seconds"] for one in many] for name, many in about.items()},
        "learned_serve_validation": mean_cluster_utility(
            setting, validation_clusters(setting), conf_policy("learned_serve")
        ),
    }
    write_json(folder / "cluster.json", made)


def _curves(globs: DictConfig) -> pd.DataFrame:
    """Return the rows of several progress.csv, with whose and which seed's they are."""
    curves = [
        pd.read_csv(path).assign(policy=str(name), seed=seed)
        for name, glob in globs.items()
        for seed, path in enumerate(found(str(glob)))
    ]
    return pd.concat(curves, ignore_index=True)


def _run(cfg: DictConfig) -> None:
    folder = Path(cfg.out) if cfg.out else FOLDER
    if unknown := sorted(set(cfg.tasks) - set(TASKS)):
        raise ConfigError(f"tasks: {unknown[0]!r} is none; {nearest(unknown[0], TASKS)}")
    if cfg.measure and "prune" in cfg.tasks:
        _measure(cfg, folder)
    if cfg.measure and "serve" in cfg.tasks:
        _measure_serve(cfg, folder)
    if cfg.measure and "ablation" in cfg.tasks and cfg.serve_ablation:
        write_parquet(folder / "serve_ablation.parquet", shuffled_windows(found(cfg.serve_ablation)))
    if cfg.measure and "cluster" in cfg.tasks:
        _measure_cluster(cfg, folder)
    page = write_report(folder)
    console = Console()
    console.print(prune_table_markdown(pd.read_parquet(folder / "prune.parquet")), highlight=False, soft_wrap=True)
    if "serve" in cfg.tasks and (folder / "serve.parquet").exists():
        table = serve_table_markdown(pd.read_parquet(folder / "serve.parquet"))
        console.print(table, highlight=False, soft_wrap=True)
    if "cluster" in cfg.tasks and (folder / "cluster.json").exists():
        table = cluster_table_markdown(pd.read_parquet(folder / "cluster.parquet"))
        console.print(table, highlight=False, soft_wrap=True)
    console.print(f"files: {page}, {folder}", highlight=False, soft_wrap=True)


def main() -> None:
    """Run ``python -m agents.evaluate``."""
    one_thread()
    run_command(_run, "evaluate")
