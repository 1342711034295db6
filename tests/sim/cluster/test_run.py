"""``python -m sim.cluster``: a run folder of the same kind as a replay's, and tables of several clusters."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from sim.cluster import outages
from sim.cluster.autoscaler import ByRequests
from sim.cluster.cluster import ClusterState
from sim.cluster.run import build_cluster, cluster_command, cluster_figures, replicas_of, run
from sim.config import CONF_DIR, build
from sim.errors import ConfigError
from sim.replay.run import build_engine, build_trace, replay_with
from sim.replay.variants import variants
from sim.results.records import Records

SHORT = ["trace.duration_s=30"]


def config(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        return compose("cluster", overrides=[*SHORT, *overrides])


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["policy=greedy_stop", "budget=cotenant", "budget.mean_away_s=8", "seed=3"],
        ["policy=learned_cluster", "latency=llama2_7b_a100_trtllm", "budget=cotenant", "trace.rate_rps=12"],
    ],
)
def test_one_replica_leaves_the_records_of_a_replay_with_the_same_configuration(overrides: list[str]) -> None:
    cfg = config("replicas.main.count=1", *overrides)
    cluster, summary = run(cfg)
    trace, (engine, policy) = build_trace(cfg), build_engine(cfg)
    replay_with(cfg, trace, engine, policy)
    ours, theirs = cluster.records(), engine.records()
    for field in dataclasses.fields(Records):
        a, b = getattr(ours, field.name), getattr(theirs, field.name)
        assert np.array_equal(a, b, equal_nan=a.dtype.kind == "f"), field.name
    assert summary["replicas"][0]["requests"] == len(trace)
    assert summary["transitions"] == len(engine.transitions())


def test_clients_of_a_cluster_wait_for_its_front_end_as_well() -> None:
    plain, (_, summary) = build_trace(config()), run(config("frontend=vllm", "frontend.front_s=0.25"))
    cluster, _ = run(config("frontend=vllm", "frontend.front_s=0.25"))
    assert cluster.records().arrival_s.tolist() == (plain.arrival_s + 0.25).tolist()
    for name in ("ttft_s", "e2e_s"):
        assert summary[f"client_{name}"]["p50"] == pytest.approx(summary[name]["p50"] + 0.25)


def run_here(monkeypatch: pytest.MonkeyPatch, folder: Path, *overrides: str) -> None:
    monkeypatch.setattr(sys, "argv", ["sim.cluster", *SHORT, *overrides, f"hydra.run.dir={folder}"])
    cluster_command()


def test_a_run_folder_holds_records_replicas_and_events(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    overrides = ["outages=schedule", "outages.rows=[[0,10,15]]", "load_bytes_per_s=1e10", "start_s=1"]
    run_here(monkeypatch, tmp_path, *overrides, "+replicas.big={gpu: h100_80gb, policy: rap_80}")
    records, replicas = pd.read_parquet(tmp_path / "records.parquet"), pd.read_parquet(tmp_path / "replicas.parquet")
    events = pd.read_parquet(tmp_path / "events.parquet")
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert replicas.name.tolist() == ["main_0", "main_1", "big"]
    assert replicas.requests.sum() == len(records) == summary["requests"] == summary["finished"]
    assert records.groupby("replica").size().tolist() == replicas.requests.tolist()
    assert summary["moved"] == (records.moves > 0).sum() > 0
    assert events.phase.tolist() == ["serving"] * 3 + ["down", "loading", "serving"]
    loaded_s = events.time_s.iloc[-1] - 15.0
    assert loaded_s == pytest.approx(1.0 + 13.4768e9 / 1e10, rel=1e-3)  # Llama-2-7B in FP16
    assert summary["replica_hours"] == pytest.approx(replicas.up_s.sum() / 3600)
    assert (tmp_path / "config.yaml").exists()
    assert json.loads((tmp_path / "provenance.json").read_text())["trace"]["sha256"]


def test_without_iterations_the_figures_that_need_none_are_the_same() -> None:
    kept, lean = (run(config(f"keep_iterations={flag}"))[1] for flag in ("true", "false"))
    for key in ("requests", "finished", "ttft_s", "makespan_s", "goodput_rps", "iterations", "slo_attainment"):
        assert kept[key] == lean[key], key
    assert lean["recomputed_tokens"] is None
    assert kept["recomputed_tokens"] == 0


def test_variants_over_seeds_make_one_table_the_same_for_any_number_of_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = ["+variants.one={replicas.main.count: 1}", "+variants.two={router: round_robin}", "seeds=[0,1]"]
    found = []
    for workers in (1, 2):
        run_here(monkeypatch, tmp_path / str(workers), *overrides, f"workers={workers}")
        content = json.loads((tmp_path / str(workers) / "compare.json").read_text())
        for row in content["summaries"].values():
            for summary in row:
                del summary["cpu_s"], summary["requests_per_cpu_s"]
        found.append(content["summaries"])
    assert found[0] == found[1]
    assert {label: len(row) for label, row in found[0].items()} == {"one": 2, "two": 2}
    assert found[0]["one"][0]["requests"] == found[0]["two"][0]["requests"]
    assert "| one |" in (tmp_path / "1" / "compare.md").read_text()


def test_every_replica_has_a_co_tenant_of_its_own() -> None:
    cluster = build_cluster(config("budget=cotenant", "budget.mean_away_s=5", "replicas.main.count=3"))
    assert len({served.engine.budget.change_s for served in cluster.engines()}) == 3


def test_an_impossible_configuration_is_an_error_that_names_the_nearest_option() -> None:
    with pytest.raises(ConfigError, match=r"replicas\.main: there is no gpu=a100; did you mean 'a100_80gb'"):
        replicas_of(config("+replicas.main.gpu=a100"))
    with pytest.raises(ConfigError, match="replicas has none"):
        replicas_of(config("replicas.main.count=0"))
    with pytest.raises(ConfigError, match="count is many"):
        replicas_of(config("replicas.main.count=many"))
    with pytest.raises(ConfigError, match=r"variants\.x: there is no 'rooter'"):
        variants(config("+variants.x={rooter: round_robin}"))
    with pytest.raises(ConfigError, match="no label 'y'"):
        variants(config("+variants.x={router: round_robin}", "only=[y]"))


@pytest.mark.parametrize("group", ["router", "outages", "autoscaler"])
def test_every_option_of_a_group_builds_and_serves(group: str) -> None:
    for option in sorted(path.stem for path in (CONF_DIR / group).glob("*.yaml")):
        cfg = config(f"{group}={option}", "replicas.main.count=4")
        assert run(cfg)[1]["finished"] > 0, option


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ("[[7,10,15]]", "names replica 7; the cluster has 2 replicas, 0 and 1"),
        ("[[0,1,2],[2,10,15],[9,1,2]]", "names replica 2, 9;"),
        ("[[0,10,15],[0,12,20]]", "must not overlap"),
        ("[[0,12,20],[0,10,15]]", "must not overlap"),
        ("[[0,10,null],[0,12,20]]", "must not overlap"),
        ("[[0,-1,5]]", "begin at 0 s or later"),
        ("[[0,5,5]]", "end after that"),
        ("[[0,.nan,5]]", "begin at 0 s or later"),
        ("[[0,5,.nan]]", "end after that"),
        ("[[0,.inf,.inf]]", "begin at 0 s or later"),
        ("[[.nan,1,5]]", "replica is nan; it must be a whole number from 0"),
        ("[[0.5,1,5]]", "replica is 0.5"),
        ("[[true,1,5]]", "replica is True"),
        ("[[0,early,5]]", "from_s is early"),
        ("[[0,null,5]]", "from_s is None"),
        ("[3]", "3 is not"),
    ],
)
def test_an_outage_that_cannot_be_is_an_error_that_names_the_row_or_the_replicas(rows: str, said: str) -> None:
    cfg = config("outages=schedule")
    cfg.outages.rows = yaml.safe_load(rows)
    with pytest.raises(ConfigError, match=re.escape(said)):
        replicas_of(cfg)


def test_outages_of_one_seed_are_the_same_and_differ_by_replica() -> None:
    overrides = {"mean_up_s": 50.0, "mean_away_s": 10.0, "horizon_s": 20000.0, "seed": 4}
    first, again = outages.markov(**overrides), outages.markov(**overrides)
    assert first(0) == again(0) != first(1)
    up_s = np.diff([0.0, *(o.from_s for o in first(0))]) - [0.0, *(o.until_s - o.from_s for o in first(0)[:-1])]
    assert 40 < up_s.mean() < 60
    with pytest.raises(ConfigError, match=r"\[0, 3\.0\] is not \[replica, from_s, until_s\]"):
        outages.schedule(rows=[[0, 3.0]])
    with pytest.raises(ConfigError, match="mean_up_s is 0"):
        outages.markov(mean_up_s=0, mean_away_s=1, horizon_s=1, seed=0)


def test_by_requests_grows_at_once_and_shrinks_after_patience() -> None:
    scaler = ByRequests(requests_each=10, most=4, patience=3)
    busy = build_cluster(config("replicas.main.count=1")).engines()[0].engine.observe(0.0)

    def wanted(requests: int, serving: int) -> int:
        states = [dataclasses.replace(busy, waiting=0, running=0)] * serving
        states[0] = dataclasses.replace(busy, waiting=requests, running=0)
        return scaler(ClusterState(time_s=0.0, serving=tuple(states), loading=0, held=0))

    assert wanted(35, 1) == 4
    assert [wanted(11, 4) for _ in range(4)] == [4, 4, 3, 4]
    assert wanted(500, 4) == 4
    with pytest.raises(ConfigError, match="they must ascend"):
        ByRequests(requests_each=1, most=2, first=3)


def test_a_summary_has_figures_of_every_replica_that_add_up() -> None:
    cfg = config("outages=failures", "outages.mean_up_s=10", "outages.mean_away_s=3", "replicas.main.count=3")
    cluster, _ = run(cfg)
    summary = cluster_figures(cluster, build(cfg.slo))
    rows = summary["replicas"]
    assert sum(row["moved_away"] for row in rows) == summary["moves"] > 0
    assert sum(row["requests"] for row in rows) + summary["never_routed"] == summary["requests"]
    assert sum(row["starts"] for row in rows) > 3
    assert all(0 <= row["busy_share"] <= 1 for row in rows)
