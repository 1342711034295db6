"""The memory of a paged KV cache: keys and values in KV blocks of one layer, on one device, and a pool that resizes.

    arena = KVArena(device, capacity=1000, block_tokens=16, heads=8, head_dim=64, dtype=torch.float32)
    pool = KVPool(900, ArenaStorage(arena))         # memory for exactly 900 KV blocks of one layer

``sim.engine.kv_pool`` decides which KV blocks are held, and ``sim.engine.block_table`` which tokens are in them. This
file is the memory behind their numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from hw.elastic.device import Accelerator, Device
from hw.elastic.device_memory import attempt

# Shapes: n slots (a slot is the place of one token in one layer), c KV blocks, p tokens of one, h KV heads, d head_dim.


class KVArena:
    """KV blocks in one range of addresses, of which only ``blocks`` blocks are backed by memory.

    The device maps memory when the arena grows and unmaps it when the arena shrinks; nothing is ever copied.

    kv: keys and values, [capacity, 2, p, h, d], of which only the first ``blocks`` may be used. Its addresses never
    change, so a recorded pass stays valid when the arena is resized.
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
        self.blocks = blocks

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


def _runs(blocks: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Yield (place in the list, first block, how many) for every run of consecutive blocks."""
    start = 0
    for at in range(1, len(blocks) + 1):
        if at == len(blocks) or blocks[at] != blocks[at - 1] + 1:
            yield start, blocks[start], at - start
            start = at


def _copied(source: Tensor, target: Tensor) -> None:
    target.copy_(source)


class ArenaStorage:
    """An arena as the storage of a ``sim.engine.kv_pool.KVPool``."""

    def __init__(self, arena: KVArena) -> None:
        """Keep the pool's blocks in this arena."""
        self._arena, self._hardware = arena, arena.hardware
        self._saved: dict[int, Tensor] = {}

    def resize(self, blocks: int) -> None:
        """Hold blocks 0 to ``blocks - 1``."""
        grows = blocks > self._arena.blocks
        attempt(self._hardware, lambda: self._arena.resize(blocks))
        if not grows and isinstance(self._hardware, Accelerator):
            # A copy that takes the place of the blocks is allocated on another stream, which cannot use what the
            # allocator keeps for this one.
            self._hardware.give_back()

    def move(self, moved: dict[int, int]) -> None:
        """Copy the content of blocks to others: old number to new."""
        attempt(self._hardware, lambda: self._move(moved))

    def copy(self, source: Sequence[int], target: Sequence[int]) -> None:
        """Copy the content of slots to others, all read before any is written."""
        attempt(self._hardware, lambda: self._copy(torch.tensor(source), torch.tensor(target)))

    def save_on_host(self, request_id: int, blocks: Sequence[int]) -> None:
        """Copy the content of blocks to pinned host memory; on a CPU to other memory.

        The copies are started in the order of all other work, so nothing waits for them. They take no memory of the
        device.
        """
        attempt(self._hardware, lambda: self._save(request_id, blocks))

    def load_from_host(self, request_id: int, blocks: Sequence[int]) -> None:
        """Copy what was saved for a request to other blocks."""
        saved, kv = self._saved.pop(request_id), self._arena.kv
        assert len(saved) == len(blocks)
        upload = self._hardware.upload if isinstance(self._hardware, Accelerator) else _copied
        for at, first, count in _runs(blocks):
            upload(saved[at : at + count], kv[first : first + count])

    def forget_on_host(self, request_id: int) -> None:
        """Free what was saved for a request."""
        self._saved.pop(request_id, None)

    def _save(self, request_id: int, blocks: Sequence[int]) -> None:
        kv, hardware = self._arena.kv, self._hardware
        size = len(blocks) * self._arena.block_bytes
        if isinstance(hardware, Accelerator):
            memory, download = hardware.pinned(size), hardware.download
        else:
            memory, download = torch.empty(size, dtype=torch.uint8), _copied
        saved = memory.view(kv.dtype).view(len(blocks), *kv.shape[1:])
        for at, first, count in _runs(blocks):
            download(kv[first : first + count], saved[at : at + count])
        self._saved[request_id] = saved

    def _move(self, moved: dict[int, int]) -> None:
        kv = self._arena.kv
        source, target = (torch.tensor(list(blocks)) for blocks in (moved.keys(), moved.values()))
        step = 64  # a few blocks at a time: what moves exists twice for that moment
        for at in range(0, source.numel(), step):
            part = slice(at, at + step)
            kv.index_copy_(0, target[part].to(kv.device), kv.index_select(0, source[part].to(kv.device)))

    def _copy(self, source: Tensor, target: Tensor) -> None:
        device = self._arena.device
        self._arena.write(target.to(device), *self._arena.read_slots(source.to(device)))
