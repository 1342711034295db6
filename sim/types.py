"""Array types and units that every package shares."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Floats32 = NDArray[np.float32]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

GIB = 1 << 30
"""Bytes of a GiB; messages and plots show memory in GiB, code counts bytes."""
