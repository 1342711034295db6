"""The kind ``width`` of ``hw.score``: the loss of FFN blocks cut to 7/8, 3/4 and 5/8 of their channels.

Channels are chosen by FLAP's importance (``hw.score.ffn_slices``), layers in three orders. Dropped FFN blocks, in two
orders, and layers at 4 bits that free at least as many bytes stand next to them. Channels chosen at random, in all
layers, show what the importance is worth. Nothing is chosen on the test text.

The loss of a plan is taken as a sum over layers. Each layer alone is measured at 5/8. The loss of each width in all
layers and in prefixes of each order says by how much the sum is off: one factor a width. Layers with random widths are
only predicted: their errors are in the file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

import numpy as np
import torch

from hw.elastic.channel_scores import ChannelScores, channel_scores
from hw.elastic.model import ElasticModel
from hw.elastic.processor import processor_name
from hw.elastic.text import Windows
from hw.score.block_numbers import plan_without
from hw.score.ffn_slices import FFNSlice, ffn_slice
from hw.score.figures import Figures
from hw.score.job import Job
from hw.score.nll import measure_many
from hw.score.width_page import mean_loss, page, plot
from sim.cost.ffn_width import FFN_WIDTHS, ffn_channels
from sim.cost.memory import ffn_weight_bytes, layer_weight_bytes, weight_bytes
from sim.cost.model_spec import ModelSpec
from sim.cost.plan import Plan, dense_plan
from sim.cost.quality import Text
from sim.errors import ConfigError
from sim.progress import progress

CUT_WIDTHS = tuple(width for width in FFN_WIDTHS if width < 8)
LEAST = min(FFN_WIDTHS)
AT_ONCE = 12
"""Plans that are measured between two reports of progress."""
ORDERS = ("least loss first", "front first", "deepest first")
DROP_ORDERS = {"one_shot": "least loss alone first", "gsi": "GSI's order"}
"""Kinds of ``hw.score`` whose orders drop FFN blocks, and how the file names them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """A plan to measure, with FFN blocks that are cut.

    kind: which of the file's rows it is. setting: of the kind, as text. widths: of each layer, in eighths. plan: all
    else. freed: bytes of weights less than dense. random: whether channels are chosen at random, not by importance.
    """

    kind: str
    setting: str
    widths: tuple[int, ...]
    plan: Plan
    freed: int
    random: bool = False


def cut_bytes(spec: ModelSpec, width: int) -> int:
    """Return the bytes that cutting an FFN block to a width in eighths frees."""
    return ffn_weight_bytes(spec) - ffn_weight_bytes(spec, width=width)


def cut(spec: ModelSpec, kind: str, setting: str, widths: Mapping[int, int]) -> Variant:
    """Return the variant whose layers have these widths; the others have all channels."""
    return Variant(
        kind=kind,
        setting=setting,
        widths=tuple(widths.get(layer, 8) for layer in range(spec.num_layers)),
        plan=dense_plan(spec),
        freed=sum(cut_bytes(spec, width) for width in widths.values()),
    )


def single_layers(spec: ModelSpec) -> list[Variant]:
    """Return the dense plan and each layer alone at the least width."""
    dense = cut(spec, "dense", "", {})
    return [dense, *(cut(spec, "one layer", f"layer {i}", {i: LEAST}) for i in range(spec.num_layers))]


def width_variants(
    spec: ModelSpec,
    alone: Sequence[float],
    counts: Sequence[int],
    drop_first: Mapping[str, Sequence[int]],
    *,
    mixed: int,
    seed: int,
) -> list[Variant]:
    """Return the other variants to measure.

    Args:
        spec: the model.
        alone: loss of each layer alone at the least width, on calibration text; it gives the first order.
        counts: numbers of layers that are cut; all of them are cut as well.
        drop_first: name of an order -> FFN blocks' layers in the order in which they are dropped.
        mixed: how many plans with random widths. seed: of those.
    """
    layers = spec.num_layers
    by_loss = np.argsort(alone, kind="stable").tolist()
    orders = dict(zip(ORDERS, (by_loss, list(range(layers)), list(range(layers))[::-1]), strict=True))
    found = []
    for width in CUT_WIDTHS:
        for name, order in orders.items():
            setting = f"{width}/8, {name}"
            found += [cut(spec, "width", setting, dict.fromkeys(order[:count], width)) for count in counts]
        found.append(cut(spec, "width", f"{width}/8, all", dict.fromkeys(range(layers), width)))
    levels = sorted({one.freed for one in found})
    everywhere = [one for one in found if min(one.widths) == max(one.widths)]
    found += rivals(spec, levels, drop_first)
    found += [replace(one, kind="random channels", random=True) for one in everywhere]
    rng = np.random.default_rng(seed)
    for number in range(mixed):
        widths = {layer: int(width) for layer, width in enumerate(rng.choice(FFN_WIDTHS, layers))}
        found.append(cut(spec, "mixed", str(number), widths))
    return found


