"""The pool of KV blocks of one replica: how many are free, and whose old content the free ones still hold.

Counted in KV blocks of one layer. Real engines hand out the block that has been free longest, so what a preempted
request left behind, and what is in the prefix cache and held by nobody, stays readable until others have taken it. The
pool keeps that order as runs of blocks, not block by block. An owner is a number: from 0 on for requests, below
``NOBODY`` for units of the prefix cache.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

NOBODY = -1


@dataclass(slots=True)
class _Run:
    """Free blocks that were freed together; ``owner`` is ``NOBODY`` when nobody can use what they hold."""

    owner: int
    layer_blocks: int


class KVPool:
    """Free and held KV blocks, always adding up to ``layer_blocks``."""

    def __init__(self, layer_blocks: int) -> None:
        self.layer_blocks = layer_blocks
        self._free_layer_blocks = layer_blocks
        self._runs: deque[_Run] = deque([_Run(NOBODY, layer_blocks)])
        self._kept: dict[int, _Run] = {}

    @property
    def free_layer_blocks(self) -> int:
        """Blocks that nobody holds."""
        return self._free_layer_blocks

    @property
    def used_layer_blocks(self) -> int:
        """Blocks that requests hold."""
        return self.layer_blocks - self._free_layer_blocks

    def take(self, layer_blocks: int) -> list[int]:
        """Hold so many more blocks, the longest free first; return the owners whose content was overwritten."""
        assert 0 <= layer_blocks <= max(self._free_layer_blocks, 0)
        self._free_layer_blocks -= layer_blocks
        overwritten = []
        while layer_blocks:
            run = self._runs[0]
            taken = min(run.layer_blocks, layer_blocks)
            run.layer_blocks -= taken
            layer_blocks -= taken
            if taken and run.owner != NOBODY:
                overwritten.append(run.owner)
            if not run.layer_blocks:
                self._runs.popleft()
                self._kept.pop(run.owner, None)
        return overwritten

    def resize(self, layer_blocks: int) -> list[int]:
        """Grow or shrink the pool; return the owners whose content was lost.

        Shrinking takes the longest free first. Where fewer are free than must go, the pool is in debt:
        ``free_layer_blocks`` is below 0 until requests have been preempted.
        """
        change = layer_blocks - self.layer_blocks
        lost: list[int] = []
        if change < 0:
            available = max(self._free_layer_blocks, 0)
            lost = self.take(min(-change, available))
            self._free_layer_blocks -= max(-change - available, 0)
        self.layer_blocks = layer_blocks
        if change > 0:
            self.release(change)
        return lost

    def forget(self) -> None:
        """Let no request find again what it left behind."""
        for owner in [owner for owner in self._kept if owner > NOBODY]:
            self.claim(owner, 0)

    def release(self, layer_blocks: int, owner: int = NOBODY) -> None:
        """Free blocks; their content stays readable for ``owner`` until they are taken. The last tokens' go first."""
        owed = min(max(-self._free_layer_blocks, 0), layer_blocks)
        self._free_layer_blocks += layer_blocks
        assert self._free_layer_blocks <= self.layer_blocks
        layer_blocks -= owed  # what a shrunk pool owes is gone, and with it the content of the last tokens
        if owner == NOBODY and self._runs and self._runs[-1].owner == NOBODY:
            self._runs[-1].layer_blocks += layer_blocks
        elif layer_blocks:
            run = _Run(owner, layer_blocks)
            self._runs.append(run)
            if owner != NOBODY:
                self._kept[owner] = run

    def kept_layer_blocks(self, owner: int) -> int:
        """Return how many blocks still hold what ``owner`` left behind."""
        run = self._kept.get(owner)
        return run.layer_blocks if run else 0

    def claim(self, owner: int, layer_blocks: int) -> None:
        """Hold ``layer_blocks`` of what ``owner`` left behind again; the rest of it, perhaps all, is anybody's."""
        run = self._kept.pop(owner, None)
        if run is None:
            assert not layer_blocks
            return
        assert layer_blocks <= run.layer_blocks
        run.layer_blocks -= layer_blocks
        run.owner = NOBODY
        self._free_layer_blocks -= layer_blocks
