"""Evaluates policies of ``ServeCluster`` on the same held-out clusters; every replica has its own policy.

The rules are those of ``agents.evaluation.rules``, tuned on training clusters (``agents.evaluation.tuning``). Learned
policies include those trained on one replica and those trained in clusters. Only ``oracle_static`` knows the windows:
it is the best single plan in hindsight, the same on every replica.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from agents.baselines.serve import Build, fixed_plan, policy_context
from agents.envs.cluster import ClusterSetting
from agents.envs.prune_loads import Split
from agents.envs.serve_windows import Window, serve_windows
from agents.evaluation.figures import best_in_hindsight, serving_figures
from sim.errors import ConfigError
from sim.policies.base import Policy
from sim.policies.learned_cluster import learned_cluster
from sim.policies.learned_files import read_about as read_policy
from sim.policies.learned_serve import learned_serve
from sim.processes import in_forks
from sim.progress import counted, progress

Windows = Sequence[Window]

SEEDS: Mapping[Split, int] = {"train": 20251121, "validation": 20261130, "test": 20261202}
LOADS = (0.5, 0.75, 0.95)
"""Positions in each source's range of rates (conf/split/serve.yaml), on a logarithmic scale."""
BUILDERS: dict[str, Callable[..., Policy]] = {"ServeTrace": learned_serve, "ServeCluster": learned_cluster}


def play_cluster(setting: ClusterSetting, windows: Windows, build: Build) -> dict[str, Any]:
    """Serve a cluster in which every replica has its own policy that decides every tick; return its figures.

    They are ``serving_figures``, seconds over budget (sum over replicas), plan changes per replica, and the share of
    requests of the busiest replica.
    """
    context = policy_context(setting)
    cluster = setting.build_cluster(windows, [build(context) for _ in windows])
    cluster.run()
    records, engines = cluster.records(), cluster.engines()
    counts = np.bincount(records.replica, minlength=len(windows))
    return {
        **serving_figures(setting, cluster, len(records)),
        "budget_violation_s": sum(one.engine.budget_violation_s for one in engines),
        "transitions": sum(len(one.engine.transitions()) for one in engines) / len(engines),
        "busiest_share": float(counts.max() / len(records)),
    }


def clusters_of(
    setting: ClusterSetting, split: Split, sources: Sequence[str], each: int
) -> list[tuple[float, Windows]]:
    """Return (load, windows) of the clusters of a split, the same in every call: ``each`` for every source and load.

    All windows of a cluster are of one source. Rules are tuned on the clusters of ``train``.
    """
    rng = np.random.default_rng(SEEDS[split])
    clusters: list[tuple[float, Windows]] = []
    for source in sources:
        for load in LOADS:
            windows = serve_windows().at_load(load, load)
            clusters += [
                (load, [windows.sample(rng, split, (source,)) for _ in range(setting.replicas)]) for _ in range(each)
            ]
    return clusters


def mean_cluster_utility(setting: ClusterSetting, clusters: Sequence[Windows], build: Build) -> float:
    """Return the mean utility of a policy over clusters, in [0, 1]; it is built again for each replica."""
    with progress("playing", len(clusters), "clusters") as report:
        return float(np.mean(counted((play_cluster(setting, one, build)["utility"] for one in clusters), report)))


def read_about(path: Path) -> dict[str, Any]:
    """Return the JSON of an exported policy of ``ServeTrace`` or ``ServeCluster``.

    Raises:
        ConfigError: for a policy of another environment.
    """
    try:
        about = read_policy(path)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{path} is not a learned policy ({error}); use policies of {' or '.join(BUILDERS)}"
        ) from error
    if about["task"] not in BUILDERS:
        raise ConfigError(f"{path} was trained for {about.get('task')}; use policies of {' or '.join(BUILDERS)}")
    return about


def learned_cluster_policies(paths: Sequence[Path]) -> list[Build]:
    """Return a builder of the exported policy of each file, trained on one replica or in clusters."""
    return [partial(BUILDERS[read_about(path)["task"]], path=str(path)) for path in paths]


def evaluate_cluster(
    setting: ClusterSetting,
    policies: Mapping[str, Sequence[Build]],
    clusters: Sequence[tuple[float, Windows]],
    *,
    oracle: bool = True,
    workers: int = 1,
) -> pd.DataFrame:
    """Return one row for each policy, seed and cluster; ``oracle`` adds ``oracle_static``.

    Args:
        clusters: the load and the windows of each. workers: processes; the rows do not depend on it.
    """

    def played(number: int) -> list[dict[str, Any]]:
        load, windows = clusters[number]
        pressed = sum(window.budget != "full" for window in windows)
        about = {"window": number, "source": windows[0].source, "load": load, "pressed": pressed}
        rows = [
            {"policy": name, "seed": seed, **about, **play_cluster(setting, windows, build)}
            for name, seeds in policies.items()
            for seed, build in enumerate(seeds)
        ]
        if oracle:
            plans = [fixed_plan(plan) for plan in setting.actions.plans]
            best = best_in_hindsight([play_cluster(setting, windows, build) for build in plans])
            rows.append({"policy": "oracle_static", "seed": 0, **about, **best})
        return rows

    with progress("playing", len(clusters), "clusters") as report:
        each = counted(in_forks(played, range(len(clusters)), workers), report)
        return pd.DataFrame([row for rows in each for row in rows])
