"""MorphServe's Layer Importance Score: the order in which layers are swapped for their quantized copies."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from hw.elastic.model import ElasticModel
from hw.score.nll import rounded
from sim.progress import progress

# Shapes: n windows, t tokens of each, e hidden size.


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerImportance:
    """MorphServe's scores of every layer.

    order: layers in the order in which they are swapped. lts, lrs: of each layer.
    mds, lis: of each layer, at the time when it was chosen.
    """

    order: tuple[int, ...]
    lts: tuple[float, ...]
    lrs: tuple[float, ...]
    mds: tuple[float, ...]
    lis: tuple[float, ...]


@torch.inference_mode()
def layer_importance(elastic: ElasticModel, windows: Tensor, bits: int) -> LayerImportance:
    """Return the scores and the order in which layers are swapped for their W8 or W4 copies.

        LTS_p = cos(h_p(x), x_p)    LRS_p = cos(h_p(x), h_p^Q(x))    MDS_p = cos(f^Q(x), f^(Q+p)(x))
        LIS_p = 0.25 LTS_p + 0.25 LRS_p + 0.5 MDS_p

    h_p is layer p and x_p its input, h_p^Q its quantized copy, and f^Q the model with the layers Q swapped. In every
    step the layer with the highest LIS joins Q. The paper leaves open what f returns and how to average: here f returns
    logits, and a cosine is the mean over tokens.

    Args:
        elastic: with all blocks at full precision.
        windows: token ids [n, t] of calibration text.
        bits: of the swapped copies, 8 or 4.
    Source:
        MorphServe (arXiv 2506.02006), Layer Importance Score.
    """
    layers = elastic.spec.num_layers
    windows = windows.to(elastic.device)
    lts, lrs = _scores_of_layers(elastic, windows, bits)
    swapped: list[int] = []
    mds, lis = [0.0] * layers, [0.0] * layers
    tried = 0
    with progress("choosing layers", layers * (layers + 1) // 2, "trials") as report:
        while len(swapped) < layers:
            scores = _model_scores(elastic, windows, bits, swapped)
            total = {p: 0.25 * lts[p] + 0.25 * lrs[p] + 0.5 * scores[p] for p in scores}
            chosen = max(total, key=lambda p: (total[p], -p))
            mds[chosen], lis[chosen] = scores[chosen], total[chosen]
            swapped.append(chosen)
            tried += len(scores)
            report(tried, f"({len(swapped)} of {layers} layers chosen)")
    return LayerImportance(order=tuple(swapped), lts=tuple(lts), lrs=tuple(lrs), mds=tuple(mds), lis=tuple(lis))


def _scores_of_layers(elastic: ElasticModel, windows: Tensor, bits: int) -> tuple[list[float], list[float]]:
    """Return LTS and LRS of every layer."""
    layers = elastic.spec.num_layers
    lts, lrs = [0.0] * layers, [0.0] * layers
    for window in windows:
        hidden = _embed(elastic, window)
        for layer in range(layers):
            before, after = hidden, _run_layers(elastic, hidden, layer, layer + 1)
            hidden = after
            with rounded(elastic, _bits_of(layers, [layer], bits)):
                quantized = _run_layers(elastic, before, layer, layer + 1)
            lts[layer] += _cosine(before, after) / len(windows)
            lrs[layer] += _cosine(after, quantized) / len(windows)
    return lts, lrs


def _model_scores(elastic: ElasticModel, windows: Tensor, bits: int, swapped: Collection[int]) -> dict[int, float]:
    """Return MDS of every layer that is not swapped yet."""
    layers = elastic.spec.num_layers
    scores = dict.fromkeys((p for p in range(layers) if p not in swapped), 0.0)
    for window in windows:
        # f^Q and f^(Q+p) are equal before layer p, so that part runs once for all p.
        hidden = _embed(elastic, window)
        entering: list[Tensor] = []
        with rounded(elastic, _bits_of(layers, swapped, bits)):
            for layer in range(layers):
                entering.append(hidden)
                hidden = _run_layers(elastic, hidden, layer, layer + 1)
            reference = elastic.head(hidden)
        for p in scores:
            with rounded(elastic, _bits_of(layers, [*swapped, p], bits)):
                logits = elastic.head(_run_layers(elastic, entering[p], p, layers))
            scores[p] += _cosine(reference, logits) / len(windows)
    return scores


def _bits_of(layers: int, swapped: Collection[int], bits: int) -> list[int]:
    return [bits if layer in swapped else 16 for layer in range(layers)]


def _embed(elastic: ElasticModel, window: Tensor) -> Tensor:
    """Return the hidden states [1, t, e] of a window [t] before the first layer."""
    return elastic.embed(window[None], torch.arange(window.shape[0], device=window.device)[None])


def _run_layers(elastic: ElasticModel, hidden: Tensor, first: int, end: int) -> Tensor:
    rope = elastic.rope(hidden, torch.arange(hidden.shape[1], device=hidden.device)[None])
    for layer in range(first, end):
        hidden = hidden + elastic.attend(layer, hidden, rope)
        hidden = hidden + elastic.feed(layer, hidden)
    return hidden


def _cosine(a: Tensor, b: Tensor) -> float:
    return float(functional.cosine_similarity(a.float(), b.float(), dim=-1).mean())
