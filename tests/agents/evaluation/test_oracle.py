"""The oracle's search: its utility is what a replay gives, at least that of every single plan, and near the optimum."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest

from agents.envs.serve import ServeSetting
from agents.envs.serve_lists import Listed
from agents.envs.serve_windows import Window
from agents.evaluation.oracle import _utility, best_schedule, schedule_policy
from agents.evaluation.serve import oracle_windows, play_window

KINDS = list(product((0.6, 0.75, 0.9), ("full", "cotenant", "random_walk")))
WINDOW = Window(source="burst", start_s=300.0, rate=1.2, budget="cotenant", budget_seed=4, high_share=3.0)
FEW = {"drops": [0, 6], "low_layers": [0], "waits": [None, 1.5], "dwell_s": 0.0}


def test_a_replay_of_the_schedule_gives_its_utility_and_no_single_plan_is_better() -> None:
    setting = ServeSetting(actions=FEW)
    schedule, utility = best_schedule(setting, WINDOW, spans=(40, 20))
    assert play_window(setting, WINDOW, schedule_policy(setting, schedule))["utility"] == utility
    single = [_utility(setting, WINDOW, [action] * (setting.ticks - 1)) for action in range(4)]
    assert utility >= max(single)
    assert len(set(schedule)) > 1


def test_the_result_is_near_the_best_of_all_schedules_of_three_spans() -> None:
    setting = ServeSetting(actions=FEW)
    _, utility = best_schedule(setting, WINDOW, spans=(40,))
    spans = [[a] * 40 + [b] * 40 + [c] * 39 for a, b, c in product(range(4), repeat=3)]
    best = max(_utility(setting, WINDOW, schedule) for schedule in spans)
    assert utility == pytest.approx(best, abs=0.01)


def test_oracles_play_windows_of_every_load_and_budget_of_each_trace_over_all_scenarios() -> None:
    listed = [
        Listed(scenario=f"s{scenario}/none", window=replace(WINDOW, source=source, budget=budget), share=share, block=0)
        for scenario, source in product(range(9), ("burst", "gamma"))
        for share, budget in KINDS
    ]
    once = oracle_windows(listed, 1)
    assert len({(one.scenario, one.window.source) for one in once}) == len(once) == 18
    for source in ("burst", "gamma"):
        kinds = [(one.share, one.window.budget) for one in once if one.window.source == source]
        assert sorted(kinds) == sorted(KINDS)
    assert len(set(map(id, oracle_windows(listed, 4)))) == 4 * 18
    assert len(oracle_windows(listed, 100)) == len(listed)
