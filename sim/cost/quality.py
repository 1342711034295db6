"""The loss of a plan: negative log-likelihood a token, in nats, predicted from plans measured on a real model.

    quality = load_quality("smollm2_135m")          # conf/quality/smollm2_135m.json, measured by hw.score
    quality.perplexity(plan)                        # of any plan

Two sources. A table of measured plans, to which a model is fitted; ``cross_validate`` says how far off it is on plans
that it did not see. And a few published points, for models whose weights cannot be had; ``summary`` says how few.

The fit is on what a plan loses against dense, D nats a token:

    log(1 + k D) / k  =  sum over blocks of w_b r_b  +  sum over kinds of neighbours of u_i sqrt(s_b s_c) r_b r_c
                         +  terms for W8 and W4 layers and for layers whose KV is cut

r_b is 1 where block b is removed in both stages and ``stage_share`` where decode alone drops it; s_b is what was
measured when b alone was removed; cut KV counts by what was measured of each layer alone, in inverse proportion to the
tokens kept. All coefficients are non-negative, so no plan gets better by losing more. A measured plan is predicted as
any other: its own value, noise included, would put steps between it and its neighbours.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from omegaconf import OmegaConf

from sim.cost.model_spec import ModelSpec, load_model
from sim.cost.plan import KV_KEEP_ALL, KeepMask, Plan, keep_all
from sim.cost.plan_json import plan_from_json
from sim.errors import CalibrationError, PlanError, nearest
from sim.paths import REPOSITORY
from sim.types import Floats

QUALITIES = REPOSITORY / "conf" / "quality"
"""The folder of quality tables, one file a model."""


FORMS = ("singles", "additive", "neighbours", "warped", "warped_neighbours")
"""What ``fit`` can fit; ``cross_validate`` compares them."""


BEST_FORM = "warped"


BEST_CURVE = 0.1


BEST_STAGE_SHARE = 0.8
"""What ``choose`` finds best on the table of SmolLM2-135M; hw/SCORES.md has the comparison."""


CURVES = (-0.1, 0.0, 0.1, 0.25, 0.5)


STAGE_SHARES = (0.6, 0.7, 0.8, 0.9, 1.0)
"""What ``choose`` tries."""


class Quality(Protocol):
    """Predicts what a plan loses."""

    def nll(self, plan: Plan) -> float:
        """Return the NLL a token, in nats."""
        ...

    def perplexity(self, plan: Plan) -> float:
        """Return exp(nll)."""
        ...

    def summary(self) -> str:
        """Say in one line what this stands on."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class QualityTable:
    """Plans measured on a real model. loss: nats a token more than dense, on the test text.

    Where prefill and decode differ, or KV is cut, it is the loss of the tokens behind the prompt.
    kinds: how each plan was chosen.
    """

    name: str
    dense_nll: float
    plans: tuple[Plan, ...]
    kinds: tuple[tuple[str, ...], ...]
    loss: Floats
    note: str = ""


