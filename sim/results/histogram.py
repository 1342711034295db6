"""Distributions of more values than memory holds: counted in narrow bins, added up over the parts of a run."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from sim.results.metrics import QUANTILES
from sim.types import Floats, Ints

BIN_RATIO = 1.001
"""Upper over lower end of a bin, so that a quantile is off by at most 0.05 %."""
LEAST = 1e-9
"""Values below this count as 0."""


@dataclass(slots=True)
class Histogram:
    """Finite values of at least 0, in bins of equal ratio.

    bins: int64[n], ascending; bin b holds values from BIN_RATIO**b to BIN_RATIO**(b + 1). counts: int64[n].
    zeros: values below LEAST. total, largest: sum and maximum of all values, which are exact.
    """

    bins: Ints = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    counts: Ints = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    zeros: int = 0
    total: float = 0.0
    largest: float = 0.0

    @classmethod
    def of(cls, values: Floats, counts: Ints | None = None) -> Histogram:
        """Return the histogram of the finite values, each counted once or ``counts`` times."""
        times = np.ones(len(values), dtype=np.int64) if counts is None else counts
        kept = np.isfinite(values) & (times > 0)
        values, times = values[kept], times[kept]
        zero = values < LEAST
        places = np.floor(np.log(values[~zero]) / np.log(BIN_RATIO)).astype(np.int64)
        bins, which = np.unique(places, return_inverse=True)
        return cls(
            bins=bins,
            counts=np.bincount(which, weights=times[~zero], minlength=len(bins)).astype(np.int64),
            zeros=int(times[zero].sum()),
            total=float((values * times).sum()),
            largest=float(values.max(initial=0.0)),
        )

    def __len__(self) -> int:
        """Return how many values were counted."""
        return self.zeros + int(self.counts.sum())

    def add(self, other: Histogram) -> None:
        """Count the values of another histogram too."""
        bins = np.concatenate([self.bins, other.bins])
        self.bins, which = np.unique(bins, return_inverse=True)
        weights = np.concatenate([self.counts, other.counts])
        self.counts = np.bincount(which, weights=weights, minlength=len(self.bins)).astype(np.int64)
        self.zeros += other.zeros
        self.total += other.total
        self.largest = max(self.largest, other.largest)

    def distribution(self) -> dict[str, float | None]:
        """Return mean and max, exact, and p50, p90, p95 and p99 (nearest rank, the middle of its bin)."""
        number = len(self)
        if not number:
            return dict.fromkeys(("mean", *QUANTILES, "max"))
        rank = self.zeros + np.cumsum(self.counts)
        points = {}
        for name, share in QUANTILES.items():
            wanted = max(1, int(np.ceil(share * number)))
            if wanted <= self.zeros:
                points[name] = 0.0
            else:
                place = int(self.bins[np.searchsorted(rank, wanted)])
                points[name] = min(float(BIN_RATIO ** (place + 0.5)), self.largest)
        return {"mean": self.total / number, **points, "max": self.largest}
