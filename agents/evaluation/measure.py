"""Runs the policies on the held-out loads, windows and clusters, and writes the result files of the agents page."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from omegaconf import DictConfig, OmegaConf

from agents.baselines.prune import baselines, learned_prune_policies, solver
from agents.baselines.serve import conf_policy, learned_serve_policies
from agents.envs.cluster import ROUTERS, ClusterSetting
from agents.envs.prune_loads import prune_loads
from agents.envs.reward import kept_quality
from agents.envs.serve import ServeSetting
from agents.envs.serve_windows import Window
from agents.envs.surrogate import mask_losses, quality_on
from agents.evaluation.ablation import shuffled_loads
from agents.evaluation.chosen import chosen_rules, glob_files
from agents.evaluation.cluster import (
    evaluate_cluster,
    learned_cluster_policies,
    mean_cluster_utility,
    read_about,
    test_clusters,
)
from agents.evaluation.cluster_report import COMPARED as CLUSTER_COMPARED
from agents.evaluation.prune import evaluate_prune, with_losses
from agents.evaluation.prune_report import unseen_loads
from agents.evaluation.serve import (
    ORACLES,
    evaluate_serve,
    evaluation_setting,
    test_windows,
    with_low_bits_of,
)
from agents.evaluation.serve_report import COMPARED
from agents.evaluation.tuning import rules_tuned_to, tuned_rules
from agents.training.validation import validation_clusters
from sim.config import load_option
from sim.cost.model_spec import load_model
from sim.cost.quality import QUALITIES
from sim.errors import ConfigError, nearest
from sim.policies.learned import read_learned
from sim.results.run_folder import provenance, write_json, write_parquet

OTHER_QUALITY = "llama3_8b_published"
"""The quality whose losses of low precision replace those of the served model, to test policies outside training."""


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


def _check_any(policies: Mapping[str, Any], task: str) -> None:
    if not policies:
        raise ConfigError(
            f"task {task} has no policy to play; name rules of this task in baselines=[...], or learned policies"
        )


def measure_prune(cfg: DictConfig, folder: Path) -> None:
    """Evaluate the policies of ``PruneToBudget``; write prune*.parquet, training.parquet and prune.json."""
    model = load_model(cfg.model)
    policies = chosen_rules(baselines(model), cfg.baselines)
    oracle = policies.pop("oracle", None)
    for name, glob in cfg.learned.items():
        policies[str(name)] = learned_prune_policies(model, glob_files(str(glob)))
    if oracle is not None:
        policies["oracle"] = oracle
    _check_any(policies, "prune")
    if cfg.only:
        _measure_prune_only(cfg, folder, policies)
        return
    write_parquet(folder / "prune.parquet", evaluate_prune(cfg.model, policies, prune_loads().test))
    write_parquet(folder / "prune_unseen.parquet", evaluate_prune(cfg.model, policies, unseen_loads()))
    if cfg.curves:
        write_parquet(folder / "training.parquet", training_curves(cfg.curves))
    paths = [path for glob in cfg.learned.values() for path in glob_files(str(glob))]
    if paths:
        write_parquet(folder / "prune_ablation.parquet", shuffled_loads(paths))
    quality = quality_on(cfg.model, "calibration")
    solved = np.stack([solver(model, quality.blocks)(load) for load in prune_loads().validation])
    table = QUALITIES / f"{cfg.model}.json"
    write_json(
        folder / "prune.json",
        {
            **provenance(0),
            "model": cfg.model,
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
    summary, selected = _read_summary(folder / "prune.json", cfg), _selected(cfg, policies)
    for file, loads in (("prune.parquet", prune_loads().test), ("prune_unseen.parquet", unseen_loads())):
        played = evaluate_prune(cfg.model, selected, loads)
        write_parquet(folder / file, with_losses(cfg.model, _replaced_rows(folder / file, played)))
    write_json(folder / "prune.json", summary | {"losses_commit": provenance(0)["commit"]})


def _selected(cfg: DictConfig, policies: Mapping[str, Any]) -> dict[str, Any]:
    """Return the policies that ``cfg.only`` names.

    Raises:
        ConfigError: for a name that is none of these policies.
    """
    for name in cfg.only:
        if name not in policies:
            raise ConfigError(f"only: there is no policy {name!r} to play; {nearest(name, policies)}")
    return {name: policies[name] for name in cfg.only}


def _write_rows(cfg: DictConfig, path: Path, played: pd.DataFrame) -> None:
    """Write a result file: what was played, or with ``cfg.only`` the file with the rows of these policies replaced."""
    write_parquet(path, _replaced_rows(path, played) if cfg.only else played)


def _replaced_rows(path: Path, played: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of a result file in which those of the policies just played replace the old ones, in place."""
    before = pd.read_parquet(path)
    names = list(dict.fromkeys([*before["policy"], *played["policy"]]))
    rows = pd.concat([before[~before["policy"].isin(played["policy"])], played])
    return rows.sort_values("policy", key=lambda policy: policy.map(names.index), kind="stable", ignore_index=True)


