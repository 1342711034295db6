"""Fits a calibration: tables over all samples of each term, and each term's error on samples held out of the fit."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hw.calibrate import measurements as m
from sim.cost.bounds import Factors
from sim.cost.latency import CALIBRATIONS, SCHEMA
from sim.errors import ConfigError
from sim.json_file import read_json_object
from sim.types import Floats

TARGET_MEDIAN, TARGET_P95 = 0.03, 0.12
"""A term meets its target when its held-out relative error is below both."""
CURVE_TOLERANCE = 0.002
"""Knots of a curve that a straight line replaces within this share are left out of the file."""
FIXED_DEVICE = "rtx4090_24gb"
"""The device on which the host overhead of an iteration was measured."""

VALIDATION = (
    f"{m.FOLDS}-fold, seed {m.SEED}: every measured point that is not at the edge of its table is predicted once by a "
    "fit that did not see it; relative errors. The table itself is fitted on all points"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """One calibration: which model on which device, from which measurements.

    read: reads samples of every term from the folder of measurements. check: returns further errors to state.
    why: term -> the reason, if its held-out error misses the target. tp: GPUs among which the model is divided.
    """

    name: str
    model: str
    device: str
    kind: str
    stack: str
    sources: tuple[dict[str, str], ...]
    read: Callable[[Path], m.Terms]
    check: Callable[[Path], dict[str, Any]] | None = None
    notes: tuple[str, ...] = ()
    why: Mapping[str, str] = field(default_factory=dict)
    tp: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Fixed:
    """Host overhead of one iteration in microseconds, and its source."""

    us: float
    source: str


def calibrate(target: Target, folder: Path, fixed: Fixed) -> dict[str, Any]:
    """Return the content of a calibration file: tables fitted on all samples, and each term's held-out error."""
    terms = target.read(folder)
    tables, errors = _linear_tables(terms)
    attention, attention_errors = _attention_tables(terms)
    tables |= attention
    errors |= attention_errors
    if target.check is not None:
        errors |= target.check(folder)
    for term, error in errors.items():
        if not is_met(error):
            error["note"] = target.why.get(term, "no reason known")
    return {
        "schema": SCHEMA,
        "name": target.name,
        "model": target.model,
        "device": target.device,
        **({"tp": target.tp} if target.tp > 1 else {}),
        "kind": target.kind,
        "stack": target.stack,
        "date": datetime.date.today().isoformat(),
        "sources": list(target.sources),
        "notes": list(target.notes),
        "fixed_us": fixed.us,
        "fixed_source": fixed.source if target.device == FIXED_DEVICE else f"{fixed.source}; for this device a prior",
        "validation": VALIDATION,
        "errors": errors,
        "tables": tables,
    }


