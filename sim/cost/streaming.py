"""Streamed layers: their weights stay in host memory, and every pass copies them to the device (Oneiros).

The device has room for two such layers, `SLOTS`. All streamed layers share it in the order in which they run: when one
has run, the copy of the layer after the next begins, into its slot, also across the end of a pass. Nothing is lost: the
model is whole. A pass takes longer when a layer has to be waited for:

    start of streamed layer j  =  the later of: the layers before it have run; its copy is complete
    start of the copy of j     =  the later of: the copy of j - 1 is complete; layer j - 2 has run

So a pass takes about max(its computing, the bytes of all streamed layers / link) where these layers lie at equal
distances, and longer where they lie close together. Computing is taken to be spread evenly over the blocks that run.

Source:
    Oneiros (arXiv 2507.11507), which lends the memory of layers to KV and streams their weights from the CPU.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sim.compiled import compiled
from sim.types import Floats, Ints

SLOTS = 2
"""Layers for which streaming keeps room on the device."""
LEAST_STREAMED = SLOTS + 1
"""Streamed layers from which on memory is freed."""
STEADY_PASSES = 32
"""Passes after which they are taken to recur, and over which `steady_pass_s` takes the mean."""
SHARED_LINK = 2.0
"""A copy takes this times as long while a plan change copies a layer over the same link, and so does that copy."""


def held_bytes(layer_bytes: Sequence[int], streamed: Sequence[bool]) -> int:
    """Return the bytes of all layers on the device: those that are not streamed, and the room for those that are.

    Args:
        layer_bytes: of the blocks that each layer runs. streamed: whether each layer is streamed.
    """
    crossing = [size for size, flag in zip(layer_bytes, streamed, strict=True) if flag and size]
    return sum(layer_bytes) - sum(crossing) + min(SLOTS, len(crossing)) * max(crossing, default=0)


def even_layers(num_layers: int, count: int) -> tuple[int, ...]:
    """Return ``count`` layers at equal distances, so that the copy of each has as much time as that of any other."""
    return tuple((2 * i + 1) * num_layers // (2 * count) for i in range(count))


def nested_layers(num_layers: int) -> list[int]:
    """Return all layers in an order whose first n are far from each other, for every n.

    Each layer is the one farthest from those before it, also across the end of a pass; of several, the first. Where the
    number of layers is a power of two, the first 4, 8 or 16 lie at equal distances. A change from n to more streamed
    layers then only adds layers.
    """
    order = [num_layers // 2]
    while len(order) < num_layers:
        far = [min(min((i - j) % num_layers, (j - i) % num_layers) for j in order) for i in range(num_layers)]
        order.append(far.index(max(far)))
    return order


def stream_rows(layer_bytes: Sequence[int], blocks: Sequence[int], streamed: Sequence[bool]) -> tuple[Ints, Floats]:
    """Return what `streamed_end_s` reads of m streamed layers: their bytes int64[m + 1], and shares float64[m + 1, 2].

    Row j of the shares is what of a pass's computing lies between streamed layer j - 1 and layer j, and in layer j; the
    last row is for what follows the last one, and its bytes are those of all. Without streamed layers there is no row.

    Args:
        layer_bytes, streamed: as for `held_bytes`. blocks: how many blocks each layer runs.
    """
    sizes, shares, before = [], [], 0
    total = max(sum(blocks), 1)
    for size, count, flag in zip(layer_bytes, blocks, streamed, strict=True):
        if flag and size:
            sizes.append(size)
            shares.append((before / total, count / total))
            before = 0
        else:
            before += count
    if not sizes:
        return np.zeros(0, dtype=np.int64), np.zeros((0, 2))
    return np.array([*sizes, sum(sizes)], dtype=np.int64), np.array([*shares, (before / total, 0.0)])


@compiled()
def stream_ready_s(
    layer_bytes: Ints, at: int, count: int, now_s: float, bytes_per_s: float, layer_s: float, factor: float
) -> tuple[float, float]:
    """Return when the first two streamed layers are on the device, if the copies begin at ``now_s``; see below."""
    first_s = now_s + (layer_bytes[at] / bytes_per_s + layer_s) * factor
    return first_s, first_s + (layer_bytes[at + (1 if count > 1 else 0)] / bytes_per_s + layer_s) * factor


@compiled()
def slowed_s(
    layer_bytes: Ints, at: int, count: int, compute_s: float, bytes_per_s: float, layer_s: float, slowdown: float
) -> float:
    """Return the computing of a pass while streamed layers are copied: ``slowdown`` more for as long as copies run.

    Args:
        layer_bytes, at, count, bytes_per_s, layer_s: as for `streamed_end_s`. compute_s: without any copy.
        slowdown: of computing next to a copy, which uses the device's memory too.
    """
    link_s = layer_bytes[at + count] / bytes_per_s + count * layer_s
    return float(compute_s + slowdown * min(compute_s, link_s))


@compiled()
def streamed_end_s(
    layer_bytes: Ints,
    shares: Floats,
    at: int,
    count: int,
    start_s: float,
    compute_s: float,
    bytes_per_s: float,
    layer_s: float,
    factor: float,
    first_s: float,
    second_s: float,
) -> tuple[float, float, float]:
    """Return when a pass ends, and when the first two streamed layers of the next pass are on the device.

    Args:
        layer_bytes, shares: of `stream_rows`, from row ``at`` on. count: streamed layers.
        start_s, compute_s: of the pass. bytes_per_s: of the link. layer_s: of each copy in addition.
        factor: how much longer copies take now.
        first_s, second_s: when the first two streamed layers are on the device.
    """
    now_s = start_s
    for j in range(count):
        now_s = max(now_s + shares[at + j, 0] * compute_s, first_s) + shares[at + j, 1] * compute_s
        if count == 1:  # one slot: the layer that has just run is copied again
            first_s = now_s + (layer_bytes[at] / bytes_per_s + layer_s) * factor
        else:
            copied_s = (layer_bytes[at + (j + 2) % count] / bytes_per_s + layer_s) * factor
            first_s, second_s = second_s, max(second_s, now_s) + copied_s
    return float(now_s + shares[at + count, 0] * compute_s), float(first_s), float(second_s)


def steady_pass_s(
    layer_bytes: Sequence[int],
    blocks: Sequence[int],
    streamed: Sequence[bool],
    compute_s: float,
    bytes_per_s: float,
    layer_s: float = 0.0,
    slowdown: float = 0.0,
) -> float:
    """Return the mean seconds of a pass that recurs.

    Args:
        layer_bytes, blocks, streamed: as for `stream_rows`.
        compute_s, bytes_per_s, layer_s, slowdown: as for `slowed_s`.
    """
    sizes, shares = stream_rows(layer_bytes, blocks, streamed)
    count = len(sizes) - 1
    if count < 1:
        return compute_s
    compute_s = slowed_s(sizes, 0, count, compute_s, bytes_per_s, layer_s, slowdown)
    first_s, second_s = stream_ready_s(sizes, 0, count, 0.0, bytes_per_s, layer_s, 1.0)
    ends_s = [0.0]
    for _ in range(2 * STEADY_PASSES):
        end_s, first_s, second_s = streamed_end_s(
            sizes, shares, 0, count, ends_s[-1], compute_s, bytes_per_s, layer_s, 1.0, first_s, second_s
        )
        ends_s.append(end_s)
    return (ends_s[-1] - ends_s[STEADY_PASSES]) / STEADY_PASSES