def read_table(path: Path) -> QualityTable:
    """Read a table that ``hw.score kind=table`` wrote.

    Raises:
        CalibrationError: if the file is missing, malformed, or lacks the dense plan.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        rows = value["plans"]
        plans = tuple(plan_from_json(row["plan"]) for row in rows)
        kinds = tuple(tuple(row["chosen_as"]) for row in rows)
        dense = next(row for row, kind in zip(rows, kinds, strict=True) if "dense" in kind)
        loss = []
        for row, plan in zip(rows, plans, strict=True):
            staged = plan.prefill != plan.decode or any(keep != KV_KEEP_ALL for keep in plan.kv_keep)
            column = "nll_test_decode" if staged else "nll_test"
            loss.append(float(row[column]) - float(dense[column]))
        note = f"{len(plans)} plans, {dense['tokens']['test']:,} test tokens each; {value['weights']}"
        table = QualityTable(
            name=str(value["model"]),
            dense_nll=float(dense["nll_test"]),
            plans=plans,
            kinds=kinds,
            loss=np.array(loss),
            note=note,
        )
    except (OSError, ValueError, KeyError, TypeError, StopIteration) as error:
        if isinstance(error, CalibrationError):
            raise
        raise CalibrationError(
            f"{path} is no quality table ({type(error).__name__}: {error}); make one: python -m hw.score kind=table"
        ) from error
    if not np.isfinite(table.loss).all() or len({len(plan.weight_bits) for plan in plans}) != 1:
        raise CalibrationError(f"{path} mixes models or holds a loss that is no number; measure it again")
    return table


_OTHER_FEATURES = ("w4_layers", "w4_layers_squared", "w8_layers", "kv_cut", "kv_cut_first")


_KV_TOKENS = 36  # a layer's cut is measured with 4 first and 32 last tokens


_PAIRS = ("same_layer", "ffn_then_mha", "mha_and_next_mha", "ffn_and_next_ffn", "all_squared")


def _removed(plan: Plan, stage_share: float) -> Floats:
    """Return r [b]."""
    layers = len(plan.weight_bits)
    removed = np.empty(2 * layers)
    # bytes() of a tuple of bools is the quickest way from it to an array.
    removed[0::2] = np.frombuffer(bytes(plan.decode.mha), dtype=np.uint8)
    removed[1::2] = np.frombuffer(bytes(plan.decode.ffn), dtype=np.uint8)
    np.subtract(1.0, removed, out=removed)
    if plan.prefill is not plan.decode and plan.prefill != plan.decode:
        in_prefill = np.empty(2 * layers)
        in_prefill[0::2] = np.frombuffer(bytes(plan.prefill.mha), dtype=np.uint8)
        in_prefill[1::2] = np.frombuffer(bytes(plan.prefill.ffn), dtype=np.uint8)
        removed *= 1.0 - (1.0 - stage_share) * in_prefill
    return removed


def _others(plan: Plan, kv: Sequence[float]) -> tuple[float, float, float, float, float]:
    """Return the features of precision and KV; kv [l] is what each layer's cut cost alone."""
    bits = plan.weight_bits
    layers = len(bits)
    four, eight = bits.count(4) / layers, bits.count(8) / layers
    cut = first = 0.0
    if plan.kv_keep.count(KV_KEEP_ALL) != layers:
        for keep, cost in zip(plan.kv_keep, kv, strict=True):
            if keep.first_tokens is not None and keep.last_tokens is not None:
                cut += cost * _KV_TOKENS / (keep.first_tokens + keep.last_tokens)
                first += (keep.first_tokens == 0) / layers
    return four, four * four, eight, cut, first


def _pairs(removed: Floats, root: Floats) -> Floats:
    """Return the features [n, 5] of removed neighbours, from r [n, b] and sqrt(s) [b]."""
    weighted = removed * root
    mha, ffn = weighted[:, 0::2], weighted[:, 1::2]
    return np.stack(
        (
            (mha * ffn).sum(1),
            (ffn[:, :-1] * mha[:, 1:]).sum(1),
            (mha[:, :-1] * mha[:, 1:]).sum(1),
            (ffn[:, :-1] * ffn[:, 1:]).sum(1),
            weighted.sum(1) ** 2 - (weighted**2).sum(1),
        ),
        axis=1,
    )


