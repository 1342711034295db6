"""The loss of a plan: its negative log-likelihood (NLL) a token, in nats, predicted from measured plans.

    quality = load_quality("smollm2_135m")          # coefficients fitted to conf/quality/smollm2_135m.json
    quality.perplexity(plan)                        # of any plan

There are two sources. ``hw.score`` measures a table of plans and fits a model to it (``python -m hw.score kind=fit``);
the coefficients ship with their held-out errors. For models whose weights are not available there are a few published
points; ``summary`` says how few. They do not say which blocks are cheap; ``TransferredQuality`` takes that from another
model, by assumption.

The fitted model predicts D, the loss of a plan over dense in nats per token:

    log(1 + k D) / k  =  sum over blocks of w_b r_b  +  sum over kinds of neighbors of u_i sqrt(s_b s_c) r_b r_c
                         +  terms for W8 and W4 layers and for layers whose KV is cut

r_b is 1 if block b is removed in both stages and ``stage_share`` if only decode drops it. s_b is the measured loss of
removing b alone. Cut KV counts by the measured loss of cutting each layer alone, inversely proportional to the tokens
kept. All coefficients are non-negative, so no plan improves by dropping more. A measured plan is predicted like any
other: with its own measured value, noise included, it would stand out from similar plans. What changed KV and narrower
FFN blocks cost is added (``sim.cost.added_losses``).

A fit holds up to some loss: many blocks removed together hurt more than the model says. How far it holds, and by how
much it is too good beyond, is measured on held-out plans and stored with the coefficients (``FittedRange``). Outside of
its range a plan is charged the upper bound, never the prediction.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, Protocol, cast, get_args

import numpy as np
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from sim.cost.added_losses import NOTHING_ADDED, AddedLosses, read_added_losses
from sim.cost.model_spec import ModelSpec, load_model
from sim.cost.plan import KV_KEEP_ALL, KeepMask, Plan, keep_all
from sim.cost.plan_features import pair_features, pair_score, precision_and_kv_features, removed_shares, unwarp
from sim.errors import CalibrationError, PlanError, RapLabError, nearest
from sim.json_file import read_json_object
from sim.paths import REPOSITORY
from sim.types import Floats

Text = Literal["calibration", "test"]

QUALITIES = REPOSITORY / "conf" / "quality"
"""The folder of quality tables, one file per model; its subfolder ``fitted/`` has the coefficients of each."""
FORMS = ("singles", "additive", "neighbours", "warped", "warped_neighbours")
"""The forms that are fitted; ``hw.score.fit`` explains and compares them."""
BEST_FORM = "warped"
"""The form with the least held-out error on the table of SmolLM2-135M."""

PAIRS, OTHERS = 5, 5
"""How many coefficients a fit has for pairs of blocks, and for precision and cut KV."""

MOST_NLL = 100.0
MOST_PERPLEXITY = 1e9
MOST_COEFFICIENT = 1e6
"""Bounds on what a file may hold, so that no prediction leaves the range of a float; measured values are far below."""


class Quality(Protocol):
    """Predicts what a plan loses."""

    def nll(self, plan: Plan) -> float:
        """Return the NLL a token, in nats.

        Raises:
            CalibrationError: if nothing is known of such plans; the message says what is missing and what to do.
        """
        ...

    def perplexity(self, plan: Plan) -> float:
        """Return exp(nll)."""
        ...

    def charge(self, plan: Plan) -> float:
        """Return what requests are charged for a plan, in nats a token: ``nll``, or NaN if the plan's is unknown."""
        ...

    def in_range(self, plan: Plan) -> bool:
        """Return whether the data cover this plan; if not, ``nll`` is an upper bound."""
        ...

    def summary(self) -> str:
        """Return one line on the data behind the prediction."""
        ...


