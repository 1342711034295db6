"""How the next token is chosen from its logits: the likeliest one, or one sampled with temperature and top_p.

A sampled token depends on its logits, the request's seed and the number of tokens before it. It does not depend on
other requests of the batch, nor on preemptions. All rows of a batch are sampled together, on their device.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sim.cost.memory import SAMPLED_LOGITS
from sim.serve.sampling import Sampling


@dataclass(frozen=True, slots=True)
class Draw:
    """A row of logits to sample from. index: of the token among those of its request."""

    row: int
    sampling: Sampling
    index: int


class Drawn:
    """The rows of an iteration to sample, as arrays for its one copy to the device.

    arrays: their numbers, int64 [draws]; and for each temperature, top_p and random number, float64 [3, draws].
    """

    def __init__(self, draws: Sequence[Draw]) -> None:
        """Draw the random numbers. ``draws``: the rows to sample; the others take the likeliest token."""
        self.rows = [draw.row for draw in draws]
        self.cuts = any(draw.sampling.top_p < 1 for draw in draws)
        numbers = [(d.sampling.temperature, d.sampling.top_p, d.sampling.uniform(d.index)) for d in draws]
        self.arrays: list[npt.NDArray[Any]] = []
        if draws:
            self.arrays = [np.array(self.rows, np.int64), np.array(numbers, np.float64).T.copy()]


def choose(logits: Tensor, drawn: Drawn, tensors: Sequence[Tensor], first: int = 0) -> Tensor:
    """Return the next token of each row.

    Args:
        logits: [rows, vocabulary].
        drawn: the rows to sample, in order. tensors: its arrays, on the device of the logits.
        first: number of the first row, if these are not all rows.
    """
    chosen = logits.argmax(-1)
    begin, end = bisect_left(drawn.rows, first), bisect_left(drawn.rows, first + len(logits))
    step = max(1, SAMPLED_LOGITS // logits.shape[-1])
    for at in range(begin, end, step):
        rows, numbers = (tensor[..., at : min(at + step, end)] for tensor in tensors)
        if first:
            rows = rows - first
        chosen[rows] = _sample(logits[rows], numbers, drawn.cuts)
    return chosen


def _sample(logits: Tensor, numbers: Tensor, cuts: bool) -> Tensor:
    """Return one sampled token for each row of ``logits`` [draws, vocabulary]; ``cuts``: whether a top_p is below 1."""
    temperature, top_p, uniform = numbers[:, :, None]
    probabilities = torch.softmax(logits.float() / temperature.float(), dim=-1)
    if cuts:
        ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
        likelier = ordered.cumsum(-1, dtype=torch.float64) - ordered
        likelier[:, 0] = -1.0  # the likeliest token stays
        ordered = ordered.masked_fill((likelier >= top_p) & (top_p < 1), 0.0)
        probabilities = torch.zeros_like(ordered).scatter_(-1, order, ordered)
    # The first token at which the sum exceeds the random share of the total. The sum runs in the order of the
    # vocabulary: a last-digit difference of two likely tokens then changes nothing.
    sums = probabilities.cumsum(-1, dtype=torch.float64)
    return torch.searchsorted(sums, uniform * sums[:, -1:], right=True).squeeze(-1)
