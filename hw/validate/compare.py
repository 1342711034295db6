"""Compares a simulated run with real runs of the same requests: an error, the noise and a verdict for each figure.

Runs are folders of sim.replay and hw.replay (or hw.client). Several real runs of one configuration measure the noise of
the hardware. No simulator can be closer than that, so an error above its tolerance but below the noise is reported as
"within noise" and is no miss. Preemptions and plan changes are compared in number and in time; running requests,
waiting requests, KV use and resident weights are compared over time. Both need a simulation with iterations=true.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.table import Table
from scipy.stats import kendalltau
from yaml import YAMLError

from hw.validate.machines import speed_factor
from hw.validate.timeline import (
    POINTS,
    TIMELINES,
    Logs,
    compare_events,
    compare_timelines,
    event_verdicts,
    preemption_times_s,
    timeline,
)
from sim.cost.front_end import FrontEnd
from sim.errors import ConfigError
from sim.json_file import read_json_object
from sim.results.plots import COLORS, figure_file

FIXED_TOLERANCE = {"mean": 0.05, "p50": 0.10, "p95": 0.10}
CHANGING_TOLERANCE = dict.fromkeys(FIXED_TOLERANCE, 0.12)
"""Largest relative error by statistic, with one plan and with plans that change; P99 is shown and not judged.

