"""MorphServe on an RTX 3090, by a third party's reproduction (weige15/MorphServe): its runs, and a fit on some.

The only public measurements of a plan that changes under load. Fitted here: prefill times, which go into the tables as
they are; three numbers for decode by simulating the runs at low and high rate under fixed plans; the speed of weight
copies by least squares over measured switches. Not seen by the fit: the crossover of FP16 and W4 at other rates, and
every run whose plan changes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.optimize import least_squares

from sim.config import build_option
from sim.cost.latency import SCHEMA, LatencyModel, calibration_from_dict
from sim.cost.memory import budget_for_kv_blocks, layer_weight_bytes, mha_weight_bytes
from sim.cost.model_spec import ModelSpec, load_model
from sim.cost.plan import Plan, dense_plan
from sim.engine.protocol import EngineConfig
from sim.engine.server_spec import ServerSpec
from sim.engine.sim_engine import SimEngine
from sim.errors import CalibrationError
from sim.traces.trace import Trace
from sim.types import Floats

NAME, MODEL, GPU = "llama3.1_8b_rtx3090", "llama3.1_8b", "rtx3090_24gb"
LOW_LAYERS = 16
"""Layers at 4 bits, from the first: "w4" of the runs."""
KV_BLOCKS = {"fp16": 1759, "w4": 4170}
PROMPT_TOKENS, OUTPUT_TOKENS = 1024, 512
TIME_SCALE = 1.75
"""Seconds per second of BurstGPT's clock, before a run's own scale."""
SOURCE = {
    "repository": "weige15/MorphServe",
    "commit": "a2c00c24, bd2a52c3, 31e2c87a, c3e6db27",
    "licence": "none stated: numbers only",
    "path": "summary figures of runs, re-typed",
}
ACHIEVED = 0.85
"""Share of the data-sheet bandwidth at which decode reads weights (prior, not fitted)."""
ATTENTION_FLOP_SHARE = 0.5
"""Share of the data-sheet speed of prompt attention; prompts of one length cannot tell it from the linear part."""
PREFILL_COLUMNS = {16: "fp16_ms", 4: "w4_ms"}


def engine_config() -> EngineConfig:
    """Return the settings of the runs: SwiftLLM's, and the engine stops for a switch."""
    config: EngineConfig = build_option("engine", "swiftllm", {"copying": "blocking"})
    return config


@dataclass(frozen=True, slots=True)
class Runs:
    """The measurements of a folder: one table per file."""

    arrivals: pd.DataFrame
    prefill: pd.DataFrame
    fixed: pd.DataFrame
    crossover: pd.DataFrame
    switches: pd.DataFrame

    @classmethod
    def read(cls, folder: Path) -> Runs:
        """Read the files of ``calibration/morphserve_rtx3090``.

        Raises:
            CalibrationError: for a file that is missing or lacks a column.
        """
        wanted = {
            "arrivals": ("workload", "arrival_s", "prompt_tokens", "output_tokens"),
            "prefill": ("tokens", "fp16_ms", "w4_ms"),
            "runs_fixed_plans": ("workload", "mode", "repeat", "duration_s", "tpot_mean_s", "forwards"),
            "crossover": ("scale", "req_per_s", "mode", "repeat", "ttft_p95_s"),
            "transitions": ("direction", "total_ms", "h2d_gb"),
        }
        tables = []
        for name, columns in wanted.items():
            path = folder / f"{name}.csv"
            if not path.is_file():
                raise CalibrationError(f"no {path}; set RAP_LAB_DATA to the folder that holds calibration/")
            tables.append(_read_table(path, columns))
        return cls(*tables)

    def trace(self, workload: str) -> Trace:
        """Return the requests of a workload: low, high or low_high_low."""
        rows = self.arrivals[self.arrivals["workload"] == workload]
        if rows.empty:
            raise CalibrationError(f"no workload {workload!r} in arrivals.csv")
        return _trace(rows["arrival_s"].to_numpy(np.float64), workload)

    def trace_at(self, scale: float) -> Trace:
        """Return the 64 requests of ``low`` with their arrivals at another scale."""
        rows = self.arrivals[self.arrivals["workload"] == "low"]
        return _trace(rows["arrival_s"].to_numpy(np.float64) * (scale / LOW_SCALE), f"scale {scale:g}")


TEXT_COLUMNS = ("workload", "mode", "direction")


