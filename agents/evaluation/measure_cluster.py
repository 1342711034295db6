"""Plays the test clusters of ``ServeCluster`` for a committed claim; writes cluster*.parquet and cluster.json.

The order is that of ``agents.evaluation.claim``: ``python -m agents.claim 'tasks=[cluster]'`` states policies, rules
with their parameters, clusters and the comparison; it is committed; then ``python -m agents.evaluate
'tasks=[cluster]'`` plays. ``claim=none`` plays validation clusters.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd
from omegaconf import DictConfig, OmegaConf

from agents.baselines.serve import Build
from agents.envs.cluster import ROUTERS, ClusterSetting
from agents.envs.prune_loads import Split
from agents.envs.serve_sources import sources_with
from agents.envs.serve_windows import check_sources
from agents.evaluation.chosen import glob_files
from agents.evaluation.claim import CRITERIA, check_stated, claim_path, policy_hashes, rules_hash
from agents.evaluation.cluster import (
    SEEDS,
    Windows,
    clusters_of,
    evaluate_cluster,
    learned_cluster_policies,
    read_about,
)
from agents.evaluation.cluster_report import COMPARED
from agents.evaluation.measure import (
    check_any,
    check_same_played,
    read_summary,
    selected,
    sources_of,
    split_of,
    training_seconds,
    tuned_before,
    write_curves,
    write_rows,
)
from agents.evaluation.tuning import rules_tuned_to, tuned_folder, tuned_rules
from sim.config import load_option
from sim.errors import ConfigError
from sim.progress import say
from sim.results.run_folder import commit, provenance, write_json

COMPARISON = (
    "utility of the policy minus that of each rule that does not know the future, on the same clusters, each trace "
    "counting the same; 95 % intervals by agents.evaluation.statistics, clusters resampled within each trace"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlayedClusters:
    """What an evaluation of clusters plays.

    clusters: load and windows of each. files: of learned policies, by name. rules, tuned: with their parameters.
    """

    setting: ClusterSetting
    clusters: Sequence[tuple[float, Windows]]
    files: Mapping[str, Sequence[Path]]
    rules: Mapping[str, Build]
    tuned: Mapping[str, Any]


def environment(split: Split) -> dict[str, Any]:
    """Return the arguments of ``ClusterSetting`` in conf/env/serve_cluster.yaml, for a split."""
    kwargs: Any = OmegaConf.to_container(load_option("env", "serve_cluster").kwargs)
    return {**kwargs, "split": split}


def clusters_played(cfg: DictConfig, split: Split, tuned: Mapping[str, Any] | None = None) -> PlayedClusters:
    """Return what a configuration plays on a split.

    Args:
        cfg: an ``EvaluateConfig``. tuned: parameters of rules from an earlier run; None reads or searches them.
    Raises:
        ConfigError: for an unknown name, or if no cluster would be played.
    """
    if cfg.cluster_each < 1:
        raise ConfigError(
            f"cluster_each is {cfg.cluster_each}; it must be at least 1 (clusters of each trace and load)"
        )
    setting = ClusterSetting(**environment(split))
    if cfg.cluster_sources is None:
        names, notes = sources_with(split)
        for note in notes:
            say(note)
    else:
        names = [*check_sources(cfg.cluster_sources, "cluster_sources")]
    if tuned is None:
        rules, found = tuned_rules(setting, cfg.baselines, tuned_folder(cfg))
    else:
        rules, found = rules_tuned_to(tuned), dict(tuned)
    files = {str(name): glob_files(str(glob)) for name, glob in cfg.cluster_learned.items()}
    clusters = clusters_of(setting, split, names, int(cfg.cluster_each))
    return PlayedClusters(setting=setting, clusters=clusters, files=files, rules=rules, tuned=found)


def clusters_claimed(cfg: DictConfig, played: PlayedClusters) -> dict[str, Any]:
    """Return what a claim states of what is played, without its date and commit."""
    windows = [[asdict(window) for window in windows] for _, windows in played.clusters]
    content = {
        "comparison": {"policy": cfg.cluster_compared, "by": COMPARISON, "claims": {"rules": CRITERIA["rules"]}},
        "policies": policy_hashes(played.files),
        "rules": rules_hash(played.tuned),
        "clusters": {
            "split": played.setting.split,
            "environment": "conf/env/serve_cluster.yaml",
            "sources": list(dict.fromkeys(windows[0].source for _, windows in played.clusters)),
            "loads": sorted({load for load, _ in played.clusters}),
            "each": int(cfg.cluster_each),
            "count": len(played.clusters),
            "seed": SEEDS[played.setting.split],
            "windows_sha256": hashlib.sha256(json.dumps(windows, sort_keys=True).encode()).hexdigest(),
        },
    }
    plain: dict[str, Any] = json.loads(json.dumps(content))
    return plain


def write_cluster_claim(cfg: DictConfig) -> Path:
    """Write the claim of a configuration; return its path.

    Raises:
        ConfigError: if the policy of the comparison is not among those played.
    """
    path = claim_path(str(cfg.cluster_claim), "cluster_claim")
    played = clusters_played(cfg, "test")
    if cfg.cluster_compared not in played.files:
        raise ConfigError(
            f"cluster_compared is {cfg.cluster_compared!r}; it must be one of cluster_learned: "
            f"{', '.join(played.files) or 'none'}"
        )
    stated = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "commit": commit()}
    write_json(path, {**stated, **clusters_claimed(cfg, played)})
    return path


def measure_cluster(cfg: DictConfig, folder: Path) -> None:
    """Evaluate the policies of ``ServeCluster``; write cluster*.parquet, then cluster.json.

    Raises:
        ConfigError: for the test clusters without a committed claim that fits, or with results of the same claim.
    """
    split = split_of(cfg, "cluster_claim")
    before = read_summary(folder / "cluster.json", cfg) if cfg.only else None
    played = clusters_played(cfg, split, None if before is None else tuned_before(before, folder / "cluster.json"))
    clusters = clusters_claimed(cfg, played)["clusters"]
    if before is not None:
        check_same_played(before, split, "clusters", clusters, folder)
    summary = provenance(0) if before is None else before
    learned: dict[str, Sequence[Build]] = {
        name: learned_cluster_policies(files) for name, files in played.files.items()
    }
    policies: dict[str, Sequence[Build]] = {name: [build] for name, build in played.rules.items()}
    policies |= learned
    oracle = not cfg.only and (cfg.baselines is None or "oracle_static" in cfg.baselines)
    check_any({**policies, **({"oracle_static": None} if oracle else {})}, "cluster")
    if split == "test":
        command = "python -m agents.claim 'tasks=[cluster]'"
        now = clusters_claimed(cfg, played)
        claim = check_stated(cfg.cluster_claim, now, folder / "cluster.json", command, only=bool(cfg.only))
        summary["claim"] = {
            key: claim[key] for key in ("file", "sha256", "date", "commit", "claim_commit", "comparison")
        }
    if cfg.only:
        policies = selected(cfg.only, policies)
    rows = evaluate_cluster(played.setting, policies, played.clusters, oracle=oracle, workers=cfg.workers)
    write_rows(cfg, folder / "cluster.parquet", rows)
    if compared := {name: builds for name, builds in policies.items() if name in learned or name in COMPARED}:
        by_router = [
            evaluate_cluster(
                ClusterSetting(**{**environment(split), "router": router}),
                compared,
                played.clusters,
                oracle=False,
                workers=cfg.workers,
            ).assign(router=router)
            for router in ROUTERS
        ]
        write_rows(cfg, folder / "cluster_routers.parquet", pd.concat(by_router, ignore_index=True))
    write_curves(cfg, folder / "cluster_training.parquet", cfg.cluster_curves)
    about = {name: [read_about(path) for path in paths] for name, paths in played.files.items() if name in policies}
    stated = {
        "split": split,
        "clusters": clusters,
        "compared": cfg.cluster_compared,
        "replicas": played.setting.replicas,
        "router": environment(split)["router"],
        "tuned": dict(played.tuned),
        "policies": policy_hashes(played.files),
        "sources": summary.get("sources", {}) | {name: sources_of(seeds[0]) for name, seeds in about.items()},
        "seconds": summary.get("seconds", {}) | training_seconds(about),
    }
    write_json(folder / "cluster.json", summary | stated)


__all__ = ["clusters_claimed", "clusters_played", "measure_cluster", "write_cluster_claim"]
