"""What a mask loses, for many masks at once, from a quality table fitted to one of its two texts.

Who decides may know the losses on the calibration text; figures are reported from the losses on the test text, which no
order, no training and no decision has seen.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray

from sim.cost.quality import BEST_FORM, QUALITIES, FittedQuality, Text, read_fitted
from sim.errors import CalibrationError, nearest
from sim.policies.observation.prune import Bools

# Shapes: n masks, b blocks in the order MHA0, FFN0, MHA1, ...

Floats = NDArray[np.float64]


@cache
def quality_on(name: str, text: Text, form: str = BEST_FORM) -> FittedQuality:
    """Return the quality model fitted to the measured table of one text.

    Raises:
        CalibrationError: for another text or form, or a model without a measured table.
    """
    path = QUALITIES / f"{name}.json"
    if not path.exists():
        known = sorted(p.stem for p in QUALITIES.glob("*.json"))
        raise CalibrationError(f"no measured quality table of {name!r}; {nearest(name, known)}")
    return read_fitted(path, form, text)


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
