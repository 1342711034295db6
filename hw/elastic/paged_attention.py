"""One iteration of a batch whose keys and values are in a paged pool: decodes and prompt chunks in one forward pass.

    batch = PagedBatch(arena, decodes, prefills, windows, wanted, staging=staging, attention=attention)
    logits = forward(elastic, batch, prefill=plan.prefill, decode=plan.decode)

The tokens of all requests form one row, decodes first, so that every linear layer is one product over the full batch. A
request may skip a block that others run (stage-wise masks, KV holes). Layers that run for the same requests are
arranged together, once an iteration, and everything reaches the device in one copy (hw/elastic/staging.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from hw.elastic import ops
from hw.elastic.attention import Attention, Prepared, Rows
from hw.elastic.attention_choice import default_attention
from hw.elastic.block_arrays import HeldBlocks, Int32s, Int64s, read_table, stack_blocks
from hw.elastic.paged_kv import KVArena
from hw.elastic.staging import Staging
from sim.engine.block_table import BlockTable

# Shapes: l layers, r decodes, c prompt chunks, n rows (tokens), w KV blocks, p tokens of one, H heads, h KV heads,
# d head_dim.

WIDTH_STEP = 4
"""Tables have a multiple of this many blocks: kernels read rows of 16 bytes faster."""


@dataclass(frozen=True, slots=True)
class Packed:
    """What one request adds to an iteration: ``tokens`` follow the ``start`` tokens whose KV its table holds."""

    table: BlockTable
    tokens: Sequence[int]
    start: int


@dataclass(frozen=True, slots=True)
class _Group:
    """Layers that run for the same requests.

    rows: of the iteration (None: all). slots: [layers, n], where the new keys and values are stored. tensors: what
    ``prepared`` needs on the device.
    """

    rows: Tensor | None
    slots: Tensor
    prepared: Prepared
    tensors: list[Tensor]


class PagedBatch:
    """The tokens of one iteration on the device, and the attention over their KV.

    tokens, positions: [n]. wanted: rows whose logits count. decodes: how many rows come first that are decodes. extra:
    tensors of the arrays that were passed as ``extra``. layout: where all others lie in the memory of the staging.
    layers: which group of arrays each layer reads, in the order of the layers.
    """

    def __init__(
        self,
        arena: KVArena,
        decodes: Sequence[Packed],
        prefills: Sequence[Packed],
        windows: Sequence[int | None],
        wanted: Sequence[int] = (),
        *,
        staging: Staging | None = None,
        attention: Attention | None = None,
        extra: Sequence[npt.NDArray[Any]] = (),
        fill_to: int = 0,
    ) -> None:
        """Look up the KV blocks of the batch and send all of it to the device.

        Args:
            arena: memory of the KV. windows: how far each layer looks back; None: to the first token.
            decodes, prefills: requests in the order of the rows: one token each, then the prompt chunks.
            wanted: rows that need a next token.
            staging: memory for the copy; None makes new one. attention: how it is computed; None: as
                hw.attention=auto.
            extra: other arrays to send.
            fill_to: rows of a batch of decodes alone that has to have the shape of others; 0: it need not. The last
                decode is repeated up to this number: it stores the same keys in the same place. Tables are then as wide
                as a power of two, and ``wanted`` covers every row.
        """
        self._arena, self._block_tokens = arena, arena.block_tokens
        attention, staging = attention or default_attention(arena), staging or Staging(arena.hardware)
        if fill_to:
            decodes, wanted = [*decodes, *[decodes[-1]] * (fill_to - len(decodes))], range(fill_to)
        packed = [*decodes, *prefills]
        self.decodes, self._windows = len(decodes), [window or 0 for window in windows]
        counts = np.array([len(one.tokens) for one in packed], np.int64)
        starts = np.array([one.start for one in packed], np.int64)
        first_rows = np.concatenate(([0], np.cumsum(counts)))  # of each request
        tokens = np.fromiter(chain.from_iterable(one.tokens for one in packed), np.int64, int(first_rows[-1]))
        positions = np.arange(len(tokens)) - np.repeat(first_rows[:-1] - starts, counts)
        arrays: list[npt.NDArray[Any]] = [tokens, positions, np.array(wanted, np.int64)]
        held = [read_table(one.table, len(windows), one.start + len(one.tokens)) for one in packed]
        request = _Requests(held, counts, starts, first_rows, len(decodes))
        tables = request.tables(bool(fill_to))
        laid_out: list[tuple[Prepared, int, int, bool, int]] = []
        self._group_of: list[int] = [0] * len(windows)
        self._place: list[int] = [0] * len(windows)
        for layers, who in request.groups():
            for place, layer in enumerate(layers):
                self._group_of[layer], self._place[layer] = len(laid_out), place
            rows, slots, all_rows = self._rows_of(request, tables, layers, who)
            prepared = attention.prepare(rows, arena)
            first = len(arrays)
            arrays += [slots, *([] if all_rows is None else [all_rows]), *prepared.arrays]
            laid_out.append((prepared, rows.count, first, all_rows is not None, len(arrays)))
        self.layers = tuple(self._group_of)
        sent = len(arrays)
        tensors = staging.send([*arrays, *extra])
        self.layout = staging.layout[:sent]
        self.tokens, self.positions, self.wanted = tensors[:3]
        self.extra = tensors[sent:]
        self._groups = [
            _Group(
                tensors[first + 1] if some else None, tensors[first][:, :n], prepared, tensors[first + 1 + some : stop]
            )
            for prepared, n, first, some, stop in laid_out
        ]

    def _rows_of(
        self, request: _Requests, tables: tuple[Int32s, Int32s], layers: list[int], who: npt.NDArray[np.intp]
    ) -> tuple[Rows, Int64s, Int64s | None]:
        """Return the rows of layers that run for the same requests, their slots, and which these are (None: all)."""
        everyone = len(who) == len(request.held)
        every_layer = len(layers) == len(self._windows)
        single, chunks = who[who < request.decodes], who[who >= request.decodes]
        if everyone and every_layer:
            table, chunk_table = tables
        else:
            at = np.array(layers)
            table = tables[0][np.ix_(at, single)]
            chunk_table = tables[1][np.ix_(at, chunks - request.decodes)]
        first, last, keeps_all = request.keeps(layers, single)
        lengths = request.counts[chunks]
        rows = Rows(
            table=table,
            context=(request.starts[single] + 1).astype(np.int32),
            first=first,
            last=last,
            keeps_all=keeps_all,
            chunk_table=chunk_table,
            chunk_starts=(len(single) + np.concatenate(([0], np.cumsum(lengths)))).astype(np.int32),
            prefix=request.starts[chunks].astype(np.int32),
            windows=[self._windows[layer] for layer in layers],
            block_tokens=self._block_tokens,
        )
        all_rows = None
        if not everyone:
            all_rows = np.concatenate(
                [single, *(np.arange(request.rows[i], request.rows[i + 1]) for i in chunks)], dtype=np.int64
            )
        return rows, self._slots(rows, lengths), all_rows

    def _slots(self, rows: Rows, lengths: Int64s) -> Int64s:
        """Return where the new keys and values are stored, [layers, n], and one more place where n is odd."""
        size, single = self._block_tokens, rows.decodes
        slots = np.zeros(
            (len(rows.windows), rows.count + rows.count % 2), np.int64
        )  # even, so that every row is aligned
        token = rows.context.astype(np.int64) - 1
        if rows.keeps_all:
            blocks = rows.table[:, np.arange(single), token // size]
            slots[:, :single] = blocks.astype(np.int64) * size + token % size
        else:
            # Token t >= f lies at place f + (t - f) % w of a ring (sim.engine.block_table.ring_place).
            first, last = rows.first.astype(np.int64), rows.last.astype(np.int64)
            ring = (last > 0) & (token >= first)
            place = np.where(ring, first + (token - first) % np.maximum(last, 1), token)
            blocks = np.take_along_axis(rows.table, (place // size)[:, :, None], axis=2)[:, :, 0]
            slots[:, :single] = blocks.astype(np.int64) * size + place % size
        at = single
        for index, (start, count) in enumerate(zip(rows.prefix.tolist(), lengths.tolist(), strict=True)):
            place = np.arange(start, start + count)
            blocks = rows.chunk_table[:, index, place // size]
            slots[:, at : at + count] = blocks.astype(np.int64) * size + place % size
            at += count
        return slots

    @property
    def uniform(self) -> bool:
        """Whether every layer runs for all requests or for none."""
        return all(group.rows is None or not group.rows.numel() for group in self._groups)

    def rows(self, layer: int) -> Tensor | None:
        """Return the rows of the iteration that run a layer's MHA block: None for all, empty for none."""
        return self._groups[self._group_of[layer]].rows

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
        group, place = self._groups[self._group_of[layer]], self._place[layer]
        cos, sin = rope if rope is not None else (None, None)
        query, key, value = ops.rope_and_store(
            qkv,
            cos,
            sin,
            self._arena.kv,
            group.slots[place],
            heads=heads,
            kv_heads=kv_heads,
            q_norm=q_norm,
            k_norm=k_norm,
            eps=eps,
            offset=offset,
        )
        attended = group.prepared.attend(place, group.tensors, query, key, value, scale)
        return attended.reshape(len(qkv), -1)


