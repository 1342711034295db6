"""One iteration of a batch whose keys and values are in a paged pool: decodes and prompt chunks in one forward pass.

    batch = PagedBatch(arena, decodes, prefills, windows, wanted, staging=staging, attention=attention)
    logits = forward(elastic, batch, prefill=plan.prefill, decode=plan.decode)

The tokens of all requests form one row, decodes first, so that every linear layer is one product over the full batch. A
request may skip a block that others run (stage-wise masks, KV holes). Layers that run for the same requests are
arranged together, once an iteration, and everything reaches the device in one copy (hw/elastic/staging.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hw.elastic import ops
from hw.elastic.attention import Attention, Prepared, PreparedHidden, PreparedQuantized, Rows
from hw.elastic.attention_choice import default_attention
from hw.elastic.block_arrays import HIDDEN, HeldBlocks, Int32s, Int64s, read_table, stack_blocks
from hw.elastic.compressed_kv import ObservedQueries, PackedPrompt, PreparedCompressed, observed_of
from hw.elastic.hidden_kv import HiddenKV, Project
from hw.elastic.paged_kv import KVArena
from hw.elastic.quantized_kv import QuantizedKV
from hw.elastic.staging import Staging
from sim.engine.block_table import BlockTable

# Shapes: l layers, r decodes, c prompt chunks, n rows (tokens), w KV blocks, p tokens of one, H heads, h KV heads,
# d head_dim.

WIDTH_STEP = 4
"""Tables have a multiple of this many blocks: kernels read rows of 16 bytes faster."""


@dataclass(frozen=True, slots=True)
class Packed:
    """What one request adds to an iteration: ``tokens`` follow the ``start`` tokens whose KV its table holds.

    observed_from: position from which the queries of a prompt are kept, to compress its KV; None: none are.
    """

    table: BlockTable
    tokens: Sequence[int]
    start: int
    observed_from: int | None = None

    @property
    def observed(self) -> int:
        """How many of the last tokens are observed."""
        stop = self.start + len(self.tokens)
        return 0 if self.observed_from is None else max(0, stop - max(self.start, self.observed_from))


@dataclass(frozen=True, slots=True)
class _Part:
    """The rows of a group whose KV has the same precision.

    rows: of the group (None: all). prepared: their attention. tensors: what it needs on the device. kv, slots: where
    new keys and values are stored, [layers, rows], if they are quantized, or hidden states in their place; else None,
    as they are stored already.
    asking, answers: in a group of ``kv_only``, the rows of the group that attend, and their places among all that do.
    """

    rows: Tensor | None
    prepared: Prepared
    tensors: Sequence[Tensor]
    kv: QuantizedKV | HiddenKV | None = None
    slots: Tensor | None = None
    asking: Tensor | None = None
    answers: Tensor | None = None


@dataclass(frozen=True, slots=True)
class _Group:
    """Layers that run for the same requests, and store the KV of each request at the same precision.

    rows: of the iteration (None: all). slots: [layers, n], where the new keys and values are stored in the arena;
    negative for those that are quantized or not stored. parts: the rows by precision. passing: in a group of
    ``kv_only``, the rows of the iteration that run all of the MHA block; the others only write keys and values. None
    elsewhere: all run it. observed: rows of the group whose queries are kept, and the position of the first of them.
    """

    rows: Tensor | None
    slots: Tensor
    parts: Sequence[_Part]
    passing: Tensor | None = None
    observed: Sequence[_Observed] = ()


_Observed = tuple[ObservedQueries, slice, int]
"""Where queries of a request are kept, its rows, and the position of the first of them."""


class _Sent:
    """The arrays of an iteration, in the order in which they are sent to the device, and then the tensors."""

    def __init__(self, arrays: Sequence[npt.NDArray[Any]]) -> None:
        self.arrays = list(arrays)
        self.tensors: list[Tensor] = []

    def add(self, arrays: Sequence[npt.NDArray[Any]]) -> Callable[[], list[Tensor]]:
        """Send more arrays; return what gives their tensors later."""
        at = slice(len(self.arrays), len(self.arrays) + len(arrays))
        self.arrays += arrays
        return lambda: self.tensors[at]


class PagedBatch:
    """The tokens of one iteration on the device, and the attention over their KV.

    tokens, positions: [n]. wanted: rows whose logits count. decodes: how many rows come first that are decodes. extra:
    tensors of the arrays that were passed as ``extra``. layout: where all others lie in the memory of the staging.
    layers: which group of arrays each layer reads, in the order of the layers. kv_only: whether most tokens of prompts
    only write their keys and values in a layer. passing: rows that run all of such a layer: the decodes, then the last
    tokens of prompts that end. known: positions of all tokens whose hidden states are stored in place of keys and
    values, from 0; None where none are.
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
        kv_only: Sequence[bool] = (),
        hidden: bool = False,
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
            kv_only: as in ``Plan``; empty for none. A prompt ends with this iteration if its last row is wanted.
            hidden: whether hidden states are stored in place of keys and values, of all tokens of all requests.
        """
        self._arena, self._stores_hidden = arena, hidden
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
        held = [read_table(one.table, len(windows), one.start + len(one.tokens)) for one in packed]
        self.kv_only = tuple(flag and bool(prefills) for flag in kv_only or [False] * len(windows))
        asked = set(wanted) if any(self.kv_only) else set()
        ends = np.array([i for i in range(len(decodes), len(packed)) if first_rows[i + 1] - 1 in asked], np.int64)
        request = _Requests(packed, held, counts, starts, first_rows, len(decodes), ends)
        passing = np.concatenate([np.arange(len(decodes)), first_rows[ends + 1] - 1])
        tables = request.tables(bool(fill_to))
        sent = _Sent([tokens, positions, np.array(wanted, np.int64), *([passing] if any(self.kv_only) else [])])
        self._group_of: list[int] = [0] * len(windows)
        self._place: list[int] = [0] * len(windows)
        groups: list[Callable[[], _Group]] = []
        for layers, who in request.groups(self.kv_only):
            for place, layer in enumerate(layers):
                self._group_of[layer], self._place[layer] = len(groups), place
            make = self._writing_group if self.kv_only[layers[0]] else self._group
            groups.append(make(sent, request, tables, layers, who, attention))
        self.layers = tuple(self._group_of)
        count = len(sent.arrays)
        sent.tensors = staging.send([*sent.arrays, *extra])
        self.layout = staging.layout[:count]
        self.tokens, self.positions, self.wanted = sent.tensors[:3]
        self.passing = sent.tensors[3] if any(self.kv_only) else self.wanted
        self.extra = sent.tensors[count:]
        self._groups = [group() for group in groups]
        most = int((starts + counts).max())
        # Blocks may have places behind the last token.
        self.known = torch.arange(most + 2 * arena.block_tokens, device=arena.device) if hidden else None

    def _group(
        self,
        sent: _Sent,
        request: _Requests,
        tables: tuple[Int32s, Int32s],
        layers: list[int],
        who: npt.NDArray[np.intp],
        attention: Attention,
    ) -> Callable[[], _Group]:
        """Arrange layers that run for the same requests; return what makes their group once all is sent."""
        by_bits = request.by_bits(layers[0], who)
        group_rows = request.rows_of(who)
        all_rows = sent.add([] if len(who) == len(request.held) else [group_rows])
        slots = np.full((len(layers), len(group_rows) + len(group_rows) % 2), -1, np.int64)  # every row is aligned
        parts: list[Callable[[], _Part]] = []
        for bits, some in by_bits.items():
            kv = self._kv_at(bits)
            rows = self._rows(request, tables, layers, some, self._arena if kv is None else kv)
            prepared = self._prepare(attention, rows, kv, layers, request.prompts(some) if bits < 0 else None)
            own = [] if len(by_bits) == 1 else [np.searchsorted(group_rows, request.rows_of(some))]
            new = self._slots(rows)
            if isinstance(kv, QuantizedKV):
                kv.note_written(new.ravel().tolist())
            elif kv is None:
                slots[:, own[0] if own else slice(len(group_rows))] = new
                if self._arena.packed:
                    self._arena.begin((new[new % rows.block_tokens == 0] // rows.block_tokens).tolist())
            parts.append(
                _part(prepared, kv, sent.add(own), sent.add([] if kv is None else [new]), sent.add(prepared.arrays))
            )
        stored, observed = sent.add([slots]), request.observed(who, group_rows)

        def make() -> _Group:
            kept = stored()[0][:, : len(group_rows)]
            return _Group(_first(all_rows()), kept, [part() for part in parts], observed=observed)

        return make

    def _writing_group(
        self,
        sent: _Sent,
        request: _Requests,
        tables: tuple[Int32s, Int32s],
        layers: list[int],
        who: npt.NDArray[np.intp],
        attention: Attention,
    ) -> Callable[[], _Group]:
        """Arrange layers of ``kv_only`` that run for the same requests: all rows write KV, and few of them attend."""
        by_bits = request.by_bits(layers[0], who)
        group_rows = request.rows_of(who)
        all_rows = sent.add([] if len(who) == len(request.held) else [group_rows])
        all_passing = request.passing_of(who)
        slots = np.full((len(layers), len(group_rows) + len(group_rows) % 2), -1, np.int64)
        parts: list[Callable[[], _Part]] = []
        for bits, some in by_bits.items():
            kv = self._kv_at(bits)
            rows = self._rows(request, tables, layers, some, self._arena if kv is None else kv)
            own, new = np.searchsorted(group_rows, request.rows_of(some)), self._slots(rows)
            if isinstance(kv, QuantizedKV):
                kv.note_written(new.ravel().tolist())
            elif kv is None:
                slots[:, own] = new
                if self._arena.packed:
                    self._arena.begin((new[new % rows.block_tokens == 0] // rows.block_tokens).tolist())
            passing = request.passing_of(some)
            if not len(passing):
                continue  # chunks that do not end their prompts
            asking = self._as_decodes(request, tables, layers, some, rows)
            prepared = self._prepare(attention, asking, kv, layers, request.prompts(some) if bits < 0 else None)
            places = [np.searchsorted(group_rows, passing), np.searchsorted(all_passing, passing)]
            made = _part(
                prepared, kv, sent.add([own]), sent.add([] if kv is None else [new]), sent.add(prepared.arrays)
            )
            parts.append(_asking(made, sent.add(places)))
        stored, observed = sent.add([slots, all_passing]), request.observed(who, group_rows)

        def make() -> _Group:
            kept, passing = stored()
            kept = kept[:, : len(group_rows)]
            return _Group(_first(all_rows()), kept, [part() for part in parts], passing, observed)

        return make

    def _kv_at(self, bits: int) -> QuantizedKV | HiddenKV | None:
        """Return where keys and values at some bits are stored, or hidden states for them; None for the arena.

        Bits below 0 are those of requests with compressed prompts.
        """
        if self._stores_hidden:
            assert bits in (16, HIDDEN)  # of a prompt, and after its prefill
            return HiddenKV(self._arena, self._arena.block_tokens * (1 if bits == 16 else 2))
        return QuantizedKV(self._arena, abs(bits)) if abs(bits) < 16 else None

    def _prepare(
        self,
        attention: Attention,
        rows: Rows,
        kv: QuantizedKV | HiddenKV | None,
        layers: Sequence[int],
        prompts: Sequence[PackedPrompt] | None,
    ) -> Prepared:
        """Arrange the attention of rows; ``prompts``: how those of the requests are packed, None if they are not."""
        if isinstance(kv, HiddenKV):
            return PreparedHidden(rows, self._arena, kv)
        if prompts is not None:
            return PreparedCompressed(rows, self._arena, kv, layers, prompts)
        return attention.prepare(rows, self._arena) if kv is None else PreparedQuantized(rows, self._arena, kv)

    def _as_decodes(
        self,
        request: _Requests,
        tables: tuple[Int32s, Int32s],
        layers: list[int],
        who: npt.NDArray[np.intp],
        rows: Rows,
    ) -> Rows:
        """Return the rows of requests that attend in a layer of ``kv_only``: each is one query over all its context."""
        ends = request.ends_of(who)
        if not len(rows.prefix):
            return rows
        at = np.array(layers)
        parts = [rows.table, tables[1][np.ix_(at, ends - request.decodes)]]
        width = max(part.shape[2] for part in parts)
        parts = [np.pad(part, ((0, 0), (0, 0), (0, width - part.shape[2]))) for part in parts]
        none = np.zeros((len(layers), len(ends)), np.int32)
        context = (request.starts + request.counts)[ends].astype(np.int32)
        total = rows.decodes + len(ends)
        return replace(
            rows,
            table=np.concatenate(parts, axis=1),
            context=np.concatenate([rows.context, context]),
            first=np.concatenate([rows.first, none], axis=1),
            last=np.concatenate([rows.last, none], axis=1),
            chunk_table=rows.chunk_table[:, :0],
            chunk_starts=np.array([total], np.int32),
            prefix=rows.prefix[:0],
        )

    def _rows(
        self,
        request: _Requests,
        tables: tuple[Int32s, Int32s],
        layers: list[int],
        who: npt.NDArray[np.intp],
        kv: KVArena | QuantizedKV | HiddenKV,
    ) -> Rows:
        """Return the rows of layers for requests that run them and store their KV in ``kv``."""
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
        return Rows(
            table=table,
            context=(request.starts[single] + 1 - request.saved[single]).astype(np.int32),
            first=first,
            last=last,
            keeps_all=keeps_all,
            chunk_table=chunk_table,
            chunk_starts=(len(single) + np.concatenate(([0], np.cumsum(lengths)))).astype(np.int32),
            prefix=request.starts[chunks].astype(np.int32),
            windows=[self._windows[layer] for layer in layers],
            block_tokens=kv.block_tokens,
        )

    def _slots(self, rows: Rows) -> Int64s:
        """Return where the new keys and values are stored, [layers, n]."""
        size, single = rows.block_tokens, rows.decodes
        slots = np.zeros((len(rows.windows), rows.count), np.int64)
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
        lengths = np.diff(rows.chunk_starts)
        for index, (start, count) in enumerate(zip(rows.prefix.tolist(), lengths.tolist(), strict=True)):
            place = np.arange(start, start + count)
            blocks = rows.chunk_table[:, index, place // size]
            slots[:, at : at + count] = blocks.astype(np.int64) * size + place % size
            at += count
        return slots

    @property
    def uniform(self) -> bool:
        """Whether every layer runs for all requests or for none, with keys and values at 16 bits, none compressed."""
        return all(
            (group.rows is None or not group.rows.numel())
            and all(part.kv is None and not isinstance(part.prepared, PreparedCompressed) for part in group.parts)
            for group in self._groups
        )

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
        normed: Tensor | None = None,
        project: Project | None = None,
    ) -> Tensor:
        """Return the attention [n, H d] of the rows of a layer, from their product with q, k and v.

        In a layer of ``kv_only``, that of the rows that ``passing_rows`` returns. Hidden states are stored from
        ``normed`` [n, e], and ``project`` computes keys and values from them.
        """
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
        for observed, rows, position in group.observed:
            observed.note(layer, position, query[rows])
        for part in group.parts if self._stores_hidden else ():
            assert isinstance(part.kv, HiddenKV)
            assert part.slots is not None
            assert normed is not None
            part.kv.write(part.slots[place], normed if part.rows is None else normed[part.rows])
        if group.passing is not None:
            return self._attend_passing(group, place, query, key, value, scale, project)
        if len(group.parts) == 1 and group.parts[0].kv is None:
            part = group.parts[0]
            return part.prepared.attend(place, part.tensors, query, key, value, scale).reshape(len(qkv), -1)
        attended = torch.empty_like(query)
        for part in group.parts:
            at = slice(None) if part.rows is None else part.rows
            if isinstance(part.kv, QuantizedKV) and part.slots is not None:
                part.kv.write(part.slots[place], key[at], value[at])
            attended[at] = _attended(part, place, query[at], key[at], value[at], scale, project)
        return attended.reshape(len(qkv), -1)

    def _attend_passing(
        self,
        group: _Group,
        place: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        project: Project | None,
    ) -> Tensor:
        """Return the attention of the rows of a group that run all of a layer of ``kv_only``."""
        assert group.passing is not None
        attended = query.new_empty((len(group.passing), *query.shape[1:]))
        for part in group.parts:
            if isinstance(part.kv, QuantizedKV) and part.slots is not None and part.rows is not None:
                part.kv.write(part.slots[place], key[part.rows], value[part.rows])
            at = part.asking
            attended[part.answers] = _attended(part, place, query[at], key[at], value[at], scale, project)
        return attended.flatten(1)

    def passing_rows(self, layer: int) -> Tensor | None:
        """Return the rows of the iteration that run all of a layer's MHA block: None for those of ``rows``."""
        return self._groups[self._group_of[layer]].passing


