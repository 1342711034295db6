"""Which code computes attention over the paged pool, and what it needs of an iteration.

    prepared = attention.prepare(rows, arena)       # once an iteration
    prepared.attend(at, tensors, query, key, value, scale)      # for every layer

hw/elastic/attention_choice.py finds one of these:

* ``sdpa``: PyTorch's attention over keys and values that are gathered from the pool; the reference, and the choice on a
  CPU.
* ``triton``: the kernels of this package (hw/elastic/ops.py).
* ``flash_attn`` and ``flashinfer``: maintained kernels, where they are installed (hw/elastic/attention_packages.py).

Decodes come first among the rows of a layer, then prompt chunks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from hw.elastic import ops
from hw.elastic.block_arrays import Int32s, Int64s
from hw.elastic.hidden_kv import HiddenKV, Project
from hw.elastic.paged_kv import KVArena
from hw.elastic.quantized_kv import QuantizedKV, rotated
from sim.cost.model_spec import ModelSpec

# Shapes: l layers, r decodes, c prompt chunks, n rows, w KV blocks, p tokens of one, H heads, h KV heads, d head_dim.

PART_BYTES = 1 << 28
"""What one call of PyTorch's attention may take for a moment: for keys and values that it gathers, or scores in FP32.

More is computed in several calls: 64 contexts of 1,024 tokens of Llama-2-7B are 1 GiB in every layer.
"""


QUANTIZED_PART_BYTES = 1 << 24
"""Packed KV of one call, unless a single request has more; unpacked it takes two to four times as much."""

MOST_PROGRAMS, SPLIT_TOKENS = 4 * 160, 1024
"""Programs that the decode kernel starts to use all multiprocessors, and tokens of one of a long context."""


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of some layers that run for the same requests, on the host.

    table: [l, r, w], KV blocks of the decodes. context: [r], tokens of each with the new one. first, last: [l, r], how
    many of the first and last tokens are kept; last is 0 where all are, and ``keeps_all`` if that is so everywhere.
    chunk_table: [l, c, w]. chunk_starts: [c + 1], rows of the chunks among those of the layers. prefix: [c], tokens
    before each chunk. windows: [l], 0 for none.
    """

    table: Int32s
    context: Int32s
    first: Int32s
    last: Int32s
    keeps_all: bool
    chunk_table: Int32s
    chunk_starts: Int32s
    prefix: Int32s
    windows: list[int]
    block_tokens: int

    @property
    def decodes(self) -> int:
        """Number of decodes."""
        return len(self.context)

    @property
    def count(self) -> int:
        """Number of rows."""
        return int(self.chunk_starts[-1])


class Prepared(ABC):
    """The attention of one iteration over ``Rows``.

    arrays: what has to be on the device, of int32 or int64.
    """

    arrays: list[npt.NDArray[Any]]

    @abstractmethod
    def attend(
        self,
        at: int,
        tensors: Sequence[Tensor],
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
    ) -> Tensor:
        """Return the attention [n, H, d] of a layer, whose new keys and values are stored already.

        Args:
            at: index of the layer among those of the rows. tensors: ``arrays`` on the device.
            query: [n, H, d]. key, value: [n, h, d], those of the new tokens.
        """


class Attention(ABC):
    """A way to compute attention.

    name: its value of hw.attention. in_graphs: whether a CUDA graph can hold it.
    """

    name: str
    in_graphs = False

    @abstractmethod
    def prepare(self, rows: Rows, arena: KVArena) -> Prepared:
        """Arrange the attention of an iteration."""

    @abstractmethod
    def scratch_bytes(self, model: ModelSpec, sequences: int, context: int) -> int:
        """Return the most bytes that it takes besides its input and output.

        Args:
            sequences: requests of a pass. context: tokens of the longest one.
        """


# --- Kernels of this package -----------------------------------------------------------------------------------------


