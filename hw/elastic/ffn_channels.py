"""The channels of a real FFN block, in order of importance: what a narrower width frees, and a wider one copies in.

A narrower block is a prefix of the rows of gate and up and of the columns of down, in tensors of their own: the tensors
of the wider block are freed when the prefix has been copied. A wider block is the narrower one with the channels that
it lacks, which come from the store. So a change needs memory for the block twice for a moment between two iterations,
when the workspace is idle; the memory counted before and after is that of the channels alone.

At 8 and 4 bits the prefix is one of the quantized copy: its last group of the down projection may end short, and keeps
the scale of the complete group. The bias that stands for removed channels is that of the weights at full precision.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hw.elastic.layers import Matrix, Rows
from hw.elastic.quantize import pack_4bit, unpack_4bit
from sim.cost.ffn_width import FFN_WIDTHS, FULL_WIDTH, ffn_channels
from sim.cost.model_spec import QUANT_GROUP_ELEMENTS

# Shapes: e hidden size, f all channels, k channels of a width, p projections that make a channel (gate and up, or up).


class FFNChannels:
    """The matrices of an FFN block whose channels are in order of importance.

    count: all channels. Matrix 0 is gate and up [p f, e], matrix 1 is down [e, f].
    """

    def __init__(self, up: Matrix, down: Matrix, order: Tensor | None, mean: Tensor | None) -> None:
        """Put the channels of a block at full precision in order.

        Args:
            up, down: the matrices of the block.
            order: channels [f], the most important first; None leaves them where they are.
            mean: of each channel's activation [f], in the order of the checkpoint; None for zeros.
        """
        self._up, self._down = up, down
        self.count = down.shape[1]
        self._parts = up.shape[0] // self.count
        self._outputs = [linear.out_features for linear in up.linears]
        self._up_bias = None if up.bias is None else self._rows(up.bias.value)
        if order is not None:
            up.weight.set(self._rows(up.weight.value)[:, order].reshape(up.shape))
            down.weight.set(down.weight.value[:, order].contiguous())
            if up.bias is not None and self._up_bias is not None:
                up.bias.set(self._up_bias[:, order].reshape(-1))
                self._up_bias = self._rows(up.bias.value)
        if self._up_bias is not None:
            self._up_bias = self._up_bias.cpu()
        own = None if down.bias is None else down.bias.value.cpu()
        self._down_bias: dict[int, Tensor | None] = {FULL_WIDTH: own}
        weight = down.weight.value
        means = torch.zeros(self.count, dtype=torch.float64, device=weight.device) if mean is None else mean.double()
        means = means if order is None else means[order]
        for width in FFN_WIDTHS:
            kept = self.channels(width)
            if width != FULL_WIDTH:
                lost = (weight[:, kept:].double() @ means[kept:]).to(weight.dtype).cpu()
                self._down_bias[width] = lost if own is None else own + lost

    @property
    def extra_bytes(self) -> int:
        """Bytes of the bias that stands for removed channels, where the full block has none."""
        bias = self._down.bias
        return bias.nbytes if bias is not None and self._down_bias[FULL_WIDTH] is None else 0

    def channels(self, width: int) -> int:
        """Return how many channels a width in eighths keeps."""
        return ffn_channels(self.count, width)

    def resize(self, width: int) -> None:
        """Let the matrices expect the weights of a width from now on."""
        kept = self.channels(width)
        self._up.resize([count // self.count * kept for count in self._outputs], self._up.shape[1])
        self._down.resize([self._down.shape[0]], kept)

    def biases(self, width: int, place: torch.device) -> list[Tensor | None]:
        """Return the biases of a width, in memory of their own: of gate and up, and of down; None where it has none."""
        up = None if self._up_bias is None else self._up_bias[:, : self.channels(width)].reshape(-1)
        return [None if bias is None else bias.to(place, copy=True) for bias in (up, self._down_bias[width])]

    def set_biases(self, biases: Sequence[Tensor | None]) -> None:
        """Take biases that ``biases`` returned, for the width that the matrices expect."""
        up, down = biases
        if up is not None and self._up.bias is not None:
            self._up.bias.set(up)
        if down is None:
            self.forget_biases()
        elif self._down.bias is None:
            (linear,) = self._down.linears
            linear.bias = nn.Parameter(down, requires_grad=False)
            self._down.bias = Rows([linear.bias], copy=False)
        else:
            self._down.bias.set(down)

    def forget_biases(self) -> None:
        """Let nothing be left of a bias that only a smaller width has."""
        if self._down_bias[FULL_WIDTH] is None:
            (linear,) = self._down.linears
            linear.bias = None  # type: ignore[assignment]
            self._down.bias = None

    def part(self, index: int, tensors: Sequence[Tensor], bits: int, have: int, first: int, width: int) -> list[Tensor]:
        """Return the weights of some channels of a matrix: those of ``width`` without those of ``first``.

        Args:
            index: of the matrix. tensors: its weights, as stored at ``bits``, of the channels of width ``have``.
            first: a width whose channels are left out; 0 leaves out none.
        """
        planes = self._planes(index, tensors, bits, 0, self.channels(have))
        start, end = self.channels(first) if first else 0, self.channels(width)
        if index == 0:
            return _packed([_own(self._rows(x)[:, start:end]).view(-1, x.shape[1]) for x in planes], bits)
        ranges = [slice(start, end), slice(_groups(start), _groups(end)), slice(_groups(start), _groups(end))]
        return _packed([_own(x[:, one]) for x, one in zip(planes, ranges, strict=False)], bits)

    def joined(
        self, index: int, tensors: Sequence[Tensor], more: Sequence[Tensor], bits: int, first: int, width: int
    ) -> list[Tensor]:
        """Return the weights of a matrix at ``width``, from those at ``first`` and from the part that this lacks."""
        start, end = self.channels(first), self.channels(width)
        old, new = self._planes(index, tensors, bits, 0, start), self._planes(index, more, bits, start, end)
        if index == 1:
            return _packed([torch.cat(pair, 1) for pair in zip(old, new, strict=True)], bits)
        pairs = zip(old, new, strict=True)
        both = [torch.cat([self._rows(a), self._rows(b)], 1).view(-1, *a.shape[1:]) for a, b in pairs]
        return _packed(both, bits)

    def _rows(self, value: Tensor) -> Tensor:
        """Return rows of gate and up [p k, ...] as [p, k, ...]."""
        return value.view(self._parts, -1, *value.shape[1:])

    def _planes(self, index: int, tensors: Sequence[Tensor], bits: int, start: int, end: int) -> list[Tensor]:
        """Return what is stored of channels ``start`` to ``end - 1`` as matrices: values, scales and zero points."""
        if bits == 16:
            return [tensors[0]]
        packed, scales, zeros = tensors
        if index == 0:
            rows, columns, groups = self._parts * (end - start), self._up.shape[1], scales.shape[1]
        else:
            rows, columns, groups = self._down.shape[0], end - start, _groups(end) - _groups(start)
        if bits == 8:
            return [packed.view(rows, columns), scales]
        values = unpack_4bit(packed, rows * columns).view(rows, columns)
        return [values, scales, unpack_4bit(zeros, rows * groups).view(rows, groups)]


def _groups(channels: int) -> int:
    return -(-channels // QUANT_GROUP_ELEMENTS)


def _own(values: Tensor) -> Tensor:
    """Return a copy, which keeps nothing else in memory."""
    return values.clone(memory_format=torch.contiguous_format)


def _packed(planes: Sequence[Tensor], bits: int) -> list[Tensor]:
    """Return matrices of values, scales and zero points as they are stored."""
    if bits == 16:
        return list(planes)
    values, scales = planes[:2]
    if bits == 8:
        return [values.view(-1), scales, torch.empty(0, dtype=torch.uint8, device=scales.device)]
    return [pack_4bit(values.view(-1)), scales, pack_4bit(planes[2].view(-1))]
