"""What a prompt leaves in each layer of a model, and what a method stores of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# Shapes: H query heads, h KV heads, p tokens of the prompt, n observed queries (of its last tokens), d head_dim.


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerKV:
    """What one layer has computed of a prompt when its prefill ends.

    queries: [H, n, d], rotated, of the last n tokens. keys: [h, p, d], rotated. values: [h, p, d].
    cos, sin: [p, d_rot] of the rotation of the keys, None without rotation. scale: of the attention scores.
    window: how many tokens back attention looks; None for all.
    """

    queries: Tensor
    keys: Tensor
    values: Tensor
    scale: float
    cos: Tensor | None = None
    sin: Tensor | None = None
    window: int | None = None

    @property
    def heads(self) -> int:
        """KV heads."""
        return len(self.keys)

    @property
    def tokens(self) -> int:
        """Tokens of the prompt."""
        return self.keys.shape[1]


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredKV:
    """What a method stores of a layer's KV, as later tokens read it.

    keys, values: [h, p, d]; numbers that are not stored hold what reading yields (0 in a dropped channel).
    kept: [h, p], which tokens each head still sees; None for all.
    share: bytes that are stored, over those of the full keys and values.
    """

    keys: Tensor
    values: Tensor
    share: float
    kept: Tensor | None = None


Compress = Callable[[int, LayerKV], StoredKV | None]
"""A method: from a layer's number and its KV to what is stored; None: the layer's MHA block does not run any more."""


def full(layer: LayerKV) -> StoredKV:
    """Return all KV as it is."""
    return StoredKV(keys=layer.keys, values=layer.values, share=1.0)


def kept_tokens(layer: LayerKV, kept: Tensor) -> StoredKV:
    """Return the KV of the tokens ``kept`` [h, p]."""
    return StoredKV(keys=layer.keys, values=layer.values, share=int(kept.sum()) / kept.numel(), kept=kept)


def attention(layer: LayerKV, queries: int) -> Tensor:
    """Return the attention of the prompt's last tokens, [H, queries, p] in FP32; rows sum to 1.

    Raises:
        ValueError: for more queries than were observed.
    """
    observed = layer.queries.shape[1]
    if not 1 <= queries <= observed:
        raise ValueError(f"attention of {queries} queries, but those of the last {observed} tokens were observed")
    wide = layer.queries[:, -queries:].float()
    keys = layer.keys.float().repeat_interleave(len(wide) // layer.heads, 0)
    scores = wide @ keys.transpose(1, 2) * layer.scale
    at = torch.arange(layer.tokens, device=scores.device)
    seen = at[None] <= at[-queries:, None]
    if layer.window is not None:
        seen &= at[None] > at[-queries:, None] - layer.window
    return scores.masked_fill(~seen, -torch.inf).softmax(-1)
