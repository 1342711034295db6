"""When things happened in a run: preemptions, plan changes, and requests, KV use and resident weights over time.

A preemption has the start time of the iteration whose batch was being formed (``iterations.parquet``). A plan change
has its own time (``transitions.parquet``), and the resident share of weights the times of its changes
(``kept_share.parquet``). Both engines write all three files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd

from sim.types import Floats

TIMELINES = ("running", "waiting", "kv_used_share", "kept_share")
POINTS = 2000
"""Number of times at which two timelines are compared."""


@dataclass(frozen=True, slots=True)
class Logs:
    """The tables of a run folder; None for a file that it lacks.

    sees_engine: whether the run records preemptions and plan changes; hw.client is outside the engine and cannot.
    """

    records: pd.DataFrame
    transitions: pd.DataFrame
    iterations: pd.DataFrame | None
    kept_share: pd.DataFrame | None
    sees_engine: bool = True

    @property
    def end_s(self) -> float:
        """When the last iteration ended; without iterations, when the last request finished."""
        ends = self.iterations["end_s"] if self.iterations is not None else self.records["finish_s"]
        return float(ends.max()) if ends.notna().any() else 0.0


def preemption_times_s(logs: Logs) -> Floats | None:
    """Return the time of each preemption, ascending; None without iterations.

    A preemption after which nothing could run belongs to no iteration and has no time.
    """
    if logs.iterations is None:
        return None
    return np.repeat(logs.iterations["start_s"].to_numpy(dtype=np.float64), logs.iterations["preemptions"])


def timeline(logs: Logs, name: str, at_s: Floats) -> Floats | None:
    """Return one of TIMELINES at ascending times; None if the run does not record it.

    running, kv_used_share: of the iteration in progress, 0 when idle. A pause shorter than the median iteration is host
        work between two passes and counts as part of the iteration before it.
    waiting: requests that have arrived and neither run nor have ended.
    kept_share: resident share of the dense weights' bytes.
    """
    if name == "kept_share":
        if logs.kept_share is None:
            return None
        return _steps(logs.kept_share["time_s"], logs.kept_share["kept_share"], at_s)
    if logs.iterations is None:
        return None
    if name == "waiting":
        running = timeline(logs, "running", at_s)
        assert running is not None
        arrived = logs.records.loc[logs.records["status"] != "rejected", "arrival_s"]
        # NaN sorts to the end: a request that never finished never leaves.
        counts = [np.searchsorted(np.sort(s), at_s, "right") for s in (arrived, logs.records["finish_s"])]
        return np.maximum(counts[0] - counts[1] - running, 0.0)
    start_s, end_s = logs.iterations["start_s"], logs.iterations["end_s"]
    next_s = start_s.shift(-1)
    lasts_s = end_s.where(~(next_s - end_s < (end_s - start_s).median()), next_s)
    idle = _steps(start_s, lasts_s, at_s) <= at_s
    return np.where(idle, 0.0, _steps(start_s, logs.iterations[name], at_s))


def _steps(times_s: pd.Series[Any], values: pd.Series[Any], at_s: Floats) -> Floats:
    """Return the value of the last step at or before every moment, 0 before the first."""
    place = np.searchsorted(times_s.to_numpy(dtype=np.float64), at_s, "right")
    return np.concatenate([[0.0], values.to_numpy(dtype=np.float64)])[place]


def compare_timelines(simulated: Logs, real: Sequence[Logs]) -> dict[str, Any]:
    """Return, for each of TIMELINES, the mean of both sides and their mean difference over time.

    difference: mean |simulated - real| over time, the median over repeats. noise: the same between the two repeats that
    differ most.
    """
    end_s = max(logs.end_s for logs in (simulated, *real))
    at_s = (np.arange(POINTS) + 0.5) * end_s / POINTS
    found: dict[str, Any] = {}
    for name in TIMELINES:
        ours, theirs = timeline(simulated, name, at_s), [timeline(logs, name, at_s) for logs in real]
        known = [values for values in theirs if values is not None]
        if ours is None or not known:
            found[name] = None
            continue
        found[name] = {
            "simulated": float(ours.mean()),
            "real": [float(values.mean()) for values in known],
            "difference": float(np.median([np.abs(ours - values).mean() for values in known])),
            "noise": max((float(np.abs(a - b).mean()) for a, b in combinations(known, 2)), default=None),
        }
    return found


# --- Preemptions and plan changes: how many, and when ----------------------------------------------------------------


def compare_events(simulated: Logs, real: Sequence[Logs], tolerance: float) -> dict[str, Any]:
    """Return number and times of preemptions and plan changes on both sides, with a verdict on each.

    The k-th preemption is compared with the k-th of the other side; a plan change with the k-th change to the same
    plan. An event without a counterpart counts in the number only.

    Args:
        simulated: one side. real: the repeats of the other.
        tolerance: largest relative error of a number, and largest mean error of a time as a share of the real run.
    Returns:
        One entry for each of the two kinds; empty if one side does not record them.
    """
    real = [logs for logs in real if logs.sees_engine]
    if not real or not simulated.sees_engine:
        return {}
    span_s = float(np.median([logs.end_s for logs in real]))
    every = (simulated, *real)
    numbers = [int(logs.records["preemptions"].sum()) for logs in every]
    changes = [_marked(logs.transitions) for logs in every]
    preemptions = [_preemptions(logs) for logs in every]
    return {
        "preemptions": _number(numbers, tolerance) | _times(preemptions, span_s, tolerance),
        "transitions": _number([len(frame) for frame in changes], tolerance)
        | _times(changes, span_s, tolerance)
        | {
            "to": {"simulated": list(changes[0]["what"]), "real": [list(frame["what"]) for frame in changes[1:]]},
            "ready_after_s": {"simulated": _ready_s(simulated), "real": [_ready_s(logs) for logs in real]},
        },
    }


def _marked(transitions: pd.DataFrame) -> pd.DataFrame:
    """Return time and target of every plan change, and its index among the changes to that target."""
    frame = pd.DataFrame({"time_s": transitions["time_s"], "what": transitions["to"].astype(str)})
    return frame.assign(nth=frame.groupby("what").cumcount())


def _preemptions(logs: Logs) -> pd.DataFrame | None:
    times_s = preemption_times_s(logs)
    if times_s is None:
        return None
    return pd.DataFrame({"time_s": times_s, "what": "preemption", "nth": np.arange(len(times_s))})


def _ready_s(logs: Logs) -> float | None:
    """Return the mean time from a decision to all of its plan running; None if no plan got there."""
    lasted = (logs.transitions["ready_s"] - logs.transitions["time_s"]).dropna()
    return float(lasted.mean()) if len(lasted) else None


def _number(numbers: Sequence[int], tolerance: float) -> dict[str, Any]:
    simulated, real = numbers[0], list(numbers[1:])
    middle = float(np.median(real))
    verdict = "missed"
    if abs(simulated - middle) <= tolerance * middle:
        verdict = "held"
    elif min(real) <= simulated <= max(real):
        verdict = "within noise"
    return {"simulated": simulated, "real": real, "tolerance": tolerance, "verdict": verdict}


def _times(frames: Sequence[pd.DataFrame | None], span_s: float, tolerance: float) -> dict[str, Any]:
    """Return the times of events on both sides, and the mean time error of those that have a counterpart."""
    simulated, real = frames[0], [frame for frame in frames[1:] if frame is not None]
    if simulated is None or not real:
        return {"times_s": None, "paired": None, "time_error_s": None, "time_noise_s": None, "time_verdict": None}
    pairs = [_errors_s(simulated, frame) for frame in real]
    means_s = [float(errors_s.mean()) for errors_s in pairs if len(errors_s)]
    between = [_errors_s(one, other) for one, other in combinations(real, 2)]
    error_s = float(np.median(means_s)) if means_s else None
    noise_s = max((float(errors_s.mean()) for errors_s in between if len(errors_s)), default=None)
    verdict = None
    if error_s is not None:
        within = error_s <= (noise_s or 0.0)
        verdict = "held" if error_s <= tolerance * span_s else "within noise" if within else "missed"
    return {
        "times_s": {"simulated": simulated["time_s"].tolist(), "real": [frame["time_s"].tolist() for frame in real]},
        "paired": [len(errors_s) for errors_s in pairs],
        "time_error_s": error_s,
        "time_noise_s": noise_s,
        "time_tolerance_s": tolerance * span_s,
        "time_verdict": verdict,
    }


def _errors_s(one: pd.DataFrame, other: pd.DataFrame) -> Floats:
    both = one.merge(other, on=["what", "nth"])
    return (both["time_s_x"] - both["time_s_y"]).abs().to_numpy(dtype=np.float64)


def event_verdicts(events: Mapping[str, Any]) -> dict[str, str | None]:
    """Return the verdicts of ``compare_events`` by name."""
    found = {}
    for name, event in events.items():
        found[f"{name}.number"], found[f"{name}.times"] = event["verdict"], event["time_verdict"]
    return found