def _read_table(path: Path, columns: Sequence[str]) -> pd.DataFrame:
    """Read a CSV file that must have these columns, all of numbers but the ``TEXT_COLUMNS``."""
    try:
        table = pd.read_csv(path)
    except (ValueError, OSError) as error:  # pandas' own errors are ValueErrors
        raise CalibrationError(f"{path} cannot be read ({error}); give the CSV file as it was brought") from error
    if missing := [column for column in columns if column not in table]:
        raise CalibrationError(f"{path} has no column {missing[0]}; it has {', '.join(table.columns)}")
    for column in columns:
        if column not in TEXT_COLUMNS and not np.isfinite(pd.to_numeric(table[column], errors="coerce")).all():
            raise CalibrationError(f"{path}: a value of {column} is not a number; give the CSV file as it was brought")
    return table


LOW_SCALE = 5.75
"""The scale of the workload ``low``; that of ``high`` is 4.25."""


def _trace(arrival_s: Floats, name: str) -> Trace:
    count = len(arrival_s)
    return Trace(
        arrival_s=arrival_s,
        prompt_tokens=np.full(count, PROMPT_TOKENS),
        output_tokens=np.full(count, OUTPUT_TOKENS),
        name=name,
        source=f"{SOURCE['repository']}, arrivals of BurstGPT",
    )


def plan_of(model: ModelSpec, mode: str) -> Plan:
    """Return the plan of a mode: fp16, or w4 with the first 16 layers at 4 bits."""
    low = LOW_LAYERS if mode == "w4" else 0
    return dataclasses.replace(dense_plan(model), weight_bits=(4,) * low + (16,) * (model.num_layers - low))


# -- the calibration ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Decode:
    """What the fit finds: three numbers of a decode iteration.

    fixed_us: of any iteration. low_us: of a layer at 4 bits, without attention. kv_share: of the data-sheet bandwidth
    at which KV is read.
    """

    fixed_us: float
    low_us: float
    kv_share: float


PRIOR = Decode(fixed_us=17_000.0, low_us=500.0, kv_share=0.8)
PRIOR_SCALES = (0.5, 0.5, 0.25)
"""Standard deviations of the logarithms of the three numbers."""


def content_of(runs: Runs, decode: Decode) -> dict[str, Any]:
    """Return a calibration file: measured prefill times, and decode by three numbers."""
    model = load_model(MODEL)
    gpu = build_option("gpu", GPU)
    head_us = model.vocab_size * model.hidden_size * 2 / (gpu.memory_bandwidth_bytes_per_s * ACHIEVED) * 1e6
    high_us = layer_weight_bytes(model, 16) / (gpu.memory_bandwidth_bytes_per_s * ACHIEVED) * 1e6
    attention_us = 4 * model.hidden_size / (gpu.dense_fp16_flop_per_s * ATTENTION_FLOP_SHARE) * 1e6
    kv_us = model.kv_bytes_per_token_layer / (gpu.memory_bandwidth_bytes_per_s * decode.kv_share) * 1e6
    tokens = runs.prefill["tokens"].to_numpy(np.float64)
    # Embedding and final norm read and write each token's state a few times.
    token_us = 8 * model.hidden_size / gpu.memory_bandwidth_bytes_per_s * 1e6
    once_us = decode.fixed_us + head_us + token_us * tokens
    attention = attention_us * tokens * (PROMPT_TOKENS + 1) / 2
    layer = {
        16: (runs.prefill["fp16_ms"].to_numpy() * 1e3 - once_us) / model.num_layers - attention,
    }
    both = runs.prefill["w4_ms"].to_numpy() * 1e3 - once_us - model.num_layers * attention
    layer[4] = (both - (model.num_layers - LOW_LAYERS) * layer[16]) / LOW_LAYERS
    axis = np.concatenate([SMALL, tokens])
    linear: dict[str, Any] = {}
    share = mha_weight_bytes(model, 16) / layer_weight_bytes(model, 16)
    for bits, floor_us in ((16, high_us), (4, decode.low_us)):
        # Weights are read once whatever the batch; from some tokens on the products take longer than that.
        slope_us = layer[bits][0] / tokens[0]
        values = np.concatenate([np.maximum(floor_us, slope_us * SMALL), np.maximum(layer[bits], floor_us)])
        values = np.maximum.accumulate(values)
        linear[str(bits)] = {"mha": _short(values * share), "ffn": _short(values * (1 - share))}
    copying = copy_speed_of(runs)
    return {
        "schema": SCHEMA,
        "name": NAME,
        "model": MODEL,
        "device": GPU,
        "kind": "measured",
        "stack": "SwiftLLM fork, fp16, AWQ-Marlin 4 bits (group 128); prompts and decodes never in one batch",
        "date": "2026-11-27",
        "sources": [SOURCE],
        "notes": list(NOTES),
        "fixed_us": float(f"{decode.fixed_us:.5g}"),
        "fixed_source": "fitted by simulating the runs at low and high rate under fixed plans",
        "validation": "P95 of TTFT at seven rates of crossover.csv that the fit has not seen; mean of two repeats",
        "errors": {},
        "device_run": copying,
        "tables": {
            "tokens": [int(count) for count in axis],
            "linear_us": linear,
            "token_us": _short(token_us * axis),
            "sequences": [1, 256],
            "head_us": [float(f"{head_us:.5g}")] * 2,
            "prefill_attention": product_table(["tokens", "context"], (1, 32_768), (1, 8_192), attention_us),
            "decode_attention": product_table(["batch", "context"], (1, 64), (1, 8_192), kv_us),
        },
    }