class _Requests:
    """The requests of an iteration, on the host: decodes, then prompt chunks.

    held: their KV blocks. counts, starts: new tokens of each, and tokens before. rows: the first row of each, and the
    number of rows. decodes: how many are decodes.
    """

    def __init__(self, held: list[HeldBlocks], counts: Int64s, starts: Int64s, rows: Int64s, decodes: int) -> None:
        self.held, self.counts, self.starts, self.rows, self.decodes = held, counts, starts, rows, decodes

    def tables(self, power_of_two: bool) -> tuple[Int32s, Int32s]:
        """Return the KV blocks [layers, requests, w] of the decodes, and those of the prompt chunks.

        power_of_two: whether w is one.
        """
        layers = len(self.held[0].runs)
        made = []
        for held in (self.held[: self.decodes], self.held[self.decodes :]):
            width = max((one.needed for one in held), default=1)
            if power_of_two:
                width = 1 << max(width - 1, 0).bit_length()
            width = -(-width // WIDTH_STEP) * WIDTH_STEP
            made.append(stack_blocks(held, width) if held else np.zeros((layers, 0, width), np.int32))
        return made[0], made[1]

    def groups(self) -> list[tuple[list[int], npt.NDArray[np.intp]]]:
        """Return layers that run for the same requests, and these requests."""
        runs = np.stack([one.runs for one in self.held], axis=1)  # [layers, requests]
        if runs.all():
            return [(list(range(len(runs))), np.arange(len(self.held)))]
        raw, size = runs.tobytes(), len(self.held)
        found: dict[bytes, list[int]] = {}
        for layer in range(len(runs)):
            found.setdefault(raw[layer * size : (layer + 1) * size], []).append(layer)
        return [(layers, np.flatnonzero(runs[layers[0]])) for layers in found.values()]

    def keeps(self, layers: list[int], who: npt.NDArray[np.intp]) -> tuple[Int32s, Int32s, bool]:
        """Return how many of the first and last tokens some layers of some requests keep, [layers, requests] each."""
        if all(self.held[i].keeps_all for i in who):
            none = np.zeros((len(layers), len(who)), np.int32)
            return none, none, True
        first, last = (
            np.stack([part[layers] for part in parts], axis=1)
            for parts in ([self.held[i].first for i in who], [self.held[i].last for i in who])
        )
        return first, last, False
