"""Makes the table of load_table from training windows: the best single plan for each arrival rate and budget.

Every plan of the action table serves every window once. Each request then counts for the rate and the budget that a
server saw when it came, so that one window fills many entries. A trace counts as much as any other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agents.envs.reward import kept_quality
from agents.envs.serve import ServeSetting
from agents.envs.serve_windows import Window
from sim.cost.memory import weight_bytes
from sim.cost.plan import Plan, dense_plan
from sim.engine.protocol import EngineState
from sim.policies.load_table import Load, budget_of
from sim.results.metrics import met_slo
from sim.types import Floats

# Shapes: [r] requests of all windows; [p] plans of the action table, without admission limits.


@dataclass(frozen=True, slots=True)
class Served:
    """How every plan served the training windows.

    states: of each window, at each tick; what is read of them does not depend on the plan.
    window, tick: of each request, int64[r]: its window, and the last tick before it came.
    weight: of each request, float64[r]: traces count alike. earned: quality kept if in time, float64[p, r].
    """

    states: tuple[tuple[EngineState, ...], ...]
    window: NDArray[np.int64]
    tick: NDArray[np.int64]
    weight: Floats
    earned: Floats


def plans_without_limits(setting: ServeSetting) -> dict[tuple[int, int], Plan]:
    """Return the plans of the action table without admission limits, by (blocks dropped, layers at low precision)."""
    options, each = setting.action_options, setting.actions.limits
    levels = [(drop, low) for drop in options.get("drops", (0,)) for low in options.get("low_layers", (0,))]
    # Of each pair those that stream nothing, at the first bits of KV: rules choose between the other two alone.
    plans = [
        replace(plan, max_waiting=None, max_wait_s=None)
        for plan in setting.actions.plans[::each]
        if not any(plan.streamed)
    ]
    return dict(zip(levels, plans, strict=True))


def serve_all(setting: ServeSetting, windows: Sequence[Window], max_wait_s: float | None) -> Served:
    """Return how every plan of the action table serves the windows, with this longest wait."""
    states, columns, tick, window, weight = [], [], [], [], []
    plans = [replace(plan, max_wait_s=max_wait_s) for plan in plans_without_limits(setting).values()]
    counts = {one.source: 0 for one in windows}
    for number, one in enumerate(windows):
        arrival_s = setting.windows.arrays(one)[0]
        states.append(tuple(_states(setting, one, plans[0])))
        columns.append(np.stack([_earned(setting, one, plan) for plan in plans]))
        window.append(np.full(len(arrival_s), number))
        tick.append(np.clip(np.floor(arrival_s / setting.tick_s).astype(np.int64) - 1, 0, setting.ticks - 2))
        counts[one.source] += len(arrival_s)
    for number, one in enumerate(windows):
        weight.append(np.full(len(window[number]), 1.0 / max(1, counts[one.source])))
    return Served(
        tuple(states), np.concatenate(window), np.concatenate(tick), np.concatenate(weight), np.hstack(columns)
    )


def _states(setting: ServeSetting, window: Window, plan: Plan) -> list[EngineState]:
    engine = setting.build_engine(window, plan, graph=setting.graph_for(window))
    return [engine.run_until(tick * setting.tick_s) for tick in range(1, setting.ticks)]


def _earned(setting: ServeSetting, window: Window, plan: Plan) -> Floats:
    """Return the quality that each request kept, 0 if it was late, float64[requests]."""
    engine = setting.build_engine(window, plan, graph=setting.graph_for(window))
    engine.run_until(math.inf)
    records = engine.records()
    met = met_slo(records, setting.slo)
    loss = np.where(met, records.quality_nll - setting.dense_nll, 0.0)
    earned: Floats = kept_quality(loss) * met
    return earned


def best_table(setting: ServeSetting, served: Served, columns: int, rows: int, smoothing_s: float) -> dict[str, Any]:
    """Return ``rates``, ``budgets`` and ``table`` of ``sim.policies.load_table``.

    Args:
        columns, rows: how many at most; equal numbers of requests lie between edges, and equal edges are one.
        smoothing_s: time constant of the average of the rate.
    """
    dense_bytes = weight_bytes(setting.model, dense_plan(setting.model))
    rate, budget = [], []
    for states in served.states:
        load = Load(smoothing_s)
        rate.append([load.add(state) for state in states])
        budget.append([budget_of(state) / dense_bytes for state in states])
    at = served.window, served.tick
    rates, budgets = np.array(rate)[at], np.array(budget)[at]
    rate_edges, budget_edges = _edges(rates, columns), _edges(budgets, rows)
    column, row = np.searchsorted(rate_edges, rates, side="right"), np.searchsorted(budget_edges, budgets, side="right")
    names, overall = list(plans_without_limits(setting)), served.earned @ served.weight
    table = []
    for i in range(len(budget_edges) + 1):
        entries = []
        for j in range(len(rate_edges) + 1):
            here = (row == i) & (column == j)
            value = served.earned[:, here] @ served.weight[here] if here.any() else overall
            entries.append(list(names[int(np.argmax(value))]))
        table.append(entries)
    return {"rates": rate_edges, "budgets": budget_edges, "table": table}


def _edges(values: Floats, count: int) -> list[float]:
    """Return at most ``count`` - 1 edges between equal parts of the values, above 0, with three significant digits."""
    quantiles = np.quantile(values, np.arange(1, count) / count, method="higher")
    # Rounded down, and above the smallest value: otherwise no value would lie above the last edge or below the first.
    edges = {_rounded_down(float(edge)) for edge in quantiles if edge > 0.0}
    return sorted(edge for edge in edges if edge > float(values.min()))


def _rounded_down(value: float) -> float:
    step = 10.0 ** (math.floor(math.log10(value)) - 2)
    return float(f"{math.floor(value / step + 1e-9) * step:.6g}")
