"""FFN blocks cut to some of their intermediate channels, with FLAP's importance of channels and its compensation.

FLAP (arXiv 2312.11983, section 3.2) scores an input channel j of a linear layer with weight W [o, i] by how much its
input x_j fluctuates, times the squared norm of the column that multiplies it. What a removed channel contributes on
average is kept as a constant, so that only the fluctuation is lost:

    importance_j  =  |W[:, j]|^2 * variance(x_j)            over the tokens of the calibration text
    compensation  =  sum over removed channels of W[:, j] * mean(x_j)

Here the layer is the down projection of an FFN block; its input channels are the rows of the up and gate projections.
FLAP compares scores across layers, too, to give each its own width. Here each layer's width is chosen, and only the
order of channels within a layer counts.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from hw.elastic.model import ElasticModel
from hw.elastic.quantize import ElasticLinear
from sim.cost.ffn_width import ffn_channels
from sim.cost.plan import dense_plan
from sim.progress import progress

# Shapes: n windows, t tokens of each, l layers, e hidden size, f FFN size, k channels of a slice.


@dataclass(frozen=True, slots=True)
class ChannelScores:
    """FLAP's scores of the channels of every FFN block.

    importance: [l, f], in FP64. mean: [l, f], of each channel's activation.
    """

    importance: Tensor
    mean: Tensor

    def order(self, layer: int) -> Tensor:
        """Return a layer's channels [f], the most important one first; of equal ones the first."""
        return self.importance[layer].argsort(descending=True, stable=True)


@dataclass(frozen=True, slots=True, eq=False)
class FFNSlice:
    """The part of an FFN block that runs; two slices are equal only if they are one object.

    channels: [k], ascending. compensation: [e], what the other channels add on average.
    """

    channels: Tensor
    compensation: Tensor


def down_projection(elastic: ElasticModel, layer: int) -> ElasticLinear:
    """Return the linear layer whose inputs are the channels of a layer's FFN block."""
    return elastic.blocks["ffn"][layer].linears[-1]


@torch.inference_mode()
def channel_scores(elastic: ElasticModel, windows: Tensor) -> ChannelScores:
    """Return FLAP's scores on windows [n, t] of calibration text.

    Args:
        elastic: with all blocks at full precision. windows: token ids; two tokens at least.
    """
    assert elastic.plan == dense_plan(elastic.spec)
    shape = elastic.spec.num_layers, down_projection(elastic, 0).in_features
    total, squares = (torch.zeros(shape, dtype=torch.float64, device=elastic.device) for _ in range(2))

    def read(layer: int, inputs: Tensor) -> None:
        values = inputs.reshape(-1, shape[1]).double()
        total[layer] += values.sum(0)
        squares[layer] += values.square().sum(0)

    handles = [
        down_projection(elastic, layer).register_forward_pre_hook(lambda _, inputs, layer=layer: read(layer, inputs[0]))
        for layer in range(shape[0])
    ]
    try:
        with progress("scoring channels", len(windows), "windows") as report:
            for number, window in enumerate(windows, start=1):
                elastic.forward(window[None])
                report(number)
    finally:
        for handle in handles:
            handle.remove()
    count = windows.numel()
    mean = total / count
    variance = (squares - count * mean.square()).clamp(min=0) / (count - 1)
    norms = torch.stack([down_projection(elastic, i).weight.double().square().sum(0) for i in range(shape[0])])
    return ChannelScores(norms * variance, mean)


def ffn_slice(elastic: ElasticModel, scores: ChannelScores, layer: int, width: int) -> FFNSlice:
    """Return the most important channels of a layer's FFN block, as many as a width in eighths keeps."""
    order = scores.order(layer)
    kept = ffn_channels(len(order), width)
    removed = order[kept:]
    down = down_projection(elastic, layer).weight
    lost = down[:, removed].double() @ scores.mean[layer, removed]
    return FFNSlice(order[:kept].sort().values, lost.to(down.dtype))


@contextmanager
def sliced(elastic: ElasticModel, layer: int, cut: FFNSlice | None) -> Iterator[None]:
    """Replace the weights of a layer's FFN block by those of some channels, and restore them at the end.

    The products are then really smaller, though the full weights stay in memory. None changes nothing.
    """
    if cut is None:
        yield
        return
    down = down_projection(elastic, layer)
    size = down.in_features
    ups = elastic.blocks["ffn"][layer].linears[:-1]
    full = [(linear, linear.weight.data, linear.bias) for linear in (*ups, down)]
    try:
        for up in ups:  # a fused projection has the rows of gate, then those of up
            rows = torch.cat([cut.channels + first for first in range(0, up.out_features, size)])
            up.weight.data = up.weight.data[rows]
            if up.bias is not None:
                up.bias = torch.nn.Parameter(up.bias.data[rows], requires_grad=False)
        down.weight.data = down.weight.data[:, cut.channels]
        bias = cut.compensation if down.bias is None else down.bias.data + cut.compensation
        down.bias = torch.nn.Parameter(bias, requires_grad=False)
        yield
    finally:
        for linear, weight, bias in full:
            linear.weight.data = weight
            linear.bias = bias
