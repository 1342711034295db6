"""The width of an FFN block: how many of its intermediate channels run, in eighths of all of them (AmoebaLLM).

The channels of a block are stored in order of importance, so that a narrower width is a prefix of a wider one: cutting
a block frees the bytes of the channels behind it, and widening it copies in those that are missing. The mean of what
the removed channels add stays as a bias of the down projection (FLAP, arXiv 2312.11983, section 3.2).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from sim.cost.model_spec import ModelSpec
from sim.errors import PlanError

FFN_WIDTHS = (8, 7, 6, 5)
"""Widths in eighths: those of AmoebaLLM (arXiv 2411.10606), 1, 7/8, 3/4 and 5/8."""
FULL_WIDTH = max(FFN_WIDTHS)
CHANNEL_MULTIPLE = 64
"""Channels of a slice are a multiple of this, so that products keep shapes for which GPUs have fast kernels."""

LEAST_CHANNELS = FULL_WIDTH * CHANNEL_MULTIPLE
"""From this many channels on, no two widths round up to the same number of them."""


def ffn_channels(intermediate_size: int, width: int) -> int:
    """Return how many of an FFN block's channels a width in eighths keeps.

    The number is rounded up to a multiple of ``CHANNEL_MULTIPLE``, and is never more than there are. Widths differ in
    it from ``LEAST_CHANNELS`` on; plans cut no smaller blocks.

    Raises:
        PlanError: for another width.
    """
    if width not in FFN_WIDTHS:
        raise PlanError(f"an FFN width is {width!r} eighths; allowed are {', '.join(map(str, FFN_WIDTHS))}")
    exact = -(-intermediate_size * width // FULL_WIDTH)
    return min(intermediate_size, -(-exact // CHANNEL_MULTIPLE) * CHANNEL_MULTIPLE)


def ffn_params(model: ModelSpec, widths: Sequence[int], runs: Sequence[bool]) -> int:
    """Return the parameters of the FFN blocks that run, each at its width."""
    each = {width: narrowed(model, width).ffn_params for width in set(widths)}
    return sum(each[width] for width, keep in zip(widths, runs, strict=True) if keep)


def narrowed(model: ModelSpec, width: int) -> ModelSpec:
    """Return the model whose FFN blocks have the channels of a width; the model itself if those are all."""
    channels = ffn_channels(model.intermediate_size, width)
    return model if channels == model.intermediate_size else replace(model, intermediate_size=channels)
