"""FLAP's importance of the channels of FFN blocks (arXiv 2312.11983, section 3.2).

FLAP scores an input channel j of a linear layer with weight W [o, i] by how much its input x_j fluctuates, times the
squared norm of the column that multiplies it:

    importance_j  =  |W[:, j]|^2 * variance(x_j)            over the tokens of the calibration text

Here the layer is the down projection of an FFN block; its input channels are the rows of the up and gate projections.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hw.elastic.model import ElasticModel
from hw.elastic.quantize import ElasticLinear
from sim.cost.plan import dense_plan
from sim.progress import progress

# Shapes: n windows, t tokens of each, l layers, f FFN size.


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
