"""The table of a sweep, and the list of runs."""

from __future__ import annotations

import json
import re
import shutil
from contextlib import chdir, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from sim.config.options import label_part
from sim.errors import ConfigError
from sim.replay.__main__ import main as replay
from sim.table.index import find_runs
from sim.table.list_runs import main as list_runs
from sim.table.run import main as make_table
from sim.table.table import markdown_of, write_table
from tests.commands import exit_status

SWEEP = (
    "--multirun",
    "trace=small",
    "trace.duration_s=4",
    "policy=dense,int8,rap_80",
    "seed=0,1",
    "hydra.sweep.dir=jobs",
)
"""Of these six jobs two fail: the default calibration has no 8-bit times."""


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Run a sweep in ``jobs`` of a folder; return that and what it printed."""
    folder, printed = tmp_path_factory.mktemp("sweep"), StringIO()
    with chdir(folder), redirect_stdout(printed):
        assert exit_status(replay, *SWEEP) == 1
    return folder / "jobs", printed.getvalue()


@pytest.fixture
def sweep(swept: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Enter a folder with a copy of the sweep in ``jobs``; return what it printed."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(swept[0], "jobs")
    return swept[1]


def test_a_sweep_ends_with_one_table_of_all_jobs_and_the_reasons_of_those_that_failed(sweep: str) -> None:
    frame = pd.read_parquet("jobs/table.parquet")
    assert list(frame["state"]) == ["complete"] * 2 + ["failed"] * 2 + ["complete"] * 2
    assert list(frame["=policy"]) == ["dense", "dense", "int8", "int8", "rap_80", "rap_80"]
    assert list(frame["=seed"]) == ["0", "1"] * 3
    for _, row in frame[frame["state"] == "complete"].iterrows():
        summary = json.loads((Path("jobs") / row["run"] / "summary.json").read_text(encoding="utf-8"))
        assert row["slo_attainment"] == summary["slo_attainment"]
        assert row["ttft_s.p95"] == summary["ttft_s"]["p95"]
    text = Path("jobs/table.md").read_text(encoding="utf-8")
    assert text in sweep
    assert "trace.duration_s" not in text  # the same in every job
    assert "2_small_int8 failed: calibration 'llama2_7b_a100' has no 8-bit times" in text


def test_the_command_of_a_run_is_what_was_typed_and_its_overrides_are_those_of_the_job(sweep: str) -> None:
    made = json.loads(Path("jobs/5_small_rap_80/provenance.json").read_text(encoding="utf-8"))
    assert made["command"] == " ".join(["python", "-m", made["command"].split()[2], *SWEEP])
    assert made["overrides"] == ["trace=small", "trace.duration_s=4", "policy=rap_80", "seed=1"]


def test_a_job_that_succeeds_later_is_no_failure_any_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    int8 = ("--multirun", "trace=small", "trace.duration_s=4", "policy=int8", "seed=0,1", "hydra.sweep.dir=jobs")
    assert exit_status(replay, *int8) == 1
    assert sorted(path.name for path in Path("jobs/failed").iterdir()) == ["0_small_int8.json", "1_small_int8.json"]
    assert [run.state for run in find_runs(Path("jobs"))] == ["failed"] * 2
    assert exit_status(replay, *int8, "latency=llama2_7b_a100_trtllm") == 0
    assert not Path("jobs/failed").exists()
    assert [run.state for run in find_runs(Path("jobs"))] == ["complete"] * 2


def test_a_job_that_was_refused_does_not_get_the_figures_of_the_run_in_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    jobs = ("--multirun", "trace=small", "trace.duration_s=4", "policy=dense", "hydra.sweep.dir=a/jobs")
    assert exit_status(replay, *jobs, "seed=0,1") == 0
    assert exit_status(replay, *jobs, "seed=0,2") == 1
    frame = pd.read_parquet("a/jobs/table.parquet")
    assert list(frame["state"]) == ["complete", "failed"]
    assert list(frame["=seed"]) == ["0", "2"]
    assert frame["slo_attainment"].isna().tolist() == [False, True]
    assert "holds a run with seed=1" in frame["error"][1]
    capsys.readouterr()
    assert exit_status(make_table, "a") == 0
    assert "\n- jobs/1_small_dense failed: " in capsys.readouterr().out


def test_a_run_cannot_write_into_the_folder_of_a_sweep(sweep: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(path for path in Path("jobs").rglob("*"))
    assert exit_status(replay, *SWEEP[1:3], "hydra.run.dir=jobs") == 2
    assert "jobs holds a sweep; choose another folder: hydra.run.dir=FOLDER" in capsys.readouterr().err
    assert sorted(path for path in Path("jobs").rglob("*")) == before


def test_sim_table_makes_the_table_again(sweep: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = pd.read_parquet("jobs/table.parquet")
    Path("jobs/table.parquet").unlink()
    assert exit_status(make_table, "jobs") == 0
    pd.testing.assert_frame_equal(before, pd.read_parquet("jobs/table.parquet"))
    assert exit_status(make_table, "jobs", "out=elsewhere") == 0
    assert Path("elsewhere/table.md").is_file()


@pytest.mark.parametrize("arguments", [(), ("nowhere",), ("a", "b", "out=c"), (".",)], ids=str)
def test_a_folder_without_runs_is_an_error_in_one_line(
    arguments: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert exit_status(make_table, *arguments) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_runs_are_listed_with_the_latest_first(sweep: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_status(list_runs, "jobs") == 0
    shown = capsys.readouterr().out
    assert "6 of 6 runs" in shown
    assert exit_status(list_runs, "jobs", "state=failed", "last=1") == 0
    assert "1 of 6 runs" in capsys.readouterr().out
    assert exit_status(list_runs, "jobs", "contains=rap_80") == 0
    assert "2 of 6 runs" in capsys.readouterr().out
    assert exit_status(list_runs, "jobs", "state=fialed") == 2
    assert "did you mean 'failed'" in capsys.readouterr().err


def test_runs_of_several_folders_are_listed_one_folder_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a" / "x" / "summary.json", {"slo_attainment": 0.5})
    write(tmp_path / "b=1" / "failed" / "y.json", {"error": "no", "folder": "/elsewhere/y"})
    assert exit_status(list_runs, "a", "b=1") == 0
    shown = capsys.readouterr().out
    assert shown.index("1 of 1 runs in a") < shown.index("/elsewhere/y") < shown.index("1 of 1 runs in b=1")
    assert exit_status(list_runs) == 2
    assert "there is no folder runs; run a command, or name another" in capsys.readouterr().err


def write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")


def test_every_kind_of_run_is_found_and_damaged_files_hide_nothing_else(tmp_path: Path) -> None:
    write(tmp_path / "a" / "summary.json", {"slo_attainment": 0.5, "interrupted": True})
    write(tmp_path / "b" / "compare.json", {"cases": ["x", "y"], "summaries": {"p": [{"slo_attainment": 0.1}, {}]}})
    write(tmp_path / "b" / "p" / "x" / "summary.json", {"slo_attainment": 0.1})  # a part of b, not a run
    write(tmp_path / "c" / "summaries.json", {"seed_0": {"slo_attainment": 0.2}, "seed_1": {"slo_attainment": 0.3}})
    write(tmp_path / "d" / "config.yaml", "seed: 1")
    write(tmp_path / "e" / "provenance.json", {"overrides": ["label=x", "seed=3"], "written_at": "2026-01-01"})
    write(tmp_path / "e" / "progress.csv", "iteration,best_utility\n1,0.5\n2,0.75\n")
    write(tmp_path / "e" / "best" / "policy.json", {})
    write(tmp_path / "f" / "summary.json", "{ no json")
    write(tmp_path / "g" / "failed" / "0_x.json", "[]")
    write(tmp_path / "²_h" / "compare.json", {"cases": None, "summaries": {"p": [{"slo_attainment": 0.1}]}})
    found = {(run.folder.name, run.part): run for run in find_runs(tmp_path)}
    assert {key: run.state for key, run in found.items()} == {
        ("a", ""): "interrupted",
        ("b", "p, x"): "complete",
        ("b", "p, y"): "complete",
        ("c", "seed_0"): "complete",
        ("c", "seed_1"): "complete",
        ("d", ""): "unfinished",
        ("e", ""): "complete",
        ("f", ""): "failed",
        ("²_h", ""): "failed",
    }
    assert "f/summary.json is not valid JSON" in found["f", ""].error
    assert "delete the folder" in markdown_of(list(found.values()), tmp_path)
    assert found["e", ""].overrides == {"label": "x", "seed": "3"}
    assert found["e", ""].figures == {"iteration": 2.0, "best_utility": 0.75}
    assert "best utility" in markdown_of(list(found.values()), tmp_path)
    with pytest.raises(ConfigError, match="holds no run"):
        write_table(tmp_path / "g")


def test_jobs_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for number in (10, 9, 2):
        write(tmp_path / f"{number}_x" / "summary.json", {"slo_attainment": 1.0})
    assert [run.folder.name for run in find_runs(tmp_path)] == ["2_x", "9_x", "10_x"]


def test_a_label_is_part_of_the_name_of_a_run_folder() -> None:
    assert label_part("") == label_part(None) == ""
    assert label_part("my try: 1/2") == "_my-try-1-2"
    assert label_part("../..") == "_..-.."


def test_a_strangers_run_can_neither_change_the_terminal_nor_break_the_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evil = "\x1b]0;mine\x07a|b\nc"
    for name, override in (("x", evil), ("y", "z")):
        write(tmp_path / name / "summary.json", {"slo_attainment": 0.5})
        made = {"command": evil, "written_at": evil, "overrides": [f"policy={override}"]}
        write(tmp_path / name / "provenance.json", made)
    write(tmp_path / "failed" / "z.json", {"error": evil, "folder": evil})
    write(tmp_path / "w" / "compare.json", {"cases": [0], "summaries": {evil: [{"slo_attainment": 0.1}]}})
    assert exit_status(list_runs, str(tmp_path)) == 0
    assert exit_status(make_table, str(tmp_path)) == 0
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    assert "\x07" not in shown
    rows = [line for line in (tmp_path / "table.md").read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    assert len(rows) == 2 + 4
    assert len({len(re.findall(r"(?<!\\)\|", row)) for row in rows}) == 1
