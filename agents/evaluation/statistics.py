"""Mean differences with paired bootstrap intervals over scenarios and training seeds."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sim.types import Floats


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean and its 95 % interval."""

    mean: float
    low: float
    high: float

    def excludes_zero(self) -> bool:
        """Return whether the interval lies on one side of 0."""
        return self.low > 0.0 or self.high < 0.0


def paired_difference(ours: Floats, theirs: Floats, *, resamples: int = 10_000, seed: int = 0) -> Interval:
    """Return the mean of ``ours - theirs`` over scenarios, with its bootstrap interval.

    Both policies played the same scenarios, so scenarios are resampled for both together. Seeds are resampled for each
    policy separately.

    Args:
        ours: values of one policy, [seeds, scenarios]; one row if it has no seeds. theirs: of the other policy.
        resamples: number of bootstrap samples. seed: of the random generator.
    Raises:
        ValueError: if the numbers of scenarios differ.
    """
    if ours.shape[1] != theirs.shape[1]:
        raise ValueError(
            f"ours has {ours.shape[1]} scenarios and theirs has {theirs.shape[1]}, so they cannot be paired; "
            "evaluate both on the same scenarios"
        )
    rng = np.random.default_rng(seed)
    scenarios = rng.integers(ours.shape[1], size=(resamples, ours.shape[1]))
    difference = _seed_means(ours, resamples, rng) - _seed_means(theirs, resamples, rng)
    means = np.take_along_axis(np.broadcast_to(difference, scenarios.shape), scenarios, axis=1).mean(axis=1)
    low, high = np.quantile(means, (0.025, 0.975)).tolist()
    return Interval(float(ours.mean() - theirs.mean()), low, high)


def _seed_means(values: Floats, resamples: int, rng: np.random.Generator) -> Floats:
    """Return the mean over resampled seeds, float64[resamples, scenarios], or [1, scenarios] for a single seed."""
    seeds = len(values)
    if seeds == 1:
        return values
    counts = rng.multinomial(seeds, np.full(seeds, 1.0 / seeds), size=resamples)
    means: Floats = counts @ values / seeds
    return means
