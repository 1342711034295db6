"""An evaluation that was stopped goes on where it was, and its rows are those of an unbroken one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from omegaconf import DictConfig, OmegaConf

from agents.evaluation import measure_serve as measured
from agents.evaluation import serve
from agents.evaluation.evaluate import EvaluateConfig
from agents.evaluation.unfinished import Unfinished
from sim.errors import ConfigError

FILE = "serve_unfinished.jsonl"
TIMES = ["decision_p50_s", "decision_p99_s"]


def evaluation(**changed: Any) -> DictConfig:
    few = {"scenarios": ["roomy/published"], "serve_sources": ["gamma"], "serve_windows": 3, "serve_oracle": 0}
    return OmegaConf.structured(EvaluateConfig(claim="none", **(few | {"baselines": ["dense", "int4"]} | changed)))


@pytest.fixture
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure as if every change were committed."""
    monkeypatch.setattr(measured, "commit", lambda: "0123456789abcdef")


def stop_after(monkeypatch: pytest.MonkeyPatch, windows: int) -> list[int]:
    """End the process, as it were, when that many windows were played; return a list that counts them."""
    played: list[int] = []
    usual = serve._played

    def one(match: Any, number: int, *rest: Any) -> Any:
        if len(played) == windows:
            raise KeyboardInterrupt
        played.append(number)
        return usual(match, number, *rest)

    monkeypatch.setattr(serve, "_played", one)
    return played


@pytest.mark.usefixtures("clean")
def test_a_stopped_evaluation_goes_on_and_equals_an_unbroken_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measured.measure_serve(evaluation(), tmp_path / "unbroken")
    assert not (tmp_path / "unbroken" / FILE).exists()
    broken = tmp_path / "broken"
    with monkeypatch.context() as patched:
        stop_after(patched, 2)
        with pytest.raises(KeyboardInterrupt):
            measured.measure_serve(evaluation(), broken)
    assert [path.name for path in broken.iterdir()] == [FILE]
    with (broken / FILE).open("a") as file:
        file.write('{"key": "cut sh')  # a kill in the middle of a line
    with monkeypatch.context() as patched:
        played = stop_after(patched, 9)
        measured.measure_serve(evaluation(), broken)
    assert played == [2]
    assert "2 windows were played before this evaluation was stopped" in capsys.readouterr().err
    assert not (broken / FILE).exists()
    ours, theirs = (pd.read_parquet(tmp_path / name / "serve.parquet") for name in ("broken", "unbroken"))
    pd.testing.assert_frame_equal(ours.drop(columns=TIMES), theirs.drop(columns=TIMES))
    begun = [json.loads((tmp_path / name / "serve.json").read_text())["begun"] for name in ("broken", "unbroken")]
    assert [len(times) for times in begun] == [2, 1]


@pytest.mark.usefixtures("clean")
@pytest.mark.parametrize("changed", [{"baselines": ["dense"]}, {"serve_windows": 2}])
def test_windows_of_another_evaluation_are_neither_used_nor_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: dict[str, Any]
) -> None:
    with monkeypatch.context() as patched:
        stop_after(patched, 1)
        with pytest.raises(KeyboardInterrupt):
            measured.measure_serve(evaluation(), tmp_path)
    kept = (tmp_path / FILE).read_bytes()
    with pytest.raises(ConfigError, match="keeps 1 windows of another evaluation that was stopped; go on with its"):
        measured.measure_serve(evaluation(**changed), tmp_path)
    assert (tmp_path / FILE).read_bytes() == kept
    (tmp_path / FILE).unlink()
    with monkeypatch.context() as patched:
        played = stop_after(patched, 9)
        measured.measure_serve(evaluation(**changed), tmp_path)
    assert played[0] == 0


def test_with_changes_that_are_not_committed_nothing_is_kept(tmp_path: Path) -> None:
    first = Unfinished(tmp_path / FILE, {"windows": 3}, "0123-dirty")
    first.add(0, [{"utility": 0.5}])
    assert 0 not in Unfinished(tmp_path / FILE, {"windows": 3}, "0123-dirty")


def test_rows_survive_as_they_are(tmp_path: Path) -> None:
    rows = [{"utility": 0.1 + 0.2, "seed": 0, "policy": "dense", "tpot_s": float("nan"), "low_bits": None}]
    first = Unfinished(tmp_path / FILE, {}, "0123")
    first.add(4, rows)
    again = Unfinished(tmp_path / FILE, {}, "0123")
    assert 4 in again
    pd.testing.assert_frame_equal(pd.DataFrame(again.rows([4])), pd.DataFrame(rows))
    with pytest.raises(ConfigError, match="keeps 1 windows of another evaluation"):
        Unfinished(tmp_path / FILE, {"another": 1}, "0123")
    again.remove()
    assert 4 not in Unfinished(tmp_path / FILE, {"another": 1}, "0123")
