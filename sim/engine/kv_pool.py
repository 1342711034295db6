"""The pool of KV blocks of one replica: which are held, which are free, and whose old content the free ones still hold.

    pool = KVPool(900)                              # 900 KV blocks of one layer
    ids, overwritten = pool.take(12)                # blocks for a request, the longest free first
    pool.release(ids, owner=7)                      # their content stays readable for request 7 until they are taken
    pool.resize(600)                                # free blocks go at once; blocks held above 600 are a debt
    moved = pool.settle()                           # debt paid: held blocks are compacted, the other memory is freed

A KV block holds the keys and values of ``kv_block_tokens`` tokens of one layer. Any KV block may serve any layer,
because plans drop layers one by one. Real engines hand out the block that has been free longest; so the KV of a
preempted request, and prefix blocks that no request holds, stay readable until others have taken them. An owner is a
number: the id of a request, at least 0, or a number below ``NO_OWNER`` for a prefix block.

The pool knows block numbers, not memory. ``storage`` is the memory behind them (hw/elastic/paged_kv.py); the simulator
has none. Used by ``sim.engine.kv_manager``.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from sim.cost.kv_format import KVFormat
    from sim.cost.plan import KVCompression
    from sim.engine.block_table import BlockTable

NO_OWNER = -1


class KVStorage(Protocol):
    """The memory behind the blocks of a pool."""

    def resize(self, blocks: int) -> None:
        """Provide memory for blocks 0 to ``blocks - 1``; their content stays, the memory of other blocks is freed.

        Raises:
            MemoryError: for more blocks, if there is no memory for them; then nothing has changed. For fewer, if some
                memory could not be freed; a call with the same number tries that again.
        """
        ...

    def move(self, moved: dict[int, int]) -> None:
        """Copy the content of blocks to unused ones; ``moved`` maps old block number to new.

        Raises:
            MemoryError: if memory ran out; the content of the old blocks stays.
        """
        ...

    def copy(self, source: Sequence[int], target: Sequence[int], bits: int = 16, *, hidden: bool = False) -> None:
        """Copy slots, all read before any is written; a slot is the place of one token.

        ``bits``: those of the target slots; the source has 16. ``hidden``: of hidden states, both.

        Raises:
            MemoryError: if memory ran out; the content of the target slots is undefined then.
        """
        ...

    def compress(self, table: BlockTable, tokens: int, way: KVCompression, formats: Sequence[KVFormat]) -> object:
        """Compress the KV of a prompt of ``tokens`` tokens in place; return how to read it (``table.packed``).

        Afterwards the first slots of each layer hold it, in its format, as many as there are tokens less those saved.

        Raises:
            MemoryError: if memory ran out; the content of the request is undefined then.
        """
        ...

    def save_on_host(self, request_id: int, blocks: Sequence[int]) -> None:
        """Copy the content of blocks to host memory, where it stays for a request.

        The caller counts what the host holds, so there is memory for it.
        """
        ...

    def load_from_host(self, request_id: int, blocks: Sequence[int]) -> None:
        """Copy what was saved for a request to other blocks, as many and in the same order, and forget it."""
        ...

    def forget_on_host(self, request_id: int) -> None:
        """Free what was saved for a request, if anything."""
        ...


@dataclass(slots=True)
class _Run:
    """Blocks that were freed together, in the order in which they are taken; ``NO_OWNER`` if no one can reuse them."""

    owner: int
    ids: deque[int]


class KVPool:
    """Free and held KV blocks; their numbers always add up to ``layer_blocks``."""

    def __init__(self, layer_blocks: int = 0, storage: KVStorage | None = None) -> None:
        """Begin with ``layer_blocks`` blocks, all of them free."""
        self.layer_blocks = 0
        self._storage = storage
        self._held = 0
        self._blocks = 0  # block numbers in use: those the pool counts and the dead ones
        self._runs: deque[_Run] = deque()
        self._kept: dict[int, _Run] = {}
        self._dead: list[int] = []  # blocks that the pool no longer counts, until ``settle``
        self._keeps_memory = False  # of blocks that it has lost, because the storage could not free it
        self.resize(layer_blocks)

    @property
    def stored_layer_blocks(self) -> int:
        """Blocks with memory behind them: those of the pool, and until ``settle`` those that it has lost."""
        return self._blocks

    @property
    def used_layer_blocks(self) -> int:
        """Blocks that requests hold."""
        return self._held

    @property
    def free_layer_blocks(self) -> int:
        """Blocks that no request holds; below 0 while more are held than the pool has."""
        return self.layer_blocks - self._held

    def take(self, count: int) -> tuple[list[int], list[int]]:
        """Take ``count`` free blocks, the longest free first; return them and the owners whose content is lost."""
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
        """Free blocks; they are taken in the order of ``ids``, and until then ``owner`` can claim them."""
        freed = deque(ids)
        # A pool in debt pays first. Callers list the blocks of the last tokens first, so these are the ones lost.
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

        The pool grows at once. It shrinks by the blocks that have been free longest. If too few are free, the pool is
        in debt: ``free_layer_blocks`` is below 0 until requests have been preempted. ``settle`` frees the memory.

        Raises:
            MemoryError: if there is no memory to grow; then nothing has changed.
        """
        lost: list[int] = []
        change = layer_blocks - self.layer_blocks
        grown = max(0, min(change, layer_blocks - self._held))
        missing = max(0, grown - len(self._dead))
        if missing and self._storage is not None:
            self._storage.resize(self._blocks + missing)
        if change < 0:
            ids, lost = self.take(min(-change, max(self.free_layer_blocks, 0)))
            self._held -= len(ids)
            self._dead.extend(ids)
        self.layer_blocks = layer_blocks
        fresh = deque(self._dead[:grown])
        del self._dead[:grown]
        fresh.extend(range(self._blocks, self._blocks + missing))
        self._blocks += missing
        self._enqueue(fresh)
        return lost

    def settle(self) -> dict[int, int]:
        """Free the memory of blocks that the pool has lost; return the blocks that moved, old number to new.

        Remaining blocks move to the lowest numbers, because storage can shrink only from its end; the caller renames
        them in its tables. Nothing happens while the pool is in debt, or without storage. ``settled`` says whether all
        memory is free.

        Raises:
            MemoryError: if there is no memory to move blocks; then nothing has changed.
        """
        if self._storage is None or self.settled or self.free_layer_blocks < 0:
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
        try:
            self._storage.resize(keep)
            self._keeps_memory = False
        except MemoryError:
            self._keeps_memory = True
        return moved

    @property
    def settled(self) -> bool:
        """Whether the memory of all lost blocks is free."""
        return not self._dead and not self._keeps_memory

    def forget(self) -> None:
        """Let no preempted request find its freed blocks again."""
        for owner in [owner for owner in self._kept if owner > NO_OWNER]:
            self.claim(owner, 0)

    def kept_layer_blocks(self, owner: int) -> int:
        """Return how many free blocks ``owner`` could still claim."""
        run = self._kept.get(owner)
        return len(run.ids) if run else 0

    def claim(self, owner: int, count: int) -> list[int]:
        """Take back the last ``count`` of the blocks that ``owner`` freed; the others lose their owner."""
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
        """Check that every block is in exactly one place: held, free, or about to leave the pool."""
        ids = [*held, *self._dead, *(block for run in self._runs for block in run.ids)]
        assert sorted(ids) == list(range(self._blocks)), "a KV block is lost, or in two places"
