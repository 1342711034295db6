"""How fast the machine is during a suite of runs, relative to its calibration.

A shared machine runs the same pass faster or slower than when it was calibrated. Between the runs of a suite, or before
each of its parts, the engine therefore serves reference requests that count for no verdict. Their measured time over
their predicted time is one factor, the **slowdown**, by which all prices of the suite's simulations are multiplied.

A machine is not slower at everything alike. Neighbors that use memory slow the passes that read all weights for a few
tokens; a processor at a lower clock slows prompts. A product with 4-bit weights unpacks them, one with 16-bit weights
mostly waits for memory. So the reference runs also give a memory-bound and a compute-bound factor
(sim/cost/bounds.py), relative to the slowdown, and such a pair for the blocks of each lower precision at which
reference requests are served (``precisions``). With them, the predicted seconds of the passes with prompts and of those
without are the measured ones, at each precision.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import least_squares

from hw.calibrate.calibration import with_factors
from hw.calibrate.engine_runs import CPU_LOAD, Iterations, Load, run_engine
from hw.elastic.model import ElasticModel
from hw.engine.iteration_log import Shape
from sim.cost.bounds import Factors
from sim.cost.latency import LatencyModel, calibration_from_dict
from sim.cost.model_spec import ModelSpec
from sim.cost.plan import dense_plan
from sim.errors import ConfigError
from sim.results.run_folder import write_json
from sim.types import Floats

RUNS_BETWEEN = 6
SERVED_S = 8.0
FIRST_SEED = 1000  # calibrations use smaller ones
FILE = "machine_speed.json"
MOST_RELATIVE = 10.0
"""A factor over the slowdown, or its inverse; a larger one would come from reference runs that hardly computed."""
ALL = "all"
"""In files: the factors of everything but blocks with factors of their own."""
PULL = 1e-3
"""Weight of the wish that a factor equals the slowdown; it decides where no pass says anything."""


class MachineSpeed:
    """The reference runs of one suite, kept in a file in its folder."""

    def __init__(self, folder: Path) -> None:
        """Read the reference runs that the folder holds."""
        self._path = folder / FILE
        self.references: list[dict[str, Any]] = []
        if self._path.is_file():
            self.references = json.loads(self._path.read_text(encoding="utf-8"))

    def measure(
        self,
        elastic: ElasticModel,
        clock: str,
        latency: LatencyModel,
        load: Load = CPU_LOAD,
        precisions: Sequence[int] = (),
        seconds: float = SERVED_S,
    ) -> None:
        """Serve one reference run with all blocks: about ten seconds of computing for SmolLM2 on a CPU.

        seconds: of arrivals, or more if it takes longer until a few requests have arrived.
        precisions: bits of the weights, which the runs take in turn; none: those of the checkpoint.
        """
        number, bits = len(self.references), None
        if precisions:
            number, at = divmod(number, len(precisions))
            bits = precisions[at]
        rate_rps = load.rates_rps[number % len(load.rates_rps)]
        run = run_engine(elastic, clock, FIRST_SEED + number, load, rate_rps, seconds, bits)
        entry: dict[str, Any] = {
            "bits": 16 if bits is None else bits,
            "iterations": len(run.shapes),
            "measured_s": float(run.measured_s.sum()),
            "priced_s": float(run.priced_s(latency).sum()),
            "passes": _passes(run),
        }
        self.references.append(entry)
        write_json(self._path, self.references)


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineFactors:
    """By how much a machine differs from its calibration.

    slowdown: of everything. factors: of what memory and arithmetic bound, beyond the slowdown. block_factors: bits of
    weights -> the same of blocks at that precision, in place of ``factors``.
    """

    slowdown: float = 1.0
    factors: Factors = field(default_factory=Factors)
    block_factors: Mapping[int, Factors] = field(default_factory=dict)

    def over(self, content: Mapping[str, Any]) -> dict[str, Any]:
        """Return a calibration's content with the factors, without the slowdown."""
        return with_factors(content, self.factors, self.block_factors)

    def pairs(self) -> dict[str, dict[str, float]]:
        """Return "all" and the bits of blocks -> memory_bound and compute_bound, for a file."""
        every = {ALL: self.factors} | {str(bits): pair for bits, pair in self.block_factors.items()}
        return {of: asdict(pair) for of, pair in every.items()}

    @classmethod
    def from_pairs(cls, slowdown: float, pairs: Mapping[str, Mapping[str, float]]) -> MachineFactors:
        """Return the factors that ``pairs`` wrote."""
        of_blocks = {int(bits): Factors(**pair) for bits, pair in pairs.items() if bits != ALL}
        return cls(slowdown=slowdown, factors=Factors(**pairs[ALL]), block_factors=of_blocks)


def machine_factors(
    references: Sequence[Mapping[str, Any]], content: Mapping[str, Any], spec: ModelSpec
) -> MachineFactors:
    """Return by how much the machine of the reference runs differs from a calibration; not at all without any run.

    Args:
        content: of the calibration that priced the reference runs. spec: the model that they served.
    Raises:
        ConfigError: for reference runs of an earlier version, without their passes.
    """
    found = MachineFactors(slowdown=factor_of(references))
    for number, bits in enumerate(_precisions(references)):
        runs = [_iterations(one, spec, bits) for one in _at(references, bits)]
        with_pair = partial(_with_pair, found, bits if number else None)
        found = with_pair(_solved(runs, content, with_pair))
    return found


