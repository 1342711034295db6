"""Clusters are played by several processes as by one; what is held out for the test is played after a claim."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from omegaconf import DictConfig

from agents.baselines.serve import conf_policy, policy_context
from agents.envs.cluster import CLUSTER_ACTIONS, ClusterSetting
from agents.envs.prune_loads import Split
from agents.envs.serve_lists import scenario_kwargs
from agents.envs.serve_windows import Window
from agents.evaluation import claim as claims
from agents.evaluation import measure_cluster
from agents.evaluation.chosen import named, replaced
from agents.evaluation.cluster import evaluate_cluster
from agents.evaluation.evaluate import EvaluateConfig  # noqa: F401 - registers the schema of conf/evaluate.yaml
from agents.training.export import check_terms
from sim.config import load_option
from sim.errors import ConfigError
from sim.policies.learned import read_learned
from sim.policies.learned_cluster import learned_cluster
from tests.agents.helpers import begin_checkout, commit_claim, composed, git, write_linear_policy

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


def small(split: Split) -> dict[str, Any]:
    return {
        "replicas": 2,
        "router": "least_kv",
        "actions": {**CLUSTER_ACTIONS, "drops": [0], "admits": [None]},
        "sources": ["gamma"],
        "slo": "ttft_2s_tpot_100ms",
        "tick_s": 20.0,
        "split": split,
    }


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A git checkout for claims, in place of the project's, with a policy of small clusters."""
    begin_checkout(tmp_path)
    monkeypatch.setattr(claims, "REPOSITORY", tmp_path)
    monkeypatch.setattr(measure_cluster, "environment", small)
    setting = ClusterSetting(**small("test"))
    weight = np.random.default_rng(0).normal(size=(len(setting.table.actions), setting.table.features))
    write_linear_policy(tmp_path, "ServeCluster", setting, weight.astype("float32"), np.zeros(len(weight), "float32"))
    return tmp_path


def configuration(folder: Path, *more: str) -> DictConfig:
    arguments = [f"cluster_learned={{learned_cluster: {folder}/p.json}}", "baselines=[dense,int4]", "cluster_curves={}"]
    arguments += ["tasks=[cluster]", "cluster_each=1", "cluster_sources=[gamma]", "cluster_claim=cluster_claim.json"]
    arguments = [named(one) for one in (*arguments, *more)]
    return replaced(composed("evaluate", *arguments), arguments)


def test_the_test_clusters_are_played_once_for_a_committed_claim_that_fits(checkout: Path) -> None:
    cfg, out = configuration(checkout), checkout / "out"
    path = commit_claim(
        checkout,
        "'tasks=[cluster]'",
        play=lambda: measure_cluster.measure_cluster(cfg, out),
        write=lambda: measure_cluster.write_cluster_claim(cfg),
    )
    with pytest.raises(ConfigError, match="claims other clusters than are about to be played"):
        measure_cluster.measure_cluster(configuration(checkout, "cluster_each=2"), out)
    with pytest.raises(ConfigError, match="claims other rules than"):
        measure_cluster.measure_cluster(configuration(checkout, "baselines=[dense]"), out)
    with pytest.raises(ConfigError, match="cluster_compared is 'other'; it must be one of cluster_learned: learned_cl"):
        measure_cluster.write_cluster_claim(configuration(checkout, "cluster_compared=other"))
    with pytest.raises(ConfigError, match="cluster_each is 0"):
        measure_cluster.clusters_played(configuration(checkout, "cluster_each=0"), "test")
    measure_cluster.measure_cluster(cfg, out)
    made, claim = json.loads((out / "cluster.json").read_text()), json.loads(path.read_text())
    assert made["claim"]["date"] == claim["date"]
    assert (made["split"], claim["clusters"]["split"], claim["clusters"]["count"]) == ("test", "test", 3)
    frame = pd.read_parquet(out / "cluster.parquet")
    assert frame.groupby("policy").size().to_dict() == dict.fromkeys(["dense", "int4", "learned_cluster"], 3)
    with pytest.raises(ConfigError, match="which is played once"):
        measure_cluster.measure_cluster(cfg, out)
    with pytest.raises(ConfigError, match=r"has results of other clusters \(split test\)"):
        measure_cluster.measure_cluster(configuration(checkout, "only=[dense]", "claim=none"), out)
    for folder in ("agents", "conf", "sim"):
        (checkout / folder).mkdir()
        (checkout / folder / "new.py").write_text("")
    git(checkout, "add", "-A")
    git(checkout, "commit", "-q", "-m", "change")
    with pytest.raises(ConfigError, match=r"agents/new\.py changed .* claim again: .* 'tasks=\[cluster\]'"):
        measure_cluster.measure_cluster(cfg, checkout / "elsewhere")


