"""The memory behind a pool of KV blocks: an arena on the device, and host memory for what is swapped.

pool = KVPool(900, ArenaStorage(arena))         # memory for exactly 900 KV blocks of one layer
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hw.elastic.compressed_kv import PromptCompressor
from hw.elastic.device import Accelerator
from hw.elastic.device_memory import attempt
from hw.elastic.hidden_kv import HiddenKV
from hw.elastic.host_kv import HostKV
from hw.elastic.kv_compression.packing import PackedKV
from hw.elastic.paged_kv import KVArena
from hw.elastic.quantized_kv import QuantizedKV
from sim.cost.kv_format import KVFormat
from sim.cost.plan import KVCompression
from sim.engine.block_table import BlockTable

PACKED_AT_ONCE = 512
"""Tokens of a layer that are packed in one step, which takes about 16 times their bytes at 4 bits for a moment."""


class ArenaStorage:
    """An arena as the storage of a ``sim.engine.kv_pool.KVPool``, and host memory for what is swapped.

    host: the KV of preempted requests.
    """

    def __init__(self, arena: KVArena, *, host_blocks: int = 0, compressor: PromptCompressor | None = None) -> None:
        """Keep the pool's blocks in this arena, and ``host_blocks`` blocks of one layer in host memory.

        Args:
            compressor: compresses prompts in this arena; None: no plan does so.
        Raises:
            BudgetError: if the host has no memory for them.
        """
        self._arena, self._hardware = arena, arena.hardware
        self._compressor = compressor
        self.host = HostKV(arena, host_blocks)

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

    def copy(self, source: Sequence[int], target: Sequence[int], bits: int = 16, *, hidden: bool = False) -> None:
        """Copy the content of slots to others at ``bits`` bits, all read before any is written.

        ``hidden``: they hold hidden states, of which a target block has twice as many.
        """
        slots = torch.tensor(source), torch.tensor(target)
        attempt(self._hardware, lambda: self._copy_hidden(*slots) if hidden else self._copy(*slots, bits))

    def compress(
        self, table: BlockTable, tokens: int, way: KVCompression, formats: Sequence[KVFormat]
    ) -> dict[int, PackedKV]:
        """Compress a prompt into the first slots of each layer; return how it lies there."""
        compressor = self._compressor
        assert compressor is not None
        return attempt(self._hardware, lambda: compressor.compress(table, tokens, way, formats))

    def save_on_host(self, request_id: int, blocks: Sequence[int]) -> None:
        """Copy the content of blocks to host memory, in the order of all other work: nothing waits for it."""
        self.host.save(request_id, blocks)

    def load_from_host(self, request_id: int, blocks: Sequence[int]) -> None:
        """Copy what was saved for a request to other blocks."""
        self.host.load(request_id, blocks)
        self._arena.packed.difference_update(blocks)

    def forget_on_host(self, request_id: int) -> None:
        """Free what was saved for a request."""
        self.host.forget(request_id)

    def _move(self, moved: dict[int, int]) -> None:
        kv = self._arena.kv
        source, target = (torch.tensor(list(blocks)) for blocks in (moved.keys(), moved.values()))
        step = 64  # a few blocks at a time: what moves exists twice for that moment
        for at in range(0, source.numel(), step):
            part = slice(at, at + step)
            kv.index_copy_(0, target[part].to(kv.device), kv.index_select(0, source[part].to(kv.device)))
        packed = {new for old, new in moved.items() if old in self._arena.packed}
        self._arena.packed.difference_update(moved.values())
        self._arena.packed |= packed

    def _copy_hidden(self, source: Tensor, target: Tensor) -> None:
        arena = self._arena
        states = HiddenKV(arena, arena.block_tokens).read_slots(source.to(arena.device))
        HiddenKV(arena, 2 * arena.block_tokens).write(target.to(arena.device), states)

    def _copy(self, source: Tensor, target: Tensor, bits: int) -> None:
        device = self._arena.device
        if bits == 16:
            self._arena.write(target.to(device), *self._arena.read_slots(source.to(device)))
            return
        packed = QuantizedKV(self._arena, bits)
        # All is packed, part by part, before any of it is written: it lies in the same blocks.
        parts = (source[at : at + PACKED_AT_ONCE] for at in range(0, len(source), PACKED_AT_ONCE))
        content = [packed.packed(*self._arena.read_slots(part.to(device))) for part in parts]
        packed.note_written(target.tolist())
        packed.write_bytes(target.to(device), torch.cat(content))
