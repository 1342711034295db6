"""The page of the loop puts each figure into its row and column; results take each round's own predictions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="the real model needs torch: pip install -e '.[hw]'")

import hw.loop.run as run
from hw.loop.page import _changes, _from_to, _rounds_table, speed_share
from hw.loop.run import Part, judged
from hw.loop.settings import parts_of
from sim.config import compose_config
from tests.sim.pages.test_render import cells


def part(number: int, policy: str, slowdown: float, written_at: str) -> dict[str, Any]:
    return {
        "round": number,
        "window": "one",
        "predictions": {
            "provenance": {"written_at": written_at},
            "sha256": f"{number}{policy}" + "0" * 62,
            "slowdown": slowdown,
            "outcomes": {"one": {policy: {}}},
        },
        "measured": {"16": [slowdown], "4": [slowdown + 1]},
    }


def test_a_round_has_its_own_speeds_in_the_order_of_the_policies() -> None:
    content = {
        "repeats": 2,
        "rounds": [
            part(1, "b", 2.0, "2026-01-01T10:00:00+00:00"),  # served in random order
            part(1, "a", 1.0, "2026-01-01T10:05:00+00:00"),
            part(3, "a", 4.0, "2026-01-01T23:59:00+00:00"),
            part(3, "b", 6.0, "2026-01-02T00:01:00+00:00"),
        ],
        "real": {"one": {"a": [{"slower": 1.1}, {"slower": 1.3}], "b": [{"slower": 1.2}, {"slower": 1.4}]}},
    }
    first, third = cells(_rounds_table(content))[-2:]
    assert first[2:4] == ["2026-01-01T10:00:00 to 10:05:00", "`1a000000`, `1b000000`"]
    assert third[2:4] == ["2026-01-01T23:59:00 to 2026-01-02T00:01:00", "`3a000000`, `3b000000`"]
    assert first[4:] == ["1.50", "1.50", "2.50", "1.10, 1.20"]
    assert third[4:] == ["5.00", "5.00", "6.00", "1.30, 1.40"]
    assert _from_to(["2026-01-01T10:00:00+00:00"]) == "2026-01-01T10:00:00"


def test_plan_changes_are_shown_with_the_window_that_has_least() -> None:
    real = {
        window: {"a": [{"changes_per_minute": value}, {"changes_per_minute": value + 2}]}
        for window, value in (("one", 30.0), ("two", 8.0))
    }
    assert _changes({"real": real, "verdict": {"changes": {"per_minute": {"a": 20.0}}}}) == "a 20.0 (9.0 in two)"


def test_what_a_faster_machine_adds_to_a_lead_is_found() -> None:
    slope, lead = -0.2, 0.05
    parts, real = [], {}
    for window, base in (("one", 0.9), ("two", 0.6)):
        cell: dict[str, list[dict[str, float]]] = {"learned": [], "rule": [], "fixed": []}
        for number in (1, 2, 3):
            for policy, more in (("learned", 0.0), ("rule", 0.3), ("fixed", 0.9)):
                slowdown = 1.0 + 0.1 * number + more
                parts.append(part(number, policy, slowdown, "") | {"window": window})
                parts[-1]["predictions"]["outcomes"] = {window: {policy: {}}}
                utility = base + slope * 1.1 * slowdown + (lead if policy == "learned" else 0.0)
                cell[policy].append({"utility": 0.5 if policy == "fixed" else utility, "slower": 1.1})
        real[window] = cell
    verdict = {
        "learner": {"learner": "learned", "best_rule": "rule"},
        "changes": {"per_minute": {"learned": 1.0, "rule": 1.0}},
    }
    found = speed_share({"repeats": 3, "rounds": parts, "real": real, "verdict": verdict})
    assert found is not None
    assert found["slope"] == pytest.approx(slope)
    assert found["learned"] == pytest.approx(1.1 * 1.2)
    assert found["rule"] == pytest.approx(1.1 * 1.5)
    assert found["share"] == pytest.approx(-slope * 1.1 * 0.3)  # all of the difference beyond the lead
    assert speed_share({"repeats": 3, "rounds": parts, "real": real, "verdict": {"changes": {}}}) is None
    fixed = verdict | {"changes": {"per_minute": {}}}
    assert speed_share({"repeats": 3, "rounds": parts, "real": real, "verdict": fixed}) is None


def test_results_take_each_round_with_its_own_predictions(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    more = ["~experiment", "+windows={one: {}, two: {}}", "+policies={a: {policy: dense}, b: {policy: dense}}"]
    cfg = compose_config("hw_loop", [*more, f"runs={tmp_path}", "rounds=3"])
    parts, utilities = [], iter(range(1, 100))
    for number in (1, 2, 3):
        for one, folder in parts_of(cfg, number):
            (window,), (policy,) = one.windows, one.policies
            utility = next(utilities) / 100
            predictions = {
                "provenance": {"commit": f"c{number}"},
                "references": [],
                "run_speeds": [],
                "utility_at_run_speeds": {},
                "outcomes": {window: {policy: {"utility": utility}}},
            }
            # The last round lacks a run, so it does not count.
            runs = [{"utility": utility + 0.001, "changes_per_minute": 1.0}] if (number, policy) != (3, "b") else []
            parts.append(Part(number=number, cfg=one, folder=folder, predictions=predictions, real={policy: runs}))
    monkeypatch.setattr(run, "_device", lambda _: {})
    content = judged(cfg, parts)
    assert content["commits"] == ["c1", "c2"]
    assert content["repeats"] == 2
    for row in content["verdict"]["level"]["cells"]:
        mine = [
            one.predictions["outcomes"][row["window"]][row["policy"]]["utility"]
            for one in parts
            if one.number < 3 and one.window == row["window"] and row["policy"] in one.real
        ]
        assert row["simulated"] == pytest.approx(sum(mine) / 2)
        assert row["repeats"] == pytest.approx([utility + 0.001 for utility in mine])