# --- The fitted model ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class FittedRange:
    """How far a fit holds, measured on plans that were held out (``hw.score.fit.measured_range``).

    loss: nats per token over dense; a plan predicted above it is outside.
    factor: the largest measured loss over the predicted one, of held-out plans outside; inf if there was none.
    kv_tokens: the fewest tokens that a measured plan with cut KV keeps; None if no such plan was measured.
    inside, outside: held-out plans that were predicted below and above ``loss``.
    median_inside, p90_inside: relative errors of perplexity of those below.
    median_outside: median of measured over predicted perplexity of those above.
    """

    loss: float
    factor: float
    kv_tokens: int | None
    inside: int
    outside: int
    median_inside: float
    p90_inside: float
    median_outside: float

    def __post_init__(self) -> None:
        if not (self.loss >= 0.0 and self.factor >= 1.0):
            raise CalibrationError(
                f"the range of a fit has loss {self.loss} and factor {self.factor}; the first must be at least 0, the "
                "second at least 1"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class FittedQuality:
    """A model of the loss, fitted to a table.

    curve: k of the module's equation; losses compound above 0, add up at 0 and saturate below 0.
    stage_share: how much a block counts that only decode drops.
    blocks: w [b]. pairs: u [5]. others: coefficients [5] of precision and KV.
    root: sqrt(s) [b]. kv: what cutting each layer's KV alone costs [l], in nats.
    max_loss: no prediction exceeds this, the largest loss in the table or 4 nats.
    range: how far the fit holds; None predicts every plan without a bound, as a fit under test needs it.
    added: what was measured of changed KV and of FFN widths without other changes of the plan, and is added.
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
    range: FittedRange | None = None
    added: AddedLosses = NOTHING_ADDED
    _others_list: tuple[float, ...] = field(default=(), repr=False)
    _pairs_list: tuple[float, ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_others_list", tuple(float(x) for x in self.others))
        object.__setattr__(self, "_pairs_list", tuple(float(x) for x in self.pairs))

    def loss_many(self, plans: Sequence[Plan]) -> Floats:
        """Return the losses over dense of many plans [n], in nats per token; as ``loss``."""
        if not plans:
            return np.empty(0)
        for plan in plans:
            self._check(plan)
        removed = np.stack([removed_shares(plan, self.stage_share) for plan in plans])
        others = np.array([precision_and_kv_features(plan, self.kv) for plan in plans])
        score = removed @ self.blocks + pair_features(removed, self.root) @ self.pairs + others @ self.others
        loss: Floats = self.charged(np.minimum(unwarp(score, self.curve), self.max_loss))
        loss = np.minimum(loss + np.array([self.added.of(plan, self.name) for plan in plans]), self.max_loss)
        return np.where([self._kv_in_range(plan) for plan in plans], loss, self.max_loss)

    def loss(self, plan: Plan) -> float:
        """Return the loss over dense, in nats per token: predicted in the fit's range, an upper bound outside."""
        predicted = self.predicted_loss(plan)
        if not self._kv_in_range(plan):
            return self.max_loss
        return min(float(self.charged(np.float64(predicted))) + self.added.of(plan, self.name), self.max_loss)

    def predicted_loss(self, plan: Plan) -> float:
        """Return the predicted loss over dense without what is added to it, in nats, in any range.

        Added is that of changed KV, ``kv_only`` and ``ffn_width`` (``loss``). Tokens that ``kv_keep`` drops are in it.
        """
        self._check(plan)
        removed = removed_shares(plan, self.stage_share)
        score = float(removed @ self.blocks)
        if self.pairs.any():
            score += pair_score(removed, self.root, self._pairs_list)
        for weight, value in zip(self._others_list, precision_and_kv_features(plan, self.kv), strict=True):
            score += weight * value
        return min(float(unwarp(np.float64(score), self.curve)), self.max_loss)

    def w4_loss(self, share: float) -> float:
        """Return the predicted loss over dense of W4 in this share of the layers, in nats per token."""
        score = self._others_list[0] * share + self._others_list[1] * share * share
        return min(float(unwarp(np.float64(score), self.curve)), self.max_loss)

    def charged(self, predicted: Any) -> Any:
        """Return what predicted losses of plans are charged: themselves in the fit's range, the upper bound outside."""
        if self.range is None:
            return predicted
        bound = np.minimum(predicted * self.range.factor, self.max_loss)
        return np.where(predicted > self.range.loss, bound, predicted)

    def in_range(self, plan: Plan) -> bool:
        """Return whether the fit holds for this plan; if not, ``loss`` is an upper bound."""
        if self.range is None:
            return True
        return self._kv_in_range(plan) and self.predicted_loss(plan) <= self.range.loss

    def _kv_in_range(self, plan: Plan) -> bool:
        """Return whether a plan keeps at least as many tokens of KV as the measured plans."""
        if self.range is None:
            return True
        fewest = math.inf if self.range.kv_tokens is None else self.range.kv_tokens
        return all(
            keep.first_tokens is None or keep.last_tokens is None or keep.first_tokens + keep.last_tokens >= fewest
            for keep in set(plan.kv_keep)
        )

    def nll(self, plan: Plan) -> float:
        """Return the NLL a token, in nats."""
        return self.dense_nll + self.loss(plan)

    def charge(self, plan: Plan) -> float:
        """Return what requests are charged for a plan: its NLL, or NaN if the loss of some change was not measured."""
        try:
            return self.nll(plan)
        except CalibrationError:
            return math.nan

    def perplexity(self, plan: Plan) -> float:
        """Return exp(nll)."""
        return math.exp(self.nll(plan))

    def summary(self) -> str:
        """Return one line on the data behind the prediction."""
        line = f"quality of {self.name}: form {self.form}, fitted to {self.note}"
        if self.range is None:
            return line
        return (
            f"{line}; holds up to {math.exp(self.range.loss):.2f} times the dense perplexity, and charges "
            f"{self.range.factor:.2f} times the predicted loss beyond"
        )

    def _check(self, plan: Plan) -> None:
        if 2 * len(plan.weight_bits) != self.blocks.size:
            raise PlanError(
                f"a plan of {len(plan.weight_bits)} layers, but the quality of {self.name} was measured on "
                f"{self.blocks.size // 2}; choose a table of the model that runs, in most commands with quality_table="
            )

    def to_json(self) -> dict[str, Any]:
        """Return all coefficients as plain values; JSON keeps every bit of a float."""
        return {
            "form": self.form,
            "dense_nll": self.dense_nll,
            "curve": self.curve,
            "stage_share": self.stage_share,
            "max_loss": self.max_loss,
            "range": None if self.range is None else asdict(self.range),
            "note": self.note,
            **{name: getattr(self, name).tolist() for name in ("pairs", "others", "blocks", "root")},
            "kv": list(self.kv),
        }

    @classmethod
    def from_json(cls, name: str, value: Mapping[str, Any]) -> FittedQuality:
        """Read what ``to_json`` wrote, for the model of this name."""

        def array(key: str) -> Floats:
            found = np.array(value[key], dtype=np.float64)
            if found.ndim != 1:
                raise ValueError(f"{key} must hold a list of numbers")
            return found

        made = cls(
            name=name,
            form=str(value["form"]),
            dense_nll=float(value["dense_nll"]),
            curve=float(value["curve"]),
            stage_share=float(value["stage_share"]),
            blocks=array("blocks"),
            pairs=array("pairs"),
            others=array("others"),
            root=array("root"),
            kv=tuple(float(x) for x in value["kv"]),
            note=str(value["note"]),
            max_loss=float(value["max_loss"]),
            range=None if value["range"] is None else _range_from_json(value["range"]),
        )
        made._check_shape()
        return made

    def _check_shape(self) -> None:
        """Check that all coefficients are numbers and that their counts agree."""
        layers = len(self.kv)
        arrays = {"blocks": 2 * layers, "root": 2 * layers, "pairs": PAIRS, "others": OTHERS}
        for key, count in arrays.items():
            found = getattr(self, key)
            if found.shape != (count,) or not (np.abs(found) <= MOST_COEFFICIENT).all():
                raise ValueError(f"{key} must hold {count} finite numbers, none above {MOST_COEFFICIENT:g}")
        numbers = (self.dense_nll, self.curve, self.stage_share, self.max_loss, *self.kv)
        if not layers or not (np.abs(numbers) <= MOST_COEFFICIENT).all() or not 0 < self.max_loss <= MOST_NLL:
            raise ValueError("a coefficient is not a finite number, or too large")
        if not 0 <= self.stage_share <= 1 or not 0 <= self.dense_nll <= MOST_NLL:
            raise ValueError(f"stage_share {self.stage_share} or dense_nll {self.dense_nll} is out of range")


def _range_from_json(value: Mapping[str, Any]) -> FittedRange:
    """Read the range of a fit."""
    tokens = value["kv_tokens"]
    return FittedRange(
        kv_tokens=None if tokens is None else int(tokens),
        inside=int(value["inside"]),
        outside=int(value["outside"]),
        **{key: float(value[key]) for key in ("loss", "factor", "median_inside", "p90_inside", "median_outside")},
    )


# --- Published points ------------------------------------------------------------------------------------------------

STATED = (
    "take a quality that states it: smollm2_135m (measured), or llama2_7b_transferred (by assumption, and not where "
    "prompts only write KV)"
)
"""What a message offers where nothing is published."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedPoint:
    """One published perplexity of a pruned model."""

    drop_mha: tuple[int, ...]
    drop_ffn: tuple[int, ...]
    perplexity: float
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedQuality:
    """What papers report of a model, extended to other plans. It rests on very few points; see ``summary``.

    Pruning: log(perplexity / dense) = a * (share of parameters removed) ** p, the least-squares line through the
    published masks on logarithmic axes. Those masks were chosen by a search. A plan that drops other blocks loses more
    than this predicts: the blocks themselves make no difference here. W4: interpolated in the number of layers,
    whichever layers they are (the losses of single layers nearly add up, MorphServe). Losses of pruning and W4 add
    up.

    W8 and cut KV are not published: their loss is unknown, ``nll`` refuses them and ``charge`` is NaN. A plan that
    drops a larger share of the parameters than any published mask is outside of the range: it is charged the loss of
    guessing every token with equal probability.

    added: what changed KV and FFN widths cost besides; nothing is published on that, so only ``TransferredQuality``
        knows some of it.
    """

    model: ModelSpec
    dense_perplexity: float
    points: tuple[PublishedPoint, ...]
    w4_layers: tuple[int, ...]
    w4_perplexity: tuple[float, ...]
    added: AddedLosses = NOTHING_ADDED

    def __post_init__(self) -> None:
        if len(self.w4_layers) != len(self.w4_perplexity) or list(self.w4_layers) != sorted(set(self.w4_layers)):
            raise CalibrationError(f"quality of {self.model.name}: w4 needs rising layer counts and one value each")
        if not self.dense_perplexity > 1:
            raise CalibrationError(f"quality of {self.model.name}: dense_perplexity is {self.dense_perplexity}")
        if self.w4_layers and self.w4_layers[-1] > self.model.num_layers:
            raise CalibrationError(
                f"quality of {self.model.name}: w4 counts {self.w4_layers[-1]} layers; the model has "
                f"{self.model.num_layers}"
            )
        for point in self.points:
            self._check_point(point)

    def _check_point(self, point: PublishedPoint) -> None:
        """Check that a point drops blocks of the model and loses by it: the power law takes logarithms of both."""
        layers, most = sorted({*point.drop_mha, *point.drop_ffn}), self.model.num_layers - 1
        if not layers or not 0 <= layers[0] <= layers[-1] <= most:
            raise CalibrationError(
                f"quality of {self.model.name}: the point of {point.source!r} drops blocks of layers {layers}; it must "
                f"drop some of layers 0 to {most}"
            )
        if not point.perplexity > self.dense_perplexity:
            raise CalibrationError(
                f"quality of {self.model.name}: the point of {point.source!r} has perplexity {point.perplexity}; it "
                f"must be above that of dense, {self.dense_perplexity}"
            )

    def power_law(self) -> tuple[float, float]:
        """Return a and p of the power law of pruning.

        Raises:
            CalibrationError: if fewer than two masks are published.
        """
        if len(self.points) < 2:
            raise CalibrationError(
                f"no pruned {self.model.name} has a published perplexity here ({len(self.points)} points), so the loss "
                "of plans that drop blocks is unknown; measure a table: python -m hw.score kind=table model.path=..."
            )
        shares = [self._share(_drop_mask(self.model, point)) for point in self.points]
        losses = [math.log(point.perplexity / self.dense_perplexity) for point in self.points]
        slope, offset = np.polyfit(np.log(shares), np.log(losses), 1)
        return math.exp(float(offset)), float(slope)

    def in_range(self, plan: Plan) -> bool:
        """Return whether a plan drops at most the share of parameters that some published mask drops."""
        largest = max((self._share(_drop_mask(self.model, point)) for point in self.points), default=math.inf)
        return self._share(plan.decode) <= largest

    def _share(self, mask: KeepMask) -> float:
        """Return the share of parameters that a mask removes."""
        model = self.model
        removed = mask.mha.count(False) * model.mha_params + mask.ffn.count(False) * model.ffn_params
        return removed / model.total_params

    def nll(self, plan: Plan) -> float:
        """Return the NLL a token, in nats; outside of the range its upper bound.

        Only decode's mask counts; prefill drops no more than decode.
        """
        if len(plan.weight_bits) != self.model.num_layers:
            raise PlanError(
                f"a plan of {len(plan.weight_bits)} layers, but {self.model.name} has {self.model.num_layers}; "
                "choose a table of the model that runs, in most commands with quality_table="
            )
        if 8 in plan.product_bits or any(keep != KV_KEEP_ALL for keep in plan.kv_keep):
            raise CalibrationError(
                f"nothing is published on layers or products at 8 bits, or cut KV, of {self.model.name}, so their loss "
                "is unknown; leave weight_bits and compute_bits at 16 or 4, use a model with a measured table "
                "(smollm2_135m), or measure one: python -m hw.score kind=table"
            )
        added = self.added.of(plan, self.model.name, STATED)
        if not self.in_range(plan):
            return max(math.log(self.model.vocab_size), math.log(self.dense_perplexity))
        loss = added
        if plan.decode != keep_all(self.model):
            loss += self._pruning_loss(plan.decode)
        four = plan.product_bits.count(4)
        if four:
            loss += self._w4_loss(four)
        return math.log(self.dense_perplexity) + loss

    def _pruning_loss(self, mask: KeepMask) -> float:
        """Return what a mask loses over dense, in nats per token."""
        a, p = self.power_law()
        return float(a * self._share(mask) ** p)

    def with_w4_of(self, other: PublishedQuality) -> PublishedQuality:
        """Return these points with the published losses of W4 of another model; those of dropped blocks stay."""
        ratio = self.dense_perplexity / other.dense_perplexity
        perplexity = tuple(ratio * value for value in other.w4_perplexity)
        return replace(self, w4_layers=other.w4_layers, w4_perplexity=perplexity)

    def _w4_loss(self, layers: int) -> float:
        """Return what W4 in this many layers loses over dense, in nats per token."""
        values = np.log(np.array(self.w4_perplexity) / self.dense_perplexity)
        return float(np.interp(layers, self.w4_layers, values))

    def charge(self, plan: Plan) -> float:
        """Return what requests are charged for a plan: its NLL, or NaN if nothing is published on such plans."""
        try:
            return self.nll(plan)
        except CalibrationError:
            return math.nan

    def perplexity(self, plan: Plan) -> float:
        """Return exp(nll)."""
        return math.exp(self.nll(plan))

    def summary(self) -> str:
        """Return one line on the data behind the prediction."""
        return (
            f"quality of {self.model.name}: published, {len(self.points)} pruned masks and "
            f"{len(self.w4_layers)} W4 prefixes; which blocks a plan drops makes no difference; a plan that drops more "
            "than they do is charged the loss of a random guess"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferredQuality(PublishedQuality):
    """Published points, and by assumption what blocks cost that no published mask drops.

    Nothing here was measured on this model. Each block counts as many parameters as it has, times a factor:

    - 1 for a block that some published mask drops. These blocks were found by a search.
    - For any other block the loss of removing its counterpart alone from a small measured model, over the median loss
      of the counterparts of published blocks of its kind; at least 1. The counterpart is the block of the same kind at
      the same relative depth.

    The loss of a mask is a curve of its counted share of the parameters that passes through every published point:
    log-log straight between them, and below the first one with the exponent of the least-squares line. So a published
    mask costs what was published, and a mask of other blocks with the same parameters costs as much or more. A mask
    that counts more than every published one is outside of the range.

    factors: of each block, in the order MHA0, FFN0, MHA1, ...; at least 1. profile_of: the measured model.
    w4_of: the measured model whose loss of W4, by share of the layers, replaces the published one; None keeps that.
    w4_losses: its losses in nats for 0, 1, ... layers of this model; empty without ``w4_of``.
    """

    factors: tuple[float, ...]
    profile_of: str
    w4_of: str | None = None
    w4_losses: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        PublishedQuality.__post_init__(self)
        self.power_law()  # which needs two masks
        layers = self.model.num_layers
        if len(self.factors) != 2 * layers or min(self.factors) < 1.0 or len(self.w4_losses) not in (0, layers + 1):
            raise CalibrationError(
                f"quality of {self.model.name}: {len(self.factors)} factors from {min(self.factors, default=0.0):.2f} "
                f"and {len(self.w4_losses)} losses of W4 do not fit its {layers} layers"
            )

    @classmethod
    def of(
        cls, published: PublishedQuality, profile: FittedQuality, w4: FittedQuality | None = None
    ) -> TransferredQuality:
        """Return published points with the profile of a measured model, and with the loss of W4 of ``w4``, if any."""
        layers = published.model.num_layers
        return cls(
            **{one.name: getattr(published, one.name) for one in fields(PublishedQuality) if one.name != "added"},
            factors=transferred_factors(published, profile),
            profile_of=profile.name,
            w4_of=None if w4 is None else w4.name,
            w4_losses=() if w4 is None else tuple(w4.w4_loss(n / layers) for n in range(layers + 1)),
            added=profile.added.transferred(layers),
        )

    def counted_share(self, mask: KeepMask) -> float:
        """Return the share of parameters that a mask removes, each block times its factor."""
        model = self.model
        removed = 0.0
        for layer, (mha, ffn) in enumerate(zip(mask.mha, mask.ffn, strict=True)):
            removed += 0.0 if mha else model.mha_params * self.factors[2 * layer]
            removed += 0.0 if ffn else model.ffn_params * self.factors[2 * layer + 1]
        return removed / model.total_params

    def in_range(self, plan: Plan) -> bool:
        """Return whether a plan counts at most the share of parameters that some published mask counts."""
        return self.counted_share(plan.decode) <= max(share for share, _ in self._curve()) * (1.0 + 1e-12)

    def _curve(self) -> list[tuple[float, float]]:
        """Return counted share and loss of every published mask, in ascending order."""
        return sorted(
            (self.counted_share(_drop_mask(self.model, point)), math.log(point.perplexity / self.dense_perplexity))
            for point in self.points
        )

    def _pruning_loss(self, mask: KeepMask) -> float:
        shares, losses = zip(*self._curve(), strict=True)
        share = self.counted_share(mask)
        if share <= shares[0]:
            _, exponent = self.power_law()
            return float(losses[0] * (share / shares[0]) ** exponent)
        return math.exp(float(np.interp(math.log(share), np.log(shares), np.log(losses))))

    def with_w4_of(self, other: PublishedQuality) -> TransferredQuality:
        """Return the same with the published losses of W4 of another model, also where they were a measured model's."""
        return replace(cast(TransferredQuality, PublishedQuality.with_w4_of(self, other)), w4_of=None, w4_losses=())

    def _w4_loss(self, layers: int) -> float:
        return self.w4_losses[layers] if self.w4_losses else PublishedQuality._w4_loss(self, layers)

    def summary(self) -> str:
        """Return one line on the data behind the prediction."""
        w4 = "published" if self.w4_of is None else f"assumed to be that of {self.w4_of}"
        return (
            f"quality of {self.model.name}: assumed, not measured; {len(self.points)} published masks, other blocks "
            f"by the profile of {self.profile_of}; the loss of W4 is {w4}; {self.added.said()}; a plan "
            "beyond the published masks is charged the loss of a random guess"
        )


def transferred_factors(published: PublishedQuality, profile: FittedQuality) -> tuple[float, ...]:
    """Return the factors of ``TransferredQuality`` from the single-block losses of another model."""
    layers, theirs = published.model.num_layers, len(profile.kv)
    depth, their_depth = (np.arange(layers) + 0.5) / layers, (np.arange(theirs) + 0.5) / theirs
    factors = np.ones(2 * layers)
    for kind, dropped_by in enumerate(("drop_mha", "drop_ffn")):
        cost = np.interp(depth, their_depth, profile.root[kind::2] ** 2)
        dropped = sorted({layer for point in published.points for layer in getattr(point, dropped_by)})
        # The median: one of SmolLM2's blocks is ten times as costly as its neighbors.
        usual = float(np.median(cost[dropped] if dropped else cost))
        own = np.maximum(1.0, cost / usual)
        own[dropped] = 1.0
        factors[kind::2] = own
    return tuple(factors.tolist())


def _drop_mask(model: ModelSpec, point: PublishedPoint) -> KeepMask:
    return KeepMask(
        mha=tuple(i not in point.drop_mha for i in range(model.num_layers)),
        ffn=tuple(i not in point.drop_ffn for i in range(model.num_layers)),
    )


# --- Loading ---------------------------------------------------------------------------------------------------------


def load_quality(name: str, form: str = BEST_FORM, text: Text = "test") -> FittedQuality | PublishedQuality:
    """Load the quality model of ``conf/quality/NAME``: coefficients fitted to a .json table, or a .yaml of points.

    Args:
        name: the file without its ending.
        form: one of FORMS; published points have no form.
        text: the text whose measured losses were fitted. Decisions may use the calibration text; results are reported
            on the test text.
    Raises:
        CalibrationError: for an unknown name, form or text (the nearest is offered), a malformed file, or coefficients
            that were fitted to another version of the table.
    """
    known = {path.stem: path for path in sorted(QUALITIES.glob("*")) if path.suffix in (".json", ".yaml")}
    if name not in known:
        raise CalibrationError(f"no quality {name!r} in conf/quality; {nearest(name, known)}")
    if known[name].suffix == ".yaml":
        return _read_points(known[name])
    return read_fitted(known[name], form, text)


def _read_points(path: Path) -> PublishedQuality:
    """Read a file of published points, or one that names such a file and the model whose profile is transferred."""
    value = _read_yaml(path)
    if not isinstance(value, Mapping) or "published" not in value:
        return read_published(path)
    known = ("published", "profile", "w4")
    for key in value:
        if key not in known:
            raise CalibrationError(f"{path}: there is no key {key!r}; {nearest(str(key), known)}")
    found = {key: _named(path, key, value.get(key)) for key in known if key != "w4" or value.get("w4") is not None}
    published, profile, w4 = found["published"], found["profile"], found.get("w4")
    assert isinstance(published, PublishedQuality)
    assert isinstance(profile, FittedQuality)
    assert w4 is None or isinstance(w4, FittedQuality)
    return TransferredQuality.of(published, profile, w4)


def _named(path: Path, key: str, name: Any) -> FittedQuality | PublishedQuality:
    """Return the quality that a file names: ``published`` a file of points, the other keys a measured table.

    Raises:
        CalibrationError: if it names none of that kind.
    """
    suffix, kind = (".yaml", "file of published points") if key == "published" else (".json", "measured table")
    names = [other.stem for other in sorted(QUALITIES.glob(f"*{suffix}")) if suffix == ".json" or _has_points(other)]
    if name not in names:
        raise CalibrationError(f"{path}: {key} is {name!r}; it must name a {kind} of conf/quality: {', '.join(names)}")
    return load_quality(name)


def _has_points(path: Path) -> bool:
    value = _read_yaml(path)
    return isinstance(value, Mapping) and "points" in value


def _read_yaml(path: Path) -> Any:
    """Return the contents of a YAML file.

    Raises:
        CalibrationError: if it is malformed.
    """
    try:
        return OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except (OSError, UnicodeDecodeError, YAMLError, OmegaConfBaseException, RecursionError, AssertionError) as error:
        # OmegaConf asserts that a file holds no quoted text alone.
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CalibrationError(f"{path} cannot be read as YAML: {reason}; compare it with its neighbors") from error


def fitted_path(table: Path) -> Path:
    """Return the file with the coefficients that were fitted to a table."""
    return table.parent / "fitted" / table.name


def table_hash(table: Path) -> str:
    """Return the SHA-256 of a table's bytes, in hexadecimal."""
    return hashlib.sha256(table.read_bytes()).hexdigest()


def read_fitted(table: Path, form: str = BEST_FORM, text: Text = "test") -> FittedQuality:
    """Read the coefficients that ``hw.score kind=fit`` fitted to a table; see ``load_quality``.

    Raises:
        CalibrationError: for an unknown form or text, or coefficients that are missing, malformed or stale.
    """
    if form not in FORMS:
        raise CalibrationError(f"unknown form {form!r}; {nearest(form, FORMS)}")
    if text not in get_args(Text):
        raise CalibrationError(f"there is no text {text!r}; {nearest(text, get_args(Text))}")
    path = fitted_path(table)
    again = f"fit it again: python -m hw.score kind=fit model.name={table.stem}"
    value = read_json_object(path, CalibrationError, again)
    try:
        fitted_to, now = str(value["table_sha256"]), table_hash(table)
        fit = next(fit for fit in value["fits"] if (fit["text"], fit["form"]) == (text, form))
        quality = FittedQuality.from_json(str(value["model"]), fit)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, StopIteration) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise CalibrationError(
            f"{path} has no coefficients of form {form!r} on the {text} text ({reason}); {again}"
        ) from error
    if fitted_to != now:
        raise CalibrationError(
            f"{path} was fitted to a table with SHA-256 {fitted_to[:12]}..., but {table} has {now[:12]}...; {again}"
        )
    return replace(quality, added=read_added_losses(table, text, quality.name, len(quality.kv)))


