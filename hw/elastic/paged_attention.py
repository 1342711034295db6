"""One iteration of a batch whose keys and values are in a paged pool: decodes and prompt chunks in one forward pass.

The tokens of all requests form one row, decodes first, so that every linear layer is one product over the full batch.
Attention is computed by request: decodes with about the same context share one call of PyTorch's attention, and each
prompt chunk has its own. A token may skip a block that other tokens run (stage-wise masks, KV holes): MHA blocks select
tokens by request, FFN blocks by stage.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from hw.elastic.ops import _rotate, rms_norm_reference
from hw.elastic.paged_kv import Arena
from sim.cost.memory import kv_blocks
from sim.engine.block_table import BlockTable, ring_positions

# Shapes: t tokens of the iteration, n tokens that run a layer's MHA block, H heads, h KV heads, g = H / h, d head_dim.

PART_BYTES = 1 << 28
"""What one call of attention may take for a moment: for keys and values that it gathers, or scores in FP32.

More is computed in several calls, because no budget counts these bytes: 64 contexts of 1,024 tokens of Llama-2-7B are
1 GiB in every layer.
"""


@dataclass(frozen=True, slots=True)
class Packed:
    """What one request adds to an iteration: ``tokens`` follow the ``start`` tokens whose KV its table holds."""

    table: BlockTable
    tokens: Sequence[int]
    start: int


@dataclass(frozen=True, slots=True)
class _Decodes:
    """Decodes of one call of attention: rows [b] of the layer, blocks [b * width], which keys count [b, k]."""

    rows: Tensor
    blocks: Tensor
    width: int
    seen: Tensor | None


@dataclass(frozen=True, slots=True)
class _Chunk:
    """A prompt chunk: its rows of the layer, the number of tokens before it, and the blocks that hold all of them."""

    start: int
    stop: int
    prefix: int
    blocks: Tensor | None


@dataclass(frozen=True, slots=True)
class _Layer:
    """What the MHA block of one layer sees: rows of the iteration (None: all), their slots, the calls of attention."""

    rows: Tensor | None
    slots: Tensor
    decodes: list[_Decodes]
    chunks: list[_Chunk]


class PagedBatch:
    """The slots of one iteration's KV, arranged for the attention of each layer."""

    def __init__(
        self,
        arena: Arena,
        decodes: Sequence[Packed],
        prefills: Sequence[Packed],
        windows: Sequence[int | None],
        wanted: Sequence[int] = (),
    ) -> None:
        """Look up the slots of the batch's keys and values; ``windows``: sliding window of each layer, None: none."""
        self._arena = arena
        packed, device = [*decodes, *prefills], arena.device
        self.decodes = len(decodes)
        self.tokens = torch.tensor([token for one in packed for token in one.tokens], device=device)
        self.positions = torch.tensor([one.start + i for one in packed for i in range(len(one.tokens))], device=device)
        self.wanted = torch.tensor(wanted, dtype=torch.long, device=device)
        self._decodes, self._prefills = decodes, prefills
        self._windows = windows
        self._layer: _Layer | None = None
        self._shapes: dict[Any, Any] = {}

    def rows(self, layer: int) -> Tensor | None:
        """Prepare a layer; return the rows of the iteration that run its MHA block: None for all, empty for none."""
        self._layer = found = self._look_up(layer)
        return found.rows

    def _look_up(self, layer: int) -> _Layer:
        device, block_tokens = self._arena.device, self._arena.block_tokens
        decodes = [(row, packed) for row, packed in enumerate(self._decodes) if layer in packed.table.mha]
        rows = [row for row, _ in decodes]
        slots = [packed.table.slots(layer, packed.start, 1)[0] for _, packed in decodes]
        chunks: list[_Chunk] = []
        at = len(self._decodes)
        for packed in self._prefills:
            count = len(packed.tokens)
            if layer in packed.table.mha:
                start = len(rows)
                rows.extend(range(at, at + count))
                slots.extend(packed.table.slots(layer, packed.start, count))
                ids = None
                if packed.start:
                    needed = kv_blocks(packed.start + count, block_tokens)
                    ids = torch.tensor(packed.table.blocks[layer][:needed], device=device)
                chunks.append(_Chunk(start, start + count, packed.start, ids))
            at += count
        return _Layer(
            rows=None if len(rows) == at else torch.tensor(rows, dtype=torch.long, device=device),
            slots=torch.tensor(slots, dtype=torch.long, device=device),
            decodes=self._group([packed for _, packed in decodes], layer),
            chunks=chunks,
        )

    def _group(self, decodes: Sequence[Packed], layer: int) -> list[_Decodes]:
        """Group decodes whose contexts fill the same number of blocks, rounded up to a power of two."""
        device, block_tokens = self._arena.device, self._arena.block_tokens
        groups: dict[int, list[tuple[int, BlockTable, int]]] = {}
        for row, packed in enumerate(decodes):
            table, tokens = packed.table, packed.start + 1
            kept = table.keep_of(layer).tokens(tokens)
            width = 1 << (kv_blocks(kept, block_tokens) - 1).bit_length()
            groups.setdefault(width, []).append((row, table, tokens))
        parts = []
        for width, rows in groups.items():
            most = max(1, PART_BYTES // (width * self._arena.block_bytes))
            parts += [(width, rows[first : first + most]) for first in range(0, len(rows), most)]
        made = []
        for width, members in parts:
            ids: list[int] = []
            for _, table, _ in members:
                own = table.blocks[layer]
                ids += own[:width] + own[:1] * (width - len(own))  # padding is masked; any block does
            shape = (layer if self._windows[layer] is not None else -1, width)
            key = (*shape, *((row, table.keep_of(layer).tokens(tokens)) for row, table, tokens in members))
            if key not in self._shapes:
                at = torch.tensor([row for row, _, _ in members], device=device)
                self._shapes[key] = at, self._seen(layer, width * block_tokens, members)
            at, seen = self._shapes[key]
            made.append(_Decodes(at, torch.tensor(ids, device=device), width, seen))
        return made

    def _seen(self, layer: int, keys: int, members: Sequence[tuple[int, BlockTable, int]]) -> Tensor | None:
        window = self._windows[layer]
        kept = torch.tensor([table.keep_of(layer).tokens(tokens) for _, table, tokens in members])
        seen = torch.arange(keys)[None] < kept[:, None]
        if window is not None:
            for index, (_, table, tokens) in enumerate(members):
                positions = torch.tensor(ring_positions(table.keep_of(layer), tokens))
                seen[index, : len(positions)] &= positions > tokens - 1 - window
        return None if bool(seen.all()) else seen.to(self._arena.device)

    def attend(
        self,
        layer: int,
        qkv: Tensor,
        rope: tuple[Tensor, Tensor] | None,
        *,
        heads: int,
        kv_heads: int,
        scale: float,
        q_norm: Tensor | None,
        k_norm: Tensor | None,
        eps: float,
        offset: float,
    ) -> Tensor:
        """Return the attention [n, H d] of the rows of a layer, from their product with q, k and v."""
        assert self._layer is not None
        n = len(qkv)
        queries, keys, values = torch.split(qkv.view(n, heads + 2 * kv_heads, -1), (heads, kv_heads, kv_heads), dim=1)
        if q_norm is not None and k_norm is not None:
            queries, keys = (
                rms_norm_reference(queries, q_norm, eps, offset),
                rms_norm_reference(keys, k_norm, eps, offset),
            )
        if rope is not None:
            queries, keys = _rotate(queries, *rope), _rotate(keys, *rope)
        self._arena.write(self._layer.slots, keys, values)
        query, key, value = (part.transpose(0, 1)[None] for part in (queries, keys, values))
        return self._attend(layer, query, key, value, scale).reshape(n, -1)

    def _attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """Return the attention [1, n, H, d] of queries [1, H, n, d]; key and value are those of the new tokens."""
        found = self._layer
        assert found is not None
        queries = query[0].transpose(0, 1)  # [n, H, d]
        count, heads, head_dim = queries.shape
        kv_heads = key.shape[1]
        output = torch.empty_like(queries, memory_format=torch.contiguous_format)
        for group in found.decodes:
            batch = group.rows.numel()
            keys, values = self._arena.read(group.blocks)
            shape = (batch, -1, kv_heads, head_dim)
            # Heads that share a KV head take the place of queries of one head: no key is copied for them.
            attended = functional.scaled_dot_product_attention(
                queries[group.rows].reshape(batch, kv_heads, heads // kv_heads, head_dim),
                keys.view(shape).transpose(1, 2),
                values.view(shape).transpose(1, 2),
                attn_mask=None if group.seen is None else group.seen[:, None, None],
                scale=scaling,
            )
            output[group.rows] = attended.reshape(batch, heads, head_dim)
        window = self._windows[layer]
        for chunk in found.chunks:
            new = slice(chunk.start, chunk.stop)
            keys, values = key[:, :, new], value[:, :, new]
            total = chunk.prefix + chunk.stop - chunk.start
            if chunk.blocks is not None:
                keys, values = (
                    half.view(-1, kv_heads, head_dim)[:total].transpose(0, 1)[None]
                    for half in self._arena.read(chunk.blocks)
                )
            if chunk.blocks is None and (window is None or window >= total):
                attended = functional.scaled_dot_product_attention(
                    query[:, :, new], keys, values, is_causal=True, scale=scaling, enable_gqa=kv_heads != heads
                )
                output[new] = attended[0].transpose(0, 1)
                continue
            seen = self._causal(chunk.prefix, total, window)
            most = max(1, PART_BYTES // (4 * heads * total))
            for first in range(0, len(seen), most):
                part = slice(chunk.start + first, min(chunk.start + first + most, chunk.stop))
                fold = self._arena.device.type != "cpu"
                attended = masked_attention(query[:, :, part], keys, values, seen[first : first + most], scaling, fold)
                output[part] = attended[0].transpose(0, 1)
        return output.view(1, count, heads, head_dim)

    def _causal(self, prefix: int, total: int, window: int | None) -> Tensor:
        key = prefix, total, window
        if key not in self._shapes:
            queries = torch.arange(prefix, total, device=self._arena.device)[:, None]
            keys = torch.arange(total, device=self._arena.device)[None]
            seen = keys <= queries
            self._shapes[key] = seen if window is None else seen & (keys > queries - window)
        found: Tensor = self._shapes[key]
        return found


def masked_attention(
    query: Tensor, key: Tensor, value: Tensor, seen: Tensor, scaling: float | None, fold: bool
) -> Tensor:
    """Return the attention [1, H, t, d] of queries [1, H, t, d] to keys and values [1, h, k, d], seen bool [t, k].

    fold: let heads that share a KV head take the place of queries of one head. On CUDA no fused kernel takes a mask
    and shared heads together; scores of all heads would be made in FP32. On a CPU the kernel takes both and is faster.
    """
    heads, kv_heads, count = query.shape[1], key.shape[1], query.shape[2]
    if not fold or heads == kv_heads:
        return functional.scaled_dot_product_attention(
            query, key, value, attn_mask=seen, scale=scaling, enable_gqa=heads != kv_heads
        )
    group = heads // kv_heads
    folded = query.reshape(1, kv_heads, group * count, -1)
    mask = seen.repeat(group, 1)
    attended = functional.scaled_dot_product_attention(folded, key, value, attn_mask=mask, scale=scaling)
    return attended.reshape(1, heads, count, -1)
