"""Searches of whole masks on losses whose optimum, gradient and probabilities are known by enumeration."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import combinations

import numpy as np
import pytest

from hw.score.evolution import Evolution, crossover, mutation, search_evolution
from hw.score.mask_search import IDLE_STEPS, Evaluations, Mask, best_removed, drop_text, gsi_passes
from hw.score.policy_gradient import (
    PolicyGradient,
    bernoulli_gradient,
    exact_count_gradient,
    project,
    removal_probabilities,
    sample_exact_count,
    search_policy_gradient,
    start_log_odds,
)
from sim.types import Floats

BLOCKS = 12
BERNOULLI = PolicyGradient(form="bernoulli", samples=4, step_size=0.05, baseline_steps=5, contrast=1.0, check_every=2)
EXACT = PolicyGradient(form="exact_count", samples=4, step_size=0.5, baseline_steps=5, contrast=1.0, check_every=5)
EVOLUTION = Evolution(parents=4, children=4, crossover=0.4, contrast=1.0)
SEARCHES = {"bernoulli": BERNOULLI, "exact count": EXACT, "evolution": EVOLUTION}


def additive(seed: int) -> Callable[[Mask], float]:
    """Return a loss that is a sum over blocks, of which the first two cost more together."""
    weight = np.random.default_rng(seed).permutation(np.linspace(0.05, 1.0, BLOCKS))
    return lambda mask: 3.0 + float(sum(weight[block] for block in mask)) + 0.5 * (mask >= {0, 1})


def coverage(seed: int) -> Callable[[Mask], float]:
    """Return a submodular loss: a topic is lost with the first of its blocks, so blocks of one topic go together."""
    topics = np.random.default_rng(seed).random((BLOCKS, 5)) < 0.4
    return lambda mask: 3.0 + float(topics[sorted(mask)].any(axis=0).sum()) + 0.05 * sum(mask)


class Counted:
    """Evaluates a loss, and notes every mask that was evaluated."""

    def __init__(self, loss: Callable[[Mask], float]) -> None:
        self.loss = loss
        self.masks: list[Mask] = []

    def __call__(self, masks: Sequence[Mask]) -> list[float]:
        self.masks += masks
        return [self.loss(mask) for mask in masks]


def searched(
    name: str, loss: Callable[[Mask], float], *, removals: int, passes: int, seed: int = 0
) -> tuple[Evaluations, list[Mask]]:
    """Run a search; return what it found, and the masks that it evaluated after single removals."""
    singles = {block: loss(frozenset((block,))) for block in range(BLOCKS)}
    counted, settings = Counted(loss), SEARCHES[name]
    evaluate = Evaluations(counted, removals=removals, budget_passes=passes, singles=singles)
    rng = np.random.default_rng(seed)
    if isinstance(settings, Evolution):
        search_evolution(evaluate, singles, settings, rng)
    else:
        search_policy_gradient(evaluate, singles, settings, rng)
    return evaluate, counted.masks


def optimum(loss: Callable[[Mask], float], removals: int) -> float:
    return min(loss(frozenset(mask)) for mask in combinations(range(BLOCKS), removals))


def gaps_to_optimum(name: str, kind: Callable[[int], Callable[[Mask], float]], removals: int) -> list[float]:
    """Return by how much a search misses the optimum of six losses, in far fewer passes than there are masks."""
    found = [searched(name, kind(seed), removals=removals, passes=150, seed=seed)[0] for seed in range(6)]
    return [best.incumbents[-1].nll - optimum(kind(seed), removals) for seed, best in enumerate(found)]


@pytest.mark.parametrize("name", SEARCHES)
def test_every_search_finds_the_optimum_that_brute_force_finds(name: str) -> None:
    assert gaps_to_optimum(name, additive, 4) == pytest.approx([0.0] * 6)


@pytest.mark.parametrize("name", SEARCHES)
def test_every_search_misses_the_optimum_by_half_of_what_random_masks_do_where_greed_fails(name: str) -> None:
    rng, random = np.random.default_rng(0), list[float]()
    for seed in range(6):
        masks = [frozenset(rng.choice(BLOCKS, 6, replace=False).tolist()) for _ in range(150 - BLOCKS)]
        random.append(min(coverage(seed)(mask) for mask in masks) - optimum(coverage(seed), 6))
    assert np.mean(gaps_to_optimum(name, coverage, 6)) < np.mean(random) / 2


@pytest.mark.parametrize("name", SEARCHES)
@pytest.mark.parametrize("removals", [1, 3, 7, BLOCKS])
def test_the_number_of_removals_is_exact(name: str, removals: int) -> None:
    best, masks = searched(name, additive(1), removals=removals, passes=60)
    assert best.incumbents
    assert {len(one.removed) for one in best.incumbents} == {removals}
    if name != "bernoulli":
        assert {len(mask) for mask in masks} <= {removals}
    elif removals == 3:
        assert len({len(mask) for mask in masks}) > 1  # only the expected number is fixed


@pytest.mark.parametrize("name", SEARCHES)
@pytest.mark.parametrize("passes", [0, 5, BLOCKS, BLOCKS + 1, 17, 30])
def test_a_search_spends_all_of_its_passes_and_never_more(name: str, passes: int) -> None:
    best, masks = searched(name, additive(2), removals=3, passes=passes)
    assert min(passes, BLOCKS) + len(masks) == best.passes == passes
    assert len(set(masks)) == len(masks)  # a mask is never evaluated twice
    assert all(one.passes <= passes for one in best.incumbents)


@pytest.mark.parametrize("name", SEARCHES)
def test_a_seed_gives_the_same_masks_and_another_seed_others(name: str) -> None:
    first, again, other = (searched(name, coverage(0), removals=4, passes=50, seed=seed) for seed in (7, 7, 8))
    assert first[1] == again[1] != other[1]
    assert [(one.removed, one.passes) for one in first[0].incumbents] == [
        (one.removed, one.passes) for one in again[0].incumbents
    ]


@pytest.mark.parametrize("name", SEARCHES)
def test_a_search_ends_when_it_samples_only_known_masks(name: str) -> None:
    best, _ = searched(name, additive(0), removals=1, passes=10_000)
    assert best.passes < 2**BLOCKS
    assert best.incumbents[-1].nll == optimum(additive(0), 1)


# --- The budget ------------------------------------------------------------------------------------------------------


def test_known_masks_cost_nothing_and_a_short_answer_ends_a_search() -> None:
    counted = Counted(lambda mask: 1.0 - len(mask))
    evaluate = Evaluations(counted, removals=2, budget_passes=3)
    masks = [frozenset(blocks) for blocks in ((0, 1), (0, 2), (0, 1), (0, 3), (1, 2), (0, 2))]
    assert evaluate(masks) == [-1.0] * 4
    assert (evaluate.passes, counted.masks) == (3, [masks[0], masks[1], masks[3]])
    assert [evaluate(masks[:3]) for _ in range(IDLE_STEPS)] == [[-1.0] * 3] * IDLE_STEPS
    assert evaluate(masks[:3]) == []


def test_incumbents_are_those_within_a_smaller_budget() -> None:
    losses = {frozenset((0, 1)): 5.0, frozenset((0, 2)): 4.0, frozenset((0,)): 1.0, frozenset((1, 2)): 3.0}
    evaluate = Evaluations(lambda masks: [losses[mask] for mask in masks], removals=2, budget_passes=9)
    for mask in losses:
        evaluate([mask])
    assert [one.nll for one in evaluate.incumbents] == [5.0, 4.0, 3.0]  # a mask of another size is none
    within = [evaluate.best(passes=passes) for passes in range(6)]
    assert [one and one.nll for one in within] == [None, 5.0, 4.0, 4.0, 3.0, 3.0]
    assert evaluate.best(cpu_s=-1.0) is None
    assert evaluate.best(cpu_s=math.inf) == evaluate.incumbents[-1]


def test_process_time_counts_what_a_search_was_charged_for() -> None:
    evaluate = Evaluations(
        lambda masks: [0.0] * len(masks), removals=1, budget_passes=5, singles={0: 1.0, 1: 2.0}, singles_cpu_s=100.0
    )
    assert evaluate.passes == 2
    assert evaluate.incumbents[0].cpu_s >= 100.0


def test_gsi_evaluates_every_kept_block_in_every_round() -> None:
    assert [gsi_passes(60, removals) for removals in (0, 1, 4, 60)] == [0, 60, 60 + 59 + 58 + 57, 60 * 61 // 2]


def test_a_mask_is_named_in_the_order_in_which_blocks_run() -> None:
    assert drop_text(frozenset((13, 6, 7))) == "MHA3 FFN3 FFN6"
    assert best_removed(np.array([0.9, 0.2, 0.5, 0.2]), 3) == {1, 3, 2}


# --- The gradients ---------------------------------------------------------------------------------------------------


def toy(mask: Mask) -> float:
    return [0.3, 1.1, -0.4, 2.0, 0.7, 0.2, 1.9, 5.0][sum(1 << block for block in mask)]


SETS = [frozenset(mask) for count in range(4) for mask in combinations(range(3), count)]
BASELINE = 0.8


def indicators(mask: Mask) -> Floats:
    return np.array([[float(block in mask) for block in range(3)]])


def difference_quotient(function: Callable[[Floats], float], at: Floats) -> list[float]:
    h = 1e-5 * np.eye(len(at))
    return [(function(at + step) - function(at - step)) / 2e-5 for step in h]


def test_the_bernoulli_estimate_is_unbiased_whatever_the_baseline() -> None:
    keep = np.array([0.2, 0.5, 0.9])

    def probability(keep: Floats, mask: Mask) -> float:
        return math.prod(1 - keep[block] if block in mask else keep[block] for block in range(3))

    def expected(keep: Floats) -> float:
        return sum(probability(keep, mask) * toy(mask) for mask in SETS)

    for baseline in (0.0, BASELINE, -3.0):
        mean = sum(
            probability(keep, mask) * bernoulli_gradient(keep, 1 - indicators(mask), np.array([toy(mask) - baseline]))
            for mask in SETS
        )
        assert mean == pytest.approx(difference_quotient(expected, keep), rel=1e-4)


@pytest.mark.parametrize("removals", [1, 2])
def test_the_estimate_under_an_exact_count_is_unbiased_whatever_the_baseline(removals: int) -> None:
    log_weight = np.array([0.3, -1.0, 0.5])
    masks = [mask for mask in SETS if len(mask) == removals]

    def probabilities(log_weight: Floats) -> Floats:
        products = np.array([math.exp(sum(log_weight[block] for block in mask)) for mask in masks])
        return np.asarray(products / products.sum())

    def expected(log_weight: Floats) -> float:
        return float(sum(p * toy(mask) for p, mask in zip(probabilities(log_weight), masks, strict=True)))

    for baseline in (0.0, BASELINE):
        mean = sum(
            p * exact_count_gradient(log_weight, indicators(mask), np.array([toy(mask) - baseline]))
            for p, mask in zip(probabilities(log_weight), masks, strict=True)
        )
        assert mean == pytest.approx(difference_quotient(expected, log_weight), rel=1e-4, abs=1e-8)


def test_samples_of_an_exact_count_have_the_probabilities_that_enumeration_gives() -> None:
    log_weight = np.array([0.0, 1.0, -1.0, 0.5, -0.3])
    masks = [frozenset(mask) for mask in combinations(range(5), 2)]
    products = {mask: math.exp(sum(log_weight[block] for block in mask)) for mask in masks}
    counts = Counter(sample_exact_count(log_weight, 2, 20_000, np.random.default_rng(0)))
    assert set(counts) == set(masks)
    for mask, product in products.items():
        assert counts[mask] / 20_000 == pytest.approx(product / sum(products.values()), abs=0.01)
    exact = [sum(product for mask, product in products.items() if block in mask) for block in range(5)]
    found = removal_probabilities(log_weight, 2)
    assert found == pytest.approx(np.array(exact) / sum(products.values()))
    assert found.sum() == pytest.approx(2)


def test_an_estimate_of_many_samples_comes_close_to_the_gradient() -> None:
    rng, keep = np.random.default_rng(3), np.array([0.2, 0.5, 0.9])
    kept = (rng.random((40_000, 3)) < keep).astype(np.float64)
    loss = np.array([toy(frozenset(np.flatnonzero(row == 0).tolist())) for row in kept])
    found = bernoulli_gradient(keep, kept, loss - BASELINE)
    # The loss is linear in each probability: the gradient is the loss with the block less that without it.
    others = {block: [b for b in range(3) if b != block] for block in range(3)}
    for block in range(3):
        exact = 0.0
        for count in range(3):
            for rest in combinations(others[block], count):
                p = math.prod(1 - keep[b] if b in rest else keep[b] for b in others[block])
                exact += p * (toy(frozenset(rest)) - toy(frozenset((*rest, block))))
        assert found[block] == pytest.approx(exact, abs=0.06)


def test_the_projection_is_the_closest_point_that_satisfies_the_constraints() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        point = rng.normal(0.6, 0.5, 6)
        found = project(point, 3.0)
        assert found.min() >= 0
        assert found.max() <= 1
        assert found.sum() <= 3.0 + 1e-9
        others = rng.random((500, 6))
        others *= np.minimum(1, 3.0 / others.sum(1))[:, None]
        assert ((others - point) ** 2).sum(1).min() >= ((found - point) ** 2).sum() - 1e-9
        near = project(found + 0.05 * rng.normal(size=6), 3.0)
        assert ((near - point) ** 2).sum() >= ((found - point) ** 2).sum() - 1e-9
    assert project(np.array([0.1, 0.7, 0.2]), 3.0).tolist() == [0.1, 0.7, 0.2]


def test_the_start_removes_as_many_blocks_on_average_and_cheap_ones_more_often() -> None:
    singles = dict(enumerate([4.0, 3.1, 9.0, 3.0, 3.5, 3.2]))
    for removals in (1, 3, 5):
        keep = 1 / (1 + np.exp(-start_log_odds(singles, removals, 2.0)))
        assert keep.sum() == pytest.approx(6 - removals)
        assert sorted(range(6), key=lambda block: keep[block]) == [3, 1, 5, 4, 0, 2]
        assert start_log_odds(singles, removals, 0.0) == pytest.approx(math.log((6 - removals) / removals))


# --- Children --------------------------------------------------------------------------------------------------------


def test_children_have_the_size_of_their_parents_and_blocks_of_both() -> None:
    rng = np.random.default_rng(0)
    first, second = frozenset((0, 1, 2, 3)), frozenset((2, 3, 4, 5))
    children = {crossover(first, second, rng) for _ in range(200)}
    assert all(len(child) == 4 and {2, 3} <= child <= {0, 1, 2, 3, 4, 5} for child in children)
    assert len(children) == 6  # two of the four blocks that one of them removes
    assert crossover(first, first, rng) == first
    changed = Counter(len(first - mutation(first, 10, rng)) for _ in range(900))
    assert changed.keys() == {1, 2, 3}
    assert changed[1] > changed[2] > changed[3]
    assert mutation(frozenset(range(3)), 3, rng) == frozenset(range(3))  # nothing is left to switch with
