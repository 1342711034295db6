"""Attention by maintained packages, where they are installed: FlashInfer and flash-attn.

Both read the paged pool in place. FlashInfer plans how the work is divided, on the host. Here a plan serves all layers
that keep the same tokens: their block numbers differ, so each layer copies its own into the buffer that was planned.
flash-attn takes block tables as they are, but only KV blocks of a multiple of 256 tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hw.elastic.attention import Attention, Kernels, Prepared, Rows
from hw.elastic.block_arrays import Int32s
from hw.elastic.paged_kv import KVArena
from sim.cost.model_spec import ModelSpec

WORKSPACE_BYTES = 128 << 20
"""What FlashInfer advises for its intermediate results."""
INTEGER_WORKSPACE_BYTES = 8 << 20
"""What each of its wrappers takes for plans."""
FLASH_ATTN_BLOCK_TOKENS = 256
FLASHINFER_HEAD_DIMS = (64, 128, 256)
FLASH_ATTN_MOST_HEAD_DIM = 256


def kept_tokens(rows: Rows) -> Int32s:
    """Return how many tokens the decodes keep in each layer, [l, r]."""
    context = np.broadcast_to(rows.context, rows.first.shape)
    return np.where(rows.last > 0, np.minimum(context, rows.first + rows.last), context).astype(np.int32)


def rings_with_windows(rows: Rows) -> bool:
    """Return whether a layer with a sliding window keeps its tokens in a ring, whose order no package knows."""
    return not rows.keeps_all and any(window and rows.last[at].any() for at, window in enumerate(rows.windows))


# --- flash-attn ------------------------------------------------------------------------------------------------------


class _PreparedFlashAttn(Prepared):
    """Block tables as they are."""

    def __init__(self, module: Any, rows: Rows, arena: KVArena) -> None:
        self._module, self._rows, self._kv = module, rows, arena.kv
        lengths = np.diff(rows.chunk_starts)
        totals = rows.prefix + lengths
        self._most = int(lengths.max(initial=0)), int(totals.max(initial=0))
        self.arrays = [rows.table, kept_tokens(rows)]
        if len(rows.prefix):
            ends = np.concatenate(([0], np.cumsum(totals))).astype(np.int32)
            self.arrays += [rows.chunk_table, rows.chunk_starts - np.int32(rows.decodes), ends]

    def attend(
        self, at: int, tensors: Sequence[Tensor], query: Tensor, key: Tensor, value: Tensor, scale: float
    ) -> Tensor:
        """Call one kernel for the decodes, and one for the chunks."""
        count, window = self._rows.decodes, self._rows.windows[at]
        shared = {
            "softmax_scale": scale,
            "causal": True,
            "window_size": (window - 1, 0) if window else (-1, -1),
        }
        keys, values = self._kv[:, 0], self._kv[:, 1]
        parts: list[Tensor] = []
        if count:
            decoded = self._module.flash_attn_with_kvcache(
                query[:count, None],
                keys,
                values,
                cache_seqlens=tensors[1][at],
                block_table=tensors[0][at],
                **shared,
            )
            parts.append(decoded[:, 0])
        if len(tensors) > 2:
            table, starts, ends = tensors[2:]
            parts.append(
                self._module.flash_attn_varlen_func(
                    query[count:], keys, values, starts, ends, *self._most, block_table=table[at], **shared
                )
            )
        return parts[0] if len(parts) == 1 else torch.cat(parts)


class FlashAttn(Attention):
    """flash-attn 2."""

    name = "flash_attn"

    def __init__(self, module: Any) -> None:
        """Use the package ``flash_attn``."""
        self._module = module

    def prepare(self, rows: Rows, arena: KVArena) -> Prepared:
        """Take the arrays of the rows."""
        if rings_with_windows(rows):
            return Kernels().prepare(rows, arena)
        return _PreparedFlashAttn(self._module, rows, arena)

    def scratch_bytes(self, model: ModelSpec, sequences: int, context: int) -> int:
        """Return the bytes of the parts of long contexts, about those of the kernels of this package."""
        return Kernels().scratch_bytes(model, sequences, context)


# --- FlashInfer ------------------------------------------------------------------------------------------------------


class _Planned:
    """A wrapper of FlashInfer, the plan that it holds, and the buffer of block numbers that it reads."""

    def __init__(self, wrapper: Any, device: torch.device) -> None:
        self._wrapper = wrapper
        self._buffer = torch.empty(0, dtype=torch.int32, device=device)
        self._plan: object = None
        self._aliases = False

    def run(
        self, plan: tuple[Any, ...], indices: Tensor, settings: dict[str, Any], query: Tensor, kv: Tensor
    ) -> Tensor:
        """Return the attention of a layer with these block numbers.

        Args:
            plan: the arrays that FlashInfer plans with, before and after the block numbers.
            settings: further values of ``plan``.
        """
        count = indices.numel()
        key = (*(array.tobytes() for part in plan for array in part), *settings.items())
        if key != self._plan or not self._aliases:
            if count > self._buffer.numel():
                self._buffer = torch.empty(1 << (count - 1).bit_length(), dtype=torch.int32, device=indices.device)
            before, after = ([torch.from_numpy(array) for array in part] for part in plan)
            self._buffer[:count].copy_(indices)
            self._wrapper.plan(*before, self._buffer[:count], *after, **settings)
            read = getattr(self._wrapper, "_paged_kv_indices_buf", None)
            # What the package has copied cannot be changed: then every layer needs a plan of its own.
            self._aliases = isinstance(read, Tensor) and read.data_ptr() == self._buffer.data_ptr()
            self._plan = key
        else:
            self._buffer[:count].copy_(indices)
        found: Tensor = self._wrapper.run(query, kv)
        return found


class _PreparedFlashInfer(Prepared):
    """Block numbers of all requests, one after another."""

    def __init__(self, package: FlashInfer, rows: Rows, arena: KVArena) -> None:
        self._package, self._rows, self._kv = package, rows, arena.kv
        self._size = arena.block_tokens
        self._kept = kept_tokens(rows)
        totals = rows.prefix + np.diff(rows.chunk_starts)
        self._totals = totals.astype(np.int32)
        self._used = [int((-(-kept // self._size)).sum()) for kept in self._kept]
        self.arrays = [_flat(rows.table, self._kept, self._size)]
        if len(totals):
            self.arrays.append(
                _flat(rows.chunk_table, np.broadcast_to(totals, (len(rows.windows), len(totals))), self._size)
            )

    def attend(
        self, at: int, tensors: Sequence[Tensor], query: Tensor, key: Tensor, value: Tensor, scale: float
    ) -> Tensor:
        """Call one kernel for the decodes, and one for the chunks."""
        rows, package = self._rows, self._package
        count, window = rows.decodes, rows.windows[at]
        settings = {
            "pos_encoding_mode": "NONE",
            "window_left": window - 1 if window else -1,
            "q_data_type": query.dtype,
            "kv_data_type": self._kv.dtype,
            "sm_scale": scale,
        }
        shape = {
            "num_qo_heads": query.shape[1],
            "num_kv_heads": self._kv.shape[3],
            "page_size": self._size,
        }
        parts: list[Tensor] = []
        if count:
            indptr, last = self._pages(self._kept[at])
            planned = package.planned("decode", window)
            of_decode = {**shape, "head_dim": query.shape[2], **settings}
            indices = tensors[0][at, : self._used[at]]
            parts.append(planned.run(([indptr], [last]), indices, of_decode, query[:count], self._kv))
        if len(tensors) > 1:
            indptr, last = self._pages(self._totals)
            starts = rows.chunk_starts - np.int32(count)
            planned = package.planned("prefill", window)
            of_prefill = {**shape, "head_dim_qk": query.shape[2], "causal": True, **settings}
            indices = tensors[1][at]
            parts.append(planned.run(([starts, indptr], [last]), indices, of_prefill, query[count:], self._kv))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _pages(self, tokens: Int32s) -> tuple[Int32s, Int32s]:
        """Return where the blocks of each request start, and how many tokens its last block has."""
        blocks = -(-tokens // self._size)
        indptr = np.concatenate(([0], np.cumsum(blocks))).astype(np.int32)
        return indptr, (tokens - (blocks - 1) * self._size).astype(np.int32)


def _flat(table: Int32s, tokens: npt.NDArray[Any], block_tokens: int) -> Int32s:
    """Return the block numbers in use of each layer, one request after another, [l, most]."""
    used = np.arange(table.shape[2])[None, None] * block_tokens < tokens[:, :, None]
    counts = used.sum(axis=(1, 2))
    flat = np.zeros((len(table), int(counts.max(initial=0))), np.int32)
    flat[np.arange(flat.shape[1])[None] < counts[:, None]] = table[used]
    return flat


class FlashInfer(Attention):
    """FlashInfer's kernels over paged KV."""

    name = "flashinfer"

    def __init__(self, module: Any, device: torch.device) -> None:
        """Use the package ``flashinfer`` on a device."""
        self._module, self._device = module, device
        self._workspace: Tensor | None = None
        self._made: dict[tuple[str, int], _Planned] = {}

    def planned(self, stage: str, window: int) -> _Planned:
        """Return the wrapper of a stage and a window."""
        key = stage, window
        if key not in self._made:
            if self._workspace is None:
                self._workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=self._device)
            kind = {"decode": "BatchDecodeWithPagedKVCacheWrapper", "prefill": "BatchPrefillWithPagedKVCacheWrapper"}
            self._made[key] = _Planned(getattr(self._module, kind[stage])(self._workspace, "NHD"), self._device)
        return self._made[key]

    def prepare(self, rows: Rows, arena: KVArena) -> Prepared:
        """Lay out the block numbers."""
        if rings_with_windows(rows):
            return Kernels().prepare(rows, arena)
        return _PreparedFlashInfer(self, rows, arena)

    def scratch_bytes(self, model: ModelSpec, sequences: int, context: int) -> int:
        """Return the bytes of the buffers that FlashInfer keeps, for decodes and chunks."""
        return WORKSPACE_BYTES + 2 * INTEGER_WORKSPACE_BYTES