def _read_summary(path: Path, cfg: DictConfig) -> dict[str, Any]:
    """Return the contents of a result file in JSON, with the policies of ``cfg.only`` under ``replayed``.

    Raises:
        ConfigError: if it is missing.
    """
    if not path.is_file():
        raise ConfigError(f"only: {path} is missing, so there are no rows to replace; run without only= first")
    summary: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    earlier = [
        {**replay, "policies": [name for name in replay["policies"] if name not in cfg.only]}
        for replay in summary.get("replayed", [])
    ]
    latest = {"policies": list(cfg.only), "commit": provenance(0)["commit"]}
    return summary | {"replayed": [replay for replay in [*earlier, latest] if replay["policies"]]}


def measure_serve(cfg: DictConfig, folder: Path) -> None:
    """Evaluate the policies of ``ServeTrace``; write serve*.parquet and serve.json."""
    paths = {str(name): glob_files(str(glob)) for name, glob in cfg.serve_learned.items()}
    trained = [read_learned(path, "ServeTrace").about for files in paths.values() for path in files]
    env_kwargs: dict[str, Any] = dict(trained[0].get("environment", {})) if trained else {}
    sources = sorted({str(source) for about in trained for source in sources_of(about)}) or ["burst"]
    changed: Any = OmegaConf.to_container(cfg.env.kwargs, resolve=True)
    setting = evaluation_setting({**env_kwargs, **changed, "sources": sources})
    windows = test_windows(list(cfg.serve_sources), int(cfg.serve_windows))
    policies: dict[str, Any] = {name: learned_serve_policies(files) for name, files in paths.items()}
    if cfg.only:
        summary = _measure_serve_only(cfg, folder, setting, windows, policies)
    else:
        summary = _measure_serve_all(cfg, folder, setting, windows, policies)
    if cfg.serve_curves:
        write_parquet(folder / "serve_training.parquet", training_curves(cfg.serve_curves))
    played = {name: files for name, files in paths.items() if not cfg.only or name in cfg.only}
    abouts = {name: [read_learned(path, "ServeTrace").about for path in files] for name, files in played.items()}
    kept = {"trained_on": sources, "other_quality": OTHER_QUALITY, **summary}
    write_json(folder / "serve.json", kept | {"seconds": summary.get("seconds", {}) | training_seconds(abouts)})


def _measure_serve_all(
    cfg: DictConfig, folder: Path, setting: ServeSetting, windows: list[Window], learned: dict[str, Any]
) -> dict[str, Any]:
    """Play every rule and learned policy; return the summary for serve.json."""
    summary = provenance(0)
    rules, summary["tuned"] = tuned_rules(setting, names=cfg.baselines)
    policies = {name: [build] for name, build in rules.items()} | learned
    oracles = ORACLES if cfg.baselines is None else [name for name in ORACLES if name in cfg.baselines]
    _check_any({**policies, **dict.fromkeys(oracles)}, "serve")
    write_parquet(folder / "serve.parquet", evaluate_serve(setting, policies, windows, oracles=oracles))
    elsewhere = {name: learned_serve_policies(glob_files(str(glob))) for name, glob in cfg.serve_elsewhere.items()}
    if elsewhere:
        write_parquet(folder / "serve_elsewhere.parquet", evaluate_serve(setting, elsewhere, windows, oracles=()))
    compared = {name: builds for name, builds in policies.items() if name in learned or name in COMPARED}
    other = with_low_bits_of(setting, OTHER_QUALITY)
    if compared:
        write_parquet(folder / "serve_quality.parquet", evaluate_serve(other, compared, windows, oracles=()))
    return summary


