"""Products with weights of 8 and 4 bits, which are unpacked in registers: memory is read once, in packed form.

One row is a sum along the inputs, spread over many programs of a few outputs each. More rows go to the matrix units:
the unpacked weight is the left operand, and the rows of x are the columns of the right one, so that few rows waste
little.
Values minus zero points are small whole numbers, exact in FP16 and BF16; the scale multiplies the FP32 sum of a group.
So the result is closer to the exact product than one with a weight that was rounded to 16 bits.

No maintained product fits this layout. PyTorch's ``_weight_int4pack_mm``, which torchao calls too, has BF16 scales and
zero points in place of FP16 scales and packed 4-bit zero points, and takes no group that ends short. Its
``_weight_int8pack_mm`` has one scale a row.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from hw.elastic import nested
from hw.elastic.kernels.launch import ceil_div, dot, launch
from sim.cost.model_spec import QUANT_GROUP_ELEMENTS

if TYPE_CHECKING:
    from hw.elastic.quantize import QuantWeight

# Shapes as in hw.elastic.quantize; n rows of x.

GROUP = tl.constexpr(QUANT_GROUP_ELEMENTS)
HALF_STEP = tl.constexpr(nested.HALF_STEP)


def quantized_linear(x: Tensor, weight: QuantWeight, bias: Tensor | None) -> Tensor:
    """Return what ``hw.elastic.ops.quantized_linear`` describes."""
    o, i = weight.out_features, weight.in_features
    rows = x.reshape(-1, i)
    n = rows.shape[0]
    assert rows.stride(1) == 1 or i == 1
    out = torch.empty((n, o), dtype=x.dtype, device=x.device)
    zeros = weight.zeros if weight.bits == 4 else weight.packed
    arguments = rows, weight.packed, weight.scales, zeros, out if bias is None else bias, out
    constants = {"O": o, "I": i, "BITS": weight.bits, "READ_HALF": weight.half, "BIAS": bias is not None}
    if n == 1:
        groups = 8 if weight.bits == 4 else 4  # of a step: 4 KiB of values
        launch(_row_kernel, (ceil_div(o, 8),), *arguments, **constants, O_BLOCK=8, GROUPS=groups)
    elif n > 1:
        n_block, o_block, unroll, warps, stages = tiles(n, weight.bits, x.element_size())
        n_tiles = ceil_div(n, n_block)
        launch(
            _tile_kernel,
            (ceil_div(o, o_block) * n_tiles,),
            *arguments,
            n,
            rows.stride(0),
            n_tiles,
            **constants,
            N_BLOCK=n_block,
            O_BLOCK=o_block,
            UNROLL=unroll,
            num_warps=warps,
            num_stages=stages,
        )
    return out.view(*x.shape[:-1], o)


def tiles(n: int, bits: int, element_bytes: int) -> tuple[int, int, int, int, int]:
    """Return rows and outputs of a tile, groups of inputs a step, warps and stages for n rows.

    Few rows: narrow tiles for many programs, and several groups a step, so that enough bytes are under way.
    """
    if element_bytes > 2:  # FP32 is for tests
        return 16, 32, 1, 4, 2
    if n <= 16:
        return 16, 32, 4 if bits == 4 else 2, 4, 4
    if n <= 32:
        return 32, 32, 2, 4, 3
    if n <= 64:
        return 64, 64, 1, 4, 3
    return 64, 128, 1, 8, 3


@triton.jit
def _zero_point(zeros, index, mask):
    """Return the 4-bit zero points of these groups."""
    return (tl.load(zeros + (index >> 1), mask=mask, other=0).to(tl.int32) >> ((index & 1) * 4).to(tl.int32)) & 15


@triton.jit
def _values(codes, READ_HALF: tl.constexpr):
    """Return codes of 8 bits as numbers: themselves, or the mean of the 16 that share their first 4 bits."""
    if READ_HALF:
        return ((codes.to(tl.int32) >> 4) * 16).to(tl.float32) + HALF_STEP
    return codes.to(tl.float32)


@triton.jit
def _row_kernel(
    x,
    packed,
    scales,
    zeros,
    bias,
    out,
    O: tl.constexpr,  # noqa: E741
    I: tl.constexpr,  # noqa: E741
    BITS: tl.constexpr,
    READ_HALF: tl.constexpr,
    BIAS: tl.constexpr,
    O_BLOCK: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """One row of x: 8 outputs a program, a few groups of inputs a step, and one sum at the end."""
    ALL: tl.constexpr = (I + GROUP - 1) // GROUP
    output = (tl.program_id(0) * O_BLOCK + tl.arange(0, O_BLOCK)).to(tl.int64)[:, None, None]
    HALF: tl.constexpr = GROUP // 2 if BITS == 4 else GROUP
    total = tl.zeros((O_BLOCK, GROUPS, HALF), tl.float32)
    for step in tl.range(0, ALL, GROUPS, num_stages=3):
        group = (step + tl.arange(0, GROUPS))[None, :, None]
        known = (output < O) & (group < ALL)
        scale = tl.load(scales + output * ALL + group, mask=known, other=0.0).to(tl.float32)
        if BITS == 8:
            at = group * GROUP + tl.arange(0, GROUP)[None, None, :]
            value = _values(tl.load(packed + output * I + at, mask=known & (at < I), other=0), READ_HALF)
            factor = tl.load(x + at, mask=at < I, other=0.0).to(tl.float32)
            total += value * scale * factor
        else:
            zero = _zero_point(zeros, output * ALL + group, known)
            whole = (step + tl.arange(0, GROUPS))[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
            factor = tl.load(x + whole, mask=whole < I, other=0.0).to(tl.float32)
            even, odd = tl.split(tl.reshape(factor, (GROUPS, HALF, 2)))  # [GROUPS, HALF] each
            at = group * HALF + tl.arange(0, HALF)[None, None, :]
            if I % 2 == 0:  # a byte holds two inputs of one output
                pair = tl.load(packed + output * (I // 2) + at, mask=known & (at < I // 2), other=0)
                low = pair & 15
                high = pair >> 4
            else:
                low = _nibble(packed, output * I + 2 * at, known & (2 * at < I))
                high = _nibble(packed, output * I + 2 * at + 1, known & (2 * at + 1 < I))
            low = (low.to(tl.int32) - zero).to(tl.float32)
            high = (high.to(tl.int32) - zero).to(tl.float32)
            total += (low * even[None] + high * odd[None]) * scale
    result = tl.sum(tl.sum(total, axis=2), axis=1)
    output = tl.program_id(0) * O_BLOCK + tl.arange(0, O_BLOCK)
    if BIAS:
        result += tl.load(bias + output, mask=output < O, other=0.0).to(tl.float32)
    tl.store(out + output, result.to(out.dtype.element_ty), mask=output < O)


@triton.jit
def _nibble(packed, index, mask):
    """Return the 4-bit values at these indices, which may start in the middle of a byte."""
    return (tl.load(packed + (index >> 1), mask=mask, other=0).to(tl.int32) >> ((index & 1) * 4).to(tl.int32)) & 15


@triton.jit(do_not_specialize=["n", "n_tiles"])
def _tile_kernel(
    x,
    packed,
    scales,
    zeros,
    bias,
    out,
    n,
    x_row,
    n_tiles,
    O: tl.constexpr,  # noqa: E741
    I: tl.constexpr,  # noqa: E741
    BITS: tl.constexpr,
    READ_HALF: tl.constexpr,
    BIAS: tl.constexpr,
    N_BLOCK: tl.constexpr,
    O_BLOCK: tl.constexpr,
    UNROLL: tl.constexpr,
):
    ALL: tl.constexpr = (I + GROUP - 1) // GROUP
    # Tiles of the same outputs run at the same time, so that their weights are read from memory once.
    output = ((tl.program_id(0) // n_tiles) * O_BLOCK + tl.arange(0, O_BLOCK)).to(tl.int64)
    row = ((tl.program_id(0) % n_tiles) * N_BLOCK + tl.arange(0, N_BLOCK)).to(tl.int64)
    total = tl.zeros((O_BLOCK, N_BLOCK), tl.float32)
    for step in tl.range(0, ALL, UNROLL):
        for unrolled in tl.static_range(UNROLL):
            group = step + unrolled
            known = (output < O) & (group < ALL)
            scale = tl.load(scales + output * ALL + group, mask=known, other=0.0).to(tl.float32)
            at = group * GROUP + tl.arange(0, GROUP)
            column = tl.load(
                x + row[None, :] * x_row + at[:, None], mask=(row < n)[None, :] & (at < I)[:, None], other=0.0
            )  # [GROUP, N_BLOCK]
            wanted = known[:, None] & (at < I)[None, :]
            index = output[:, None] * I + at[None, :]
            if BITS == 8:
                value = _values(tl.load(packed + index, mask=wanted, other=0), READ_HALF)
            else:
                zero = _zero_point(zeros, output * ALL + group, known)[:, None]
                if I % 2 == 0:
                    half = group * (GROUP // 2) + tl.arange(0, GROUP // 2)
                    pair = tl.load(
                        packed + output[:, None] * (I // 2) + half[None, :],
                        mask=known[:, None] & (half < I // 2)[None, :],
                        other=0,
                    )
                    value = tl.interleave(pair & 15, pair >> 4).to(tl.float32)
                else:
                    value = _nibble(packed, index, wanted).to(tl.float32)
                value -= zero.to(tl.float32)
            total += dot(value.to(column.dtype), column) * scale[:, None]
    if BIAS:
        total += tl.load(bias + output, mask=output < O, other=0.0).to(tl.float32)[:, None]
    tl.store(
        out + row[None, :] * O + output[:, None],
        total.to(out.dtype.element_ty),
        mask=(row < n)[None, :] & (output < O)[:, None],
    )
