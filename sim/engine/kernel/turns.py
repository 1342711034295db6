"""Turns of sessions: requests that arrive when others have ended (sim/traces/sessions.py).

``due_turns`` is a binary heap of the requests whose time is known, the earliest first and, at one time, the first of
the trace. A request that ends adds the one that follows it. ``arrival_order`` lists requests as they arrive, because
the rows of ``requests`` are in the order of the trace.
"""

from __future__ import annotations

import numpy as np

from sim.compiled import compiled
from sim.engine.kernel.layout import Table
from sim.engine.kernel.state import (
    arrival_order_of,
    counters_of,
    due_turns_of,
    requests_of,
    session_starts_of,
    turns_of,
)


@compiled(inline=True)
def _before(s: Table, a: int, b: int) -> bool:
    """Return whether place a of the heap comes before place b."""
    due = due_turns_of(s)
    return bool(due[a].at_s < due[b].at_s or (due[a].at_s == due[b].at_s and due[a].request < due[b].request))


@compiled(inline=True)
def _exchange(s: Table, a: int, b: int) -> None:
    due = due_turns_of(s)
    at_s, request = due[a].at_s, due[a].request
    due[a].at_s, due[a].request = due[b].at_s, due[b].request
    due[b].at_s, due[b].request = at_s, request


@compiled()
def _add_turn(s: Table, r: int, at_s: float) -> None:
    """Let request r arrive at a time."""
    n, due = counters_of(s), due_turns_of(s)
    place = n.due_count
    due[place].at_s, due[place].request = at_s, r
    n.due_count = place + 1
    while place > 0 and _before(s, place, (place - 1) // 2):
        _exchange(s, place, (place - 1) // 2)
        place = (place - 1) // 2
    n.next_arrival_s = due[0].at_s


@compiled()
def _take_turn(s: Table) -> int:
    """Remove the request that arrives next, and note its arrival; return it."""
    n, due = counters_of(s), due_turns_of(s)
    r = due[0].request
    requests_of(s)[r].arrival_s = due[0].at_s
    arrival_order_of(s)[n.arrived] = r
    n.due_count -= 1
    due[0].at_s, due[0].request = due[n.due_count].at_s, due[n.due_count].request
    place = 0
    while 2 * place + 1 < n.due_count:
        child = 2 * place + 1
        if child + 1 < n.due_count and _before(s, child + 1, child):
            child += 1
        if not _before(s, child, place):
            break
        _exchange(s, child, place)
        place = child
    n.next_arrival_s = due[0].at_s if n.due_count > 0 else np.inf
    return int(r)


@compiled()
def _end_turn(s: Table, r: int, ended_s: float) -> None:
    """Let the request that follows r arrive: the next turn of its session, or of one that waits for a user."""
    n, starts = counters_of(s), session_starts_of(s)
    after = turns_of(s)[r].after
    if after < 0 and n.next_session < len(starts):
        after = starts[n.next_session]
        n.next_session += 1
    if after >= 0:
        _add_turn(s, after, ended_s + turns_of(s)[after].think_s)