def rivals(spec: ModelSpec, levels: Sequence[int], drop_first: Mapping[str, Sequence[int]]) -> list[Variant]:
    """Return the fewest dropped FFN blocks, and the fewest layers at 4 bits, that free as much as each level."""
    layers = spec.num_layers
    block, swap = ffn_weight_bytes(spec), layer_weight_bytes(spec) - layer_weight_bytes(spec, 4)
    full = (8,) * layers
    found = []
    for dropped in sorted({-(-level // block) for level in levels}):
        for name, order in drop_first.items():
            plan = plan_without(spec, [2 * layer + 1 for layer in order[:dropped]])
            setting = f"{dropped} blocks, {name}"
            found.append(Variant(kind="dropped FFN", setting=setting, widths=full, plan=plan, freed=dropped * block))
    for swapped in sorted({min(layers, -(-level // swap)) for level in levels}):
        plan = replace(dense_plan(spec), weight_bits=(4,) * swapped + (spec.weight_bits,) * (layers - swapped))
        setting = f"first {swapped} layers"
        found.append(Variant(kind="4 bits", setting=setting, widths=full, plan=plan, freed=swapped * swap))
    return found


class Slicer:
    """Slices of FFN blocks, each made once, so that plans have in common what is equal."""

    def __init__(self, elastic: ElasticModel, scores: ChannelScores, seed: int) -> None:
        """Cut the blocks of a model by scores of its channels, or by random ones from a seed."""
        drawn = np.random.default_rng(seed).random(tuple(scores.importance.shape))
        at_random = ChannelScores(torch.from_numpy(drawn).to(scores.importance.device), scores.mean)
        self._elastic, self._scores = elastic, {False: scores, True: at_random}
        self._made: dict[tuple[bool, int, int], FFNSlice] = {}

    def __call__(self, variant: Variant) -> dict[int, FFNSlice]:
        """Return the slices of the layers that a variant cuts."""
        found = {}
        for layer, width in enumerate(variant.widths):
            if width < 8:
                key = variant.random, layer, width
                if key not in self._made:
                    self._made[key] = ffn_slice(self._elastic, self._scores[variant.random], layer, width)
                found[layer] = self._made[key]
        return found


FIGURES = Figures(kind="width", folder="ffn_width", page=page, plot=plot)


def score_width(job: Job) -> None:
    """Measure all variants on both texts, fit each layer's share, and write figures, page and picture.

    Raises:
        ConfigError: for numbers of layers that the model does not have.
    """
    cfg, spec = job.cfg.width, job.elastic.spec
    counts = [int(count) for count in cfg.layers]
    if sorted(set(counts)) != counts or not all(0 < count < spec.num_layers for count in counts) or cfg.mixed < 1:
        raise ConfigError(
            f"width.layers is {counts} and width.mixed {cfg.mixed}; list numbers from 1 to {spec.num_layers - 1} in "
            "ascending order (all layers are measured anyway), and at least 1 plan with mixed widths"
        )
    drop_first = {
        name: [block // 2 for block in job.order(kind) if block % 2 == 1] for kind, name in DROP_ORDERS.items()
    }
    texts = {"calibration": job.text("calibration"), "test": job.text("test")}
    scored = job.text("calibration", int(cfg.tokens))
    slicer = Slicer(job.elastic, channel_scores(job.elastic, scored.tokens), job.cfg.seed)
    rows = _measured(job.elastic, slicer, single_layers(spec), texts)
    alone = [mean_loss(row, rows[0], "calibration") for row in rows[1:]]
    rest = width_variants(spec, alone, counts, drop_first, mixed=int(cfg.mixed), seed=job.cfg.seed)
    rows += _measured(job.elastic, slicer, rest, texts)
    result = {
        "processor": processor_name(job.elastic.device),
        "test_text": texts["test"].source,
        "channel_text": scored.source,
        "channels": {str(width): ffn_channels(spec.intermediate_size, width) for width in FFN_WIDTHS},
        "weight_bytes": weight_bytes(spec, dense_plan(spec)),
        "ffn_block_bytes": ffn_weight_bytes(spec),
        "fits": {text: fit_width(rows, text) for text in get_args(Text)},
        "variants": rows,
    }
    source = (
        "FLAP (arXiv 2312.11983): NLL of the tokens after half of each window, in nats; the fits are sums over layers"
    )
    job.write(FIGURES.path(job.cfg.out, job.name), texts["calibration"], source, result)
    FIGURES.write_page(job.cfg.out, job.name)


def _measured(
    elastic: ElasticModel, slicer: Slicer, listed: Sequence[Variant], texts: Mapping[str, Windows]
) -> list[dict[str, Any]]:
    """Return the rows of the file for some variants, in their order."""
    # Plans that share their first layers follow one another, so that these layers run once.
    at = sorted(
        range(len(listed)), key=lambda i: (listed[i].plan.weight_bits, listed[i].plan.decode.ffn, listed[i].widths)
    )
    found: dict[int, dict[str, list[float]]] = {i: {name: [] for name in texts} for i in at}
    with progress("measuring", len(listed), "plans") as report:
        for first in range(0, len(at), AT_ONCE):
            part = at[first : first + AT_ONCE]
            plans, cuts = [listed[i].plan for i in part], [slicer(listed[i]) for i in part]
            for name, text in texts.items():
                for window in text.tokens:
                    for i, nll in zip(part, measure_many(elastic, plans, window[None], slices=cuts), strict=True):
                        found[i][name].append(nll.decode_mean)
            report(first + len(part))
    return [
        {
            "kind": one.kind,
            "setting": one.setting,
            "widths": list(one.widths),
            "freed_bytes": one.freed,
            "nll": found[i],
        }
        for i, one in enumerate(listed)
    ]


def fit_width(rows: Sequence[Mapping[str, Any]], text: Text) -> dict[str, Any]:
    """Return what each layer costs at each width, in nats a token, and the error of sums over layers.

    A layer's cost is its loss alone at the least width, times a factor of each width, which is fitted to the plans in
    which only that width is cut. A smaller width never costs less than a larger one.
    """
    dense = next(row for row in rows if row["kind"] == "dense")
    alone = np.array([max(0.0, mean_loss(row, dense, text)) for row in rows if row["kind"] == "one layer"])
    if not alone.any():  # too little text, or a model that loses nothing: every layer costs the same
        alone = np.full(len(alone), 1.0 / len(alone))
    costs: dict[int, list[float]] = {}
    factor = 0.0
    factors = {}
    for width in CUT_WIDTHS:
        own = [row for row in rows if row["kind"] == "width" and min(row["widths"]) == width]
        sums = np.array([alone @ (np.array(row["widths"]) < 8) for row in own])
        loss = np.array([mean_loss(row, dense, text) for row in own])
        factor = max(factor, float(sums @ loss / (sums @ sums)))
        factors[str(width)], costs[width] = factor, (alone * factor).tolist()
    mixed = [row for row in rows if row["kind"] == "mixed"]
    loss = np.array([mean_loss(row, dense, text) for row in mixed])
    predicted = [sum(costs[w][i] for i, w in enumerate(row["widths"]) if w < 8) for row in mixed]
    errors = np.abs(np.array(predicted) - loss)
    return {
        **{str(width): cost for width, cost in costs.items()},
        "factors": factors,
        "errors": {
            "count": len(mixed),
            "mean_loss": float(loss.mean()),
            "mean_error": float(errors.mean()),
            "worst_error": float(errors.max()),
        },
    }
