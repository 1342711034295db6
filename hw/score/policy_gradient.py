"""Masks learned by policy gradient: probabilities of keeping each block, from losses of sampled masks alone.

Source:
    Bypass Back-propagation (arXiv 2406.10576), which learns Bernoulli masks over channels, heads or layers. Here the
    units are the MHA and FFN blocks that GSI removes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from hw.score.mask_search import Evaluations, Mask, best_removed
from sim.types import Floats

Form = Literal["bernoulli", "exact_count"]
"""How masks are sampled: every block on its own, or under the condition that the number of removals is exact."""
SMALLEST = 1e-7
"""Added to probabilities before a division, as in the authors' code."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyGradient:
    """Settings of a search by policy gradient.

    form: see ``Form``. samples: masks of one step (the paper's N). step_size: of the descent.
    baseline_steps: window of the moving average (the paper's T).
    contrast: how strongly the start follows the losses of single removals, in log-odds per standard deviation; 0 starts
        with equal probabilities.
    check_every: steps between two evaluations of the most probable mask.
    """

    form: Form
    samples: int
    step_size: float
    baseline_steps: int
    contrast: float
    check_every: int


def search_policy_gradient(
    evaluate: Evaluations, singles: Mapping[int, float], settings: PolicyGradient, rng: np.random.Generator
) -> None:
    """Search until the budget is spent; the masks found are in ``evaluate.incumbents``.

    One step samples N masks m_j with p(m | s), s_b being the probability that block b is kept, and descends

        s  <-  project( s - step_size * 1/N sum_j (L(m_j) - delta) grad_s log p(m_j | s) )
        delta  <-  (1 - 1/T) delta + 1/T * mean_j L(m_j)

    so that only losses are needed, never a gradient through the model. delta is subtracted as it was before the step,
    which leaves the estimate of the gradient unbiased; the first step takes its own mean.

    ``bernoulli`` is the paper's form. Blocks are sampled on their own, grad log p = (m - s) / (s (1 - s)), scaled by
    sqrt(s (1 - s)) as in the authors' code, and the projection is onto {sum s <= blocks - removals, 0 <= s <= 1}. Only
    the expected number of removals is fixed, so samples have other numbers. The mask that counts is the one of the
    lowest s.

    ``exact_count`` conditions on the number of removals. The parameters are log-odds of removal, with
    grad log p = r - P(r = 1) for the removals r; no projection is needed, and every sample is a mask that counts.

    In both forms the most probable mask is evaluated every few steps and when few passes are left.

    Args:
        evaluate: counts passes and ends the search.
        singles: block -> loss without it alone, for the start; the paper starts from a metric of the weights.
        settings: of the search.
        rng: of the samples.
    """
    odds = start_log_odds(singles, evaluate.removals, settings.contrast)
    keep = 1 / (1 + np.exp(-odds))
    delta: float | None = None
    step = 0
    while True:
        if settings.form == "bernoulli":
            masks = [_mask(rng.random(len(keep)) >= keep) for _ in range(settings.samples)]
        else:
            masks = sample_exact_count(-odds, evaluate.removals, settings.samples, rng)
        losses = evaluate(masks)
        if len(losses) < len(masks):
            break
        mean = float(np.mean(losses))
        advantage = np.array(losses) - (mean if delta is None else delta)
        kept = np.array([[block not in mask for block in range(len(keep))] for mask in masks], dtype=np.float64)
        if settings.form == "bernoulli":
            scale = np.sqrt((keep + SMALLEST) * (1 - keep + SMALLEST))
            keep = project(
                keep - settings.step_size * scale * bernoulli_gradient(keep, kept, advantage),
                len(keep) - evaluate.removals,
            )
            odds = keep
        else:
            odds = odds + settings.step_size * exact_count_gradient(-odds, 1 - kept, advantage)
        delta = mean if delta is None else delta + (mean - delta) / settings.baseline_steps
        step += 1
        # The last passes are for the most probable mask: without them what was learned last would not be looked at.
        last = evaluate.budget_passes - evaluate.passes <= settings.samples
        if (step % settings.check_every == 0 or last) and not evaluate([best_removed(odds, evaluate.removals)]):
            break


def _mask(removed: np.ndarray) -> Mask:
    return frozenset(int(block) for block in np.flatnonzero(removed))


