"""Closed loops: workload steps that let users wait for answers, or let no request wait (sim/traces/sessions.py)."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from sim.errors import WorkloadError
from sim.traces.sessions import earliest_arrivals, first_turns
from sim.traces.trace import Trace, sorted_trace
from sim.types import Floats


def closed_loop(
    trace: Trace,
    *,
    users: int,
    think_s: float = 0.0,
    think_cv: float = 0.0,
    ramp_up_s: float = 0.0,
    seed: int = 0,
) -> Trace:
    """Return the requests of a trace, sent by users each of whom waits for the answer before the next request.

    User k of n begins at k / n of the ramp-up. A user whose request has ended takes the next one of the trace, as
    benchmark clients with a limit of concurrent requests do. In a trace with sessions they take the next session, and
    think times within sessions stay. The arrivals of the trace are not used.

    Args:
        users: how many. think_s: mean seconds from the end of a user's request to the next.
        think_cv: their coefficient of variation, of Gamma distributed times: 0 for a constant, 1 for exponential.
        ramp_up_s: seconds in which the users begin.
    Raises:
        WorkloadError: for a number out of range.
    """
    if isinstance(users, bool) or not isinstance(users, int) or users < 1:
        raise WorkloadError(f"users is {users!r}; it must be a whole number from 1")
    _check_seconds("ramp_up_s", ramp_up_s)
    if trace.session is None or trace.think_s is None:
        session, pauses_s, first = np.arange(len(trace)), np.full(len(trace), math.nan), np.ones(len(trace), dtype=bool)
    else:
        pauses_s, first = trace.think_s.copy(), first_turns(trace.session)
        # Numbered in the order in which the trace begins them, for that is the order in which users take them.
        _, begins, which = np.unique(trace.session, return_index=True, return_inverse=True)
        session = np.argsort(np.argsort(begins))[which]
        if (np.isnan(pauses_s) & ~first).any():
            raise WorkloadError(f"{trace.name} has later turns with a time of their own; they cannot wait for users")
    begins = np.flatnonzero(first)
    drawn_s = think_times(np.random.default_rng(seed), len(begins), think_s=think_s, think_cv=think_cv)
    count = min(users, len(begins))
    drawn_s[:count] = math.nan
    pauses_s[begins] = drawn_s
    arrival_s = np.zeros(len(trace))
    arrival_s[begins[:count]] = ramp_up_s * np.arange(count) / users
    pause = f"thinking {think_s:g} s" + (f" (CV {think_cv:g}, seed={seed})" if think_cv else "")
    step = f"{users:,} users in a closed loop, {pause}, all there after {ramp_up_s:g} s"
    return sessions_from(replace(trace, session=session, think_s=pauses_s), arrival_s, step)


def open_loop(trace: Trace) -> Trace:
    """Return the requests of a trace with sessions at the earliest times at which they could arrive.

    That is, as if every answer came at once: no request waits for another, so turns of a session may overlap.
    """
    return replace(trace, session=None, think_s=None).with_history("open loop: no turn waits for an answer")


def think_times(rng: np.random.Generator, count: int, *, think_s: float, think_cv: float) -> Floats:
    """Return Gamma distributed think times with this mean and coefficient of variation: float64[count].

    Raises:
        WorkloadError: for a number out of range.
    """
    _check_seconds("think_s", think_s)
    if not (think_cv == 0 or 0.01 <= think_cv <= 100):
        raise WorkloadError(f"think_cv is {think_cv}; it must be 0 for equal times, or from 0.01 to 100")
    if think_cv == 0 or think_s == 0:
        return np.full(count, float(think_s))
    return rng.gamma(1 / think_cv**2, think_s * think_cv**2, size=count)


def sessions_from(trace: Trace, arrival_s: Floats, step: str) -> Trace:
    """Return a trace with sessions whose requests without a think time arrive at other times: float64[n]."""
    assert trace.session is not None
    assert trace.think_s is not None
    return sorted_trace(
        arrival_s=earliest_arrivals(arrival_s, trace.session, trace.think_s),
        prompt_tokens=trace.prompt_tokens,
        output_tokens=trace.output_tokens,
        hash_ids=trace.hash_ids,
        session=trace.session,
        think_s=trace.think_s,
        name=trace.name,
        source=trace.source,
        history=(*trace.history, step),
        time_quantum_s=trace.time_quantum_s,
        hash_block_tokens=trace.hash_block_tokens,
    )


def _check_seconds(name: str, value: float) -> None:
    if not (math.isfinite(value) and value >= 0):
        raise WorkloadError(f"{name} is {value}; it must be a finite number of seconds, at least 0")
