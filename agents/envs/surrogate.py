"""What a mask loses, for many masks at once, from a quality table fitted to one of its two texts.

Who decides may know the losses on the calibration text; figures are reported from the losses on the test text, which no
order, no training and no decision has seen.
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

    On the calibration text plans whose stages differ, or that cut KV, were not measured behind a prompt; they are left
    out there.

    Raises:
        CalibrationError: for another text, or a model without a measured table.
    """
    if text not in ("calibration", "test"):
        raise CalibrationError(f"there is no text {text!r}; {nearest(text, ('calibration', 'test'))}")
    path = QUALITIES / f"{name}.json"
    if not path.exists():
        known = sorted(p.stem for p in QUALITIES.glob("*.json"))
        raise CalibrationError(f"no measured quality table of {name!r}; {nearest(name, known)}")
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
    """Return the quality model fitted to the table of one text."""
    return fit(table_on(name, text), form)


def mask_losses(quality: FittedQuality, removed: Bools) -> Floats:
    """Return nats a token more than dense, of every mask [n, b]: ``FittedQuality.loss`` on arrays."""
    dropped = removed.astype(np.float64)
    score = dropped @ quality.blocks
    if quality.pairs.any():
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
        score = np.expm1(np.minimum(quality.curve * score, 40.0)) / quality.curve
    return np.minimum(score, quality.max_loss)


def single_losses(quality: FittedQuality) -> Floats:
    """Return what each block costs alone [b]."""
    return mask_losses(quality, np.eye(quality.blocks.size, dtype=np.bool_))