def _linear_tables(terms: m.Terms) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Return tables and errors of the terms that depend on one count: linear blocks, embedding, head."""
    tables: dict[str, Any] = {}
    errors: dict[str, dict[str, Any]] = {}
    tokens = shared_knots([curve for kinds in terms.linear.values() for curve in kinds.values()] + [terms.token])
    tables["tokens"] = plain(tokens)
    tables["linear_us"] = {}
    for bits, kinds in terms.linear.items():
        tables["linear_us"][str(bits)] = {kind: rounded(m.fit_curve(curve, tokens)) for kind, curve in kinds.items()}
        for kind, curve in kinds.items():
            errors[f"{kind}_linear_{bits}"] = _curve_error(curve)
    if terms.fp8 is not None:
        own = shared_knots(list(terms.fp8.values()))
        tables["fp8_linear"] = {"tokens": plain(own)}
        for kind, curve in terms.fp8.items():
            tables["fp8_linear"][kind] = rounded(m.fit_curve(curve, own))
            errors[f"{kind}_linear_8"] = _curve_error(curve)
    tables["token_us"] = rounded(m.fit_curve(terms.token, tokens))
    errors["token"] = _curve_error(terms.token)
    if terms.allreduce is not None:
        # Measured at powers of two, few enough to keep; a fit through fewer would move the step between two algorithms.
        us = m.rising(terms.allreduce.us)
        tables["allreduce"] = {"tokens": plain(terms.allreduce.x), "us": rounded(us)}
        errors["allreduce"] = _curve_error(terms.allreduce)
    sequences = shared_knots([terms.head])
    tables["sequences"] = plain(sequences)
    tables["head_us"] = rounded(m.fit_curve(terms.head, sequences))
    errors["head"] = _curve_error(terms.head)
    return tables, errors


def _attention_tables(terms: m.Terms) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Return tables and errors of attention: of prompts, of decodes, and of both in one kernel if that was measured."""
    tables: dict[str, Any] = {}
    errors: dict[str, dict[str, Any]] = {}
    rows, columns = knots_of(terms.prefill.x), knots_of(terms.prefill.y, measured=False, per_octave=4.0)
    prefill = m.fit_surface(terms.prefill, rows, columns)
    tables["prefill_attention"] = {"tokens": plain(rows), "context": plain(columns), "us": rounded(prefill)}
    errors["prefill_attention"] = _surface_error(terms.prefill, rows, columns)
    batches, contexts = knots_of(terms.decode.x), knots_of(terms.decode.y)
    decode = m.fit_surface(terms.decode, batches, contexts)
    tables["decode_attention"] = {"batch": plain(batches), "context": plain(contexts), "us": rounded(decode)}
    errors["decode_attention"] = _surface_error(terms.decode, batches, contexts)
    if terms.mixed is None:
        return tables, errors

    def prefill_us(x: Floats, y: Floats) -> Floats:
        return m.surface_at(rows, columns, prefill, x, y)

    fit = m.fit_shared(terms.mixed, prefill_us)
    tables["shared_attention"] = {
        "fit_us": rounded(fit.fit_us),
        "prefill_tokens": plain(fit.axes[0]),
        "prefix": plain(fit.axes[1]),
        "batch": plain(fit.batch),
        "context": plain(fit.context),
        "us": rounded(fit.decode_us),
        "residual": [float(f"{ratio:.3g}") for ratio in fit.residual.ravel()],
    }
    errors["shared_attention"] = _shared_error(terms.mixed, prefill_us)
    return tables, errors


def shared_knots(curves: Sequence[m.Curve]) -> Floats:
    """Return counts, shared by all curves, at which lines stay within CURVE_TOLERANCE of each curve's points."""
    merged = [m.merge(curve) for curve in curves]
    common = merged[0].x
    for curve in merged[1:]:
        common = np.intersect1d(common, curve.x)
    keep = {0, len(common) - 1}
    for curve in merged:
        keep |= set(m.thin(common, m.rising(curve.us[np.isin(curve.x, common)]), CURVE_TOLERANCE).tolist())
    return common[sorted(keep)]


def knots_of(values: Floats, measured: bool = True, per_octave: float = 2.0) -> Floats:
    """Return knots for a table's axis: the measured values if they are few, else about ``per_octave`` per octave."""
    unique = np.unique(values)
    if measured and len(unique) <= 24:
        return unique
    count = max(2, round(np.log2(unique[-1] / unique[0]) * per_octave) + 1)
    wanted = np.geomspace(unique[0], unique[-1], count)
    if not measured:
        return np.unique(np.array([float(f"{value:.4g}") for value in wanted]))
    return np.unique(unique[np.abs(np.log(unique)[:, None] - np.log(wanted)[None, :]).argmin(axis=0)])


def _curve_error(curve: m.Curve) -> dict[str, Any]:
    points = m.merge(curve)
    inside = (points.x > points.x[0]) & (points.x < points.x[-1])

    def fit_and_predict(train: NDArray[np.bool_]) -> Floats:
        knots = points.x[train]
        return m.curve_at(knots, m.fit_curve(m.Curve(knots, points.us[train]), knots), points.x)

    return error_summary(m.held_out(len(points.x), inside, fit_and_predict), points.us)


def _surface_error(surface: m.Surface, rows: Floats, columns: Floats) -> dict[str, Any]:
    inside = (surface.x > surface.x.min()) & (surface.x < surface.x.max())
    inside &= (surface.y > surface.y.min()) & (surface.y < surface.y.max())

    def fit_and_predict(train: NDArray[np.bool_]) -> Floats:
        known = m.Surface(surface.x[train], surface.y[train], surface.us[train])
        return m.surface_at(rows, columns, m.fit_surface(known, rows, columns), surface.x, surface.y)

    return error_summary(m.held_out(len(surface.us), inside, fit_and_predict), surface.us)


