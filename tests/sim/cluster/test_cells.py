"""Cells: each is a cluster of its own, all requests are served once, and processes change nothing."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from omegaconf import DictConfig

from sim.cluster.cells import CELL_SEEDS, CellJob, cell_config, cells_summary, check_cells, merged
from sim.cluster.run import build_cluster, cell_trace, cluster_command, run, run_figures, serve_cell
from sim.config import compose_config
from sim.errors import ConfigError
from sim.replay.run import build_trace
from tests.commands import exit_status

SHORT = ["trace.duration_s=40", "trace.rate_rps=12"]
MEASURED = ("cpu_s", "requests_per_cpu_s", "peak_process_bytes", "wall_s")


def config(*overrides: str) -> DictConfig:
    return compose_config("cluster", [*SHORT, *overrides])


def plain(summary: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in summary.items() if key not in MEASURED}


def test_shares_are_the_whole_trace_each_request_once() -> None:
    cfg = config("cells=3")
    whole, parts = build_trace(cfg), [cell_trace(cfg, cell) for cell in range(3)]
    assert sum(map(len, parts)) == len(whole)
    together = np.sort(np.concatenate([part.arrival_s for part in parts]))
    np.testing.assert_array_equal(together, whole.arrival_s)
    np.testing.assert_array_equal(parts[1].prompt_tokens, whole.prompt_tokens[1::3])


def test_own_requests_differ_between_cells_and_are_those_of_the_cells_seed() -> None:
    cfg = config("cells=2", "cell_requests=own", "seed=7")
    first, second = (cell_trace(cfg, cell) for cell in range(2))
    assert first == build_trace(config("seed=7"))
    assert second == build_trace(config(f"seed={7 + CELL_SEEDS}"))
    assert first != second


@pytest.mark.parametrize("keep_iterations", [True, False])
def test_cells_together_have_the_figures_of_their_records(keep_iterations: bool) -> None:
    cfg = config("cells=3", "policy=greedy_stop", "budget=cotenant", f"keep_iterations={str(keep_iterations).lower()}")
    alone = []
    for cell in range(3):
        cluster = build_cluster(cell_config(cfg, cell), cell_trace(cfg, cell))
        cluster.run()
        alone.append(cluster.records())
    summary = run_figures(cfg)
    ttft_s = np.concatenate([records.ttft_s for records in alone])
    assert summary["requests"] == len(ttft_s)
    assert summary["ttft_s"]["mean"] == pytest.approx(np.nanmean(ttft_s))
    assert summary["ttft_s"]["p95"] == pytest.approx(np.nanquantile(ttft_s, 0.95, method="inverted_cdf"), rel=1e-3)
    kept = np.concatenate([records.kept_params_share for records in alone])
    assert summary["kept_params_share"] == pytest.approx(np.nanmean(kept))
    tokens = sum(int(records.produced_tokens.sum()) for records in alone)
    assert summary["output_tokens_per_s"] == pytest.approx(tokens / summary["makespan_s"])
    assert (summary["kv_peak_share"] is None) == (not keep_iterations)
    assert (summary["recomputed_tokens"] is None) == (not keep_iterations)


def test_one_cell_of_several_has_every_figure_of_a_cluster_alone() -> None:
    _, alone = run(config())
    cell = cells_summary(merged([serve_cell(CellJob(cfg=config(), cell=0))]))
    same = set(alone) - {"replicas", *MEASURED, "itl_s"}
    for name in same:
        if isinstance(alone[name], dict):
            for key, value in alone[name].items():
                assert cell[name][key] == pytest.approx(value, rel=0.05 if key.startswith("p") else 1e-9), (name, key)
        elif name not in ("max_rate_rps", "utilization"):
            assert cell[name] == pytest.approx(alone[name]), name


def test_a_run_folder_is_the_same_on_one_and_two_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for workers in (1, 2):
        words = ["cells=3", "replicas.main.count=2", f"workers={workers}", f"hydra.run.dir={tmp_path / str(workers)}"]
        monkeypatch.setattr(sys, "argv", ["sim.cluster", *SHORT, *words])
        cluster_command()
    said = capsys.readouterr().out
    assert "3 cells, 6 replicas" in said
    assert "SLO attainment of a cell: " in said
    one, two = (tmp_path / "1", tmp_path / "2")
    names = sorted(path.name for path in (one / "records").iterdir())
    assert names == ["00000.parquet", "00001.parquet", "00002.parquet"]
    for name in names:
        assert (one / "records" / name).read_bytes() == (two / "records" / name).read_bytes()
    assert (one / "replicas.parquet").read_bytes() == (two / "replicas.parquet").read_bytes()
    first, second = (json.loads((folder / "summary.json").read_text("utf-8")) for folder in (one, two))
    assert plain(first) == plain(second)
    rows = sum(len(pd.read_parquet(one / "records" / name)) for name in names)
    assert rows == first["requests"] == first["finished"]
    assert pd.read_parquet(one / "replicas.parquet")["cell"].tolist() == [0, 0, 1, 1, 2, 2]


@pytest.mark.slow
def test_records_are_byte_identical_on_one_process_and_on_a_ray_cluster_of_two_nodes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ray_address: str
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["cells=4", "trace=chats", "trace.arrivals.duration_s=30", "replicas.main.count=2"]
    words += ["router=session_affinity", "engine.prefix_caching=true", "engine.hash_block_tokens=16"]
    for name, executor in {"here": ["workers=1"], "ray": ["executor=ray", f"executor.address={ray_address}"]}.items():
        monkeypatch.setattr(sys, "argv", ["sim.cluster", *words, *executor, f"hydra.run.dir={name}"])
        cluster_command()
    names = sorted(path.name for path in (tmp_path / "here" / "records").iterdir())
    assert len(names) == 4
    for name in (*(f"records/{name}" for name in names), "replicas.parquet"):
        assert (tmp_path / "here" / name).read_bytes() == (tmp_path / "ray" / name).read_bytes(), name
    first, second = (json.loads((tmp_path / name / "summary.json").read_text("utf-8")) for name in ("here", "ray"))
    assert plain(first) == plain(second)
    assert first["cached_share"] > 0.3


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["cells=0"], "cells is 0; it must be at least 1"),
        (["cells=2", "cell_requests=shared"], "unknown cell_requests=shared; did you mean 'share'"),
        (["cells=2", "plot=true"], "plot=true draws the replicas of one cluster, but cells is 2; set plot=false"),
        (["cells=2", "cell_requests=own", "trace.seed=3"], "all cells would serve the same; set cell_requests=share"),
        (["cells=2", "max_rate=true"], "the maximum rate of one cluster, but cells is 2; leave it out, or set cells=1"),
        (["cells=1000000"], "lower cells"),
    ],
)
def test_cells_that_cannot_be_are_refused_in_a_sentence(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_cells(config(*overrides))


def test_too_few_requests_are_an_error_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["cells=500", *SHORT, f"hydra.run.dir={tmp_path / 'run'}"]
    assert exit_status(cluster_command, *words) == 2
    assert "too few for cells=500; set fewer cells" in capsys.readouterr().err


def test_sessions_are_dealt_whole_and_each_cell_serves_its_own_in_order() -> None:
    cfg = compose_config("cluster", ["trace=chat_users", "workload=none", "trace.users=6", "cells=3"])
    whole, parts = build_trace(cfg), [cell_trace(cfg, cell) for cell in range(3)]
    assert whole.session is not None
    sessions = [set(part.session.tolist()) for part in parts if part.session is not None]
    assert len(sessions) == 3
    assert set().union(*sessions) == set(whole.session.tolist())
    assert sum(map(len, sessions)) == len(set().union(*sessions))
    summary = run_figures(cfg)
    assert summary["finished"] == summary["requests"] == len(whole)
    alone = compose_config("cluster", ["trace=chat_users", "workload=none", "trace.users=2", "cells=5"])
    with pytest.raises(ConfigError, match="a closed loop of 2 users, and 3 of cells=5 would have none"):
        run_figures(alone)


def test_cells_run_again_in_the_folder_of_a_run_that_was_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing that the killed run left is taken for records: more cells, and a file that was half written."""
    (tmp_path / "records").mkdir()
    for name in ("00000.parquet", "00007.parquet", ".00003.parquet.abc.part", "notes.txt"):
        (tmp_path / "records" / name).write_text("half")
    monkeypatch.setattr(sys, "argv", ["sim.cluster", *SHORT, "cells=2", f"hydra.run.dir={tmp_path}"])
    cluster_command()
    names = {path.name for path in (tmp_path / "records").iterdir()}
    assert names == {"00000.parquet", "00001.parquet", "notes.txt"}
    rows = sum(len(pd.read_parquet(path)) for path in (tmp_path / "records").glob("*.parquet"))
    assert rows == json.loads((tmp_path / "summary.json").read_text("utf-8"))["requests"]
