"""What a run really takes of a device's memory, and how memory is given back."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import torch

_STATM = Path("/proc/self/statm")


class DeviceMemory:
    """Samples memory in use and holds the ballast that makes a smaller budget bind.

    On CUDA the allocator is asked, and a ballast tensor takes what the budget of the moment leaves of the largest one,
    so that an overrun meets a real out-of-memory. On a CPU the process's resident memory is read; nothing stands in
    for a co-tenant there, and the budget binds through the pool, whose pages are really given back.
    """

    def __init__(self, device: torch.device, largest_budget_bytes: int) -> None:
        """Measure from here on."""
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
        """Bytes of allocated tensors on CUDA, ballast left out; of the process's resident memory on CPU."""
        if self._device.type == "cuda":
            ballast = self._ballast.nbytes if self._ballast is not None else 0
            return torch.cuda.memory_allocated(self._device) - ballast
        if _STATM.is_file():
            return int(_STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        return 0

    def sample(self) -> int:
        """Return the bytes in use and remember the most."""
        now = self.in_use_bytes()
        self.peak_bytes = max(self.peak_bytes, now)
        return now

    def follow(self, budget_bytes: int) -> None:
        """Let the ballast take what this budget leaves of the largest; call it once what is held fits the budget."""
        wanted = self._largest_bytes - budget_bytes
        if self._device.type != "cuda" or (self._ballast is not None and self._ballast.nbytes == wanted):
            return
        self._ballast = None
        torch.cuda.empty_cache()
        if wanted > 0:
            self._ballast = torch.empty(wanted, dtype=torch.uint8, device=self._device)

    def give_back(self) -> None:
        """Return freed memory to the system: what was dropped shall be there for others."""
        give_back(self._device)


def give_back(device: torch.device) -> None:
    """Return the memory that this process has freed on a device to the system."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return
    trim = getattr(_libc(), "malloc_trim", None)  # glibc's; other systems give back by themselves
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
