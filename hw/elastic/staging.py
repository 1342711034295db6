"""How the host's arrays of an iteration reach the device, and its result the host: one copy in, one wait.

    staging = Staging(device)
    tensors = staging.send([tokens, positions, tables])     # one asynchronous copy from pinned memory
    chosen = staging.read(result)                           # the only time that the host waits

On a CPU the tensors share the memory of the arrays.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hw.elastic.device import Accelerator, Device

ALIGNMENT = 64
"""Bytes to whose multiples the arrays are aligned: kernels read aligned memory faster."""
LEAST_BYTES = 1 << 16
_TYPES = {np.dtype(np.int32): torch.int32, np.dtype(np.int64): torch.int64, np.dtype(np.float64): torch.float64}


class Staging:
    """Pinned memory and as much on the device, used again in every iteration.

    The tensors of one ``send`` are valid until the next one. layout: where each of them lies and how large it is.
    version: changes when their memory moves to other addresses.
    """

    def __init__(self, hardware: Device) -> None:
        """Allocate nothing yet."""
        self._hardware = hardware
        self.version = 0
        self.layout: tuple[object, ...] = ()
        self._sent = False
        self._host = self._device = torch.empty(0, dtype=torch.uint8)
        self._array: npt.NDArray[np.uint8] = np.empty(0, np.uint8)
        self._typed: dict[torch.dtype, Tensor] = {}

    def send(self, arrays: Sequence[npt.NDArray[Any]]) -> list[Tensor]:
        """Return tensors on the device with the content of arrays of int32, int64 or float64."""
        if not isinstance(self._hardware, Accelerator):
            return [torch.from_numpy(array) for array in arrays]
        places, size = [], 0
        for array in arrays:
            places.append(size)
            size += -(-array.nbytes // ALIGNMENT) * ALIGNMENT
        self.layout = tuple((at, array.shape, array.strides) for at, array in zip(places, arrays, strict=True))
        if self._sent:  # by a pass that failed: the device may still copy
            self._hardware.synchronize()
        if size > len(self._array):
            self._grow(self._hardware, size)
        for at, array in zip(places, arrays, strict=True):
            self._array[at : at + array.nbytes] = array.reshape(-1).view(np.uint8)
        self._sent = True
        self._hardware.upload(self._host[:size], self._device[:size])
        return [self._view(at, array) for at, array in zip(places, arrays, strict=True)]

    def _grow(self, hardware: Accelerator, size: int) -> None:
        size = 1 << (max(size, LEAST_BYTES) - 1).bit_length()
        with torch.inference_mode(False):  # an inference tensor cannot be written outside of that mode
            self._device = torch.empty(size, dtype=torch.uint8, device=hardware.place)
        self._host = hardware.pinned(size)
        self._array = self._host.numpy()
        self._typed = {dtype: self._device.view(dtype) for dtype in _TYPES.values()}
        self.version += 1

    def _view(self, at: int, array: npt.NDArray[Any]) -> Tensor:
        strides = [stride // array.itemsize for stride in array.strides]
        return self._typed[_TYPES[array.dtype]].as_strided(array.shape, strides, at // array.itemsize)

    def read(self, tensor: Tensor) -> Tensor:
        """Wait for the device; return a copy of a tensor in host memory."""
        if not isinstance(self._hardware, Accelerator):
            return tensor
        found = self._hardware.read(tensor)
        self._sent = False
        return found
