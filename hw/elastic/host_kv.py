"""Host memory for the KV of preempted requests: reserved once, handed out in KV blocks of one layer.

    host = HostKV(arena, blocks=4096)
    host.save(7, [12, 13, 40])                      # the content of three KV blocks, for request 7
    host.load(7, [5, 6, 7])                         # back into other blocks; the host's blocks are free again

``sim.engine.kv_manager`` counts these blocks and decides who is swapped. All copies run in the order in which the
device computes, so nothing waits for them, and a block that is free again may be written at once.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from hw.elastic.device import Accelerator
from hw.elastic.device_memory import attempt
from hw.elastic.paged_kv import KVArena
from sim.errors import BudgetError
from sim.types import GIB

PIECE_BYTES = 256 << 20
"""Most bytes reserved at once: the allocator of pinned memory rounds each piece up to a power of two."""


class HostKV:
    """KV blocks in host memory: pinned for a device with memory of its own, plain memory for a CPU.

    saved: request id -> the host's blocks that hold its KV, in the order in which they were saved.
    """

    def __init__(self, arena: KVArena, blocks: int) -> None:
        """Reserve memory for ``blocks`` blocks of one layer, of the same size as those of ``arena``.

        Raises:
            BudgetError: if the host has no memory for them.
        """
        self.saved: dict[int, list[int]] = {}
        self._arena, hardware = arena, arena.hardware
        self._download: Callable[[Tensor, Tensor], None] = _copied
        self._upload: Callable[[Tensor, Tensor], None] = _copied
        if isinstance(hardware, Accelerator):
            self._download, self._upload = hardware.download, hardware.upload
        self._free = list(range(blocks))  # a heap: the lowest first, so that one copy is of many blocks in a row
        self._piece_blocks = max(1, PIECE_BYTES // arena.block_bytes)
        try:
            self._pieces = attempt(hardware, lambda: [self._piece(count) for count in self._piece_sizes(blocks)])
        except MemoryError as error:
            raise BudgetError(
                f"the host has no {blocks * arena.block_bytes / GIB:.2f} GiB of memory for the KV of preempted "
                "requests; lower engine.host_kv_blocks, or set engine.preemption=recompute"
            ) from error

    def _piece_sizes(self, blocks: int) -> Iterator[int]:
        for first in range(0, blocks, self._piece_blocks):
            yield min(self._piece_blocks, blocks - first)

    def _piece(self, blocks: int) -> Tensor:
        kv, hardware, size = self._arena.kv, self._arena.hardware, blocks * self._arena.block_bytes
        memory = hardware.pinned(size) if isinstance(hardware, Accelerator) else torch.empty(size, dtype=torch.uint8)
        return memory.view(kv.dtype).view(blocks, *kv.shape[1:])

    def save(self, request_id: int, blocks: Sequence[int]) -> None:
        """Copy the content of the arena's blocks to as many blocks of the host, which must be free."""
        assert request_id not in self.saved
        self.saved[request_id] = held = [heapq.heappop(self._free) for _ in blocks]
        for there, here in self._views(blocks, held):
            self._download(there, here)

    def load(self, request_id: int, blocks: Sequence[int]) -> None:
        """Copy what was saved for a request to other blocks of the arena, and free those of the host."""
        held = self.saved[request_id]
        assert len(held) == len(blocks)
        for there, here in self._views(blocks, held):
            self._upload(here, there)
        self.forget(request_id)

    def forget(self, request_id: int) -> None:
        """Free the blocks of a request, if it has any."""
        for block in self.saved.pop(request_id, ()):
            heapq.heappush(self._free, block)

    def close(self) -> None:
        """Free all memory; torch keeps what a copy under way still reads or writes."""
        self.saved.clear()
        self._free.clear()
        self._pieces.clear()

    def _views(self, blocks: Sequence[int], held: Sequence[int]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the memory of the arena's blocks and of the host's, in parts that are in a row on both sides."""
        kv, start = self._arena.kv, 0
        for at in range(1, len(blocks) + 1):
            if at < len(blocks) and self._follows(blocks, held, at):
                continue
            piece, first = divmod(held[start], self._piece_blocks)
            count, block = at - start, blocks[start]
            yield kv[block : block + count], self._pieces[piece][first : first + count]
            start = at

    def _follows(self, blocks: Sequence[int], held: Sequence[int], at: int) -> bool:
        in_a_row = blocks[at] == blocks[at - 1] + 1 and held[at] == held[at - 1] + 1
        return in_a_row and held[at] % self._piece_blocks > 0


def _copied(source: Tensor, target: Tensor) -> None:
    target.copy_(source)
