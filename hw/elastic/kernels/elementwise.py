"""Kernels that read a row once and write it once: norms, gated activations, rotation and storing of keys and values.

All values are widened to FP32 when they are loaded, and rounded where ``hw.elastic.ops`` says that transformers rounds.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hw.elastic.kernels.launch import ceil_div, launch, power_of_two

# Shapes as in hw.elastic.ops.

GATED_COLUMNS = 1024
"""Columns of a program of the gated activation."""
ROPE_HEADS = 8
"""Heads of a program that rotates and stores."""


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    """Return what ``hw.elastic.ops.rms_norm`` describes."""
    return _norm(x, None, weight, eps, offset)[0]


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float) -> tuple[Tensor, Tensor]:
    """Return what ``hw.elastic.ops.add_rms_norm`` describes."""
    return _norm(x, residual, weight, eps, offset)


def _norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, offset: float) -> tuple[Tensor, Tensor]:
    """Return the norm of x (+ residual) and that sum; without a residual the sum is x itself."""
    rows, columns = x.shape
    other = x if residual is None else residual
    assert x.stride(1) == other.stride(1) == weight.stride(0) == 1
    out = torch.empty((rows, columns), dtype=x.dtype, device=x.device)
    total = x if residual is None else torch.empty_like(out)
    block = power_of_two(columns)
    launch(
        _rms_norm_kernel,
        (rows,),
        x,
        other,
        weight,
        out,
        total,
        x.stride(0),
        other.stride(0),
        eps,
        offset,
        COLUMNS=columns,
        BLOCK=block,
        ADD=residual is not None,
        OFFSET=offset != 0,
        num_warps=min(max(block // 512, 1), 16),
    )
    return out, total


@triton.jit
def _rms_norm_kernel(
    x,
    residual,
    weight,
    out,
    total,
    x_row,
    residual_row,
    eps,
    offset,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    ADD: tl.constexpr,
    OFFSET: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < COLUMNS
    kind = out.dtype.element_ty
    value = tl.load(x + row * x_row + column, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        value += tl.load(residual + row * residual_row + column, mask=inside, other=0.0).to(tl.float32)
        rounded = value.to(kind)
        tl.store(total + row * COLUMNS + column, rounded, mask=inside)
        value = rounded.to(tl.float32)
    scale = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    value = _normed(value, tl.sum(value * value, axis=0) / COLUMNS, scale, eps, offset, kind, OFFSET)
    tl.store(out + row * COLUMNS + column, value.to(kind), mask=inside)


@triton.jit
def _normed(value, square, weight, eps, offset, kind: tl.constexpr, OFFSET: tl.constexpr):
    """Return value / sqrt(square + eps) * (weight + offset), rounded as a norm of transformers does."""
    quotient = value * tl.rsqrt(square + eps)
    if OFFSET:
        quotient *= weight + offset
    else:
        quotient = quotient.to(kind).to(tl.float32) * weight
    return quotient


def gated(gate_up: Tensor, activation: str) -> Tensor:
    """Return what ``hw.elastic.ops.gated`` describes."""
    rows, columns = gate_up.shape[0], gate_up.shape[1] // 2
    assert gate_up.stride(1) == 1
    assert activation in ("silu", "gelu_tanh"), activation
    out = torch.empty((rows, columns), dtype=gate_up.dtype, device=gate_up.device)
    launch(
        _gated_kernel,
        (rows, ceil_div(columns, GATED_COLUMNS)),
        gate_up,
        out,
        gate_up.stride(0),
        COLUMNS=columns,
        BLOCK=GATED_COLUMNS,
        SILU=activation == "silu",
    )
    return out


@triton.jit
def _gated_kernel(gate_up, out, gate_up_row, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, SILU: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < COLUMNS
    kind = out.dtype.element_ty
    gate = tl.load(gate_up + row * gate_up_row + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * gate_up_row + COLUMNS + column, mask=inside, other=0.0).to(tl.float32)
    if SILU:
        active = gate * tl.sigmoid(gate)
    else:  # gate / 2 * (1 + tanh(t)), where 1 + tanh(t) = 2 * sigmoid(2 * t)
        inner = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
        active = gate * tl.sigmoid(2.0 * inner)
    tl.store(out + row * COLUMNS + column, (active.to(kind).to(tl.float32) * up).to(kind), mask=inside)


def rope_and_store(
    qkv: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    kv: Tensor,
    slots: Tensor,
    heads: int,
    kv_heads: int,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    *,
    eps: float,
    offset: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return and store what ``hw.elastic.ops.rope_and_store`` describes; the values are a view of ``qkv``."""
    rows, d = qkv.shape[0], kv.shape[4]
    d_rot = 0 if cos is None else cos.shape[-1]
    assert qkv.stride(1) == kv.stride(4) == 1
    assert cos is None or (sin is not None and cos.stride(-1) == sin.stride(-1) == 1 and cos.stride(0) == sin.stride(0))
    assert (q_norm is None) == (k_norm is None)
    query = torch.empty((rows, heads, d), dtype=qkv.dtype, device=qkv.device)
    key = torch.empty((rows, kv_heads, d), dtype=qkv.dtype, device=qkv.device)
    launch(
        _rope_and_store_kernel,
        (rows, ceil_div(heads + 2 * kv_heads, ROPE_HEADS)),
        qkv,
        qkv if cos is None else cos,
        qkv if sin is None else sin,
        qkv if q_norm is None else q_norm,
        qkv if k_norm is None else k_norm,
        slots,
        query,
        key,
        kv,
        qkv.stride(0),
        0 if cos is None else cos.stride(0),
        kv.stride(0),
        kv.stride(1),
        kv.stride(2),
        kv.stride(3),
        eps,
        offset,
        HEADS=heads,
        KV_HEADS=kv_heads,
        DIM=d,
        DIM_BLOCK=power_of_two(d),
        HEADS_BLOCK=ROPE_HEADS,
        ROTATED=d_rot,
        NORM=q_norm is not None,
        OFFSET=offset != 0,
        KV_BLOCK_TOKENS=kv.shape[2],
    )
    return query, key, qkv[:, (heads + kv_heads) * d :].view(rows, kv_heads, d)


