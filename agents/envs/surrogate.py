"""The loss of many keep masks at once, from a quality model fitted to losses on one of two texts.

Policies decide on losses of the calibration text. Results are reported on losses of the test text, which no block
order, training or decision uses.
"""

from __future__ import annotations

from functools import cache

import numpy as np

from sim.cost.plan_features import pair_features, unwarp
from sim.cost.quality import BEST_FORM, QUALITIES, FittedQuality, Text, read_fitted
from sim.errors import CalibrationError, nearest
from sim.types import Bools, Floats

# Shapes: n masks, b blocks in the order MHA0, FFN0, MHA1, ...


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
    """Return the loss of each mask in nats per token more than dense, float64[n]; ``FittedQuality.loss`` on arrays.

    Args:
        quality: the fitted model. removed: bool[n, b], the dropped blocks.
    """
    dropped = removed.astype(np.float64)
    score = dropped @ quality.blocks
    if quality.pairs.any():
        score += pair_features(dropped, quality.root) @ quality.pairs
    losses: Floats = quality.charged(np.minimum(unwarp(score, quality.curve), quality.max_loss))
    return losses


def single_losses(quality: FittedQuality) -> Floats:
    """Return the loss of dropping each block alone, in nats per token, float64[b]."""
    return mask_losses(quality, np.eye(quality.blocks.size, dtype=np.bool_))
