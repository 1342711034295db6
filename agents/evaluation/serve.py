"""Evaluates policies of ``ServeTrace`` on the same held-out windows.

Parameters of rules are tuned on training windows: the best static plan, the queue limit, the headroom of greedy_stop
and the margin of SABER. Only two rows know the window: ``oracle_static``, the best single plan of each window in
hindsight, and ``oracle_search``, the best schedule of plans that a search finds (``agents.evaluation.oracle``).
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pandas as pd

from agents.baselines.serve import Build, conf_policy, fixed_plan, policy_context, with_queue_limit
from agents.envs.serve import ServeSetting
from agents.envs.serve_windows import Window, serve_windows
from agents.evaluation.chosen import chosen_rules
from agents.evaluation.figures import best_in_hindsight, serving_figures
from agents.evaluation.oracle import best_schedule, schedule_policy
from sim.cost.plan import Plan
from sim.cost.quality import PublishedQuality, load_quality
from sim.errors import ConfigError
from sim.policies.base import Policy
from sim.policies.fixed import Fixed
from sim.progress import Report, progress

TRAIN_WINDOWS, TRAIN_SEED = 45, 20250603


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


def train_windows(sources: Sequence[str]) -> list[Window]:
    """Return the training windows on which rules are tuned, the same in every call."""
    rng = np.random.default_rng(TRAIN_SEED)
    return [serve_windows().sample(rng, "train", tuple(sources)) for _ in range(TRAIN_WINDOWS)]


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
    ratio = ours.dense_perplexity / other.dense_perplexity
    perplexity = tuple(ratio * value for value in other.w4_perplexity)
    changed = copy(setting)
    changed.quality = replace(ours, w4_layers=other.w4_layers, w4_perplexity=perplexity)
    changed._nll = {}
    return changed


def mean_utility(setting: ServeSetting, windows: Sequence[Window], build: Build) -> float:
    """Return the mean utility of a policy over windows, in [0, 1]; the policy is built again for each window."""
    context = policy_context(setting)
    return float(np.mean([play_window(setting, window, build(context))["utility"] for window in windows]))


MODES = ("accuracy", "default", "performance")
STOPPERS = ("greedy_stop", "random_stop", "pressure_stop", "precision", *(f"morphserve_{mode}" for mode in MODES))
UNTUNED = ("dense", "int4", "lookahead", *STOPPERS[1:])
"""Rules whose parameters are not tuned on training windows."""
RULES = (
    "dense",
    "int4",
    "static",
    "saber",
    "saber_int4",
    *STOPPERS,
    "lookahead",
    "dense+queue",
    *(f"{name}+queue" for name in STOPPERS),
)


def tuned_rules(
    setting: ServeSetting,
    score: Callable[[Build], float] | None = None,
    windows: int = TRAIN_WINDOWS,
    names: Sequence[str] | None = None,
) -> tuple[dict[str, Build], dict[str, Any]]:
    """Return rules with their tuned parameters, and these parameters.

    Args:
        setting: what is served.
        score: returns how good a policy is in training; by default its mean utility over the training windows.
        windows: number of windows or clusters that ``score`` uses, to report it.
        names: which of ``RULES``; None means all. Nothing is tuned if none of these needs it.
    """
    if score is None:
        score = partial(mean_utility, setting, train_windows(setting.sources))
    if names is not None and not set(names) & (set(RULES) - set(UNTUNED)):
        return chosen_rules(rules_tuned_to(setting, {}), names), {}
    tuned, static = _tune(setting, score)
    return chosen_rules(_rules(setting, tuned, static), names), {**tuned, "windows": windows}


def rules_tuned_to(setting: ServeSetting, tuned: Mapping[str, Any]) -> dict[str, Build]:
    """Return the rules with the parameters that ``tuned_rules`` found; those that need none if it found none."""
    if not tuned:
        rules = _rules(setting, {"queue": None, "saber_margin": 0.4, "greedy_stop": {}}, setting.actions.plans[0])
        return chosen_rules(rules, UNTUNED)
    static = setting.actions.plans[list(setting.actions.names).index(tuned["static"])]
    return _rules(setting, tuned, static)


def _rules(setting: ServeSetting, tuned: Mapping[str, Any], static: Plan) -> dict[str, Build]:
    """Return every rule with these parameters, in the order of ``RULES``."""
    max_waiting = tuned["queue"]
    dense, saber = conf_policy("dense"), partial(conf_policy, "saber", margin=tuned["saber_margin"])
    unlimited: dict[str, Build] = {
        "greedy_stop": conf_policy("greedy_stop", **tuned["greedy_stop"]),
        "random_stop": conf_policy("random"),
        "pressure_stop": conf_policy("adaptive_pruning"),
        "precision": conf_policy("adaptive_precision"),
        **{f"morphserve_{mode}": conf_policy("morphserve", mode=mode) for mode in MODES},
    }
    return {
        "dense": dense,
        "int4": conf_policy("int4"),
        "static": fixed_plan(static),
        "saber": saber(),
        "saber_int4": saber(plan={"weight_bits": 4}),
        **unlimited,
        "lookahead": conf_policy("lookahead", actions=dict(setting.action_options)),
        "dense+queue": with_queue_limit(dense, max_waiting),
        **{f"{name}+queue": with_queue_limit(build, max_waiting) for name, build in unlimited.items()},
    }


def _tune(setting: ServeSetting, score: Callable[[Build], float]) -> tuple[dict[str, Any], Plan]:
    """Return the parameters of the rules with the highest scores, and the best static plan."""
    plans, dense, margins = setting.actions.plans, conf_policy("dense"), (0.1, 0.2, 0.4, 0.8)
    limits = sorted({plan.max_waiting for plan in plans if plan.max_waiting is not None})
    grid = [
        {"headroom": headroom, "restore_headroom": headroom + 0.2, "waiting_share": share, "patience": patience}
        for headroom in (1.1, 1.4)
        for share in (0.0, 1.0)
        for patience in (2, 10)
    ]
    total = len(plans) + len(limits) + len(grid) + len(margins)
    with progress("tuning rules", total, "settings") as report:
        scored = _reporting(score, report)
        static = [scored(fixed_plan(plan)) for plan in plans]
        best = int(np.argmax(static))
        max_waiting = max(limits, key=lambda limit: scored(with_queue_limit(dense, limit)))
        greedy = max(
            grid, key=lambda values: scored(with_queue_limit(conf_policy("greedy_stop", **values), max_waiting))
        )
        margin = max(margins, key=lambda value: scored(conf_policy("saber", margin=value)))
    tuned = {
        "static": setting.actions.names[best],
        "static_utility": static[best],
        "queue": max_waiting,
        "greedy_stop": greedy,
        "saber_margin": margin,
    }
    return tuned, plans[best]


def _reporting(score: Callable[[Build], float], report: Report) -> Callable[[Build], float]:
    """Return the score, which reports after each call how many there have been."""
    calls = itertools.count(1)

    def scored(build: Build) -> float:
        value = score(build)
        report(next(calls))
        return value

    return scored


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
