"""What searches for masks share: a budget of forward passes, and the best masks found within it.

A **mask** is the set of the blocks that it removes. A **pass** evaluates one mask on all tokens of the calibration
text, as GSI does with a candidate; a mask that was evaluated before costs none.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from hw.score.block_numbers import block_name
from sim.types import Floats

Mask = frozenset[int]
Loss = Callable[[Sequence[Mask]], Sequence[float]]
"""Returns the loss of each mask, in nats per token."""
IDLE_STEPS = 200
"""Steps in a row without a new mask after which a search ends: what it would still sample is known already."""


def gsi_passes(blocks: int, removals: int) -> int:
    """Return how many masks GSI evaluates to remove some blocks: every kept block in turn, in every round.

    Source:
        RAP (arXiv 2505.17138), Greedy Sequential Importance.
    """
    return sum(blocks - done for done in range(removals))


def drop_text(mask: Mask) -> str:
    """Return a mask as the names of its blocks in the order in which they run, separated by spaces."""
    return " ".join(block_name(block) for block in sorted(mask))


@dataclass(frozen=True, slots=True, kw_only=True)
class Incumbent:
    """The best mask up to some point of a search.

    removed: its blocks. nll: its loss on calibration text. passes, cpu_s: spent when its loss was known.
    """

    removed: Mask
    nll: float
    passes: int
    cpu_s: float


class Evaluations:
    """Evaluates the masks of one search, never more than its budget of passes allows.

    passes: spent so far. cpu_s: process time since the search began, with what it was charged for.
    incumbents: masks of the wanted size, each with a lower loss than all before it.
    """

    def __init__(
        self,
        loss: Loss,
        *,
        removals: int,
        budget_passes: int,
        singles: Mapping[int, float] | None = None,
        singles_cpu_s: float = 0.0,
    ) -> None:
        """Start a search.

        Args:
            loss: evaluates masks.
            removals: size of the masks that are looked for.
            budget_passes: how many masks may be evaluated.
            singles: block -> the loss without it alone, measured before; the search is charged one pass for each.
            singles_cpu_s: process time that measuring them took.
        """
        self._loss = loss
        self.removals = removals
        self.budget_passes = budget_passes
        self.passes = 0
        self._began_s = time.process_time() - singles_cpu_s
        self._known: dict[Mask, float] = {}
        self._idle = 0
        self.incumbents: list[Incumbent] = []
        for block, nll in sorted((singles or {}).items())[:budget_passes]:
            self.passes += 1
            self._learn(frozenset((block,)), nll)

    @property
    def cpu_s(self) -> float:
        """Process time since the search began."""
        return time.process_time() - self._began_s

    def known(self, mask: Mask) -> bool:
        """Return whether a mask was evaluated before."""
        return mask in self._known

    def __call__(self, masks: Sequence[Mask]) -> list[float]:
        """Return the losses of the first masks, as many as the budget allows; a shorter list ends the search.

        Masks that were evaluated before cost nothing. After ``IDLE_STEPS`` calls in a row without a new mask the list
        is empty.
        """
        left = self.budget_passes - self.passes
        new: dict[Mask, None] = {}
        affordable = 0
        for mask in masks:
            if mask not in self._known and mask not in new:
                if len(new) == left:
                    break
                new[mask] = None
            affordable += 1
        self._idle = 0 if new else self._idle + 1
        if self._idle > IDLE_STEPS:
            return []
        if new:
            losses = self._loss(list(new))
            self.passes += len(new)
            for mask, nll in zip(new, losses, strict=True):
                self._learn(mask, float(nll))
        return [self._known[mask] for mask in masks[:affordable]]

    def best(self, *, passes: int | None = None, cpu_s: float | None = None) -> Incumbent | None:
        """Return the best mask found within a smaller budget; None if there was none by then."""
        within = [
            found
            for found in self.incumbents
            if (passes is None or found.passes <= passes) and (cpu_s is None or found.cpu_s <= cpu_s)
        ]
        return within[-1] if within else None

    def _learn(self, mask: Mask, nll: float) -> None:
        self._known[mask] = nll
        if len(mask) == self.removals and nll < (self.incumbents[-1].nll if self.incumbents else math.inf):
            self.incumbents.append(Incumbent(removed=mask, nll=nll, passes=self.passes, cpu_s=self.cpu_s))


def best_removed(keep: Floats, removals: int) -> Mask:
    """Return the mask that removes the blocks with the lowest probability (or log-odds) of being kept [blocks]."""
    order = sorted(range(len(keep)), key=lambda block: (keep[block], block))
    return frozenset(order[:removals])
