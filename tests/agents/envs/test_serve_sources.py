"""The traces behind the windows: no rate over time of training returns in validation or test."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from scipy.signal import correlate

from agents.envs import serve_sources
from agents.envs.prune_loads import SPLITS
from agents.envs.serve_sources import load_source, own_sources, source_span_s, source_trace, sources, sources_with
from agents.envs.serve_windows import serve_windows
from agents.training.validation import validation_windows
from sim.config import build_option
from sim.errors import ConfigError, TraceError, WorkloadError
from sim.paths import DATA_VARIABLE, find_data
from sim.types import Floats

BINS_S = (5.0, 10.0, 20.0)
FEWEST_BINS = 32

needs_traces = pytest.mark.skipif(
    any(source.file and not find_data(source.file).exists() for source in sources().values()),
    reason="needs published traces: set RAP_LAB_DATA",
)


def rate_of(arrival_s: Floats, span_s: tuple[float, float], bin_s: float) -> Floats:
    """Return the number of requests in each full bin of a part of a trace."""
    edges = np.arange(span_s[0], span_s[1] + 1e-9, bin_s)
    return np.histogram(arrival_s, bins=edges)[0].astype(np.float64)


def highest_correlation(one: Floats, other: Floats) -> float:
    """Return the highest correlation of the shorter series with the longer one, over all positions in it."""
    short, long = sorted((one, other), key=len)
    n = len(short)
    centered = short - short.mean()
    totals = np.concatenate([np.zeros((2, 1)), np.cumsum([long, long**2], axis=1)], axis=1)
    sums, squares = totals[:, n:] - totals[:, :-n]
    deviation = np.sqrt(np.maximum(squares - sums**2 / n, 0.0) * (centered**2).sum())
    products = correlate(long, centered, mode="valid", method="fft")
    return float((products[deviation > 1e-6] / deviation[deviation > 1e-6]).max(initial=0.0))


def share_a_profile(one: Floats, other: Floats) -> bool:
    """Return whether two rates over time agree more than chance makes them.

    Chance is what the same rates reach with one of them reversed in time, which keeps its bursts and drifts. With few
    bins and many positions it is high, so both must hold: a high correlation, and one well above chance.
    """
    found = highest_correlation(one, other)
    if found <= 0.75:
        return False
    return found > highest_correlation(one[::-1], other) + 0.15


Part = tuple[Floats, tuple[float, float]]


def shared(trained: Mapping[str, Part], held: Mapping[str, Part]) -> list[tuple[str, str, float]]:
    """Return (held-out source, source of training, bin) wherever two rates over time agree."""
    found = []
    for bin_s in BINS_S:
        one, other = ({name: rate_of(*part, bin_s) for name, part in parts.items()} for parts in (held, trained))
        found += [
            (name, source, bin_s)
            for (name, ours), (source, theirs) in itertools.product(one.items(), other.items())
            if min(len(ours), len(theirs)) >= FEWEST_BINS and share_a_profile(ours, theirs)
        ]
    return found


def parts_of(split: str) -> dict[str, Part]:
    return {name: (source_trace(name).arrival_s, source_span_s(name, split)) for name in sources_with(split)[0]}


@needs_traces
@pytest.mark.parametrize("held_out", ["validation", "test"])
def test_no_rate_over_time_of_training_returns_in_validation_or_test(held_out: str) -> None:
    assert shared(parts_of("train"), parts_of(held_out)) == []


@needs_traces
def test_no_rate_over_time_of_validation_returns_in_test() -> None:
    assert shared(parts_of("validation"), parts_of("test")) == []


@needs_traces
def test_the_measure_finds_what_the_former_split_shared() -> None:
    # It trained on the first 60 % of a trace that walks Azure's full rate tables in a circle, and tested on the last
    # quarter of Azure's traces.
    burst = build_option("trace", "burst", {"duration_s": 7200.0, "seed": 11}).arrival_s
    code = source_trace("azure_code").arrival_s
    trained, held = {"burst": (burst, (0.0, 4320.0))}, {"azure_code": (code, (0.75 * code[-1], code[-1]))}
    assert [(name, source) for name, source, _ in shared(trained, held)] == [("azure_code", "burst")] * len(BINS_S)
    assert highest_correlation(rate_of(*held["azure_code"], 5.0), rate_of(*trained["burst"], 5.0)) > 0.9


def test_a_rate_is_found_again_at_any_shift_and_scale_and_through_noise() -> None:
    rng = np.random.default_rng(0)
    long = rng.poisson(rng.gamma(0.5, 20.0, size=800)).astype(np.float64)
    again = rng.poisson(0.3 * long[500:640]).astype(np.float64)
    assert share_a_profile(again, long)
    assert not share_a_profile(rng.permutation(again), long)


def test_burst_uses_the_rates_of_its_split_alone() -> None:
    parts = parts_of("train"), parts_of("validation"), parts_of("test")
    rates = [rate_of(*part["burst"], 5.0) for part in parts]
    assert not share_a_profile(rates[0][:500], rates[2])
    assert share_a_profile(rates[0][:240], rates[0][240:])  # it repeats its own


def test_every_source_lends_windows_inside_its_parts() -> None:
    windows, rng = serve_windows(), np.random.default_rng(0)
    for split in SPLITS:
        for name in sources_with(split)[0]:
            begin_s, end_s = windows.span_s(name, split)
            low, _ = windows.rates[name]
            for _ in range(20):
                window = windows.sample(rng, split, (name,), rate=low)
                assert begin_s <= window.start_s <= window.start_s + windows.window_s * low <= end_s


def test_validation_takes_every_source_in_equal_numbers() -> None:
    windows = validation_windows()
    names = sources_with("validation")[0]
    counts = Counter(window.source for window in windows)
    assert set(counts) == set(names)
    assert set(counts.values()) == {len(windows) // len(names)}
    assert len(windows) >= 30
    assert windows == validation_windows()


def test_generated_parts_are_the_traces_of_their_own_keys() -> None:
    source, loaded = sources()["mmpp"], load_source("mmpp")
    begin_s, end_s = loaded.spans_s["validation"]
    alone = build_option("trace", "mmpp", dict(source.splits["validation"])).arrival_s + begin_s
    arrival_s = loaded.trace.arrival_s
    inside = arrival_s[(arrival_s >= begin_s) & (arrival_s < end_s)]
    assert set(inside) <= set(alone)
    assert len(inside) > 0.8 * len(alone)  # requests that exceed the context are dropped


def test_a_source_without_its_file_is_left_out_with_a_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setenv(DATA_VARIABLE, str(tmp_path))
    names, notes = sources_with("test")
    assert names == ["burst", "gamma", "mmpp", "azure_2024_like"]
    assert any(note.startswith("azure_conv is left out: traces/azure2023/") for note in notes)
    assert all("RAP_LAB_DATA" in note for note in notes)
    load_source.cache_clear()
    with pytest.raises(TraceError, match=r"sources\.azure_conv of conf/split/serve\.yaml"):
        source_trace("azure_conv")


def test_a_source_without_a_part_names_those_that_have_one() -> None:
    with pytest.raises(ConfigError, match=r"mmpp_slow has no test part .*it has train.*azure_2024_like"):
        source_span_s("mmpp_slow", "test")
    with pytest.raises(ConfigError, match="no source 'bursty'"):
        source_span_s("bursty", "test")


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"trace": "mmpp", "rate": [1, 2], "part": {}}, "no key 'part'"),
        ({"trace": "mmpp", "rate": [1, 2], "parts": {"train": [0, 0.6], "test": [0.5, 1]}}, "overlap"),
        ({"trace": "mmpp", "rate": [1, 2], "parts": {"train": [0, 1.5]}}, "from 0 to 1"),
        ({"trace": "mmpp", "rate": [1, 2], "parts": {"training": [0, 1]}}, "no split 'training'"),
        ({"trace": "mmpp", "rate": [1, 2], "splits": {"train": {"seed": 1}}}, "duration_s"),
        ({"trace": "mmpp"}, "rate"),
        (None, "sources.mine is not valid"),
    ],
)
def test_a_malformed_source_is_refused_by_name(value: Any, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    content = {"parts": {"train": [0.0, 1.0]}, "sources": {"mine": value}}
    monkeypatch.setattr(serve_sources, "serve_split", lambda: content)
    with pytest.raises(ConfigError, match=said):
        sources.__wrapped__()


def test_a_part_of_a_table_that_is_none_is_refused() -> None:
    with pytest.raises(WorkloadError, match=r"part is \[0.7, 0.2\]"):
        build_option("trace", "burst", {"part": [0.7, 0.2]})


def test_a_source_for_one_kind_of_model_is_used_only_where_it_is_named() -> None:
    named = [name for name, source in sources().items() if source.named_only]
    assert "short_bursts" in named
    assert all(name not in sources_with(split)[0] for name in named for split in SPLITS)
    assert own_sources(["short_bursts"]) == [
        "short_bursts"
    ]  # a policy for a small model is validated on short requests
    assert own_sources(["burst", "mmpp"]) is None
    assert serve_windows().sample(np.random.default_rng(0), "train", named).source in named


def test_no_rate_over_time_of_training_on_named_sources_returns_in_validation() -> None:
    named = [name for name, source in sources().items() if source.named_only]

    def parts(split: str) -> dict[str, Part]:
        return {name: (source_trace(name).arrival_s, source_span_s(name, split)) for name in named}

    assert shared(parts("train"), parts("validation")) == []
