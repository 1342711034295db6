"""The requests of a window of ``ServeTrace``, and which turns of sessions are among them.

A window of a trace with sessions (sim/traces/sessions.py) is cut at its rate: sessions begin ``rate`` times as fast,
and users think as long as before. Of each session it holds the turns that would arrive in it if every answer came at
once.

* A session that began before the window goes on in it: the first of its turns in the window arrives at that time, and
  each later one follows the answer before it. Without prompts that were computed before the window, its first turn
  finds nothing in a prefix cache.
* Turns that would arrive after the window are left out. A turn in it that comes late, because answers took long, is
  served all the same: an episode ends when every request has ended.
* A session belongs to the split in which it begins, so no session of training returns in validation or test, and a
  window near the start of a split has fewer sessions that go on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sim.engine.protocol import Sessions
from sim.errors import ConfigError
from sim.traces.sessions import next_turns, waiting_sessions
from sim.traces.trace import Trace, sorted_trace
from sim.types import Floats, Ints


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowRequests:
    """Requests in order of arrival, as columns of a ``Trace``, of length n; n may be 0.

    arrival_s: seconds since the start of the window. session, think_s: None where the source has none. hash_ids: None
        where it has none, or they were not asked for.
    """

    arrival_s: Floats
    prompt_tokens: Ints
    output_tokens: Ints
    hash_ids: tuple[Ints, ...] | None = None
    session: Ints | None = None
    think_s: Floats | None = None

    def __len__(self) -> int:
        return len(self.arrival_s)

    @property
    def sessions(self) -> Sessions | None:
        """Which requests follow which; None without sessions."""
        if self.session is None or self.think_s is None or not len(self):
            return None
        return Sessions(next_turns(self.session, self.think_s), self.think_s, np.zeros(0, dtype=np.int64))


@dataclass(frozen=True, slots=True, kw_only=True)
class Chains:
    """Turns that follow each other without a pause of another kind than thinking.

    number: int64[n], of the chain of each request of a trace. begun_s: float64[n], when the chain begins.
    A session is one chain, or several if later turns have times of their own.
    """

    number: Ints
    begun_s: Floats


def check_windows_of(trace: Trace, where: str) -> None:
    """Check that windows can be cut out of a trace.

    Args:
        where: what names the trace, for the error.
    Raises:
        ConfigError: for a closed loop.
    """
    if trace.session is None or trace.think_s is None:
        return
    if len(waiting_sessions(trace.session, trace.think_s)):
        raise ConfigError(
            f"{where}: {trace.name} is a closed loop, in which sessions wait for a user; its rate follows from the "
            "answers, so no window of it can be cut at a rate. Take sessions that begin at times of their own, such as "
            "trace: chats, or the step sim.traces.loops.open_loop, under which no request waits for another"
        )


def chains_of(trace: Trace) -> Chains | None:
    """Return the chains of a trace whose sessions begin at times of their own; None without sessions."""
    if trace.session is None or trace.think_s is None:
        return None
    order = np.argsort(trace.session, kind="stable")
    own = np.isnan(trace.think_s[order])
    number, begun_s = np.empty(len(trace), dtype=np.int64), np.empty(len(trace))
    number[order] = np.cumsum(own) - 1
    begun_s[order] = trace.arrival_s[order][np.maximum.accumulate(np.where(own, np.arange(len(own)), 0))]
    return Chains(number=number, begun_s=begun_s)


def cut(
    trace: Trace,
    chains: Chains | None,
    *,
    start_s: float,
    rate: float,
    window_s: float,
    from_s: float,
    with_ids: bool = False,
) -> WindowRequests:
    """Return the requests of a window.

    Args:
        chains: of the trace (``chains_of``). start_s: start of the window in the trace, in seconds.
        rate: speed-up of arrivals. window_s: length of the window once it is sped up.
        from_s: start of the split in the trace, in seconds; sessions that began earlier are left out.
        with_ids: whether hash ids are returned; to collect them takes longer than all else.
    """
    session = think_s = None
    if chains is None or trace.think_s is None:
        first, last = np.searchsorted(trace.arrival_s, (start_s, start_s + window_s * rate)).tolist()
        rows = np.arange(first, last)
        arrival_s = (trace.arrival_s[first:last] - start_s) / rate
    else:
        at_s = (chains.begun_s - start_s) / rate + (trace.arrival_s - chains.begun_s)
        rows = np.flatnonzero((at_s >= 0.0) & (at_s < window_s) & (chains.begun_s >= from_s))
        rows = rows[np.argsort(at_s[rows], kind="stable")]
        arrival_s, session, think_s = at_s[rows], chains.number[rows], trace.think_s[rows]
        think_s[np.unique(session, return_index=True)[1]] = math.nan
    return WindowRequests(
        arrival_s=arrival_s,
        prompt_tokens=trace.prompt_tokens[rows],
        output_tokens=trace.output_tokens[rows],
        hash_ids=tuple(trace.hash_ids[row] for row in rows.tolist()) if with_ids and trace.hash_ids else None,
        session=session,
        think_s=think_s,
    )


def joined(parts: Sequence[WindowRequests], hash_block_tokens: int | None = None) -> Trace:
    """Return the requests of several windows as one trace; at one time they keep the order of the windows.

    Sessions of different windows are different sessions; where only some have any, each other request is one.

    Args:
        hash_block_tokens: prompt tokens per hash id; None leaves ids out.
    """
    arrival_s, prompts, outputs = (
        np.concatenate([getattr(part, name) for part in parts])
        for name in ("arrival_s", "prompt_tokens", "output_tokens")
    )
    session = think_s = None
    if any(part.session is not None for part in parts):
        numbers, thinks_s, count = [], [], 0
        for part in parts:
            own = np.arange(len(part)) if part.session is None else part.session
            numbers.append(np.unique(own, return_inverse=True)[1].astype(np.int64) + count)
            thinks_s.append(np.full(len(part), math.nan) if part.think_s is None else part.think_s)
            count += len(part)
        session, think_s = np.concatenate(numbers), np.concatenate(thinks_s)
    hash_ids = None
    if hash_block_tokens is not None:
        hash_ids = [ids for part in parts for ids in part.hash_ids or ()]
    return sorted_trace(
        arrival_s=arrival_s,
        prompt_tokens=prompts,
        output_tokens=outputs,
        hash_ids=hash_ids,
        session=session,
        think_s=think_s,
        hash_block_tokens=hash_block_tokens,
    )


__all__ = ["Chains", "WindowRequests", "chains_of", "check_windows_of", "cut", "joined"]
