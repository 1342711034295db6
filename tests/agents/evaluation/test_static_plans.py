"""The table of static plans: the best of each kind, and what drops are worth, by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from agents.envs.serve import ServeSetting
from agents.evaluation.static_plans import compared, figures_table, held_out, main, page, scenario_kwargs, worth
from sim.paths import RESULTS
from tests.commands import exit_status


def setting() -> ServeSetting:
    options = {"drops": [0, 2], "low_layers": [0, 32], "waits": [1.5]}
    return ServeSetting(**(scenario_kwargs("tight", "published") | {"actions": options}))


def test_the_best_plan_of_each_kind_and_the_worth_of_drops_by_hand() -> None:
    # Plans in the order of the table: dense, W4, drops, both. Rows are windows.
    utility = np.array([[0.9, 0.5, 0.6, 0.4], [0.1, 0.6, 0.5, 0.8], [0.2, 0.7, 0.7, 0.9]])
    found = compared(setting(), utility)
    assert [found[kind]["plan"].split(", q")[0] for kind in ("dense", "drops", "w4", "both")] == [
        "drop 0, W4 0",
        "drop 2, W4 0",
        "drop 0, W4 32",
        "drop 2, W4 32",
    ]
    assert found["both"]["utility"] == pytest.approx(0.7)
    assert found["both"]["hindsight"] == pytest.approx((0.9 + 0.8 + 0.9) / 3)
    assert found["w4"]["hindsight"] == pytest.approx((0.9 + 0.6 + 0.7) / 3)
    gained = np.array([-0.1, 0.2, 0.2])  # of both over W4, window by window
    assert worth(found, "both", "w4") == pytest.approx((gained.mean(), gained.std(ddof=1) / np.sqrt(3)))
    assert found["ever_best"] == ["drop 0, W4 0", "drop 2, W4 32"]
    assert found["weights"] == 4


def test_each_published_mask_is_predicted_from_the_others() -> None:
    rows = {row["mask"]: row for row in held_out()}
    assert rows["RAP, 60 % budget"]["predicted"] is None
    assert rows["BlockPruner, 21.99 %"]["predicted"] / 11.51 == pytest.approx(1.23, abs=0.01)


def test_the_command_writes_its_figures_and_a_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "sys.argv",
        ["static_plans", "scenarios=[tight]", "copies=[none]", "sources=[burst]", "windows=1", f"out={tmp_path}"],
    )
    main()
    figures = json.loads((tmp_path / "static_plans.json").read_text(encoding="utf-8"))
    (row,) = figures["rows"]
    assert row["both"]["utility"] >= row["dense"]["utility"]
    assert row["on_top_worth"] is None
    assert figures_table(figures["rows"]) in (tmp_path / "index.md").read_text(encoding="utf-8")


def test_a_scenario_that_is_not_there_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_status(main, "scenarios=[tigth]", "copies=[none]") == 2
    error = capsys.readouterr().err
    assert "did you mean 'tight'" in error
    assert error.count("\n") == 1


def test_the_published_page_is_that_of_its_figures() -> None:
    folder = RESULTS / "scenarios"
    figures = json.loads((folder / "static_plans.json").read_text(encoding="utf-8"))
    assert page(figures) == (folder / "index.md").read_text(encoding="utf-8")