def _attended(
    part: _Part, place: int, query: Tensor, key: Tensor, value: Tensor, scale: float, project: Project | None
) -> Tensor:
    """Return the attention of the rows of a part, or of those that ask."""
    if isinstance(part.prepared, PreparedHidden):
        assert project is not None
        return part.prepared.attend_with(project, place, part.tensors, query, key, value, scale)
    return part.prepared.attend(place, part.tensors, query, key, value, scale)


def _asking(part: Callable[[], _Part], places: Callable[[], list[Tensor]]) -> Callable[[], _Part]:
    """Return what makes a part of which only some rows attend."""

    def make() -> _Part:
        asking, answers = places()
        return replace(part(), asking=asking, answers=answers)

    return make


def _part(
    prepared: Prepared,
    kv: QuantizedKV | HiddenKV | None,
    rows: Callable[[], list[Tensor]],
    slots: Callable[[], list[Tensor]],
    tensors: Callable[[], list[Tensor]],
) -> Callable[[], _Part]:
    """Return what makes a part once all is sent."""
    return lambda: _Part(_first(rows()), prepared, tensors(), kv, _first(slots()))


def _first(tensors: Sequence[Tensor]) -> Tensor | None:
    return tensors[0] if tensors else None


class _Requests:
    """The requests of an iteration, on the host: decodes, then prompt chunks.

    held: their KV blocks. counts, starts: new tokens of each, and tokens before. rows: the first row of each, and the
    number of rows. decodes: how many are decodes. ends: the prompts that end. full: whether all KV has 16 bits, and no
    prompt is compressed. saved: how many slots less than tokens each has in a layer.
    """

    def __init__(
        self,
        packed: Sequence[Packed],
        held: list[HeldBlocks],
        counts: Int64s,
        starts: Int64s,
        rows: Int64s,
        decodes: int,
        ends: Int64s,
    ) -> None:
        self.held, self.counts, self.starts, self.rows, self.decodes = held, counts, starts, rows, decodes
        self.ends, self._packed = ends, packed
        self.full = all(one.full for one in held)
        self.saved = np.array([one.saved for one in held], np.int64)

    def prompts(self, who: npt.NDArray[np.intp]) -> list[PackedPrompt]:
        """Return how the compressed prompts of some requests are packed."""
        return [cast(PackedPrompt, self._packed[i].table.packed) for i in who]

    def observed(self, who: npt.NDArray[np.intp], group_rows: Int64s) -> list[_Observed]:
        """Return which rows of some requests are observed, among those of a group."""
        found = []
        for i in who[who >= self.decodes]:
            one, count = self._packed[i], self._packed[i].observed
            if count:
                stop = int(np.searchsorted(group_rows, self.rows[i + 1] - 1)) + 1
                position = one.start + len(one.tokens) - count
                found.append((observed_of(one.table), slice(stop - count, stop), position))
        return found

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

    def groups(self, kv_only: Sequence[bool]) -> list[tuple[list[int], npt.NDArray[np.intp]]]:
        """Return layers that run for the same requests and store KV at the same bits, and these requests.

        Those of ``kv_only`` are apart from the others.
        """
        state = np.stack([one.runs for one in self.held], axis=1)  # [layers, requests]
        if state.all() and self.full and not any(kv_only):
            return [(list(range(len(state))), np.arange(len(self.held)))]
        if not self.full:
            state = state * np.stack([one.bits for one in self.held], axis=1)
        found: dict[bytes, list[int]] = {}
        for layer, row in enumerate(state):
            found.setdefault(row.tobytes() + bytes([kv_only[layer]]), []).append(layer)
        return [(layers, np.flatnonzero(state[layers[0]])) for layers in found.values()]

    def by_bits(self, layer: int, who: npt.NDArray[np.intp]) -> dict[int, npt.NDArray[np.intp]]:
        """Return these requests by the bits of their KV in a layer; those at 16 bits if there are none."""
        if self.full:
            return {16: who}
        bits = np.array([self.held[i].bits[layer] for i in who], np.int64)
        return {each: who[bits == each] for each in sorted(set(bits.tolist()), reverse=True)} or {16: who}

    def rows_of(self, who: npt.NDArray[np.intp]) -> Int64s:
        """Return the rows of some requests."""
        if len(who) == len(self.held):
            return np.arange(self.rows[-1])
        single, chunks = who[who < self.decodes], who[who >= self.decodes]
        ranges = (np.arange(self.rows[i], self.rows[i + 1]) for i in chunks)
        return np.concatenate([single, *ranges], dtype=np.int64)

    def ends_of(self, who: npt.NDArray[np.intp]) -> Int64s:
        """Return which of some requests are prompts that end."""
        return self.ends[np.isin(self.ends, who)]

    def passing_of(self, who: npt.NDArray[np.intp]) -> Int64s:
        """Return the rows of some requests that run all of a layer of ``kv_only``: decodes, then last tokens."""
        return np.concatenate([who[who < self.decodes], self.rows[self.ends_of(who) + 1] - 1], dtype=np.int64)

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
