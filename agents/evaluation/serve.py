"""Every policy of ``ServeTrace`` on the same held-out windows: what arrives, under which memory, how it went.

Whatever a policy needs tuned is tuned on training windows: the best static plan, the queue limit, the headroom of
greedy-stop. Two rows alone choose with the window known: ``oracle_static``, the best single plan of each window in
hindsight, and ``oracle_search``, the best schedule of plans that a search finds (``agents.evaluation.oracle``).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from hydra.utils import instantiate
from omegaconf import OmegaConf

from agents.envs.serve import ServeSetting
from agents.envs.serve_windows import Window, serve_windows
from agents.evaluation.oracle import best_schedule, schedule_policy
from sim.config import CONF_DIR
from sim.cost.latency import copy_speed
from sim.cost.plan import Plan
from sim.cost.quality import PublishedQuality, load_quality
from sim.errors import ConfigError
from sim.policies.admission import Limited
from sim.policies.base import Policy, PolicyContext, ServerModel
from sim.policies.fixed import Fixed
from sim.policies.learned_serve import learned_serve
from sim.results.metrics import met_slo
from sim.results.records import Status

Build = Callable[[PolicyContext], Policy]

TRAIN_WINDOWS, TRAIN_SEED = 45, 20250603
TEST_SEED = 20250604
RATE_QUANTILES = (0.25, 0.85)
"""Loads of the test: so far along each source's range of rates, on a logarithmic scale."""


def served_of(setting: ServeSetting) -> PolicyContext:
    """Return what stays the same while a policy decides."""
    copying = copy_speed(setting.latency, setting.gpu)
    server = ServerModel(
        model=setting.model,
        latency=setting.latency,
        config=setting.engine,
        workspace_bytes=setting.workspace_bytes,
        host_to_device_bytes_per_s=copying.host_to_device_bytes_per_s,
        copy_slowdown=copying.slowdown,
        quality_nll=setting.nll,
    )
    return PolicyContext(
        model=setting.model,
        workspace_bytes=setting.workspace_bytes,
        kv_block_tokens=setting.engine.kv_block_tokens,
        server=lambda: server,
    )


def play_window(setting: ServeSetting, window: Window, policy: Policy) -> dict[str, Any]:
    """Serve a window under a policy, asked every tick; return its figures."""
    engine = setting.build_engine(window, policy.first_plan)
    requests = len(setting.windows.requests(window))
    fixed = isinstance(policy, Fixed)
    decisions_s = []
    for tick in range(1, 1 if fixed else setting.ticks):
        state = engine.run_until(tick * setting.tick_s)
        begun_s = time.perf_counter()
        plan = policy(state)
        decisions_s.append(time.perf_counter() - begun_s)
        engine.apply(plan)
    state = engine.run_until(setting.ticks * setting.tick_s)
    engine.run_until(math.inf)
    records = engine.records()
    met = met_slo(records, setting.slo)
    finished = records.status == Status.FINISHED
    loss = records.quality_nll[finished] - setting.dense_nll
    ttft_s = np.where(np.isfinite(records.ttft_s), records.ttft_s, np.inf)
    return {
        "requests": requests,
        "utility": setting.earned(engine, requests),
        "slo_attainment": float(met.mean()) if len(met) else 1.0,
        "goodput_rps": float(met.sum()) / setting.windows.window_s,
        "ttft_p95_s": float(np.quantile(ttft_s[finished], 0.95)) if finished.any() else math.nan,
        "rejected_share": float((records.status == Status.REJECTED).mean()) if len(met) else 0.0,
        "loss": float(np.maximum(loss, 0.0).mean()) if len(loss) else 0.0,
        "budget_violation_s": engine.budget_violation_s,
        "transitions": len(engine.transitions()),
        "decision_p50_s": float(np.median(decisions_s)) if decisions_s else 0.0,
        "decision_p99_s": float(np.quantile(decisions_s, 0.99)) if decisions_s else 0.0,
    }


def conf_policy(name: str, **changed: Any) -> Build:
    """Return what builds the policy of a file of conf/policy, some keys changed."""
    node = OmegaConf.merge(OmegaConf.load(CONF_DIR / "policy" / f"{name}.yaml"), changed)
    OmegaConf.set_struct(node, True)
    if "seed" in node and OmegaConf.is_interpolation(node, "seed"):
        node.seed = 0
    build: Build = instantiate(node, _convert_="all")
    return build


def limited_to(build: Build, admit: int | None) -> Build:
    """Return the policy with a queue limit around it."""
    if admit is None:
        return build
    limit = admit
    return lambda served: Limited(build(served), limit)


def train_windows(sources: Sequence[str]) -> list[Window]:
    """Return the training windows on which rules are tuned."""
    rng = np.random.default_rng(TRAIN_SEED)
    return [serve_windows().sample(rng, "train", tuple(sources)) for _ in range(TRAIN_WINDOWS)]


def test_windows(sources: Sequence[str], each: int) -> list[Window]:
    """Return the held-out windows: ``each`` for every source, budget and load."""
    windows, rng = serve_windows(), np.random.default_rng(TEST_SEED)
    found = []
    for source in sources:
        low, high = windows.rates[source]
        for budget in windows.budgets:
            for quantile in RATE_QUANTILES:
                rate = low * (high / low) ** quantile
                found += [windows.sample(rng, "test", (source,), rate=rate, budget=budget) for _ in range(each)]
    return found


def load_of(window: Window) -> float:
    """Return how far along its source's range of rates a window is, on a logarithmic scale [0, 1]."""
    low, high = serve_windows().rates[window.source]
    return round(math.log(window.rate / low) / math.log(high / low), 3)


