"""ReFreeKV: the middle of a prompt is dropped, from the front, until attention has lost a share of its norm.

Tokens are ranked by place: the first ones and the last ones stay longest. In each layer the oldest token after the
first ones is evicted, and so on, while

    (mean over query heads of |A| - mean over query heads of |A without the evicted|) / mean of |A|  <  threshold

where A is the attention of the prompt's last token and |A| its Frobenius norm. The number of tokens is an outcome: it
differs between layers and prompts. 1 % is the published threshold.

Source:
    ReFreeKV, first named DBudgetKV (arXiv 2502.16886), sections 3.2 and 3.3; attention of the last token and the mean
    over heads are those of its implementation (Patrick-Ni/ReFreeKV, ``last_token_attn``). Assumption: the first tokens
    that always stay are 4, as in StreamingLLM.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hw.elastic.kv_compression.prompt_kv import LayerKV, StoredKV, attention, kept_tokens

# Shapes: H query heads, h KV heads, p tokens of the prompt, n queries.

FIRST = 4
"""Tokens at the front that always stay."""
PUBLISHED = 0.01
"""The threshold of the paper."""
STEPS = 40
"""Halvings of the interval in which a threshold is searched."""


def lost_norm(found: Tensor, first: int = FIRST) -> Tensor:
    """Return the share of the norm that is lost once 0, 1, ... tokens are evicted, FP64 [p - first].

    The last entry leaves the first tokens and the last one.

    Args:
        found: attention [H, n, p]. first: tokens at the front that always stay.
    """
    squares = found.double().square().sum(1)  # [H, p]: what each token adds to the squared norm
    front = squares[:, :first].sum(1, keepdim=True)
    left = squares[:, first:].flip(1).cumsum(1).flip(1) + front
    norms = left.sqrt().mean(0)
    return (norms[0] - norms) / norms[0]


def evicted_tokens(lost: Tensor, threshold: float) -> int:
    """Return how many tokens are evicted before ``threshold`` of the norm is lost; a threshold of 0 evicts none."""
    return max(0, int((lost < threshold).sum()) - 1)


def kept_places(tokens: int, evicted: int, first: int = FIRST) -> Tensor:
    """Return which of a prompt's tokens stay, bool [p]."""
    at = torch.arange(tokens)
    return (at < first) | (at >= first + evicted)


def curve(layer: LayerKV) -> Tensor:
    """Return ``lost_norm`` of the attention of a prompt's last token."""
    return lost_norm(attention(layer, 1))


def mean_share(curves: Sequence[Tensor], threshold: float, first: int = FIRST) -> float:
    """Return the share of tokens that stays, in the mean of these curves, one for each layer and prompt."""
    kept = [1.0 - evicted_tokens(lost, threshold) / (len(lost) + first) for lost in curves]
    return sum(kept) / len(kept)


def threshold_for(curves: Sequence[Tensor], share: float) -> float:
    """Return the threshold at which this share of tokens stays in the mean of the curves, from above."""
    low, high = 0.0, 1.0
    for _ in range(STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if mean_share(curves, middle) >= share else (low, middle)
    return low


def compress(layer: LayerKV, threshold: float) -> StoredKV:
    """Return a layer's KV without the tokens that the threshold allows to evict; all heads keep the same."""
    kept = kept_places(layer.tokens, evicted_tokens(curve(layer), threshold)).to(layer.keys.device)
    return kept_tokens(layer, kept.expand(layer.heads, -1))
