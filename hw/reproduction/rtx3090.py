"""MorphServe on an RTX 3090: fixed plans and the crossover next to their measurements, and runs whose plan changes.

The calibration is fitted on the fixed plans at low and high rate (hw/calibrate/rtx3090.py). The crossover at other
rates was not seen by the fit. Of the runs whose plan changes, only the rule is known here, no measurement: these are
predictions. No source states at which period the rule samples, so three are shown.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from hw.calibrate.rtx3090 import (
    KV_BLOCKS,
    LOW_LAYERS,
    MODEL,
    Runs,
    copy_speed_of,
    crossing_rps,
    crossover,
    engine_config,
    figures_of,
    plan_of,
    served,
    server,
)
from sim.config import build_option
from sim.cost.latency import LatencyModel
from sim.cost.memory import budget_for_kv_blocks, kv_pool_layer_blocks, layer_weight_bytes
from sim.cost.model_spec import load_model
from sim.cost.plan import dense_plan
from sim.engine.sim_engine import SimEngine
from sim.policies import PolicyContext
from sim.replay.loop import replay
from sim.traces.trace import Trace

PERIODS_S = (0.05, 0.2, 1.0)
"""Seconds between two samples of the rule: about an iteration, this project's default for MorphServe, a second."""
TARGET_RPS = (0.65, 0.85)
"""Where the crossover has to lie."""
SHOWN = ("ttft_mean_s", "ttft_p50_s", "ttft_p95_s", "ttft_over_2s", "preemptions", "tpot_mean_s", "duration_s")


def fixed_plans(runs: Runs, latency: LatencyModel) -> list[dict[str, Any]]:
    """Return one row per figure of the fixed plans: both measured repeats and the simulation."""
    found = []
    for workload in ("low", "high"):
        for mode in KV_BLOCKS:
            rows = runs.fixed[(runs.fixed["workload"] == workload) & (runs.fixed["mode"] == mode)]
            simulated = figures_of(served(latency, runs.trace(workload), mode))
            for name in SHOWN:
                real = sorted(float(value) for value in rows[name])
                found.append(
                    {
                        "workload": workload,
                        "plan": mode,
                        "figure": name,
                        "measured, lower": real[0],
                        "measured, higher": real[-1],
                        "simulated": float(simulated[name]),
                        "lies": _lies(simulated[name], real[0], real[-1]),
                    }
                )
    return found


def _lies(value: float, low: float, high: float) -> str:
    """Say where a value lies: between two repeats, within 10 % of the nearer one, or by how much outside."""
    if low <= value <= high:
        return "between"
    nearer = low if value < low else high
    off = value / nearer - 1 if nearer else math.inf
    return "within 10 %" if abs(off) <= 0.1 else f"{100 * off:+.0f} %"


def dynamic(latency: LatencyModel, trace: Trace, period_s: float | None) -> tuple[SimEngine, dict[str, Any]]:
    """Serve a trace under the rule of the reproduction, sampled every ``period_s``; None keeps FP16.

    Returns:
        The engine, and its figures with the times at which 16 layers went to 4 bits and back.
    """
    spec = server(latency)
    plan = dense_plan(spec.model)
    engine = spec.build_engine(plan, budget_for_kv_blocks(spec.model, plan, KV_BLOCKS["fp16"], 0, 16))
    rule = build_option("policy", "morphserve_rtx3090")(PolicyContext.of(spec))
    replay(trace, engine, rule, tick_s=period_s)
    changes = engine.transitions()
    rows = zip(changes.time_s.tolist(), changes.ready_s.tolist(), changes.bytes_freed - changes.bytes_in, strict=True)
    low: list[list[float | None]] = []
    high: list[list[float | None]] = []
    for decided_s, ready_s, freed in rows:
        (low if freed > 0 else high).append([decided_s, ready_s if math.isfinite(ready_s) else None])
    return engine, figures_of(engine) | {"to_w4_s": low, "to_fp16_s": high}


def predictions(runs: Runs, latency: LatencyModel) -> list[dict[str, Any]]:
    """Return the figures of every workload under both fixed plans and the rule at several periods."""
    found: list[dict[str, Any]] = []
    for workload in ("low", "high", "low_high_low"):
        trace = runs.trace(workload)
        found.extend(
            {"workload": workload, "plan": mode, **figures_of(served(latency, trace, mode))} for mode in KV_BLOCKS
        )
        for period_s in PERIODS_S:
            figures = dynamic(latency, trace, period_s)[1]
            found.append({"workload": workload, "plan": f"dynamic, {period_s:g} s", **figures})
    return found


def row(runs: Runs, latency: LatencyModel) -> dict[str, Any]:
    """Return everything that the page shows of the RTX 3090."""
    rows = crossover(runs, latency)
    rates = [found["rate_rps"] for found in rows]
    measured = [
        crossing_rps(rates, *([found[f"{mode}_real"][at] for found in rows] for mode in KV_BLOCKS)) for at in (0, -1)
    ]
    crossing = crossing_rps(rates, *([found[mode] for found in rows] for mode in KV_BLOCKS))
    freed = _w4_blocks()
    return {
        "fixed": fixed_plans(runs, latency),
        "crossover": rows,
        "crossing_rps": crossing,
        "crossing_real_rps": sorted(value for value in measured if value is not None),
        "furthest": {mode: _furthest(rows, mode) for mode in KV_BLOCKS},
        "target_rps": list(TARGET_RPS),
        "met": crossing is not None and TARGET_RPS[0] <= crossing <= TARGET_RPS[1],
        "dynamic": predictions(runs, latency),
        "switch": copy_speed_of(runs),
        "switch_s": _switch_s(copy_speed_of(runs)),
        "w4_blocks": {"published": KV_BLOCKS["w4"], "here": freed},
        "host_kv_blocks": engine_config().host_kv_blocks,
    }


def _furthest(rows: Sequence[Mapping[str, Any]], mode: str) -> float:
    """Return how far a simulated P95 lies outside its repeats, relative to the nearer one, at rates not fitted."""
    off = [0.0]
    for row in rows:
        low, high = row[f"{mode}_real"][0], row[f"{mode}_real"][-1]
        if not row["seen"]:
            off.append(max(low / row[mode] - 1, row[mode] / high - 1))
    return max(off)


def _w4_blocks() -> int:
    """Return the KV blocks with 16 layers at 4 bits, where FP16 has 1,759: what the freed bytes add."""
    model = load_model(MODEL)
    budget = budget_for_kv_blocks(model, dense_plan(model), KV_BLOCKS["fp16"], 0, 16)
    return kv_pool_layer_blocks(model, plan_of(model, "w4"), budget, 0, 16) // model.num_layers


def _switch_s(speed: Mapping[str, Any]) -> dict[str, float]:
    """Return the seconds of a switch of 16 layers in either direction, as simulated."""
    model = load_model(MODEL)
    return {
        name: LOW_LAYERS
        * (speed["copy_layer_s"] + layer_weight_bytes(model, bits) / speed["host_to_device_bytes_per_s"])
        for name, bits in (("to_w4", 4), ("to_fp16", 16))
    }
