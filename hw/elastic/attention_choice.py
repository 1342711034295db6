"""The value of hw.attention: which ways to compute attention there are here, and which one ``auto`` takes."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from hw.elastic import ops
from hw.elastic.attention import Attention, Kernels, Sdpa
from hw.elastic.attention_packages import (
    FLASH_ATTN_BLOCK_TOKENS,
    FLASH_ATTN_MOST_HEAD_DIM,
    FLASHINFER_HEAD_DIMS,
    FlashAttn,
    FlashInfer,
)
from hw.elastic.paged_kv import KVArena
from sim.errors import ConfigError, nearest

ATTENTIONS = ("auto", "flashinfer", "flash_attn", "triton", "sdpa")
"""Values of hw.attention; ``auto`` takes the first of the others that is available."""


def check_attention(name: str, key: str = "hw.attention") -> None:
    """Check the value of a key that names a way to compute attention, before anything is loaded.

    Raises:
        ConfigError: for a name that is none.
    """
    if name not in ATTENTIONS:
        raise ConfigError(f"{key} is {name!r}; {nearest(name, ATTENTIONS)}")


def find_attention(
    name: str, device: torch.device, *, head_dim: int, dtype: torch.dtype, block_tokens: int
) -> Attention:
    """Return the way to compute attention that hw.attention names.

    Args:
        name: one of ``ATTENTIONS``. device, head_dim, dtype, block_tokens: of the KV cache.
    Raises:
        ConfigError: for another name, or one that is not available here.
    """
    check_attention(name)
    lacks = {each: _lack(each, device, head_dim, dtype, block_tokens) for each in ATTENTIONS[1:]}
    if name == "auto":
        name = next(each for each, lack in lacks.items() if lack is None)
    if lacks[name] is not None:
        there = ", ".join(each for each, lack in lacks.items() if lack is None)
        raise ConfigError(f"hw.attention is {name}, but {lacks[name]}; available here: auto, {there}")
    made: dict[str, Callable[[], Attention]] = {
        "flashinfer": lambda: FlashInfer(_package("flashinfer"), device),
        "flash_attn": lambda: FlashAttn(_package("flash_attn")),
        "triton": Kernels,
        "sdpa": Sdpa,
    }
    return made[name]()


def default_attention(arena: KVArena) -> Attention:
    """Return what hw.attention=auto gives for an arena, always the same one."""
    return _default(arena.device, arena.kv.shape[4], arena.kv.dtype, arena.block_tokens)


@cache
def _default(device: torch.device, head_dim: int, dtype: torch.dtype, block_tokens: int) -> Attention:
    return find_attention("auto", device, head_dim=head_dim, dtype=dtype, block_tokens=block_tokens)


def _lack(name: str, device: torch.device, head_dim: int, dtype: torch.dtype, block_tokens: int) -> str | None:
    """Return what is missing for a way to compute attention; None if nothing is."""
    if name == "sdpa":
        return None
    if name == "triton":
        if not ops.have_triton():
            return "the package triton is not installed"
        return None if _runs_kernels(device) else f"its kernels do not run on {device.type}"
    if importlib.util.find_spec(name) is None:
        return f"the package {name} is not installed"
    if device.type != "cuda":
        return f"it does not run on {device.type}"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"it does not compute in {str(dtype).removeprefix('torch.')}"
    if name == "flashinfer":
        return None if head_dim in FLASHINFER_HEAD_DIMS else f"it has no kernel for a head_dim of {head_dim}"
    if block_tokens % FLASH_ATTN_BLOCK_TOKENS:
        return f"it needs engine.kv_block_tokens to be a multiple of {FLASH_ATTN_BLOCK_TOKENS}, not {block_tokens}"
    return None if head_dim <= FLASH_ATTN_MOST_HEAD_DIM else f"it has no kernel for a head_dim of {head_dim}"


def _package(name: str) -> Any:
    return importlib.import_module(name)


def _runs_kernels(device: torch.device) -> bool:
    return ops.runs_kernel(torch.empty(0, device=device))
