"""Ada-KV: the heads of a layer share one budget of tokens, and each keeps those that recent queries attend to most.

    score of a token in a head = mean over the last 64 queries, and over the query heads of the KV head, of its
                                 attention; then the mean over 5 neighboring tokens (SnapKV's pooling)

A layer may keep B tokens a head in the mean. The 64 observed tokens stay, and 0.20 B tokens of every head. All other
places go to the highest scores of all heads together. So a head whose attention is spread gets more tokens than one
that looks at few.

Source:
    Ada-KV (arXiv 2407.11550), algorithm 1, with the constants of the implementations FFY0/AdaKV and NVIDIA/kvpress.
    Assumptions: the 64 tokens count toward B and toward 0.20 B; fractions of tokens are rounded down for 0.20 B, and to
    the nearest for a layer's total.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from hw.elastic.kv_compression.prompt_kv import LayerKV, StoredKV, attention, kept_tokens

# Shapes: h KV heads, p tokens of the prompt, n observed queries, m = p - n earlier tokens.

QUERIES, POOL, SAFEGUARD = 64, 5, 0.20
"""Observed queries, neighbors whose scores are averaged, and the share of B that every head keeps."""


def head_scores(layer: LayerKV, queries: int = QUERIES) -> Tensor:
    """Return the scores of the tokens before the observed ones, [h, m] in FP32."""
    found = attention(layer, queries)[:, :, : layer.tokens - queries].mean(1)
    pooled = functional.avg_pool1d(found, POOL, stride=1, padding=POOL // 2)  # beyond the ends are zeros
    return pooled.view(layer.heads, -1, pooled.shape[-1]).mean(1)


def select(scores: Tensor, recent: int, total: int) -> Tensor:
    """Return which tokens each head keeps, bool [h, p], exactly ``total`` in all heads together.

    Args:
        scores: [h, m]; of equal ones the earlier head and token counts first.
        recent: how many tokens follow those with scores; they all stay.
        total: tokens to keep, of all heads.
    Raises:
        ValueError: for a total that has no room for the recent tokens, or exceeds all tokens.
    """
    heads, earlier = scores.shape
    _check_total(heads, earlier, recent, total)
    certain = max(0, int(SAFEGUARD * total / heads) - recent)
    # Each head's best tokens come before all others.
    order = scores.argsort(dim=-1, descending=True, stable=True)
    raised = scores.scatter(-1, order[:, :certain], torch.inf)
    chosen = raised.flatten().argsort(dim=-1, descending=True, stable=True)[: total - heads * recent]
    kept = torch.zeros(heads * earlier, dtype=torch.bool, device=scores.device)
    kept[chosen] = True
    return _with_recent(kept.view(heads, earlier), recent)


def select_equal(scores: Tensor, recent: int, total: int) -> Tensor:
    """Return the same with equal budgets of all heads (SnapKV); what does not divide goes to the first heads.

    Raises:
        ValueError: as ``select``.
    """
    heads, earlier = scores.shape
    _check_total(heads, earlier, recent, total)
    order = scores.argsort(dim=-1, descending=True, stable=True)
    kept = torch.zeros_like(scores, dtype=torch.bool)
    for head in range(heads):
        kept[head, order[head, : total // heads + (head < total % heads) - recent]] = True
    return _with_recent(kept, recent)


def _with_recent(kept: Tensor, recent: int) -> Tensor:
    return functional.pad(kept, (0, recent), value=True)


def _check_total(heads: int, earlier: int, recent: int, total: int) -> None:
    if not heads * recent <= total <= heads * (earlier + recent):
        raise ValueError(
            f"a budget of {total} tokens of {heads} heads; the {recent} observed tokens of each stay and there are "
            f"{earlier + recent}, so it must be from {heads * recent} to {heads * (earlier + recent)}: observe fewer "
            "queries, or take a longer prompt"
        )


def observed_tokens(stored_tokens: int) -> int:
    """Return how many of a prompt's last tokens are observed and stay, if each head keeps this many in the mean.

    Half of them at most, so that the shorter a prompt, the fewer its last tokens decide.
    """
    return max(1, min(QUERIES, stored_tokens // 2))


def compress(layer: LayerKV, factor: float, queries: int = QUERIES, *, equal: bool = False) -> StoredKV:
    """Return a layer's KV with this share of its tokens.

    Args:
        equal: give all heads the same budget.
    Raises:
        ValueError: as ``select``.
    """
    return kept_tokens(layer, chosen(layer, round(factor * layer.heads * layer.tokens), queries, equal=equal))


def chosen(layer: LayerKV, total: int, queries: int, *, equal: bool = False) -> Tensor:
    """Return which tokens each head of a layer keeps, bool [h, p], ``total`` in all heads together.

    Raises:
        ValueError: as ``select``.
    """
    return (select_equal if equal else select)(head_scores(layer, queries), queries, total)
