"""The width of an FFN block: how many of its intermediate channels run, in eighths of all of them."""

from __future__ import annotations

from sim.errors import PlanError

FFN_WIDTHS = (8, 7, 6, 5)
"""Widths in eighths: those of AmoebaLLM (arXiv 2411.10606), 1, 7/8, 3/4 and 5/8."""
FULL_WIDTH = max(FFN_WIDTHS)
CHANNEL_MULTIPLE = 64
"""Channels of a slice are a multiple of this, so that products keep shapes for which GPUs have fast kernels."""


def ffn_channels(intermediate_size: int, width: int) -> int:
    """Return how many of an FFN block's channels a width in eighths keeps.

    The number is rounded up to a multiple of ``CHANNEL_MULTIPLE``, and is never more than there are.

    Raises:
        PlanError: for another width.
    """
    if width not in FFN_WIDTHS:
        raise PlanError(f"an FFN width is {width!r} eighths; allowed are {', '.join(map(str, FFN_WIDTHS))}")
    exact = -(-intermediate_size * width // FULL_WIDTH)
    return min(intermediate_size, -(-exact // CHANNEL_MULTIPLE) * CHANNEL_MULTIPLE)