def with_low_bits_of(setting: ServeSetting, name: str) -> ServeSetting:
    """Return the setting with the losses that low precision has on another model, those of dropped blocks its own.

    Raises:
        ConfigError: unless both qualities are of published points.
    """
    ours, other = setting.quality, load_quality(name)
    if not isinstance(ours, PublishedQuality) or not isinstance(other, PublishedQuality):
        raise ConfigError(f"only published qualities can be mixed, and {setting.quality_name} or {name} is none")
    ratio = ours.dense_perplexity / other.dense_perplexity
    perplexity = tuple(ratio * value for value in other.w4_perplexity)
    changed = copy(setting)
    changed.quality = replace(ours, w4_layers=other.w4_layers, w4_perplexity=perplexity)
    changed._nll = {}
    return changed


def mean_utility(setting: ServeSetting, windows: Sequence[Window], build: Build) -> float:
    """Return the mean utility of a policy, built anew for each window."""
    served = served_of(setting)
    return float(np.mean([play_window(setting, window, build(served))["utility"] for window in windows]))


def fixed_plan(plan: Plan) -> Build:
    """Return what builds the policy of one plan."""
    return lambda served: Fixed(plan)


def rules(
    setting: ServeSetting, score: Callable[[Build], float] | None = None, windows: int = TRAIN_WINDOWS
) -> tuple[dict[str, Build], dict[str, Any]]:
    """Return every rule, tuned, and what tuning chose.

    Args:
        setting: what is served. score: how good a policy is where rules are tuned, by default on the training windows.
        windows: how many windows or clusters that are.
    """
    if score is None:
        score = partial(mean_utility, setting, train_windows(setting.sources))
    plans = setting.actions.plans
    static = [score(fixed_plan(plan)) for plan in plans]
    best = int(np.argmax(static))
    limits = sorted({plan.admit for plan in plans if plan.admit is not None})
    dense = conf_policy("dense")
    admit = max(limits, key=lambda limit: score(limited_to(dense, limit)))
    grid = [
        {"headroom": headroom, "restore_headroom": headroom + 0.2, "waiting_share": share, "patience": patience}
        for headroom in (1.1, 1.4)
        for share in (0.0, 1.0)
        for patience in (2, 10)
    ]
    greedy = max(grid, key=lambda words: score(limited_to(conf_policy("greedy_stop", **words), admit)))
    margins = (0.1, 0.2, 0.4, 0.8)
    margin = max(margins, key=lambda x: score(conf_policy("saber", margin=x)))
    found: dict[str, Build] = {
        "dense": dense,
        "int4": conf_policy("int4"),
        "static": fixed_plan(plans[best]),
        "saber": conf_policy("saber", margin=margin),
        "saber_int4": conf_policy("saber", margin=margin, plan={"weight_bits": 4}),
    }
    without: dict[str, Build] = {
        "greedy_stop": conf_policy("greedy_stop", **greedy),
        "random_stop": conf_policy("random"),
        "pressure_stop": conf_policy("adaptive_pruning"),
        "precision": conf_policy("adaptive_precision"),
        **{
            f"morphserve_{mode}": conf_policy("morphserve", mode=mode)
            for mode in ("accuracy", "default", "performance")
        },
    }
    found |= without
    found |= {"lookahead": conf_policy("lookahead", actions=dict(setting.action_words))}
    found |= {"dense+queue": limited_to(dense, admit)}
    found |= {f"{name}+queue": limited_to(build, admit) for name, build in without.items()}
    chosen = {
        "static": setting.actions.names[best],
        "static_utility": static[best],
        "queue": admit,
        "greedy_stop": greedy,
        "saber_margin": margin,
        "windows": windows,
    }
    return found, chosen


def learned_policies(paths: Sequence[Path]) -> list[Build]:
    """Return one policy a file."""
    return [partial(learned_serve, path=str(path)) for path in paths]


def serve_contest(
    setting: ServeSetting, policies: Mapping[str, Sequence[Build]], windows: Sequence[Window], *, oracles: bool = True
) -> pd.DataFrame:
    """Return one row a policy, seed and window; the two oracles added unless they are not wanted."""
    served = served_of(setting)
    rows = []
    for number, window in enumerate(windows):
        shown = {
            "window": number,
            "source": window.source,
            "start_s": window.start_s,
            "rate": window.rate,
            "load": load_of(window),
            "budget": window.budget,
            "budget_seed": window.budget_seed,
        }
        for name, seeds in policies.items():
            for seed, build in enumerate(seeds):
                figures = play_window(setting, window, build(served))
                rows.append({"policy": name, "seed": seed, **shown, **figures})
        if not oracles:
            continue
        every = [play_window(setting, window, Fixed(plan)) for plan in setting.actions.plans]
        best = max(every, key=lambda figures: float(figures["utility"]))
        rows.append({"policy": "oracle_static", "seed": 0, **shown, **best})
        schedule, _ = best_schedule(setting, window)
        searched = play_window(setting, window, schedule_policy(setting, schedule))
        rows.append({"policy": "oracle_search", "seed": 0, **shown, **searched})
    return pd.DataFrame(rows)


def serve_grid(frame: pd.DataFrame, policy: str, column: str = "utility") -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return a column of one policy as [seeds, windows]."""
    table = frame[frame["policy"] == policy].pivot_table(index="seed", columns="window", values=column, sort=True)
    return table.to_numpy(dtype=np.float64)


def evaluation_setting(words: Mapping[str, Any]) -> ServeSetting:
    """Return the setting that a policy was trained in, for the test split."""
    return ServeSetting(**{**words, "split": "test"})


__all__ = [
    "evaluation_setting",
    "learned_policies",
    "play_window",
    "rules",
    "serve_contest",
    "serve_grid",
    "test_windows",
]
