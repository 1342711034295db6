"""Ranges of addresses whose first bytes are backed by memory: they grow and shrink, and nothing is ever copied.

    memory = HostRange(1 << 30)         # addresses for 1 GiB, no memory yet
    memory.back(1 << 20)                # memory for the first MiB
    memory.tensor                       # uint8[1 << 30]; only the backed part may be used

On a CPU the operating system backs pages. On CUDA the driver maps pieces (``cuMemCreate``, ``cuMemMap``). This memory
is outside of torch's allocator, so the device counts it (hw/elastic/device.py).
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

MOST_PIECES = 4096
"""Pieces of one range. A call of the driver takes some 50 microseconds, so a large range has pieces of several MiB."""


class AddressRange(ABC):
    """Addresses, of which the first ``backed_bytes`` have memory.

    tensor: all of it, uint8.
    """

    tensor: Tensor

    @property
    @abstractmethod
    def backed_bytes(self) -> int:
        """Bytes with memory: what ``back`` was called with, rounded up to pages or pieces."""

    @abstractmethod
    def back(self, size: int) -> None:
        """Back the first ``size`` bytes with memory, rounded up, and no others; what stays keeps its content.

        Raises:
            torch.OutOfMemoryError: if there is no memory to grow; then nothing has changed.
        """


class HostRange(AddressRange):
    """Main memory. The operating system adds a page when it is first written, and takes pages back at once."""

    def __init__(self, size: int) -> None:
        """Reserve addresses for ``size`` bytes."""
        private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS  # pages of a shared mapping would not be freed
        self._map = mmap.mmap(-1, max(size, 1), flags=private)
        self.tensor = torch.frombuffer(self._map, dtype=torch.uint8)
        self._backed_bytes = 0

    @property
    def backed_bytes(self) -> int:
        """Bytes of pages that were not returned to the system."""
        return self._backed_bytes

    def back(self, size: int) -> None:
        """Return the pages beyond ``size`` to the system."""
        size = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        if size < self._backed_bytes:
            stop = min(self._backed_bytes, len(self._map))
            if stop > size:
                self._map.madvise(mmap.MADV_DONTNEED, size, stop - size)
        self._backed_bytes = size


# --- CUDA ------------------------------------------------------------------------------------------------------------

_OUT_OF_MEMORY = 2  # CUDA_ERROR_OUT_OF_MEMORY
_PINNED, _ON_DEVICE, _READ_WRITE = 1, 1, 3  # CU_MEM_ALLOCATION_TYPE_, CU_MEM_LOCATION_TYPE_, CU_MEM_ACCESS_FLAGS_


class _Location(ctypes.Structure):
    _fields_ = (("type", ctypes.c_int), ("id", ctypes.c_int))


class _Properties(ctypes.Structure):
    """CUmemAllocationProp."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("handle_types", ctypes.c_int),
        ("location", _Location),
        ("windows", ctypes.c_void_p),
        ("flags", ctypes.c_ubyte * 8),
    )


class _Access(ctypes.Structure):
    """CUmemAccessDesc."""

    _fields_ = (("location", _Location), ("flags", ctypes.c_int))


class CudaDriver:
    """The functions of libcuda that map memory of one device."""

    def __init__(self, device: int, library: Any = None) -> None:
        """Use the device with this number; ``library`` is libcuda, None to load it."""
        self._library = library if library is not None else ctypes.CDLL("libcuda.so.1")
        self._properties = _Properties(type=_PINNED, location=_Location(_ON_DEVICE, device))
        self._access = _Access(_Location(_ON_DEVICE, device), _READ_WRITE)

    def granularity(self) -> int:
        """Return the bytes whose multiples can be mapped: 2 MiB on all devices so far."""
        size = ctypes.c_size_t()
        self._call("cuMemGetAllocationGranularity", ctypes.byref(size), ctypes.byref(self._properties), ctypes.c_int(0))
        return size.value

    def reserve(self, size: int) -> int:
        """Reserve addresses; return the first."""
        address = ctypes.c_uint64()
        zero = ctypes.c_uint64(0)
        self._call("cuMemAddressReserve", ctypes.byref(address), ctypes.c_size_t(size), ctypes.c_size_t(0), zero, zero)
        return address.value

    def free(self, address: int, size: int) -> None:
        """Give addresses back."""
        self._call("cuMemAddressFree", ctypes.c_uint64(address), ctypes.c_size_t(size))

    def map(self, address: int, size: int) -> None:
        """Back addresses with new memory.

        Raises:
            torch.OutOfMemoryError: if the device has no such memory; then nothing has changed.
        """
        handle, none = ctypes.c_uint64(), ctypes.c_uint64(0)
        length = ctypes.c_size_t(size)
        self._call("cuMemCreate", ctypes.byref(handle), length, ctypes.byref(self._properties), none)
        try:
            self._call("cuMemMap", ctypes.c_uint64(address), length, ctypes.c_size_t(0), handle, none)
        finally:
            self._call("cuMemRelease", handle)  # the mapping keeps the memory until it is unmapped

    def allow(self, address: int, size: int) -> None:
        """Let the device read and write mapped addresses."""
        access = ctypes.byref(self._access)
        self._call("cuMemSetAccess", ctypes.c_uint64(address), ctypes.c_size_t(size), access, ctypes.c_size_t(1))

    def unmap(self, address: int, size: int) -> None:
        """Free the memory behind addresses; one call of ``map`` has backed them."""
        self._call("cuMemUnmap", ctypes.c_uint64(address), ctypes.c_size_t(size))

    def _call(self, name: str, *values: Any) -> None:
        result = getattr(self._library, name)(*values)
        if result == _OUT_OF_MEMORY:
            raise torch.OutOfMemoryError(f"CUDA out of memory: {name} found no memory")
        if result:
            text = ctypes.c_char_p()
            self._library.cuGetErrorName(ctypes.c_int(result), ctypes.byref(text))
            raise RuntimeError(f"{name} failed: {(text.value or b'error').decode()} ({result})")


