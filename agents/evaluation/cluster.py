"""Every policy of ``ServeCluster`` on the same held-out clusters: each replica has its own, behind one router.

Rules are those of ``agents.evaluation.serve``, tuned anew on training clusters; policies that were trained on one replica
stand beside those that were trained in clusters. ``oracle_static`` alone knows the windows: the best single plan, the
same on every replica, in hindsight.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from agents.envs.cluster import ClusterSetting
from agents.envs.serve_windows import Window, serve_windows
from agents.evaluation.serve import Build, fixed_plan, policy_context, rules
from sim.errors import ConfigError
from sim.policies.base import Policy
from sim.policies.learned_cluster import learned_cluster
from sim.policies.learned_serve import learned_serve
from sim.results.metrics import met_slo
from sim.results.records import Status

Windows = Sequence[Window]

TRAIN_CLUSTERS, TRAIN_SEED = 16, 20251121
TEST_SEED = 20251122
TEST_LOADS = (0.75, 0.95)
"""So far along each source's range of rates (conf/split/serve.yaml), on a logarithmic scale."""
BUILDERS: dict[str, Callable[..., Policy]] = {"ServeTrace": learned_serve, "ServeCluster": learned_cluster}


def play_cluster(setting: ClusterSetting, windows: Windows, build: Build) -> dict[str, Any]:
    """Serve a cluster whose replicas each have a policy of this kind, asked every tick; return its figures."""
    served = policy_context(setting)
    cluster = setting.build_cluster(windows, [build(served) for _ in windows])
    cluster.run()
    records, engines = cluster.records(), cluster.engines()
    met, finished = met_slo(records, setting.slo), records.status == Status.FINISHED
    loss = records.quality_nll[finished] - setting.dense_nll
    ttft_s = np.where(np.isfinite(records.ttft_s), records.ttft_s, np.inf)
    counts = np.bincount(records.replica, minlength=len(windows))
    return {
        "requests": len(records),
        "utility": setting.earned(cluster, len(records)),
        "slo_attainment": float(met.mean()),
        "goodput_rps": float(met.sum()) / setting.windows.window_s,
        "ttft_p95_s": float(np.quantile(ttft_s[finished], 0.95)) if finished.any() else math.nan,
        "rejected_share": float((records.status == Status.REJECTED).mean()),
        "loss": float(np.maximum(loss, 0.0).mean()) if len(loss) else 0.0,
        "budget_violation_s": sum(one.engine.budget_violation_s for one in engines),
        "transitions": sum(len(one.engine.transitions()) for one in engines) / len(engines),
        "busiest_share": float(counts.max() / len(records)),
    }


def train_clusters(setting: ClusterSetting) -> list[Windows]:
    """Return the training clusters on which rules are tuned."""
    rng = np.random.default_rng(TRAIN_SEED)
    return [setting.sample(rng, "train") for _ in range(TRAIN_CLUSTERS)]


def test_clusters(setting: ClusterSetting, sources: Sequence[str], each: int) -> list[tuple[float, Windows]]:
    """Return loads and held-out clusters: ``each`` for every source and load; each replica has its own budget."""
    rng = np.random.default_rng(TEST_SEED)
    found: list[tuple[float, Windows]] = []
    for source in sources:
        for load in TEST_LOADS:
            windows = serve_windows().at_load(load, load)
            found += [
                (load, [windows.sample(rng, "test", (source,)) for _ in range(setting.replicas)]) for _ in range(each)
            ]
    return found


def mean_cluster_utility(setting: ClusterSetting, clusters: Sequence[Windows], build: Build) -> float:
    """Return the mean utility of a policy, built anew for each replica of each cluster."""
    return float(np.mean([play_cluster(setting, windows, build)["utility"] for windows in clusters]))


def cluster_rules(setting: ClusterSetting) -> tuple[dict[str, Build], dict[str, Any]]:
    """Return every rule, tuned on training clusters, and what tuning chose."""
    clusters = train_clusters(setting)
    return rules(setting, partial(mean_cluster_utility, setting, clusters), len(clusters))


def read_about(path: Path) -> dict[str, Any]:
    """Return what the JSON of an exported policy says.

    Raises:
        ConfigError: for a policy that serves no requests.
    """
    about: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if about.get("task") not in BUILDERS:
        raise ConfigError(f"{path} was trained for {about.get('task')}; give policies of {' or '.join(BUILDERS)}")
    return about


def learned_cluster_policies(paths: Sequence[Path]) -> list[Build]:
    """Return one policy a file, trained on one replica or in clusters."""
    return [partial(BUILDERS[read_about(path)["task"]], path=str(path)) for path in paths]


def evaluate_cluster(
    setting: ClusterSetting,
    policies: Mapping[str, Sequence[Build]],
    clusters: Sequence[tuple[float, Windows]],
    *,
    oracle: bool = True,
) -> pd.DataFrame:
    """Return one row a policy, seed and cluster; ``oracle_static`` added unless it is not wanted."""
    rows = []
    for number, (load, windows) in enumerate(clusters):
        pressed = sum(window.budget != "full" for window in windows)
        shown = {"window": number, "source": windows[0].source, "load": load, "pressed": pressed}
        for name, seeds in policies.items():
            for seed, build in enumerate(seeds):
                rows.append({"policy": name, "seed": seed, **shown, **play_cluster(setting, windows, build)})
        if oracle:
            every = [play_cluster(setting, windows, fixed_plan(plan)) for plan in setting.actions.plans]
            best = max(every, key=lambda figures: float(figures["utility"]))
            rows.append({"policy": "oracle_static", "seed": 0, **shown, **best})
    return pd.DataFrame(rows)


__all__ = [
    "evaluate_cluster",
    "cluster_rules",
    "learned_cluster_policies",
    "mean_cluster_utility",
    "play_cluster",
    "read_about",
    "test_clusters",
    "train_clusters",
]
