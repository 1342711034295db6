"""The runs at hand, simulated with nothing fitted and fitted on a named part: the figures of docs/results/fidelity.

No row is tuned on what it judges: each study names the part that is fitted, and the others judge.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import least_squares

from hw.fit.errors import compared, errors, statistics, throughput
from hw.fit.fitting import GAP_SCALE, ORIGIN, PRIOR_WEIGHT, TTFT_SCALE, Case, fit_and_judge
from hw.fit.measured import MeasuredRun
from hw.fit.parameters import PRIORS, Point, point_of, server_at
from hw.fit.readers import read_run
from hw.fit.readers.columns import Naming
from hw.fit.server import Prompts, Server, as_stated, most_rate_rps, simulate
from sim.config import build_option
from sim.cost.plan import dense_plan
from sim.engine.budget import gpu_share
from sim.engine.server_spec import ServerSpec
from sim.errors import CalibrationError
from sim.paths import find_data
from sim.types import Floats

LLMSERVINGSIM = "calibration/llmservingsim_e2e/RTX4090/Llama-3.1-8B"
AIBRIX = "calibration/aibrix/naive_output_{rate}.csv"
VLLM_RUNS = "calibration/vllm_runs/llama3.1_8b_h100.csv"
PLAIN = Naming(columns={})


def described(model: str, gpu: str, *, front_end: str = "vllm", **changes: Any) -> Server:
    """Return a server by the names of its model and GPU, scheduled like vLLM V1; ``changes`` of engine settings."""
    spec = ServerSpec.from_names(model=model, gpu=gpu)
    limits = {key: changes.pop(key) for key in ("max_batch_tokens", "max_running") if key in changes}
    several = {key: changes.pop(key) for key in ("prompts", "replicas") if key in changes}
    config = replace(
        spec.config,
        hash_block_tokens=spec.config.kv_block_tokens,
        limits=replace(spec.config.limits, **limits),
        **changes,
    )
    plan = dense_plan(spec.model)
    return Server(
        spec=replace(spec, config=config, quality_nll=None),
        plan=plan,
        budget=gpu_share(spec.budget_context(plan), share=0.9),
        front_end=build_option("frontend", front_end),
        router=build_option("router", "power_of_two"),
        **several,
    )


def row(
    study: str, part: str, fitted_on: str, role: str, utilization: float | None, found: Mapping[str, Any]
) -> dict[str, Any]:
    """Return one row of the figures: a part of a study, simulated in one way.

    Args:
        fitted_on: the part that was fitted, or ``nothing``. role: of this part: judged, or fitted.
    """
    about = {"study": study, "part": part, "fitted_on": fitted_on, "role": role}
    return {**about, "utilization": utilization, "errors": found}


# --- Requests that can be matched, or whose quartiles can ------------------------------------------------------------


def rtx4090() -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return the rows of LLMServingSim's run on an RTX 4090, and its fit."""
    run = read_run(LLMSERVINGSIM, PLAIN)
    server = as_stated(described("llama3.1_8b", "rtx4090_24gb", front_end="none"), run)
    case = Case(run=run, server=server)
    fitted = fit_and_judge([case], ["memory_bound"])
    rows = []
    for way, one in (("nothing", server), ("the first two thirds", server_at(server, fitted.point))):
        done = simulate(one, run)
        most = most_rate_rps(one, run)[0]
        # All requests come within 16 % of the time that the server needs, so it serves at its maximum rate.
        real_rps = len(run) / throughput(run)["makespan_s"]
        utilization = run.rate_rps / most if most else None
        all_of = errors(run, done) | {"max_rate_rps": {"mean": compared(real_rps, most)}}
        third = errors(run, done, case.held_out)
        part = "all requests"
        rows.append(row("RTX 4090", part, way, "judged" if way == "nothing" else "fitted in part", utilization, all_of))
        rows.append(row("RTX 4090", "the last third", way, "judged", utilization, third))
    return rows, fit_content(fitted.point, fitted.ranges, [fitted.nothing, fitted.fitted])


