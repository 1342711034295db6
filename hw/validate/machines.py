"""Whether a real run and the calibration of its simulation are of one machine, and the factor between their speeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from hw.validate.timeline import Logs
from sim.engine.server_spec import find_calibration
from sim.errors import RapLabError

SAME_SPEED = 0.05
"""A machine whose factor differs less from 1 counts as the calibrated one."""


def speed_factor(simulated: Logs, real: Sequence[Logs]) -> float | None:
    """Return how many times as long the real iterations took as the simulated ones of the same batch; None if unknown.

    Batches count as the same with equal prompt tokens and equal decodes. Without iterations, as from a client, it is
    the median over requests of their end-to-end times.
    """
    factors = [_of_iterations(simulated.iterations, one.iterations) for one in real]
    known = [factor for factor in factors if factor is not None]
    if not known:
        ratios = [(one.records["e2e_s"] / simulated.records["e2e_s"]).to_numpy(dtype=np.float64) for one in real]
        known = [float(np.median(r[np.isfinite(r)])) for r in ratios if np.isfinite(r).any()]
    return float(np.median(known)) if known else None


def _of_iterations(ours: pd.DataFrame | None, theirs: pd.DataFrame | None) -> float | None:
    if ours is None or theirs is None:
        return None
    keys = ["prefill_tokens", "decode_requests"]
    sides = []
    for frame in (ours, theirs):
        lasted = frame.assign(seconds=frame["end_s"] - frame["start_s"])
        groups = lasted[lasted[keys].sum(axis=1) > 0].groupby(keys)["seconds"]
        sides.append(pd.DataFrame({"seconds": groups.median(), "count": groups.size()}))
    both = sides[0].merge(sides[1], left_index=True, right_index=True, suffixes=("_simulated", "_real"))
    weight = both[["count_simulated", "count_real"]].min(axis=1)
    simulated_s = float((both["seconds_simulated"] * weight).sum())
    return float((both["seconds_real"] * weight).sum()) / simulated_s if simulated_s > 0 else None


def calibration_name(config: Mapping[str, Any]) -> str | None:
    """Return the calibration of a run's configuration: its name in conf/calibration, or a path; None if unknown."""
    if config.get("latency"):
        return str(config["latency"])
    try:
        return find_calibration(str(config["model"]["name"]), str(config["gpu"]["name"]), config["gpu"].get("tp", 1))
    except (KeyError, TypeError, RapLabError):
        return None


def machine_note(
    factor: float | None, calibrated_on: str | None, ran_on: str | None, calibration: str | None, scaled: Path | None
) -> str | None:
    """Return what a reader of missed times has to know of the machine; None if it is as fast as the calibrated one.

    Args:
        factor: as ``speed_factor``.
        calibrated_on, ran_on: names of the processors, None if not stated.
        calibration: of the simulation.
        scaled: a calibration with all times multiplied by the factor, if one was written.
    """
    other = calibrated_on is not None and ran_on is not None and calibrated_on != ran_on
    if factor is None or (abs(factor - 1.0) <= SAME_SPEED and not other):
        return None
    named = f"calibration {calibration}" if calibration else "the calibration"
    source = f"measured on {calibrated_on}" if calibrated_on else "which does not state its processor"
    lines = [
        f"The real run is of another machine than the calibration, or of another speed of it: its iterations took "
        f"{factor:.2f} times as long as the simulated ones of the same batch. Prices: {named}, {source}; real run: "
        f"{ran_on or 'processor not stated'}.",
        "A calibration holds for its own machine. Measure this one, then simulate with latency=FOLDER/NAME.json:",
        "  python -m hw.calibrate source=device out=FOLDER",
    ]
    if scaled is not None:
        lines += [f"Or simulate again with all times {factor:.2f} times as long:", f"  latency={scaled}"]
    return "\n".join(lines)
