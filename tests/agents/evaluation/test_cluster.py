"""Clusters are played by several processes as by one, and the best single plan in hindsight is no worse than any."""

from __future__ import annotations

import pandas as pd

from agents.baselines.serve import conf_policy
from agents.envs.cluster import CLUSTER_ACTIONS, ClusterSetting
from agents.envs.serve_windows import Window
from agents.evaluation.cluster import evaluate_cluster

SETTING = ClusterSetting(replicas=2, actions={**CLUSTER_ACTIONS, "drops": [0, 8], "admits": [None, 8]})
CLUSTERS = [
    (load, [Window(source="burst", start_s=s, rate=1.2, budget=kind, budget_seed=3) for kind in ("full", "cotenant")])
    for load, s in ((0.75, 300.0), (0.95, 2400.0))
]


def test_the_rows_of_clusters_do_not_depend_on_the_number_of_processes() -> None:
    policies = {name: [conf_policy(name)] for name in ("dense", "int4")}
    one, two = (evaluate_cluster(SETTING, policies, CLUSTERS, workers=workers) for workers in (1, 2))
    pd.testing.assert_frame_equal(one, two)
    assert list(one["policy"]) == ["dense", "int4", "oracle_static"] * 2
    assert list(one["load"]) == [0.75] * 3 + [0.95] * 3
    assert list(one["pressed"]) == [1] * 6
    for _, rows in one.groupby("window"):
        best = rows.set_index("policy")["utility"]
        assert best["oracle_static"] > max(best["dense"], best["int4"])
