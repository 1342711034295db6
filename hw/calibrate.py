"""Write the latency calibrations that the simulator reads.

    python -m hw.calibrate source=measurements                          every target
    python -m hw.calibrate source=measurements target=llama2_7b_a100    one
    python -m hw.calibrate source=measurements data=FOLDER out=FOLDER   other folders

source=measurements fits published measurements (data defaults to calibration/ under RAP_LAB_DATA, or to shared/ beside
the checkout) and writes one small JSON a target to conf/calibration. Each file states the held-out error of each term.
"""

from __future__ import annotations

import datetime
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from hw import measurements as m
from sim.data import find_data
from sim.errors import CalibrationError, ConfigError, RapLabError, nearest
from sim.latency import CALIBRATIONS, SCHEMA

Floats = NDArray[np.float64]
TARGET_MEDIAN, TARGET_P95 = 0.03, 0.12
CURVE_TOLERANCE = 0.002
"""Knots of a curve that a straight line replaces within this share are left out of the file."""

VALIDATION = (
    f"{m.FOLDS}-fold, seed {m.SEED}: every measured point that is not at the edge of its table is predicted once by a "
    "fit that did not see it; relative errors. The table itself is fitted on all points"
)

LLMSERVINGSIM = {
    "repository": "casys-kaist/LLMServingSim",
    "commit": "5daddb21a545658d5150b535712d0494584b5278",
    "licence": "MIT",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """One calibration: which model on which device, from which measurements.

    read: from the folder of measurements to samples of every term.
    why: term -> the reason that its held-out error misses the target, where it does.
    """

    name: str
    model: str
    device: str
    kind: str
    stack: str
    sources: tuple[dict[str, str], ...]
    read: Callable[[Path], m.Terms]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Fixed:
    """Host overhead of one iteration in microseconds, and where it comes from."""

    us: float
    source: str


def calibrate(target: Target, folder: Path, fixed: Fixed) -> dict[str, Any]:
    """Return the content of a calibration file: the tables fitted on all samples and each term's held-out error."""
    terms = target.read(folder)
    errors: dict[str, dict[str, Any]] = {}
    tables: dict[str, Any] = {}

    tokens = _shared_knots([curve for kinds in terms.linear.values() for curve in kinds.values()] + [terms.token])
    tables["tokens"] = _plain(tokens)
    tables["linear_us"] = {}
    for bits, kinds in terms.linear.items():
        tables["linear_us"][str(bits)] = {kind: _round(m.fit_curve(curve, tokens)) for kind, curve in kinds.items()}
        for kind, curve in kinds.items():
            errors[f"{kind}_linear_{bits}"] = _curve_error(curve)
    tables["token_us"] = _round(m.fit_curve(terms.token, tokens))
    errors["token"] = _curve_error(terms.token)
    sequences = _shared_knots([terms.head])
    tables["sequences"] = _plain(sequences)
    tables["head_us"] = _round(m.fit_curve(terms.head, sequences))
    errors["head"] = _curve_error(terms.head)

    rows, columns = _knots(terms.prefill.x), _knots(terms.prefill.y, whole=False, per_octave=4.0)
    prefill = m.fit_surface(terms.prefill, rows, columns)
    tables["prefill_attention"] = {"tokens": _plain(rows), "context": _plain(columns), "us": _round(prefill)}
    errors["prefill_attention"] = _surface_error(terms.prefill, rows, columns)
    batches, contexts = _knots(terms.decode.x), _knots(terms.decode.y)
    decode = m.fit_surface(terms.decode, batches, contexts)
    tables["decode_attention"] = {"batch": _plain(batches), "context": _plain(contexts), "us": _round(decode)}
    errors["decode_attention"] = _surface_error(terms.decode, batches, contexts)

    if terms.mixed is not None:

        def prefill_us(x: Floats, y: Floats) -> Floats:
            return m.surface_at(rows, columns, prefill, x, y)

        fit = m.fit_shared(terms.mixed, prefill_us)
        tables["shared_attention"] = {
            "fit_us": _round(fit.fit_us),
            "prefill_tokens": _plain(fit.axes[0]),
            "prefix": _plain(fit.axes[1]),
            "batch": _plain(fit.batch),
            "context": _plain(fit.context),
            "us": _round(fit.decode_us),
            "residual": [float(f"{ratio:.3g}") for ratio in fit.residual.ravel()],
        }
        errors["shared_attention"] = _shared_error(terms.mixed, prefill_us)

    return {
        "schema": SCHEMA,
        "name": target.name,
        "model": target.model,
        "device": target.device,
        "kind": target.kind,
        "stack": target.stack,
        "date": datetime.date.today().isoformat(),
        "sources": list(target.sources),
        "notes": list(target.notes),
        "fixed_us": fixed.us,
        "fixed_source": fixed.source,
        "validation": VALIDATION,
        "errors": errors,
        "tables": tables,
    }


def _shared_knots(curves: Sequence[m.Curve]) -> Floats:
    """Return counts, common to all curves, that keep each within CURVE_TOLERANCE of its measured points."""
    merged = [m.merge(curve) for curve in curves]
    common = merged[0].x
    for curve in merged[1:]:
        common = np.intersect1d(common, curve.x)
    keep = {0, len(common) - 1}
    for curve in merged:
        keep |= set(m.thin(common, m.rising(curve.us[np.isin(curve.x, common)]), CURVE_TOLERANCE).tolist())
    return common[sorted(keep)]


def _knots(values: Floats, whole: bool = True, per_octave: float = 2.0) -> Floats:
    """Return knots for a table's axis: the measured values if few, else about ``per_octave`` an octave and the ends."""
    unique = np.unique(values)
    if whole and len(unique) <= 24:
        return unique
    count = max(2, round(np.log2(unique[-1] / unique[0]) * per_octave) + 1)
    wanted = np.geomspace(unique[0], unique[-1], count)
    if not whole:
        return np.unique(np.array([float(f"{value:.4g}") for value in wanted]))
    return np.unique(unique[np.abs(np.log(unique)[:, None] - np.log(wanted)[None, :]).argmin(axis=0)])


def _curve_error(curve: m.Curve) -> dict[str, Any]:
    points = m.merge(curve)
    inside = (points.x > points.x[0]) & (points.x < points.x[-1])

    def fit_and_predict(train: NDArray[np.bool_]) -> Floats:
        knots = points.x[train]
        return m.curve_at(knots, m.fit_curve(m.Curve(knots, points.us[train]), knots), points.x)

    return _summary(m.held_out(len(points.x), inside, fit_and_predict), points.us)


def _surface_error(surface: m.Surface, rows: Floats, columns: Floats) -> dict[str, Any]:
    inside = (surface.x > surface.x.min()) & (surface.x < surface.x.max())
    inside &= (surface.y > surface.y.min()) & (surface.y < surface.y.max())

    def fit_and_predict(train: NDArray[np.bool_]) -> Floats:
        known = m.Surface(surface.x[train], surface.y[train], surface.us[train])
        return m.surface_at(rows, columns, m.fit_surface(known, rows, columns), surface.x, surface.y)

    return _summary(m.held_out(len(surface.us), inside, fit_and_predict), surface.us)


def _shared_error(mixed: m.Mixed, prefill_us: Callable[[Floats, Floats], Floats]) -> dict[str, Any]:
    prefill = prefill_us(mixed.chunk, m.mean_context(mixed.chunk, mixed.prefix))

    def fit_and_predict(train: NDArray[np.bool_]) -> Floats:
        return m.shared_at(m.fit_shared(mixed[train], prefill_us), mixed, prefill)

    return _summary(m.held_out(len(mixed.us), np.ones(len(mixed.us), dtype=bool), fit_and_predict), mixed.us)


def _summary(predicted: Floats, measured: Floats) -> dict[str, Any]:
    seen = ~np.isnan(predicted)
    error = np.abs(predicted[seen] / measured[seen] - 1.0)
    return {
        "median": float(f"{np.median(error):.3g}"),
        "p95": float(f"{np.quantile(error, 0.95):.3g}"),
        "points": int(seen.sum()),
    }


def _round(values: Floats) -> list[Any]:
    """Return values to five significant digits, nested as the array is."""
    if values.ndim > 1:
        return [_round(row) for row in values]
    return [float(f"{value:.5g}") for value in values]


def _plain(values: Floats) -> list[float]:
    return [int(value) if float(value).is_integer() else float(value) for value in values]


def write(content: dict[str, Any], path: Path) -> None:
    """Write a calibration file, one table row a line, so that a diff can be read; whole or not at all."""
    lines = json.dumps(content, indent=1, ensure_ascii=False)
    text = _compact(lines)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text + "\n", encoding="utf-8")
    temporary.replace(path)


