"""What each method stores of a prompt under a plan, stated plainly: the reference of packing and of the engine."""

from __future__ import annotations

import math

from hw.elastic.kv_compression import ada_kv, lorc, think
from hw.elastic.kv_compression.prompt_kv import LayerKV, StoredKV, full, kept_tokens
from sim.cost.plan import KVCompression
from tests.hw.serving import torch

Pair = tuple[lorc.Directions, lorc.Directions]


def plain_stored(way: KVCompression | None, layer: LayerKV, directions: Pair | None = None) -> StoredKV:
    """Return what later tokens read of a layer's prompt; ``directions``: of its keys and values, for LoRC."""
    heads, tokens, head_dim = layer.keys.shape
    slots = tokens if way is None else math.ceil(tokens * way.percent / 100 - 1e-9)
    if way is None or slots == tokens:
        return full(layer)
    if way.method == "ada_kv":
        recent = max(1, min(64, slots // 2))
        return kept_tokens(layer, ada_kv.select(ada_kv.head_scores(layer, recent), recent, slots * heads))
    if way.method == "refree_kv":
        first = min(4, slots - 1)
        kept = [token < first or token >= tokens - (slots - first) for token in range(tokens)]
        return kept_tokens(layer, torch.tensor(kept).expand(heads, -1))
    if way.method == "think":
        recent = min(32, (2 * slots - tokens) // 2)
        count = math.ceil(2 * (tokens - slots) * head_dim / (tokens - recent))
        scores = think.channel_scores(layer.queries[:, -32:], layer.keys)
        keys = layer.keys.clone()
        for head in range(heads):
            for channel in scores[head].argsort(stable=True)[:count].tolist():
                keys[head, : tokens - recent, channel] = 0.0
        return StoredKV(keys=keys, values=layer.values, share=float("nan"))
    assert directions is not None
    rank = min(heads * head_dim * way.percent // 100, directions[0].count)
    return lorc.compress(layer, *directions, rank)
