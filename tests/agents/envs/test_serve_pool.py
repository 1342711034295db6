"""Pools of training windows: neither light nor hopeless, on servers of many speeds and sizes, the same each time."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agents.envs.serve import ServeSetting, ServeTrace
from agents.envs.serve_pool import drawn, pool_options, reference_attainment, window_pool
from agents.envs.serve_vector import ServeTraceVector
from agents.envs.serve_windows import Window
from sim.errors import ConfigError

RANGES = {"slowdown": [0.6, 2.2], "low_bit_cost": [0.5, 16.0], "prompt_scale": [0.5, 2.0], "output_scale": [0.5, 2.0]}
WINDOW = Window(source="burst", start_s=100.0, rate=1.0, budget="cotenant", budget_seed=3)


def setting(size: int = 10, **changed: Any) -> ServeSetting:
    return ServeSetting(
        sources=["burst", "gamma"],
        randomize=RANGES,
        pool={"size": size, "validation": 4, "memories": [[1.5, 0.9]], "named": 0.5, **changed},
    )


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("agents.envs.serve_pool.FOLDER", tmp_path)
    return tmp_path


def test_the_windows_of_a_pool_differ_in_speed_size_and_cost_at_loads_that_matter(folder: Path) -> None:
    one = setting()
    assert one.pool is not None
    pool = window_pool(one, one.pool, "train")
    assert [window.source for window in pool] == ["burst", "gamma"] * 5
    for window in pool:
        attained = reference_attainment(one, window)
        assert attained is not None
        assert 0.02 < attained < 0.999
        assert 0.6 <= window.slowdown <= 2.2
        begin_s, end_s = one.windows.span_s(window.source, "train")
        assert begin_s <= window.start_s
        assert window.start_s + one.windows.window_s * window.rate <= end_s
    assert len({window.slowdown for window in pool}) == len(pool)
    assert {window.low_bits for window in pool} == {True, False}
    assert any((window.high_share, window.low_share) == (1.5, 0.9) for window in pool)
    assert any(window.high_share not in (1.5, None) for window in pool)


def test_a_pool_is_made_once_and_is_the_same_for_equal_arguments(folder: Path) -> None:
    one = setting(4)
    assert one.pool is not None
    made = window_pool(one, one.pool, "train")
    [path] = folder.glob("train_*.json")
    rows = json.loads(path.read_text())
    path.write_text(json.dumps([{**row, "rate": 0.5} for row in rows]))
    again = setting(4)
    assert again.pool is not None
    assert window_pool(again, again.pool, "train") == tuple(replace(window, rate=0.5) for window in made)
    path.unlink()
    assert window_pool(again, again.pool, "train") == made
    other = setting(4, seed=1)
    assert other.pool is not None
    assert window_pool(other, other.pool, "train") != made


def test_training_plays_windows_of_the_pool_and_half_of_their_budgets_are_announced(folder: Path) -> None:
    one = setting(3)
    assert one.pool is not None
    pool = window_pool(one, one.pool, "train")
    rng = np.random.default_rng(0)
    sampled = [drawn(pool, rng, (0, 1000), one.pool.notices_s) for _ in range(200)]
    known = {replace(window, budget_seed=0, notice_s=None) for window in pool}
    assert {replace(window, budget_seed=0, notice_s=None) for window in sampled} == known
    assert 0.35 < np.mean([window.notice_s == 0.0 for window in sampled]) < 0.65
    options = {
        "sources": ["burst", "gamma"],
        "randomize": RANGES,
        "pool": {"size": 3, "validation": 4, "memories": [[1.5, 0.9]], "named": 0.5},
    }
    env = ServeTrace(**options)
    env.reset(seed=0)
    assert replace(env.core.window, budget_seed=0, notice_s=None) in known


def test_both_environments_serve_a_slow_server_with_costly_or_missing_copies_alike() -> None:
    windows = [
        replace(WINDOW, slowdown=1.7, low_bit_cost=8.0, notice_s=5.0, high_share=2.0, low_share=1.0),
        replace(WINDOW, slowdown=0.7, low_bits=False, prompt_scale=0.5, output_scale=1.5),
        WINDOW,
    ]
    vector = ServeTraceVector(len(windows))
    observed, _ = vector.reset(seed=0, options={"windows": windows})
    plain = [ServeTrace() for _ in windows]
    rng, features = np.random.default_rng(1), vector.setting.table.features
    for env, window, row in zip(plain, windows, observed, strict=True):
        first, _ = env.reset(options={"window": window})
        np.testing.assert_allclose(row, first, rtol=1e-5, atol=1e-6)
    low = np.array(vector.setting.actions.low)
    for _ in range(40):
        flags = observed[:, features:] > 0.5
        assert not flags[1][low].any()
        actions = (rng.random(flags.shape) * flags).argmax(axis=1)
        observed, rewards, *_ = vector.step(actions)
        for i, env in enumerate(plain):
            row, reward, *_ = env.step(int(actions[i]))
            np.testing.assert_allclose(observed[i], row, rtol=1e-5, atol=1e-6)
            assert rewards[i] == pytest.approx(reward, abs=1e-9)
    names = [entry.name for entry in vector.setting.table.entries]
    slowdown = observed[:, names.index("slowdown")]
    np.testing.assert_allclose(slowdown, np.log2([1.7, 0.7, 1.0]) / 2.0, atol=1e-5)


@pytest.mark.parametrize(
    "wrong",
    [
        {"size": 0},
        {"size": 5, "low_bits": 1.5},
        {"size": 5, "attained": [0.9, 0.5]},
        {"sise": 5},
        {"size": 5, "seed": -1},
        {"size": 5, "budgets": ["cotenent"]},
        {"size": 5, "notices_s": []},
        {"size": 5, "notices_s": [-1.0]},
    ],
)
def test_options_of_a_pool_that_make_no_sense_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="pool is"):
        pool_options(wrong)


def test_kinds_of_budgets_and_times_of_notice_can_be_chosen(folder: Path) -> None:
    one = setting(6, budgets=["random_walk"], notices_s=[2.0])
    assert one.pool is not None
    pool = window_pool(one, one.pool, "train")
    assert {window.budget for window in pool} == {"random_walk"}
    rng = np.random.default_rng(0)
    assert {one.sample_window(rng).notice_s for _ in range(10)} == {2.0}


def test_the_windows_of_a_small_model_come_from_its_own_sources_in_every_split(folder: Path) -> None:
    short = ["short_bursts", "short_tides"]
    one = ServeSetting(sources=short, split="validation", pool={"size": 2, "validation": 4})
    assert one.pool is not None
    assert [window.source for window in window_pool(one, one.pool, "validation")] == short * 2
