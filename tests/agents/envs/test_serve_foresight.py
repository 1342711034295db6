"""Foresight: the critic learns what comes, entry by entry, and nothing of it reaches the actor or a policy."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from agents.envs.cluster import ClusterSetting
from agents.envs.serve import ServeSetting, ServeTrace
from agents.envs.serve_foresight import EDGES_S, ENTRIES, MOST, foresight
from agents.envs.serve_requests import WindowRequests
from agents.envs.serve_vector import ServeTraceVector
from agents.envs.serve_windows import Window
from sim.engine.budget import Budget
from sim.errors import ConfigError

WINDOW = Window(source="burst", start_s=300.0, rate=1.0, budget="cotenant", budget_seed=4)


def entry(rows: np.ndarray[Any, Any], span: int, name: str) -> np.ndarray[Any, Any]:
    """Return one entry of all ticks: that of a span ahead."""
    return rows[:, 4 * span + ("share", "prompts", "outputs", "memory").index(name)]


def test_every_entry_is_what_arrives_and_the_least_memory_in_its_span() -> None:
    lengths = {"prompt_tokens": np.array([100, 200, 7]), "output_tokens": np.array([10, 20, 1])}
    requests = WindowRequests(arrival_s=np.array([1.0, 4.5, 30.0]), **lengths)
    budget = Budget((0.0, 3.0, 8.0), (800, 400, 1600))
    rows = foresight(requests, budget, 2.0, 100, 1.0, 60)
    assert rows.shape == (61, ENTRIES)
    assert len(EDGES_S) == 7
    # At 0 s: one request in [0, 2), one in [2, 5), none in [5, 10), none in [10, 20), one in [20, 40).
    shares = [float(entry(rows, span, "share")[0]) for span in range(6)]
    assert shares == pytest.approx([10 / 3, 10 / 3, 0.0, 0.0, 10 / 3, 0.0])
    assert entry(rows, 1, "prompts")[0] == pytest.approx(np.log2(201) / 20)
    assert entry(rows, 1, "outputs")[0] == pytest.approx(np.log2(21) / 20)
    # Least memory, in dense weights / 8: 8, then 4 from 3 s on, then 16 from 8 s on.
    memory = [float(entry(rows, span, "memory")[0]) for span in range(6)]
    assert memory == pytest.approx([1.0, 0.5, 0.5, 2.0, 2.0, 2.0])
    # A request that arrives now is still to come; later none is.
    assert entry(rows, 0, "share")[[1, 2, 29, 30, 31]] == pytest.approx([10 / 3, 0.0, 10 / 3, 10 / 3, 0.0])
    assert not entry(rows, 0, "share")[31:].any()
    # Requests of the window, what is left of it, and how slow the machine is.
    assert rows[0, -3:] == pytest.approx([np.log2(4) / 12, 1.0, 2.0])
    assert rows[30, -2] == pytest.approx(0.5)
    assert rows[60, -2] == 0.0
    assert rows.min() >= 0.0


def test_a_window_without_requests_has_foresight_too() -> None:
    requests = WindowRequests(arrival_s=np.zeros(0), prompt_tokens=np.zeros(0), output_tokens=np.zeros(0))
    rows = foresight(requests, Budget((0.0,), (10**9,)), 1.0, 1, 1.0, 8)
    assert np.isfinite(rows).all()
    assert rows.max() == MOST  # of memory


def test_it_lies_between_what_the_server_observes_and_the_flags_in_both_environments() -> None:
    plain, seen = ServeTrace(), ServeTrace(foresight=True)
    vector = ServeTraceVector(2, foresight=True)
    windows = [WINDOW, replace(WINDOW, rate=2.0, slowdown=1.5)]
    features, count = plain.setting.table.features, len(plain.setting.actions.plans)
    fast, _ = vector.reset(options={"windows": windows})
    for row, window in enumerate(windows):
        observed, _ = plain.reset(options={"window": window})
        longer, _ = seen.reset(options={"window": window})
        expected = seen.setting.foresight(window)
        for tick in range(1, 12):
            assert longer.shape == (features + ENTRIES + count,) == seen.observation_space.shape
            assert seen.observation_space.contains(longer)
            np.testing.assert_array_equal(longer[:features], observed[:features])
            np.testing.assert_array_equal(longer[features:-count], expected[tick])
            np.testing.assert_array_equal(longer[-count:], observed[-count:])
            if tick == 1:
                np.testing.assert_allclose(fast[row], longer, atol=1e-6)
            observed, longer = plain.step(0)[0], seen.step(0)[0]


def test_the_rows_of_the_vector_environment_advance_and_begin_again() -> None:
    vector = ServeTraceVector(1, foresight=True)
    features, count = vector.setting.table.features, len(vector.setting.actions.plans)
    observed, _ = vector.reset(seed=0, options={"windows": [WINDOW]})
    expected = vector.setting.foresight(WINDOW)
    for tick in range(1, vector.setting.ticks):
        np.testing.assert_array_equal(observed[0, features:-count], expected[tick])
        observed, *_ = vector.step(np.zeros(1, dtype=np.int64))
    np.testing.assert_array_equal(observed[0, features:-count], expected[vector.setting.ticks])
    observed, *_ = vector.step(np.zeros(1, dtype=np.int64))  # a new window
    assert observed[0, features + ENTRIES - 2] == pytest.approx(1.0 - 1.0 / vector.setting.ticks, abs=1e-5)


def test_without_it_nothing_is_added() -> None:
    assert ServeSetting().foresight(WINDOW).shape == (ServeSetting().ticks + 1, 0)


def test_a_cluster_has_none() -> None:
    with pytest.raises(ConfigError, match="foresight is for ServeTrace alone"):
        ClusterSetting(foresight=True)
