"""Paired bootstrap intervals: what they must satisfy for any data."""

from __future__ import annotations

import numpy as np
import pytest

from agents.evaluation.statistics import Interval, by_trace, paired_difference, share_of


def test_a_policy_differs_from_itself_by_0() -> None:
    values = np.random.default_rng(0).random((1, 30))
    same = paired_difference(values, values, resamples=200)
    assert (same.mean, same.low, same.high) == (0.0, 0.0, 0.0)


def test_pairing_detects_a_small_gain_that_the_spread_of_scenarios_would_hide() -> None:
    rng = np.random.default_rng(0)
    theirs = rng.random((1, 50))
    ours = theirs + 0.01 + 0.001 * rng.standard_normal((1, 50))
    paired = paired_difference(ours, theirs, resamples=1000)
    assert paired.excludes_zero()
    assert paired.low < 0.01 < paired.high
    unpaired = paired_difference(ours, theirs[:, rng.permutation(50)], resamples=1000)
    assert not unpaired.excludes_zero()


def test_the_95_percent_interval_covers_the_true_mean_about_that_often() -> None:
    rng = np.random.default_rng(1)
    covered = 0
    for trial in range(200):
        ours = 0.5 + rng.standard_normal((1, 40))
        interval = paired_difference(ours, np.zeros((1, 40)), resamples=400, seed=trial)
        covered += interval.low <= 0.5 <= interval.high
    assert 0.88 <= covered / 200 <= 0.99


def played(
    rng: np.random.Generator, seeds: int, blocks: dict[str, int], each: int
) -> tuple[np.ndarray, list[str], list[int]]:
    """Return differences of 0.5 on average with effects of the seed and of the block, and the labels of scenarios."""
    traces = [trace for trace, count in blocks.items() for _ in range(count * each)]
    labels = [block for count in blocks.values() for block in range(count) for _ in range(each)]
    shared = np.concatenate([np.repeat(rng.standard_normal(count), each) for count in blocks.values()])
    seed_effect = 0.3 * rng.standard_normal((seeds, 1)) if seeds > 1 else 0.0
    return 0.5 + shared + seed_effect + 0.2 * rng.standard_normal((seeds, len(traces))), traces, labels


@pytest.mark.parametrize(("seeds", "blocks"), [(1, {"a": 20, "b": 12, "c": 6}), (8, {"a": 12, "b": 8})])
def test_the_interval_covers_the_truth_where_scenarios_share_blocks_and_seeds(
    seeds: int, blocks: dict[str, int]
) -> None:
    rng = np.random.default_rng(3)
    covered = naive = 0
    for trial in range(200):
        ours, traces, labels = played(rng, seeds, blocks, each=6)
        theirs = np.zeros((1, ours.shape[1]))
        interval = paired_difference(ours, theirs, traces=traces, blocks=labels, resamples=300, seed=trial)
        covered += interval.low <= 0.5 <= interval.high
        alone = paired_difference(ours[:1], theirs, traces=traces, resamples=300, seed=trial)
        naive += alone.low <= 0.5 <= alone.high
    assert 0.88 <= covered / 200 <= 0.99
    assert naive / 200 < 0.75  # scenarios as if independent, and one seed as if it were all


def test_every_trace_counts_the_same_however_many_scenarios_it_has() -> None:
    ours = np.concatenate([np.full((1, 90), 0.1), np.full((1, 10), 0.3)], axis=1)
    traces, blocks = ["long"] * 90 + ["short"] * 10, list(range(90)) + list(range(10))
    both = paired_difference(ours, np.zeros((1, 100)), traces=traces, blocks=blocks, resamples=50)
    assert both.mean == pytest.approx(0.2)
    assert (both.low, both.high) == pytest.approx((0.2, 0.2))
    alone = by_trace(ours, np.zeros((1, 100)), traces=traces, blocks=blocks, resamples=50)
    assert {trace: one.mean for trace, one in alone.items()} == pytest.approx({"long": 0.1, "short": 0.3})


def test_copies_of_a_block_do_not_narrow_the_interval() -> None:
    rng = np.random.default_rng(4)
    one = rng.standard_normal((1, 10))
    once = paired_difference(one, np.zeros((1, 10)), blocks=range(10), resamples=2000)
    often = paired_difference(
        np.repeat(one, 9, axis=1), np.zeros((1, 90)), blocks=np.repeat(range(10), 9), resamples=2000
    )
    assert (often.low, often.high) == pytest.approx((once.low, once.high))


def test_a_trace_of_a_single_block_adds_nothing_to_the_interval() -> None:
    ours = np.random.default_rng(5).random((1, 6))
    found = paired_difference(ours, np.zeros((1, 6)), blocks=[0] * 6, resamples=50)
    assert found == Interval(pytest.approx(ours.mean()), pytest.approx(ours.mean()), pytest.approx(ours.mean()))


def test_seeds_that_differ_widen_the_interval() -> None:
    rng = np.random.default_rng(2)
    theirs = rng.random((1, 40))
    alike = np.repeat(theirs + 0.02, 5, axis=0)
    spread = alike + 0.1 * np.arange(-2, 3)[:, None]
    narrow, wide = (paired_difference(x, theirs, resamples=500) for x in (alike, spread))
    assert wide.high - wide.low > 3 * (narrow.high - narrow.low)


def test_policies_that_played_different_scenarios_are_not_compared() -> None:
    with pytest.raises(ValueError, match="cannot be paired"):
        paired_difference(np.zeros((1, 3)), np.zeros((1, 4)))
    with pytest.raises(ValueError, match="cannot be paired"):
        paired_difference(np.zeros((1, 3)), np.zeros((1, 3)), blocks=[0, 1])


def test_the_share_of_an_oracle_weighs_every_trace_equally_and_widens_with_its_windows() -> None:
    rng = np.random.default_rng(0)
    traces = np.array(["a"] * 40 + ["b"] * 10)
    oracle = np.where(traces == "a", 0.5, 0.9) + rng.normal(0.0, 0.02, 50)
    ours = 0.9 * oracle
    windows = np.arange(50)
    exact = share_of(ours, oracle, traces=traces, blocks=windows)
    assert (exact.mean, exact.low, exact.high) == pytest.approx((0.9, 0.9, 0.9))
    noisy = ours + rng.normal(0.0, 0.05, 50)
    means = [[values[traces == name].mean() for name in ("a", "b")] for values in (noisy, oracle)]
    found = share_of(noisy, oracle, traces=traces, blocks=windows)
    assert found.mean == pytest.approx(np.mean(means[0]) / np.mean(means[1]))
    assert found.low < found.mean < found.high
    together = share_of(noisy, oracle, traces=traces, blocks=np.zeros(50))
    assert together.mean == found.mean
    assert (together.low, together.high) == pytest.approx((found.mean, found.mean))  # one block says nothing of others