def aibrix() -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return the rows of AIBrix's runs on eight A100, fitted on the lowest rate."""
    server = described(
        "llama3.1_8b",
        "a100_80gb",
        max_batch_tokens=8192,
        prefix_caching=True,
        prompts=Prompts(shared_tokens=1024),
        replicas=8,
    )
    runs = {rate: read_run(AIBRIX.format(rate=rate), PLAIN) for rate in ("0.5", "1.3", "2.1")}
    fitted = fit_and_judge([Case(run=runs["0.5"], server=server)], ["front_s", "memory_bound", "compute_bound"])
    rows = []
    for way, one in (("nothing", server), ("0.5/s", server_at(server, fitted.point))):
        most = most_rate_rps(one, runs["2.1"])[0]
        for rate, run in runs.items():
            role = "fitted" if way != "nothing" and rate == "0.5" else "judged"
            utilization = run.rate_rps / most if most else None
            rows.append(row("8 x A100", f"{rate}/s", way, role, utilization, errors(run, simulate(one, run))))
    return rows, fit_content(fitted.point, fitted.ranges, [fitted.nothing, fitted.fitted])


def fit_content(point: Point, ranges: Mapping[str, Sequence[float]], loss: Sequence[float]) -> dict[str, Any]:
    """Return a fit as JSON."""
    return {
        "values": dict(point.values),
        "ranges_p5_p95": {name: list(value) for name, value in ranges.items()},
        "held_out_loss": {"nothing_fitted": loss[0], "fitted": loss[1]} if loss else None,
    }


# --- Means of runs whose requests are not published ------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedMeans:
    """One run of which only figures are published. figures: latency -> statistic -> seconds."""

    part: str
    rate_rps: float
    duration_s: float
    prompt_tokens: int
    output_tokens: int
    figures: Mapping[str, Mapping[str, float]]


def read_means(path: Path) -> list[PublishedMeans]:
    """Read a table of published figures, in ms.

    Raises:
        CalibrationError: if it lacks a column or holds something else than numbers there.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return [_means_of(line) for line in csv.DictReader(file)]
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise CalibrationError(
            f"{path} cannot be read ({error!r:.100}); point RAP_LAB_DATA at a folder with it"
        ) from error


def _means_of(line: Mapping[str, str]) -> PublishedMeans:
    figures: dict[str, dict[str, float]] = {"ttft_s": {}, "itl_s": {}, "e2e_s": {}}
    for name, one in figures.items():
        for statistic in ("mean", "p90", "p99"):
            key = f"{name.removesuffix('_s')}_{statistic}_ms"
            if line.get(key):
                one[statistic] = float(line[key]) / 1e3
    # Lengths are constant, so the mean gap follows from two other means; itl is between pieces, of more than one token.
    gaps = int(line["output_tokens"]) - 1
    figures["tpot_s"] = {"mean": (figures["e2e_s"]["mean"] - figures["ttft_s"]["mean"]) / gaps}
    return PublishedMeans(
        part=f"{line['workload']}, {line['rate_rps']}/s",
        rate_rps=float(line["rate_rps"]),
        duration_s=float(line["duration_s"]),
        prompt_tokens=int(line["prompt_tokens"]),
        output_tokens=int(line["output_tokens"]),
        figures=figures,
    )


def load_of(means: PublishedMeans, seed: int = 0) -> MeasuredRun:
    """Return the described requests: exponential gaps, constant lengths; their times mean nothing."""
    random = np.random.default_rng(seed)
    count = round(means.rate_rps * means.duration_s)
    sent_s: Floats = np.cumsum(random.exponential(1.0 / means.rate_rps, size=count))
    sent_s = sent_s - sent_s[0]
    return MeasuredRun(
        arrival_s=sent_s,
        first_token_s=sent_s,
        finish_s=sent_s,
        prompt_tokens=np.full(count, means.prompt_tokens, dtype=np.int64),
        produced_tokens=np.full(count, means.output_tokens, dtype=np.int64),
        name=means.part,
        source=VLLM_RUNS,
        kind="described",
    )


def means_at(server: Server, load: MeasuredRun) -> dict[str, dict[str, float | None]]:
    """Return the figures of a simulated load: mean, P50, P90, P95 and P99 of each latency."""
    done = simulate(server, load)
    found = statistics(done)
    for name, values in (("ttft_s", done.ttft_s), ("e2e_s", done.e2e_s)):
        found[name]["p90"] = float(np.quantile(values[np.isfinite(values)], 0.9))
    return found


def fit_means(server: Server, load: MeasuredRun, means: PublishedMeans, free: Sequence[str]) -> Point:
    """Return the point that fits the means of TTFT and TPOT, with the priors and scales of other fits."""

    def rest(shifted: Floats) -> Floats:
        deviations = shifted - ORIGIN
        found = means_at(server_at(server, point_of(free, deviations)), load)
        data = [
            math.log(means.figures[name]["mean"] / (found[name]["mean"] or math.nan)) / scale
            for name, scale in (("ttft_s", TTFT_SCALE), ("tpot_s", GAP_SCALE))
        ]
        return np.concatenate([np.array(data), PRIOR_WEIGHT * deviations])

    low, high = (
        np.array([PRIORS[name].deviations(getattr(PRIORS[name], end)) for name in free]) for end in ("least", "most")
    )
    start = np.full(len(free), ORIGIN)
    found = least_squares(
        rest, start, bounds=(low + ORIGIN, high + ORIGIN), diff_step=np.full(len(free), 0.02), max_nfev=8
    )
    return point_of(free, found.x - ORIGIN)


def vllm_h100() -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return the rows of the published means on an H100, fitted on those of the first row."""
    server = described(
        "llama3.1_8b",
        "h100_80gb",
        max_running=128,
        schedules_ahead=True,
        prefix_caching=True,
        prompts=Prompts(distinct=100),
    )
    every = read_means(find_data(VLLM_RUNS))
    loads = [load_of(means) for means in every]
    point = fit_means(server, loads[0], every[0], ["front_s", "memory_bound"])
    rows = []
    for way, one in (("nothing", server), (every[0].part, server_at(server, point))):
        for means, load in zip(every, loads, strict=True):
            most = most_rate_rps(one, load)[0]
            ours = means_at(one, load)
            found = {
                name: {s: compared(real, ours[name][s]) for s, real in figures.items()}
                for name, figures in means.figures.items()
            }
            role = "fitted" if means.part == way else "judged"
            rows.append(row("H100", means.part, way, role, means.rate_rps / most if most else None, found))
    return rows, fit_content(point, {}, [])


