"""Behavior of sim/traces/transforms.py."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from hydra.utils import instantiate
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from sim.errors import WorkloadError
from sim.paths import REPOSITORY
from sim.traces import transforms as workload
from sim.traces.readers.azure import read_azure
from sim.traces.readers.burstgpt import read_burstgpt
from sim.traces.readers.mooncake import read_mooncake
from sim.traces.trace import Trace
from sim.traces.transforms import (
    add,
    apply_steps,
    burstiest,
    clip_lengths,
    drop_long,
    inject_burst,
    keep_share,
    merge,
    repeat,
    repeat_prompts,
    scale_rate,
    shuffle_lengths,
    spread_ties,
    window,
)


def a_trace(arrival_s=(0.0, 1.0, 1.0, 4.0, 10.0), prompt_tokens=(10, 20, 30, 40, 2000), *, ids=False, **described):
    blocks = [-(-tokens // 512) for tokens in prompt_tokens]
    hash_ids = tuple(np.arange(count) + 10 * i for i, count in enumerate(blocks)) if ids else None
    output_tokens = [tokens // 10 for tokens in prompt_tokens]
    return Trace(
        arrival_s=arrival_s, prompt_tokens=prompt_tokens, output_tokens=output_tokens, hash_ids=hash_ids, **described
    )


def requests_of(trace):
    return sorted(zip(trace.prompt_tokens.tolist(), trace.output_tokens.tolist(), strict=True))


traces = st.lists(
    st.tuples(st.floats(0, 1e6), st.integers(1, 10_000), st.integers(1, 10_000)), min_size=1, max_size=40
).map(
    lambda rows: Trace(
        arrival_s=sorted(row[0] for row in rows),
        prompt_tokens=[row[1] for row in rows],
        output_tokens=[row[2] for row in rows],
        hash_ids=tuple(np.arange(-(-row[1] // 512)) for row in rows),
        time_quantum_s=1.0,
    )
)
factors = st.floats(1e-3, 1e3)
seeds = st.integers(0, 2**32)


# Laws


@given(trace=traces, factor=factors)
def test_scaling_the_rate_keeps_the_requests_their_order_and_the_cv_of_gaps(trace, factor):
    scaled = scale_rate(trace, factor=factor)
    assert scaled.prompt_tokens.tolist() == trace.prompt_tokens.tolist()
    assert scaled.output_tokens.tolist() == trace.output_tokens.tolist()
    assert scaled.duration_s == pytest.approx(trace.duration_s / factor, rel=1e-9, abs=1e-6)
    if trace.duration_s > 1e-3:
        assert scaled.mean_rate_rps == pytest.approx(trace.mean_rate_rps * factor, rel=1e-6)
        assert scaled.interarrival_cv == pytest.approx(trace.interarrival_cv, rel=1e-5, nan_ok=True)


@given(trace=traces, factor=factors)
def test_scaling_the_rate_back_restores_the_arrivals(trace, factor):
    back = scale_rate(scale_rate(trace, factor=factor), factor=1.0 / factor)
    assert np.allclose(back.arrival_s, trace.arrival_s, rtol=1e-12)
    assert back.time_quantum_s == pytest.approx(1.0)


@given(several=st.lists(traces, min_size=1, max_size=4))
def test_merging_conserves_every_request_with_its_arrival(several):
    merged = merge(several)
    assert len(merged) == sum(map(len, several))
    assert requests_of(merged) == sorted(row for trace in several for row in requests_of(trace))
    assert merged.arrival_s.tolist() == sorted(np.concatenate([trace.arrival_s for trace in several]).tolist())
    ids = [frozenset(np.concatenate(trace.hash_ids).tolist()) for trace in several]
    assert len(frozenset(np.concatenate(merged.hash_ids).tolist())) == sum(map(len, ids))


@given(trace=traces, times=st.integers(1, 5), share=st.booleans())
def test_repeating_conserves_requests_each_round(trace, times, share):
    repeated = repeat(trace, times=times, share_prefixes=share)
    assert len(repeated) == times * len(trace)
    assert requests_of(repeated) == sorted(requests_of(trace) * times)
    ids = set(np.concatenate(trace.hash_ids).tolist())
    assert len(set(np.concatenate(repeated.hash_ids).tolist())) == len(ids) * (1 if share else times)


@given(trace=traces, seed=seeds)
def test_shuffling_conserves_requests_and_leaves_arrivals(trace, seed):
    shuffled = shuffle_lengths(trace, seed=seed)
    assert requests_of(shuffled) == requests_of(trace)
    assert np.array_equal(shuffled.arrival_s, trace.arrival_s)
    assert all(len(i) == -(-p // 512) for i, p in zip(shuffled.hash_ids, shuffled.prompt_tokens, strict=True))


@given(trace=traces, seed=seeds)
def test_spreading_ties_keeps_order_and_stays_in_each_step_of_the_clock(trace, seed):
    spread = spread_ties(trace, seed=seed)
    assert requests_of(spread) == requests_of(trace)
    assert spread.prompt_tokens.tolist() == trace.prompt_tokens.tolist()
    moved_s = spread.arrival_s - trace.arrival_s
    assert moved_s.min() >= 0
    assert moved_s.max() <= 1.0
    assert spread.time_quantum_s == 0.0


@given(trace=traces, start=st.floats(0, 1), length=st.floats(0.01, 1))
def test_a_window_holds_exactly_the_requests_that_arrive_in_it(trace, start, length):
    start_s, duration_s = start * 1e6, length * 1e6
    inside = (trace.arrival_s >= start_s) & (trace.arrival_s < start_s + duration_s)
    if not inside.any():
        with pytest.raises(WorkloadError, match="no request"):
            window(trace, start_s=start_s, duration_s=duration_s)
        return
    part = window(trace, start_s=start_s, duration_s=duration_s)
    assert part.prompt_tokens.tolist() == trace.prompt_tokens[inside].tolist()
    assert part.arrival_s.tolist() == (trace.arrival_s[inside] - start_s).tolist()


@given(trace=traces, duration_s=st.floats(1e-3, 1e6), by=st.sampled_from(["requests", "tokens"]))
def test_no_window_holds_more_than_the_burstiest(trace, duration_s, by):
    def held(part):
        return len(part) if by == "requests" else int((part.prompt_tokens + part.output_tokens).sum())

    best = burstiest(trace, duration_s=duration_s, by=by)
    assert best.arrival_s[0] == 0.0
    others = [trace.take((trace.arrival_s >= t) & (trace.arrival_s < t + duration_s)) for t in trace.arrival_s]
    assert held(best) == max(map(held, others))


@given(trace=traces, prompt=st.integers(1, 9000), output=st.integers(1, 9000), total=st.integers(2, 9000))
def test_clipping_keeps_every_request_within_every_limit(trace, prompt, output, total):
    clipped = clip_lengths(trace, max_prompt_tokens=prompt, max_output_tokens=output, max_total_tokens=total)
    assert len(clipped) == len(trace)
    assert clipped.prompt_tokens.max() <= prompt
    assert clipped.output_tokens.max() <= output
    assert (clipped.prompt_tokens + clipped.output_tokens).max() <= total
    assert all(len(i) == -(-p // 512) for i, p in zip(clipped.hash_ids, clipped.prompt_tokens, strict=True))
    fits = (
        (trace.prompt_tokens <= prompt)
        & (trace.output_tokens <= output)
        & (trace.prompt_tokens + trace.output_tokens <= total)
    )
    assert np.array_equal(clipped.prompt_tokens[fits], trace.prompt_tokens[fits])
    assert np.array_equal(clipped.output_tokens[fits], trace.output_tokens[fits])


@given(trace=traces, share=st.floats(0.01, 1), seed=seeds)
def test_a_share_keeps_that_many_requests_at_their_times(trace, share, seed):
    if round(share * len(trace)) == 0:
        with pytest.raises(WorkloadError, match="leaves none"):
            keep_share(trace, share=share, seed=seed)
        return
    kept = keep_share(trace, share=share, seed=seed)
    assert len(kept) == round(share * len(trace))
    rows = list(zip(trace.arrival_s.tolist(), trace.prompt_tokens.tolist(), strict=True))
    assert all(row in rows for row in zip(kept.arrival_s.tolist(), kept.prompt_tokens.tolist(), strict=True))


@given(trace=traces, seed=seeds, rate_rps=st.floats(0.1, 50))
@settings(deadline=None)
def test_an_injected_burst_adds_requests_only_there(trace, seed, rate_rps):
    start_s = float(trace.arrival_s[-1])
    burst = inject_burst(trace, start_s=start_s, duration_s=10.0, rate_rps=rate_rps, seed=seed)
    added = len(burst) - len(trace)
    assert added >= 0
    assert burst.arrival_s[-1] < start_s + 10.0 or added == 0 or burst.arrival_s[-1] == pytest.approx(start_s + 10.0)
    assert (burst.arrival_s < start_s).sum() == (trace.arrival_s < start_s).sum()
    assert set(requests_of(burst)) == set(requests_of(trace))
    old_ids = set(np.concatenate(trace.hash_ids).tolist())
    fresh = [ids for ids in burst.hash_ids if not set(ids.tolist()) <= old_ids]
    assert len(fresh) == added


RANDOM_STEPS = [
    spread_ties,
    shuffle_lengths,
    partial(keep_share, share=0.5),
    partial(inject_burst, start_s=0.0, duration_s=5.0, rate_rps=3.0),
]


@pytest.mark.parametrize("step", RANDOM_STEPS)
def test_the_same_seed_gives_the_same_trace_and_another_seed_another(step):
    arrival_s = np.floor(np.linspace(0.0, 50.0, 200))
    trace = Trace(arrival_s=arrival_s, prompt_tokens=np.arange(1, 201), output_tokens=[1] * 200, time_quantum_s=1.0)
    assert step(trace, seed=3) == step(trace, seed=3)
    assert step(trace, seed=3) != step(trace, seed=4)


EVERY_STEP = [
    *RANDOM_STEPS,
    window,
    partial(burstiest, duration_s=2.0),
    partial(scale_rate, factor=2.0),
    partial(clip_lengths, max_total_tokens=100),
    partial(drop_long, max_prompt_tokens=100),
    partial(repeat, times=2),
    partial(repeat_prompts, distinct=2, block_tokens=4),
    partial(add, other=a_trace(ids=True)),
]


@pytest.mark.parametrize("step", EVERY_STEP)
def test_every_step_leaves_its_input_and_tells_what_it_did(step):
    trace = a_trace(ids=True, history=("read",), time_quantum_s=1.0)
    before = trace.content_hash()
    result = step(trace)
    assert trace.content_hash() == before
    assert len(result.history) > 1
    assert "read" in result.history[0]
    assert result.hash_ids is not None


# Definitions


def test_merged_ties_go_in_the_order_of_the_traces_and_prefixes_stay_distinct():
    first, second = a_trace((1.0, 2.0), (10, 20), ids=True), a_trace((1.0, 2.0), (30, 40), ids=True)
    merged = merge([first, second], name="both")
    assert merged.prompt_tokens.tolist() == [10, 30, 20, 40]
    assert [ids.tolist() for ids in merged.hash_ids] == [[0], [11], [10], [21]]
    assert merged.name == "both"


def test_merging_with_a_trace_without_prefixes_says_that_they_are_left_out():
    merged = merge([a_trace(ids=True, name="a"), a_trace(name="b", time_quantum_s=3.0)])
    assert merged.hash_ids is None
    assert "left out the prefix ids, because b has none" in merged.history
    assert merged.time_quantum_s == 3.0


def test_prompts_in_turn_share_their_ids_and_all_share_the_first_tokens():
    trace = a_trace((0.0, 1.0, 2.0, 3.0), (10, 20, 10, 12))
    repeated = repeat_prompts(trace, distinct=2, shared_tokens=9, block_tokens=4)
    ids = [row.tolist() for row in repeated.hash_ids]
    assert [len(row) for row in ids] == [3, 5, 3, 3]
    assert ids[0] == ids[2]
    assert ids[3] == ids[1][:3]  # as far as both reach
    assert ids[0][:2] == ids[1][:2] == [0, 1]
    assert ids[0][2] != ids[1][2]
    assert len({i for row in ids for i in row}) == 2 + 1 + 3
    assert repeated.hash_block_tokens == 4
    assert repeated.prompt_tokens.tolist() == [10, 20, 10, 12]
    alike = repeat_prompts(trace, distinct=2, block_tokens=4, same_lengths=True)
    assert alike.prompt_tokens.tolist() == [10, 20, 10, 20]
    assert [row.tolist() for row in alike.hash_ids[:2]] == [row.tolist() for row in alike.hash_ids[2:]]
    new = repeat_prompts(trace, block_tokens=4)
    assert len({i for row in new.hash_ids for i in row.tolist()}) == 3 + 5 + 3 + 3


@pytest.mark.parametrize(
    "keys", [{"distinct": 0}, {"distinct": True}, {"distinct": 1.5}, {"shared_tokens": -1}, {"block_tokens": 0}]
)
def test_prompts_in_turn_need_whole_numbers(keys):
    with pytest.raises(WorkloadError, match=next(iter(keys))):
        repeat_prompts(a_trace(), **keys)


def test_a_repeated_trace_goes_on_at_its_mean_rate():
    trace = a_trace((0.0, 1.0, 2.0), (10, 20, 30))
    assert repeat(trace, times=2).arrival_s.tolist() == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    assert repeat(trace, times=2, period_s=10.0).arrival_s.tolist() == [0.0, 1.0, 2.0, 10.0, 11.0, 12.0]


def test_clipping_to_a_context_cuts_the_answer_before_the_prompt():
    trace = Trace(arrival_s=[0, 1, 2], prompt_tokens=[90, 99, 300], output_tokens=[50, 50, 50])
    clipped = clip_lengths(trace, max_total_tokens=100)
    assert clipped.prompt_tokens.tolist() == [90, 99, 99]
    assert clipped.output_tokens.tolist() == [10, 1, 1]
    assert clipped.history[-1] == "clipped 1 prompts and 3 outputs to 100 total tokens"


def test_dropping_counts_what_it_drops():
    kept = drop_long(a_trace(), max_total_tokens=100, max_prompt_tokens=25)
    assert kept.prompt_tokens.tolist() == [10, 20]
    assert kept.history[-1] == "dropped 3 of 5 requests over 25 prompt tokens, 100 total tokens"


def test_an_injected_burst_can_have_one_length():
    burst = inject_burst(
        a_trace(ids=True), start_s=2.0, duration_s=1.0, rate_rps=20.0, prompt_tokens=1000, output_tokens=7
    )
    new = burst.prompt_tokens == 1000
    assert new.sum() > 5
    assert set(burst.output_tokens[new]) == {7}
    assert {len(ids) for ids, is_new in zip(burst.hash_ids, new, strict=True) if is_new} == {2}


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (partial(window, start_s=-1.0), "start_s is -1.0; it must be a finite number, at least 0"),
        (partial(window, start_s=5.0, duration_s=1.0), "no request .* from 5 s to 6 s.* the next at 10 s"),
        (partial(window, start_s=50.0), "none later: lower start_s"),
        (partial(window, duration_s=0.0), "duration_s is 0.0"),
        (partial(burstiest, duration_s=float("nan")), "duration_s is nan"),
        (partial(burstiest, duration_s=1.0, by="token"), "did you mean 'tokens'"),
        (partial(scale_rate, factor=0.0), "factor is 0.0"),
        (partial(scale_rate, factor=-2.0), "factor is -2.0"),
        (spread_ties, "has a fine clock"),
        (partial(spread_ties, quantum_s=-1.0), "quantum_s is -1.0"),
        (clip_lengths, "no limit is set"),
        (partial(clip_lengths, max_total_tokens=1), "total_tokens is 1; it must be at least 2"),
        (partial(drop_long, max_prompt_tokens=0), "prompt_tokens is 0"),
        (partial(drop_long, max_prompt_tokens=5), "every request .* shortest has 11 tokens"),
        (partial(inject_burst, start_s=11.0, duration_s=1.0, rate_rps=1.0), "last request .* arrives at 10 s"),
        (partial(inject_burst, start_s=1.0, duration_s=1.0, rate_rps=0.0), "rate_rps is 0.0"),
        (partial(inject_burst, start_s=1.0, duration_s=1.0, rate_rps=1.0, prompt_tokens=0), "prompt_tokens is 0"),
        (partial(repeat, times=0), "times is 0"),
        (partial(repeat, times=2, period_s=5.0), "period_s is 5; it must be at least the last arrival, 10 s"),
        (partial(keep_share, share=1.5), "share is 1.5; it must be at most 1"),
        (partial(keep_share, share=0.0), "share is 0.0"),
        (partial(keep_share, share=0.01), "share=0.01 of 5 requests leaves none; use at least 0.2"),
        (lambda trace: merge([]), "merge got no trace"),
    ],
)
def test_an_impossible_step_says_what_is_wrong_and_what_is_allowed(step, message):
    with pytest.raises(WorkloadError, match=message):
        step(a_trace())


# Composition


def test_steps_are_applied_in_order_each_with_its_own_seed():
    trace = a_trace(np.arange(200.0), np.arange(1, 201) * 10)
    steps = [partial(keep_share, share=0.5), partial(keep_share, share=0.5), partial(scale_rate, factor=2.0)]
    result = apply_steps(trace, steps, seed=1)
    assert len(result) == 50
    assert result == apply_steps(trace, steps, seed=1)
    assert result != apply_steps(trace, steps, seed=2)
    seeds_used = [line.split("seed=")[1] for line in result.history if "seed=" in line]
    assert len(set(seeds_used)) == 2
    assert apply_steps(trace, []) is trace


def test_a_seed_set_in_a_step_is_kept():
    trace = a_trace(np.arange(200.0), np.arange(1, 201) * 10)
    assert apply_steps(trace, [partial(shuffle_lengths, seed=9)], seed=1) == shuffle_lengths(trace, seed=9)


@pytest.mark.parametrize(("step", "message"), [("window", "_partial_: true"), (lambda trace: 3, "must return a Trace")])
def test_a_step_that_is_none_is_an_error(step, message):
    with pytest.raises(WorkloadError, match=message):
        apply_steps(a_trace(), [step])


@pytest.mark.parametrize("file", sorted((REPOSITORY / "conf" / "workload").glob("*.yaml")), ids=lambda file: file.stem)
def test_every_workload_of_conf_can_be_built_and_applied(file):
    assert file.read_text().startswith("# ")
    steps = instantiate(OmegaConf.load(file))["steps"]
    arrival_s = np.floor(np.linspace(0.0, 500.0, 300))
    trace = Trace(arrival_s=arrival_s, prompt_tokens=[100] * 300, output_tokens=[10] * 300, time_quantum_s=1.0)
    assert len(apply_steps(trace, steps, seed=0)) > 0


def test_every_public_step_is_tested_above_and_takes_a_seed_only_when_random():
    tested = {getattr(step, "func", step).__name__ for step in EVERY_STEP} | {"merge", "apply_steps"}
    public = {
        name for name, f in vars(workload).items() if callable(f) and getattr(f, "__module__", "") == workload.__name__
    }
    assert {name for name in public if not name.startswith("_")} == tested


# Real traces


def test_spreading_gives_the_mooncake_conversation_trace_a_plausible_burstiness(data):
    trace = read_mooncake(data / "traces/mooncake/conversation_trace.head_before_2400s.jsonl.gz")
    assert trace.interarrival_cv > 2.9
    # Batches every 3 s were the cause: inside them arrivals are not known, and uniform ones are nearly Poisson.
    assert spread_ties(trace).interarrival_cv == pytest.approx(1.0, abs=0.05)


def test_spreading_removes_the_ties_of_burstgpt(data):
    trace = spread_ties(read_burstgpt(data / "traces/burstgpt/burstgpt_segment_744286_744357.csv"))
    assert (np.diff(trace.arrival_s) > 0).all()


def test_the_burstiest_minute_of_the_azure_code_trace_is_its_peak(data):
    trace = read_azure(data / "traces/azure2023/AzureLLMInferenceTrace_code.head_before_1900.csv.gz")
    assert len(burstiest(trace, duration_s=60.0)) == round(trace.peak_rate_rps(60.0) * 60)
