"""How much of a device's memory a run really takes, the limit it must stay under, and what happens when it runs out."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from hw.elastic.device import Accelerator, Device

T = TypeVar("T")
_RAN_OUT = (
    "can't allocate memory",  # the allocator of a CPU
    "CUDA out of memory",
    "CUDA error: out of memory",  # of the driver, for example while it loads a kernel
    "STATUS_ALLOC_FAILED",  # cuBLAS, cuDNN, cuSPARSE and cuSOLVER, for their workspaces
)
"""What errors other than ``torch.OutOfMemoryError`` say when memory ran out."""


class DeviceMemory:
    """Samples memory in use, and makes a budget a real limit.

    On CUDA, allocations beyond the budget fail. On a CPU only the pool of KV blocks enforces the budget, and its pages
    are really returned.

    start_bytes: in use when the run began. peak_bytes: the most in use since; on CUDA also in the middle of a pass.
    """

    def __init__(self, device: Device, weight_bytes: int) -> None:
        """Measure from now on; ``weight_bytes`` of what is in use are the model's, and count as part of a budget."""
        self._device = device
        self._followed: int | None = None
        self.give_back()
        device.take_peak_bytes()
        self.peak_bytes = self.start_bytes = device.in_use_bytes()
        self._others_bytes = max(0, self.start_bytes - weight_bytes)

    def sample(self) -> int:
        """Return the most bytes in use since the last sample, and keep their maximum."""
        peak = self._device.take_peak_bytes()
        self.peak_bytes = max(self.peak_bytes, peak)
        return peak

    def follow(self, budget_bytes: int) -> None:
        """Let allocations fail that would take more than ``budget_bytes`` for weights, KV blocks and all else."""
        if budget_bytes != self._followed and isinstance(self._device, Accelerator):
            self._device.limit(budget_bytes + self._others_bytes)
        self._followed = budget_bytes

    def close(self) -> None:
        """Take the limit away, for whatever this process runs next."""
        if isinstance(self._device, Accelerator):
            self._device.limit(None)

    def give_back(self) -> None:
        """Return freed memory to the system, so that others can use what was dropped."""
        self._device.give_back()


def attempt(device: Device, step: Callable[[], T]) -> T:
    """Run a step that needs memory of a device.

    Raises:
        MemoryError: if memory ran out; what the process had freed has been returned to the system then.
    """
    try:
        return step()
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        reason = str(error).partition("\n")[0]
    # Outside of ``except``: while the error lives, its traceback keeps the tensors of the failed step alive.
    device.give_back()
    raise MemoryError(reason)


def out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory ran out, on CUDA or CPU."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _RAN_OUT)