def _compact(text: str) -> str:
    """Return JSON with every list of plain numbers on one line."""
    out: list[str] = []
    numbers: list[str] | None = None
    for line in text.splitlines():
        stripped = line.strip()
        if numbers is not None:
            if stripped in ("]", "],"):
                out[-1] += ",".join(numbers) + stripped
                numbers = None
            elif stripped[0] in "-0123456789":
                numbers.append(stripped.rstrip(","))
            else:
                out.append(line)
                numbers = None
        else:
            out.append(line)
            if stripped.endswith("["):
                numbers = []
    return "\n".join(out)


def table_of(contents: Sequence[dict[str, Any]]) -> Table:
    """Return the held-out errors of calibrations as one table."""
    table = Table(title=f"Held-out error of each term (target: median < {TARGET_MEDIAN:.0%}, P95 < {TARGET_P95:.0%})")
    for column in ("calibration", "term"):
        table.add_column(column)
    for column in ("median", "P95", "points"):
        table.add_column(column, justify="right")
    table.add_column("target")
    for content in contents:
        for term, error in content["errors"].items():
            met = error["median"] < TARGET_MEDIAN and error["p95"] < TARGET_P95
            verdict = "met" if met else f"missed: {error.get('note') or 'see notes'}"
            table.add_row(
                content["name"], term, f"{error['median']:.2%}", f"{error['p95']:.1%}", str(error["points"]), verdict
            )
    return table


TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        Target(
            name="llama3.1_8b_rtx4090",
            model="llama3.1_8b",
            device="rtx4090_24gb",
            kind="measured",
            stack="vLLM 0.19, eager, bf16, FlashAttention 2",
            sources=(LLMSERVINGSIM | {"path": "profiler/perf/RTX4090/meta-llama/Llama-3.1-8B/bf16/tp1"},),
            read=lambda folder: m.read_llmservingsim(folder / "llmservingsim/RTX4090/Llama-3.1-8B/bf16/tp1"),
        ),
    )
}


def fixed_overhead(folder: Path) -> Fixed:
    """Return the host overhead of an iteration: what a real run's decode iterations took above their kernels.

    The run is LLMServingSim's reference of vLLM 0.19 with Llama-3.1-8B on an RTX 4090; only its first 60 s are used, so
    that the rest can judge the simulator.
    """
    run = "llmservingsim_e2e/RTX4090/Llama-3.1-8B"
    seconds = m.read_steady_decode(folder / run, kv_tokens=2588 * 16, block_tokens=16, before_s=60.0)
    target = TARGETS["llama3.1_8b_rtx4090"]
    terms = target.read(folder)
    kinds = terms.linear[16]
    grid = (_knots(terms.decode.x), _knots(terms.decode.y))
    decode = m.fit_surface(terms.decode, *grid)
    above = []
    for batch, context_sum, iteration_us in seconds.itertuples(index=False):
        linear = sum(float(np.interp(batch, *_points(kinds[kind]))) for kind in ("mha", "ffn"))
        attention = float(m.surface_at(*grid, decode, np.array([batch]), np.array([context_sum / batch]))[0])
        once = float(np.interp(batch, *_points(terms.head))) + float(np.interp(batch, *_points(terms.token)))
        above.append(iteration_us - once - 32 * (linear + attention))
    us = round(max(0.0, float(np.median(above))), 1)
    spread = f"{min(above):.0f} to {max(above):.0f}"
    return Fixed(
        us=us,
        source=(
            f"median over {len(above)} seconds of pure decode (first 60 s only) of measured iteration less kernels: "
            f"casys-kaist/LLMServingSim bench/examples/RTX4090/Llama-3.1-8B/vllm at {LLMSERVINGSIM['commit'][:12]}, "
            f"vLLM 0.19 with asynchronous scheduling; single seconds lie {spread} us above the kernels"
        ),
    )


def _points(curve: m.Curve) -> tuple[Floats, Floats]:
    points = m.merge(curve)
    return points.x, points.us


@dataclass(slots=True)
class Arguments:
    """What the command takes as key=value."""

    source: str = "measurements"
    target: str = "all"
    data: str = "calibration"
    out: str = str(CALIBRATIONS)


def parse(words: Sequence[str]) -> Arguments:
    """Return the arguments; an unknown key is an error that names the nearest one."""
    arguments = Arguments()
    allowed = list(Arguments.__dataclass_fields__)
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not value:
            raise ConfigError(f"argument {word!r} is not of the form key=value; {nearest(key, allowed)}")
        if key not in allowed:
            raise ConfigError(f"unknown argument {key!r}; {nearest(key, allowed)}")
        setattr(arguments, key, value)
    return arguments


def from_measurements(arguments: Arguments) -> list[dict[str, Any]]:
    """Fit and write every target asked for; return their contents."""
    folder, out = find_data(arguments.data), Path(arguments.out)
    names = list(TARGETS) if arguments.target == "all" else arguments.target.split(",")
    for name in names:
        if name not in TARGETS:
            raise ConfigError(f"no target {name!r}; {nearest(name, [*TARGETS, 'all'])}")
    if not folder.is_dir():
        raise CalibrationError(
            f"no folder of measurements at {folder}; set RAP_LAB_DATA to the folder that holds calibration/, "
            "or give data=FOLDER"
        )
    out.mkdir(parents=True, exist_ok=True)
    contents, fixed = [], fixed_overhead(folder)
    for name in names:
        content = calibrate(TARGETS[name], folder, fixed)
        write(content, out / f"{name}.json")
        contents.append(content)
    return contents


SOURCES: dict[str, Callable[[Arguments], list[dict[str, Any]]]] = {"measurements": from_measurements}


def main(words: Sequence[str]) -> int:
    """Run the command; return its exit status."""
    if any(word in ("-h", "--help") for word in words):
        print(__doc__)
        print(f"targets: {', '.join(TARGETS)}")
        return 0
    console = Console()
    try:
        arguments = parse(words)
        if arguments.source not in SOURCES:
            raise ConfigError(f"unknown source {arguments.source!r}; {nearest(arguments.source, SOURCES)}")
        contents = SOURCES[arguments.source](arguments)
    except RapLabError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    console.print(table_of(contents))
    for content in contents:
        console.print(f"wrote {Path(arguments.out) / content['name']}.json")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
