"""The rules that learned policies are compared with, and their parameters.

Parameters are tuned on training windows: the best static plan, the queue limit, the headroom of greedy_stop and the
margin of SABER.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from agents.baselines.serve import Build, conf_policy, fixed_plan, policy_context, with_queue_limit
from agents.envs.serve import ServeSetting
from agents.envs.serve_windows import Window, serve_windows
from agents.evaluation.chosen import chosen_rules
from agents.evaluation.serve import play_window
from sim.cost.plan import Plan
from sim.progress import Report, progress

TRAIN_WINDOWS, TRAIN_SEED = 45, 20250603


def train_windows(sources: Sequence[str]) -> list[Window]:
    """Return the training windows on which rules are tuned, the same in every call."""
    rng = np.random.default_rng(TRAIN_SEED)
    return [serve_windows().sample(rng, "train", tuple(sources)) for _ in range(TRAIN_WINDOWS)]


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