The tolerance of the mean also holds for the number of preemptions and plan changes, and for their times as a share of
the run.
"""
LATENCIES = ("ttft_s", "tpot_s", "e2e_s")
RATES = ("makespan_s", "output_tokens_per_s")
COUNTS = ("preemptions", "transitions", "finished", "rejected", "unfinished")
MOST_PROMPT_DIFFERENCE = 0.10
"""Largest share by which the prompt tokens that a server counts for hw.client may differ from those of the trace."""


@dataclass(frozen=True, slots=True)
class Run:
    """One run folder."""

    folder: Path
    logs: Logs
    summary: Mapping[str, Any]
    hardware: Mapping[str, Any] | None
    config: Mapping[str, Any] = field(default_factory=dict)
    command: str = ""

    @property
    def side(self) -> Literal["simulated", "real"] | None:
        """Which engine ran, by the command of the run and the files that only real runs write; None if unknown."""
        module = self.command.removeprefix("python -m ").split(" ")[0]
        if (self.folder / "client.json").is_file() or module.startswith("hw."):
            return "real"
        if module.startswith("sim.") or self.hardware is None:
            return "simulated"
        return "real" if "device" in self.hardware else None

    @property
    def records(self) -> pd.DataFrame:
        """One row per request."""
        return self.logs.records

    @property
    def transitions(self) -> pd.DataFrame:
        """One row per plan change."""
        return self.logs.transitions


def read_run(folder: Path) -> Run:
    """Read a run folder.

    Raises:
        ConfigError: when it lacks a file, naming it.
    """
    for name in ("records.parquet", "transitions.parquet", "summary.json"):
        if not (folder / name).is_file():
            raise ConfigError(f"{folder} has no {name}; give run folders of sim.replay, hw.replay or hw.client")

    def table(name: str, columns: Sequence[str] = ()) -> pd.DataFrame:
        try:
            frame = pd.read_parquet(folder / name)
        except Exception as error:  # pyarrow raises errors of many types for a file that it cannot read
            raise ConfigError(f"{folder / name} is no Parquet file; run the command of that folder again") from error
        if missing := [column for column in columns if column not in frame]:
            raise ConfigError(f"{folder / name} lacks the column {missing[0]}; run the command of that folder again")
        return frame

    def content(name: str) -> dict[str, Any] | None:
        path = folder / name
        return read_json_object(path, ConfigError, "run the command of that folder again") if path.is_file() else None

    def optional(name: str, columns: Sequence[str]) -> pd.DataFrame | None:
        return table(name, columns) if (folder / name).is_file() else None

    summary = content("summary.json") or {}
    if missing := [name for name in (*LATENCIES, *RATES, *COUNTS) if name not in summary]:
        raise ConfigError(f"{folder / 'summary.json'} lacks {missing[0]}; run the command of that folder again")
    return Run(
        folder,
        Logs(
            table("records.parquet", RECORD_COLUMNS),
            table("transitions.parquet", ("time_s",)),
            optional("iterations.parquet", ("start_s", "end_s", "prefill_tokens", "decode_requests")),
            optional("kept_share.parquet", ("time_s", "kept_share")),
            sees_engine=not (folder / "client.json").is_file(),
        ),
        summary,
        content("hardware.json"),
        _config(folder),
        str((content("provenance.json") or {}).get("command", "")),
    )


RECORD_COLUMNS = ("arrival_s", "prompt_tokens", "output_tokens", "admitted_s", "finish_s", *LATENCIES)


def _config(folder: Path) -> dict[str, Any]:
    """Return the configuration of a run; empty if the folder has none that can be read."""
    try:
        found = OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"), resolve=True)
    except (OSError, YAMLError, OmegaConfBaseException, RecursionError, UnicodeDecodeError):
        return {}
    return {str(key): value for key, value in found.items()} if isinstance(found, dict) else {}


def check_sides(simulated: Run, real: Sequence[Run]) -> None:
    """Check that the first run is simulated and the others are real.

    Raises:
        ConfigError: for swapped folders, two simulated or two real ones, or one folder given twice.
    """
    folders = [run.folder.resolve() for run in (simulated, *real)]
    if len(set(folders)) < len(folders):
        raise ConfigError("a folder is listed twice; give one simulated run and one or more real ones")
    advice = "the order is: python -m hw.compare RUN_SIM RUN_HW [RUN_HW ...]"
    if simulated.side == "real":
        raise ConfigError(f"{simulated.folder} is a run of the real model, but the first must be simulated; {advice}")
    for run in real:
        if run.side == "simulated":
            raise ConfigError(f"{run.folder} is a simulated run, but all after the first must be real; {advice}")


def as_seen(simulated: Run, real: Sequence[Run]) -> Run:
    """Return a simulated run with the latencies that the real side measured: those of clients, if hw.client did.

    Clients also wait for the front end. The arrivals of its records are then those at the client, as hw.client records
    them, in their order.

    Raises:
        ConfigError: if a run with a front end is compared with clients and engines at once.
    """
    front = _front_end(simulated)
    by_client = [not run.logs.sees_engine for run in real]
    if front.absent or not any(by_client):
        return simulated
    if not all(by_client):
        raise ConfigError(
            f"{simulated.folder} has a front end, and only some of the real runs are of hw.client, which measures it "
            "too; compare runs of hw.client and of hw.replay one after the other"
        )
    summary, records = dict(simulated.summary), simulated.records.copy()
    for name in ("ttft_s", "e2e_s"):
        if f"client_{name}" not in summary or f"client_{name}" not in records:
            raise ConfigError(f"{simulated.folder} has no client_{name}; run sim.replay again, with its frontend=")
        summary[name], records[name] = summary[f"client_{name}"], records[f"client_{name}"]
    records["arrival_s"] -= front.way_in_s(records["prompt_tokens"].to_numpy(dtype=np.int64))
    records["finish_s"] += front.back_s
    records = records.sort_values("arrival_s", kind="stable", ignore_index=True)
    return replace(simulated, summary=summary, logs=replace(simulated.logs, records=records))


def _front_end(run: Run) -> FrontEnd:
    """Return the front end of a run's configuration; none if it states none.

    Raises:
        ConfigError: if it states something else than seconds.
    """
    stated = run.config.get("frontend")
    names = [one.name for one in fields(FrontEnd)]
    values = {name: stated.get(name, 0.0) for name in names} if isinstance(stated, dict) else {}
    try:
        return FrontEnd(**{name: float(value) for name, value in values.items()})
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{run.folder / 'config.yaml'}: frontend is {stated!r:.80}; it must hold seconds") from error


def differing_settings(simulated: Run, real: Sequence[Run]) -> list[str]:
    """Return the parts of the configuration in which a real run differs from the simulated one, each as a phrase."""
    found = []
    for run in real:
        for key in ("model", "engine", "budget", "policy", "tick_s", "workspace_bytes"):
            ours, theirs = simulated.config.get(key), run.config.get(key)
            if simulated.config and run.config and ours != theirs and f"{key} differs" not in found:
                found.append(f"{key} differs")
    return found


def compare(simulated: Run, real: Sequence[Run]) -> dict[str, Any]:
    """Return each figure of both sides, its relative error, the noise of the real side, and a verdict.

    Raises:
        ConfigError: when the runs did not serve the same requests.
    """
    for run in real:
        _check_same_requests(simulated, run)
    changing = bool(max(len(simulated.transitions), *(len(run.transitions) for run in real)))
    tolerances = CHANGING_TOLERANCE if changing else FIXED_TOLERANCE
    figures: dict[str, dict[str, Any]] = {}
    for metric in LATENCIES:
        for statistic in ("mean", "p50", "p95", "p99"):
            values = [run.summary[metric][statistic] for run in real]
            tolerance = tolerances.get(statistic)
            figures[f"{metric}.{statistic}"] = judged_figure(simulated.summary[metric][statistic], values, tolerance)
    for metric in RATES:
        values = [run.summary[metric] for run in real]
        figures[metric] = judged_figure(simulated.summary[metric], values, tolerances["mean"])
    counts = {
        name: {"simulated": simulated.summary[name], "real": [run.summary[name] for run in real]} for name in COUNTS
    }
    memory = _memory(real)
    logs = [run.logs for run in real]
    result = {
        "simulated": str(simulated.folder),
        "real": [str(run.folder) for run in real],
        "requests": len(simulated.records),
        "plans_change": changing,
        "figures": figures,
        "counts": counts,
        "events": compare_events(simulated.logs, logs, tolerances["mean"]),
        "timelines": compare_timelines(simulated.logs, logs),
        "memory": memory,
        "requests_one_by_one": _one_by_one(simulated, real),
        "speed_factor": speed_factor(simulated.logs, logs),
        "different_settings": differing_settings(simulated, real),
    }
    held = "missed" not in verdicts(result).values() and memory.get("exact") is not False
    return result | {"held": held}


def verdicts(result: Mapping[str, Any]) -> dict[str, str]:
    """Return the verdicts of a comparison by the name of the figure, without figures that have none."""
    figures = {name: figure["verdict"] for name, figure in result["figures"].items()}
    every = figures | event_verdicts(result.get("events", {}))  # older comparisons have no events
    return {name: verdict for name, verdict in every.items() if verdict is not None}


def _check_same_requests(simulated: Run, real: Run) -> None:
    ours, theirs = simulated.records, real.records
    advice = "run both with the same trace, workload and seed"
    if len(ours) != len(theirs):
        raise ConfigError(
            f"the runs did not serve the same requests: {simulated.folder} has {len(ours)}, {real.folder} "
            f"{len(theirs)}; {advice}"
        )
    # hw.client records the prompt tokens that the server counted, which may be a few more, as those of a chat template.
    exact = {"arrival_s": 1e-6, "output_tokens": 0.0} | ({"prompt_tokens": 0.0} if real.logs.sees_engine else {})
    for column, near in exact.items():
        a, b = (frame[column].to_numpy(dtype=np.float64) for frame in (ours, theirs))
        if len(off := np.flatnonzero(~(np.abs(a - b) <= near + 1e-9 * np.abs(b)))):
            raise ConfigError(
                f"the runs are not the same: {column} of request {off[0]} is {a[off[0]]:g} in {simulated.folder} and "
                f"{b[off[0]]:g} in {real.folder}; {advice}"
            )
    planned, counted = int(ours["prompt_tokens"].sum()), int(theirs["prompt_tokens"].sum())
    if abs(counted - planned) > MOST_PROMPT_DIFFERENCE * planned:
        raise ConfigError(
            f"the server of {real.folder} counted {counted:,} prompt tokens, and {simulated.folder} simulated "
            f"{planned:,}; set client.characters_per_token so that the prompts have the lengths of the trace"
        )


def judged_figure(simulated: float | None, real: Sequence[float | None], tolerance: float | None) -> dict[str, Any]:
    """Return one figure: both sides, error against the real median, largest distance of a repeat from it, verdict."""
    known = [value for value in real if value is not None]
    if simulated is None or not known:
        judged = tolerance is not None and (simulated is not None or bool(known))
        verdict = "missed" if judged else None  # one side has the figure, the other has not
        return {"simulated": simulated, "real": None, "error": None, "noise": None, "verdict": verdict}
    middle = float(np.median(known))
    error = simulated / middle - 1 if middle else (0.0 if simulated == 0 else math.inf)
    noise = max(abs(value / middle - 1) for value in known) if len(known) > 1 and middle else None
    verdict = None
    if tolerance is not None:
        verdict = "held" if abs(error) <= tolerance else "within noise" if abs(error) <= (noise or 0.0) else "missed"
    return {
        "simulated": simulated,
        "real": middle,
        "error": error if math.isfinite(error) else None,
        "noise": noise,
        "tolerance": tolerance,
        "verdict": verdict,
    }


def _memory(real: Sequence[Run]) -> dict[str, Any]:
    """Return the peak bytes that the memory model predicted for the real runs, and those that were allocated."""
    known = [run.hardware for run in real if run.hardware is not None and "peak_allocated_bytes" in run.hardware]
    if not known:
        return {}
    return {
        "peak_predicted_bytes": max(one["peak_predicted_bytes"] for one in known),
        "peak_allocated_bytes": max(one["peak_allocated_bytes"] for one in known),
        "exact": all(one["largest_difference_bytes"] == 0 for one in known),
    }


def _one_by_one(simulated: Run, real: Sequence[Run]) -> dict[str, Any]:
    """Return the median error over requests of each latency, and the lowest Kendall tau of the order of admission."""
    found: dict[str, Any] = {}
    for metric in LATENCIES:
        errors = [np.abs(simulated.records[metric] / run.records[metric] - 1) for run in real]
        finite = np.concatenate([e.to_numpy(dtype=np.float64)[np.isfinite(e)] for e in errors])
        found[f"{metric}_median_error"] = float(np.median(finite)) if len(finite) else None
    taus = [_order_tau(simulated.records["admitted_s"], run.records["admitted_s"]) for run in real]
    found["admission_order_tau"] = min((tau for tau in taus if tau is not None), default=None)
    return found


def _order_tau(ours: pd.Series[float], theirs: pd.Series[float]) -> float | None:
    both = np.isfinite(ours) & np.isfinite(theirs)
    if both.sum() < 2:
        return None
    # Requests admitted at the same time count in the order of the trace, so a tie is no disorder.
    ranks = [series[both].rank(method="first") for series in (ours, theirs)]
    return float(kendalltau(*ranks).statistic)


# --- Output ----------------------------------------------------------------------------------------------------------


def print_comparison(result: Mapping[str, Any], console: Console) -> None:
    """Print the verdicts."""
    table = Table(title=f"{result['requests']} requests, {'changing plans' if result['plans_change'] else 'one plan'}")
    table.add_column("figure")
    for heading in ("simulated", "real", "error", "noise", "tolerance"):
        table.add_column(heading, justify="right")
    table.add_column("verdict")
    for name, figure in result["figures"].items():
        table.add_row(
            name,
            *(f"{figure[side]:.4g}" if figure[side] is not None else "-" for side in ("simulated", "real")),
            *(percent(figure.get(key)) for key in ("error", "noise", "tolerance")),
            figure["verdict"] or "-",
        )
    console.print(table)
    for name, pair in result["counts"].items():
        console.print(f"{name}: simulated {pair['simulated']}, real {pair['real']}", highlight=False)
    for name, event in result["events"].items():
        times = "no times: a side has no iterations.parquet (iterations=true writes it)"
        if event["times_s"] is not None:
            times = "none on both sides to compare in time"
        if event["time_error_s"] is not None:
            times = (
                f"{event['paired']} on both sides, {event['time_error_s']:.3g} s difference on average (noise "
                f"{seconds(event['time_noise_s'])}, tolerance {seconds(event['time_tolerance_s'])}): "
                f"{event['time_verdict']}"
            )
        console.print(f"{name}: number {event['verdict']}; {times}", highlight=False)
        if ready_s := event.get("ready_after_s"):
            console.print(
                f"from decision to all of a plan running: simulated {seconds(ready_s['simulated'])}, real "
                f"{', '.join(map(seconds, ready_s['real']))}",
                highlight=False,
            )
    if not result["events"]:
        console.print("preemptions and plan changes: not compared, a client sees none", highlight=False)
    for name, line in result["timelines"].items():
        if line is not None:
            console.print(
                f"{name} over time: simulated {line['simulated']:.3g}, real {np.median(line['real']):.3g}, off by "
                f"{line['difference']:.3g} on average (noise {number(line['noise'])})",
                highlight=False,
            )
    if result["memory"]:
        console.print(
            f"weights and KV: predicted {result['memory']['peak_predicted_bytes']:,} bytes, allocated "
            f"{result['memory']['peak_allocated_bytes']:,} at the peak; equal in every iteration: "
            f"{result['memory']['exact']}",
            highlight=False,
        )
    console.print(f"request by request: {_in_words(result['requests_one_by_one'])}", highlight=False, soft_wrap=True)
    if different := result.get("different_settings"):
        console.print(f"note: the configurations are not the same: {', '.join(different)}", highlight=False)
    if note := result.get("machine_note"):
        console.print(f"note: {note}", highlight=False, markup=False, soft_wrap=True)
    console.print("every verdict held" if result["held"] else "not every verdict held")


def _in_words(one_by_one: Mapping[str, Any]) -> str:
    """Return the figures on single requests as a phrase."""
    errors = [f"{metric[:-2].upper()} {percent(one_by_one[f'{metric}_median_error'])}" for metric in LATENCIES]
    tau = number(one_by_one["admission_order_tau"])
    return f"median error of {', '.join(errors)}; order of admission: Kendall's tau {tau}"


def percent(value: float | None) -> str:
    """Return a share as a percentage."""
    return "-" if value is None else f"{100 * value:.1f} %"


def number(value: float | None) -> str:
    """Return a number with three digits."""
    return "-" if value is None else f"{value:.3g}"


def seconds(value: float | None) -> str:
    """Return seconds with three digits."""
    return "-" if value is None else f"{value:.3g} s"


PANELS = {
    "ttft_s": "TTFT [s]",
    "tpot_s": "TPOT [s]",
    "e2e_s": "arrival to last token [s]",
    "running": "running requests",
    "waiting": "waiting requests",
    "kv_used_share": "KV blocks held [%]",
    "kept_share": "weights in memory [%]",
}
"""Column or timeline: its axis label."""


def plot(path: Path, simulated: Run, real: Sequence[Run]) -> None:
    """Write one PNG: the distributions of latencies of both sides, and what happened over time."""
    sides = [("real", run, COLORS[0], ":") for run in real] + [("simulated", simulated, COLORS[1], "-")]
    at_s = (np.arange(POINTS) + 0.5) * max(run.logs.end_s for _, run, _, _ in sides) / POINTS
    with figure_file(path, 4, 2, size=(13, 13), title="simulated and real run") as (figure, axes):
        for label, run, color, style in sides:
            for axis, metric in zip(axes[:, 0], LATENCIES, strict=False):
                values = np.sort(run.records[metric].dropna())
                if len(values):
                    axis.step(values, 100 * np.arange(1, len(values) + 1) / len(values), style, color=color)
                axis.set(xlabel=PANELS[metric], ylabel="requests up to it [%]", ylim=(0, 105))
            axes[3][0].plot(run.records["arrival_s"], run.records["ttft_s"], ".", markersize=4, color=color)
            for axis, name in zip(axes[:, 1], TIMELINES, strict=True):
                line = timeline(run.logs, name, at_s)
                if line is not None:
                    factor = 100 if PANELS[name].endswith("[%]") else 1
                    axis.plot(at_s, factor * line, style, color=color, linewidth=1.0)
                for time_s in run.transitions["time_s"]:
                    axis.axvline(time_s, color=color, linestyle=style, linewidth=0.8, alpha=0.8)
                axis.set(xlabel="time [s]", ylabel=PANELS[name])
            _mark_preemptions(axes[0][1], run, color, 1.0 if label == "simulated" else 0.96)
        axes[3][0].set(xlabel="arrival [s]", ylabel=PANELS["ttft_s"])
        figure.legend(handles=_legend(), loc="outside lower center", ncols=4)


def _mark_preemptions(axis: Any, run: Run, color: str, height: float) -> None:
    """Mark preemptions on the upper edge of a panel; ``height`` is a share of the panel's."""
    preempted_s = preemption_times_s(run.logs)
    if preempted_s is not None and len(preempted_s):
        heights = [height] * len(preempted_s)
        axis.plot(preempted_s, heights, "x", color=color, transform=axis.get_xaxis_transform())


def _legend() -> list[Any]:
    """Return what the legend below all panels explains; the lines are not part of any panel."""
    from matplotlib.lines import Line2D

    return [
        Line2D([], [], color=COLORS[0], linestyle=":", label="real"),
        Line2D([], [], color=COLORS[1], label="simulated"),
        Line2D([], [], color="black", marker="|", markersize=12, linestyle="", label="decision to change the plan"),
        Line2D([], [], color="black", marker="x", linestyle="", label="preemption"),
    ]