SMALL: Floats = np.array([1.0, 32.0, 64.0, 128.0, 256.0, 512.0])
"""Token counts below the smallest measured prefill."""
NOTES = (
    "Prefill times are measured for prompts of 1,024 tokens, complete ones in a batch. Attention of prompts cannot be "
    "separated from the linear part there: it is priced at half of the data-sheet speed",
    "Decode was not measured by batch size. Weights at 16 bits are priced at 85 % of the data-sheet bandwidth; the "
    "overhead of an iteration, a layer at 4 bits and the speed of reading KV are fitted on four pairs of runs",
    "Repeats of one run differ by up to 20 % in decode and by more in TTFT, so nothing here is better than that",
)


def _short(values: Floats) -> list[float]:
    return [float(f"{value:.5g}") for value in values]


def product_table(axes: Sequence[str], rows: tuple[int, int], columns: tuple[int, int], us: float) -> dict[str, Any]:
    """Return a table of ``us`` times both axes, which two points on each describe exactly."""
    values = [[float(f"{us * row * column:.5g}") for column in columns] for row in rows]
    return {axes[0]: list(rows), axes[1]: list(columns), "us": values}


def copy_speed_of(runs: Runs) -> dict[str, Any]:
    """Return the speed of blocking weight copies: seconds of each layer and bytes per second, by least squares."""
    model, rows = load_model(MODEL), runs.switches
    bits = np.where(rows["direction"] == "fp16_to_w4", 4, 16)
    moved = np.array([LOW_LAYERS * layer_weight_bytes(model, int(b)) for b in bits], dtype=np.float64)
    total_s = rows["total_ms"].to_numpy(np.float64) / 1e3
    solution = np.linalg.lstsq(np.column_stack([np.full(len(rows), LOW_LAYERS), moved]), total_s, rcond=None)[0]
    return {
        "host_to_device_bytes_per_s": float(f"{1 / solution[1]:.4g}"),
        "copy_slowdown": 0.0,
        "copy_layer_s": float(f"{solution[0]:.4g}"),
        "switches": len(rows),
        "largest_relative_error": float(
            f"{np.abs((solution[0] * LOW_LAYERS + moved * solution[1]) / total_s - 1).max():.3g}"
        ),
    }


# -- simulation --------------------------------------------------------------------------------------------------------


def server(latency: LatencyModel) -> ServerSpec:
    """Return the server of the runs."""
    return ServerSpec(
        model=load_model(MODEL),
        gpu=build_option("gpu", GPU),
        config=engine_config(),
        workspace_bytes=0,
        latency=latency,
    )


def served(latency: LatencyModel, trace: Trace, mode: str) -> SimEngine:
    """Return an engine that has served a trace under a fixed plan, with the KV blocks that its run had."""
    spec = server(latency)
    plan = plan_of(spec.model, mode)
    engine = spec.build_engine(plan, budget_for_kv_blocks(spec.model, plan, KV_BLOCKS[mode], 0, 16))
    engine.submit_trace(trace)
    engine.run_until(float("inf"))
    return engine


