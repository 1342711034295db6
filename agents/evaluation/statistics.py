"""Means with paired bootstrap intervals, over scenarios and over training seeds."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sim.types import Floats


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean and the 95 % interval around it."""

    mean: float
    low: float
    high: float

    def excludes_zero(self) -> bool:
        """Return whether the whole interval lies on one side of 0."""
        return self.low > 0.0 or self.high < 0.0


def paired_difference(ours: Floats, theirs: Floats, *, resamples: int = 10_000, seed: int = 0) -> Interval:
    """Return the mean of ours minus theirs over scenarios, with its bootstrap interval.

    Both policies played the same scenarios, so scenarios are drawn with replacement for both at once; seeds are drawn
    for each on its own.

    Args:
        ours: values [seeds, scenarios]; a policy without seeds has one row. theirs: the same, of the other policy.
        resamples: bootstrap samples. seed: of their draws.
    """
    if ours.shape[1] != theirs.shape[1]:
        raise ValueError(f"{ours.shape[1]} scenarios against {theirs.shape[1]}: the comparison would not be paired")
    rng = np.random.default_rng(seed)
    scenarios = rng.integers(ours.shape[1], size=(resamples, ours.shape[1]))
    difference = _seed_means(ours, resamples, rng) - _seed_means(theirs, resamples, rng)
    means = np.take_along_axis(np.broadcast_to(difference, scenarios.shape), scenarios, axis=1).mean(axis=1)
    low, high = np.quantile(means, (0.025, 0.975)).tolist()
    return Interval(float(ours.mean() - theirs.mean()), low, high)


def _seed_means(values: Floats, resamples: int, rng: np.random.Generator) -> Floats:
    """Return the mean over seeds drawn with replacement [resamples, scenarios]; [1, scenarios] where there is one."""
    seeds = len(values)
    if seeds == 1:
        return values
    counts = rng.multinomial(seeds, np.full(seeds, 1.0 / seeds), size=resamples)
    means: Floats = counts @ values / seeds
    return means
