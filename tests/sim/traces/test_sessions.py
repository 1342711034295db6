"""Sessions of a trace: which request follows which, workload steps on them, generators, and their file."""

from __future__ import annotations

import itertools
import math
from functools import partial

import numpy as np
import pytest

from sim.cost.front_end import FrontEnd, into_queue
from sim.engine.protocol import refuse_sessions
from sim.errors import ConfigError, TraceError, WorkloadError
from sim.replay.max_rate import all_at_once
from sim.traces.chats import chat_users, chats
from sim.traces.generate import fixed_lengths, lognormal_lengths, poisson, poisson_arrivals
from sim.traces.loops import closed_loop, open_loop
from sim.traces.readers.native import read_trace, write_trace
from sim.traces.sessions import earliest_arrivals, next_turns, turn_numbers, waiting_sessions
from sim.traces.trace import Trace
from sim.traces.transforms import clip_lengths, drop_long, keep_share, repeat, scale_rate, window

NAN = math.nan
SHORT = partial(fixed_lengths, prompt_tokens=10, output_tokens=6)
VARIED = partial(lognormal_lengths, prompt_tokens_p50=40, prompt_sigma=1.0, output_tokens_p50=30, output_sigma=1.0)
STARTS = partial(poisson_arrivals, rate_rps=2.0, duration_s=20.0)


def some_chats(seed: int = 0, **more: object) -> Trace:
    return chats(arrivals=STARTS, lengths=VARIED, seed=seed, **more)


def test_a_turn_follows_the_one_before_it_in_its_session_unless_it_has_a_time_of_its_own():
    session, think_s = np.array([7, 3, 7, 3, 7]), np.array([NAN, NAN, 1.0, NAN, 2.0])
    assert next_turns(session, think_s).tolist() == [2, -1, 4, -1, -1]
    assert turn_numbers(session).tolist() == [0, 0, 1, 1, 2]
    assert waiting_sessions(session, think_s).tolist() == []


def test_with_answers_that_take_no_time_users_take_the_sessions_in_order():
    session, think_s = np.array([0, 1, 1, 2, 3]), np.array([NAN, NAN, 5.0, 2.0, 1.0])
    assert waiting_sessions(session, think_s).tolist() == [3, 4]
    arrival_s = earliest_arrivals(np.array([0.0, 1.0, 0.0, 0.0, 0.0]), session, think_s)
    assert arrival_s.tolist() == [0.0, 1.0, 6.0, 2.0, 3.0]


@pytest.mark.parametrize(
    ("session", "think_s", "message"),
    [
        ([0, 0], [NAN, -1.0], "think_s of request 1 is -1.0"),
        ([0, 0], [NAN, math.inf], "think_s of request 1 is inf"),
        ([0, 1], [1.0, 2.0], "2 sessions wait for a user and none begins"),
        ([0, 0, 1], [NAN, NAN, 2.0], "request 1 is a later turn with a time of its own"),
        ([0], [NAN, NAN], "every request needs one in each"),
    ],
)
def test_impossible_sessions_are_refused(session, think_s, message):
    lengths = np.full(len(think_s), 5)
    with pytest.raises(TraceError, match=message):
        Trace(
            arrival_s=np.zeros(len(think_s)),
            prompt_tokens=lengths,
            output_tokens=lengths,
            session=np.array(session),
            think_s=np.array(think_s),
        )


