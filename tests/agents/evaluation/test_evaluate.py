"""The page of results: its tables follow from the result files."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from agents.evaluation.cluster_report import cluster_table_markdown, cluster_verdict
from agents.evaluation.page import FOLDER, page, write_report
from agents.evaluation.prune_report import REFERENCE, prune_table_markdown, verdict
from agents.evaluation.serve_report import (
    against_the_best,
    easy_and_hopeless,
    same_rate,
    serve_table_markdown,
    serve_verdict,
)
from agents.evaluation.tables import read_rows
from sim.errors import ConfigError
from sim.results.run_folder import write_json, write_parquet
from tests.agents.helpers import SMALL_MODEL as MODEL
from tests.sim.pages.test_render import cells

PROVENANCE = {"command": "python -m agents.evaluate", "commit": "0" * 40, "machine": "a machine"}
TUNED = {"static": "drop 0", "queue": 8, "greedy_stop": {"headroom": 1.1}, "saber_margin": 0.4, "windows": 16}
STEPS = {"env_steps": [1000, 2000], "seconds": [5.0, 10.0], "validation_utility": [0.7, 0.6]}


def row_of(text: str, label: str) -> list[str]:
    """Return the first row of a Markdown table that begins with a label."""
    return next(row for row in cells(text) if row[0] == label)


def write_prune(folder: Path, frame: pd.DataFrame) -> None:
    """Write what the section on pruning is made from."""
    for name in ("prune.parquet", "prune_unseen.parquet"):
        write_parquet(folder / name, frame)
    more = {"quality_sha256": "1" * 64, "trained_on": ["1" * 64], "model": MODEL.name, "knapsack_validation": 0.3}
    write_json(folder / "prune.json", {**PROVENANCE, **more, "network_p50_s": 1e-5, "network_p99_s": 2e-5})


def test_the_committed_page_is_what_the_committed_files_give(tmp_path: Path) -> None:
    for path in FOLDER.iterdir():
        if path.suffix in (".parquet", ".json"):
            shutil.copy(path, tmp_path)
    assert page(tmp_path) == (FOLDER / "index.md").read_text(encoding="utf-8")


def test_the_page_names_the_best_learned_policy_and_holds_the_means_of_the_files(
    played: pd.DataFrame, tmp_path: Path
) -> None:
    # "ours" is the knapsack under another name, "worse" a random order: the verdict must name the former.
    knapsack, random = (played[played["policy"] == name] for name in ("knapsack", "random"))
    frame = pd.concat([played, knapsack.assign(policy="ours"), random.assign(policy="worse")])
    write_prune(tmp_path, frame)
    assert ["ours", "1"] in [row[:2] for row in cells(write_report(tmp_path).read_text(encoding="utf-8"))]
    assert (tmp_path / "prune.png").stat().st_size > 10_000
    mean = frame[frame["policy"] == REFERENCE]["utility_test"].mean()
    assert row_of(prune_table_markdown(frame), REFERENCE)[1:4] == ["1", f"{mean:.4f}", "-"]
    found = verdict(frame)
    assert found["name"] == "ours"
    assert found["of_knapsack"] == pytest.approx(1.0)
    assert "greedy_stop" in found["beats"]
    assert "knapsack" in found["undecided"]
    assert "mha_only" in verdict(pd.concat([played, random.assign(policy="worse")]))["loses_to"]
    assert verdict(played) == {}
    averaged = [random.assign(policy="average"), knapsack.assign(policy="average_seeds")]
    assert verdict(pd.concat([played, *averaged]))["name"] == "average"  # its networks are better, but do not ship
    assert len(cells(prune_table_markdown(frame))) == 1 + frame["policy"].nunique()


SHIPPED = ["learned_prune_smollm2"]


def scenarios(utilities: dict[str, float], helped: str, columns: dict[str, list[Any]]) -> pd.DataFrame:
    """Return 40 scenarios of policies with these mean utilities; one policy is better by 0.05 on trace burst."""
    easy = np.random.default_rng(0).normal(0.0, 0.05, 40)
    figures = ("slo_attainment", "goodput_rps", "ttft_p95_s", "rejected_share", "loss", "budget_violation_s")
    zeros = dict.fromkeys((*figures, "transitions", "decision_p50_s", "decision_p99_s", "busiest_share"), 0.0)
    return pd.DataFrame(
        [
            {
                "policy": name,
                "seed": 0,
                "window": window,
                "source": "burst" if window < 20 else "azure_code",
                **{column: kinds[window % len(kinds)] for column, kinds in columns.items()},
                "utility": value + (easy - easy.mean())[window] + (0.05 if window < 20 and name == helped else 0.0),
                **zeros,
            }
            for name, value in utilities.items()
            for window in range(40)
        ]
    )


def served(utilities: dict[str, float]) -> pd.DataFrame:
    """Return 40 windows in 20 blocks of two traces and two scenarios; rules that need low precision miss one."""
    kinds = {"budget": ["full"], "load": [0.6, 0.9], "rate": [2.0, 1.0], "scenario": ["roomy/published", "tight/none"]}
    frame = scenarios(utilities, "learned_x", kinds).assign(block=lambda rows: rows["window"] // 2)
    return frame[~((frame["policy"] == "int4+wait") & (frame["scenario"] == "tight/none"))]


def test_the_verdict_on_serving_names_who_won_and_where(played: pd.DataFrame, tmp_path: Path) -> None:
    rules = {"dense": 0.5, "greedy_stop": 0.6, "int4+wait": 0.9, "greedy_stop+wait": 0.82}
    learned = {"learned_x": 0.83, "learned_x (seeds)": 0.81}
    frame = served(rules | {"oracle_static": 0.9, "oracle_search": 0.95} | learned)
    found = serve_verdict(frame, "learned_x")
    # int4+wait is better where it runs; the best rule is one that runs everywhere.
    assert (found["best"], found["simple"]) == ("learned_x", "greedy_stop+wait")
    assert set(found["beats"]) == set(rules) - {"int4+wait"}
    assert (found["undecided"], found["loses_to"]) == ([], ["int4+wait"])
    shares = {row["oracle"]: row["share of it, learned_x"] for row in found["oracles"]}
    assert shares["oracle_search"] == pytest.approx(0.855 / 0.95)
    by_trace = {row["source"]: row for row in against_the_best(frame, "learned_x", "source")}
    # The hardest rule of a trace may run in some scenarios alone; the two are compared there.
    assert {row["hardest rule"] for row in by_trace.values()} == {"int4+wait"}
    assert by_trace["burst"]["windows"] == 10
    assert by_trace["burst"]["difference"].startswith("-0.0200")
    assert by_trace["azure_code"]["difference"].startswith("-0.0700 [")
    fewer = against_the_best(frame.assign(block=frame["window"] // 10), "learned_x", "source")
    assert [row["difference"] for row in fewer] == ["-0.0200 (too few blocks)", "-0.0700 (too few blocks)"]
    by_scenario = {row["scenario"]: row["hardest rule"] for row in against_the_best(frame, "learned_x", "scenario")}
    assert by_scenario == {"roomy/published": "int4+wait", "tight/none": "greedy_stop+wait"}
    assert [row["holds"] for row in found["claims"]] == [False, False, False]
    assert [row["figures"].split("[")[0] for row in found["claims"]] == [
        "3 of 4 rules",
        "least on azure_code, against int4+wait: -0.0700 ",
        "90.0% ",
    ]
    level = frame[~frame["policy"].isin(["int4+wait", "oracle_search"])]
    assert [row["holds"] for row in serve_verdict(level, "learned_x")["claims"]] == [True, True, None]
    assert same_rate(frame) == 0
    assert same_rate(frame.assign(rate=1.0, scenario="roomy/published")) == 40
    assert "best" not in serve_verdict(frame[~frame["policy"].str.startswith("learned")], "learned_x")
    assert serve_verdict(frame, "another")["best"] == "learned_x"
    assert row_of(serve_table_markdown(frame), "learned_x")[:4] == ["learned_x", "1", "40", "0.8550"]

    write_prune(tmp_path, played)
    write_parquet(tmp_path / "serve.parquet", frame)
    policies = {"learned_x": [{"file": "x.json", "sha256": "4" * 64, "weights_sha256": "5" * 64}]}
    made = {**PROVENANCE, "trained_on": ["burst"], "split": "test", "compared": "learned_x", "policies": policies}
    write_json(tmp_path / "serve.json", made)
    text = page(tmp_path)
    assert row_of(text, "learned_x (seeds)")[2] == "40"
    assert "with training seeds in the interval too: -0.0100 [" in text
    assert "fewer than six blocks" not in text
    write_parquet(tmp_path / "serve.parquet", frame.assign(block=frame["window"] // 10))
    assert "Blocks of time: azure_code 2, burst 2." in page(tmp_path)
    write_parquet(tmp_path / "serve.parquet", frame)
    claim = {"file": "claim.json", "commit": "6" * 40, "date": "2026-01-02T03:04:05", "claims_before": 2}
    replayed = [{"policies": ["learned_x"], "commit": "2" * 40}]
    write_json(tmp_path / "serve.json", {**made, "claim": claim, "replayed": replayed, "notes": ["Note A."]})
    write_parquet(tmp_path / "serve_training.parquet", pd.DataFrame({"policy": "learned_x", "seed": 0, **STEPS}))
    text = page(tmp_path)
    assert "| **no**  | 3 of 4 rules" in text
    assert ["learned_x", "1", "0.7000", "0.7000 to 0.7000", "10", "2,000"] in cells(text)
    for part in ("222222222222", "444444444444", "666666666666", "2026-01-02", "\n- Note A.\n"):
        assert part in text
    assert (tmp_path / "serve.png").stat().st_size > 10_000


def test_a_damaged_result_file_is_an_error_that_names_it(tmp_path: Path, played: pd.DataFrame) -> None:
    path = tmp_path / "serve.parquet"
    write_parquet(path, played)
    whole = path.read_bytes()
    for damaged in (b"", b"PAR1", whole[:-10], b"policy,utility"):
        path.write_bytes(damaged)
        with pytest.raises(ConfigError, match=r"serve\.parquet cannot be read .*; delete it, and evaluate again"):
            read_rows(path)
    write_parquet(path, pd.DataFrame({"utility": [0.5]}))
    with pytest.raises(ConfigError, match=r"serve\.parquet has no column policy; delete it"):
        read_rows(path)


def test_the_page_says_how_many_windows_decide_little() -> None:
    found = easy_and_hopeless(
        pd.DataFrame(
            [
                {"policy": policy, "window": window, "seed": 0, "source": "a", "block": window, "utility": utility}
                for policy, utilities in {
                    "dense": (0.995, 0.05, 0.2, 0.3),
                    "int4": (0.999, 0.1, 0.4, 0.6),
                    "learned_serve": (1.0, 0.9, 0.6, 0.7),
                }.items()
                for window, utility in enumerate(utilities)
            ]
        ),
        "learned_serve",
        "int4",
    )
    assert found is not None
    assert (found["easy"], found["dense"], found["hopeless"]) == (1, 1, 1)
    assert (found["easiest"], found["of_easiest"]) == ("a", 1)
    assert found["against_simple"].startswith("+0.1500")


def test_the_verdict_on_clusters_names_who_won_where_and_what_the_other_policies_learned(
    played: pd.DataFrame, tmp_path: Path
) -> None:
    rules = {"dense": 0.5, "static+saber": 0.7, "load_table+saber": 0.8}
    learned = {"learned_serve": 0.81, "learned_cluster": 0.83, "learned_cluster_own": 0.79}
    utilities = rules | {"oracle_static": 0.9} | learned
    frame = scenarios(utilities, "learned_cluster", {"load": [0.9, 0.7], "pressed": [0, 1, 2, 3, 4]})
    found = cluster_verdict(frame, "learned_cluster")
    assert (found["compared"], found["simple"]) == ("learned_cluster", "load_table+saber")
    assert found["simple_utility"] == pytest.approx(0.8)
    assert set(found["beats"]) == set(rules)
    assert found["worst"] == ("azure_code", pytest.approx(0.03))
    assert found["easiest"] == ("burst", pytest.approx(0.08))
    added = {(pair["policy"], pair["minus"]): pair["utility"].split()[0] for pair in found["pairs"]}
    assert added["learned_cluster", "learned_serve"] == "+0.0450"
    assert added["learned_cluster", "learned_cluster_own"] == "+0.0650"
    assert added["learned_serve", "load_table+saber"] == "+0.0100"
    assert cluster_verdict(frame, "learned_serve")["beats"] == [*rules]
    assert "compared" not in cluster_verdict(frame[frame["policy"].isin(rules)], "learned_cluster")
    compared = [row[3] for row in cells(cluster_table_markdown(frame, "learned_cluster"))]
    assert compared.count("-") == 1  # the compared policy alone is not compared with itself

    write_prune(tmp_path, played)
    write_parquet(tmp_path / "cluster.parquet", frame)
    replayed = [{"policies": ["dense"], "commit": "3" * 40}]
    made = {**PROVENANCE, "tuned": TUNED, "replayed": replayed, "replicas": 4, "router": "least_kv", "seconds": {}}
    made |= {"sources": {"learned_cluster": ["burst", "azure_conv"]}, "compared": "learned_cluster"}
    write_json(tmp_path / "cluster.json", made)
    assert "333333333333" in page(tmp_path)
    write_parquet(tmp_path / "cluster_routers.parquet", frame.assign(router="round_robin"))
    curves = pd.DataFrame({"policy": "learned_cluster", "seed": 0, **STEPS})
    write_parquet(tmp_path / "cluster_training.parquet", curves)
    text = page(tmp_path)
    assert ["policy", "round_robin"] in cells(text)
    assert ["learned_cluster", "1", "0.7000", "0.7000 to 0.7000", "10", "2,000"] in cells(text)
    assert (tmp_path / "cluster.png").stat().st_size > 10_000
