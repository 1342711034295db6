"""Behavior of sim/traces/generate.py and of the tables that sim/traces/fit.py writes."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import yaml
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

import sim.fit_trace
from sim.errors import TraceError, WorkloadError
from sim.paths import REPOSITORY
from sim.traces import fit as fit_trace
from sim.traces.generate import (
    TABLES,
    burst,
    diurnal,
    fixed_lengths,
    gamma,
    generate,
    load_table,
    lognormal_lengths,
    mmpp,
    poisson,
    poisson_arrivals,
    table_arrivals,
    table_lengths,
)
from sim.traces.readers.azure import read_azure
from sim.traces.trace import Trace
from tests.commands import exit_status

SEEDS = (0, 1, 2, 3, 4)
KINDS = ("code", "conv")


def full_duration_s(kind):
    table = load_table(f"azure_{kind}")
    return len(table.requests_per_bin) * table.bin_s


# The built-in default compared with the real trace


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kind", KINDS)
def test_generated_and_real_azure_traces_agree_in_rate_burstiness_and_lengths(data, kind, seed):
    real = read_azure(data / fit_trace.FILES[f"azure_{kind}"])
    made = burst(kind=kind, duration_s=full_duration_s(kind), seed=seed)
    assert len(made) == pytest.approx(len(real), rel=0.01)
    assert made.mean_rate_rps == pytest.approx(real.mean_rate_rps, rel=0.02)
    assert made.interarrival_cv == pytest.approx(real.interarrival_cv, rel=0.10)
    assert made.peak_rate_rps(60.0) == pytest.approx(real.peak_rate_rps(60.0), rel=0.05)
    assert made.peak_rate_rps(1.0) == pytest.approx(real.peak_rate_rps(1.0), rel=0.35)
    shares = [0.05, 0.25, 0.5, 0.75, 0.95, 0.99]
    for column in ("prompt_tokens", "output_tokens"):
        ours, theirs = getattr(made, column), getattr(real, column)
        # A quantile of a sample is itself uncertain: it must lie between the real ones 1.5 percent to either side.
        low, high = (np.quantile(theirs, np.clip(np.array(shares) + side, 0, 1)) for side in (-0.015, 0.015))
        assert (np.quantile(ours, shares) >= low - 1).all()
        assert (np.quantile(ours, shares) <= high + 1).all()
        assert ours.mean() == pytest.approx(theirs.mean(), rel=0.10)
    gap_shares = np.array([0.25, 0.5, 0.75, 0.9, 0.95, 0.99])
    gaps_s, real_gaps_s = np.diff(made.arrival_s), np.diff(real.arrival_s)
    # Gaps are looked up by share: of ours, the share below each real quantile must be near the real share.
    below = [(gaps_s <= gap).mean() for gap in np.quantile(real_gaps_s, gap_shares)]
    assert np.abs(below - gap_shares).max() < 0.08


@pytest.mark.parametrize("kind", KINDS)
def test_the_committed_tables_are_those_that_the_fit_writes(data, kind, monkeypatch):
    monkeypatch.setenv("RAP_LAB_DATA", str(data))
    name = f"azure_{kind}"
    text = fit_trace.table_text(name, read_azure(fit_trace.FILES[name], name=name))
    assert text == (TABLES / f"{name}.yaml").read_text()


def test_the_fit_command_writes_both_tables(data, tmp_path, monkeypatch):
    monkeypatch.setenv("RAP_LAB_DATA", str(data))
    assert exit_status(sim.fit_trace.main, f"out={tmp_path}") == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["azure_code.yaml", "azure_conv.yaml"]
    assert load_table(str(tmp_path / "azure_code.yaml")).name == "azure_code"


def test_the_fit_command_without_data_says_where_to_get_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RAP_LAB_DATA", str(tmp_path))
    assert exit_status(sim.fit_trace.main, f"out={tmp_path}") == 2
    assert "Azure/AzurePublicDataset" in capsys.readouterr().err


@pytest.mark.parametrize("kind", KINDS)
def test_the_tables_state_their_source_licence_and_facts(kind):
    content = yaml.safe_load((TABLES / f"azure_{kind}.yaml").read_text())
    assert content["licence"] == "CC-BY 4.0"
    assert content["commit"] == "b469a113cedca53ddc3bdea71a143dc4b7d8700c"
    assert "Splitwise" in content["cite"]
    assert load_table(f"azure_{kind}").rate_rps == pytest.approx(content["mean_rate_rps"], rel=0.005)


@pytest.mark.parametrize("seed", range(10))
def test_the_default_is_bursty_at_every_seed(seed):
    trace = burst(seed=seed)
    assert trace.name == "burst_mix"
    counts = np.bincount((trace.arrival_s // 10).astype(int), minlength=60)
    # A Poisson process has variance = mean: a ratio of 1, and hardly any 10 s with twice the mean.
    assert counts.var() / counts.mean() > 10
    assert counts.max() > 1.8 * counts.mean()


def test_a_mix_is_the_two_kinds_on_one_clock():
    mix = burst(kind="mix", seed=4)
    parts = [burst(kind=kind, seed=4) for kind in KINDS]
    assert len(mix) == sum(map(len, parts))
    assert sorted(mix.prompt_tokens.tolist()) == sorted(np.concatenate([p.prompt_tokens for p in parts]).tolist())


@pytest.mark.parametrize("kind", [*KINDS, "mix"])
@pytest.mark.parametrize("rate_rps", [0.5, 20.0])
def test_the_rate_of_the_default_can_be_chosen(kind, rate_rps):
    trace = burst(kind=kind, rate_rps=rate_rps, duration_s=full_duration_s("code") * 4, seed=1)
    assert trace.mean_rate_rps == pytest.approx(rate_rps, rel=0.05)


def test_shuffled_pieces_keep_the_rate_and_give_other_orders():
    hour_s = 36_000.0
    base = burst(kind="code", duration_s=hour_s, shuffle_s=120.0, seed=1)
    assert base.mean_rate_rps == pytest.approx(3.0, rel=0.15)
    assert base.interarrival_cv > 8
    assert base != burst(kind="code", duration_s=hour_s, seed=1)


def test_a_trace_longer_than_the_table_goes_on():
    trace = burst(kind="conv", duration_s=3 * full_duration_s("conv"), seed=0)
    assert len(trace) == pytest.approx(3 * 15594, rel=0.01)
    assert trace.duration_s == pytest.approx(3 * full_duration_s("conv"), rel=0.01)


def test_a_pause_of_the_code_trace_is_an_error_alone_and_none_in_a_mix():
    seeds = range(40)
    alone, messages = [], []
    for seed in seeds:
        try:
            burst(kind="code", duration_s=5.0, seed=seed)
        except WorkloadError as error:
            messages.append(str(error))
            alone.append(seed)
    assert 0 < len(alone) < 40
    assert all("no request in 5 s" in message for message in messages)
    assert len(burst(kind="mix", duration_s=5.0, seed=alone[0])) > 0


@given(
    table=st.sampled_from(["azure_code", "azure_conv"]),
    duration_s=st.floats(1.0, 5000.0),
    rate_rps=st.none() | st.floats(0.01, 100.0),
    shuffle_s=st.none() | st.floats(1.0, 10_000.0),
    seed=st.integers(0, 2**32),
)
def test_table_arrivals_are_sorted_and_inside_the_duration(table, duration_s, rate_rps, shuffle_s, seed):
    rng = np.random.default_rng(seed)
    arrival_s = table_arrivals(rng, table=table, duration_s=duration_s, rate_rps=rate_rps, shuffle_s=shuffle_s)
    assert (np.diff(arrival_s) >= 0).all()
    assert len(arrival_s) == 0 or (arrival_s[0] >= 0 and arrival_s[-1] < duration_s)


# Arrival processes with a closed form


@pytest.mark.parametrize("seed", SEEDS)
def test_poisson_arrivals_have_their_rate_and_a_cv_of_one(seed):
    trace = poisson(rate_rps=20.0, duration_s=1000.0, seed=seed)
    assert len(trace) == pytest.approx(20_000, abs=4 * np.sqrt(20_000))
    assert trace.interarrival_cv == pytest.approx(1.0, abs=0.04)


@pytest.mark.parametrize("cv", [0.2, 1.0, 3.0, 8.0])
def test_gamma_arrivals_have_their_rate_and_cv(cv):
    trace = gamma(rate_rps=50.0, cv=cv, duration_s=4000.0, seed=1)
    assert len(trace) == pytest.approx(200_000, abs=5 * cv * np.sqrt(200_000))
    assert trace.interarrival_cv == pytest.approx(cv, rel=0.05)


def test_mmpp_arrivals_have_their_mean_rate_and_are_burstier_than_poisson():
    numbers = {"on_rate_rps": 20.0, "off_rate_rps": 2.0, "mean_on_s": 10.0, "mean_off_s": 50.0}
    trace = mmpp(**numbers, duration_s=60_000.0, seed=2)
    assert len(trace) / 60_000 == pytest.approx(5.0, rel=0.05)
    assert trace.interarrival_cv > 1.5
    starts = [mmpp(**numbers, duration_s=5.0, seed=seed) for seed in range(400)]
    # The share of time in each state holds from the start: the first seconds are as busy as all others.
    assert np.mean([len(t) for t in starts]) / 5 == pytest.approx(5.0, rel=0.2)


def test_mmpp_can_be_silent_when_off():
    trace = mmpp(on_rate_rps=10.0, off_rate_rps=0.0, mean_on_s=5.0, mean_off_s=50.0, duration_s=2000.0, seed=0)
    assert np.diff(trace.arrival_s).max() > 20


def test_diurnal_arrivals_follow_the_day():
    trace = diurnal(rate_rps=20.0, amplitude=0.8, duration_s=10_000.0, period_s=10_000.0, peak_s=2500.0, seed=3)
    counts, _ = np.histogram(trace.arrival_s, bins=20, range=(0, 10_000))
    middle_s = (np.arange(20) + 0.5) * 500
    expected = 500 * 20 * (1 + 0.8 * np.cos(2 * np.pi * (middle_s - 2500) / 10_000))
    assert np.abs(counts - expected).max() < 5 * np.sqrt(expected.max())


@pytest.mark.parametrize(
    "make",
    [
        partial(poisson, rate_rps=5.0, duration_s=50.0),
        partial(gamma, rate_rps=5.0, cv=3.0, duration_s=50.0),
        partial(mmpp, on_rate_rps=9.0, off_rate_rps=1.0, mean_on_s=5.0, mean_off_s=5.0, duration_s=50.0),
        partial(diurnal, rate_rps=5.0, amplitude=0.5, duration_s=50.0, period_s=50.0, peak_s=25.0),
        partial(burst, duration_s=50.0),
    ],
)
def test_every_generator_repeats_with_its_seed_and_says_what_it_did(make):
    trace = make(seed=7)
    assert trace == make(seed=7)
    assert trace != make(seed=8)
    assert trace.arrival_s[-1] < 50.0
    assert "seed=7" in trace.history[-1]
    assert trace.source.startswith("sim.traces.generate.")


def test_another_rate_leaves_the_lengths_of_the_first_requests():
    slow, fast = poisson(rate_rps=5.0, duration_s=50.0), poisson(rate_rps=10.0, duration_s=50.0)
    first = min(len(slow), len(fast)) // 2
    fixed = [generate("x", partial(poisson_arrivals, rate_rps=r, duration_s=50.0), table_lengths) for r in (5.0, 10.0)]
    assert fixed[0].prompt_tokens[:first].tolist() == fixed[1].prompt_tokens[:first].tolist()
    assert slow.prompt_tokens[:first].tolist() == fast.prompt_tokens[:first].tolist()


# Lengths


def test_fixed_and_lognormal_lengths_are_what_they_say():
    fixed = poisson(rate_rps=5.0, duration_s=50.0, lengths=partial(fixed_lengths, prompt_tokens=100, output_tokens=7))
    assert set(fixed.prompt_tokens) == {100}
    assert set(fixed.output_tokens) == {7}
    numbers = {"prompt_tokens_p50": 800, "prompt_sigma": 1.0, "output_tokens_p50": 100, "output_sigma": 0.5}
    drawn = poisson(rate_rps=100.0, duration_s=100.0, lengths=partial(lognormal_lengths, **numbers))
    assert np.median(drawn.prompt_tokens) == pytest.approx(800, rel=0.05)
    assert np.log(drawn.output_tokens).std() == pytest.approx(0.5, rel=0.05)
    limited = poisson(
        rate_rps=100.0, duration_s=10.0, lengths=partial(lognormal_lengths, **numbers, max_prompt_tokens=900)
    )
    assert limited.prompt_tokens.max() == 900
    wild = {**numbers, "prompt_sigma": 1e6}
    assert poisson(rate_rps=5.0, duration_s=50.0, lengths=partial(lognormal_lengths, **wild)).prompt_tokens.min() >= 1


# Errors


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (partial(poisson, rate_rps=0.0, duration_s=1.0), "rate_rps is 0.0; it must be a finite number above 0"),
        (partial(poisson, rate_rps=1.0, duration_s=float("inf")), "duration_s is inf"),
        (partial(poisson, rate_rps=1e9, duration_s=1e9), "1e.18 requests, more than"),
        (partial(poisson, rate_rps=1e-9, duration_s=1.0), "makes no request; raise its rate"),
        (partial(poisson, rate_rps=1.0, duration_s=10.0, seed=-1), "seed is -1"),
        (partial(gamma, rate_rps=1.0, cv=-1.0, duration_s=1.0), "cv is -1.0"),
        (partial(gamma, rate_rps=1.0, cv=1e9, duration_s=1.0), "cv is 1000000000.0; it must be from 0.01"),
        (
            partial(mmpp, on_rate_rps=1.0, off_rate_rps=1.0, mean_on_s=1e-9, mean_off_s=1, duration_s=1.0),
            "state changes",
        ),
        (partial(burst, duration_s=1e15, rate_rps=1e-9), "bins, more than"),
        (partial(mmpp, on_rate_rps=1.0, off_rate_rps=-1.0, mean_on_s=1, mean_off_s=1, duration_s=1.0), "off_rate_rps"),
        (partial(diurnal, rate_rps=1.0, amplitude=1.5, duration_s=1.0), "amplitude is 1.5"),
        (partial(burst, kind="chat"), "kind is 'chat'.*allowed: code, conv, mix"),
        (partial(burst, rate_rps=-1.0), "rate_rps is -1.0"),
        (partial(burst, duration_s=0.0), "duration_s is 0.0"),
        (partial(burst, seed=-1), "seed is -1"),
        (partial(burst, shuffle_s=0.0), "shuffle_s is 0.0"),
        (
            partial(
                poisson, rate_rps=9.0, duration_s=9.0, lengths=partial(fixed_lengths, prompt_tokens=0, output_tokens=1)
            ),
            "prompt_tokens is 0",
        ),
    ],
)
def test_an_impossible_generator_says_what_is_wrong_and_what_is_allowed(make, message):
    with pytest.raises(WorkloadError, match=message):
        make()


def test_an_unknown_table_names_the_nearest():
    with pytest.raises(TraceError, match="did you mean 'azure_code'"):
        load_table("azure_cod")


@pytest.mark.parametrize(
    "change",
    [
        {"gap_s": {"share": [0, 1], "value": [2, 1]}},
        {"gap_s": {"share": [0.1, 1], "value": [1, 2]}},
        {"gap_s": 3},
        {"requests_per_bin": [0, 0]},
        {"requests_per_bin": [-1, 5]},
        {"bin_s": 0},
        {"name": None, "prompt_tokens": {}},
    ],
)
def test_a_table_that_is_none_is_an_error(tmp_path, change):
    fine = {"share": [0, 1], "value": [1, 2]}
    content = {
        "name": "x",
        "bin_s": 5,
        "requests_per_bin": [1, 2],
        "gap_s": fine,
        "prompt_tokens": fine,
        "output_tokens": fine,
    }
    path = tmp_path / "table.yaml"
    path.write_text(yaml.safe_dump(content))
    assert load_table(str(path)).rate_rps == 0.3
    other = tmp_path / "other.yaml"
    other.write_text(yaml.safe_dump({**content, **change}))
    with pytest.raises(TraceError, match=r"other\.yaml"):
        load_table(str(other))


# Configuration

CONF = sorted((REPOSITORY / "conf" / "trace").glob("*.yaml"))
GENERATORS = {
    "burst", "poisson", "gamma", "mmpp", "diurnal", "small", "azure_2024_like", "short_gamma", "short_tides",
    "chats", "chat_users",
}  # fmt: skip
OWN_FILE = {file.stem for file in CONF if OmegaConf.is_missing(OmegaConf.load(file), "path")}
"""Options that read a file of the user's; tests/sim/traces/readers/test_formats.py reads one with each."""


