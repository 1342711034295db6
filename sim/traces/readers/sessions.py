"""Turns of a conversation that a file places by a delay after the turn before, not by a time of their own."""

from __future__ import annotations

import logging

import numpy as np

from sim.traces.readers.rows import Rows, TimeUnit
from sim.traces.readers.table import cell_text
from sim.types import Floats

log = logging.getLogger(__name__)


def session_arrivals(
    rows: Rows, own_s: Floats, history: list[str], *, time: str, session: str, delay: str, unit: TimeUnit
) -> Floats:
    """Return arrivals in which a turn without a time arrives its delay after the turn before it.

    The delay really counts from the end of the turn before, which is not known before that turn is served. It counts
    from that turn's arrival here, so turns arrive too early and may overlap; a warning says so and counts them.

    Args:
        own_s: the column ``time`` from ``Rows.times``, NaN for a turn without one.
        history: gets the warning.
        time, session, delay: the names of the columns; a turn without a delay follows at once.
    """
    delay_s = _delays(rows, delay, unit)
    sessions = [cell_text(cell).strip() for cell in rows.table.columns[session]] if rows.has(session) else None
    arrival_s = own_s.copy()
    last_s: dict[str, float] = {}
    orphan = np.zeros(len(own_s), dtype=bool)
    early = np.zeros(len(own_s), dtype=bool)
    placed = 0
    for i, (own, bad) in enumerate(zip(own_s.tolist(), rows.is_bad.tolist(), strict=True)):
        name = sessions[i] if sessions is not None else ""
        if bad:
            last_s.pop(name, None)
            continue
        if np.isnan(own):
            if not name or name not in last_s:
                orphan[i], arrival_s[i] = True, 0.0
                continue
            own = arrival_s[i] = last_s[name] + delay_s[i]
            placed += 1
        elif name and name in last_s and own < last_s[name]:
            early[i] = True
            continue
        last_s[name] = own
    rows.reject(orphan, time, "missing value", "a time, or an earlier turn of the same session that has one")
    rows.reject(early, time, "before the turn ahead of it", "turns of a session in order of time")
    if placed:
        history.append(
            f"{placed:,} later turns of sessions arrive their {delay} after the arrival of the turn before: the end of "
            "that turn, from which the delay counts, is not known before it is served, so they arrive too early"
        )
        log.warning("%s: %s", rows.table.path, history[-1])
    return np.where(rows.is_bad, 0.0, arrival_s)


def _delays(rows: Rows, name: str, unit: TimeUnit) -> Floats:
    """Return the delays in seconds; 0 where a row has none."""
    if not rows.has(name):
        return np.zeros(len(rows.table.line))
    return np.nan_to_num(rows.times(name, unit=unit, rebase=False, missing=True))
