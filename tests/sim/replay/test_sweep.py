"""Many replays at once: seeds, windows, processes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import DictConfig

from sim.config import CONF_DIR, build
from sim.errors import ConfigError
from sim.replay.__main__ import main
from sim.replay.run import build_trace
from sim.replay.sweep import Case, Processes, cases_of, config_of, replay_case, time_mean
from tests.commands import exit_status

QUICK = ("trace.duration_s=40", "budget=cotenant", "budget.mean_away_s=8", "budget.mean_stay_s=8")


def composed(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        return compose("replay", overrides=[*QUICK, "policy=greedy_stop", *overrides])


def test_every_window_is_replayed_at_every_seed_and_one_case_is_the_default() -> None:
    assert cases_of(composed("seed=7")) == [Case(7)]
    cases = cases_of(composed("seeds=[1,2]", "windows=[0,3]", "window_s=10"))
    assert [case.name for case in cases] == [f"seed_{s}_window_{w}" for s in (1, 2) for w in (0, 3)]


def test_windows_cut_a_trace_into_pieces_that_add_up_and_begin_at_zero() -> None:
    cfg = composed("windows=[0,1,2,3]", "window_s=10")
    full = build_trace(composed())
    pieces = [build_trace(config_of(cfg, case)) for case in cases_of(cfg)]
    assert sum(map(len, pieces)) == len(full)
    assert all(0 <= piece.arrival_s[0] <= piece.arrival_s[-1] < 10 for piece in pieces)
    assert pieces[1].prompt_tokens.tolist() == full.prompt_tokens[len(pieces[0]) :][: len(pieces[1])].tolist()


def test_a_seed_moves_requests_and_memory_alike() -> None:
    cfg = composed("seeds=[1,2]")
    one, two = (config_of(cfg, case) for case in cases_of(cfg))
    assert (one.trace.seed, one.budget.seed, two.trace.seed, two.budget.seed) == (1, 1, 2, 2)


@pytest.mark.parametrize("wrong", ["seeds=[1,1]", "seeds=[-1]", "windows=[0]"])
def test_cases_that_make_no_sense_are_refused(wrong: str) -> None:
    with pytest.raises(ConfigError):
        cases_of(composed(wrong))


def test_records_are_byte_identical_on_any_number_of_workers_and_as_a_replay_of_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Law 5 over processes."""
    monkeypatch.chdir(tmp_path)
    cases = ("seeds=[1,2]", "windows=[0,1]", "window_s=20", "iterations=true")
    for name, more in {"w1": ["workers=1", "plot=true"], "w2": ["workers=2"]}.items():
        assert exit_status(main, *QUICK, "policy=greedy_stop", *cases, *more, f"hydra.run.dir={name}") == 0
        assert "mean ± sd" in capsys.readouterr().out
    folders = sorted(path.name for path in (tmp_path / "w1").iterdir() if path.is_dir())
    assert folders == [f"seed_{s}_window_{w}" for s in (1, 2) for w in (0, 1)]
    for folder in folders:
        assert (tmp_path / "w1" / folder / "replay.png").stat().st_size > 10_000
        for table in ("records.parquet", "transitions.parquet", "iterations.parquet"):
            assert (tmp_path / "w1" / folder / table).read_bytes() == (tmp_path / "w2" / folder / table).read_bytes()
    case = config_of(composed("windows=[0,1]", "window_s=20"), Case(2, 1))
    summary = json.loads((tmp_path / "w1" / "seed_2_window_1" / "summary.json").read_text())
    alone = replay_case(case).summary
    assert {key: value for key, value in alone.items() if "cpu_s" not in key} == {
        key: value for key, value in summary.items() if "cpu_s" not in key
    }


@pytest.mark.slow
def test_a_ray_cluster_of_two_nodes_gives_the_records_of_this_process(ray_address: str) -> None:
    cfg = composed("seeds=[1,2]", "windows=[0,1]", "window_s=10", "executor=ray", f"executor.address={ray_address}")
    configs = [config_of(cfg, case) for case in cases_of(cfg)]
    here, there = Processes(1)(replay_case, configs), build(cfg.executor)(replay_case, configs)
    assert len(here) == len(there) == 4
    for one, other in zip(here, there, strict=True):
        assert len(one.records.finish_s) > 3
        for name in ("arrival_s", "first_token_s", "finish_s", "status", "quality_nll"):
            np.testing.assert_array_equal(getattr(one.records, name), getattr(other.records, name))


