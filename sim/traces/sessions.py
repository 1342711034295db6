"""Sessions: requests that arrive when the answer before them has ended, and users who start one session after another.

A trace with sessions has two columns more. ``session`` numbers the session of each request; its requests, in the order
of the trace, are its **turns**. ``think_s`` says when a turn arrives:

* a number: that long after the turn before it has ended. The first turn of a session arrives that long after a session
  that nothing else follows has ended: its user begins the waiting session with the lowest number;
* NaN: at ``arrival_s``, whatever the server does.

So the sessions whose first turn has NaN are the users of a closed loop, and all others wait for one of them. A rejected
turn ends when it is rejected; the next one comes all the same, so every policy gets the same requests.
"""

from __future__ import annotations

import heapq

import numpy as np
from numpy.typing import NDArray

from sim.errors import TraceError
from sim.types import Floats, Ints

NO_TURN = -1
"""No request follows this one."""


def next_turns(session: Ints, think_s: Floats) -> Ints:
    """Return for each request the one that arrives after it has ended, or ``NO_TURN``: int64[n]."""
    after = np.full(len(session), NO_TURN, dtype=np.int64)
    order = np.argsort(session, kind="stable")
    before, later = order[:-1], order[1:]
    follows = (session[before] == session[later]) & ~np.isnan(think_s[later])
    after[before[follows]] = later[follows]
    return after


def first_turns(session: Ints) -> NDArray[np.bool_]:
    """Return whether each request is the first of its session: bool[n]."""
    first = np.zeros(len(session), dtype=np.bool_)
    first[np.unique(session, return_index=True)[1]] = True
    return first


def waiting_sessions(session: Ints, think_s: Floats) -> Ints:
    """Return the first requests of the sessions that wait for a user, in the order in which they begin.

    That is the order of their numbers: the rows of a trace are in the order of ``arrival_s``.
    """
    found = np.flatnonzero(first_turns(session) & ~np.isnan(think_s))
    return found[np.argsort(session[found], kind="stable")]


def turn_numbers(session: Ints) -> Ints:
    """Return the number of each request within its session, from 0: int64[n]."""
    order = np.argsort(session, kind="stable")
    starts = np.flatnonzero(np.diff(session[order], prepend=session[order[0]] - 1))
    numbers = np.empty(len(session), dtype=np.int64)
    numbers[order] = np.arange(len(session)) - np.repeat(starts, np.diff(np.append(starts, len(session))))
    return numbers


def earliest_arrivals(arrival_s: Floats, session: Ints, think_s: Floats) -> Floats:
    """Return when each request would arrive if every answer came at once: float64[n].

    Args:
        arrival_s: float64[n], read only where ``think_s`` is NaN.
        session, think_s: of requests whose turns are in order within each session.
    """
    after, waiting = next_turns(session, think_s).tolist(), iter(waiting_sessions(session, think_s).tolist())
    found, thinks = np.array(arrival_s, dtype=np.float64), think_s.tolist()
    due = [(float(arrival_s[i]), i) for i in np.flatnonzero(np.isnan(think_s)).tolist()]
    heapq.heapify(due)
    while due:
        now_s, i = heapq.heappop(due)
        found[i] = now_s
        follower = after[i] if after[i] != NO_TURN else next(waiting, NO_TURN)
        if follower != NO_TURN:
            heapq.heappush(due, (now_s + thinks[follower], follower))
    return found


def check_sessions(session: Ints, think_s: Floats) -> None:
    """Check the columns of a trace.

    Raises:
        TraceError: for a think time below 0 or infinite; for sessions that wait although there is no user to begin
            them; and for a turn with a time of its own next to sessions that wait, for it would be one user more.
    """
    wrong = np.flatnonzero(~np.isnan(think_s) & ~((think_s >= 0) & np.isfinite(think_s)))
    if len(wrong):
        raise TraceError(
            f"think_s of request {wrong[0]} is {think_s[wrong[0]]}; it must be a number of seconds from 0, or NaN for "
            "a request that arrives at arrival_s"
        )
    waiting, first, own = waiting_sessions(session, think_s), first_turns(session), np.isnan(think_s)
    if not len(waiting):
        return
    if not (own & first).any():
        raise TraceError(
            f"{len(waiting)} sessions wait for a user and none begins at a time of its own; leave think_s of the first "
            "turn of as many sessions empty (NaN) as there are users"
        )
    if (own & ~first).any():
        at = int(np.flatnonzero(own & ~first)[0])
        raise TraceError(
            f"request {at} is a later turn with a time of its own, and {len(waiting)} sessions wait for a user: give "
            "it a think time"
        )


def turns_to_keep(session: Ints, keep: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return ``keep`` without the turns that come after one that is left out: a session ends there. bool[n]."""
    order = np.argsort(session, kind="stable")
    starts = np.flatnonzero(np.diff(session[order], prepend=session[order[0]] - 1))
    lost = np.cumsum(~keep[order])
    lost_before: Ints = np.repeat(lost[starts] - ~keep[order][starts], np.diff(np.append(starts, len(session))))
    kept = np.zeros(len(session), dtype=np.bool_)
    kept[order] = lost == lost_before
    return kept


def check_taken(session: Ints, think_s: Floats, index: Ints) -> None:
    """Check that turns that stay keep the turn that they follow.

    Raises:
        TraceError: if one does not.
    """
    keep = np.zeros(len(session), dtype=np.bool_)
    keep[index] = True
    cut = np.flatnonzero(keep & ~turns_to_keep(session, keep) & ~np.isnan(think_s))
    if len(cut):
        raise TraceError(
            f"request {cut[0]} stays, but the turn that it follows does not: the step would tear a session. Leave the "
            "step out, or take one that keeps sessions together, such as drop_long or a window from 0 s on"
        )