@pytest.mark.parametrize("seed", range(5))
def test_the_prompt_of_a_turn_begins_with_the_prompt_and_the_answer_before_it(seed):
    trace = some_chats(seed, shared_tokens=20, max_context_tokens=600)
    assert trace.session is not None
    assert trace.think_s is not None
    assert trace.hash_ids is not None
    followed = 0
    for before, after in enumerate(next_turns(trace.session, trace.think_s).tolist()):
        said = int(trace.prompt_tokens[before] + trace.output_tokens[before])
        assert len(trace.hash_ids[before]) == said // 16
        if after >= 0:
            followed += 1
            assert trace.prompt_tokens[after] > said
            assert trace.hash_ids[after][: said // 16].tolist() == trace.hash_ids[before].tolist()
    assert followed > 10
    assert (trace.prompt_tokens + trace.output_tokens).max() <= 600
    # Different conversations share the system prompt alone, which fills one prefix block.
    firsts = [set(trace.hash_ids[i].tolist()) for i in np.flatnonzero(turn_numbers(trace.session) == 0)]
    assert all(a & b == {0} for a, b in itertools.pairwise(firsts) if a and b)


def test_equal_seeds_give_equal_conversations_and_another_think_time_changes_no_length():
    assert some_chats() == some_chats()
    assert some_chats().content_hash() == some_chats().content_hash()
    assert some_chats() != some_chats(1)
    slow = some_chats(think_s=100.0)
    assert sorted(slow.prompt_tokens) == sorted(some_chats().prompt_tokens)
    assert slow.content_hash() != some_chats().content_hash()


def test_users_begin_one_after_the_other_and_all_other_conversations_wait():
    trace = chat_users(users=4, sessions_per_user=3, ramp_up_s=8.0, lengths=SHORT, think_s=1.0)
    assert trace.session is not None
    assert trace.think_s is not None
    assert trace.arrival_s[np.isnan(trace.think_s)].tolist() == [0.0, 2.0, 4.0, 6.0]
    assert len(waiting_sessions(trace.session, trace.think_s)) == 8


def test_a_closed_loop_of_any_trace_keeps_its_requests_in_order():
    trace = poisson(rate_rps=2.0, duration_s=20.0, lengths=VARIED)
    loop = closed_loop(trace, users=3, think_s=0.0)
    assert loop.prompt_tokens.tolist() == trace.prompt_tokens.tolist()
    assert loop.think_s is not None
    assert np.isnan(loop.think_s).sum() == 3
    with pytest.raises(WorkloadError, match="users is 0"):
        closed_loop(trace, users=0)
    with pytest.raises(WorkloadError, match="think_cv is -1"):
        closed_loop(trace, users=1, think_s=1.0, think_cv=-1)


def test_steps_keep_sessions_whole_or_say_that_they_cannot():
    trace = some_chats(max_context_tokens=600)
    short = drop_long(trace, max_total_tokens=300)
    assert short.session is not None
    assert len(short) < len(trace)
    numbers = turn_numbers(short.session)
    assert all((numbers[short.session == s] == np.arange((short.session == s).sum())).all() for s in short.session)
    assert len(window(trace, duration_s=10.0)) < len(trace)
    with pytest.raises(TraceError, match="the step would tear a session"):
        window(trace, start_s=15.0)
    with pytest.raises(TraceError, match="the step would tear a session"):
        keep_share(trace, share=0.5)
    with pytest.raises(WorkloadError, match="repeat does not take a trace with sessions"):
        repeat(trace, times=2)
    with pytest.raises(WorkloadError, match="whose rate follows from its users"):
        scale_rate(closed_loop(trace, users=3), factor=2.0)
    fast = scale_rate(trace, factor=2.0)
    assert sorted(fast.arrival_s[np.isnan(fast.think_s)]) == pytest.approx(
        sorted(trace.arrival_s[np.isnan(trace.think_s)] / 2)
    )
    assert np.nanmax(fast.think_s) == np.nanmax(trace.think_s)
    clipped = clip_lengths(trace, max_prompt_tokens=100)
    assert [len(ids) for ids, cut in zip(clipped.hash_ids, trace.prompt_tokens > 100, strict=True) if not cut] == [
        len(ids) for ids, cut in zip(trace.hash_ids, trace.prompt_tokens > 100, strict=True) if not cut
    ]
    assert open_loop(trace).session is None
    assert all_at_once(trace).session is None


def test_a_client_thinks_from_the_answer_that_it_sees_to_the_prompt_that_it_sends():
    trace = some_chats()
    queued = into_queue(trace, FrontEnd(front_s=0.5, front_token_s=0.01, back_s=0.25))
    assert queued.think_s is not None
    row = {(*tuple(ids[-1:]), p): i for i, (ids, p) in enumerate(zip(trace.hash_ids, trace.prompt_tokens, strict=True))}
    for i, (ids, prompt) in enumerate(zip(queued.hash_ids, queued.prompt_tokens, strict=True)):
        before = trace.think_s[row[(*ids[-1:], prompt)]]
        assert queued.think_s[i] == pytest.approx(before + 0.75 + 0.01 * prompt, nan_ok=True)


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet", ".csv.gz"])
@pytest.mark.parametrize("users", [None, 3])
def test_a_file_with_sessions_reads_back_equal(tmp_path, suffix, users):
    trace = some_chats() if users is None else closed_loop(some_chats(), users=users, think_s=2.0, think_cv=1.0)
    assert read_trace(write_trace(trace, tmp_path / f"chats{suffix}")) == trace


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("a,,5,5,1.0\na,0,5,5,", "line 2, column 'think_s': no user to begin the session: '1.0'"),
        ("a,0,5,5,\na,,5,5,", "line 3, column 'arrival_s': missing value"),
        ("a,0,5,5,\na,,5,5,-1", "line 3, column 'think_s': negative: '-1'"),
        ("a,0,5,5,\na,,5,5,soon", "line 3, column 'think_s': not a number: 'soon'"),
        ("a,0,5,5,\na,9,5,5,\nb,,5,5,1", "line 3, column 'think_s': missing value"),
    ],
)
def test_a_malformed_session_names_its_line_and_column(tmp_path, rows, message):
    path = tmp_path / "chats.csv"
    path.write_text(f"session_id,arrival_s,prompt_tokens,output_tokens,think_s\n{rows}\n")
    with pytest.raises(TraceError, match=message):
        read_trace(path)


def test_a_session_ends_before_a_bad_row(tmp_path):
    path = tmp_path / "chats.csv"
    path.write_text(
        "session_id,arrival_s,prompt_tokens,output_tokens,think_s\na,0,5,5,\nb,1,5,5,\na,,0,5,1\na,,9,5,1\nb,,9,5,2\n"
    )
    trace = read_trace(path, on_bad_row="skip")
    assert trace.session is not None
    assert trace.prompt_tokens.tolist() == [5, 5, 9]
    assert any("left out 1 turns that come after a bad row" in step for step in trace.history)


def test_a_session_whose_first_turn_is_bad_does_not_wait_for_a_user(tmp_path):
    path = tmp_path / "chats.csv"
    path.write_text(
        "session_id,arrival_s,prompt_tokens,output_tokens,think_s\na,soon,5,5,\nb,1,6,5,\nb,9,7,5,\na,,8,5,1\n"
    )
    trace = read_trace(path, on_bad_row="skip")
    assert trace.prompt_tokens.tolist() == [6, 7]
    assert not any("missing value" in step for step in trace.history)


def test_what_takes_requests_at_given_times_only_refuses_sessions():
    with pytest.raises(ConfigError, match="a search takes requests at given times"):
        refuse_sessions(some_chats(), "a search")
    refuse_sessions(open_loop(some_chats()), "a search")
