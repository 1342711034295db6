"""Evaluates policies of ``ServeTrace`` on the same held-out windows.

The rules among them are in ``agents.evaluation.rules``. Only two rows know the window: ``oracle_static``, the best
single plan of each window in hindsight, and ``oracle_search``, the best schedule of plans that a search finds
(``agents.evaluation.oracle``).
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from copy import copy
from typing import Any

import numpy as np
import pandas as pd

from agents.baselines.serve import Build, policy_context
from agents.envs.serve import ServeSetting
from agents.envs.serve_windows import Window, serve_windows
from agents.evaluation.figures import best_in_hindsight, serving_figures
from agents.evaluation.oracle import best_schedule, schedule_policy
from sim.cost.quality import PublishedQuality, load_quality
from sim.errors import ConfigError
from sim.policies.base import Policy
from sim.policies.fixed import Fixed
from sim.progress import progress

TEST_SEED = 20250604
ORACLES = ("oracle_static", "oracle_search")

RATE_QUANTILES = (0.25, 0.85)
"""Loads of the test windows: positions in each source's range of rates, on a logarithmic scale."""


def play_window(setting: ServeSetting, window: Window, policy: Policy) -> dict[str, Any]:
    """Serve a window under a policy that decides every tick; return its figures.

    They are ``serving_figures``, seconds over budget, the number of plan changes, and decision latencies in seconds.
    """
    engine = setting.build_engine(window, policy.first_plan)
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


def test_windows(sources: Sequence[str], each: int) -> list[Window]:
    """Return the held-out windows, the same in every call: ``each`` for every source, budget and load."""
    windows, rng = serve_windows(), np.random.default_rng(TEST_SEED)
    sampled = []
    for source in sources:
        low, high = windows.rates[source]
        for budget in windows.budgets:
            for quantile in RATE_QUANTILES:
                rate = low * (high / low) ** quantile
                sampled += [windows.sample(rng, "test", (source,), rate=rate, budget=budget) for _ in range(each)]
    return sampled


def load_of(window: Window) -> float:
    """Return the position of a window in its source's range of rates, on a logarithmic scale in [0, 1]."""
    low, high = serve_windows().rates[window.source]
    return round(math.log(window.rate / low) / math.log(high / low), 3)


def with_low_bits_of(setting: ServeSetting, name: str) -> ServeSetting:
    """Return the setting with another model's losses of low precision; the losses of dropped blocks stay.

    Raises:
        ConfigError: unless both qualities are published ones (``PublishedQuality``).
    """
    ours, other = setting.quality, load_quality(name)
    if not isinstance(ours, PublishedQuality) or not isinstance(other, PublishedQuality):
        raise ConfigError(
            f"only published qualities can be combined, but {setting.quality_name} or {name} is measured; use two of "
            "conf/quality/*_published.yaml"
        )
    changed = copy(setting)
    changed.quality = ours.with_w4_of(other)
    changed._nll = {}
    return changed


def evaluate_serve(
    setting: ServeSetting,
    policies: Mapping[str, Sequence[Build]],
    windows: Sequence[Window],
    *,
    oracles: Sequence[str] = ORACLES,
) -> pd.DataFrame:
    """Return one row for each policy, seed and window; ``oracles``: which of ``ORACLES`` to add."""
    rows: list[dict[str, Any]] = []
    with progress("playing", len(windows), "windows") as report:
        for number, window in enumerate(windows):
            rows += _played(setting, policies, number, window, oracles)
            report(number + 1)
    return pd.DataFrame(rows)


def _played(
    setting: ServeSetting,
    policies: Mapping[str, Sequence[Build]],
    number: int,
    window: Window,
    oracles: Sequence[str],
) -> list[dict[str, Any]]:
    """Return the rows of one window."""
    context = policy_context(setting)
    scenario = {
        "window": number,
        "source": window.source,
        "start_s": window.start_s,
        "rate": window.rate,
        "load": load_of(window),
        "budget": window.budget,
        "budget_seed": window.budget_seed,
    }
    rows = [
        {"policy": name, "seed": seed, **scenario, **play_window(setting, window, build(context))}
        for name, seeds in policies.items()
        for seed, build in enumerate(seeds)
    ]
    if "oracle_static" in oracles:
        best = best_in_hindsight([play_window(setting, window, Fixed(plan)) for plan in setting.actions.plans])
        rows.append({"policy": "oracle_static", "seed": 0, **scenario, **best})
    if "oracle_search" in oracles:
        schedule, _ = best_schedule(setting, window)
        searched = play_window(setting, window, schedule_policy(setting, schedule))
        rows.append({"policy": "oracle_search", "seed": 0, **scenario, **searched})
    return rows


def serve_grid(frame: pd.DataFrame, policy: str, column: str = "utility") -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return a column of one policy, float64[seeds, windows]."""
    table = frame[frame["policy"] == policy].pivot_table(index="seed", columns="window", values=column, sort=True)
    return table.to_numpy(dtype=np.float64)


def evaluation_setting(env_kwargs: Mapping[str, Any]) -> ServeSetting:
    """Return the setting in which a policy was trained, with the test split.

    Raises:
        ConfigError: if its file states an environment that ``ServeTrace`` cannot be.
    """
    try:
        return ServeSetting(**{**env_kwargs, "split": "test"})
    except (TypeError, AttributeError) as error:
        raise ConfigError(f"the policy's file states no environment of ServeTrace ({error})") from error
