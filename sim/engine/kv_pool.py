"""The pool of KV blocks of one replica: which are free, which are held, and whose old content the free ones still hold.

    pool = KVPool(900)                              # 900 KV blocks of one layer
    ids, overwritten = pool.take(12)                # blocks for a request, the longest free first
    pool.release(ids, owner=7)                      # their content stays readable for request 7 until they are taken
    pool.resize(600)                                # free blocks go at once; what is held above 600 is a debt
    moved = pool.settle()                           # debt paid: blocks move together, the rest of the memory is freed

A block holds the keys and values of some tokens of one layer. Any block may serve any layer, because plans drop layers
one by one. Real engines hand out the block that has been free longest, so what a preempted request left behind, and
prefix blocks that no request holds, stay readable until others have taken them. An owner is a number: from 0 on for
requests, below ``NO_OWNER`` for prefix blocks.

The pool knows block numbers, not memory. ``storage`` is the memory behind them (hw/elastic/paged_kv.py); the simulator has
none.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

NO_OWNER = -1


class KVStorage(Protocol):
    """The memory behind the blocks of a pool."""

    def resize(self, blocks: int) -> None:
        """Hold blocks 0 to ``blocks - 1``; their content stays, the memory of others is freed."""
        ...

    def move(self, moved: dict[int, int]) -> None:
        """Copy the content of blocks to others that hold nothing of use: old number to new."""
        ...

    def copy(self, source: Sequence[int], target: Sequence[int]) -> None:
        """Copy the content of slots to others, all read before any is written; a slot is the place of one token."""
        ...


@dataclass(slots=True)
class _Run:
    """Free blocks that were freed together, the first to be taken first; ``NO_OWNER`` if no one can use them."""

    owner: int
    ids: deque[int]


class KVPool:
    """Free and held KV blocks; their numbers always add up to ``layer_blocks``."""

    def __init__(self, layer_blocks: int = 0, storage: KVStorage | None = None) -> None:
        """Hold ``layer_blocks`` blocks, all of them free."""
        self.layer_blocks = 0
        self._storage = storage
        self._held = 0
        self._blocks = 0  # block numbers in use: those the pool counts and the dead ones
        self._runs: deque[_Run] = deque()
        self._kept: dict[int, _Run] = {}
        self._dead: list[int] = []  # blocks that the pool no longer counts, until ``settle``
        self.resize(layer_blocks)

    @property
    def used_layer_blocks(self) -> int:
        """Blocks that requests hold."""
        return self._held

    @property
    def free_layer_blocks(self) -> int:
        """Blocks that no request holds; below 0 while more are held than the pool has."""
        return self.layer_blocks - self._held

    def take(self, count: int) -> tuple[list[int], list[int]]:
        """Hold ``count`` more blocks, the longest free first; return them and the owners whose content is lost."""
        assert 0 <= count <= max(self.free_layer_blocks, 0)
        ids: list[int] = []
        overwritten = []
        while len(ids) < count:
            run = self._runs[0]
            taken = min(len(run.ids), count - len(ids))
            ids.extend(run.ids.popleft() for _ in range(taken))
            if taken and run.owner != NO_OWNER:
                overwritten.append(run.owner)
            if not run.ids:
                self._runs.popleft()
                self._kept.pop(run.owner, None)
        self._held += count
        return ids, overwritten

    def release(self, ids: Iterable[int], owner: int = NO_OWNER) -> None:
        """Free blocks, the first of them to be taken first; their content stays readable for ``owner`` until then."""
        freed = deque(ids)
        # What a shrunk pool owes goes first. Callers free the blocks of the last tokens first, so these are lost.
        owed = min(max(-self.free_layer_blocks, 0), len(freed))
        self._held -= len(freed)
        assert self._held >= 0
        self._dead.extend(freed.popleft() for _ in range(owed))
        self._enqueue(freed, owner)

    def _enqueue(self, ids: deque[int], owner: int = NO_OWNER) -> None:
        if owner == NO_OWNER and self._runs and self._runs[-1].owner == NO_OWNER:
            self._runs[-1].ids.extend(ids)
        elif ids:
            run = _Run(owner, ids)
            self._runs.append(run)
            if owner != NO_OWNER:
                self._kept[owner] = run

    def resize(self, layer_blocks: int) -> list[int]:
        """Grow or shrink the pool; return the owners whose content was lost.

        The pool grows at once. It shrinks by the longest free blocks. Where fewer are free than must go, the pool is
        in debt: ``free_layer_blocks`` is below 0 until requests have been preempted. ``settle`` frees the memory.
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
            fresh.extend(range(self._blocks, self._blocks + missing))
            self._blocks += missing
            if self._storage is not None:
                self._storage.resize(self._blocks)
        self._enqueue(fresh)
        return lost

    def settle(self) -> dict[int, int]:
        """Free the memory of blocks that the pool has lost; return where held blocks went, old number to new.

        Blocks that stay move together at the low end; the caller renames them in its tables. Nothing happens while
        more is held than the pool has, or where there is no storage.
        """
        if self._storage is None or not self._dead or self.free_layer_blocks < 0:
            return {}
        keep = self._blocks - len(self._dead)
        assert keep == self.layer_blocks
        dead = set(self._dead)
        movers = [block for block in range(keep, self._blocks) if block not in dead]
        holes = sorted(block for block in dead if block < keep)
        moved = dict(zip(movers, holes, strict=True))
        if moved:
            self._storage.move(moved)
            for run in self._runs:
                run.ids = deque(moved.get(block, block) for block in run.ids)
        self._dead.clear()
        self._blocks = keep
        self._storage.resize(keep)
        return moved

    def forget(self) -> None:
        """Let no preempted request find again what it left behind."""
        for owner in [owner for owner in self._kept if owner > NO_OWNER]:
            self.claim(owner, 0)

    def kept_layer_blocks(self, owner: int) -> int:
        """Return how many blocks still hold what ``owner`` left behind."""
        run = self._kept.get(owner)
        return len(run.ids) if run else 0

    def claim(self, owner: int, count: int) -> list[int]:
        """Hold the last ``count`` blocks of what ``owner`` left behind again; no one can use the rest of it."""
        run = self._kept.pop(owner, None)
        if run is None:
            assert not count
            return []
        assert count <= len(run.ids)
        run.owner = NO_OWNER
        ids = [run.ids.pop() for _ in range(count)]
        self._held += count
        return ids[::-1]

    def check(self, held: Iterable[int]) -> None:
        """Check that every block is held once, free once, or on its way out, and none twice."""
        ids = [*held, *self._dead, *(block for run in self._runs for block in run.ids)]
        assert sorted(ids) == list(range(self._blocks)), "a KV block is lost, or in two places"