@triton.jit(do_not_specialize=["slots"])
def _rope_and_store_kernel(
    qkv,
    cos,
    sin,
    q_norm,
    k_norm,
    slots,
    query,
    key,
    kv,
    qkv_row,
    cos_row,
    kv_block,
    kv_half,
    kv_place,
    kv_head,
    eps,
    offset,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    HEADS_BLOCK: tl.constexpr,
    ROTATED: tl.constexpr,
    NORM: tl.constexpr,
    OFFSET: tl.constexpr,
    KV_BLOCK_TOKENS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS_BLOCK + tl.arange(0, HEADS_BLOCK)[:, None]
    column = tl.arange(0, DIM_BLOCK)[None, :]
    inside = (head < HEADS + 2 * KV_HEADS) & (column < DIM)
    kind = query.dtype.element_ty
    source = qkv + row * qkv_row + head * DIM
    x = tl.load(source + column, mask=inside, other=0.0).to(tl.float32)
    turns = (head < HEADS + KV_HEADS) & inside  # values keep theirs
    if NORM:
        square = (tl.sum(x * x, axis=1) / DIM)[:, None]
        weight = _weight_of(q_norm, k_norm, column, column < DIM, head < HEADS)
        x = tl.where(turns, _normed(x, square, weight, eps, offset, kind, OFFSET).to(kind).to(tl.float32), x)
    if ROTATED > 0:
        # Half turns against half: column c of the first half with c + ROTATED / 2, whose sign is negative.
        rotates = column < ROTATED
        other = tl.where(column < ROTATED // 2, column + ROTATED // 2, column - ROTATED // 2)
        partner = tl.load(source + other, mask=turns & rotates, other=0.0).to(tl.float32)
        if NORM:
            weight = _weight_of(q_norm, k_norm, other, rotates, head < HEADS)
            partner = _normed(partner, square, weight, eps, offset, kind, OFFSET).to(kind).to(tl.float32)
        partner = tl.where(column < ROTATED // 2, -partner, partner)
        cosine = tl.load(cos + row * cos_row + column, mask=rotates, other=1.0).to(tl.float32)
        sine = tl.load(sin + row * cos_row + column, mask=rotates, other=0.0).to(tl.float32)
        x = tl.where(turns & rotates, x * cosine + partner * sine, x)
    result = x.to(kind)
    tl.store(query + (row * HEADS + head) * DIM + column, result, mask=inside & (head < HEADS))
    is_key = (head >= HEADS) & (head < HEADS + KV_HEADS)
    tl.store(key + (row * KV_HEADS + head - HEADS) * DIM + column, result, mask=inside & is_key)
    slot = tl.load(slots + row).to(tl.int64)
    half = tl.where(head < HEADS + KV_HEADS, 0, 1)
    target = kv + (slot // KV_BLOCK_TOKENS) * kv_block + (slot % KV_BLOCK_TOKENS) * kv_place
    target += half * kv_half + (head - HEADS - half * KV_HEADS) * kv_head + column
    tl.store(target, result, mask=inside & (head >= HEADS) & (slot >= 0))


@triton.jit
def _weight_of(q_norm, k_norm, column, mask, is_query):
    """Return the norm's weight of each column, of queries or of keys."""
    of_query = tl.load(q_norm + column, mask=mask, other=0.0).to(tl.float32)
    of_key = tl.load(k_norm + column, mask=mask, other=0.0).to(tl.float32)
    return tl.where(is_query, of_query, of_key)
