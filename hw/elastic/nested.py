"""Weights of which half of the bits are read: a 16-bit weight as an 8-bit float, an 8-bit code as one of 4 bits.

**8 of 16 bits** (NestedFP, arXiv 2506.02024). Where no weight exceeds 1.75, the highest exponent bit of FP16 is 0. The
15 other bits are split into two bytes: the upper one has sign, 4 exponent bits and 3 mantissa bits, rounded to nearest,
which is E4M3 of the weight times 256; the lower one has the last 8 bits of the weight. Together they give the weight
back, exactly: where the lowest bit of the upper byte is not the highest of the lower byte, rounding has added one.
BF16 has no such bytes; its weights are read as the same numbers.

**4 of 8 bits** (Any-precision LLM, arXiv 2402.10517, whose bit planes hold indices of centroids). The upper half of an
8-bit code is the code of the 16 values that share it; it stands for their mean:

    w ~ scale * (16 * floor(q / 16) + 7.5)

The engine keeps its usual layout and drops the other half of the bits when it multiplies. So the values are those of
nested storage, its bytes too, and a switch moves nothing; but the engine reads all bits, and saves no time. To read
half of them, the bytes or the planes would have to be stored separately, and each product would need a kernel for both.
"""

from __future__ import annotations

import torch
from torch import Tensor

MOST = 1.75
"""Largest weight that E4M3 holds at this scale: 448 / 256. A matrix with a larger one is read at all of its bits."""
SCALE = 256.0
HALF_STEP = 7.5


def half_of_16(weight: Tensor, out: Tensor | None = None) -> Tensor:
    """Return a 16- or 32-bit weight at 8 bits: E4M3 of the weight times 256, over 256.

    Args:
        weight: values up to `MOST`. out: of the same dtype, with at least as many elements; None allocates new memory.
    """
    eight = (weight * SCALE).to(torch.float8_e4m3fn)
    target = torch.empty_like(weight) if out is None else out[: weight.numel()].view_as(weight)
    return target.copy_(eight).div_(SCALE)


def has_half(weight: Tensor) -> bool:
    """Return whether all values can be read at 8 bits."""
    return not weight.numel() or float(weight.abs().max()) <= MOST


def split(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return the upper and the lower bytes, uint8, of FP16 weights up to `MOST`."""
    bits = weight.view(torch.int16).to(torch.int32)
    upper = (weight.to(torch.float32) * SCALE).to(torch.float8_e4m3fn).view(torch.uint8)
    return upper, (bits & 0xFF).to(torch.uint8)


def joined(upper: Tensor, lower: Tensor) -> Tensor:
    """Return the FP16 weights of which ``split`` made these bytes."""
    high, low = upper.to(torch.int32), lower.to(torch.int32)
    high = high - ((high ^ (low >> 7)) & 1)  # where rounding has added one to the magnitude
    # Sign, the exponent's highest bit, which is 0, and then 14 bits; the eighth of them stands in both bytes.
    bits = (high & 0x80) << 8 | (high & 0x7F) << 7 | low & 0x7F
    return bits.to(torch.int16).view(torch.float16)


def read_upper(upper: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the weights at 8 bits from their upper bytes."""
    return (upper.view(torch.float8_e4m3fn).to(torch.float32) / SCALE).to(dtype)