def figures_of(engine: SimEngine) -> dict[str, float]:
    """Return the figures of a run as the measured tables have them."""
    records, iterations = engine.records(), engine.iterations()
    ttft_s = records.ttft_s
    return {
        "duration_s": float(np.nanmax(records.finish_s) - records.arrival_s[0]),
        "ttft_over_2s": int((ttft_s > 2.0).sum()),
        "preemptions": int(records.preemptions.sum()),
        "ttft_mean_s": float(ttft_s.mean()),
        "ttft_p50_s": float(np.quantile(ttft_s, 0.5)),
        "ttft_p95_s": float(np.quantile(ttft_s, 0.95)),
        "tpot_mean_s": float(records.tpot_s.mean()),
        "tpot_p50_s": float(np.quantile(records.tpot_s, 0.5)),
        "tpot_p95_s": float(np.quantile(records.tpot_s, 0.95)),
        "forwards": len(iterations),
        "forward_mean_s": float((iterations.end_s - iterations.start_s).mean()),
    }


FITTED_FIGURES = ("tpot_mean_s", "tpot_p50_s", "forward_mean_s")


def fit(runs: Runs) -> Decode:
    """Fit the three numbers of decode on the fixed plans at low and high rate; a robust loss, for repeats differ."""
    traces = {name: runs.trace(name) for name in ("low", "high")}
    prior = np.log(dataclasses.astuple(PRIOR))

    def residuals(logs: Floats) -> Floats:
        latency = calibration_from_dict(content_of(runs, Decode(*np.exp(logs))))
        found: list[float] = []
        for (workload, mode), repeats in runs.fixed.groupby(["workload", "mode"]):
            simulated = figures_of(served(latency, traces[str(workload)], str(mode)))
            for name in FITTED_FIGURES:
                found.extend(np.log(simulated[name] / repeats[name].to_numpy(np.float64)) / 0.05)
        return np.array([*found, *((logs - prior) / PRIOR_SCALES)])

    bounds = (prior - np.log(4.0), prior + np.log([4.0, 4.0, 1.2]))
    best = least_squares(residuals, prior, loss="soft_l1", diff_step=[0.02] * 3, bounds=bounds, max_nfev=30)
    return Decode(*np.exp(best.x))


FITTED_SCALES = (5.75, 4.25)
"""Rates of crossover.csv whose requests are those of ``low`` and ``high``: the fit has seen them."""


def crossover(runs: Runs, latency: LatencyModel) -> list[dict[str, Any]]:
    """Return one row for each rate of crossover.csv: P95 of TTFT of both modes, measured repeats and simulated."""
    found = []
    for scale, rows in sorted(runs.crossover.groupby("scale"), reverse=True):
        row: dict[str, Any] = {"rate_rps": float(rows["req_per_s"].iloc[0]), "seen": float(str(scale)) in FITTED_SCALES}
        for mode in KV_BLOCKS:
            row[mode] = figures_of(served(latency, runs.trace_at(float(str(scale))), mode))["ttft_p95_s"]
            row[f"{mode}_real"] = sorted(rows[rows["mode"] == mode]["ttft_p95_s"].tolist())
        found.append(row)
    return found


def crossing_rps(rates: Sequence[float], fp16: Sequence[float], w4: Sequence[float]) -> float | None:
    """Return the rate at which the P95 of TTFT of FP16 rises above that of W4, interpolated; None if it never does."""
    gaps = np.log(np.asarray(fp16) / np.asarray(w4))
    for at in range(1, len(gaps)):
        if gaps[at - 1] <= 0 < gaps[at]:
            share = -gaps[at - 1] / (gaps[at] - gaps[at - 1])
            return float(rates[at - 1] + share * (rates[at] - rates[at - 1]))
    return None


def calibrated(folder: Path) -> dict[str, Any]:
    """Fit the calibration on ``morphserve_rtx3090`` in a folder of measurements; return its content with its errors."""
    runs = Runs.read(folder / "morphserve_rtx3090")
    content = content_of(runs, fit(runs))
    rows = [row for row in crossover(runs, calibration_from_dict(content)) if not row["seen"]]
    for mode in KV_BLOCKS:
        errors = [abs(row[mode] / np.mean(row[f"{mode}_real"]) - 1) for row in rows]
        content["errors"][f"ttft_p95_{mode}"] = {
            "median": float(f"{np.median(errors):.3g}"),
            "p95": float(f"{np.quantile(errors, 0.95):.3g}"),
            "points": len(errors),
            "note": "near the rate at which KV runs short, one request more or less that waits decides P95 of 64",
        }
    return content