def _shared_error(mixed: m.Mixed, prefill_us: Callable[[Floats, Floats], Floats]) -> dict[str, Any]:
    prefill = prefill_us(mixed.chunk, m.mean_context(mixed.chunk, mixed.prefix))

    def fit_and_predict(train: NDArray[np.bool_]) -> Floats:
        return m.shared_at(m.fit_shared(mixed[train], prefill_us), mixed, prefill)

    return error_summary(m.held_out(len(mixed.us), np.ones(len(mixed.us), dtype=bool), fit_and_predict), mixed.us)


def error_summary(predicted: Floats, measured: Floats) -> dict[str, Any]:
    seen = ~np.isnan(predicted)
    error = np.abs(predicted[seen] / measured[seen] - 1.0)
    return {
        "median": float(f"{np.median(error):.3g}"),
        "p95": float(f"{np.quantile(error, 0.95):.3g}"),
        "points": int(seen.sum()),
    }


def is_met(error: Mapping[str, Any]) -> bool:
    return bool(error["median"] < TARGET_MEDIAN and error["p95"] < TARGET_P95)


def rounded(values: Floats) -> list[Any]:
    """Return values to five significant digits, nested as the array is."""
    if values.ndim > 1:
        return [rounded(row) for row in values]
    return [float(f"{value:.5g}") for value in values]


def plain(values: Floats) -> list[float]:
    return [int(value) if float(value).is_integer() else float(value) for value in values]


def times(content: Mapping[str, Any], factor: float, prefill_attention_factor: float | None = None) -> dict[str, Any]:
    """Return a calibration with the times of all terms multiplied by ``factor``; ``fixed_us`` stays.

    prefill_attention_factor: for that term, in place of ``factor``.
    """

    def scaled(value: Any, factor: float) -> Any:
        if isinstance(value, Mapping):
            return {key: scaled(item, factor) for key, item in value.items()}
        return [scaled(item, factor) for item in value] if isinstance(value, list) else float(f"{value * factor:.5g}")

    factors = {"prefill_attention": factor if prefill_attention_factor is None else prefill_attention_factor}
    tables = dict(content["tables"])
    for name in ("linear_us", "token_us", "head_us"):
        tables[name] = scaled(tables[name], factor)
    if "fp8_linear" in tables:
        tables["fp8_linear"] = _with_kinds(tables["fp8_linear"], lambda us: float(f"{us * factor:.5g}"))
    for name in ("allreduce", "prefill_attention", "decode_attention"):
        if name in tables:
            tables[name] = tables[name] | {"us": scaled(tables[name]["us"], factors.get(name, factor))}
    return {**content, "tables": tables}


def calibration_content(name: str) -> dict[str, Any]:
    """Return the content of a calibration file, by path or by its name in conf/calibration."""
    path = Path(name) if Path(name).suffix == ".json" else CALIBRATIONS / f"{name}.json"
    return read_json_object(path, ConfigError, "measure it again")


def with_factors(
    content: Mapping[str, Any], factors: Factors, block_factors: Mapping[int, Factors] | None = None
) -> dict[str, Any]:
    """Return a calibration for a machine that differs from it by factors, beyond those that it has already.

    block_factors: bits of weights -> the factors of blocks at that precision, in place of ``factors``.
    """
    had = Factors(**content.get("factors", {}))
    had_of_blocks = {int(bits): Factors(**found) for bits, found in content.get("block_factors", {}).items()}
    every = dict.fromkeys(had_of_blocks, factors) | dict(block_factors or {})
    of_blocks = {str(bits): asdict(_product(had_of_blocks.get(bits, had), factors)) for bits, factors in every.items()}
    return {**content, "factors": asdict(_product(had, factors))} | ({"block_factors": of_blocks} if of_blocks else {})


def _product(first: Factors, second: Factors) -> Factors:
    return Factors(
        memory_bound=first.memory_bound * second.memory_bound, compute_bound=first.compute_bound * second.compute_bound
    )


def _with_kinds(table: Mapping[str, Any], changed: Callable[[float], float]) -> dict[str, Any]:
    """Return ``fp8_linear`` with the times of both kinds of block changed."""
    return {**table, **{kind: [changed(us) for us in table[kind]] for kind in ("mha", "ffn")}}


def slower(content: Mapping[str, Any], factor: float) -> dict[str, Any]:
    """Return a calibration whose times are all multiplied by ``factor``."""
    floor = {"host_floor_us": content["host_floor_us"] * factor} if "host_floor_us" in content else {}
    return {**times(content, factor), "fixed_us": content["fixed_us"] * factor, **floor}
