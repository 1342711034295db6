"""Weights quantized to 8 and 4 bits in groups, on CPU and CUDA, in the layout that ``sim.cost.memory`` counts.

On CUDA a kernel multiplies with the packed values (hw/elastic/kernels/quantized.py). On a CPU a product unpacks the
weight first, so this saves memory but no time. No maintained library fits there: bitsandbytes has neither groups of
128 inputs with FP16 scales nor packed zero points, PyTorch's int8 product has one scale a row, and its int4 product for
CPUs takes no group that ends short, which most layers of SmolLM2 have, and is slower than this with FP32 inputs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from hw.elastic.nested import HALF_STEP
from hw.elastic.ops import half_linear, quantized_linear
from sim.cost.model_spec import QUANT_GROUP_ELEMENTS
from sim.errors import PlanError

# Shapes: o outputs, i inputs of a linear layer, g = ceil(i / 128) groups.


@dataclass(frozen=True, slots=True)
class QuantWeight:
    """One quantized weight matrix.

    packed: int8[o * i] at 8 bits; uint8[ceil(o * i / 2)] at 4 bits, two values per byte, the first in the low half.
    scales: float16[o, g].
    zeros: zero points, uint8[ceil(o * g / 2)], packed like the values; empty at 8 bits, which are symmetric.
    half: whether values of 8 bits are read at their first 4 (``hw.elastic.nested``).
    """

    bits: int
    out_features: int
    in_features: int
    packed: Tensor
    scales: Tensor
    zeros: Tensor
    half: bool = False

    def read(self, *, half: bool) -> QuantWeight:
        """Return the same stored values, read at half of their bits or at all; 4 bits have no half."""
        return replace(self, half=half and self.bits == 8)

    @property
    def nbytes(self) -> int:
        """Bytes of values, scales and zero points."""
        return self.packed.nbytes + self.scales.nbytes + self.zeros.nbytes

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """The tensors to store and copy."""
        return self.packed, self.scales, self.zeros

    def rows(self, first: int, last: int) -> QuantWeight:
        """Return rows ``first`` to ``last - 1`` as views; in 4 bits, values and zero points begin at a full byte."""
        o, i, groups = last - first, self.in_features, self.scales.shape[1]
        if self.bits == 8:
            packed, scales = self.packed[first * i : last * i], self.scales[first:last]
            return QuantWeight(8, o, i, packed, scales, self.zeros, self.half)
        assert first * i % 2 == 0
        assert first * groups % 2 == 0
        packed, zeros = self.packed[first * i // 2 :], self.zeros[first * groups // 2 :]
        packed, zeros = packed[: -(-o * i // 2)], zeros[: -(-o * groups // 2)]
        return QuantWeight(4, o, i, packed, self.scales[first:last], zeros)

    def scratch(self, dtype: torch.dtype) -> Tensor:
        """Return memory for the dequantized weight, which the next weight of this dtype overwrites."""
        return _scratch("weight", dtype, self.out_features * self.in_features, self.packed.device)

    def dequantize(self, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        """Return the weight matrix [o, i] that the stored values represent.

        Args:
            dtype: of the result.
            out: at least o * i elements of this dtype to write it to; None allocates new memory.
        """
        # Work in FP32 on a few rows at a time, so that their values stay in the caches of a CPU core.
        o, i, device = self.out_features, self.in_features, self.packed.device
        weight = (torch.empty(o * i, dtype=dtype, device=device) if out is None else out[: o * i]).view(o, i)
        scales = self.scales.to(torch.float32)
        groups = self.scales.shape[1]
        zeros = unpack_4bit(self.zeros, o * groups).view(o, groups).to(torch.float32) if self.bits == 4 else None
        rows = min(max(_SLICE_VALUES[device.type] // i, 1), o)
        rows += rows % 2  # an even count of values ends at a byte boundary
        values = weight.view(-1) if dtype == torch.float32 else _scratch("values", torch.float32, rows * i, device)
        for first in range(0, o, rows):
            last = min(first + rows, o)
            at = first * i if dtype == torch.float32 else 0
            part = values[at : at + (last - first) * i].view(last - first, i)
            if self.bits == 8:
                part.copy_(self.packed[first * i : last * i].view_as(part))
                if self.half:
                    part.div_(16).floor_().mul_(16).add_(HALF_STEP)
            else:
                pairs = self.packed[first * i // 2 : -(-last * i // 2)]
                both = _scratch("pairs", torch.int16, len(pairs), device)[: len(pairs)].copy_(pairs)
                both.bitwise_or_(both << 4).bitwise_and_(0x0F0F)  # as bytes: the low half, then the high half
                part.copy_(both.view(torch.uint8)[: part.numel()].view_as(part))
            for columns, group in _by_group(part):
                if zeros is not None:
                    columns.sub_(zeros[first:last, group, None])
                columns.mul_(scales[first:last, group, None])
            if dtype != torch.float32:
                weight[first:last].copy_(part)
        return weight


_SLICE_VALUES = {"cpu": 1 << 19, "cuda": 1 << 24}
"""How many values to unpack at a time: what fits the caches of a CPU core, or enough work for a GPU."""
_scratches: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}


def _scratch(use: str, dtype: torch.dtype, elements: int, device: torch.device) -> Tensor:
    """Return a buffer [>= elements] that the next call with the same use, dtype and device overwrites.

    Reuse matters: a large matrix that is allocated and freed at every product returns to the system and is page-faulted
    in again each time, which costs a CPU more than unpacking the weight.
    """
    key = use, dtype, device
    if key not in _scratches or len(_scratches[key]) < elements:
        with torch.inference_mode(False):  # an inference tensor cannot be written outside of that mode
            _scratches[key] = torch.empty(elements, dtype=dtype, device=device)
    return _scratches[key]


def _by_group(weight: Tensor) -> list[tuple[Tensor, slice]]:
    """Return views [rows, groups, values per group] of a matrix with the slice of groups that each covers.

    There are two views if the last group is shorter than the others.
    """
    i = weight.shape[1]
    full_groups = i // QUANT_GROUP_ELEMENTS
    end = full_groups * QUANT_GROUP_ELEMENTS
    views = []
    if full_groups:
        views.append((weight[:, :end].view(-1, full_groups, QUANT_GROUP_ELEMENTS), slice(0, full_groups)))
    if end < i:
        views.append((weight[:, end:].unsqueeze(1), slice(full_groups, full_groups + 1)))
    return views


def quantize(weight: Tensor, bits: int) -> QuantWeight:
    """Return the 8- or 4-bit copy of a weight matrix [o, i], rounded to nearest in groups of 128 inputs.

        8 bits:  w ~ scale * q,             q in -127..127,  scale = max |w| / 127
        4 bits:  w ~ scale * (q - zero),    q, zero in 0..15,  scale = (max(w, 0) - min(w, 0)) / 15

    Scales are rounded to FP16 before the values are computed, so the error of a value is at most half a step.

    Raises:
        PlanError: for another number of bits.
    Source:
        The round-to-nearest baseline of GPTQ (arXiv 2210.17323, section 2) in the layout of AWQ's WQLinear_GEMM.
    """
    if bits not in (8, 4):
        raise PlanError(f"weights cannot be quantized to {bits} bits; choose 8 or 4")
    o, i = weight.shape
    groups = -(-i // QUANT_GROUP_ELEMENTS)
    padded = functional.pad(weight.detach().to(torch.float32), (0, groups * QUANT_GROUP_ELEMENTS - i))
    grouped = padded.view(o, groups, QUANT_GROUP_ELEMENTS)
    if bits == 8:
        scales = _fp16_scales(grouped.abs().amax(-1) / 127)
        values = (grouped / scales.to(torch.float32)[:, :, None]).round().clamp(-127, 127).to(torch.int8)
        zeros = torch.empty(0, dtype=torch.uint8, device=weight.device)
        return QuantWeight(8, o, i, values.view(o, -1)[:, :i].reshape(-1), scales, zeros)
    low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
    scales = _fp16_scales((high - low) / 15)
    steps = scales.to(torch.float32)
    zero = (-low / steps).round().clamp(0, 15)
    values = ((grouped / steps[:, :, None]).round() + zero[:, :, None]).clamp(0, 15).to(torch.uint8)
    return QuantWeight(
        4, o, i, pack_4bit(values.view(o, -1)[:, :i].reshape(-1)), scales, pack_4bit(zero.to(torch.uint8).view(-1))
    )


def _fp16_scales(scales: Tensor) -> Tensor:
    # The scale of a group of zeros would be zero; any positive scale gives zeros back and avoids 0 / 0.
    return scales.clamp(torch.finfo(torch.float16).tiny, torch.finfo(torch.float16).max).to(torch.float16)


def pack_4bit(values: Tensor) -> Tensor:
    """Pack uint8 values below 16 two per byte, the first in the low half; an odd count is padded with a zero."""
    padded = functional.pad(values, (0, values.numel() % 2))
    return padded[0::2] | (padded[1::2] << 4)


def unpack_4bit(packed: Tensor, count: int) -> Tensor:
    """Return the first ``count`` values of a tensor packed by ``pack_4bit``."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).view(-1)[:count]


class ElasticLinear(nn.Linear):
    """A linear layer with a full-precision, quantized or absent weight; ``Block`` converts a model's own into it."""

    quantized: QuantWeight | None = None
    reads_half: bool = False

    def forward(self, input: Tensor) -> Tensor:
        """Multiply with the resident copy of the weight; with ``reads_half``, a 16-bit one is read at 8 bits."""
        if self.quantized is None and self.reads_half:
            return half_linear(input, self.weight, self.bias)
        if self.quantized is None:
            return functional.linear(input, self.weight, self.bias)
        return quantized_linear(input, self.quantized, self.bias)