def test_a_ray_cluster_that_does_not_answer_is_named() -> None:
    ray = pytest.importorskip("ray", reason="what joins a cluster is Ray: pip install -e '.[agents]'")
    ray.shutdown()
    with pytest.raises(ConfigError, match=r"no Ray cluster answers at address=127\.0\.0\.1:9"):
        build(composed("executor=ray", "executor.address=127.0.0.1:9").executor)(len, [[1]])


def test_low_precision_and_quality_are_those_of_the_plan_that_ran() -> None:
    plain = ("latency=llama2_7b_a100_trtllm", "budget=gpu_share", "trace.duration_s=10")
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        found = {
            name: replay_case(compose("replay", overrides=[*plain, f"policy={name}"])).summary
            for name in ("dense", "static_w4_prefix", "int4")
        }
    assert [found[name]["low_precision_share"] for name in found] == [0.0, 0.25, 1.0]
    published = (1.0, 5.504 / 5.472, 5.600 / 5.472)  # MorphServe, the first 0, 8 and 32 layers at W4
    assert [found[name]["perplexity_ratio"] for name in found] == pytest.approx(published, rel=1e-9)
    for name, ratio in zip(found, published, strict=True):  # all requests of a run have one plan
        assert found[name]["utility"] == pytest.approx(found[name]["slo_attainment"] / ratio, rel=1e-9)
    assert found["dense"]["recomputed_tokens"] == 0 == found["dense"]["preemptions"]


@given(
    values=st.lists(st.floats(0, 1), min_size=1, max_size=5),
    step_s=st.floats(0.1, 10),
    end_s=st.just(0.0) | st.floats(0.01, 60),
)
def test_a_mean_over_time_lies_between_its_values_and_counts_nothing_after_the_end(
    values: list[float], step_s: float, end_s: float
) -> None:
    changes = [(i * step_s, value) for i, value in enumerate(values)]
    mean = time_mean(changes, end_s)
    assert min(values) - 1e-9 <= mean <= max(values) + 1e-9
    assert time_mean([*changes, (100.0, 5.0)], end_s) == pytest.approx(mean)


def test_seeds_that_change_nothing_are_said_and_shown_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("three.csv").write_text("arrival_s,prompt_tokens,output_tokens\n0,10,5\n0.5,20,5\n1,10,4\n")
    assert exit_status(main, "trace=file", "trace.path=three.csv", "seeds=[0,1,2]") == 0
    printed = capsys.readouterr().out
    assert "The 3 seeds gave the same figures: nothing in this configuration is random." in printed
    assert "| seed_0 |" in printed
    assert "seed_1" not in printed
    assert "±" not in printed


def test_a_job_that_fails_is_named_with_its_reason_and_the_others_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("good.csv").write_text("arrival_s,prompt_tokens,output_tokens\n0,10,5\n")
    Path("bad.csv").write_text("arrival_s,prompt_tokens,output_tokens\n0,ten,5\n")
    jobs = "trace.path=good.csv,/nonexist.csv,bad.csv"
    assert exit_status(main, "--multirun", "trace=file", jobs, "hydra.sweep.dir=jobs") == 1
    missing, bad, total = capsys.readouterr().err.splitlines()
    assert missing.startswith("error: job 1 (trace.path=/nonexist.csv,trace=file): /nonexist.csv does not exist")
    assert bad.startswith("error: job 2 (trace.path=bad.csv,trace=file): bad.csv, line 2, column 'prompt_tokens'")
    assert total == "error: 2 of 3 jobs failed"
    kept = sorted(path.name for path in Path("jobs").iterdir())
    assert kept == ["0_file_dense", "failed", "multirun.yaml", "table.md", "table.parquet"]
    assert (Path("jobs") / "0_file_dense" / "summary.json").is_file()
