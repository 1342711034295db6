"""LoRC: keys and values as coefficients of the first singular directions of the weights that make them.

    W = U S V^T, of the key or value weights of all KV heads of a layer, [h d, e]
    stored of a token: U_r^T W x (r numbers);  read: U_r U_r^T W x = U_r S_r V_r^T x

The last equation says that this is the product with the truncated weights. Keys are stored before their rotation.

Deep layers keep fewer directions than shallow ones, whose errors grow on the way: ranks fall with the cumulative
condition number, the product of the condition numbers of W_k and W_v from a layer to the last one.

Source:
    LoRC (arXiv 2410.03111), sections 3.2 and 3.3. The exact formula of the ranks is open. Assumptions: a rank is linear
    in the logarithm of the cumulative condition number, from the highest at the first layer to the lowest at the last;
    keys and values have the same rank; the highest is all directions, unless the lowest would then be below half of the
    mean, which is then the lowest. LoRC truncates weights, so its prompts are computed with truncated KV too; here a
    prompt is computed with all of it, as with every other method, and only stored so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hw.elastic.kv_compression.prompt_kv import LayerKV, StoredKV
from hw.elastic.layers import Layer
from hw.elastic.ops import rotate
from sim.cost.model_spec import ModelSpec
from sim.errors import ModelError

# Shapes: h KV heads, p tokens of the prompt, d head_dim, e hidden size, l layers, R = min(h d, e) directions.


@dataclass(frozen=True, slots=True)
class Directions:
    """The singular directions of a weight [h d, e].

    basis: [h d, R], the first direction first. log_condition: logarithm of the condition number.
    bias: [h d], which is no part of the product; None for none.
    """

    basis: Tensor
    log_condition: float
    bias: Tensor | None = None

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None = None) -> Directions:
        """Decompose a weight, in FP64."""
        basis, sizes, _ = torch.linalg.svd(weight.double(), full_matrices=False)
        least = sizes[-1].clamp(min=torch.finfo(torch.float64).tiny)
        wide = None if bias is None else bias.float()
        return cls(basis.float(), float((sizes[0] / least).log()), wide)

    @property
    def count(self) -> int:
        """R, how many directions there are."""
        return self.basis.shape[1]

    def first(self, count: int) -> Directions:
        """Return the first ``count`` of them."""
        return Directions(self.basis[:, :count], self.log_condition, self.bias)

    def copy(self) -> Directions:
        """Return them in memory of their own: the others can be freed, and the weights that they are of."""
        bias = None if self.bias is None else self.bias.clone()
        return Directions(self.basis.clone(memory_format=torch.contiguous_format), self.log_condition, bias)


def layer_ranks(log_conditions: Sequence[float], directions: int, factor: float) -> list[int]:
    """Return the rank of each layer; together they are ``factor`` of all directions, to the nearest.

    Args:
        log_conditions: [l], of the key and value weights of a layer together.
        directions: R, of each layer. factor: of the KV that is stored, above 0, at most 1.
    """
    layers, mean = len(log_conditions), factor * directions
    cumulative = torch.tensor(log_conditions, dtype=torch.float64).flip(0).cumsum(0).flip(0)
    spread = cumulative[0] - cumulative[-1]
    height = (cumulative - cumulative[-1]) / spread if spread > 0 else torch.full((layers,), 0.5, dtype=torch.float64)
    middle = float(height.mean())
    lowest, highest = (mean - middle * directions) / (1 - middle), float(directions)
    if lowest < mean / 2:
        lowest, highest = mean / 2, mean / 2 + mean / 2 / middle
    return _rounded((lowest + (highest - lowest) * height).tolist(), round(layers * mean))


def _rounded(values: Sequence[float], total: int) -> list[int]:
    """Return whole numbers of this sum next to some values: rounded down, then up for the largest fractions."""
    found = [int(value) for value in values]
    by_fraction = sorted(range(len(values)), key=lambda i: found[i] - values[i])
    for i in by_fraction[: total - sum(found)]:
        found[i] += 1
    return found


def coefficients(vectors: Tensor, directions: Directions, rank: int) -> Tensor:
    """Return the coefficients [p, r] in FP32 of keys (before rotation) or values [h, p, d] in the first directions."""
    heads, tokens, head_dim = vectors.shape
    flat = vectors.float().transpose(0, 1).reshape(tokens, heads * head_dim)
    if directions.bias is not None:
        flat = flat - directions.bias
    return flat @ directions.basis[:, :rank]


def from_coefficients(stored: Tensor, directions: Directions, head_dim: int) -> Tensor:
    """Return the keys (before rotation) or values [h, p, d] in FP32 that are read from coefficients [p, r]."""
    read = stored.float() @ directions.basis[:, : stored.shape[1]].T
    if directions.bias is not None:
        read = read + directions.bias
    return read.view(len(stored), -1, head_dim).transpose(0, 1)


def truncated(vectors: Tensor, directions: Directions, rank: int) -> Tensor:
    """Return keys (before rotation) or values [h, p, d] as they are read when ``rank`` directions are stored.

    All directions return the vectors themselves, as then nothing is gained by storing coefficients.
    """
    if rank >= directions.count:
        return vectors
    return from_coefficients(coefficients(vectors, directions, rank), directions, vectors.shape[-1]).to(vectors.dtype)


def turned_back(keys: Tensor, cos: Tensor | None, sin: Tensor | None) -> Tensor:
    """Return keys [h, p, d] before their rotation, in FP32; cos and sin [p, d_rot] are None without one."""
    if cos is None or sin is None:
        return keys.float()
    cos, sin = cos.float(), sin.float()
    # Some rotations also scale: the inverse divides by the square of that.
    size = cos.square() + sin.square()
    return rotate(keys.float().transpose(0, 1), cos / size, -sin / size).transpose(0, 1)


def turned(keys: Tensor, cos: Tensor | None, sin: Tensor | None) -> Tensor:
    """Return keys [h, p, d] of FP32 after their rotation."""
    if cos is None or sin is None:
        return keys
    return rotate(keys.transpose(0, 1), cos.float(), sin.float()).transpose(0, 1)


def truncated_keys(layer: LayerKV, directions: Directions, rank: int) -> Tensor:
    """Return the rotated keys [h, p, d] of a layer as they are read when ``rank`` directions are stored."""
    if layer.cos is None or layer.sin is None or rank >= directions.count:
        return truncated(layer.keys, directions, rank)
    before = turned_back(layer.keys, layer.cos, layer.sin)
    return turned(truncated(before, directions, rank), layer.cos, layer.sin).to(layer.keys.dtype)


def compress(
    layer: LayerKV, keys: Directions, values: Directions, key_rank: int, value_rank: int | None = None
) -> StoredKV:
    """Return a layer's KV in the first directions of its key and value weights; None: as many of both."""
    value_rank = key_rank if value_rank is None else value_rank
    numbers = layer.heads * layer.keys.shape[-1]
    share = (min(key_rank, numbers) + min(value_rank, numbers)) / (2 * numbers)
    return StoredKV(
        keys=truncated_keys(layer, keys, key_rank), values=truncated(layer.values, values, value_rank), share=share
    )


def key_and_value_directions(
    layers: Sequence[Layer], spec: ModelSpec, count: int | None = None
) -> tuple[list[Directions], list[Directions]]:
    """Return the singular directions of the key and the value weights of all layers, which are resident at 16 bits.

    Args:
        count: how many of each weight; None for all.
    Raises:
        ModelError: for a model that normalizes keys, whose keys are no product with a weight.
    """
    of_queries, of_keys = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    found: tuple[list[Directions], list[Directions]] = ([], [])
    for layer in layers:
        if layer.k_norm is not None:
            raise ModelError(f"LoRC needs keys that are a product with a weight, but {spec.name} normalizes its keys")
        for place, listed in enumerate(found):
            rows = slice(of_queries + place * of_keys, of_queries + (place + 1) * of_keys)
            bias = None if layer.qkv.bias is None else layer.qkv.bias.value[rows]
            directions = Directions.of(layer.qkv.weight.value[rows], bias)
            listed.append(directions if count is None else directions.first(count).copy())
    return found
