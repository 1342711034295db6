"""Which points of each term are measured: axes up to limits, a coarse complete grid, then the most informative points.

A point is worth measuring where it is far from the measured ones, and where the last points came out other than the
points around them predicted. So a curve that bends gets more points than one that is straight, whatever the time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product

import numpy as np
from scipy.interpolate import LinearNDInterpolator

from sim.errors import ConfigError
from sim.types import Floats

Point = tuple[int, ...]
"""One or two counts, such as (tokens,) or (batch, context)."""
COARSE_STEP = 4
"""The coarse grid has every fourth value of an axis, and its ends."""
NEAREST = 3
"""How many surprises around a point say how uncertain it is."""
FIRST_SURPRISE = 0.1
"""What is expected of a term of which no point was predicted yet, as a relative error."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The ends of the grid: tokens of an iteration, sequences that decode, tokens of a context."""

    tokens: int
    batch: int
    context: int

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ConfigError: for one that leaves no grid.
        """
        for name, least in (("tokens", 16), ("batch", 4), ("context", 32)):
            value = getattr(self, name)
            if value < least:
                raise ConfigError(f"grid.{name} is {value}; it must be at least {least}")


ON_CPU = Limits(tokens=256, batch=24, context=512)
ON_GPU = Limits(tokens=8192, batch=256, context=8192)


@dataclass(frozen=True)
class Grid:
    """All points that may be measured. positions: of the model. notes: where it ends before its limits, and why."""

    limits: Limits
    positions: int = 1 << 30
    notes: tuple[str, ...] = ()

    @cached_property
    def tokens(self) -> tuple[int, ...]:
        """Tokens of an iteration."""
        return counts(self.limits.tokens)

    @cached_property
    def sequences(self) -> tuple[int, ...]:
        """Sequences that get a next token."""
        return counts(max(32, self.limits.batch))

    @cached_property
    def decodes(self) -> tuple[Point, ...]:
        """Batches of decodes, and their context."""
        return tuple(product(counts(self.limits.batch), (8, *doublings(32, self.limits.context))))

    @cached_property
    def prefills(self) -> tuple[Point, ...]:
        """Tokens of a prompt chunk, and tokens before it."""
        tokens = (1, 4, *doublings(16, self.limits.tokens))
        before = (0, 32, *doublings(128, self.limits.context))
        return tuple(point for point in product(tokens, before) if sum(point) <= self.longest)

    @property
    def longest(self) -> int:
        """Tokens of the longest context, with the chunk at its end."""
        return min(self.limits.context + self.limits.tokens, self.positions)


def counts(most: int) -> tuple[int, ...]:
    """Return 1, 2, 3, 4, 6, 8, 12, 16, ..., ``most``: two points in every octave."""
    found = {1, most}
    power = 2
    while power <= most:
        found |= {power, power * 3 // 2}
        power *= 2
    return tuple(sorted(count for count in found if count <= most))


def doublings(first: int, most: int) -> tuple[int, ...]:
    """Return first, 2 first, 4 first, ..., ``most``."""
    found = {most}
    while first <= most:
        found.add(first)
        first *= 2
    return tuple(sorted(found))


def grid_of(limits: Limits, longest: int, fits: Callable[[Point], bool]) -> tuple[Grid, list[Point]]:
    """Return a grid within a model's positions, and those of its decodes that the device has memory for.

    Args:
        longest: positions of the model. fits: whether the KV of (batch, context) does.
    """
    notes = []
    if limits.context > longest - 1:
        notes.append(f"the grid ends at a context of {longest - 1:,} tokens: the model has {longest:,} positions")
        limits = Limits(tokens=limits.tokens, batch=limits.batch, context=longest - 1)
    if limits.tokens > longest:
        limits = Limits(tokens=longest, batch=limits.batch, context=limits.context)
        notes.append(f"the grid ends at {longest:,} tokens of a prompt, the positions of the model")
    grid = Grid(limits, longest)
    fitting = [point for point in grid.decodes if fits(point)]
    if not fitting:
        raise ConfigError("the device has no memory left for the KV of one context; free some, or take a smaller model")
    if len(fitting) < len(grid.decodes):
        most = max(batch * context for batch, context in fitting)
        notes.append(
            f"decode attention is measured up to {most:,} tokens of KV: the memory of this device does not hold the "
            f"{limits.batch * limits.context:,} of {limits.batch} sequences of {limits.context:,}; beyond, it is "
            "continued"
        )
    return Grid(limits, longest, tuple(notes)), fitting


def coarse(points: Sequence[Point]) -> list[Point]:
    """Return every fourth value of each axis with both ends, as far as these points exist."""
    axes = [sorted({point[axis] for point in points}) for axis in range(len(points[0]))]
    kept = [{*values[::COARSE_STEP], values[-1]} for values in axes]
    chosen = [point for point in points if all(value in keep for value, keep in zip(point, kept, strict=True))]
    # Of a grid with a corner cut off, the last point of each row and column too.
    ends = {
        max(point for point in points if point[axis] == value) for axis, values in enumerate(kept) for value in values
    }
    return sorted({*chosen, *ends})


@dataclass
class Term:
    """The points of one term: which are measured, and how well each was predicted before it was.

    weight: how much an error of this term matters. surprises: point -> its time over the prediction, minus 1.
    """

    name: str
    points: Sequence[Point]
    weight: float = 1.0
    measured: dict[Point, float] = field(default_factory=dict)
    surprises: dict[Point, float] = field(default_factory=dict)

    def add(self, point: Point, us: float) -> None:
        """Take a measurement; note how far the ones before it were off."""
        if (predicted := self._predicted(point)) is not None:
            self.surprises[point] = us / predicted - 1.0
        self.measured[point] = us

    def _predicted(self, point: Point) -> float | None:
        """Return what the measured points say of another: linear between logarithms; None outside of them."""
        if len(self.measured) < 2 * len(point):
            return None
        places, heights = _logs(list(self.measured)), np.log(list(self.measured.values()))
        at = _logs([point])
        if len(point) == 1:
            order = np.argsort(places[:, 0])
            inside = places[order[0], 0] <= at[0, 0] <= places[order[-1], 0]
            return float(np.exp(np.interp(at[0, 0], places[order, 0], heights[order]))) if inside else None
        if len(np.unique(places[:, 0])) < 2 or len(np.unique(places[:, 1])) < 2:
            return None
        found = float(LinearNDInterpolator(places, heights, rescale=True)(at)[0])
        return float(np.exp(found)) if np.isfinite(found) else None

    def ranked(self) -> Iterator[tuple[float, Point]]:
        """Yield how informative each point is that is not measured, and the point."""
        todo = [point for point in self.points if point not in self.measured]
        if not todo:
            return
        places, known = _logs(todo), _logs(list(self.measured))
        far = np.sqrt(((places[:, None] - known[None]) ** 2).sum(-1)).min(1)
        if self.surprises:
            surprised, sizes = _logs(list(self.surprises)), np.abs(list(self.surprises.values()))
            nearest = np.argsort(((places[:, None] - surprised[None]) ** 2).sum(-1), axis=1)[:, :NEAREST]
            expected = sizes[nearest].mean(1)
        else:
            expected = np.full(len(todo), FIRST_SURPRISE)
        yield from zip((far * expected).tolist(), todo, strict=True)

    def summary(self) -> dict[str, float | int | None]:
        """Return how many points are measured, of how many, and the median error of predictions made before."""
        errors = np.abs(list(self.surprises.values()))
        return {
            "measured": len(self.measured),
            "of": len(self.points),
            "predicted_before": len(errors),
            "median_error_of_predictions": float(f"{np.median(errors):.3g}") if len(errors) else None,
        }


def most_informative(terms: Mapping[str, Term]) -> tuple[str, Point] | None:
    """Return the term and the point to measure next; None if all are measured."""
    ranked = [(term.weight * score, name, point) for name, term in terms.items() for score, point in term.ranked()]
    if not ranked:
        return None
    _, name, point = max(ranked)
    return name, point


def _logs(points: Sequence[Point]) -> Floats:
    """Return points [n, axes] as logarithms; a count of 0 stands one octave below 32."""
    values = np.array(points, dtype=np.float64)
    return np.log(np.where(values == 0, 16.0, values))
