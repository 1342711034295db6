"""Run folders that the tests of reports read, each made once."""

from __future__ import annotations

from pathlib import Path

import pytest

from sim.compare import compare_command
from sim.replay.__main__ import main as replay_command
from sim.report.run_data import RunData, read_run, read_runs, run_folders
from tests.commands import exit_status

SHORT = (
    "trace=burst",
    "trace.duration_s=40",
    "budget=cotenant",
    "budget.mean_away_s=8",
    "budget.mean_stay_s=8",
    "budget.cotenant_bytes=58e9",
    "iterations=true",
)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run with plan changes, rejected requests, a moving budget and iterations."""
    path = tmp_path_factory.mktemp("report") / "run"
    more = ("policy=greedy_stop", "label=pruned", f"hydra.run.dir={path}")
    assert exit_status(replay_command, *SHORT, *more) == 0
    return path


@pytest.fixture(scope="session")
def run(folder: Path) -> RunData:
    """Return what the report reads of that run."""
    return read_run(folder)


@pytest.fixture(scope="session")
def compared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a comparison of three policies."""
    path = tmp_path_factory.mktemp("report") / "compared"
    labels = "only=[random,dense,morphserve]"
    assert exit_status(compare_command, *SHORT, labels, f"hydra.run.dir={path}") == 0
    return path


@pytest.fixture(scope="session")
def compared(compared_folder: Path) -> list[RunData]:
    """Return what the report reads of that comparison."""
    return read_runs(run_folders([compared_folder]))
