"""The one place that starts a Triton kernel: it counts, and knows what a device offers.

Rules that all kernels here keep:

* No autotuning. Tile sizes follow from shapes and types by a rule, so that the first iteration that meets a shape
  compiles one variant and measures none.
* What differs from one iteration to the next (numbers of rows, widths of tables, contexts) is a run-time argument that
  is not specialized, or is rounded up to a power of two. So a context that grows compiles nothing.
* A block number is widened to 64 bits before it is multiplied: a pool is larger than 2**31 elements.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import JITFunction

LAUNCHES: Counter[str] = Counter()
"""How often each kernel was started in this process, by name."""
WATCHERS: list[Callable[[str, Sequence[Any]], None]] = []
"""Called with the name and the arguments of every kernel that is started; for tests."""


def launch(
    kernel: Any, grid: tuple[int, ...], *arguments: Any, num_warps: int = 4, num_stages: int = 2, **constants: Any
) -> None:
    """Start a kernel on the current stream; count it. An empty grid starts nothing, and meta tensors are only counted.

    Args:
        kernel: a function under ``triton.jit``.
        grid: how many programs on each axis.
        arguments, constants: of the kernel; constants are those that it is compiled for.
        num_warps, num_stages: of a program.
    """
    if 0 in grid:
        return
    LAUNCHES[kernel.__name__] += 1
    for watcher in WATCHERS:
        watcher(kernel.__name__, [*arguments, *constants.values()])
    if any(isinstance(one, Tensor) and one.is_meta for one in arguments):
        return
    kernel[grid](*arguments, **constants, num_warps=num_warps, num_stages=num_stages)


@cache
def multiprocessors(device: torch.device) -> int:
    """Return how many multiprocessors a device has; what an H100 has for a device that has none."""
    if device.type != "cuda":
        return 132
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def power_of_two(count: int, least: int = 1) -> int:
    """Return the smallest power of two that is at least ``count`` and ``least``."""
    return max(1 << max(count - 1, 0).bit_length(), least)


def ceil_div(count: int, parts: int) -> int:
    """Return count / parts, rounded up."""
    return -(-count // parts)


@triton.jit
def _probe():
    pass


INTERPRETED = tl.constexpr(not isinstance(_probe, JITFunction))
"""Whether kernels run in triton's interpreter, which holds BF16 as integers that it cannot multiply."""


@triton.jit
def dot(a, b):
    """Return a @ b in FP32; products of FP32 are exact, not TF32."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")
