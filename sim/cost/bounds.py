"""What bounds a kernel, memory or arithmetic, read from its own table, and the table with either made slower.

The time of a product of weights with t tokens has two parts: M, reading the weights, which is the time of one token,
and C(t), arithmetic, which is t times the least time per token in the table. Their p-norm is a smooth roofline that
passes from one to the other at the knee, the t with M = C(t). Two factors scale the parts; what the table has beyond
the roofline (launches, tiles, waves) stays as a ratio:

    t'(t) = t(t) * norm(memory * M, compute * C(t)) / norm(M, C(t))

Equal factors scale the table by exactly that factor.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from sim.errors import CalibrationError
from sim.types import Floats

SHARPNESS = 4.0
"""p of the norm: at the knee, where measured kernels are 15 to 25 % above either bound, it is 19 % above."""
LEAST_KNEE = 1e-3
LEAST_FACTOR, MOST_FACTOR = 0.01, 100.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Factors:
    """Measured times of a server over those of a calibration's kernels, by what bounds them; 1 changes nothing.

    memory_bound: of reading weights and KV. compute_bound: of arithmetic.
    """

    memory_bound: float = 1.0
    compute_bound: float = 1.0

    def __post_init__(self) -> None:
        for name in ("memory_bound", "compute_bound"):
            value = getattr(self, name)
            number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            if not (number and LEAST_FACTOR <= value <= MOST_FACTOR):
                raise CalibrationError(
                    f"factors.{name} is {value!r:.40}; it must be a number from {LEAST_FACTOR:g} to {MOST_FACTOR:g}"
                )

    @property
    def absent(self) -> bool:
        """Whether both are 1."""
        return self.memory_bound == self.compute_bound == 1.0


def knee_of(seconds: Floats) -> float:
    """Return the count at which arithmetic takes as long as memory; ``seconds`` of 1, 2, ... tokens."""
    each_s = float(np.min(seconds / np.arange(1, len(seconds) + 1)))
    return max(float(seconds[0]) / each_s, LEAST_KNEE) if each_s > 0 else math.inf


def ratio_at(counts: Floats, knee: float, factors: Factors) -> Floats:
    """Return new over old seconds of a product at each count of tokens."""
    # C(t) / M is t over the knee.
    share = (counts / knee) ** SHARPNESS
    memory, compute = factors.memory_bound**SHARPNESS, factors.compute_bound**SHARPNESS
    ratio: Floats = ((memory + compute * share) / (1.0 + share)) ** (1.0 / SHARPNESS)
    return ratio
