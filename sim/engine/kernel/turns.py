"""Turns of sessions: requests that arrive when others have ended (sim/traces/sessions.py).

``due_turns`` is a binary heap of the requests whose time is known, the earliest first and, at one time, the first of
the trace. A request that ends adds the one that follows it. ``arrival_order`` lists requests as they arrive, because
the rows of ``requests`` are in the order of the trace. A replica of a cluster only reports which turns have ended:
another replica may serve the next.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from sim.compiled import compiled
from sim.engine.kernel.layout import Table
from sim.engine.kernel.state import (
    REPORTED,
    arrival_order_of,
    counters_of,
    due_turns_of,
    ended_turns_of,
    requests_of,
    session_starts_of,
    turns_of,
)


@compiled(inline=True)
def _before(due: Any, a: int, b: int) -> bool:
    """Return whether place a of a heap (``DUE_TURN`` rows) comes before place b."""
    return bool(due[a].at_s < due[b].at_s or (due[a].at_s == due[b].at_s and due[a].request < due[b].request))


@compiled(inline=True)
def _exchange(due: Any, a: int, b: int) -> None:
    at_s, request = due[a].at_s, due[a].request
    due[a].at_s, due[a].request = due[b].at_s, due[b].request
    due[b].at_s, due[b].request = at_s, request


@compiled()
def _add_due(due: Any, count: int, r: int, at_s: float) -> None:
    """Add request r, due at a time, to a heap of ``count`` requests."""
    due[count].at_s, due[count].request = at_s, r
    place = count
    while place > 0 and _before(due, place, (place - 1) // 2):
        _exchange(due, place, (place - 1) // 2)
        place = (place - 1) // 2


@compiled()
def _drop_first(due: Any, count: int) -> None:
    """Remove the first request of a heap of ``count`` requests."""
    left = count - 1
    due[0].at_s, due[0].request = due[left].at_s, due[left].request
    place = 0
    while 2 * place + 1 < left:
        child = 2 * place + 1
        if child + 1 < left and _before(due, child + 1, child):
            child += 1
        if not _before(due, child, place):
            break
        _exchange(due, place, child)
        place = child


@compiled()
def _take_turn(s: Table) -> int:
    """Remove the request that arrives next, and note its arrival; return it."""
    n, due = counters_of(s), due_turns_of(s)
    r = due[0].request
    requests_of(s)[r].arrival_s = due[0].at_s
    arrival_order_of(s)[n.arrived] = r
    _drop_first(due, n.due_count)
    n.due_count -= 1
    n.next_arrival_s = due[0].at_s if n.due_count > 0 else np.inf
    return int(r)


@compiled()
def _end_turn(s: Table, r: int, ended_s: float) -> None:
    """Let the request that follows r arrive: the next turn of its session, or of one that waits for a user."""
    n, starts = counters_of(s), session_starts_of(s)
    if n.in_sessions == REPORTED:
        ended_turns_of(s)[n.ended_count] = r
        n.ended_count += 1
        return
    after = turns_of(s)[r].after
    if after < 0 and n.next_session < len(starts):
        after = starts[n.next_session]
        n.next_session += 1
    if after >= 0:
        _add_due(due_turns_of(s), n.due_count, after, ended_s + turns_of(s)[after].think_s)
        n.due_count += 1
        n.next_arrival_s = due_turns_of(s)[0].at_s