def read_published(path: Path) -> PublishedQuality:
    """Read a file of published points.

    Raises:
        CalibrationError: if it is malformed.
    """
    value = _read_yaml(path)
    try:
        points = tuple(
            PublishedPoint(
                drop_mha=_layers(point["drop_mha"]),
                drop_ffn=_layers(point["drop_ffn"]),
                perplexity=_perplexity(point["perplexity"]),
                source=str(point["source"]),
            )
            for point in value["points"]
        )
        return PublishedQuality(
            model=load_model(str(value["model"])),
            dense_perplexity=_perplexity(value["dense_perplexity"]),
            points=points,
            w4_layers=_layers(value["w4"]["layers"]),
            w4_perplexity=tuple(map(_perplexity, value["w4"]["perplexity"])),
        )
    except RapLabError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise CalibrationError(f"{path} lacks or misstates {' '.join(str(error).split())[:300]}") from error


def _layers(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(type(layer) is int and layer >= 0 for layer in value):
        raise ValueError(f"a list of layers: {value!r:.80}")
    return tuple(value)


def _perplexity(value: Any) -> float:
    found = float(value)
    if not 1.0 < found <= MOST_PERPLEXITY:
        raise ValueError(f"a perplexity: {value!r:.80} is not a number above 1, at most {MOST_PERPLEXITY:g}")
    return found
