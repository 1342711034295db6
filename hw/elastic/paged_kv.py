"""The memory of a paged KV cache: keys and values in KV blocks of one layer, on one device, and a pool that resizes.

    arena = MappedArena(capacity=1000, block_tokens=16, heads=8, head_dim=64, dtype=torch.float32)
    pool = KVPool(900, ArenaStorage(arena))         # memory for exactly 900 KV blocks of one layer

``sim.engine.kv_pool`` decides which KV blocks are held, and ``sim.engine.block_table`` which tokens are in them. This
file is the memory behind their numbers.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from hw.elastic.device import Accelerator, Device, device_of
from hw.elastic.device_memory import attempt

# Shapes: n slots (a slot is the place of one token in one layer), c KV blocks, p tokens of one, h KV heads, d head_dim.


class Arena(Protocol):
    """The memory of KV blocks: keys and values of ``blocks`` blocks, on one device."""

    blocks: int
    block_tokens: int
    block_bytes: int
    device: torch.device

    @property
    def allocated_bytes(self) -> int:
        """Bytes that the arena takes."""
        ...

    def resize(self, blocks: int) -> None:
        """Hold KV blocks 0 to ``blocks - 1``; they keep their content, and the memory of all others is freed.

        If memory runs out, an arena that grows stays as it is, and one that shrinks may keep some memory until it is
        resized to the same number again.
        """
        ...

    def write(self, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        """Store keys and values [n, h, d] in slots [n]; slot i is token ``i % p`` of block ``i // p``."""
        ...

    def read_slots(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Return the keys and values [n, h, d] of slots [n]."""
        ...

    def read(self, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """Return the keys and values [c, p, h, d] of blocks [c]."""
        ...


class MappedArena:
    """KV blocks in main memory: one range of addresses, of which only ``blocks`` blocks are backed by memory.

    The operating system takes pages back when the arena shrinks and adds pages when it grows; nothing is ever copied.
    """

    def __init__(self, *, capacity: int, block_tokens: int, heads: int, head_dim: int, dtype: torch.dtype) -> None:
        """Reserve addresses for ``capacity`` blocks; none has memory yet."""
        self.blocks = 0
        self.device = torch.device("cpu")
        self.block_tokens = block_tokens
        self._half_bytes = block_tokens * heads * head_dim * dtype.itemsize
        self.block_bytes = 2 * self._half_bytes
        self._capacity = max(capacity, 1)
        private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS  # pages of a shared mapping would not be freed
        self._maps = [mmap.mmap(-1, self._capacity * self._half_bytes, flags=private) for _ in range(2)]
        shape = (self._capacity, block_tokens, heads, head_dim)
        self._keys, self._values = (torch.frombuffer(m, dtype=dtype).view(shape) for m in self._maps)

    @property
    def allocated_bytes(self) -> int:
        """Bytes that are backed by memory."""
        return self.blocks * self.block_bytes

    def resize(self, blocks: int) -> None:
        """Back the first ``blocks`` blocks with memory, and no others."""
        assert 0 <= blocks <= self._capacity
        if blocks > self.blocks:
            for half in (self._keys, self._values):
                half[self.blocks : blocks].zero_()  # touched now, so that memory that does not exist is an error now
        elif blocks < self.blocks:
            page = mmap.PAGESIZE
            start = -(-blocks * self._half_bytes // page) * page
            stop = self.blocks * self._half_bytes
            if stop > start:
                for half_map in self._maps:
                    half_map.madvise(mmap.MADV_DONTNEED, start, stop - start)
        self.blocks = blocks

    def write(self, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        """Store keys and values in slots."""
        self._keys.view(-1, *keys.shape[1:]).index_copy_(0, slots, keys)
        self._values.view(-1, *values.shape[1:]).index_copy_(0, slots, values)

    def read_slots(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Return the keys and values of slots."""
        keys, values = (half.view(-1, *half.shape[2:]).index_select(0, slots) for half in (self._keys, self._values))
        return keys, values

    def read(self, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """Return the keys and values of blocks."""
        return self._keys.index_select(0, blocks), self._values.index_select(0, blocks)


class SlabArena:
    """KV blocks on any device, in slabs of equal size and a smaller last one.

    Growing and shrinking copy at most the last slab, which exists twice for that moment.
    """

    def __init__(
        self,
        *,
        slab_blocks: int,
        block_tokens: int,
        heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Hold nothing yet."""
        self.blocks = 0
        self.block_tokens = block_tokens
        self.block_bytes = 2 * block_tokens * heads * head_dim * dtype.itemsize
        self._slab_blocks = max(slab_blocks, 1)
        self._shape = (block_tokens, heads, head_dim)
        self._dtype, self.device = dtype, device
        self._slabs: list[Tensor] = []  # [2, c, p, h, d] each: keys, then values

    @property
    def allocated_bytes(self) -> int:
        """Bytes of all slabs."""
        return sum(slab.nbytes for slab in self._slabs)

    def resize(self, blocks: int) -> None:
        """Allocate or free slabs, so that there are ``blocks`` blocks."""
        full, rest = divmod(blocks, self._slab_blocks)
        sizes = [self._slab_blocks] * full + ([rest] if rest else [])
        if blocks <= self.blocks:
            del self._slabs[len(sizes) :]  # first, because it needs no memory
            self.blocks = blocks
            if sizes and self._slabs[-1].shape[1] > sizes[-1]:
                self._slabs[-1] = self._resized(self._slabs[-1], sizes[-1])
            return
        slabs = list(self._slabs)
        if slabs and slabs[-1].shape[1] < sizes[len(slabs) - 1]:
            slabs[-1] = self._resized(slabs[-1], sizes[len(slabs) - 1])
        slabs += [self._slab(size) for size in sizes[len(slabs) :]]
        self._slabs, self.blocks = slabs, blocks

    def _slab(self, blocks: int) -> Tensor:
        return torch.zeros((2, blocks, *self._shape), dtype=self._dtype, device=self.device)

    def _resized(self, slab: Tensor, blocks: int) -> Tensor:
        """Return a slab of this many blocks with the content of another."""
        new, common = self._slab(blocks), min(blocks, slab.shape[1])
        new[:, :common] = slab[:, :common]
        return new

    def write(self, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        """Store keys and values in slots."""
        per_slab = self._slab_blocks * self.block_tokens
        for index, slab in enumerate(self._slabs):
            here = (slots // per_slab == index).nonzero()[:, 0] if len(self._slabs) > 1 else slice(None)
            inside = slots[here] - index * per_slab
            for half, new in zip(slab, (keys, values), strict=True):
                half.view(-1, *self._shape[1:]).index_copy_(0, inside, new[here])

    def read_slots(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Return the keys and values of slots."""
        keys, values = self.read(slots // self.block_tokens)
        rows = torch.arange(slots.numel(), device=slots.device)
        return keys[rows, slots % self.block_tokens], values[rows, slots % self.block_tokens]

    def read(self, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """Return the keys and values of blocks."""
        if len(self._slabs) == 1:
            return self._slabs[0][0].index_select(0, blocks), self._slabs[0][1].index_select(0, blocks)
        found = torch.empty((2, blocks.numel(), *self._shape), dtype=self._dtype, device=self.device)
        for index, slab in enumerate(self._slabs):
            here = (blocks // self._slab_blocks == index).nonzero()[:, 0]
            found[:, here] = slab[:, blocks[here] - index * self._slab_blocks]
        return found[0], found[1]


class ArenaStorage:
    """An arena as the storage of a ``sim.engine.kv_pool.KVPool``."""

    def __init__(self, arena: Arena, hardware: Device | None = None) -> None:
        """Keep the pool's blocks in this arena; ``hardware`` is the device that holds it, None to find it."""
        self._arena, self._hardware = arena, hardware or device_of(arena.device)

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

    def _move(self, moved: dict[int, int]) -> None:
        tokens = torch.arange(self._arena.block_tokens)
        source, target = (
            (torch.tensor(list(blocks))[:, None] * self._arena.block_tokens + tokens).view(-1)
            for blocks in (moved.keys(), moved.values())
        )
        step = 64 * self._arena.block_tokens  # a few blocks at a time: what moves exists twice for that moment
        for at in range(0, source.numel(), step):
            self._copy(source[at : at + step], target[at : at + step])

    def _copy(self, source: Tensor, target: Tensor) -> None:
        device = self._arena.device
        self._arena.write(target.to(device), *self._arena.read_slots(source.to(device)))
