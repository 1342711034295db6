"""Numbers that a fit of the loss sees of a plan (``sim.cost.quality``), and the curve between scores and losses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from sim.cost.plan import KV_KEEP_ALL, Plan
from sim.types import Floats

KV_ALONE_TOKENS = 36
"""Tokens kept in the plans that cut one layer's KV alone: the first 4 and the last 32."""

# Shapes: n plans, b blocks in the order MHA0, FFN0, MHA1, ..., l layers.


def removed_shares(plan: Plan, stage_share: float) -> Floats:
    """Return r [b]: 1 if a block is removed in both stages, ``stage_share`` if only decode drops it, else 0."""
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


def precision_and_kv_features(plan: Plan, kv: Sequence[float]) -> tuple[float, float, float, float, float]:
    """Return the shares of W4 layers, the same squared, of W8 layers, the cut KV, and the share without first tokens.

    kv [l] is what cutting each layer's KV alone costs, in nats.
    """
    bits = plan.product_bits
    layers = len(bits)
    four, eight = bits.count(4) / layers, bits.count(8) / layers
    cut = no_first = 0.0
    if plan.kv_keep.count(KV_KEEP_ALL) != layers:
        for keep, cost in zip(plan.kv_keep, kv, strict=True):
            if keep.first_tokens is not None and keep.last_tokens is not None:
                cut += cost * KV_ALONE_TOKENS / (keep.first_tokens + keep.last_tokens)
                no_first += (keep.first_tokens == 0) / layers
    return four, four * four, eight, cut, no_first


def pair_features(removed: Floats, root: Floats) -> Floats:
    """Return the features [n, 5] of removed pairs of blocks, from r [n, b] and sqrt(s) [b].

    In order: both blocks of a layer; an FFN and the next MHA block; neighboring MHA blocks; neighboring FFN blocks; all
    pairs.
    """
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


def pair_score(removed: Floats, root: Floats, pairs: Sequence[float]) -> float:
    """Return ``pair_features`` times their coefficients for one plan, in a quarter of the time."""
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


def warp(loss: Floats, curve: float) -> Floats:
    """Return log(1 + k D) / k of losses D, the left side of the module's equation; D itself for k = 0."""
    if not curve:
        return loss
    # Measured losses may be slightly negative; the logarithm must stay finite.
    return np.log1p(np.maximum(curve * loss, -0.95)) / curve


def unwarp(score: Any, curve: float) -> Any:
    """Return the losses whose ``warp`` is ``score``."""
    # Limit the exponent so that it cannot overflow; a loss near e^40 means no more than one just below it.
    return np.expm1(np.minimum(curve * score, 40.0)) / curve if curve else score
