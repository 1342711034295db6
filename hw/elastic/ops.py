"""The operations of a forward pass: each is one Triton kernel on CUDA, and plain PyTorch elsewhere.

The plain form is the function of the same name with ``_reference``. It states what a kernel must compute: it is exact,
short and works on every device. It runs where triton is not installed, and on a CPU.

No kernel looks at the host: what a batch holds is read from tensors on the device. The number of programs that a kernel
starts depends only on the shapes of its inputs, so a CUDA graph that captured a pass stays right for other contexts.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from hw.elastic.nested import half_of_16

if TYPE_CHECKING:
    from hw.elastic.quantize import QuantWeight

# Shapes: n rows (tokens), e hidden size, f FFN size, H heads, h KV heads, d head_dim, r requests, c prompt chunks,
# w KV blocks in a row of a table, p tokens of a KV block, i inputs and o outputs of a linear layer.
# kv is the pool [blocks, 2, p, h, d]: keys, then values, of one layer in each block. A slot is block * p + place.

ACTIVATIONS = ("silu", "gelu_tanh")
"""Activations of a gated FFN."""

_on_every_device = False


@cache
def have_triton() -> bool:
    """Return whether triton is installed."""
    return importlib.util.find_spec("triton") is not None


@contextmanager
def use_kernels(on: bool = True) -> Iterator[None]:
    """Run the kernels on a CPU too, inside this context; triton's interpreter must be on (TRITON_INTERPRET=1)."""
    global _on_every_device
    before, _on_every_device = _on_every_device, on
    try:
        yield
    finally:
        _on_every_device = before


def runs_kernel(tensor: Tensor) -> bool:
    """Return whether an operation on this tensor is a kernel."""
    return _on_every_device or (tensor.device.type in ("cuda", "meta") and have_triton())


# --- Norms and activations


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """Return x / rms(x) * (weight + offset) of every row of x [n, e].

    Like transformers, Llama's norm rounds the quotient before it multiplies, and Gemma's (offset 1) only the result.
    """
    if runs_kernel(x):
        from hw.elastic.kernels import elementwise

        return elementwise.rms_norm(x, weight, eps, offset)
    if x.dtype == torch.float32 and not offset:  # nothing is rounded, so PyTorch's own operation is the same
        return functional.rms_norm(x, x.shape[-1:], weight, eps)
    return rms_norm_reference(x, weight, eps, offset)


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """Return what ``rms_norm`` returns."""
    wide = x.to(torch.float32)
    quotient = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if offset:
        return (quotient * (weight.to(torch.float32) + offset)).to(x.dtype)
    return weight * quotient.to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> tuple[Tensor, Tensor]:
    """Return the norm of residual + x, and that sum: [n, e] each."""
    if runs_kernel(x):
        from hw.elastic.kernels import elementwise

        return elementwise.add_rms_norm(x, residual, weight, eps, offset)
    total = residual + x
    return rms_norm(total, weight, eps, offset), total