def start_log_odds(singles: Mapping[int, float], removals: int, contrast: float) -> Floats:
    """Return the log-odds [blocks] that each block is kept, ``removals`` of them being removed on average.

    They grow with the loss of removing the block alone, by ``contrast`` per standard deviation of the ranks: a few
    blocks are worth more than all others together, and would leave no contrast between the others.
    """
    losses = np.array([singles[block] for block in sorted(singles)])
    rank = np.argsort(np.argsort(losses, kind="stable"), kind="stable").astype(np.float64)
    score = contrast * (rank - rank.mean()) / rank.std()
    low, high = -score.max() - 40.0, -score.min() + 40.0
    for _ in range(100):
        middle = (low + high) / 2
        if float((1 / (1 + np.exp(-score - middle))).sum()) < len(losses) - removals:
            low = middle
        else:
            high = middle
    return np.asarray(score + high)


def project(keep: Floats, most: float) -> Floats:
    """Return the closest point to ``keep`` [blocks] with a sum of at most ``most`` and all entries in [0, 1].

    It is clip(keep - v, 0, 1) with the least v >= 0 that satisfies the sum.

    Source:
        Bypass Back-propagation (arXiv 2406.10576), the projection; v by bisection.
    """
    if float(keep.clip(0, 1).sum()) <= most:
        return np.asarray(keep.clip(0, 1))
    low, high = 0.0, float(keep.max())
    for _ in range(100):
        middle = (low + high) / 2
        if float((keep - middle).clip(0, 1).sum()) > most:
            low = middle
        else:
            high = middle
    return np.asarray((keep - high).clip(0, 1))


def bernoulli_gradient(keep: Floats, kept: Floats, advantage: Floats) -> Floats:
    """Return the estimated gradient [blocks] of the expected loss by the probabilities of keeping blocks.

    Args:
        keep: probabilities [blocks]. kept: sampled masks [samples, blocks], 1 where a block is kept.
        advantage: losses of the samples [samples] less a baseline that does not depend on them.
    """
    variance = (keep + SMALLEST) * (1 - keep + SMALLEST)
    return np.asarray((advantage[:, None] * (kept - keep) / variance).mean(0))


# --- Masks with an exact number of removals --------------------------------------------------------------------------


def _sums_from(weight: Floats, removals: int) -> Floats:
    """Return [blocks + 1, removals + 1]: the sum over sets of j blocks from b on of the product of their weights."""
    sums = np.zeros((len(weight) + 1, removals + 1))
    sums[-1, 0] = 1.0
    for block in range(len(weight) - 1, -1, -1):
        sums[block] = sums[block + 1]
        sums[block, 1:] += weight[block] * sums[block + 1, :-1]
    return sums


def _weights(log_weight: Floats) -> Floats:
    # A common factor changes no probability; this one keeps products within the range of a float.
    return np.asarray(np.exp((log_weight - log_weight.mean()).clip(-15, 15)))


def removal_probabilities(log_weight: Floats, removals: int) -> Floats:
    """Return the probability [blocks] of each block to be removed, under the exact number of removals.

    A set has a probability proportional to the product of the weights of its blocks.
    """
    weight = _weights(log_weight)
    after, before = _sums_from(weight, removals), _sums_from(weight[::-1], removals)[::-1]
    found = np.zeros(len(weight))
    for block in range(len(weight)):
        # j of the others come before the block, removals - 1 - j after it.
        others = (before[block, :removals] * after[block + 1, :removals][::-1]).sum()
        found[block] = weight[block] * others / after[0, removals]
    return found


def sample_exact_count(log_weight: Floats, removals: int, samples: int, rng: np.random.Generator) -> list[Mask]:
    """Return masks of exactly ``removals`` blocks, drawn in proportion to the product of their weights."""
    weight = _weights(log_weight)
    sums = _sums_from(weight, removals)
    masks = []
    for _ in range(samples):
        removed: list[int] = []
        for block in range(len(weight)):
            left = removals - len(removed)
            if left and rng.random() * sums[block, left] < weight[block] * sums[block + 1, left - 1]:
                removed.append(block)
        assert len(removed) == removals
        masks.append(frozenset(removed))
    return masks


def exact_count_gradient(log_weight: Floats, removed: Floats, advantage: Floats) -> Floats:
    """Return the estimated gradient [blocks] of the expected loss by the log-weights of removal.

    Args:
        log_weight: log-odds of removal [blocks]. removed: sampled masks [samples, blocks], 1 where a block is removed.
        advantage: losses of the samples [samples] less a baseline that does not depend on them.
    """
    count = round(float(removed[0].sum()))
    assert math.isclose(float(removed[0].sum()), count)
    return np.asarray((advantage[:, None] * (removed - removal_probabilities(log_weight, count))).mean(0))
