"""The loss of many keep masks at once, from a quality model fitted to losses on one of two texts.

Policies decide on losses of the calibration text. Results are reported on losses of the test text, which no block
order, training or decision uses.
"""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from typing import Literal

import numpy as np

from sim.cost.quality import BEST_FORM, QUALITIES, FittedQuality, QualityTable, fit, read_table
from sim.errors import CalibrationError, nearest
from sim.types import Bools, Floats

# Shapes: n masks, b blocks in the order MHA0, FFN0, MHA1, ...

Text = Literal["calibration", "test"]


def table_on(name: str, text: Text) -> QualityTable:
    """Return the table of ``conf/quality/NAME.json`` with the losses measured on one of its texts.

    The table of the calibration text leaves out plans that differ between prefill and decode or that drop KV: on that
    text they were not measured behind a prompt.

    Raises:
        CalibrationError: for an unknown text, or a model without a measured table.
    """
    if text not in ("calibration", "test"):
        raise CalibrationError(f"there is no text {text!r}; {nearest(text, ('calibration', 'test'))}")
    path = QUALITIES / f"{name}.json"
    if not path.exists():
        known = sorted(p.stem for p in QUALITIES.glob("*.json"))
        raise CalibrationError(f"conf/quality has no measured table of {name!r}; {nearest(name, known)}")
    table = read_table(path)
    if text == "test":
        return table
    rows = json.loads(path.read_text(encoding="utf-8"))["plans"]
    dense = next(row for row in rows if "dense" in row["chosen_as"])
    used = [i for i, plan in enumerate(table.plans) if plan.prefill == plan.decode and len(set(plan.kv_keep)) == 1]
    return replace(
        table,
        dense_nll=float(dense["nll_calibration"]),
        plans=tuple(table.plans[i] for i in used),
        kinds=tuple(table.kinds[i] for i in used),
        loss=np.array([float(rows[i]["nll_calibration"]) - float(dense["nll_calibration"]) for i in used]),
        note=f"{len(used)} plans on the calibration text",
    )


@cache
def quality_on(name: str, text: Text, form: str = BEST_FORM) -> FittedQuality:
    """Return the quality model fitted to the losses on one text."""
    return fit(table_on(name, text), form)


def mask_losses(quality: FittedQuality, removed: Bools) -> Floats:
    """Return the loss of each mask in nats per token more than dense, float64[n]; ``FittedQuality.loss`` on arrays.

    Args:
        quality: the fitted model. removed: bool[n, b], the dropped blocks.
    """
    dropped = removed.astype(np.float64)
    score = dropped @ quality.blocks
    if quality.pairs.any():
        # Extra loss of pairs: MHA and FFN of one layer, FFN and the next MHA, neighbors of one kind, and any two
        # blocks.
        weighted = dropped * quality.root
        mha, ffn = weighted[:, 0::2], weighted[:, 1::2]
        total = weighted.sum(axis=1)
        score += (
            quality.pairs[0] * (mha * ffn).sum(axis=1)
            + quality.pairs[1] * (ffn[:, :-1] * mha[:, 1:]).sum(axis=1)
            + quality.pairs[2] * (mha[:, :-1] * mha[:, 1:]).sum(axis=1)
            + quality.pairs[3] * (ffn[:, :-1] * ffn[:, 1:]).sum(axis=1)
            + quality.pairs[4] * (total * total - (weighted * weighted).sum(axis=1))
        )
    if quality.curve:
        # The exponent is capped at 40 to avoid overflow; max_loss cuts the result anyway.
        score = np.expm1(np.minimum(quality.curve * score, 40.0)) / quality.curve
    return np.minimum(score, quality.max_loss)


def single_losses(quality: FittedQuality) -> Floats:
    """Return the loss of dropping each block alone, in nats per token, float64[b]."""
    return mask_losses(quality, np.eye(quality.blocks.size, dtype=np.bool_))