def build(file, **changes):
    config = OmegaConf.merge(OmegaConf.create({"seed": 1}), {"trace": OmegaConf.load(file)}, {"trace": changes})
    return instantiate(config.trace)


@pytest.mark.parametrize("file", [f for f in CONF if f.stem in GENERATORS], ids=lambda file: file.stem)
def test_every_generator_of_conf_can_be_built_without_data(file, tmp_path, monkeypatch):
    monkeypatch.setenv("RAP_LAB_DATA", str(tmp_path))
    trace = build(file)
    assert isinstance(trace, Trace)
    assert "seed=1" in trace.history[-1]


@pytest.mark.parametrize("file", [f for f in CONF if f.stem not in GENERATORS | OWN_FILE], ids=lambda file: file.stem)
def test_every_published_trace_of_conf_can_be_built_and_says_so_when_its_data_is_absent(
    file, data, tmp_path, monkeypatch
):
    monkeypatch.setenv("RAP_LAB_DATA", str(data))
    trace = build(file)
    assert len(trace) > 100
    assert trace.name == file.stem
    monkeypatch.setenv("RAP_LAB_DATA", str(tmp_path))
    with pytest.raises(InstantiationException, match="RAP_LAB_DATA"):
        build(file)


def test_a_file_of_ones_own_can_be_named_in_conf(tmp_path):
    path = tmp_path / "mine.csv"
    path.write_text("arrival_s,prompt_tokens,output_tokens\n1,2,3\n")
    assert build(REPOSITORY / "conf" / "trace" / "file.yaml", path=str(path)).name == "mine"


@pytest.mark.parametrize("file", CONF, ids=lambda file: file.stem)
def test_every_trace_of_conf_starts_with_what_it_is_and_published_ones_with_source_and_licence(file):
    text = file.read_text()
    assert text.startswith("# ")
    if file.stem not in GENERATORS | OWN_FILE:
        assert "Source: " in text
        assert any(licence in text for licence in ("CC-BY 4.0", "Apache-2.0", "MIT"))