class PreparedKernels(Prepared):
    """Block tables as they are."""

    def __init__(self, rows: Rows, arena: KVArena) -> None:
        """Take the arrays of the rows."""
        self._rows, self._kv = rows, arena.kv
        self.arrays = [rows.table, rows.context, rows.first, rows.last]
        if len(rows.prefix):
            self.arrays += [rows.chunk_table, rows.chunk_starts, rows.prefix]

    def attend(
        self, at: int, tensors: Sequence[Tensor], query: Tensor, key: Tensor, value: Tensor, scale: float
    ) -> Tensor:
        """Call one kernel for the decodes, and one for the chunks."""
        rows, window, kv = self._rows, self._rows.windows[at], self._kv
        table, context, first, last = tensors[:4]
        count = rows.decodes
        if count == rows.count:
            return self.decode(query, table[at], context, first[at], last[at], scale, window, None)
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        if count:
            self.decode(query[:count], table[at], context, first[at], last[at], scale, window, out[:count])
        chunk_table, starts, prefix = tensors[4:]
        return ops.paged_prefill(query, kv, chunk_table[at], starts, prefix, scale=scale, window=window, out=out)

    def decode(
        self,
        query: Tensor,
        table: Tensor,
        context: Tensor,
        first: Tensor,
        last: Tensor,
        scale: float,
        window: int,
        out: Tensor | None,
    ) -> Tensor:
        """Return the attention of the decodes of a layer."""
        return ops.paged_decode(query, self._kv, table, context, first, last, scale=scale, window=window, out=out)


