"""Utility: requests in time, weighted by the quality they kept."""

from __future__ import annotations

import numpy as np
import pytest

from sim.results.utility import kept_quality, utility


def test_a_request_that_missed_its_slo_earns_nothing_and_one_at_twice_the_perplexity_half() -> None:
    met = np.array([True, True, False, False])
    nll = np.array([3.0, 3.0 + np.log(2.0), 3.0, np.nan])
    assert utility(met, nll, 3.0) == pytest.approx((1.0 + 0.5) / 4)


def test_a_plan_that_is_better_than_dense_keeps_no_more_than_all_quality() -> None:
    assert kept_quality(np.array([-0.5, 0.0])).tolist() == [1.0, 1.0]


def test_without_requests_nothing_is_lost() -> None:
    assert utility(np.zeros(0, dtype=np.bool_), np.zeros(0), 3.0) == 1.0
