"""FlashInfer and flash-attn as far as this package calls them, computed by the plain operations.

The signatures are those of flashinfer 0.2 to 0.6 and flash-attn 2.8; values that a package refuses are refused here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hw.elastic import ops

# --- flash-attn


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Any = None,
    v: Any = None,
    rotary_cos: Any = None,
    rotary_sin: Any = None,
    cache_seqlens: Any = None,
    cache_batch_idx: Any = None,
    cache_leftpad: Any = None,
    block_table: Any = None,
    softmax_scale: Any = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Any = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Tensor:
    assert k_cache.shape[1] % 256 == 0
    assert k_cache.stride(-1) == v_cache.stride(-1) == 1
    assert q.shape[1] == 1
    assert causal
    kv = torch.stack((k_cache, v_cache), dim=1)
    none = torch.zeros_like(cache_seqlens)
    window = window_size[0] + 1 if window_size != (-1, -1) else 0
    return ops.paged_decode_reference(
        q[:, 0], kv, block_table, cache_seqlens, none, none, scale=softmax_scale, window=window
    )[:, None]


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: Any = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Any = None,
) -> Tensor:
    assert k.shape[1] % 256 == 0
    assert causal
    new, total = cu_seqlens_q.diff(), cu_seqlens_k.diff()
    assert max_seqlen_q == int(new.max())
    assert max_seqlen_k == int(total.max())
    kv = torch.stack((k, v), dim=1)
    window = window_size[0] + 1 if window_size != (-1, -1) else 0
    return ops.paged_prefill_reference(
        q, kv, block_table, cu_seqlens_q, total - new, scale=softmax_scale, window=window
    )


# --- FlashInfer


class _Wrapper:
    """What both wrappers share. plans: how many were made. copies: whether a plan copies the block numbers."""

    copies = False
    plans = 0

    def __init__(self, float_workspace_buffer: Tensor, kv_layout: str = "NHD", **others: Any) -> None:
        assert kv_layout == "NHD"
        assert float_workspace_buffer.dtype == torch.uint8
        self._paged_kv_indices_buf = torch.empty(0)

    def _planned(
        self, indptr: Tensor, indices: Tensor, last_page_len: Tensor, page_size: int, settings: dict[str, Any]
    ) -> None:
        type(self).plans += 1
        assert indptr.dtype == indices.dtype == last_page_len.dtype == torch.int32
        assert len(indptr) == len(last_page_len) + 1
        assert int(indptr[-1]) == len(indices)
        assert bool((last_page_len >= 1).all())
        assert bool((last_page_len <= page_size).all())
        self._indptr, self._last = indptr.clone(), last_page_len.clone()
        self._paged_kv_indices_buf = indices.clone() if self.copies else indices
        self._page_size, self._settings = page_size, settings

    def _tables(self) -> tuple[Tensor, Tensor]:
        """Return block tables [r, w] and the tokens of each request."""
        pages = self._indptr.diff()
        table = torch.zeros(len(pages), int(pages.max()), dtype=torch.int32)
        for row, count in enumerate(pages.tolist()):
            start = int(self._indptr[row])
            table[row, :count] = self._paged_kv_indices_buf[start : start + count]
        return table, (pages - 1) * self._page_size + self._last

    def _shared(self, query: Tensor, kv: Tensor) -> dict[str, Any]:
        settings = self._settings
        assert (settings["q_data_type"], settings["kv_data_type"]) == (query.dtype, kv.dtype)
        return {"scale": settings["sm_scale"], "window": settings["window_left"] + 1}


class BatchDecodeWithPagedKVCacheWrapper(_Wrapper):
    def plan(
        self,
        indptr: Tensor,
        indices: Tensor,
        last_page_len: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        *,
        pos_encoding_mode: str = "NONE",
        window_left: int = -1,
        q_data_type: Any = "float16",
        kv_data_type: Any = None,
        sm_scale: Any = None,
    ) -> None:
        settings = {"window_left": window_left, "q_data_type": q_data_type, "kv_data_type": kv_data_type}
        assert pos_encoding_mode == "NONE"
        self._shape = num_qo_heads, num_kv_heads, head_dim
        self._planned(indptr, indices, last_page_len, page_size, {**settings, "sm_scale": sm_scale})

    def run(self, q: Tensor, paged_kv_cache: Tensor) -> Tensor:
        assert self._shape == (q.shape[1], paged_kv_cache.shape[3], q.shape[2])
        table, tokens = self._tables()
        none = torch.zeros_like(tokens)
        shared = self._shared(q, paged_kv_cache)
        return ops.paged_decode_reference(q, paged_kv_cache, table, tokens, none, none, **shared)


class BatchPrefillWithPagedKVCacheWrapper(_Wrapper):
    def plan(
        self,
        qo_indptr: Tensor,
        paged_kv_indptr: Tensor,
        paged_kv_indices: Tensor,
        paged_kv_last_page_len: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        page_size: int,
        *,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        window_left: int = -1,
        q_data_type: Any = "float16",
        kv_data_type: Any = None,
        sm_scale: Any = None,
    ) -> None:
        settings = {"window_left": window_left, "q_data_type": q_data_type, "kv_data_type": kv_data_type}
        assert causal
        self._starts = qo_indptr.clone()
        self._planned(
            paged_kv_indptr,
            paged_kv_indices,
            paged_kv_last_page_len,
            page_size,
            {**settings, "sm_scale": sm_scale},
        )

    def run(self, q: Tensor, paged_kv_cache: Tensor) -> Tensor:
        table, tokens = self._tables()
        prefix = tokens - self._starts.diff()
        shared = self._shared(q, paged_kv_cache)
        return ops.paged_prefill_reference(q, paged_kv_cache, table, self._starts, prefix, **shared)