def test_validation_clusters_need_no_claim_and_are_others_than_the_test_clusters(checkout: Path) -> None:
    cfg, out = configuration(checkout, "claim=none", "baselines=[dense]", "cluster_learned={}"), checkout / "out"
    measure_cluster.measure_cluster(cfg, out)
    made = json.loads((out / "cluster.json").read_text())
    assert made["split"] == "validation"
    assert "claim" not in made
    drawn = {split: measure_cluster.clusters_played(cfg, split).clusters for split in ("validation", "test")}
    starts = {split: {one.start_s for _, cluster in clusters for one in cluster} for split, clusters in drawn.items()}
    assert max(starts["validation"]) < min(starts["test"])
    own = configuration(checkout, "cluster_claim=none", "baselines=[dense]", "cluster_learned={}")
    measure_cluster.measure_cluster(own, checkout / "own")
    pd.testing.assert_frame_equal(*(pd.read_parquet(folder / "cluster.parquet") for folder in (out, checkout / "own")))
    with pytest.raises(ConfigError, match="cluster_claim is none, with which no claim is played; name the file"):
        measure_cluster.write_cluster_claim(own)
    twice = configuration(checkout, "cluster_sources=[gamma,gamma]")
    with pytest.raises(ConfigError, match="cluster_sources has gamma more than once"):
        measure_cluster.clusters_played(twice, "validation")


def test_the_servers_of_clusters_are_those_of_one_replica_whose_memory_moves() -> None:
    cluster, alone = measure_cluster.environment("test"), load_option("env", "serve_trace").kwargs
    shared = ("model", "gpu", "latency", "quality", "engine", "slo", "workspace_bytes", "tick_s", "actions")
    assert {key: cluster[key] for key in shared} == {key: alone[key] for key in shared}
    assert cluster["budget"] == scenario_kwargs("mid/published")["budget"]


def test_a_policy_of_clusters_limits_admission_by_the_terms_of_its_file(tmp_path: Path) -> None:
    setting = ClusterSetting(replicas=2, slo="ttft_2s_tpot_100ms", actions={"waits": [1.0], "runs": [16]})
    weight = np.zeros((len(setting.table.actions), setting.table.features), dtype=np.float32)
    path, about = write_linear_policy(tmp_path, "ServeCluster", setting, weight, weight[:, 0])
    context = policy_context(setting)
    window = Window(source="burst", start_s=0.0, rate=20.0, budget="full", budget_seed=0)
    engine = setting.build_engine(window, setting.actions.plans[setting.actions.start])
    idle = replace(engine.run_until(0.0), running=10)
    later = replace(idle, time_s=1.0, iterations=idle.iterations + 10, busy_s=idle.busy_s + 10 * 0.026)
    terms = {"run_share": 0.5, "wait_share": 0.9}  # iterations of 50 ms
    check_terms(read_learned(path, "ServeCluster"), {**terms, "room_weight": 4.0})
    path.write_text(json.dumps({**about, **terms}))
    policy = learned_cluster(context, path=str(path))
    policy.among(idle, [idle])
    limited = policy.among(later, [later])
    assert (limited.max_running, limited.max_wait_s) == (19, 1.8)  # 10 x 50 / 26 in proportion; 0.9 x 2 s
