"""Arrays in safetensors files: a length, a JSON header, the bytes. Read and written with NumPy alone.

Format: https://github.com/huggingface/safetensors (README, "Format"). Nothing is unpickled.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sim.atomic import write_whole
from sim.errors import RapLabError

DTYPES: dict[str, type[np.generic]] = {"F32": np.float32, "F64": np.float64, "I64": np.int64}
MAX_HEADER_BYTES = 1 << 20


class ArraysError(RapLabError):
    """A file of arrays cannot be read."""


def write_arrays(path: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Write float32, float64 or int64 arrays, whole or not at all; equal arrays give equal bytes."""
    names = {np.dtype(dtype): name for name, dtype in DTYPES.items()}
    header: dict[str, Any] = {}
    parts: list[bytes] = []
    offset = 0
    for name, array in arrays.items():
        data = np.ascontiguousarray(array).tobytes()
        header[name] = {
            "dtype": names[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [offset, offset + len(data)],
        }
        parts.append(data)
        offset += len(data)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    write_whole(path, lambda part: part.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(parts)))


def read_arrays(path: Path) -> dict[str, NDArray[Any]]:
    """Read the arrays of a file.

    Raises:
        ArraysError: for a missing, cut or malformed file.
    """
    try:
        raw = path.read_bytes()
        length = int.from_bytes(raw[:8], "little")
        if length > min(MAX_HEADER_BYTES, len(raw) - 8):
            raise ValueError(f"a header of {length} bytes in a file of {len(raw)}")
        header = json.loads(raw[8 : 8 + length])
        data = memoryview(raw)[8 + length :]
        arrays = {}
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            begin, end = entry["data_offsets"]
            dtype = np.dtype(DTYPES[entry["dtype"]])
            if not 0 <= begin <= end <= len(data):
                raise ValueError(f"{name} lies outside the file")
            arrays[name] = np.frombuffer(data[begin:end], dtype=dtype).reshape(entry["shape"]).copy()
        return arrays
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArraysError(
            f"{path} is no file of arrays ({type(error).__name__}: {error}); export it again: python -m agents.export"
        ) from error
