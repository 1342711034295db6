"""Launchers of sweeps: jobs in processes of their own end with the same table and exit status as one after another."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from sim.replay.__main__ import main as replay
from tests.commands import exit_status

QUICK = ("trace=poisson", "trace.duration_s=3")


def own_option(path: str, text: str) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(text, encoding="utf-8")


@pytest.mark.slow
def test_an_experiment_file_chooses_the_launcher_of_a_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher", reason="needs joblib: pip install -e '.[sweep]'")
    monkeypatch.chdir(tmp_path)
    own_option(
        "mine/experiment/in_processes.yaml",
        "# @package _global_\ndefaults:\n  - override /hydra/launcher: joblib\n  - override /trace: poisson\n"
        "trace:\n  duration_s: 3\nhydra:\n  launcher:\n    n_jobs: 2\n",
    )
    chosen = ("--config-dir", "mine", "--multirun", "+experiment=in_processes", f"hydra.sweep.dir={tmp_path / 'jobs'}")
    assert exit_status(replay, *chosen, "policy=dense,rap_80") == 0
    assert "joblib_launcher.JoblibLauncher" in Path("jobs/multirun.yaml").read_text(encoding="utf-8")
    table = pd.read_parquet("jobs/table.parquet")
    assert list(table["=policy"]) == ["dense", "rap_80"]
    assert list(table["state"]) == ["complete"] * 2


def test_a_failed_job_in_a_process_of_its_own_ends_with_the_status_of_any_sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher", reason="needs joblib: pip install -e '.[sweep]'")
    monkeypatch.chdir(tmp_path)
    sweep = f"hydra.sweep.dir={tmp_path / 'jobs'}"  # joblib's processes stay in the folder of the sweep before
    launcher = ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2")
    assert exit_status(replay, "--multirun", *launcher, "policy=int8,dense,int4", *QUICK, sweep) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: 2 jobs failed, the first: job 0 (")
    assert "policy=int8" in last


def test_a_launcher_that_is_not_installed_is_named_with_those_that_can_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert exit_status(replay, "--multirun", "hydra/launcher=submitit_slurm", "policy=dense", *QUICK) == 2
    error = capsys.readouterr().err
    assert "there is no hydra/launcher=submitit_slurm; allowed: basic, joblib (pip install" in error
    assert "[sweep]" in error
    assert "[agents]" in error
    assert error.count("\n") == 1