class Pieces:
    """Addresses of a CUDA device, backed by memory piece by piece.

    address, size: of the range. piece_bytes: of a piece. mapped_bytes: those that have memory.
    """

    def __init__(
        self, size: int, driver: CudaDriver, *, wait: Callable[[], None], resized: Callable[[int], None]
    ) -> None:
        """Reserve addresses for ``size`` bytes.

        Args:
            wait: waits for the work that may use the range; memory is unmapped only after it.
            resized: called with the bytes that will be added, or with those that were freed, below 0. It may raise
                ``torch.OutOfMemoryError`` to refuse what would be added.
        """
        self._driver, self._wait, self._resized = driver, wait, resized
        granularity = driver.granularity()
        self.piece_bytes = granularity * max(1, -(-size // (granularity * MOST_PIECES)))
        self.size = max(1, -(-size // self.piece_bytes)) * self.piece_bytes
        self.mapped_bytes = 0
        self.address = driver.reserve(self.size)
        self.__cuda_array_interface__ = {
            "shape": (self.size,),
            "typestr": "|u1",
            "data": (self.address, False),
            "version": 3,
        }

    def map(self, size: int) -> None:
        """Back the first ``size`` bytes, rounded up to full pieces, and no others."""
        size = -(-size // self.piece_bytes) * self.piece_bytes
        assert 0 <= size <= self.size
        if size > self.mapped_bytes:
            self._grow(size)
        elif size < self.mapped_bytes:
            self._wait()
            self._unmap(size, self.mapped_bytes)
            freed, self.mapped_bytes = self.mapped_bytes - size, size
            self._resized(-freed)

    def _grow(self, size: int) -> None:
        start, added = self.mapped_bytes, size - self.mapped_bytes
        self._resized(added)
        mapped = start
        try:
            while mapped < size:
                self._driver.map(self.address + mapped, self.piece_bytes)
                mapped += self.piece_bytes
            self._driver.allow(self.address + start, added)
        except BaseException:
            self._unmap(start, mapped)
            self._resized(-added)
            raise
        self.mapped_bytes = size

    def _unmap(self, start: int, stop: int) -> None:
        for at in range(start, stop, self.piece_bytes):
            self._driver.unmap(self.address + at, self.piece_bytes)

    def close(self) -> None:
        """Free memory and addresses."""
        if self.address:
            self.map(0)
            self._driver.free(self.address, self.size)
            self.address = 0

    def __del__(self) -> None:
        if not sys.is_finalizing():  # the end of the process frees everything
            with contextlib.suppress(Exception):
                self.close()


class CudaRange(AddressRange):
    """Memory of a CUDA device. Its tensor keeps the pieces, which are freed with the last tensor that views them."""

    def __init__(self, pieces: Pieces, view: Callable[[Pieces], Tensor]) -> None:
        """View pieces, none of which is mapped yet, as a tensor."""
        self._pieces = pieces
        pieces.map(1)  # torch looks up the device of an address, which only a mapped one has
        self.tensor = view(pieces)
        pieces.map(0)

    @property
    def backed_bytes(self) -> int:
        """Bytes of mapped pieces."""
        return self._pieces.mapped_bytes

    def back(self, size: int) -> None:
        """Map or unmap pieces."""
        self._pieces.map(size)
