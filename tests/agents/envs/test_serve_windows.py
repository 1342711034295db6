"""The windows of ``ServeTrace``: what randomization changes, and what a window's fields do."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest

from agents.envs.serve_windows import FACTORS, Window, as_window, serve_windows
from sim.errors import ConfigError

WINDOW = Window(source="burst", start_s=300.0, rate=1.0, budget="cotenant", budget_seed=4)


def test_training_windows_are_randomized_only_when_requested_and_other_splits_never() -> None:
    plain, mixed = serve_windows(), serve_windows().randomized(True)
    for windows, split, changed in ((plain, "train", False), (mixed, "train", True), (mixed, "validation", False)):
        window = windows.sample(np.random.default_rng(3), split, ("burst",))  # type: ignore[arg-type]
        assert all((getattr(window, name) != 1.0) == changed for name in FACTORS)
    assert replace(mixed.randomized(False)) == plain


def test_randomized_factors_fill_their_ranges_evenly_on_a_logarithmic_scale() -> None:
    mixed, rng = serve_windows().randomized(True), np.random.default_rng(0)
    sampled = [mixed.sample(rng, "train", ("burst",)) for _ in range(2000)]
    for name in FACTORS:
        low, high = mixed.ranges[name]
        values = np.log([getattr(window, name) for window in sampled])
        assert np.log(low) <= values.min() < values.max() <= np.log(high)
        assert abs((values < np.log(low * high) / 2).mean() - 0.5) < 0.05
    low, high = mixed.rates["burst"]
    rates = [window.rate for window in sampled]
    assert mixed.ranges["rate"][0] * low < min(rates) < low
    assert high < max(rates) < mixed.ranges["rate"][1] * high


def test_a_mapping_randomizes_what_it_names_alone() -> None:
    window = serve_windows().randomized({"slowdown": [1.9, 2.0]}).sample(np.random.default_rng(0), "train", ("burst",))
    assert 1.9 <= window.slowdown <= 2.0
    assert (window.low_bit_cost, window.prompt_scale, window.output_scale) == (1.0, 1.0, 1.0)


@pytest.mark.parametrize(
    ("ranges", "said"),
    [
        ({"speed": [1, 2]}, "'speed'"),
        ({"slowdown": [2, 1]}, r"slowdown is \[2.0, 1.0\]"),
        ({"slowdown": [0, 1]}, r"slowdown is \[0.0, 1.0\]"),
        ({"slowdown": 2}, "two numbers"),
        ({"slowdown": ["a", 1]}, "two numbers"),
    ],
)
def test_a_range_that_is_none_is_refused(ranges: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        serve_windows().randomized(ranges)


def test_scales_multiply_lengths_and_change_no_arrival() -> None:
    windows = serve_windows()
    arrival_s, prompts, outputs = windows.arrays(WINDOW)
    scaled_s, longer, shorter = windows.arrays(replace(WINDOW, prompt_scale=1.5, output_scale=0.5))
    np.testing.assert_array_equal(scaled_s, arrival_s)
    fit = prompts * 1.5 + outputs * 0.5 <= windows.max_total_tokens
    np.testing.assert_array_equal(longer[fit], np.rint(prompts[fit] * 1.5))
    np.testing.assert_array_equal(shorter[fit], np.maximum(1, np.rint(outputs[fit] * 0.5)))
    assert not fit.all()  # some were too long


@pytest.mark.parametrize(("prompt_scale", "output_scale"), [(50.0, 0.01), (0.001, 50.0), (3.0, 3.0), (0.001, 0.001)])
def test_scaled_requests_keep_a_token_each_and_fit_the_context(prompt_scale: float, output_scale: float) -> None:
    windows = serve_windows()
    _, prompts, outputs = windows.arrays(replace(WINDOW, prompt_scale=prompt_scale, output_scale=output_scale))
    assert prompts.min() >= 1
    assert outputs.min() >= 1
    assert (prompts + outputs).max() <= windows.max_total_tokens


def test_windows_written_before_the_factors_still_read() -> None:
    old = {name: value for name, value in asdict(WINDOW).items() if name not in FACTORS}
    assert as_window(old) == WINDOW
    assert as_window(asdict(replace(WINDOW, slowdown=1.9))).slowdown == 1.9


@pytest.mark.parametrize("name", FACTORS)
@pytest.mark.parametrize("value", [0, -1.0, float("nan"), float("inf"), True, "2"])
def test_a_factor_that_is_no_positive_number_is_refused(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"is no window|{name}"):
        as_window({**asdict(WINDOW), name: value})
