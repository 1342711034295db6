"""``python -m sim.report`` as a user calls it."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

pytest.importorskip("plotly", reason="needs Plotly: pip install -e '.[report]'")

from sim.errors import ConfigError
from sim.paths import REPOSITORY
from sim.report.run import main
from sim.report.run_data import MOST_RUNS, STATISTICS, read_run, read_runs, run_folders
from sim.report.timeline import main as timeline
from tests.commands import exit_status


def test_one_run_gets_its_page_in_its_folder_and_several_where_out_says(
    folder: Path,
    compared_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folder, "run")
    assert exit_status(main, "run", "chrome_trace=made/timeline.json") == 0
    assert "run/report.html: 1 run" in capsys.readouterr().out
    assert Path("run/report.html").read_text().count("<h1>pruned</h1>") == 1
    assert json.loads(Path("made/timeline.json").read_text())["traceEvents"]
    assert exit_status(main, "run", str(compared_folder), "out=all.html") == 0
    assert "<h1>pruned, dense, random, morphserve</h1>" in Path("all.html").read_text()
    assert exit_status(main, f"runs=[{compared_folder}]") == 0
    assert len(list(Path("runs").rglob("report.html"))) == 1


def test_a_timeline_alone_lies_in_the_folder_of_its_run_or_where_out_says(
    folder: Path,
    compared_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folder, "run")
    assert exit_status(timeline, "run") == 0
    assert "run/timeline.json.gz: " in capsys.readouterr().out
    content = json.loads(gzip.decompress(Path("run/timeline.json.gz").read_bytes()))
    assert exit_status(main, "run", "html=false", "chrome_trace=same.json") == 0
    assert json.loads(Path("same.json").read_text()) == content
    assert not Path("run/report.html").exists()
    assert exit_status(timeline, str(compared_folder), "out=all.json") == 0
    assert set(json.loads(Path("all.json").read_text())["otherData"]) == {"dense", "random", "morphserve"}
    for wrong, message in ([], "runs is empty"), (["run", "out=."], "out is ., a folder; name a file, such as out="):
        assert exit_status(timeline, *wrong) == 2
        assert message in capsys.readouterr().err


def test_a_page_that_is_made_again_is_the_same_but_for_its_own_date(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sim.report.run.provenance", lambda seed: {"command": "c", "commit": "d", "written_at": "e"})
    for name in ("a", "b"):
        assert (
            exit_status(main, str(folder), f"out={tmp_path / name}.html", f"chrome_trace={tmp_path / name}.json") == 0
        )
    for ending in ("html", "json"):
        assert (tmp_path / f"a.{ending}").read_bytes() == (tmp_path / f"b.{ending}").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "runs is empty"),
        (["nowhere"], "nowhere is no folder"),
        (["."], "holds no complete run"),
        (["run", "run"], "named twice"),
        (["run", "html=false"], "nothing to write"),
        (["run", "out=run"], "out is run, a folder"),
    ],
)
def test_a_call_that_cannot_work_is_one_line(
    arguments: list[str],
    message: str,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    if "run" in arguments:
        shutil.copytree(folder, "run")
    assert exit_status(main, *arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def _without(*names: str) -> Callable[[Path], None]:
    return lambda path: [(path / name).unlink() for name in names] and None


def _text(name: str, text: str) -> Callable[[Path], None]:
    return lambda path: (path / name).write_text(text) and None


def _value(name: str, value: object) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        summary = json.loads((path / "summary.json").read_text())
        (path / "summary.json").write_text(json.dumps({**summary, name: value}))

    return change


def _into_cells(path: Path) -> None:
    (path / "records").mkdir()
    (path / "records.parquet").rename(path / "records/00000.parquet")


def _column(name: str, column: str, value: object) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        frame = pd.read_parquet(path / name)
        if value is None:
            frame = frame.drop(columns=column)
        else:
            frame[column] = value
        frame.to_parquet(path / name)

    return change


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_without("records.parquet"), "has no records.parquet"),
        (_into_cells, "holds a cluster of several cells"),
        (_text("records.parquet", "no table"), "is no Parquet file"),
        (_text("iterations.parquet", ""), "is no Parquet file"),
        (_column("records.parquet", "ttft_s", None), "lacks the column ttft_s"),
        (_column("records.parquet", "arrival_s", "soon"), "arrival_s holds other things than numbers"),
        (_column("records.parquet", "arrival_s", float("inf")), "arrival_s holds other things than numbers"),
        (_column("records.parquet", "met_slo", "yes"), "met_slo holds other things than true and false"),
        (_column("transitions.parquet", "to", "<b>dense</b>"), "a plan cannot be read"),
        (_text("summary.json", "[]"), "not a JSON object"),
        (_text("summary.json", "{}"), "lacks ttft_s"),
        (_value("slo_attainment", "high"), "slo_attainment is 'high'"),
        (_value("ttft_s", {"mean": 1}), "ttft_s is {'mean': 1}"),
        (_value("itl_s", {**dict.fromkeys(STATISTICS), "p50": []}), "itl_s is {"),
        (_text("server.json", "{}"), "is not what a replay writes"),
        (_text("server.json", '{"num_layers": 1e9}'), "is not what a replay writes"),
        (_text("provenance.json", "{"), "is not valid JSON"),
    ],
)
def test_a_damaged_folder_is_one_line_that_names_the_file(
    damage: Callable[[Path], None],
    message: str,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(folder, tmp_path / "run")
    damage(tmp_path / "run")
    assert exit_status(main, str(tmp_path / "run")) == 2
    error = capsys.readouterr().err
    assert message in error
    assert str(tmp_path / "run") in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run" / "report.html").exists()


def test_parts_that_are_missing_are_named_and_the_rest_is_read(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "run")
    assert read_run(tmp_path / "run").missing == []
    absent = ("iterations.parquet", "kept_share.parquet", "server.json", "config.yaml", "provenance.json")
    _without(*absent)(tmp_path / "run")
    bare = read_run(tmp_path / "run")
    assert [text.partition(":")[0] for text in bare.missing] == [name for name in absent if name != "config.yaml"]
    assert (bare.label, bare.config, bare.targets_s) == ("run", {}, {})
    assert len(bare.plans) == 1 + bare.summary["transitions"]  # the first is the one that the first change left


def test_the_configuration_of_a_stranger_is_read_and_not_run(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET_OF_MINE", "hunter2")
    shutil.copytree(folder, tmp_path / "run")
    (tmp_path / "run" / "config.yaml").write_text(
        "policy: {_target_: os.mkdir, path: made}\nlabel: ${oc.env:SECRET_OF_MINE}\nslo: {ttft_s: 2.0}\n"
        "model: !!python/object/apply:os.getcwd []\n"
    )
    assert read_run(tmp_path / "run").config == {}
    (tmp_path / "run" / "config.yaml").write_text(
        "policy: {_target_: os.mkdir, path: made}\nlabel: ${oc.env:SECRET_OF_MINE}\nslo: {ttft_s: 2.0}\n"
    )
    monkeypatch.chdir(tmp_path)
    assert exit_status(main, "run") == 0
    text = (tmp_path / "run" / "report.html").read_text()
    assert "hunter2" not in text
    assert "${oc.env:SECRET_OF_MINE}" in text
    assert not (tmp_path / "made").exists()


def test_a_configuration_of_aliases_that_stand_for_billions_of_values_is_not_read(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "run")
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 9)]
    (tmp_path / "run" / "config.yaml").write_text("\n".join(lines))
    assert read_run(tmp_path / "run").config == {}


def test_numbers_that_no_run_has_are_refused(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "run")
    path = tmp_path / "run" / "records.parquet"
    pd.read_parquet(path).assign(arrival_s=1e300).to_parquet(path)
    with pytest.raises(ConfigError, match=r"arrival_s holds numbers beyond 1e\+18"):
        read_run(tmp_path / "run")


def test_a_pipe_or_device_is_not_replaced_by_the_report(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert exit_status(main, str(folder), f"out={tmp_path / 'pipe'}") == 2
    assert "is no regular file" in capsys.readouterr().err
    assert (tmp_path / "pipe").is_fifo()


def test_equal_labels_become_names_of_folders_until_they_differ(folder: Path, tmp_path: Path) -> None:
    paths = [tmp_path / "a" / "seed_0", tmp_path / "b" / "seed_0", tmp_path / "b" / "12-30-00-123456_burst_dense"]
    for path in paths:
        shutil.copytree(folder, path)
    assert [run.label for run in read_runs(paths)] == ["a/seed_0", "b/seed_0", "12-30-00-123456_burst_dense"]
    (paths[2] / "config.yaml").write_text("label: ''")
    assert read_run(paths[2]).label == "burst_dense"
    assert read_runs(paths[:1])[0].label == "pruned"


def test_runs_of_a_sweep_come_in_the_order_of_their_numbers_and_not_without_end(tmp_path: Path) -> None:
    for number in (10, 2, 1):
        (tmp_path / f"{number}_burst").mkdir()
        (tmp_path / f"{number}_burst" / "summary.json").write_text("{}")
    assert [path.name for path in run_folders([tmp_path])] == ["1_burst", "2_burst", "10_burst"]
    for number in range(20, 20 + MOST_RUNS):
        (tmp_path / f"{number}").mkdir()
        (tmp_path / f"{number}" / "summary.json").write_text("{}")
    with pytest.raises(ConfigError, match=f"shows at most {MOST_RUNS}"):
        run_folders([tmp_path])


def test_without_plotly_one_line_names_the_extra(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "plotly"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr("sys.meta_path", [_NoPlotly(), *sys.meta_path])
    assert exit_status(main, str(folder)) == 2
    assert f"pip install -e '{REPOSITORY}[report]'" in capsys.readouterr().err
    assert exit_status(main, str(folder), "html=false", f"chrome_trace={tmp_path / 'a.json'}") == 0


class _NoPlotly:
    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name.partition(".")[0] == "plotly":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
