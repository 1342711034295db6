"""How fast the machine is during a suite of runs, relative to its calibration.

A shared machine runs the same pass faster or slower than when it was calibrated. Between the runs of a suite, the
engine therefore serves reference requests that count for no verdict. Their measured time over their predicted time is
one factor, by which all prices of the suite's simulations are multiplied.

A machine is not slower at everything alike: a product with 4-bit weights unpacks them, one with 16-bit weights mostly
waits for memory. Where plans change precisions, reference requests are served at each of them (``precisions``), and the
times of quantized blocks get factors of their own, ``linear_factors``.
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
LEAST_FACTOR = 0.1
"""Of a precision: a smaller one would come from reference runs that hardly computed."""


class MachineSpeed:
    """The reference runs of one suite, kept in a file in its folder."""

    def __init__(self, folder: Path) -> None:
        """Read the reference runs that the folder holds."""
        self._path = folder / FILE
        self.references: list[dict[str, float]] = []
        if self._path.is_file():
            self.references = json.loads(self._path.read_text(encoding="utf-8"))

    def measure(
        self,
        elastic: ElasticModel,
        clock: str,
        latency: LatencyModel,
        load: Load = CPU_LOAD,
        precisions: Sequence[int] = (),
    ) -> None:
        """Serve one reference run with all blocks: about ten seconds of computing for SmolLM2 on a CPU.

        precisions: bits of the weights, which the runs take in turn; none: those of the checkpoint.
        """
        number, bits = len(self.references), None
        if precisions:
            number, at = divmod(number, len(precisions))
            bits = precisions[at]
        rate_rps = load.rates_rps[number % len(load.rates_rps)]
        run = run_engine(elastic, clock, FIRST_SEED + number, load, rate_rps, SERVED_S, bits)
        priced_s = float(run.priced_s(latency).sum())
        entry = {
            "iterations": float(len(run.shapes)),
            "measured_s": float(run.measured_s.sum()),
            "priced_s": priced_s,
        }
        if bits is not None:
            twice = latency.with_linear_factors({bits: 2.0})
            entry |= {"bits": float(bits), "linear_s": float(run.priced_s(twice).sum()) - priced_s}
        self.references.append(entry)
        write_json(self._path, self.references)


def factor_of(references: Sequence[Mapping[str, float]]) -> float:
    """Return measured over predicted seconds of the reference runs at the highest precision; 1 without any."""
    dense = _at(references, max((_bits(one) for one in references), default=0))
    return _sum(dense, "measured_s") / _sum(dense, "priced_s") if dense else 1.0


def linear_factors(references: Sequence[Mapping[str, float]]) -> dict[int, float]:
    """Return, for each lower precision, by how much its blocks differ in speed from what ``factor_of`` says.

    With it, the predicted seconds of the reference runs at a precision, times ``factor_of``, are the measured ones.
    """
    slowdown, found = factor_of(references), {}
    for bits in sorted({_bits(one) for one in references}, reverse=True)[1:]:
        runs = _at(references, bits)
        rest_s, linear_s = _sum(runs, "priced_s") - _sum(runs, "linear_s"), _sum(runs, "linear_s")
        if linear_s > 0:  # a calibration may say that blocks take no time
            found[bits] = max((_sum(runs, "measured_s") / slowdown - rest_s) / linear_s, LEAST_FACTOR)
    return found


def factors_by_precision(references: Sequence[Mapping[str, float]]) -> dict[int, list[float]]:
    """Return measured over predicted seconds of every reference run, by its precision, the highest first."""
    every = sorted({_bits(one) for one in references}, reverse=True)
    return {bits: [one["measured_s"] / one["priced_s"] for one in _at(references, bits)] for bits in every}


def _bits(reference: Mapping[str, float]) -> int:
    return int(reference.get("bits", 16))


def _at(references: Sequence[Mapping[str, float]], bits: int) -> list[Mapping[str, float]]:
    return [one for one in references if _bits(one) == bits]


def _sum(references: Sequence[Mapping[str, float]], key: str) -> float:
    return sum(one[key] for one in references)
