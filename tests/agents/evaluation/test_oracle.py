"""The oracle's search: its utility is what a replay gives, at least that of every single plan, and near the optimum."""

from __future__ import annotations

from itertools import product

import pytest

from agents.envs.serve import ServeSetting
from agents.envs.serve_windows import Window
from agents.evaluation.oracle import _utility, best_schedule, schedule_policy
from agents.evaluation.serve import play_window

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