def add_rms_norm_reference(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Return what ``add_rms_norm`` returns."""
    total = residual + x
    return rms_norm_reference(total, weight, eps, offset), total


def gated(gate_up: Tensor, activation: str) -> Tensor:
    """Return activation(gate) * up [n, f], where a row of gate_up [n, 2 f] is gate, then up.

    Args:
        gate_up: product with the weights of both.
        activation: one of ``ACTIVATIONS``; gelu_tanh is GELU in its tanh form.
    """
    if runs_kernel(gate_up):
        from hw.elastic.kernels import elementwise

        return elementwise.gated(gate_up, activation)
    return gated_reference(gate_up, activation)


def gated_reference(gate_up: Tensor, activation: str) -> Tensor:
    """Return what ``gated`` returns."""
    assert activation in ACTIVATIONS, activation
    gate, up = gate_up.chunk(2, dim=-1)
    active = functional.silu(gate) if activation == "silu" else functional.gelu(gate, approximate="tanh")
    return active * up


# --- Attention


def rope_and_store(
    qkv: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    kv: Tensor,
    slots: Tensor,
    *,
    heads: int,
    kv_heads: int,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 0.0,
    offset: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Split a product into queries, keys and values; rotate queries and keys; store keys and values.

    Args:
        qkv: [n, (H + 2 h) d]; queries of all heads, then keys, then values.
        cos, sin: [n, d_rot]; the first d_rot dimensions of a head rotate, half against half. None: no rotation.
        kv: the pool, which this changes.
        slots: int64 [n]; a row with a negative slot is not stored.
        heads, kv_heads: H and h.
        q_norm, k_norm: weights [d] of an RMS norm of each head, before the rotation (Qwen3, Gemma 3).
        eps, offset: of that norm, as in ``rms_norm``.
    Returns:
        queries [n, H, d], keys and values [n, h, d].
    """
    if runs_kernel(qkv):
        from hw.elastic.kernels import elementwise

        return elementwise.rope_and_store(
            qkv, cos, sin, kv, slots, heads, kv_heads, q_norm, k_norm, eps=eps, offset=offset
        )
    return rope_and_store_reference(
        qkv, cos, sin, kv, slots, heads=heads, kv_heads=kv_heads, q_norm=q_norm, k_norm=k_norm, eps=eps, offset=offset
    )


def rope_and_store_reference(
    qkv: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    kv: Tensor,
    slots: Tensor,
    *,
    heads: int,
    kv_heads: int,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 0.0,
    offset: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what ``rope_and_store`` returns, and store the same."""
    n, d = qkv.shape[0], kv.shape[4]
    each = qkv.view(n, heads + 2 * kv_heads, d)
    both, value = each[:, : heads + kv_heads], each[:, heads + kv_heads :]
    if q_norm is not None and k_norm is not None:
        query, key = both[:, :heads], both[:, heads:]
        query = rms_norm_reference(query, q_norm, eps, offset)
        both = torch.cat((query, rms_norm_reference(key, k_norm, eps, offset)), dim=1)
    if cos is not None and sin is not None:
        both = rotate(both, cos, sin)
    query, key = both[:, :heads], both[:, heads:]
    if lacks_slots(slots):
        stored = slots >= 0
        store(kv, slots[stored], key[stored], value[stored])
    else:
        store(kv, slots, key, value)
    return query, key, value


def lacks_slots(slots: Tensor) -> bool:
    """Return whether a row is not stored. Only the plain form waits for the device to know it."""
    return bool(slots.numel()) and bool((slots < 0).any())


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return x [n, heads, d] with its first d_rot dimensions rotated, cos and sin [n, d_rot]."""
    d_rot = cos.shape[-1]
    rotating, rest = x[..., :d_rot], x[..., d_rot:]
    first, second = rotating.chunk(2, dim=-1)
    rotated = rotating * cos[:, None] + torch.cat((-second, first), dim=-1) * sin[:, None]
    return torch.cat((rotated, rest), dim=-1) if rest.shape[-1] else rotated


def store(kv: Tensor, slots: Tensor, key: Tensor, value: Tensor) -> None:
    """Write keys and values [n, h, d] to slots [n] of a pool."""
    p = kv.shape[2]
    rows = slots + torch.div(slots, p, rounding_mode="floor") * p  # of the pool as [blocks * 2 * p, h, d]
    flat = kv.view(-1, *kv.shape[3:])
    flat.index_copy_(0, rows, key)
    flat.index_copy_(0, rows + p, value)


def paged_decode(
    query: Tensor,
    kv: Tensor,
    table: Tensor,
    tokens: Tensor,
    first: Tensor,
    last: Tensor,
    *,
    scale: float,
    window: int = 0,
    out: Tensor | None = None,
) -> Tensor:
    """Return the attention [r, H, d] of one new token of each request to the tokens that its KV blocks hold.

    Args:
        query: [r, H, d].
        kv: the pool.
        table: int32 [r, w], the KV blocks of each request in order; numbers behind those that it needs are not read.
        tokens: int32 [r], context of each request with the new token; 0 gives a row of zeros.
        first, last: int32 [r], how many of the first and last tokens a request keeps, the last in a ring
            (``sim.engine.block_table.ring_place``); last = 0: it keeps all.
        scale: of the scores.
        window: how many tokens back the attention looks, the new one included; 0: to the first.
        out: [r, H, d] to write the result to; None: new memory.
    """
    if runs_kernel(query):
        from hw.elastic.kernels import attention

        return attention.paged_decode(query, kv, table, tokens, first, last, scale, window, out)
    return paged_decode_reference(query, kv, table, tokens, first, last, scale=scale, window=window, out=out)


def paged_decode_reference(
    query: Tensor,
    kv: Tensor,
    table: Tensor,
    tokens: Tensor,
    first: Tensor,
    last: Tensor,
    *,
    scale: float,
    window: int = 0,
    out: Tensor | None = None,
) -> Tensor:
    """Return what ``paged_decode`` returns."""
    r, heads, d = query.shape
    p, kv_heads = kv.shape[2], kv.shape[3]
    tokens, first, last = (t.to(torch.int64)[:, None] for t in (tokens, first, last))
    place = torch.arange(table.shape[1] * p, device=query.device)[None]
    kept = torch.where(last > 0, torch.minimum(tokens, first + last), tokens)
    seen = place < kept  # [r, w * p]
    if window:
        # A place of the ring holds the newest token t with (t - first) % last == place - first.
        newest = tokens - 1
        in_ring = newest - (newest - place) % last.clamp(min=1)
        position = torch.where((last > 0) & (place >= first), in_ring, place)
        seen = seen & (position > newest - window)
    blocks = table.to(torch.int64).where(place[:, ::p] < kept, 0)
    keys, values = kv[blocks].unbind(2)  # [r, w, p, h, d]
    unseen = ~seen[:, :, None, None]
    shape = (r, -1, kv_heads, d)
    output = functional.scaled_dot_product_attention(
        query.reshape(r, kv_heads, heads // kv_heads, d),
        keys.reshape(shape).masked_fill(unseen, 0).transpose(1, 2),
        values.reshape(shape).masked_fill(unseen, 0).transpose(1, 2),  # 0 * NaN would be NaN
        attn_mask=seen[:, None, None],
        scale=scale,
    )
    output = output.reshape(r, heads, d).masked_fill(tokens[:, :, None] <= 0, 0)
    return output if out is None else out.copy_(output)


def paged_prefill(
    query: Tensor,
    kv: Tensor,
    table: Tensor,
    starts: Tensor,
    prefix: Tensor,
    *,
    scale: float,
    window: int = 0,
    out: Tensor | None = None,
) -> Tensor:
    """Return the causal attention [n, H, d] of the tokens of prompt chunks, whose own keys are already stored.

    Args:
        query: [n, H, d].
        kv: the pool.
        table: int32 [c, w], the KV blocks of each chunk's request in order; numbers behind those needed are not read.
        starts: int32 [c + 1]; chunk j is rows starts[j] to starts[j + 1] - 1. Other rows stay as they are.
        prefix: int32 [c], how many tokens come before each chunk. All tokens are kept.
        scale: of the scores.
        window: how many tokens back the attention looks, a token itself included; 0: to the first.
        out: [n, H, d] to write the result to; None: new memory.
    """
    if runs_kernel(query):
        from hw.elastic.kernels import attention

        return attention.paged_prefill(query, kv, table, starts, prefix, scale, window, out)
    return paged_prefill_reference(query, kv, table, starts, prefix, scale=scale, window=window, out=out)


def paged_prefill_reference(
    query: Tensor,
    kv: Tensor,
    table: Tensor,
    starts: Tensor,
    prefix: Tensor,
    *,
    scale: float,
    window: int = 0,
    out: Tensor | None = None,
) -> Tensor:
    """Return what ``paged_prefill`` returns."""
    output = torch.zeros_like(query, memory_format=torch.contiguous_format) if out is None else out
    p, kv_heads, d = kv.shape[2:]
    bounds = starts.tolist()
    for chunk, before in enumerate(prefix.tolist()):
        start, stop = bounds[chunk], bounds[chunk + 1]
        if start == stop:
            continue
        total = before + stop - start
        held = kv[table[chunk, : -(-total // p)].to(torch.int64)]  # [blocks, 2, p, h, d]
        keys, values = (half.reshape(1, -1, kv_heads, d)[:, :total].transpose(1, 2) for half in held.unbind(1))
        position = torch.arange(before, total, device=query.device)[:, None]
        place = torch.arange(total, device=query.device)[None]
        seen = place <= position
        if window:
            seen &= place > position - window
        attended = functional.scaled_dot_product_attention(
            query[start:stop].transpose(0, 1)[None],
            keys,
            values,
            attn_mask=seen,
            scale=scale,
            enable_gqa=query.shape[1] != kv_heads,
        )
        output[start:stop] = attended[0].transpose(0, 1)
    return output


# --- Products with quantized weights


def half_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x @ W.T + bias [..., o] with a 16-bit weight [o, i] read at 8 bits (``hw.elastic.nested``)."""
    return functional.linear(x, half_of_16(weight), bias)


def quantized_linear(x: Tensor, weight: QuantWeight, bias: Tensor | None = None) -> Tensor:
    """Return x @ W.T + bias [..., o] of x [..., i] and a weight of 8 or 4 bits."""
    if runs_kernel(x):
        from hw.elastic.kernels import quantized

        return quantized.quantized_linear(x, weight, bias)
    return quantized_linear_reference(x, weight, bias)


def quantized_linear_reference(x: Tensor, weight: QuantWeight, bias: Tensor | None = None) -> Tensor:
    """Return what ``quantized_linear`` returns."""
    return functional.linear(x, weight.dequantize(x.dtype, weight.scratch(x.dtype)), bias)
