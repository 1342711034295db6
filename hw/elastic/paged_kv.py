"""A paged KV cache on a real device: memory in KV blocks of one layer, who holds which, and a pool that really resizes.

    pool = PagedKV(arena, layer_blocks=900)         # the arena holds 900 KV blocks of one layer, and no byte more
    ids, overwritten = pool.take(12)                # blocks for a request, the longest free first
    pool.release(ids, owner=7)                      # their content stays readable for request 7 until they are taken
    pool.resize(600)                                # free blocks go at once; what is held beyond 600 is a debt
    moved = pool.settle()                           # the debt paid, blocks move together and the rest is given back

Any block may serve any layer, because plans drop layers one by one: ``sim.engine.kv_pool.KVPool`` counts them the same way,
and the two give equal counts for equal calls. ``RequestPages`` says in which blocks the tokens of a request lie.
"""

from __future__ import annotations

import mmap
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from sim.cost.memory import kv_blocks
from sim.cost.plan import KV_KEEP_ALL, KVKeep

# Shapes: n slots (a slot is the place of one token in one layer), c KV blocks, p tokens of one, h KV heads, d head_dim.


class Arena(Protocol):
    """The memory of KV blocks: keys and values of ``blocks`` blocks, on one device."""

    blocks: int
    block_tokens: int
    block_bytes: int
    device: torch.device

    def resize(self, blocks: int) -> None:
        """Hold blocks 0 to ``blocks - 1``; their content stays, the memory of others is given back."""
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

    The kernel takes back the pages of what shrinks and gives pages for what grows; nothing is ever copied.
    """

    def __init__(self, *, capacity: int, block_tokens: int, heads: int, head_dim: int, dtype: torch.dtype) -> None:
        """Reserve addresses for ``capacity`` blocks; none of them has memory yet."""
        self.blocks = 0
        self.device = torch.device("cpu")
        self.block_tokens = block_tokens
        self._half_bytes = block_tokens * heads * head_dim * dtype.itemsize
        self.block_bytes = 2 * self._half_bytes
        self._capacity = max(capacity, 1)
        private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS  # pages of a shared mapping would not be given back
        self._maps = [mmap.mmap(-1, self._capacity * self._half_bytes, flags=private) for _ in range(2)]
        shape = (self._capacity, block_tokens, heads, head_dim)
        self._keys, self._values = (torch.frombuffer(m, dtype=dtype).view(shape) for m in self._maps)

    def resize(self, blocks: int) -> None:
        """Back the first ``blocks`` blocks with memory, and no others."""
        assert 0 <= blocks <= self._capacity
        if blocks > self.blocks:
            for half in (self._keys, self._values):
                half[self.blocks : blocks].zero_()  # touched now, so that a budget that does not hold it is found now
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
    """KV blocks on any device, in slabs of equal size and a last one of what is left over.

    Growing and shrinking copy at most the last slab, which for that moment exists twice.
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

    def resize(self, blocks: int) -> None:
        """Allocate or free slabs, so that there are ``blocks`` blocks."""
        whole, rest = divmod(blocks, self._slab_blocks)
        sizes = [self._slab_blocks] * whole + ([rest] if rest else [])
        del self._slabs[len(sizes) :]
        for index, size in enumerate(sizes):
            old = self._slabs[index] if index < len(self._slabs) else None
            if old is not None and old.shape[1] == size:
                continue
            new = torch.zeros((2, size, *self._shape), dtype=self._dtype, device=self.device)
            if old is None:
                self._slabs.append(new)
            else:
                common = min(size, old.shape[1])
                new[:, :common] = old[:, :common]
                self._slabs[index] = new
        self.blocks = blocks

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


# --- Who holds what --------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Run:
    """Free blocks that were freed together, the first to be taken first; ``owner`` -1 when nobody can use them."""

    owner: int
    ids: deque[int]


