"""Fits the quality model of ``sim.cost.quality`` to a table of measured plans, and measures its held-out error.

table = read_table(path)
fit(table).perplexity(plan)
cross_validate(table)                           # held-out errors, overall and for each kind of plan
write_fits(path)                                # the coefficients that sim.cost.quality.load_quality reads
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls
from scipy.stats import spearmanr

from sim.cost.plan import KV_KEEP_ALL, Plan
from sim.cost.plan_features import pair_features, precision_and_kv_features, removed_shares, warp
from sim.cost.plan_json import plan_from_json
from sim.cost.quality import BEST_FORM, FORMS, FittedQuality, FittedRange, Text, fitted_path, table_hash
from sim.errors import CalibrationError, nearest
from sim.json_file import read_json_object
from sim.results.run_folder import commit, write_json
from sim.types import Floats

BEST_CURVE = 0.1
BEST_STAGE_SHARE = 0.8
"""What ``choose`` finds best, with BEST_FORM, on the table of SmolLM2-135M; the page of scores has the comparison."""
CURVES = (-0.1, 0.0, 0.1, 0.25, 0.5)
STAGE_SHARES = (0.6, 0.7, 0.8, 0.9, 1.0)
"""What ``choose`` tries."""
FITTED_LOSS = 4.0
"""Plans that lose more, in nats, do not take part in a fit."""
REPORTED_LOSS = math.log(3.0)
"""Errors are reported for plans under three times the dense perplexity."""
UNLIMITED = 10**9
"""A context longer than any."""
NO_FACTOR = 1e9
"""The factor beyond a range of which no plan was measured: such plans are charged the largest loss."""
RANGE_WINDOW = 20
RANGE_ERROR = 0.10
"""The range of a fit ends where the median error of perplexity, over a window of held-out plans, exceeds this share."""
ALWAYS_KNOWN = ("dense", "single removal", "single layer of cut KV")
"""Kinds of plans that every fit sees; all forms start from them."""


# --- The table -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class QualityTable:
    """Plans measured on a real model.

    loss: nats per token more than dense, one entry per plan. If prefill and decode differ or KV is cut, the loss covers
        only the tokens after the prompt.
    kinds: how each plan was chosen.
    """

    name: str
    dense_nll: float
    plans: tuple[Plan, ...]
    kinds: tuple[tuple[str, ...], ...]
    loss: Floats
    note: str = ""


def read_table(path: Path, text: Text = "test") -> QualityTable:
    """Read a table that ``hw.score kind=table`` wrote, with the losses on one of its two texts.

    On the calibration text the loss after the prompt was not measured, so plans whose stages differ or that cut KV,
    which both change nothing before, are left out.

    Raises:
        CalibrationError: if the file is missing or malformed, mixes models, or lacks the dense plan.
    """
    value = read_json_object(path, CalibrationError, "make a table: python -m hw.score kind=table")
    try:
        rows = value["plans"]
        plans = [plan_from_json(row["plan"]) for row in rows]
        kinds = [tuple(row["chosen_as"]) for row in rows]
        dense = next(row for row, kind in zip(rows, kinds, strict=True) if "dense" in kind)
        dense_nll = float(dense[f"nll_{text}"])
        used = [i for i, plan in enumerate(plans) if text == "test" or not (_staged(plan) or _cut(plan))]
        loss = []
        for i in used:
            column = "nll_test_decode" if text == "test" and (_staged(plans[i]) or _cut(plans[i])) else f"nll_{text}"
            loss.append(float(rows[i][column]) - float(dense[column]))
        note = f"{len(plans)} plans, {dense['tokens']['test']:,} test tokens each; {value['weights']}"
        if text == "calibration":
            note = f"{len(used)} plans on the calibration text"
        table = QualityTable(
            name=str(value["model"]),
            dense_nll=dense_nll,
            plans=tuple(plans[i] for i in used),
            kinds=tuple(kinds[i] for i in used),
            loss=np.array(loss),
            note=note,
        )
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, StopIteration) as error:
        if isinstance(error, CalibrationError):
            raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise CalibrationError(
            f"{path} is no quality table ({reason}); make one: python -m hw.score kind=table"
        ) from error
    if not np.isfinite(table.loss).all() or len({len(plan.weight_bits) for plan in plans}) != 1:
        raise CalibrationError(f"{path} mixes models or has a loss that is not finite; measure it again")
    return table


def _staged(plan: Plan) -> bool:
    return plan.prefill != plan.decode


def _cut(plan: Plan) -> bool:
    return any(keep != KV_KEEP_ALL for keep in plan.kv_keep)


# --- The fit ---------------------------------------------------------------------------------------------------------


def fit(
    table: QualityTable,
    form: str = BEST_FORM,
    *,
    curve: float | None = None,
    stage_share: float = BEST_STAGE_SHARE,
) -> FittedQuality:
    """Fit a form to all plans of a table.

    singles: the sum of the measured losses of removing each block alone. additive: fitted weights of blocks.
    neighbours: also fitted weights of removed neighbors. warped, warped_neighbours: the last two with k other than 0.
    The weight of a plan is inversely proportional to its loss, so that errors are relative. Plans that lose more than
    FITTED_LOSS only set the range of predictions.

    Args:
        table: measured plans.
        form: one of FORMS.
        curve: k; None takes BEST_CURVE for a warped form, 0 for the others.
        stage_share: how much a block counts that only decode drops.
    Raises:
        CalibrationError: for an unknown form.
    """
    if form not in FORMS:
        raise CalibrationError(f"unknown form {form!r}; {nearest(form, FORMS)}")
    if curve is None:
        curve = BEST_CURVE if form.startswith("warped") else 0.0
    return _Design(table, stage_share).fit(form, curve, np.ones(len(table.plans), dtype=bool))


class _Design:
    """The features of all plans of a table, from which fits to parts of it are made."""

    def __init__(self, table: QualityTable, stage_share: float) -> None:
        self.table = table
        self.share = stage_share
        self.removed = np.stack([removed_shares(plan, stage_share) for plan in table.plans])
        self.kv = _kv_alone(table)
        self.others = np.array([precision_and_kv_features(plan, self.kv) for plan in table.plans])
        self.single = _singles(table, self.removed, self.others)
        self.root = np.sqrt(np.minimum(np.maximum(self.single, 0.0), 1.0))
        self.pairs = pair_features(self.removed, self.root)

    def fit(self, form: str, curve: float, rows: NDArray[np.bool_]) -> FittedQuality:
        """Fit to some rows. The losses of single blocks and layers come from all rows: every form starts from them."""
        blocks, pairs = self.removed.shape[1], self.pairs.shape[1]
        loss = self.table.loss
        used = rows & (loss < FITTED_LOSS)
        prior = np.maximum(warp(self.single, curve), 0.0)
        target = warp(loss, curve)
        weight = 1.0 / (0.1 + np.maximum(target, 0.0))
        design = np.concatenate((self.removed, self.pairs, self.others), axis=1)
        free = np.ones(design.shape[1], dtype=bool)
        free[:blocks] = form != "singles"
        free[blocks : blocks + pairs] = form in ("neighbours", "warped_neighbours")
        start = np.concatenate((prior, np.zeros(design.shape[1] - blocks)))
        # Ridge rows pull each coefficient towards its start with the strength of one plan, so that a block that few
        # plans remove keeps the loss it had alone.
        pull = np.concatenate((1.0 / (0.1 + prior), np.full(design.shape[1] - blocks, 0.02)))
        fixed = design[:, ~free] @ start[~free]
        solution = start.copy()
        # Non-negative least squares: no plan may improve by dropping more.
        solution[free] = nnls(
            np.concatenate(((design[:, free] * weight[:, None])[used], np.diag(pull[free]))),
            np.concatenate((((target - fixed) * weight)[used], pull[free] * start[free])),
        )[0]
        solution[~free & (np.arange(solution.size) >= blocks)] = 0.0
        return FittedQuality(
            name=self.table.name,
            form=form,
            dense_nll=self.table.dense_nll,
            curve=curve,
            stage_share=self.share,
            blocks=solution[:blocks],
            pairs=solution[blocks : blocks + pairs],
            others=solution[blocks + pairs :],
            root=self.root,
            kv=self.kv,
            note=self.table.note,
            max_loss=max(FITTED_LOSS, float(loss.max())),
        )


def _kv_alone(table: QualityTable) -> tuple[float, ...]:
    """Return the loss of cutting each layer's KV alone [l], in nats; the mean of all for layers not measured."""
    layers = len(table.plans[0].weight_bits)
    found: dict[int, float] = {}
    for plan, kinds, loss in zip(table.plans, table.kinds, table.loss, strict=True):
        if "single layer of cut KV" in kinds:
            found[next(i for i, keep in enumerate(plan.kv_keep) if keep != KV_KEEP_ALL)] = max(0.0, float(loss))
    mean = sum(found.values()) / len(found) if found else 0.02
    return tuple(found.get(layer, mean) for layer in range(layers))


