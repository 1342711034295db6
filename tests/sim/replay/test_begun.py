"""What a run folder holds before its run is complete, and what a sweep does when it is run again."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

import sim.cluster.run
import sim.compare
import sim.disaggregate.run
import sim.replay.run
import sim.replay.sweep
from sim.replay.__main__ import main
from tests.commands import exit_status

SHORT = ("trace=poisson", "trace.duration_s=5", "latency=llama2_7b_a100_trtllm")
BEGUN = {"config.yaml", "provenance.json"}


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("place", "command", "arguments"),
    [
        ("sim.replay.run.replay_with", main, SHORT),
        ("sim.replay.sweep.counted", main, (*SHORT, "seeds=[0,1]")),
        ("sim.replay.sweep.counted", sim.compare.compare_command, ("trace.duration_s=5", "only=[dense]")),
        ("sim.cluster.cluster.Cluster.run", sim.cluster.run.cluster_command, SHORT),
        ("sim.replay.sweep.counted", sim.cluster.run.cluster_command, (*SHORT, "seeds=[0,1]")),
        ("sim.disaggregate.disaggregate.Disaggregated.run", sim.disaggregate.run.disaggregate_command, SHORT),
    ],
    ids=["replay", "sweep", "compare", "cluster", "variants", "disaggregate"],
)
def test_a_run_that_is_killed_while_it_serves_leaves_what_it_was(
    place: str,
    command: Callable[[], None],
    arguments: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found: list[set[str]] = []

    def die(*_: object, **__: object) -> None:
        found.append(names(tmp_path / "run"))
        os._exit(9)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(place, die)
    if (child := os.fork()) == 0:
        exit_status(command, *arguments, "hydra.run.dir=run")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert names(tmp_path / "run") == BEGUN | {".lock"}
    assert json.loads((tmp_path / "run" / "provenance.json").read_text())["seed"] == 0
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert exit_status(command, *arguments, "hydra.run.dir=run") == 0  # the lock ended with the process
    assert names(tmp_path / "run") > BEGUN


def test_a_run_that_fails_before_any_result_leaves_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    wrong = ("policy=fixed", "policy.drop_mha=[99]", "seeds=[0,1]")  # each job builds its own policy
    assert exit_status(main, *SHORT, *wrong, "hydra.run.dir=run") == 2
    assert "MHA99 does not exist" in capsys.readouterr().err
    assert not Path("run").exists()


def test_a_sweep_run_again_skips_complete_jobs_and_runs_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    sweep = ("--multirun", *SHORT, "policy=dense,int4,rap_80", "hydra.sweep.dir=jobs")
    assert exit_status(main, *sweep) == 0
    dense, int4, rap = sorted(path for path in Path("jobs").iterdir() if path.is_dir())
    (int4 / "summary.json").unlink()  # killed
    summary = json.loads((rap / "summary.json").read_text())
    (rap / "summary.json").write_text(json.dumps({**summary, "interrupted": True, "finished": 0}))  # Ctrl-C
    before = (dense / "records.parquet").stat().st_mtime_ns
    capsys.readouterr()
    assert exit_status(main, *sweep, "workers=2") == 0  # the number of processes changes no record
    printed, said = capsys.readouterr()
    skipped, again = said.splitlines()
    assert skipped.startswith("job 0 (")
    assert skipped.endswith(f"skipped, {dense.absolute()} holds this run already")
    assert again.startswith("job 2 (")
    assert again.endswith("runs again")
    assert printed.count("SLO_attainment") == 2
    assert (dense / "records.parquet").stat().st_mtime_ns == before
    assert json.loads((rap / "summary.json").read_text())["finished"] == summary["finished"]


def test_a_sweep_run_again_refuses_the_complete_job_of_another_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    sweep = ("--multirun", *SHORT, "policy=dense,int4", "hydra.sweep.dir=jobs")
    assert exit_status(main, *sweep) == 0
    capsys.readouterr()
    assert exit_status(main, *sweep, "trace.rate_rps=4") == 1
    first, second, total = capsys.readouterr().err.splitlines()
    for line in (first, second):
        assert "holds a run with trace.rate_rps=5.0, and this job has trace.rate_rps=4; delete the folder" in line
        assert line.endswith("hydra.sweep.dir=FOLDER")
    assert total == "error: 2 of 2 jobs failed"