class PagedKV:
    """The blocks of an arena: free ones in the order in which they will be taken, and how many there may be."""

    def __init__(self, arena: Arena, layer_blocks: int = 0) -> None:
        """Allocate ``layer_blocks`` blocks, all of them free."""
        self.arena = arena
        self.layer_blocks = 0
        self._held = 0
        self._runs: deque[_Run] = deque()
        self._kept: dict[int, _Run] = {}
        self._dead: list[int] = []  # blocks of the arena that the pool no longer counts, until ``settle``
        self.resize(layer_blocks)
        self.settle()

    @property
    def used_layer_blocks(self) -> int:
        """Blocks that requests hold."""
        return self._held

    @property
    def free_layer_blocks(self) -> int:
        """Blocks that nobody holds; below 0 while more are held than there may be."""
        return self.layer_blocks - self._held

    @property
    def allocated_bytes(self) -> int:
        """Bytes that the arena takes now."""
        return self.arena.blocks * self.arena.block_bytes

    def take(self, count: int) -> tuple[list[int], list[int]]:
        """Hold so many more blocks, the longest free first; return them, and the owners whose content is lost."""
        assert 0 <= count <= max(self.free_layer_blocks, 0)
        ids: list[int] = []
        overwritten = []
        while len(ids) < count:
            run = self._runs[0]
            taken = min(len(run.ids), count - len(ids))
            ids.extend(run.ids.popleft() for _ in range(taken))
            if taken and run.owner >= 0:
                overwritten.append(run.owner)
            if not run.ids:
                self._runs.popleft()
                self._kept.pop(run.owner, None)
        self._held += count
        return ids, overwritten

    def release(self, ids: Iterable[int], owner: int = -1) -> None:
        """Free blocks, the first of them to be taken first; their content stays readable for ``owner`` until then."""
        freed = deque(ids)
        owed = min(max(-self.free_layer_blocks, 0), len(freed))
        self._held -= len(freed)
        assert self._held >= 0
        self._dead.extend(freed.popleft() for _ in range(owed))
        self._enqueue(freed, owner)

    def _enqueue(self, ids: deque[int], owner: int = -1) -> None:
        if owner < 0 and self._runs and self._runs[-1].owner < 0:
            self._runs[-1].ids.extend(ids)
        elif ids:
            run = _Run(owner, ids)
            self._runs.append(run)
            if owner >= 0:
                self._kept[owner] = run

    def resize(self, layer_blocks: int) -> list[int]:
        """Grow or shrink the pool; return the owners whose content was lost.

        Growth is there at once. Shrinking takes the longest free blocks; where fewer are free than must go,
        ``free_layer_blocks`` is below 0 until requests have given up theirs. The memory goes with ``settle``.
        """
        lost: list[int] = []
        change = layer_blocks - self.layer_blocks
        if change < 0:
            ids, lost = self.take(min(-change, max(self.free_layer_blocks, 0)))
            self._held -= len(ids)
            self._dead.extend(ids)
        grown = max(0, min(change, layer_blocks - self._held))
        self.layer_blocks = layer_blocks
        fresh = deque(self._dead[:grown])
        del self._dead[:grown]
        missing = grown - len(fresh)
        if missing:
            first = self.arena.blocks
            self.arena.resize(first + missing)
            fresh.extend(range(first, first + missing))
        self._enqueue(fresh)
        return lost

    def settle(self) -> dict[int, int]:
        """Give the memory of blocks that no longer count back; return where held blocks went, old number to new.

        Blocks that stay move together at the low end of the arena; the caller renames them in its tables. Nothing
        happens while more is held than there may be.
        """
        if not self._dead or self.free_layer_blocks < 0:
            return {}
        keep = self.arena.blocks - len(self._dead)
        assert keep == self.layer_blocks
        dead = set(self._dead)
        movers = [block for block in range(keep, self.arena.blocks) if block not in dead]
        holes = sorted(block for block in dead if block < keep)
        moved = dict(zip(movers, holes, strict=True))
        if moved:
            tokens = torch.arange(self.arena.block_tokens)
            source, target = (
                (torch.tensor(blocks)[:, None] * self.arena.block_tokens + tokens).view(-1)
                for blocks in (movers, holes)
            )
            self._move(source, target)
            for run in self._runs:
                run.ids = deque(moved.get(block, block) for block in run.ids)
        self._dead.clear()
        self.arena.resize(keep)
        return moved

    def _move(self, source: Tensor, target: Tensor) -> None:
        step = 64 * self.arena.block_tokens  # a few blocks at a time: what moves exists twice for that moment
        for at in range(0, source.numel(), step):
            slots = source[at : at + step].to(self.arena.device)
            self.arena.write(target[at : at + step].to(self.arena.device), *self.arena.read_slots(slots))

    def forget(self) -> None:
        """Let nobody find anything again."""
        for run in self._kept.values():
            run.owner = -1
        self._kept.clear()

    def kept_layer_blocks(self, owner: int) -> int:
        """Return how many blocks still hold what ``owner`` left behind."""
        run = self._kept.get(owner)
        return len(run.ids) if run else 0

    def claim(self, owner: int, layer_blocks: int) -> list[int]:
        """Hold the last ``layer_blocks`` blocks of what ``owner`` left behind again; the rest of it is anybody's."""
        run = self._kept.pop(owner, None)
        if run is None:
            assert not layer_blocks
            return []
        assert layer_blocks <= len(run.ids)
        run.owner = -1
        ids = [run.ids.pop() for _ in range(layer_blocks)]
        self._held += layer_blocks
        return ids[::-1]

    def check(self, held: Iterable[int]) -> None:
        """Check that every block of the arena is held once, free once, or on its way out, and none twice."""
        ids = [*held, *self._dead, *(block for run in self._runs for block in run.ids)]
        assert sorted(ids) == list(range(self.arena.blocks)), "a KV block is lost, or in two places"
        assert self.allocated_bytes == self.arena.blocks * self.arena.block_bytes