def _singles(table: QualityTable, removed: Floats, others: Floats) -> Floats:
    """Return the loss of removing each block alone [b], in nats; the median of all for blocks not measured."""
    blocks = removed.shape[1]
    single = np.full(blocks, np.nan)
    alone = (np.abs(removed - np.round(removed)).sum(1) == 0) & (removed.sum(1) == 1) & (others.sum(1) == 0)
    for row in np.flatnonzero(alone):
        single[int(removed[row].argmax())] = table.loss[row]
    known = single[np.isfinite(single)]
    return np.where(np.isfinite(single), single, np.median(known) if known.size else 0.1)


def measured_range(table: QualityTable, form: str, predicted: Floats) -> FittedRange:
    """Return how far a form holds, from the losses [n] that it predicts for held-out plans (``held_out``).

    In the order of predicted loss, the range ends in the middle of the first RANGE_WINDOW plans whose perplexity is, in
    the median, more than RANGE_ERROR above the prediction; at REPORTED_LOSS at the latest. The factor beyond also
    counts predictions for random masks, and for prefixes of an order, with all plans of that kind held out.
    """
    kinds = sorted({k for kinds in table.kinds for k in kinds if k == "random mask" or k.startswith("prefix of")})
    known = np.flatnonzero(np.isfinite(predicted))
    order = known[np.argsort(predicted[known], kind="stable")]
    error = np.exp(table.loss[order] - predicted[order]) - 1.0
    limit = min(REPORTED_LOSS, float(predicted[order].max(initial=0.0)))
    for first in range(len(order) - RANGE_WINDOW + 1):
        if np.median(error[first : first + RANGE_WINDOW]) > RANGE_ERROR:
            limit = min(limit, float(predicted[order[first + RANGE_WINDOW // 2]]))
            break
    limit = max(0.0, math.floor(1000 * limit) / 1000)
    factors = [1.0]
    for one in (predicted, *(held_out_kind(table, kind, (form,)) for kind in kinds)):
        beyond = np.flatnonzero(np.nan_to_num(one, nan=-1.0) > limit)
        factors += [float(table.loss[i] / one[i]) for i in beyond]
    inside, outside = order[predicted[order] <= limit], order[predicted[order] > limit]
    errors = np.abs(np.exp(predicted[inside] - table.loss[inside]) - 1.0)
    kept = [keep.tokens(UNLIMITED) for plan in table.plans for keep in plan.kv_keep if keep != KV_KEEP_ALL]
    return FittedRange(
        loss=limit,
        factor=math.ceil(1000 * max(factors)) / 1000 if len(factors) > 1 else NO_FACTOR,
        kv_tokens=min(kept, default=None),
        inside=len(inside),
        outside=len(outside),
        median_inside=float(np.median(errors)) if len(inside) else 0.0,
        p90_inside=float(np.quantile(errors, 0.9)) if len(inside) else 0.0,
        median_outside=float(np.median(np.exp(table.loss[outside] - predicted[outside]))) if len(outside) else 1.0,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class QualityError:
    """Held-out relative errors of perplexity, over the plans of a kind under three times the dense perplexity."""

    form: str
    kind: str
    plans: int
    median: float
    p90: float
    spearman: float


Shape = tuple[str, float, float]
"""A form, its curve and its stage share."""


def shapes(forms: Sequence[str] = FORMS) -> list[Shape]:
    """Return all shapes that ``choose`` tries, the simplest first."""
    return [
        (form, curve, share)
        for form in forms
        for curve in (CURVES if form.startswith("warped") else (0.0,))
        for share in STAGE_SHARES
    ]


def choose(table: QualityTable, forms: Sequence[str] = FORMS, *, folds: int = 5, seed: int = 1) -> Shape:
    """Return the shape with the least mean held-out error of perplexity, over plans under three times dense."""
    return _Folds(table).choose(np.ones(len(table.plans), dtype=bool), forms, folds, seed)


def held_out(table: QualityTable, forms: Sequence[str] = FORMS, *, folds: int = 5, seed: int = 0) -> Floats:
    """Return the loss [n] that a fit predicts for each plan without having seen it, in nats.

    The cross-validation is nested: the shape too is chosen on the other folds alone, so no plan influences its own
    prediction. The kinds in ALWAYS_KNOWN are never held out and get NaN. Prefixes of one order resemble each other;
    ``held_out_kind`` holds all of them out at once.
    """
    fits = _Folds(table)
    fold = np.random.default_rng(seed).integers(0, folds, len(table.plans))
    predicted = np.full(len(table.plans), np.nan)
    for index in range(folds):
        out = (fold == index) & ~fits.always
        form, curve, share = fits.choose(~out, forms, folds - 1, seed + 1)
        model = fits.design(share).fit(form, curve, ~out)
        predicted[out] = model.loss_many([table.plans[i] for i in np.flatnonzero(out)])
    return predicted


def held_out_kind(table: QualityTable, kind: str, forms: Sequence[str] = FORMS) -> Floats:
    """Return the loss [n] that a fit predicts for the plans of a kind without having seen any; NaN for all others."""
    fits = _Folds(table)
    out = np.array([kind in kinds for kinds in table.kinds]) & ~fits.always
    form, curve, share = fits.choose(~out, forms, 4, 1)
    predicted = np.full(len(table.plans), np.nan)
    model = fits.design(share).fit(form, curve, ~out)
    predicted[out] = model.loss_many([table.plans[i] for i in np.flatnonzero(out)])
    return predicted


class _Folds:
    """Cross-validation within one table or a part of it; caches the designs."""

    def __init__(self, table: QualityTable) -> None:
        self._table = table
        self._designs: dict[float, _Design] = {}
        self.always = np.array([any(kind in ALWAYS_KNOWN for kind in kinds) for kinds in table.kinds])
        self._inside = table.loss < REPORTED_LOSS

    def design(self, share: float) -> _Design:
        """Return the design for a stage share."""
        if share not in self._designs:
            self._designs[share] = _Design(self._table, share)
        return self._designs[share]

    def choose(self, rows: NDArray[np.bool_], forms: Sequence[str], folds: int, seed: int) -> Shape:
        """Return the shape with the least mean held-out error within some rows."""
        fold = np.random.default_rng(seed).integers(0, folds, len(rows))
        scored = []
        for form, curve, share in shapes(forms):
            errors = []
            for index in range(folds):
                out = rows & ~self.always & (fold == index)
                model = self.design(share).fit(form, curve, rows & ~out)
                tested = np.flatnonzero(out & self._inside)
                predicted = model.loss_many([self._table.plans[i] for i in tested])
                errors.append(np.abs(np.exp(np.minimum(predicted - self._table.loss[tested], 5.0)) - 1.0))
            scored.append(float(np.concatenate(errors).mean()))
        return shapes(forms)[int(np.argmin(scored))]


def cross_validate(
    table: QualityTable, forms: Sequence[str] | str = FORMS, *, folds: int = 5, seed: int = 0
) -> list[QualityError]:
    """Return the held-out errors of a form, or of the one chosen among several, on all plans and on each kind."""
    tried = (forms,) if isinstance(forms, str) else forms
    return errors_of(table, held_out(table, tried, folds=folds, seed=seed), " or ".join(tried))


def errors_of(table: QualityTable, predicted: Floats, form: str) -> list[QualityError]:
    """Return the errors of predicted losses [n] on all plans and on each kind; plans with NaN do not count."""
    inside = np.isfinite(predicted) & (table.loss < REPORTED_LOSS)
    families = sorted({_family(kind) for kinds in table.kinds for kind in kinds})
    errors = []
    for name in ("all", *families):
        rows = inside & np.array([name == "all" or name in map(_family, kinds) for kinds in table.kinds])
        if rows.sum() < 3:
            continue
        error = np.abs(np.exp(predicted[rows] - table.loss[rows]) - 1.0)
        errors.append(
            QualityError(
                form=form,
                kind=name,
                plans=int(rows.sum()),
                median=float(np.median(error)),
                p90=float(np.quantile(error, 0.9)),
                spearman=_spearman(predicted[rows], table.loss[rows]),
            )
        )
    return errors


def _family(kind: str) -> str:
    return kind if not kind.startswith(("W4", "W8")) else "W8 or W4 prefix"


def _spearman(a: Floats, b: Floats) -> float:
    """Return the rank correlation; NaN if one side is constant, without SciPy's warning."""
    return math.nan if np.ptp(a) == 0 or np.ptp(b) == 0 else float(spearmanr(a, b).statistic)


# --- Coefficients to ship --------------------------------------------------------------------------------------------


def write_fits(table: Path) -> Path:
    """Fit all forms to both texts of a table, write coefficients and held-out errors, and return the path."""
    fits = []
    for text in get_args(Text):
        measured = read_table(table, text)
        for form in FORMS:
            predicted = held_out(measured, (form,))
            errors = errors_of(measured, predicted, form)
            fitted = replace(fit(measured, form), range=measured_range(measured, form, predicted))
            fits.append({"text": text, **fitted.to_json(), "held_out_errors": [_row(e) for e in errors]})
    path = fitted_path(table)
    write_json(
        path,
        {
            "model": measured.name,
            "table": table.name,
            "table_sha256": table_hash(table),
            "command": f"python -m hw.score kind=fit model.name={table.stem}",
            "commit": commit(),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "fits": fits,
        },
    )
    return path


def _row(error: QualityError) -> dict[str, Any]:
    row = asdict(error)
    del row["form"]
    return row | {"spearman": None if math.isnan(error.spearman) else error.spearman}
