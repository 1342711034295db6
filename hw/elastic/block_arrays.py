"""The KV blocks of an iteration as arrays, read from the block tables of its requests.

    held = [read_table(table, layers, tokens) for table in tables]
    blocks = stack_blocks(held, width)              # int32 [layers, requests, width]

A table keeps what was read between iterations, so that an iteration reads only the blocks that are new. Nothing here
runs once for every layer, unless a request keeps different tokens or bits in each.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from sim.cost.kv_format import KVFormat
from sim.cost.memory import kv_blocks
from sim.engine.block_table import BlockTable

Int32s = npt.NDArray[np.int32]
Int64s = npt.NDArray[np.int64]

# Shapes: l layers, r requests, w KV blocks of one layer.

HIDDEN = 1
"""Stands among bits of KV for hidden states in place of keys and values."""


class HeldBlocks:
    """What was read of one table.

    blocks: [l, at least w], the KV blocks of each layer; undefined for layers that the request does not run.
    needed: blocks of the layer that has most. runs: bool [l]. first, last: [l], how many of the first and last tokens a
        layer keeps; last is 0 where it keeps all. bits: [l], at which precision it stores KV, ``HIDDEN`` for hidden
        states; negative behind a compressed prompt. full: whether that is 16 in every layer. saved: how many slots less
        than tokens each layer has, as its prompt is compressed.
    """

    def __init__(self, layers: int) -> None:
        """Hold nothing yet."""
        self.blocks: Int32s = np.zeros((layers, 4), np.int32)
        self.runs = np.zeros(layers, np.bool_)
        self.first, self.last = np.zeros(layers, np.int32), np.zeros(layers, np.int32)
        self.bits = np.full(layers, 16, np.int32)
        self.keeps_all = self.full = True
        self.needed = self.saved = 0
        self._mha: frozenset[int] = frozenset()
        self._formats: tuple[KVFormat, ...] | None = None
        self._layers: list[int] = []

    def update(self, table: BlockTable, tokens: int) -> None:
        """Read what has changed; ``tokens`` are those that its blocks have to hold."""
        if table.mha is not self._mha:
            self._mha, self._layers = table.mha, sorted(table.mha)
            self.runs[:] = False
            self.runs[self._layers] = True
        if table.formats is not self._formats:
            self._formats = table.formats
            formats = table.formats or ()
            self.bits[:] = [HIDDEN if one.hidden else one.bits for one in formats] or 16
            self.saved = table.saved_tokens
            if table.packed is not None:
                self.bits *= -1
            self.full = bool((self.bits == 16).all())
            keeps = [table.keep_of(layer) for layer in range(len(self.runs))]
            self.keeps_all = all(keep.last_tokens is None for keep in keeps)
            for into, tokens_kept in (
                (self.first, [k.first_tokens for k in keeps]),
                (self.last, [k.last_tokens for k in keeps]),
            ):
                into[:] = [0 if kept is None else kept for kept in tokens_kept]
        if self._formats is not None:
            self.needed = max((len(table.blocks[layer]) for layer in self._layers), default=0)
        else:
            self.needed = kv_blocks(tokens, table.block_tokens)
        if table.unchanged < self.needed and self._layers:
            self._read(table, table.unchanged, self.needed)
            table.unchanged = self.needed

    def _read(self, table: BlockTable, start: int, stop: int) -> None:
        """Read the blocks of every layer from one place to another."""
        if stop > self.blocks.shape[1]:
            grown = np.zeros((len(self.blocks), 1 << (stop - 1).bit_length()), np.int32)
            grown[:, : self.blocks.shape[1]] = self.blocks
            self.blocks = grown
        if self._formats is None:
            self.blocks[self._layers, start:stop] = [table.blocks[layer][start:stop] for layer in self._layers]
            return
        for layer in self._layers:
            ids = table.blocks[layer]
            self.blocks[layer, start : len(ids)] = ids[start:]


def read_table(table: BlockTable, layers: int, tokens: int) -> HeldBlocks:
    """Return the KV blocks that hold ``tokens`` tokens of a request of a model with this many layers."""
    held = table.read
    if not isinstance(held, HeldBlocks) or len(held.runs) != layers:
        held = table.read = HeldBlocks(layers)
        table.unchanged = 0
    held.update(table, tokens)
    return held


def stack_blocks(held: Sequence[HeldBlocks], width: int) -> Int32s:
    """Return the first ``width`` blocks of several requests, [l, r, width]; undefined behind those that one holds."""
    stacked = np.zeros((len(held[0].runs), len(held), width), np.int32)
    for index, one in enumerate(held):
        own = one.blocks[:, :width]
        stacked[:, index, : own.shape[1]] = own
    return stacked