STUDIES = {"RTX 4090": rtx4090, "H100": vllm_h100, "8 x A100": aibrix}


def every_study() -> dict[str, Any]:
    """Return the figures of every run at hand: rows, and what was fitted.

    Raises:
        RapLabError: if a run is not there.
    """
    rows, fits = [], {}
    for name, study in STUDIES.items():
        some, fits[name] = study()
        rows.extend(some)
    return {"rows": rows, "fits": fits}


# --- Targets ---------------------------------------------------------------------------------------------------------


NEAR = 0.9
"""Fitted targets hold up to this share of the maximum rate."""
TARGETS: Mapping[str, Mapping[str, tuple[float | None, float]]] = {
    # latency: statistic -> (nothing fitted, fitted)
    "ttft_s": {"mean": (0.20, 0.10), "p50": (0.20, 0.10), "p95": (0.20, 0.10), "p99": (None, 0.30)},
    "itl_s": {"mean": (0.10, 0.05), "p50": (0.10, 0.05), "p95": (0.10, 0.05), "p99": (None, 0.10)},
    "e2e_s": {"mean": (0.10, 0.05), "p50": (0.10, 0.05), "p95": (0.10, 0.05), "p99": (None, 0.10)},
    "max_rate_rps": {"mean": (0.15, 0.05)},
}
SEVERAL = "8 x A100"
SEVERAL_TARGETS: Mapping[str, Mapping[str, tuple[float | None, float]]] = {
    "ttft_s": {"p50": (0.35, 0.05)},
    "itl_s": {"p50": (0.35, 0.05)},
}
SEVERAL_PARTS = ("1.3/s",)
"""Of several servers, of which no router fits the tails, only medians at 1.3/s have targets."""


def judged(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return every figure that has a target, on parts that no fit has seen: error, target, whether it is met."""
    found = []
    for one in rows:
        fitted = one["fitted_on"] != "nothing"
        several = one["study"] == SEVERAL
        if one["role"] != "judged" or (several and one["part"] not in SEVERAL_PARTS):
            continue
        for name, statistics_ in (SEVERAL_TARGETS if several else TARGETS).items():
            if fitted and not several and name != "max_rate_rps" and (one["utilization"] or 0.0) > NEAR:
                continue
            for statistic, targets in statistics_.items():
                target = targets[1] if fitted else targets[0]
                error = one["errors"].get(name, {}).get(statistic, {}).get("error")
                if target is not None and error is not None:
                    found.append(
                        {key: one[key] for key in ("study", "part", "fitted_on")}
                        | {"figure": name, "statistic": statistic, "error": error, "target": target}
                        | {"met": abs(error) <= target}
                    )
    return found


def cell(one: Mapping[str, Any], name: str, statistic: str) -> float | None:
    """Return the error of a figure in a row; None if the row does not have it."""
    error: float | None = one["errors"].get(name, {}).get(statistic, {}).get("error")
    return error
