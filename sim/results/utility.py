"""Utility: the share of requests that met their SLO, each weighted by the quality that it kept."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from sim.types import Floats


def kept_quality(loss: Floats) -> Floats:
    """Return the share of quality kept, exp(-loss), at most 1; ``loss`` is in nats per token more than dense."""
    return np.exp(-np.maximum(loss, 0.0))


def utility(met: NDArray[np.bool_], quality_nll: Floats, dense_nll: float) -> float:
    """Return the utility of requests, in [0, 1]; 1 without any.

    Args:
        met: bool[n], which requests met the SLO. quality_nll: float64[n], nats per token of the plans they ran under.
        dense_nll: of the dense model.
    """
    if not len(met):
        return 1.0
    loss = np.where(met, quality_nll - dense_nll, 0.0)
    return float((kept_quality(loss) * met).sum()) / len(met)