def run_speeds(
    references: Sequence[Mapping[str, Any]], content: Mapping[str, Any], spec: ModelSpec, machine: MachineFactors
) -> list[float]:
    """Return the measured seconds of each reference run over those that the machine's factors predict for it.

    They say how much the machine's speed varies from run to run. Arguments as in `machine_factors`.
    """
    latency = calibration_from_dict(machine.over(content))
    runs = [_iterations(one, spec, _bits(one)) for one in references]
    return [float(run.measured_s.sum() / (machine.slowdown * run.priced_s(latency).sum())) for run in runs]


def _with_pair(found: MachineFactors, bits: int | None, pair: Factors) -> MachineFactors:
    """Return the factors with a pair for blocks at a precision; None stands for everything."""
    if bits is None:
        return replace(found, factors=pair)
    return replace(found, block_factors={**found.block_factors, bits: pair})


def _solved(
    runs: Sequence[Iterations], content: Mapping[str, Any], with_pair: Callable[[Factors], MachineFactors]
) -> Factors:
    """Return the pair with which the passes with prompts, and those without, take their measured seconds in all."""
    measured_s = np.concatenate([run.measured_s for run in runs])
    prompts = np.array([bool(shape.chunks) for run in runs for shape in run.shapes], dtype=np.bool_)
    groups = [group for group in (prompts, ~prompts) if measured_s[group].sum() > 0]

    def off(logarithms: Floats) -> Floats:
        machine = with_pair(_pair(logarithms))
        latency = calibration_from_dict(machine.over(content))
        priced_s = machine.slowdown * np.concatenate([run.priced_s(latency) for run in runs])
        errors = [math.log(priced_s[group].sum() / measured_s[group].sum()) for group in groups]
        return np.array([*errors, *(PULL * logarithms)])

    most = math.log(MOST_RELATIVE)
    return _pair(least_squares(off, (0.0, 0.0), bounds=(-most, most)).x)


def _pair(logarithms: Floats) -> Factors:
    memory_bound, compute_bound = np.exp(logarithms).tolist()
    return Factors(memory_bound=memory_bound, compute_bound=compute_bound)


def _passes(run: Iterations) -> list[dict[str, Any]]:
    """Return what a reference run measured, for its file: the seconds and the batch of each pass."""
    return [
        {
            "measured_s": float(f"{seconds:.6g}"),
            "chunks": [list(chunk) for chunk in shape.chunks],
            "decode_batch": shape.decode_batch,
            "decode_context_sum": shape.decode_context_sum,
            "sequences": shape.sequences,
        }
        for seconds, shape in zip(run.measured_s.tolist(), run.shapes, strict=True)
    ]


def _iterations(reference: Mapping[str, Any], spec: ModelSpec, bits: int) -> Iterations:
    """Return the passes of a reference run from its file."""
    if "passes" not in reference:
        raise ConfigError(
            "the reference runs of this folder are of an earlier version, which did not keep their passes; take "
            "another folder, runs=FOLDER"
        )
    plan = replace(dense_plan(spec), weight_bits=(bits,) * spec.num_layers)
    measured_s = np.array([one["measured_s"] for one in reference["passes"]])
    shapes = (
        Shape(
            plan=plan,
            chunks=tuple((tokens, before) for tokens, before in one["chunks"]),
            decode_batch=one["decode_batch"],
            decode_context_sum=one["decode_context_sum"],
            sequences=one["sequences"],
            forward_s=one["measured_s"],
        )
        for one in reference["passes"]
    )
    return Iterations(measured_s, tuple(shapes))


def factor_of(references: Sequence[Mapping[str, Any]]) -> float:
    """Return measured over predicted seconds of the reference runs at the highest precision; 1 without any."""
    dense = _at(references, max(_precisions(references), default=0))
    return _sum(dense, "measured_s") / _sum(dense, "priced_s") if dense else 1.0


def factors_by_precision(references: Sequence[Mapping[str, Any]]) -> dict[int, list[float]]:
    """Return measured over predicted seconds of every reference run, by its precision, the highest first."""
    every = _precisions(references)
    return {bits: [one["measured_s"] / one["priced_s"] for one in _at(references, bits)] for bits in every}


def without_passes(reference: Mapping[str, Any]) -> dict[str, Any]:
    """Return a reference run as results files have it; its passes stay in the folder of the suite."""
    return {key: value for key, value in reference.items() if key != "passes"}


def said_factors(pairs: Mapping[str, Mapping[str, float]]) -> str:
    """Return a sentence on the factors that a file has, which begins with a space; nothing if it has none."""
    if not pairs:
        return ""
    said = [
        f"{pair['memory_bound']:.2f} and {pair['compute_bound']:.2f}"
        + ("" if of == ALL else f" for blocks at {of} bits")
        for of, pair in pairs.items()
    ]
    return (
        " Relative to this factor, what memory bounds and what arithmetic bounds took "
        f"{', '.join(said)} times as long as calibrated."
    )


def _bits(reference: Mapping[str, Any]) -> int:
    return int(reference.get("bits", 16))


def _precisions(references: Sequence[Mapping[str, Any]]) -> list[int]:
    return sorted({_bits(one) for one in references}, reverse=True)


def _at(references: Sequence[Mapping[str, Any]], bits: int) -> list[Mapping[str, Any]]:
    return [one for one in references if _bits(one) == bits]


def _sum(references: Sequence[Mapping[str, Any]], key: str) -> float:
    return float(sum(one[key] for one in references))
