"""ThinK: the channels of keys that queries use least are not stored.

    score of channel c of a KV head = mean(q_c^2) * mean(k_c^2)

over the last 32 queries and the query heads of the KV head, and over the prompt's keys: up to a constant, the squared
Frobenius norm of what the channel adds to the attention scores. The lowest channels of each head are dropped from the
keys of all tokens but the last 32; queries then multiply with the others. Values and later tokens stay as they are, so
at most half of the KV can go.

Source:
    ThinK (arXiv 2407.21018), section 3.2, and its implementation (SalesforceAIResearch/ThinK), for 32 and 32. The mean
    over query heads is that of NVIDIA/kvpress; ThinK's own code repeats the keys for each query head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hw.elastic.kv_compression.prompt_kv import LayerKV, StoredKV

# Shapes: H query heads, h KV heads, p tokens of the prompt, n observed queries, d head_dim.

QUERIES = RECENT = 32
"""Observed queries, and how many of the last tokens keep all channels."""


def channel_scores(queries: Tensor, keys: Tensor) -> Tensor:
    """Return the scores [h, d], in FP32, of queries [H, n, d] and keys [h, p, d]."""
    of_queries = queries.float().square().reshape(len(keys), -1, keys.shape[-1]).mean(1)
    return of_queries * keys.float().square().mean(1)


def lowest_channels(scores: Tensor, count: int) -> Tensor:
    """Return which channels of each head go, bool [h, d]: the ``count`` lowest, of equal ones the first."""
    order = scores.argsort(dim=-1, stable=True)
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, order[:, :count], True)


def channels_to_drop(factor: float, tokens: int, head_dim: int, recent: int = RECENT) -> int:
    """Return how many channels of a head go so that this share of the KV is stored, to the nearest.

    Raises:
        ValueError: if no number of channels frees as much.
    """
    count = round(2 * (1 - factor) * head_dim * tokens / max(1, tokens - recent))
    if count > head_dim or (count and tokens <= recent):
        raise ValueError(
            f"ThinK cannot store {factor:g} of the KV of {tokens} tokens: without any channel of the keys of all but "
            f"the last {recent}, {1 - 0.5 * max(0, tokens - recent) / tokens:.2f} are left"
        )
    return count


def channels_that_fit(tokens: int, stored_tokens: int, head_dim: int) -> tuple[int, int]:
    """Return how many channels of a head go, and how many last tokens keep all, so that a prompt fits.

    It then takes at most the bytes of ``stored_tokens`` tokens, which must be at least half as many as the prompt has.
    The tokens that keep all channels are the last ``RECENT``, or fewer so that they take at most half of the room for
    keys.
    """
    freed = tokens - stored_tokens
    assert freed > 0
    assert 2 * stored_tokens >= tokens
    recent = min(RECENT, (2 * stored_tokens - tokens) // 2)
    return -(-2 * head_dim * freed // (tokens - recent)), recent


def unused_channels(layer: LayerKV, count: int, queries: int = QUERIES) -> Tensor:
    """Return which ``count`` channels of each head queries use least, bool [h, d]."""
    return lowest_channels(channel_scores(layer.queries[:, -queries:], layer.keys), count)


def compress(layer: LayerKV, factor: float, queries: int = QUERIES, recent: int = RECENT) -> StoredKV:
    """Return a layer's KV without the channels that queries use least.

    Raises:
        ValueError: as ``channels_to_drop``.
    """
    head_dim = layer.keys.shape[-1]
    count = channels_to_drop(factor, layer.tokens, head_dim, recent)
    keys = layer.keys
    if count:
        keys = without_channels(layer.keys, unused_channels(layer, count, queries), recent)
    share = 1.0 - count * max(0, layer.tokens - recent) / (2 * head_dim * layer.tokens)
    return StoredKV(keys=keys, values=layer.values, share=share)


def without_channels(keys: Tensor, gone: Tensor, recent: int) -> Tensor:
    """Return keys [h, p, d] with zeros in the channels ``gone`` [h, d] of all but the last ``recent`` tokens."""
    earlier = keys.shape[1] - recent
    left = keys.clone()
    left[:, :earlier] = left[:, :earlier].masked_fill(gone[:, None], 0.0)
    return left