def _pair_score(removed: Floats, root: Floats, pairs: Sequence[float]) -> float:
    """Return ``_pairs`` times its coefficients for one plan, in a quarter of the time."""
    weighted = removed * root
    mha, ffn = weighted[0::2], weighted[1::2]
    total = float(weighted.sum())
    return (
        pairs[0] * float(mha @ ffn)
        + pairs[1] * float(ffn[:-1] @ mha[1:])
        + pairs[2] * float(mha[:-1] @ mha[1:])
        + pairs[3] * float(ffn[:-1] @ ffn[1:])
        + pairs[4] * (total * total - float(weighted @ weighted))
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class FittedQuality:
    """A model of the loss, fitted to a table.

    curve: k of the module's equation; above 0 losses compound, 0 is linear, below 0 they saturate.
    blocks: w [b]. pairs: u [5]. others: [5]. root: sqrt(s) [b]. kv: what each layer's cut KV cost alone [l].
    """

    name: str
    form: str
    dense_nll: float
    curve: float
    stage_share: float
    blocks: Floats
    pairs: Floats
    others: Floats
    root: Floats
    kv: tuple[float, ...]
    note: str = ""
    max_loss: float = math.inf
    _others_list: tuple[float, ...] = field(default=(), repr=False)
    _pairs_list: tuple[float, ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_others_list", tuple(float(x) for x in self.others))
        object.__setattr__(self, "_pairs_list", tuple(float(x) for x in self.pairs))

    def loss_many(self, plans: Sequence[Plan]) -> Floats:
        """Return nats a token more than dense, of many plans."""
        if not plans:
            return np.empty(0)
        self._check(plans[0])
        removed = np.stack([_removed(plan, self.stage_share) for plan in plans])
        others = np.array([_others(plan, self.kv) for plan in plans])
        score = removed @ self.blocks + _pairs(removed, self.root) @ self.pairs + others @ self.others
        loss: Floats = np.minimum(_unwarp(score, self.curve), self.max_loss)
        return loss

    def loss(self, plan: Plan) -> float:
        """Return nats a token more than dense."""
        self._check(plan)
        removed = _removed(plan, self.stage_share)
        score = float(removed @ self.blocks)
        if self.pairs.any():
            score += _pair_score(removed, self.root, self._pairs_list)
        for weight, value in zip(self._others_list, _others(plan, self.kv), strict=True):
            score += weight * value
        return min(float(_unwarp(np.float64(score), self.curve)), self.max_loss)

    def nll(self, plan: Plan) -> float:
        """Return the NLL a token, in nats."""
        return self.dense_nll + self.loss(plan)

    def perplexity(self, plan: Plan) -> float:
        """Return exp(nll)."""
        return math.exp(self.nll(plan))

    def summary(self) -> str:
        """Say in one line what this stands on."""
        return f"quality of {self.name}: form {self.form}, fitted to {self.note}"

    def _check(self, plan: Plan) -> None:
        if 2 * len(plan.weight_bits) != self.blocks.size:
            raise PlanError(
                f"a plan of {len(plan.weight_bits)} layers, but the quality of {self.name} was measured on "
                f"{self.blocks.size // 2}; set quality= to a table of the model that runs"
            )


def _warp(loss: Floats, curve: float) -> Floats:
    if not curve:
        return loss
    return np.log1p(np.maximum(curve * loss, -0.95)) / curve


def _unwarp(score: Any, curve: float) -> Any:
    # A loss beyond e^40 tells nothing; without the limit it would overflow.
    return np.expm1(np.minimum(curve * score, 40.0)) / curve if curve else score


def fit(
    table: QualityTable,
    form: str = BEST_FORM,
    *,
    curve: float | None = None,
    stage_share: float = BEST_STAGE_SHARE,
) -> FittedQuality:
    """Fit a form to all plans of a table.

    singles: the sum of what each removed block cost alone. additive: fitted weights of blocks. neighbours: and of
    removed neighbours. warped, warped_neighbours: the same with k other than 0. A plan counts in inverse proportion to
    its own loss, so that errors are relative; plans that lose more than 4 nats say only where the range ends.

    Args:
        curve: k; None takes BEST_CURVE for a warped form, 0 for the others.
        stage_share: what a block counts that decode alone drops.
    Raises:
        CalibrationError: for an unknown form.
    """
    if form not in FORMS:
        raise CalibrationError(f"unknown form {form!r}; {nearest(form, FORMS)}")
    if curve is None:
        curve = BEST_CURVE if form.startswith("warped") else 0.0
    return _Design(table, stage_share).fit(form, curve, np.ones(len(table.plans), dtype=bool))


class _Design:
    """The features of all plans of a table, from which fits to any part of it are made."""

    def __init__(self, table: QualityTable, stage_share: float) -> None:
        self.table = table
        self.share = stage_share
        self.removed = np.stack([_removed(plan, stage_share) for plan in table.plans])
        self.kv = _kv_alone(table)
        self.others = np.array([_others(plan, self.kv) for plan in table.plans])
        self.single = _singles(table, self.removed, self.others)
        self.root = np.sqrt(np.minimum(np.maximum(self.single, 0.0), 1.0))
        self.pairs = _pairs(self.removed, self.root)

    def fit(self, form: str, curve: float, rows: NDArray[np.bool_]) -> FittedQuality:
        """Fit to some rows. What blocks and layers cost alone is known from all: it is where every form starts."""
        from scipy.optimize import nnls  # slow to import, and tables of published points need none

        blocks, pairs = self.removed.shape[1], self.pairs.shape[1]
        loss = self.table.loss
        used = rows & (loss < 4.0)
        prior = np.maximum(_warp(self.single, curve), 0.0)
        target = _warp(loss, curve)
        weight = 1.0 / (0.1 + np.maximum(target, 0.0))
        design = np.concatenate((self.removed, self.pairs, self.others), axis=1)
        free = np.ones(design.shape[1], dtype=bool)
        free[:blocks] = form != "singles"
        free[blocks : blocks + pairs] = form in ("neighbours", "warped_neighbours")
        start = np.concatenate((prior, np.zeros(design.shape[1] - blocks)))
        # A block that few plans remove keeps what it cost alone: the prior pulls with the strength of one such plan.
        pull = np.concatenate((1.0 / (0.1 + prior), np.full(design.shape[1] - blocks, 0.02)))
        fixed = design[:, ~free] @ start[~free]
        solution = start.copy()
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
            max_loss=max(4.0, float(loss.max())),
        )


def _kv_alone(table: QualityTable) -> tuple[float, ...]:
    """Return what cutting the KV of each layer alone cost [l]; the mean of all where that was not measured."""
    layers = len(table.plans[0].weight_bits)
    found: dict[int, float] = {}
    for plan, kinds, loss in zip(table.plans, table.kinds, table.loss, strict=True):
        if "single layer of cut KV" in kinds:
            found[next(i for i, keep in enumerate(plan.kv_keep) if keep != KV_KEEP_ALL)] = max(0.0, float(loss))
    mean = sum(found.values()) / len(found) if found else 0.02
    return tuple(found.get(layer, mean) for layer in range(layers))


def _singles(table: QualityTable, removed: Floats, others: Floats) -> Floats:
    """Return what each block cost alone [b]; the mean of its kind where that was not measured."""
    blocks = removed.shape[1]
    single = np.full(blocks, np.nan)
    alone = (np.abs(removed - np.round(removed)).sum(1) == 0) & (removed.sum(1) == 1) & (others.sum(1) == 0)
    for row in np.flatnonzero(alone):
        single[int(removed[row].argmax())] = table.loss[row]
    known = single[np.isfinite(single)]
    return np.where(np.isfinite(single), single, np.median(known) if known.size else 0.1)


@dataclass(frozen=True, slots=True, kw_only=True)
class QualityError:
    """Held-out errors of perplexity, relative, over the plans of a kind that stay under three times dense."""

    form: str
    kind: str
    plans: int
    median: float
    p90: float
    spearman: float


Shape = tuple[str, float, float]
"""A form, its curve and its share of decode alone."""


def shapes(forms: Sequence[str] = FORMS) -> list[Shape]:
    """Return everything that ``choose`` tries, the simplest first."""
    return [
        (form, curve, share)
        for form in forms
        for curve in (CURVES if form.startswith("warped") else (0.0,))
        for share in STAGE_SHARES
    ]


def choose(table: QualityTable, forms: Sequence[str] = FORMS, *, folds: int = 5, seed: int = 1) -> Shape:
    """Return the shape with the least mean error of perplexity on held-out plans of a table, those under 3x dense."""
    return _Folds(table).choose(np.ones(len(table.plans), dtype=bool), forms, folds, seed)


def held_out(table: QualityTable, forms: Sequence[str] = FORMS, *, folds: int = 5, seed: int = 0) -> Floats:
    """Return the loss that is predicted for each plan by a fit that did not see it.

    Nested: for every fold the shape too is chosen on the other folds alone, so no plan helps to choose what it is
    predicted by. Dense and the plans that remove or cut one thing alone are always seen, the table that every form
    starts from; they get no prediction. Prefixes of one order resemble each other: ``held_out_kind`` holds out all.
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
    """Return the loss that is predicted for the plans of a kind by a fit that saw none of them; others are NaN."""
    fits = _Folds(table)
    out = np.array([kind in kinds for kinds in table.kinds]) & ~fits.always
    form, curve, share = fits.choose(~out, forms, 4, 1)
    predicted = np.full(len(table.plans), np.nan)
    model = fits.design(share).fit(form, curve, ~out)
    predicted[out] = model.loss_many([table.plans[i] for i in np.flatnonzero(out)])
    return predicted


class _Folds:
    """Cross-validation within parts of one table."""

    def __init__(self, table: QualityTable) -> None:
        self._table = table
        self._designs: dict[float, _Design] = {}
        known = ("dense", "single removal", "single layer of cut KV")
        self.always = np.array([any(kind in known for kind in kinds) for kinds in table.kinds])
        self._inside = table.loss < math.log(3.0)

    def design(self, share: float) -> _Design:
        if share not in self._designs:
            self._designs[share] = _Design(self._table, share)
        return self._designs[share]

    def choose(self, rows: NDArray[np.bool_], forms: Sequence[str], folds: int, seed: int) -> Shape:
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
    """Return the held-out error of a form, or of what is chosen among several, on all plans and on each kind."""
    tried = (forms,) if isinstance(forms, str) else forms
    return errors_of(table, held_out(table, tried, folds=folds, seed=seed), " or ".join(tried))


def errors_of(table: QualityTable, predicted: Floats, form: str) -> list[QualityError]:
    """Return the error of predicted losses, NaN where there is none, on all plans and on each kind."""
    inside = np.isfinite(predicted) & (table.loss < math.log(3.0))
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
                spearman=spearman(predicted[rows], table.loss[rows]),
            )
        )
    return errors


def _family(kind: str) -> str:
    return kind if not kind.startswith(("W4", "W8")) else "W8 or W4 prefix"


def spearman(a: Floats, b: Floats) -> float:
    """Return the rank correlation, equal values sharing their mean rank; NaN where one side is constant."""
    ranks = [_ranks(x) for x in (a, b)]
    if np.ptp(ranks[0]) == 0 or np.ptp(ranks[1]) == 0:
        return math.nan
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def _ranks(values: Floats) -> Floats:
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(count)
    ranks: Floats = (last - (count - 1) / 2.0)[place]
    return ranks


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedPoint:
    """One published perplexity of a pruned model."""

    drop_mha: tuple[int, ...]
    drop_ffn: tuple[int, ...]
    perplexity: float
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedQuality:
    """What papers report of a model, carried over to other plans. It stands on very few points: see ``summary``.

    Pruning: log(perplexity / dense) = a * (share of parameters removed) ** p, the least-squares line through the
    published masks on logarithmic axes. Those masks are good ones, chosen by a search; a plan that drops other blocks
    loses more than this says, and which blocks it drops makes no difference here. W4: interpolated in the number of
    layers between the published ones, whichever layers they are (single layers are nearly additive, MorphServe). Both
    losses add. W8 and cut KV are not published, and are refused.
    """

    model: ModelSpec
    dense_perplexity: float
    points: tuple[PublishedPoint, ...]
    w4_layers: tuple[int, ...]
    w4_perplexity: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.w4_layers) != len(self.w4_perplexity) or list(self.w4_layers) != sorted(set(self.w4_layers)):
            raise CalibrationError(f"quality of {self.model.name}: w4 needs rising layer counts and one value each")
        if not self.dense_perplexity > 1:
            raise CalibrationError(f"quality of {self.model.name}: dense_perplexity is {self.dense_perplexity}")

    def power_law(self) -> tuple[float, float]:
        """Return a and p.

        Raises:
            CalibrationError: where fewer than two masks are published.
        """
        if len(self.points) < 2:
            raise CalibrationError(
                f"no pruned {self.model.name} has a published perplexity here ({len(self.points)} points), so plans "
                "that drop blocks cannot be priced; measure a table: python -m hw.score kind=table model.path=..."
            )
        shares = [self._share(_drop_mask(self.model, point)) for point in self.points]
        losses = [math.log(point.perplexity / self.dense_perplexity) for point in self.points]
        slope, offset = np.polyfit(np.log(shares), np.log(losses), 1)
        return math.exp(float(offset)), float(slope)

    def _share(self, mask: KeepMask) -> float:
        model = self.model
        removed = mask.mha.count(False) * model.mha_params + mask.ffn.count(False) * model.ffn_params
        return removed / model.total_params

    def nll(self, plan: Plan) -> float:
        """Return the NLL a token, in nats; decode's mask counts, since prefill keeps at least as much."""
        if len(plan.weight_bits) != self.model.num_layers:
            raise PlanError(f"a plan of {len(plan.weight_bits)} layers for {self.model.name}")
        if 8 in plan.weight_bits or any(keep != KV_KEEP_ALL for keep in plan.kv_keep):
            raise CalibrationError(
                f"nothing is published on W8 layers or cut KV of {self.model.name}; use W4, or a measured table"
            )
        loss = 0.0
        if plan.decode != keep_all(self.model):
            a, p = self.power_law()
            loss += a * self._share(plan.decode) ** p
        four = plan.weight_bits.count(4)
        if four:
            values = np.log(np.array(self.w4_perplexity) / self.dense_perplexity)
            loss += float(np.interp(four, self.w4_layers, values))
        return math.log(self.dense_perplexity) + loss

    def perplexity(self, plan: Plan) -> float:
        """Return exp(nll)."""
        return math.exp(self.nll(plan))

    def summary(self) -> str:
        """Say in one line what this stands on."""
        return (
            f"quality of {self.model.name}: published, {len(self.points)} pruned masks and "
            f"{len(self.w4_layers)} W4 prefixes; which blocks a plan drops makes no difference"
        )


def _drop_mask(model: ModelSpec, point: PublishedPoint) -> KeepMask:
    return KeepMask(
        mha=tuple(i not in point.drop_mha for i in range(model.num_layers)),
        ffn=tuple(i not in point.drop_ffn for i in range(model.num_layers)),
    )


def load_quality(name: str, form: str = BEST_FORM) -> FittedQuality | PublishedQuality:
    """Build the quality model of ``conf/quality/NAME``: fitted to a .json table, or anchored on a .yaml of points.

    Raises:
        CalibrationError: for an unknown name (the nearest is offered) or a malformed file.
    """
    known = {path.stem: path for path in sorted(QUALITIES.glob("*")) if path.suffix in (".json", ".yaml")}
    if name not in known:
        raise CalibrationError(f"no quality {name!r} in conf/quality; {nearest(name, known)}")
    if known[name].suffix == ".json":
        return fit(read_table(known[name]), form)
    return read_published(known[name])


def read_published(path: Path) -> PublishedQuality:
    """Read a file of published points.

    Raises:
        CalibrationError: if it is malformed.
    """
    try:
        value: Any = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
        points = tuple(
            PublishedPoint(
                drop_mha=tuple(point["drop_mha"]),
                drop_ffn=tuple(point["drop_ffn"]),
                perplexity=float(point["perplexity"]),
                source=str(point["source"]),
            )
            for point in value["points"]
        )
        return PublishedQuality(
            model=load_model(value["model"]),
            dense_perplexity=float(value["dense_perplexity"]),
            points=points,
            w4_layers=tuple(value["w4"]["layers"]),
            w4_perplexity=tuple(value["w4"]["perplexity"]),
        )
    except (KeyError, TypeError) as error:
        raise CalibrationError(f"{path} lacks or misstates {error}") from error
