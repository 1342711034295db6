"""FFN blocks cut to some of their intermediate channels, by FLAP's importance of channels, with its compensation.

``hw.elastic.channel_scores`` scores channels (FLAP, arXiv 2312.11983, section 3.2). What a removed channel contributes
on average is kept as a constant, so that only the fluctuation is lost:

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

from hw.elastic.channel_scores import ChannelScores, down_projection
from hw.elastic.model import ElasticModel
from sim.cost.ffn_width import ffn_channels

# Shapes: n windows, t tokens of each, l layers, e hidden size, f FFN size, k channels of a slice.


@dataclass(frozen=True, slots=True, eq=False)
class FFNSlice:
    """The part of an FFN block that runs; two slices are equal only if they are one object.

    channels: [k], ascending. compensation: [e], what the other channels add on average.
    """

    channels: Tensor
    compensation: Tensor


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
