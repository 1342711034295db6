"""Masks found by an evolutionary search: mutation and crossover that keep the number of removals."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from hw.score.mask_search import Evaluations, Mask
from hw.score.policy_gradient import sample_exact_count, start_log_odds


@dataclass(frozen=True, slots=True, kw_only=True)
class Evolution:
    """Settings of an evolutionary search.

    parents: masks that survive a generation. children: masks that are evaluated in one.
    crossover: share of the children that have two parents.
    contrast: how strongly the first masks follow the losses of single removals, as in ``PolicyGradient``.
    """

    parents: int
    children: int
    crossover: float
    contrast: float


def search_evolution(
    evaluate: Evaluations, singles: Mapping[int, float], settings: Evolution, rng: np.random.Generator
) -> None:
    """Search until the budget is spent; the masks found are in ``evaluate.incumbents``.

    A (parents + children) strategy: of the old and the new masks those with the lowest loss survive. The first ones are
    the mask of the cheapest single removals, and random masks in which cheap blocks are likelier. A child is a
    ``crossover`` of two parents, then or else a ``mutation``; children that were evaluated before are drawn again.

    Source:
        EvoPress (arXiv 2410.14649): (1 + children) with a switch mutation that keeps the size. Crossover and more than
        one parent are ours; its selection in several steps with more and more tokens is not used.
    """
    odds = start_log_odds(singles, evaluate.removals, settings.contrast)
    cheapest = frozenset(sorted(singles, key=lambda block: (singles[block], block))[: evaluate.removals])
    masks = [cheapest, *sample_exact_count(-odds, evaluate.removals, settings.children - 1, rng)]
    alive: dict[Mask, float] = {}
    while True:
        losses = evaluate(masks)
        alive |= dict(zip(masks, losses, strict=False))
        if len(losses) < len(masks):
            break
        best = sorted(alive, key=lambda mask: (alive[mask], sorted(mask)))[: settings.parents]
        alive = {mask: alive[mask] for mask in best}
        masks = [_child(best, len(singles), settings, evaluate, rng) for _ in range(settings.children)]


def _child(
    parents: list[Mask], blocks: int, settings: Evolution, evaluate: Evaluations, rng: np.random.Generator
) -> Mask:
    child = parents[0]
    for _ in range(20):  # then the space around the parents is known, and evaluating again costs nothing
        child = parents[int(rng.integers(len(parents)))]
        if len(parents) > 1 and rng.random() < settings.crossover:
            first, second = rng.choice(len(parents), 2, replace=False)
            child = crossover(parents[int(first)], parents[int(second)], rng)
        if child in parents:
            child = mutation(child, blocks, rng)
        if not evaluate.known(child):
            break
    return child


def crossover(first: Mask, second: Mask, rng: np.random.Generator) -> Mask:
    """Return a mask of the same size: all blocks that both remove, and some of those that one of them removes."""
    common = first & second
    choice = sorted(first ^ second)
    picked = rng.permutation(len(choice))[: len(first) - len(common)]
    return common | {choice[int(index)] for index in picked}


def mutation(mask: Mask, blocks: int, rng: np.random.Generator) -> Mask:
    """Return a mask of the same size: some removed blocks are kept, as many others are removed.

    The number of switches is the smaller of two draws from 1 to 3, so that one switch is the likeliest (EvoPress).
    """
    kept = sorted(set(range(blocks)) - mask)
    most = min(3, len(mask), len(kept))
    if most == 0:
        return mask
    switches = int(min(rng.integers(1, most + 1, 2)))
    out = rng.choice(sorted(mask), switches, replace=False)
    into = rng.choice(kept, switches, replace=False)
    return (mask - {int(block) for block in out}) | {int(block) for block in into}
