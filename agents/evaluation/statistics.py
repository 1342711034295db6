"""Mean differences with bootstrap intervals on two levels: blocks of time within each trace, and training seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sim.types import Floats

RESAMPLES = 4_000


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean and its 95 % interval."""

    mean: float
    low: float
    high: float

    def excludes_zero(self) -> bool:
        """Return whether the interval lies on one side of 0."""
        return self.low > 0.0 or self.high < 0.0


def paired_difference(
    ours: Floats,
    theirs: Floats,
    *,
    traces: ArrayLike | None = None,
    blocks: ArrayLike | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Return the mean of ``ours - theirs`` over scenarios, every trace counting the same, with its bootstrap interval.

    Both policies played the same scenarios, so blocks of scenarios are resampled for both together, within each trace.
    Seeds are resampled for each policy separately; a policy with one row has none, and adds nothing to the interval.
    With n blocks or seeds, deviations are widened by sqrt(n / (n - 1)), because a bootstrap of few is too narrow. A
    trace with a single block adds nothing to the interval.

    Args:
        ours: values of one policy, [seeds, scenarios]; one row if it has no seeds. theirs: of the other policy.
        traces: of each scenario; None for a single one.
        blocks: of each scenario, within its trace: scenarios of one block share time and are resampled together. None
            makes every scenario its own block.
        resamples: number of bootstrap samples. seed: of the random generator.
    Raises:
        ValueError: if the numbers of scenarios differ.
    """
    scenarios = ours.shape[1]
    labels = [np.zeros(scenarios) if traces is None else np.asarray(traces)]
    labels.append(np.arange(scenarios) if blocks is None else np.asarray(blocks))
    if theirs.shape[1] != scenarios or any(len(label) != scenarios for label in labels):
        raise ValueError(
            f"ours has {scenarios} scenarios, theirs {theirs.shape[1]}, traces and blocks {list(map(len, labels))}, so "
            "they cannot be paired; evaluate both on the same scenarios"
        )
    weights = [_weights(seed, stream, len(values), resamples) for stream, values in enumerate((ours, theirs))]
    means, resampled = [], []
    for stream, trace in enumerate(dict.fromkeys(labels[0].tolist()), start=len(weights)):
        here = labels[0] == trace
        known, block_of = np.unique(labels[1][here], return_inverse=True)
        chosen = _weights(seed, stream, len(known), resamples)  # [resamples, blocks]
        counts = np.bincount(block_of).astype(np.float64)
        sums = [_block_sums(values[:, here], block_of, len(known)) / len(values) for values in (ours, theirs)]
        difference = weights[0] @ sums[0] - weights[1] @ sums[1]
        means.append(float(ours[:, here].mean() - theirs[:, here].mean()))
        resampled.append((difference * chosen).sum(axis=1) / (chosen @ counts))
    low, high = np.quantile(np.mean(np.array(resampled), axis=0), (0.025, 0.975)).tolist()
    return Interval(float(np.mean(means)), low, high)


def share_of(
    ours: Floats, theirs: Floats, *, traces: ArrayLike, blocks: ArrayLike, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """Return the mean of ``ours`` over that of ``theirs``, every trace counting the same, with its bootstrap interval.

    Args:
        ours, theirs: values of two policies in the same scenarios, [scenarios].
        traces, blocks, resamples, seed: as in ``paired_difference``.
    """
    labels, means, resampled = np.asarray(traces), np.zeros(2), np.zeros((2, resamples))
    for stream, trace in enumerate(dict.fromkeys(labels.tolist())):
        here = labels == trace
        known, block_of = np.unique(np.asarray(blocks)[here], return_inverse=True)
        weights, counts = _weights(seed, stream, len(known), resamples), np.bincount(block_of).astype(np.float64)
        for row, values in enumerate((ours, theirs)):
            means[row] += values[here].mean()
            sums = _block_sums(values[None, here], block_of, len(known))[0]
            resampled[row] += (weights @ sums) / (weights @ counts)
    low, high = np.quantile(resampled[0] / resampled[1], (0.025, 0.975)).tolist()
    return Interval(float(means[0] / means[1]), low, high)


def by_trace(
    ours: Floats, theirs: Floats, *, traces: Sequence[Any], blocks: ArrayLike, resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, Interval]:
    """Return the difference on each trace alone; arguments as in ``paired_difference``."""
    found, labels = {}, np.asarray(blocks)
    for trace in dict.fromkeys(traces):
        here = np.asarray(traces) == trace
        found[str(trace)] = paired_difference(
            ours[:, here], theirs[:, here], blocks=labels[here], resamples=resamples, seed=seed
        )
    return found


@lru_cache(maxsize=32)
def _weights(seed: int, stream: int, count: int, resamples: int) -> Floats:
    """Return how often each of ``count`` is in a bootstrap sample, with widened deviations, [resamples, count].

    Each stream of a seed has its own random numbers; comparisons on the same blocks share them.
    """
    if count == 1:
        return np.ones((resamples, 1))
    drawn = np.random.default_rng([seed, stream]).multinomial(count, np.full(count, 1.0 / count), size=resamples)
    return np.asarray(1.0 + (drawn - 1.0) * math.sqrt(count / (count - 1)), dtype=np.float64)


def _block_sums(values: Floats, block_of: NDArray[np.intp], blocks: int) -> Floats:
    """Return the sum of every seed's values in every block, [seeds, blocks]."""
    inside = (block_of[:, None] == np.arange(blocks)).astype(np.float64)
    sums: Floats = values @ inside
    return sums
