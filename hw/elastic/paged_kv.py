"""The memory of a paged KV cache: keys and values in KV blocks of one layer, on one device, which grows and shrinks.

    arena = KVArena(device, capacity=1000, block_tokens=16, heads=8, head_dim=64, dtype=torch.float32)
    arena.resize(900)                               # memory for exactly 900 KV blocks of one layer

``sim.engine.kv_pool`` decides which KV blocks are held (hw/elastic/kv_storage.py connects the two), and
``sim.engine.block_table`` which tokens are in them. This file is the memory behind their numbers.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from hw.elastic.device import Device

# Shapes: n slots (a slot is the place of one token in one layer), c KV blocks, p tokens of one, h KV heads, d head_dim.


class KVArena:
    """KV blocks in one range of addresses, of which only ``blocks`` blocks are backed by memory.

    The device maps memory when the arena grows and unmaps it when the arena shrinks; nothing is ever copied.

    kv: keys and values, [capacity, 2, p, h, d], of which only the first ``blocks`` may be used. Its addresses never
    change, so a recorded pass stays valid when the arena is resized. memory: the same bytes, [capacity, block_bytes].
    packed: blocks whose bytes may be those of quantized KV, which are no numbers to whoever reads them as ``kv``.
    """

    def __init__(
        self, hardware: Device, *, capacity: int, block_tokens: int, heads: int, head_dim: int, dtype: torch.dtype
    ) -> None:
        """Reserve addresses for ``capacity`` blocks; none has memory yet."""
        self.blocks = 0
        self.hardware, self.device = hardware, hardware.place
        self.block_tokens = block_tokens
        self.block_bytes = 2 * block_tokens * heads * head_dim * dtype.itemsize
        self.capacity = max(capacity, 1)
        self._memory = hardware.reserve(self.capacity * self.block_bytes)
        size = self.capacity * self.block_bytes
        self.kv = self._memory.tensor[:size].view(dtype).view(self.capacity, 2, block_tokens, heads, head_dim)
        self.packed: set[int] = set()
        self.memory = self._memory.tensor[:size].view(self.capacity, self.block_bytes)

    @property
    def allocated_bytes(self) -> int:
        """Bytes of the blocks that are backed by memory."""
        return self.blocks * self.block_bytes

    @property
    def backed_bytes(self) -> int:
        """Bytes that the arena takes: those of its blocks, rounded up to what the device maps at once."""
        return self._memory.backed_bytes

    def resize(self, blocks: int) -> None:
        """Back the first ``blocks`` blocks with memory, and no others; they keep their content, new ones are zeros.

        Raises:
            torch.OutOfMemoryError: if there is no memory to grow; then nothing has changed.
        """
        assert 0 <= blocks <= self.capacity
        if blocks == self.blocks:
            return
        self._memory.back(blocks * self.block_bytes)
        # Zeros, because attention multiplies by 0 what it must not see. On a CPU this also touches every page, so that
        # memory that does not exist is an error now.
        self.kv[self.blocks : blocks].zero_()
        self.packed.difference_update(range(self.blocks, blocks))
        self.blocks = blocks

    def begin(self, blocks: Iterable[int]) -> None:
        """Make blocks ready for keys and values: zeros in place of what quantized KV has left in them."""
        left = [block for block in blocks if block in self.packed]
        if left:
            self.kv[torch.tensor(left, device=self.device)] = 0
            self.packed.difference_update(left)

    def close(self) -> None:
        """Free all memory."""
        self.resize(0)

    def rows(self) -> tuple[Tensor, Tensor]:
        """Return the keys and the values of all blocks, views [2 * capacity, p, h, d] of the same memory.

        Keys of block i are row 2 * i of the first, and values row 2 * i of the second.
        """
        rows = self.kv.view(-1, *self.kv.shape[2:])
        return rows, rows[1:]

    def write(self, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        """Store keys and values [n, h, d] in slots [n]; slot i is token ``i % p`` of block ``i // p``."""
        places, half = self._places(slots)
        places.index_copy_(0, half, keys)
        places.index_copy_(0, half + self.block_tokens, values)

    def read_slots(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Return the keys and values [n, h, d] of slots [n]."""
        places, half = self._places(slots)
        return places.index_select(0, half), places.index_select(0, half + self.block_tokens)

    def _places(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Return all places of tokens, [2 * p * capacity, h, d], and the rows of the keys of slots."""
        return self.kv.view(-1, *self.kv.shape[3:]), slots + slots // self.block_tokens * self.block_tokens

    def read(self, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """Return the keys and values [c, p, h, d] of blocks [c]."""
        keys, values = self.rows()
        return keys.index_select(0, 2 * blocks), values.index_select(0, 2 * blocks)