class Kernels(Attention):
    """The kernels of hw/elastic/ops.py."""

    name = "triton"
    in_graphs = True

    def prepare(self, rows: Rows, arena: KVArena) -> Prepared:
        """Take the arrays of the rows."""
        return PreparedKernels(rows, arena)

    def scratch_bytes(self, model: ModelSpec, sequences: int, context: int) -> int:
        """Return the bytes of the parts of long contexts, which several programs share (hw.elastic.kernels)."""
        programs = MOST_PROGRAMS + sequences * model.num_kv_heads * -(-context // SPLIT_TOKENS)
        return programs * (model.num_heads // model.num_kv_heads) * (model.head_dim + 1) * 4


# --- PyTorch ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Decodes:
    """Decodes of one call: their rows (None: all), the width of their tables, what scores get added [b, 1, 1, k]."""

    rows: Tensor | None
    width: int
    mask: Tensor | None


class PreparedSdpa(Prepared):
    """Decodes whose contexts fill about the same number of blocks share a call; each chunk has its own."""

    def __init__(self, rows: Rows, arena: KVArena) -> None:
        """Take the block tables; a row of the pool holds the keys of a block, and the next one its values."""
        self._rows, self._arena = rows, arena
        self._groups: dict[bytes, list[_Decodes]] = {}
        self._causal: dict[tuple[int, int, int], Tensor] = {}
        self._part_bytes = PART_BYTES
        self.arrays = [rows.table.astype(np.int64) * 2]
        if rows.prefix.any():
            self.arrays.append(rows.chunk_table.astype(np.int64) * 2)

    def attend(
        self, at: int, tensors: Sequence[Tensor], query: Tensor, key: Tensor, value: Tensor, scale: float
    ) -> Tensor:
        """Call PyTorch's attention for every group and every chunk."""
        rows = self._rows
        count = rows.decodes
        if count:
            groups = self._groups_of(at)
            if len(groups) == 1 and count == rows.count and groups[0].rows is None:
                return self._decode(groups[0], tensors[0][at], query, scale)
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        if count:
            for group in groups:
                if group.rows is None:
                    out[:count] = self._decode(group, tensors[0][at], query[:count], scale)
                else:
                    some = tensors[0][at].index_select(0, group.rows)
                    out[group.rows] = self._decode(group, some, query[group.rows], scale)
        for index, prefix in enumerate(rows.prefix.tolist()):
            new = slice(*rows.chunk_starts[index : index + 2].tolist())
            table = tensors[1][at, index] if prefix else None
            self._chunk(out[new], query[new], key[new], value[new], table, prefix, rows.windows[at], scale)
        return out

    def _decode(self, group: _Decodes, table: Tensor, query: Tensor, scale: float) -> Tensor:
        batch, heads, head_dim = query.shape
        keys, values = self._gather(table[:, : group.width].reshape(-1), group.mask)
        kv_heads = keys.shape[2]
        shape = (batch, -1, kv_heads, head_dim)
        # Heads that share a KV head take the place of queries of one head: no key is copied for them.
        attended = functional.scaled_dot_product_attention(
            query.reshape(batch, kv_heads, heads // kv_heads, head_dim),
            keys.view(shape).transpose(1, 2),
            values.view(shape).transpose(1, 2),
            attn_mask=group.mask,
            scale=scale,
        )
        return attended.reshape(batch, heads, head_dim)

    def _gather(self, at: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the keys and values [c, p, h, d] at rows [c] of the tables; ``mask`` is added to their scores."""
        keys, values = self._arena.rows()
        keys, values = keys.index_select(0, at), values.index_select(0, at)
        # Tables may name blocks of others behind their own, and zero times no number is no number.
        return _zeroed(keys, values, mask) if self._arena.packed else (keys, values)

    def _groups_of(self, at: int) -> list[_Decodes]:
        """Return the groups of a layer; layers that keep the same tokens share them."""
        rows = self._rows
        key = (
            bytes([1]) + rows.windows[at].to_bytes(4, "little")
            if rows.keeps_all
            else rows.first[at].tobytes() + rows.last[at].tobytes() + rows.windows[at].to_bytes(4, "little")
        )
        if key not in self._groups:
            self._groups[key] = self._group(at)
        return self._groups[key]

    def _group(self, at: int) -> list[_Decodes]:
        """Group decodes whose contexts fill the same number of blocks, rounded up to a power of two."""
        rows, device = self._rows, self._arena.device
        first, last = rows.first[at].astype(np.int64), rows.last[at].astype(np.int64)
        context = rows.context.astype(np.int64)
        kept = np.where(last > 0, np.minimum(context, first + last), context)
        needed = -(-kept // rows.block_tokens)
        widths = 1 << np.ceil(np.log2(needed)).astype(np.int64)
        groups = []
        for width in np.unique(widths).tolist():
            members = np.flatnonzero(widths == width)
            width = int(needed[members].max())  # no more blocks than the longest of them fills
            most = max(1, self._part_bytes // (width * self._arena.block_bytes))
            for start in range(0, len(members), most):
                part = members[start : start + most]
                seen = _seen(
                    kept[part], context[part], first[part], last[part], width * rows.block_tokens, rows.windows[at]
                )
                everyone = len(part) == rows.decodes
                groups.append(
                    _Decodes(
                        None if everyone else torch.from_numpy(part).to(device),
                        width,
                        None if seen.all() else self._mask(torch.from_numpy(seen).to(device)),
                    )
                )
        return groups

    def _mask(self, seen: Tensor) -> Tensor:
        """Return what is added to scores, [b, 1, 1, k]; PyTorch would make it of booleans in every layer."""
        added = torch.zeros(seen.shape, dtype=self._arena.kv.dtype, device=seen.device)
        return added.masked_fill_(~seen, -torch.inf)[:, None, None]

    def _chunk(
        self,
        out: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        table: Tensor | None,
        prefix: int,
        window: int,
        scale: float,
    ) -> None:
        """Write the attention of a prompt chunk [n, H, d]; ``table`` has the blocks that hold all tokens so far."""
        count, heads = query.shape[:2]
        kv_heads, total = key.shape[1], prefix + count
        if table is not None:
            key, value = self._all_tokens(table[: -(-total // self._rows.block_tokens)], total)
        query, key, value = (part.transpose(0, 1)[None] for part in (query, key, value))
        if table is None and (not window or window >= total):
            attended = functional.scaled_dot_product_attention(
                query, key, value, is_causal=True, scale=scale, enable_gqa=kv_heads != heads
            )
            out.copy_(attended[0].transpose(0, 1))
            return
        seen = self._seen_by_chunk(prefix, total, window)
        most = max(1, PART_BYTES // (4 * heads * total))
        fold = self._arena.device.type != "cpu"
        for start in range(0, count, most):
            part = slice(start, min(start + most, count))
            attended = masked_attention(query[:, :, part], key, value, seen[part], scale, fold)
            out[part] = attended[0].transpose(0, 1)

    def _all_tokens(self, at: Tensor, total: int) -> tuple[Tensor, Tensor]:
        """Return the keys and values [k, h, d] of the first ``total`` tokens of a request, from its blocks."""
        keys, values = (half.index_select(0, at).flatten(0, 1)[:total] for half in self._arena.rows())
        return keys, values

    def _seen_by_chunk(self, prefix: int, total: int, window: int) -> Tensor:
        key = prefix, total, window
        if key not in self._causal:
            device = self._arena.device
            queries, keys = (
                torch.arange(prefix, total, device=device)[:, None],
                torch.arange(total, device=device)[None],
            )
            seen = keys <= queries
            self._causal[key] = seen & (keys > queries - window) if window else seen
        return self._causal[key]


def _seen(
    kept: Int64s, context: Int64s, first: Int64s, last: Int64s, places: int, window: int
) -> npt.NDArray[np.bool_]:
    """Return which places of their blocks decodes see, [b, places]."""
    place = np.arange(places)[None]
    kept, newest, first, last = kept[:, None], context[:, None] - 1, first[:, None], last[:, None]
    seen: npt.NDArray[np.bool_] = place < kept
    if window:
        # A place of the ring holds the newest token t with (t - first) % last == place - first.
        ring = newest - (newest - place) % np.maximum(last, 1)
        position = np.where((last > 0) & (kept <= newest) & (place >= first), ring, place)
        seen = seen & (position > newest - window)
    return seen


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


class PreparedQuantized(PreparedSdpa):
    """Decodes whose KV is quantized: PyTorch's attention over what is gathered and unpacked."""

    def __init__(self, rows: Rows, arena: KVArena, kv: QuantizedKV) -> None:
        """Take the block tables of decodes; ``rows.block_tokens`` are those of ``kv``."""
        super().__init__(rows, arena)
        self.arrays, self._quantized = [rows.table.astype(np.int64)], kv
        self._part_bytes = QUANTIZED_PART_BYTES

    def _decode(self, group: _Decodes, table: Tensor, query: Tensor, scale: float) -> Tensor:
        attended = super()._decode(group, table, rotated(query).to(query.dtype), scale)
        return rotated(attended).to(query.dtype)

    def _gather(self, at: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the rotated keys and values of blocks, and zeros in places that no token fills."""
        return _zeroed(*self._quantized.read(at), mask)


class PreparedHidden(PreparedSdpa):
    """Requests whose hidden states are stored: PyTorch's attention over keys and values that are computed from them."""

    def __init__(self, rows: Rows, arena: KVArena, kv: HiddenKV) -> None:
        """Take the block tables; ``rows.block_tokens`` are those of ``kv``."""
        super().__init__(rows, arena)
        self.arrays, self._hidden = [rows.table.astype(np.int64)], kv
        if rows.prefix.any():
            self.arrays.append(rows.chunk_table.astype(np.int64))
        self._project: Project | None = None
        self._width = 0

    def attend_with(
        self,
        project: Project,
        at: int,
        tensors: Sequence[Tensor],
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
    ) -> Tensor:
        """Return what ``attend`` does, with the layer's projection of hidden states to keys and values."""
        self._project = project
        return self.attend(at, tensors, query, key, value, scale)

    def _decode(self, group: _Decodes, table: Tensor, query: Tensor, scale: float) -> Tensor:
        self._width = group.width
        return super()._decode(group, table, query, scale)

    def _gather(self, at: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the keys and values of blocks, ``_width`` of each request, and zeros in places that no token fills."""
        positions = torch.arange(self._width * self._rows.block_tokens, device=at.device)
        keys, values = self._projected(at, positions.repeat(len(at) // self._width))
        shape = len(at), self._rows.block_tokens, *keys.shape[1:]
        return _zeroed(keys.view(shape), values.view(shape), mask)

    def _all_tokens(self, at: Tensor, total: int) -> tuple[Tensor, Tensor]:
        """Return the keys and values [k, h, d] of the first ``total`` tokens of a request, from its blocks."""
        return self._projected(at, torch.arange(total, device=at.device))

    def _projected(self, at: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return the keys and values of the first tokens of blocks, as many as there are positions."""
        assert self._project is not None
        return self._project(self._hidden.read(at).flatten(0, 1)[: len(positions)], positions)


def _zeroed(keys: Tensor, values: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return keys and values [c, p, h, d] with zeros in the places that a mask hides."""
    if mask is None:
        return keys, values
    hidden = (mask < 0).view(*keys.shape[:2], 1, 1)
    return keys.masked_fill_(hidden, 0), values.masked_fill_(hidden, 0)


class Sdpa(Attention):
    """PyTorch's attention over gathered keys and values."""

    name = "sdpa"

    def prepare(self, rows: Rows, arena: KVArena) -> Prepared:
        """Take the block tables."""
        return PreparedSdpa(rows, arena)

    def scratch_bytes(self, model: ModelSpec, sequences: int, context: int) -> int:
        """Return the bytes of gathered keys and values, and of a mask or scores."""
        gathered = min(PART_BYTES, sequences * context * model.kv_bytes_per_token_layer)
        return max(gathered, context * model.kv_bytes_per_token_layer) + PART_BYTES
