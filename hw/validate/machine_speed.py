"""How fast the machine is during a suite of runs, relative to its calibration.

A shared machine runs the same pass faster or slower than when it was calibrated. Between the runs of a suite, the
engine therefore serves reference requests that count for no verdict. Their measured time over their predicted time is
one factor, by which all prices of the suite's simulations are multiplied.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from hw.calibrate.engine_runs import CPU_LOAD, Load, run_engine
from hw.elastic.model import ElasticModel
from sim.cost.latency import LatencyModel
from sim.results.run_folder import write_json

RUNS_BETWEEN = 6
SERVED_S = 8.0
FIRST_SEED = 1000  # calibrations use smaller ones
FILE = "machine_speed.json"


class MachineSpeed:
    """The reference runs of one suite, kept in a file in its folder."""

    def __init__(self, folder: Path) -> None:
        """Read the reference runs that the folder holds."""
        self._path = folder / FILE
        self.references: list[dict[str, float]] = []
        if self._path.is_file():
            self.references = json.loads(self._path.read_text(encoding="utf-8"))

    def measure(self, elastic: ElasticModel, clock: str, latency: LatencyModel, load: Load = CPU_LOAD) -> None:
        """Serve one reference run on the dense model: about ten seconds of computing for SmolLM2 on a CPU."""
        number = len(self.references)
        rate_rps = load.rates_rps[number % len(load.rates_rps)]
        run = run_engine(elastic, clock, FIRST_SEED + number, load, rate_rps, SERVED_S)
        priced_s = run.priced_s(latency)
        self.references.append(
            {"iterations": len(priced_s), "measured_s": float(run.measured_s.sum()), "priced_s": float(priced_s.sum())}
        )
        write_json(self._path, self.references)


def factor_of(references: Sequence[Mapping[str, float]]) -> float:
    """Return measured seconds over predicted seconds of all reference runs; 1 without any."""
    if not references:
        return 1.0
    return sum(one["measured_s"] for one in references) / sum(one["priced_s"] for one in references)
