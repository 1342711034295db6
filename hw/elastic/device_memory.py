"""How much of a device's memory a run really takes, and how freed memory is returned to the device."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import torch

_STATM = Path("/proc/self/statm")


class DeviceMemory:
    """Samples memory in use, and allocates ballast so that a smaller budget is a real limit.

    On CUDA the allocator reports the memory, and a ballast tensor takes the difference between the largest budget and
    that of now, so that an overrun is a real out-of-memory error. On a CPU the process's resident memory is read. There
    is no ballast; only the pool of KV blocks enforces the budget, and its pages are really returned.
    """

    def __init__(self, device: torch.device, largest_budget_bytes: int) -> None:
        """Measure from now on."""
        self._device = device
        self._largest_bytes = largest_budget_bytes
        self._ballast: torch.Tensor | None = None
        self.give_back()
        self.peak_bytes = self.start_bytes = self.in_use_bytes()
        if device.type == "cuda":
            total_bytes = torch.cuda.get_device_properties(device).total_memory
            share = min(1.0, (largest_budget_bytes + self.start_bytes) / total_bytes)
            torch.cuda.set_per_process_memory_fraction(share, device)

    def in_use_bytes(self) -> int:
        """Bytes of allocated tensors without ballast on CUDA, of the process's resident memory on a CPU."""
        if self._device.type == "cuda":
            ballast = self._ballast.nbytes if self._ballast is not None else 0
            return torch.cuda.memory_allocated(self._device) - ballast
        if _STATM.is_file():
            return int(_STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        return 0

    def sample(self) -> int:
        """Return the bytes in use, and keep their maximum."""
        now = self.in_use_bytes()
        self.peak_bytes = max(self.peak_bytes, now)
        return now

    def follow(self, budget_bytes: int) -> None:
        """Set the ballast to the largest budget minus this one; call it once allocated memory fits ``budget_bytes``."""
        wanted = self._largest_bytes - budget_bytes
        if self._device.type != "cuda" or (self._ballast is not None and self._ballast.nbytes == wanted):
            return
        self._ballast = None
        torch.cuda.empty_cache()
        if wanted > 0:
            self._ballast = torch.empty(wanted, dtype=torch.uint8, device=self._device)

    def give_back(self) -> None:
        """Return freed memory to the system, so that others can use what was dropped."""
        give_back(self._device)


def give_back(device: torch.device) -> None:
    """Return the memory that this process has freed on a device to the system."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return
    trim = getattr(_libc(), "malloc_trim", None)  # glibc keeps freed memory; other systems return it by themselves
    if trim is not None:
        trim(0)


def _libc() -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL(None)
    except (OSError, TypeError):
        return None


def out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory ran out, on CUDA or CPU."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
