"""Compressed KV of prompts in the paged pool: made when a prefill ends, read by decodes.

    compressor = PromptCompressor(arena, elastic)
    table.packed = compressor.compress(table, tokens, way, formats)     # the first slots of each layer now hold it

``hw.elastic.kv_compression`` has the methods, and how each lies in token slots. Tokens that are decoded later follow in
full, or at the bits of the plan. Attention unpacks a layer of one request at a time and computes with PyTorch, on every
device; a pass with such requests is not recorded as a CUDA graph.

Ada-KV and ThinK observe the queries of a prompt's last tokens. ``ObservedQueries`` collects them while the prompt is
computed, of those tokens that are computed under a plan that compresses. They take n H d numbers a layer until the
prefill has ended, outside of the pool.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from hw.elastic.attention import Prepared, Rows
from hw.elastic.kv_compression.lorc import Directions
from hw.elastic.kv_compression.packing import PackedKV, PromptRead, kept_directions, pack
from hw.elastic.kv_compression.prompt_kv import LayerKV
from hw.elastic.model import ElasticModel, Rope
from hw.elastic.paged_kv import KVArena
from hw.elastic.quantized_kv import QuantizedKV, rotated
from sim.cost.kv_format import KVFormat
from sim.cost.plan import KVCompression
from sim.engine.block_table import BlockTable

# Shapes: p tokens of a prompt, n observed ones, s slots, m tokens that follow the prompt, H query heads, h KV heads,
# d head_dim, r decodes.

PackedPrompt = Mapping[int, PackedKV]
"""How the prompt of a request is packed in each layer."""


class ObservedQueries:
    """The rotated queries of the last tokens of a prompt, layer by layer, as they are computed."""

    def __init__(self) -> None:
        """Begin with none."""
        self._rows: dict[int, tuple[int, Tensor]] = {}  # layer -> position of the first, and queries [n, H, d]

    def note(self, layer: int, position: int, queries: Tensor) -> None:
        """Keep queries [n, H, d] of tokens from a position on; those of a pass that is run again replace its first."""
        first, known = self._rows.get(layer, (position, None))
        if known is None or not first <= position <= first + len(known):
            self._rows[layer] = position, queries.clone()
        else:
            self._rows[layer] = first, torch.cat((known[: position - first], queries))

    def of(self, layer: int) -> Tensor:
        """Return the queries [H, n, d] of a layer."""
        return self._rows[layer][1].transpose(0, 1)


def observed_of(table: BlockTable) -> ObservedQueries:
    """Return what was observed of the prompt that a table holds."""
    if not isinstance(table.observed, ObservedQueries):
        table.observed = ObservedQueries()
    return table.observed


class PromptCompressor:
    """Compresses prompts whose KV lies in an arena."""

    def __init__(self, arena: KVArena, elastic: ElasticModel) -> None:
        """Compress for this model."""
        self._arena, self._elastic = arena, elastic
        self._angles: Rope = ()
        self._known = 0

    @torch.inference_mode()
    def compress(
        self, table: BlockTable, tokens: int, way: KVCompression, formats: Sequence[KVFormat]
    ) -> dict[int, PackedKV]:
        """Compress the KV of a prompt of ``tokens`` tokens into the first slots of each layer; return how it lies.

        ``formats``: of the layers from now on; so far they hold all tokens at 16 bits.
        """
        device, spec = self._arena.device, self._elastic.spec
        packed: dict[int, PackedKV] = {}
        for number in sorted(table.mha & table.blocks.keys()):
            layer, ids, form = self._elastic.layers[number], table.blocks[number], formats[number]
            slots = torch.tensor(table.slots_of(number, range(tokens)), device=device)
            keys, values = (part.transpose(0, 1) for part in self._arena.read_slots(slots))
            given = LayerKV(
                queries=self._queries(table, number, keys),
                keys=keys,
                values=values,
                scale=layer.scale,
                window=layer.window,
            )
            angles = partial(self._angles_of, layer.rotation)
            directions = self._directions(number, kept_directions(spec, way)) if way.method == "lorc" else None
            packed[number], held_keys, held_values = pack(way, given, directions, angles)
            size = form.block_tokens
            target = [ids[place // size] * size + place % size for place in range(packed[number].slots)]
            self._write(target, held_keys, held_values, form.bits)
        return packed

    def _queries(self, table: BlockTable, layer: int, keys: Tensor) -> Tensor:
        """Return the observed queries of a layer, [H, n, d]; n is 0 for a method that observes none."""
        if isinstance(table.observed, ObservedQueries):
            return table.observed.of(layer)
        return keys.new_empty(self._elastic.spec.num_heads, 0, keys.shape[2])

    def _directions(self, layer: int, count: int) -> tuple[Directions, Directions]:
        found = self._elastic.directions
        assert found is not None
        of_keys, of_values = (each[layer] for each in found)
        return of_keys.first(count), of_values.first(count)

    def _angles_of(self, rotation: int | None, tokens: int) -> tuple[Tensor | None, Tensor | None]:
        """Return the cosines and sines [p, d_rot] of the first positions; those of the longest prompt are kept."""
        if rotation is None:
            return None, None
        if tokens > self._known:
            self._known = 1 << (tokens - 1).bit_length()
            self._angles = self._elastic.rotate(torch.arange(self._known, device=self._arena.device))
        cos, sin = self._angles[rotation]
        return cos[:tokens], sin[:tokens]

    def _write(self, slots: list[int], keys: Tensor, values: Tensor, bits: int) -> None:
        """Write what slots hold in place of keys and of values, [s, h, d] each."""
        at = torch.tensor(slots, device=self._arena.device)
        if bits == 16:
            self._arena.write(at, keys, values)
        else:
            quantized = QuantizedKV(self._arena, bits)
            quantized.note_written(slots)
            quantized.write(at, keys, values)


class PreparedCompressed(Prepared):
    """Decodes of requests with compressed prompts: PyTorch's attention over what is unpacked, one request at a time."""

    def __init__(
        self, rows: Rows, arena: KVArena, kv: QuantizedKV | None, layers: Sequence[int], prompts: Sequence[PackedPrompt]
    ) -> None:
        """Take the block tables of decodes, and how the prompt of each is packed.

        Args:
            rows: their ``context`` counts slots, those of the compressed prompt and of the tokens that follow.
            kv: where the slots are quantized; None: at 16 bits in ``arena``. layers: of the rows.
        """
        assert not len(rows.prefix)
        self._rows, self._kv, self._layers, self._prompts = rows, kv or arena, layers, prompts
        self.arrays = [rows.table.astype(np.int64)]

    def attend(
        self, at: int, tensors: Sequence[Tensor], query: Tensor, key: Tensor, value: Tensor, scale: float
    ) -> Tensor:
        """Compute the attention of each request."""
        out, rows = torch.empty(query.shape, dtype=query.dtype, device=query.device), self._rows
        quantized = isinstance(self._kv, QuantizedKV)
        for index, (prompt, context) in enumerate(zip(self._prompts, rows.context.tolist(), strict=True)):
            blocks = tensors[0][at, index, : -(-context // rows.block_tokens)]
            held = [part.flatten(0, 1)[:context] for part in self._kv.read(blocks)]
            asking = rotated(query[index]).to(query.dtype) if quantized else query[index]
            found = _attended(asking, held, prompt[self._layers[at]], rows.windows[at], scale)
            out[index] = rotated(found).to(query.dtype) if quantized else found
        return out


def _attended(query: Tensor, held: Sequence[Tensor], packed: PackedKV, window: int, scale: float) -> Tensor:
    """Return the attention [H, d] of a query [H, d] to what slots [s + m, h, d] hold: a prompt, then tokens in full."""
    prompt = packed.read(*(part[: packed.slots] for part in held))
    later = [part[packed.slots :].transpose(0, 1) for part in held]
    keys, values = torch.cat((prompt.keys, later[0]), 1), torch.cat((prompt.values, later[1]), 1)
    seen = _seen(prompt, packed.tokens, later[0].shape[1], window)
    attended = functional.scaled_dot_product_attention(
        query.view(1, len(keys), -1, query.shape[1]),
        keys[None],
        values[None],
        attn_mask=None if seen is None else seen[None, :, None],
        scale=scale,
    )
    return attended.view(query.shape)


def _seen(prompt: PromptRead, tokens: int, later: int, window: int) -> Tensor | None:
    """Return which tokens each head sees of a prompt and of the ``later`` ones, bool [h, w + m]; None for all.

    Args:
        tokens: of the prompt before it was compressed. window: how far the newest token looks back; 0: to the first.
    """
    heads, width = prompt.keys.shape[:2]
    device, newest = prompt.keys.device, tokens + later - 1
    seen = prompt.seen
    if window:
        positions = torch.arange(width, device=device) if prompt.positions is None else prompt.positions
        near = positions > newest - window
        seen = near if seen is None else seen & near
    if seen is None:
        return None
    behind = torch.arange(tokens, tokens + later, device=device) > newest - (window or later)
    return torch.cat((seen.expand(heads, width), behind.expand(heads, later)), 1)