def _measure_serve_only(
    cfg: DictConfig, folder: Path, setting: ServeSetting, windows: list[Window], learned: dict[str, Any]
) -> dict[str, Any]:
    """Play the policies of ``cfg.only`` and replace their rows; return the updated contents of serve.json.

    Rules keep the parameters that they were tuned to.
    """
    summary = _read_summary(folder / "serve.json", cfg)
    rules = {name: [build] for name, build in rules_tuned_to(summary["tuned"]).items()}
    selected = _selected(cfg, rules | learned)
    compared = {name: builds for name, builds in selected.items() if name in learned or name in COMPARED}
    other = with_low_bits_of(setting, OTHER_QUALITY)
    for file, served, played in (("serve.parquet", setting, selected), ("serve_quality.parquet", other, compared)):
        if played:
            _write_rows(cfg, folder / file, evaluate_serve(served, played, windows, oracles=()))
    return summary


def measure_cluster(cfg: DictConfig, folder: Path) -> None:
    """Evaluate the policies of ``ServeCluster``; write cluster*.parquet, then cluster.json."""
    paths = {str(name): glob_files(str(glob)) for name, glob in cfg.cluster_learned.items()}
    env_kwargs: Any = OmegaConf.to_container(load_option("env", "serve_cluster").kwargs)
    env_kwargs["split"] = "test"
    setting = ClusterSetting(**env_kwargs)
    clusters = test_clusters(setting, list(cfg.serve_sources), int(cfg.cluster_each))
    learned: dict[str, Any] = {name: learned_cluster_policies(files) for name, files in paths.items()}
    curves = training_curves(cfg.cluster_curves) if cfg.cluster_curves else None
    if cfg.only:
        summary = _read_summary(folder / "cluster.json", cfg)
        rules = {name: [build] for name, build in rules_tuned_to(summary["tuned"]).items()}
        policies = _selected(cfg, rules | learned)
        oracle = False
    else:
        summary = provenance(0)
        tuned, summary["tuned"] = tuned_rules(setting, cfg.baselines)
        policies = {name: [build] for name, build in tuned.items()} | learned
        oracle = cfg.baselines is None or "oracle_static" in cfg.baselines
    _check_any({**policies, **({"oracle_static": None} if oracle else {})}, "cluster")
    compared = {name: builds for name, builds in policies.items() if name in learned or name in CLUSTER_COMPARED}
    _write_rows(cfg, folder / "cluster.parquet", evaluate_cluster(setting, policies, clusters, oracle=oracle))
    if compared:
        settings = {router: ClusterSetting(**{**env_kwargs, "router": router}) for router in ROUTERS}
        by_router = [
            evaluate_cluster(routed, compared, clusters, oracle=False).assign(router=name)
            for name, routed in settings.items()
        ]
        _write_rows(cfg, folder / "cluster_routers.parquet", pd.concat(by_router, ignore_index=True))
    if curves is not None:
        write_parquet(folder / "cluster_training.parquet", curves)
    about = {name: [read_about(path) for path in paths[name]] for name in policies if name in learned}
    kept = {"replicas": setting.replicas, "router": str(env_kwargs["router"]), **summary}
    if not cfg.only:
        validation = validation_clusters(setting)
        kept["learned_serve_validation"] = mean_cluster_utility(setting, validation, conf_policy("learned_serve"))
    kept["sources"] = summary.get("sources", {}) | {name: sources_of(seeds[0]) for name, seeds in about.items()}
    kept["seconds"] = summary.get("seconds", {}) | training_seconds(about)
    write_json(folder / "cluster.json", kept)


def training_curves(globs: DictConfig) -> pd.DataFrame:
    """Return the rows of several progress.csv, with the columns policy and seed added."""
    curves = [
        pd.read_csv(path).assign(policy=str(name), seed=seed)
        for name, glob in globs.items()
        for seed, path in enumerate(glob_files(str(glob)))
    ]
    return pd.concat(curves, ignore_index=True)
