"""Plays policies of ``ServeTrace`` on the same listed windows, in every scenario (``agents.envs.serve_lists``).

The rules among them are in ``agents.evaluation.rules``. Only two rows know the window: ``oracle_static``, the best
single plan of each window in hindsight, and ``oracle_search``, the best schedule of plans that a search finds
(``agents.evaluation.oracle``). They are slow, so they play a few windows of each source in each scenario alone.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from agents.baselines.serve import Build, policy_context
from agents.envs.serve import ServeSetting
from agents.envs.serve_lists import Listed
from agents.envs.serve_windows import Window
from agents.evaluation.figures import best_in_hindsight, serving_figures
from agents.evaluation.oracle import best_schedule, schedule_policy
from agents.evaluation.unfinished import Rows, Unfinished
from sim.policies.base import Policy
from sim.policies.fixed import Fixed
from sim.processes import in_forks
from sim.progress import progress

ORACLES = ("oracle_static", "oracle_search")
MEMBERS = " (seeds)"
"""Ends the name of the networks that a policy averages, each played alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Match:
    """A scenario with the policies that play its windows.

    policies: name -> a builder for each training seed; a rule has one.
    """

    setting: ServeSetting
    policies: Mapping[str, Sequence[Build]] = field(default_factory=dict)


def play_window(setting: ServeSetting, window: Window, policy: Policy) -> dict[str, Any]:
    """Serve a window under a policy that decides every tick; return its figures.

    They are ``serving_figures``, seconds over budget, the number of plan changes, and decision latencies in seconds.
    """
    # What plans cost and how they change is the same in every window, so it is kept from one to the next.
    engine = setting.build_engine(window, policy.first_plan, graph=setting.graph_for(window))
    requests = len(setting.windows.requests(window))
    fixed = isinstance(policy, Fixed)
    decisions_s = []
    for tick in range(1, 1 if fixed else setting.ticks):
        state = engine.run_until(tick * setting.tick_s)
        started_s = time.perf_counter()
        plan = policy(state)
        decisions_s.append(time.perf_counter() - started_s)
        engine.apply(plan)
    engine.run_until(setting.ticks * setting.tick_s)
    engine.run_until(math.inf)
    return {
        **serving_figures(setting, engine, requests),
        "budget_violation_s": engine.budget_violation_s,
        "transitions": len(engine.transitions()),
        "decision_p50_s": float(np.median(decisions_s)) if decisions_s else 0.0,
        "decision_p99_s": float(np.quantile(decisions_s, 0.99)) if decisions_s else 0.0,
    }


def first_windows(listed: Sequence[Listed], most: int | None) -> list[Listed]:
    """Return the first ``most`` windows of each source in each scenario; all of them if it is None."""
    seen: Counter[tuple[str, str]] = Counter()
    found = []
    for one in listed:
        key = (one.scenario, one.window.source)
        seen[key] += 1
        if most is None or seen[key] <= most:
            found.append(one)
    return found


def oracle_windows(listed: Sequence[Listed], each: int) -> list[Listed]:
    """Return ``each`` windows of each source in each scenario, such that all together have every load and budget.

    Lists begin with one window for every load and budget, in the same order; each list is entered one place later than
    the one before.
    """
    lists: dict[tuple[str, str], list[Listed]] = {}
    for one in listed:
        lists.setdefault((one.scenario, one.window.source), []).append(one)
    found = []
    for place, windows in enumerate(lists.values()):
        count = min(each, len(windows))
        found += [windows[(place + turn * len(windows) // count) % len(windows)] for turn in range(count)]
    return found


def evaluate_serve(
    matches: Mapping[str, Match],
    listed: Sequence[Listed],
    *,
    oracles: Sequence[str] = (),
    oracle_each: int = 1,
    workers: int = 1,
    unfinished: Unfinished | None = None,
) -> pd.DataFrame:
    """Return one row for each policy, seed and window.

    Args:
        matches: by scenario. listed: the windows.
        oracles: which of ``ORACLES`` to add, on ``oracle_each`` windows of each source in each scenario.
        workers: processes; the rows do not depend on it, except for their decision latencies.
        unfinished: what an earlier start played, which is not played again; takes every window that is played.
    """
    known = set(oracle_windows(listed, oracle_each)) if oracles and oracle_each else set()
    jobs = [
        (matches[one.scenario], number, one, oracles if one in known else ())
        for number, one in enumerate(listed)
        if unfinished is None or number not in unfinished
    ]
    played = in_forks(lambda job: _played(*job), jobs, workers, chunk=4)
    rows: Rows = []
    with progress("playing", len(jobs), "windows") as report:
        for done, ((_, number, *_), found) in enumerate(zip(jobs, played, strict=True), start=1):
            if unfinished is None:
                rows += found
            else:
                unfinished.add(number, found)
            report(done)
    return pd.DataFrame(rows if unfinished is None else unfinished.rows(range(len(listed))))


def _played(match: Match, number: int, one: Listed, oracles: Sequence[str]) -> list[dict[str, Any]]:
    """Return the rows of one window."""
    setting, window = match.setting, one.window
    context = policy_context(setting)
    memory, low_bits = one.scenario.split("/")
    about = {
        "window": number,
        "scenario": one.scenario,
        "memory": memory,
        "low_bits": low_bits,
        "source": window.source,
        "block": one.block,
        "load": one.share,
        "budget": window.budget,
        "start_s": window.start_s,
        "rate": window.rate,
        "budget_seed": window.budget_seed,
    }
    rows = [
        {"policy": name, "seed": seed, **about, **play_window(setting, window, build(context))}
        for name, seeds in match.policies.items()
        for seed, build in enumerate(seeds)
    ]
    if "oracle_static" in oracles:
        best = best_in_hindsight([play_window(setting, window, Fixed(plan)) for plan in setting.actions.plans])
        rows.append({"policy": "oracle_static", "seed": 0, **about, **best})
    if "oracle_search" in oracles:
        schedule, _ = best_schedule(setting, window)
        searched = play_window(setting, window, schedule_policy(setting, schedule))
        rows.append({"policy": "oracle_search", "seed": 0, **about, **searched})
    return rows


def serve_grid(frame: pd.DataFrame, policy: str, column: str = "utility") -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return a column of one policy, float64[seeds, windows]."""
    table = frame[frame["policy"] == policy].pivot_table(index="seed", columns="window", values=column, sort=True)
    return table.to_numpy(dtype=np.float64)
