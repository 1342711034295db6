"""Searches the best schedule of plans for a known window: how much adapting could gain at most.

The oracle is not a policy: it knows arrivals, output lengths and the budget of the window. The search starts from the
best of two kinds of schedules: each single plan, and the choices of looking ahead on this window
(``agents.training.clone.look_ahead``). Then it improves one span of ticks after another; each trial is served to the
end of the window (``SimEngine.snapshot``). The result is a local optimum over the plans of the table; the true optimum
may be higher.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from agents.envs.serve import ServeCore, ServeSetting
from agents.envs.serve_windows import Window
from agents.training.clone import look_ahead
from sim.engine.sim_engine import SimEngine
from sim.policies.schedule import Schedule

SPANS = (8, 4)
HORIZON_S, GRACE_S = 12.0, 1.0


def best_schedule(setting: ServeSetting, window: Window, spans: Sequence[int] = SPANS) -> tuple[list[int], float]:
    """Return the action of each decision, [ticks - 1], and the utility of the window, in [0, 1].

    Args:
        setting, window: what is served.
        spans: lengths in ticks; for each, one sweep over the window changes spans of that many ticks.
    """
    count, ticks = len(setting.actions.plans), setting.ticks
    starts = [[action] * (ticks - 1) for action in range(count)]
    starts.append(_looking_ahead(setting, window, max(spans)))
    utilities = [_utility(setting, window, schedule) for schedule in starts]
    best = int(np.argmax(utilities))
    schedule, utility = starts[best], utilities[best]
    for span in spans:
        schedule, utility = _improved(setting, window, schedule, utility, span)
    return schedule, utility


def schedule_policy(setting: ServeSetting, schedule: Sequence[int]) -> Schedule:
    """Return the policy that follows a schedule; it starts with the plan that learned policies start with."""
    plans = setting.actions.plans
    at_s = tuple(tick * setting.tick_s for tick in range(setting.ticks))
    return Schedule(at_s, (plans[setting.actions.start], *(plans[action] for action in schedule)))


def _improved(
    setting: ServeSetting, window: Window, schedule: list[int], utility: float, span: int
) -> tuple[list[int], float]:
    """Return the schedule after a sweep that gives each span the plan with the highest utility of the window."""
    engine = setting.build_engine(window, setting.actions.plans[setting.actions.start])
    requests = len(setting.windows.requests(window))
    for begin in range(1, setting.ticks, span):
        end = min(begin + span, setting.ticks)
        engine.run_until(begin * setting.tick_s)
        saved = engine.snapshot()
        for action in range(len(setting.actions.plans)):
            trial = [*schedule[: begin - 1], *[action] * (end - begin), *schedule[end - 1 :]]
            if trial == schedule:
                continue
            _follow(setting, engine, trial, begin, setting.ticks)
            engine.run_until(math.inf)
            reached = setting.earned(engine, requests)
            engine.restore(saved)
            if reached > utility:
                schedule, utility = trial, reached
        _follow(setting, engine, schedule, begin, end)
    return schedule, utility


def _follow(setting: ServeSetting, engine: SimEngine, schedule: Sequence[int], begin: int, end: int) -> None:
    """Run the decisions of ticks ``begin`` to ``end - 1``; the engine must stand at tick ``begin``."""
    engine.apply(setting.actions.plans[schedule[begin - 1]])
    for tick in range(begin + 1, end):
        if schedule[tick - 1] != schedule[tick - 2]:
            engine.run_until(tick * setting.tick_s)
            engine.apply(setting.actions.plans[schedule[tick - 1]])


def _utility(setting: ServeSetting, window: Window, schedule: Sequence[int]) -> float:
    engine = setting.build_engine(window, setting.actions.plans[setting.actions.start])
    engine.run_until(setting.tick_s)
    _follow(setting, engine, schedule, 1, setting.ticks)
    engine.run_until(math.inf)
    return setting.earned(engine, len(setting.windows.requests(window)))


def _looking_ahead(setting: ServeSetting, window: Window, span: int) -> list[int]:
    """Return the schedule that chooses, once per span, the plan that loses the least utility over the next seconds."""
    core = ServeCore(setting)
    core.begin(window)
    schedule = []
    for tick in range(1, setting.ticks):
        if (tick - 1) % span == 0:
            action = int(np.nanargmin(look_ahead(core, HORIZON_S, GRACE_S)))
        core.step(action)
        schedule.append(action)
    return schedule
