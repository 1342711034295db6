"""The page of results: its tables and verdicts follow from the result files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from agents.evaluation.cluster_report import cluster_section, cluster_table_markdown, cluster_verdict
from agents.evaluation.prune_report import REFERENCE, prune_table_markdown, verdict, write_report
from agents.evaluation.serve_report import serve_section, serve_verdict
from sim.results.run_folder import write_json, write_parquet
from tests.agents.helpers import SMALL_MODEL


def test_the_page_is_made_from_the_files_and_says_who_won(played: pd.DataFrame, tmp_path: Path) -> None:
    # "ours" is the knapsack under another name, "worse" a random order: the verdict must name the former.
    knapsack, random = (played[played["policy"] == name] for name in ("knapsack", "random"))
    frame = pd.concat([played, knapsack.assign(policy="ours"), random.assign(policy="worse")])
    for name in ("prune.parquet", "prune_unseen.parquet"):
        write_parquet(tmp_path / name, frame)
    made = {
        "command": "python -m agents.evaluate",
        "commit": "0" * 40,
        "quality_sha256": "1" * 64,
        "trained_on": ["1" * 64],
        "machine": "a machine",
        "model": SMALL_MODEL.name,
        "knapsack_validation": 0.3,
        "network_p50_s": 1e-5,
        "network_p99_s": 2e-5,
    }
    write_json(tmp_path / "prune.json", made)
    page = write_report(tmp_path, tmp_path / "RESULTS.md").read_text(encoding="utf-8")
    assert "**ours**" in page
    assert (tmp_path / "prune.png").stat().st_size > 10_000
    mean = frame[frame["policy"] == REFERENCE]["utility_test"].mean()
    assert f"| {REFERENCE} | 1 | {mean:.4f} |" in page
    without = pd.concat([played, random.assign(policy="worse")])
    assert "it beats none" in verdict(without) or "beats dense" in verdict(without)
    assert prune_table_markdown(without).count("\n") == 2 + without["policy"].nunique()


def test_the_verdict_on_serving_names_who_won_and_where(tmp_path: Path) -> None:
    base = {"dense": 0.5, "greedy_stop": 0.6, "dense+queue": 0.8, "greedy_stop+queue": 0.82, "oracle_static": 0.9}
    base["oracle_search"] = 0.95
    rng = np.random.default_rng(0)
    easy = rng.normal(0.0, 0.05, 40)
    figures = ("slo_attainment", "goodput_rps", "ttft_p95_s", "rejected_share", "loss", "budget_violation_s")
    columns = dict.fromkeys((*figures, "transitions", "decision_p50_s", "decision_p99_s"), 0.0)
    rows = [
        {
            "policy": name,
            "seed": 0,
            "window": window,
            "source": "burst" if window < 20 else "azure_code",
            "budget": "full",
            "load": 0.25 if window % 2 else 0.85,
            "utility": value + easy[window] + (0.05 if window < 20 and name == "learned_x" else 0.0),
            **columns,
        }
        for name, value in {**base, "learned_x": 0.83}.items()
        for window in range(40)
    ]
    frame = pd.DataFrame(rows)
    text = serve_verdict(frame, ["burst"])
    assert "**learned_x** has utility" in text
    assert "undecided are none" in text
    assert "of the utility of oracle_search" in text
    assert "worst on azure_code (+0.010)" in text
    assert "best on burst (+0.060)" in text
    assert "What helps most is no pruning at all: a limit on the queue adds 0.220 to 0.300" in text
    worse = frame.assign(utility=frame["utility"].where(frame["policy"] != "learned_x", frame["utility"] - 0.5))
    assert "it loses to dense," in serve_verdict(worse, ["burst"])
    write_parquet(tmp_path / "serve.parquet", frame)
    tuned = {"static": "drop 0", "queue": 8, "greedy_stop": {}, "saber_margin": 0.4}
    made = {"command": "python -m agents.evaluate", "commit": "0" * 40, "tuned": tuned, "trained_on": ["burst"]}
    write_json(tmp_path / "serve.json", made)
    section = serve_section(tmp_path)
    assert "40 held-out windows" in section
    assert section.count("| learned_x |") == 4
    write_parquet(tmp_path / "serve_elsewhere.parquet", frame[frame["policy"] == "learned_x"].assign(policy="on_moon"))
    write_parquet(tmp_path / "serve_quality.parquet", frame[frame["policy"].isin(["learned_x", "dense"])])
    anew = {"policies": ["learned_x"], "commit": "2" * 40}
    write_json(tmp_path / "serve.json", {**made, "other_quality": "some_quality", "anew": anew})
    steps = {"env_steps": [1000, 2000], "seconds": [5.0, 10.0], "validation_utility": [0.7, 0.6]}
    write_parquet(tmp_path / "serve_training.parquet", pd.DataFrame({"policy": "learned_x", "seed": 0, **steps}))
    section = serve_section(tmp_path)
    assert "| learned_x | 1 | 0.7000 (0.7000 to 0.7000) | 10 | 2,000 |" in section
    assert "commit 000000000000 (learned_x: 222222222222)" in section
    assert section.count("| on_moon |") == 2
    assert "| policy | published | some_quality |" in section
    assert (tmp_path / "serve.png").stat().st_size > 10_000
    assert serve_section(tmp_path / "nothing") == ""


def test_the_verdict_on_clusters_names_who_won_where_and_what_training_in_them_adds(tmp_path: Path) -> None:
    rules = {"dense": 0.5, "static": 0.7, "precision+queue": 0.8, "oracle_static": 0.9}
    rng = np.random.default_rng(0)
    easy = rng.normal(0.0, 0.05, 40)
    easy -= easy.mean()
    names = ("slo_attainment", "goodput_rps", "ttft_p95_s", "rejected_share", "loss", "budget_violation_s")
    columns = dict.fromkeys((*names, "transitions", "busiest_share"), 0.0)
    learned = {"learned_serve": 0.81, "learned_cluster": 0.83, "learned_cluster_own": 0.79}
    rows = [
        {
            "policy": name,
            "seed": 0,
            "window": window,
            "source": "burst" if window < 20 else "azure_code",
            "load": 0.7 if window % 2 else 0.9,
            "pressed": window % 5,
            "utility": value + easy[window] + (0.05 if window < 20 and name == "learned_cluster" else 0.0),
            **columns,
        }
        for name, value in {**rules, **learned}.items()
        for window in range(40)
    ]
    frame = pd.DataFrame(rows)
    text = cluster_verdict(frame)
    assert "**learned_cluster** has utility" in text
    assert "the best rule here (precision+queue, 0.8000)" in text
    assert "undecided are none" in text
    assert "learned_cluster +0.0450 [" in text  # over learned_serve
    assert "minus learned_cluster_own: +0.0650 [" in text
    assert "worst on azure_code (+0.030) and best on burst (+0.080)" in text
    worse = frame.assign(utility=frame["utility"].where(frame["policy"] != "learned_cluster", 0.1))
    assert "**learned_cluster_own** has utility" in cluster_verdict(worse)
    nothing = frame[frame["policy"].isin(rules)]
    assert cluster_verdict(nothing).startswith("The best rule is **precision+queue**")
    assert cluster_table_markdown(frame).count("| - |") == 1  # the reference alone is not compared with itself
    write_parquet(tmp_path / "cluster.parquet", frame)
    tuned = {"static": "drop 0", "queue": 8, "greedy_stop": {}, "saber_margin": 0.4, "windows": 16}
    made = {"command": "python -m agents.evaluate", "commit": "0" * 40, "tuned": tuned, "rules_commit": "3" * 40}
    made |= {"replicas": 4, "router": "least_kv", "seconds": {}, "learned_serve_validation": 0.9}
    made["sources"] = {"learned_cluster": ["burst", "azure_conv"]}
    write_json(tmp_path / "cluster.json", made)
    section = cluster_section(tmp_path)
    assert "40 held-out clusters of 4 replicas behind the router least_kv" in section
    assert "commit 000000000000 (rules: 333333333333)" in section
    assert "windows of burst, azure_conv (learned_cluster)" in section
    assert section.count("| learned_cluster |") == 4
    write_parquet(tmp_path / "cluster_routers.parquet", frame.assign(router="round_robin"))
    steps = {"env_steps": [1000, 2000], "seconds": [5.0, 10.0], "validation_utility": [0.7, 0.6]}
    write_parquet(
        tmp_path / "cluster_training.parquet", pd.DataFrame({"policy": "learned_cluster", "seed": 0, **steps})
    )
    section = cluster_section(tmp_path)
    assert "| policy | round_robin |" in section
    assert "| learned_cluster | 1 | 0.7000 (0.7000 to 0.7000) | 10 | 2,000 |" in section
    assert (tmp_path / "cluster.png").stat().st_size > 10_000
    assert cluster_section(tmp_path / "nothing") == ""
