"""Behavior of sim/traces/trace.py."""

from __future__ import annotations

import pickle
from dataclasses import FrozenInstanceError, replace

import numpy as np
import pytest

from sim.errors import TraceError
from sim.traces.trace import MAX_TOKENS, Trace, sorted_trace


def a_trace(**changes):
    columns = {"arrival_s": [0.0, 1.0, 1.0, 4.0], "prompt_tokens": [10, 20, 30, 40], "output_tokens": [1, 2, 3, 4]}
    return Trace(**{**columns, **changes})


def test_a_trace_cannot_be_changed_and_leaves_the_callers_arrays_writable():
    arrival_s = np.array([0.0, 1.0, 1.0, 4.0])
    ids = tuple(np.array([i, i + 1]) for i in range(4))
    trace = a_trace(arrival_s=arrival_s, hash_ids=ids)
    with pytest.raises(FrozenInstanceError):
        trace.name = "other"
    for array in (trace.arrival_s, trace.prompt_tokens, trace.output_tokens, trace.hash_ids[0]):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 7
    arrival_s[0] = 0.5
    ids[0][0] = 9
    assert trace.arrival_s[0] == 0.0
    assert trace.hash_ids[0][0] == 0


def test_the_types_are_float64_and_int64_whatever_came_in():
    trace = a_trace(arrival_s=[0, 1, 1, 4], prompt_tokens=np.array([1.0, 2.0, 3.0, 4.0]))
    assert trace.arrival_s.dtype == np.float64
    assert trace.prompt_tokens.dtype == trace.output_tokens.dtype == np.int64


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arrival_s": [0.0, 2.0, 1.0, 4.0]}, "arrival_s of request 2 is 1.0.*sort"),
        ({"arrival_s": [-1.0, 2.0, 3.0, 4.0]}, "request 0 is -1.0; it must be at least 0"),
        ({"arrival_s": [0.0, np.nan, 3.0, 4.0]}, "request 1 is nan; it must be a finite"),
        ({"arrival_s": [0.0, 1.0, 3.0, np.inf]}, "request 3 is inf"),
        ({"arrival_s": [0.0, 1.0, 3.0, 1.7e9]}, "subtract the start"),
        ({"arrival_s": [0.0, 1.0]}, "columns of different length"),
        ({"arrival_s": ["x", 1.0, 2.0, 3.0]}, "must hold numbers"),
        ({"arrival_s": [[0.0, 1.0], [2.0, 3.0]]}, "2 dimensions"),
        ({"prompt_tokens": [1, 2, 0, 4]}, "prompt_tokens of request 2 is 0; it must be at least 1"),
        ({"output_tokens": [1, 2, -3, 4]}, "output_tokens of request 2 is -3"),
        ({"output_tokens": [1, 2, 3, MAX_TOKENS + 1]}, "at most 1,000,000,000"),
        ({"output_tokens": [1, 2, 2.5, 4]}, "2.5; it must be a whole number"),
        ({"output_tokens": [1, 2, np.nan, 4]}, "nan; it must be a whole number"),
        ({"output_tokens": ["1", "2", "3", "4"]}, "it must hold whole numbers"),
        ({"hash_ids": (np.array([1]),)}, "hash_ids has 1 entries for 4 requests"),
        ({"hash_ids": (np.array([1]), np.array([-1]), np.array([]), np.array([]))}, "hash_ids holds -1"),
        ({"time_quantum_s": -1.0}, "time_quantum_s is -1.0"),
    ],
)
def test_a_wrong_column_is_an_error_that_names_request_value_and_what_is_allowed(changes, message):
    with pytest.raises(TraceError, match=message):
        a_trace(**changes)


def test_a_trace_without_requests_is_an_error():
    with pytest.raises(TraceError, match="at least one request"):
        Trace(arrival_s=[], prompt_tokens=[], output_tokens=[])


def test_traces_are_equal_by_their_requests_not_by_where_they_came_from():
    ids = tuple(np.array([i]) for i in range(4))
    assert a_trace() == a_trace(name="other", source="file", history=("step",), time_quantum_s=1.0)
    assert a_trace() != a_trace(output_tokens=[1, 2, 3, 5])
    assert a_trace() != a_trace(hash_ids=ids)
    assert a_trace(hash_ids=ids) != a_trace(hash_ids=(*ids[:3], np.array([7])))
    assert a_trace(hash_ids=ids) == a_trace(hash_ids=ids)
    assert a_trace() != "a trace"
    assert len({a_trace(), a_trace(name="other")}) == 1


def test_the_content_hash_is_that_of_the_requests_and_does_not_change_between_versions():
    ids = tuple(np.array([i]) for i in range(4))
    moved = (np.array([0, 1]), np.array([]), np.array([2]), np.array([3]))
    hashes = [
        t.content_hash()
        for t in (a_trace(), a_trace(prompt_tokens=[10, 20, 30, 41]), a_trace(hash_ids=ids), a_trace(hash_ids=moved))
    ]
    assert len(set(hashes)) == 4
    assert a_trace(name="x").content_hash() == hashes[0]
    assert a_trace(arrival_s=[-0.0, 1.0, 1.0, 4.0]).content_hash() == hashes[0]
    assert hashes[0] == "63a84602639690454f946de4cf805675ace03a770a0960f430b63936b64b81de"


def test_statistics_match_their_definitions():
    trace = a_trace()
    assert len(trace) == 4
    assert trace.duration_s == 4.0
    assert trace.mean_rate_rps == 1.0
    assert trace.interarrival_cv == pytest.approx(np.std([1, 0, 3]) / np.mean([1, 0, 3]))
    assert trace.peak_rate_rps(1.0) == 2.0
    assert trace.peak_rate_rps(1.5) == 2.0
    assert trace.peak_rate_rps(2.0) == 1.5


def test_statistics_without_a_gap_are_nan_and_raise_no_warning():
    one = Trace(arrival_s=[3.0], prompt_tokens=[1], output_tokens=[1])
    assert one.duration_s == 0.0
    assert np.isnan(one.mean_rate_rps)
    assert np.isnan(one.interarrival_cv)
    assert np.isnan(a_trace(arrival_s=[1.0, 1.0, 1.0, 1.0]).interarrival_cv)


def test_sorted_trace_sorts_by_arrival_and_keeps_the_order_of_ties():
    ids = tuple(np.array([i]) for i in range(4))
    trace = sorted_trace(
        arrival_s=[5.0, 1.0, 5.0, 1.0], prompt_tokens=[1, 2, 3, 4], output_tokens=[1, 2, 3, 4], hash_ids=ids, name="n"
    )
    assert trace.arrival_s.tolist() == [1.0, 1.0, 5.0, 5.0]
    assert trace.prompt_tokens.tolist() == [2, 4, 1, 3]
    assert [row.tolist() for row in trace.hash_ids] == [[1], [3], [0], [2]]
    assert trace.name == "n"


def test_a_trace_survives_pickling_and_replace():
    trace = a_trace(history=("one",))
    assert pickle.loads(pickle.dumps(trace)) == trace
    assert replace(trace, name="b").with_history("two").history == ("one", "two")


def test_taking_nothing_is_an_error():
    with pytest.raises(TraceError, match="at least one request"):
        a_trace().take(np.zeros(4, dtype=bool))