# --- Where the tokens of a request lie -------------------------------------------------------------------------------


@dataclass(slots=True, eq=False)
class RequestPages:
    """The KV blocks of one request, layer by layer, and the MHA blocks that it can run.

    mha: the layers whose MHA block it runs, and whose KV it holds.
    kv_keep: which tokens each layer keeps; None while every token is kept. A layer that keeps the first f and the last
        w tokens is a ring behind its first f slots: token t >= f lies in slot f + (t - f) % w.
    blocks: layer -> its KV blocks, in the order of their slots.
    """

    mha: frozenset[int] = frozenset()
    kv_keep: tuple[KVKeep, ...] | None = None
    blocks: dict[int, list[int]] = field(default_factory=dict)

    @property
    def held_layer_blocks(self) -> int:
        """KV blocks of one layer that the request holds, over all layers."""
        return sum(map(len, self.blocks.values()))

    def all_blocks(self) -> list[int]:
        """Return its blocks, those of the last tokens first, of equal tokens by layer."""
        deepest = max(map(len, self.blocks.values()), default=0)
        return [
            self.blocks[layer][index]
            for index in range(deepest - 1, -1, -1)
            for layer in sorted(self.blocks)
            if index < len(self.blocks[layer])
        ]

    def rename(self, moved: dict[int, int]) -> None:
        """Follow blocks that moved."""
        for layer, ids in self.blocks.items():
            self.blocks[layer] = [moved.get(block, block) for block in ids]

    def keep_of(self, layer: int) -> KVKeep:
        """Return what a layer keeps."""
        return self.kv_keep[layer] if self.kv_keep is not None else KV_KEEP_ALL

    def layer_blocks(self, layer: int, tokens: int, block_tokens: int) -> int:
        """Return the blocks that a layer needs for so many computed tokens."""
        return kv_blocks(self.keep_of(layer).tokens(tokens), block_tokens)

    def hold(self, pool: PagedKV, tokens: int) -> list[int]:
        """Take or free blocks so that ``tokens`` computed tokens fit exactly; return whose content was overwritten."""
        block_tokens = pool.arena.block_tokens
        wanted = {layer: self.layer_blocks(layer, tokens, block_tokens) for layer in self.mha}
        freed: list[int] = []
        for layer in sorted(self.blocks, reverse=True):
            ids = self.blocks[layer]
            keep = wanted.get(layer, 0)
            freed.extend(ids[keep:][::-1])
            del ids[keep:]
            if layer not in self.mha:
                del self.blocks[layer]
        if freed:
            pool.release(freed)
        missing = {layer: count - len(self.blocks.get(layer, ())) for layer, count in wanted.items()}
        ids, overwritten = pool.take(sum(missing.values()))
        at = 0
        for layer in sorted(missing):
            self.blocks.setdefault(layer, []).extend(ids[at : at + missing[layer]])
            at += missing[layer]
        return overwritten

    def found(self, ids: Sequence[int]) -> None:
        """Take up blocks that were found again, in the order in which ``all_blocks`` gave them."""
        layers = sorted(self.mha)
        self.blocks = {layer: [] for layer in layers}
        for index, block in enumerate(reversed(ids)):
            self.blocks[layers[-1 - index % len(layers)]].append(block)

    def slots(self, layer: int, start: int, count: int, block_tokens: int) -> list[int]:
        """Return the slots of tokens ``start`` to ``start + count - 1`` of a layer."""
        ids, keep = self.blocks[layer], self.keep_of(layer)
        if keep.first_tokens is None or keep.last_tokens is None:
            return [ids[t // block_tokens] * block_tokens + t % block_tokens for t in range(start, start + count)]
        places = (ring_place(keep, token) for token in range(start, start + count))
        return [ids[place // block_tokens] * block_tokens + place % block_tokens for place in places]

    def kept_slots(self, tokens: int, block_tokens: int) -> list[int]:
        """Return the slots of all that stays of so many computed tokens: layer by layer, in the order of their places.

        Two requests that run the same layers and keep the same tokens hold the same at equal positions of this list.
        """
        return [
            ids[place // block_tokens] * block_tokens + place % block_tokens
            for layer, ids in sorted(self.blocks.items())
            for place in range(self.keep_of(layer).tokens(tokens))
        ]

    def end_prefill(self, pool: PagedKV, tokens: int, kv_keep: tuple[KVKeep, ...] | None) -> None:
        """Leave the tokens that ``kv_keep`` does not name: what stays moves into each layer's ring."""
        block_tokens = pool.arena.block_tokens
        if kv_keep is not None:
            for layer in sorted(self.blocks):
                keep = kv_keep[layer]
                first, last = keep.first_tokens, keep.last_tokens
                if first is None or last is None or tokens <= first + last:
                    continue
                ids = self.blocks[layer]
                source = [
                    ids[t // block_tokens] * block_tokens + t % block_tokens for t in range(tokens - last, tokens)
                ]
                places = [ring_place(keep, token) for token in range(tokens - last, tokens)]
                target = [ids[place // block_tokens] * block_tokens + place % block_tokens for place in places]
                slots = torch.tensor([source, target], device=pool.arena.device)
                pool.arena.write(slots[1], *pool.arena.read_slots(slots[0]))
            self.kv_keep = kv_keep
        self.hold(pool, tokens)


def ring_place(keep: KVKeep, token: int) -> int:
    """Return the slot, counted from a layer's first, of a token where first and last tokens are kept."""
    assert keep.first_tokens is not None
    assert keep.last_tokens is not None
    if token < keep.first_tokens:
        return token
    return keep.first_tokens + (token - keep.first_tokens) % keep.last_tokens


def ring_positions(keep: KVKeep, tokens: int) -> list[int]:
    """Return which token each slot of a layer holds once ``tokens`` tokens were computed."""
    kept = keep.tokens(tokens)
    if keep.first_tokens is None or keep.last_tokens is None or kept == tokens:
        return list(range(kept))
    first, last = keep.first_tokens, keep.last_tokens
    newest = tokens - 1
    return [place if place < first else newest - (newest - first - (place - first)) % last for place in range(kept)]
