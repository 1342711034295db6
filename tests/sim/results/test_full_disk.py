"""A disk that is full at any write of a run: the figures are printed, then one error; no file is half-written."""

from __future__ import annotations

import json
import resource
from collections.abc import Callable, Iterator
from pathlib import Path

import pandas as pd
import pytest

import sim.cluster.run
import sim.compare
import sim.disaggregate.run
import sim.replay.__main__
from sim.report.timeline import main as timeline_command
from sim.results.report import warn_if_extrapolated
from tests.commands import exit_status

QUICK = ("trace=poisson", "trace.duration_s=5")


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[[int], None]]:
    """Yield a function that lets no file grow beyond some bytes, as on a full disk, until the test ends."""
    monkeypatch.chdir(tmp_path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))

    yield limit
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def check_files(folder: Path) -> None:
    """Check that every file of a folder can be read, and that none says that the run is complete."""
    for path in folder.rglob("*"):
        assert path.name not in ("summary.json", "summaries.json", "compare.json")
        assert not path.name.endswith(".part")
        if path.suffix == ".parquet":
            pd.read_parquet(path)
        if path.suffix == ".json":
            json.loads(path.read_text())


@pytest.mark.parametrize("size", [0, 3_000, 20_000])
def test_a_replay_prints_its_figures_before_the_error(
    size: int, disk: Callable[[int], None], capsys: pytest.CaptureFixture[str]
) -> None:
    disk(size)
    assert exit_status(sim.replay.__main__.main, *QUICK, "plot=true", "hydra.run.dir=full") == 2
    output, error = capsys.readouterr()
    assert "SLO_attainment" in output
    error = error.splitlines(keepends=True)[-1]  # compiled code that cannot be kept is named before, once
    assert error.startswith("error: ")
    assert "full/" in error
    assert error.endswith("File too large; free some space, or write elsewhere with hydra.run.dir=FOLDER\n")
    check_files(Path("full"))


@pytest.mark.parametrize(
    ("main", "arguments"),
    [
        (sim.replay.__main__.main, ("seeds=[0,1]",)),
        (sim.compare.compare_command, ("only=[dense]", "workload=none")),
        (sim.cluster.run.cluster_command, ()),
        (sim.cluster.run.cluster_command, ("seeds=[0,1]",)),
        (sim.disaggregate.run.disaggregate_command, ()),
    ],
    ids=["sweep", "compare", "cluster", "variants", "disaggregate"],
)
def test_so_do_tables_clusters_and_disaggregated_systems(
    main: Callable[[], None],
    arguments: tuple[str, ...],
    disk: Callable[[int], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    disk(0)
    quick = ("trace.duration_s=5",) if "only=[dense]" in arguments else QUICK
    assert exit_status(main, *quick, *arguments, "hydra.run.dir=full") == 2
    output, error = capsys.readouterr()
    assert "SLO attainment" in output or "SLO_attainment" in output
    assert "File too large" in error
    check_files(Path("full"))


def test_the_error_names_what_sends_the_files_of_this_command_elsewhere(
    disk: Callable[[int], None], capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_status(sim.replay.__main__.main, *QUICK, "hydra.run.dir=run") == 0
    capsys.readouterr()
    disk(0)
    assert exit_status(timeline_command, "run", "out=timeline.json") == 2
    assert capsys.readouterr().err.endswith("; free some space, or write elsewhere with out=PATH\n")
    assert not Path("timeline.json").exists()
    assert exit_status(sim.replay.__main__.main, "--multirun", *QUICK, "seed=0,1", "hydra.sweep.dir=full") != 0
    error = capsys.readouterr().err
    assert (
        "full/multirun.yaml: File too large; free some space, or write elsewhere with hydra.sweep.dir=FOLDER" in error
    )
    assert "hydra.run.dir" not in error


def test_a_run_that_is_mostly_extrapolated_warns(capsys: pytest.CaptureFixture[str]) -> None:
    warn_if_extrapolated([{"extrapolated_share": 0.01}, {"extrapolated_share": None}])
    assert capsys.readouterr().err == ""
    warn_if_extrapolated([{"extrapolated_share": 0.01}, {"extrapolated_share": 0.667}])
    assert capsys.readouterr().err.startswith("warning: 66.7 % of the iterations lie outside the range")
