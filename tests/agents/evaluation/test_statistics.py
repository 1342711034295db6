"""Paired bootstrap intervals: what they must satisfy for any data."""

from __future__ import annotations

import numpy as np
import pytest

from agents.evaluation.statistics import paired_difference


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
