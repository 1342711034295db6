"""Turns of a conversation that a file places by a delay after the turn before, not by a time of their own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sim.traces.readers.rows import Rows, TimeUnit
from sim.traces.readers.table import cell_text
from sim.traces.sessions import earliest_arrivals, first_turns, turns_to_keep
from sim.types import Floats, Ints


@dataclass(frozen=True, slots=True)
class SessionColumns:
    """The columns of ``Trace`` that say when requests arrive, one entry per row of a file."""

    arrival_s: Floats
    session: Ints
    think_s: Floats


def think_sessions(
    rows: Rows, own_s: Floats, think_s: Floats, *, time: str, session: str, think: str
) -> SessionColumns:
    """Return the sessions of rows that state think times.

    Args:
        own_s, think_s: the columns ``time`` and ``think``, NaN for an empty cell.
        time, session, think: the names of the columns; a row without a session is one of its own.
    """
    numbers = _session_numbers(rows, session)
    thinks = ~np.isnan(think_s)
    rows.reject(~thinks & np.isnan(own_s), time, "missing value", f"a time, or a number in {think}")
    good = turns_to_keep(numbers, ~rows.is_bad)  # a session ends before a bad row
    first = np.zeros(len(numbers), dtype=bool)
    first[np.flatnonzero(good)[first_turns(numbers[good])]] = True
    waiting, users = first & thinks, first & ~thinks
    if not users.any():
        rows.reject(waiting, think, "no user to begin the session", f"an empty {think} in the first row of each user")
    elif waiting.any():
        rows.reject(
            good & ~first & ~thinks, think, "missing value", "a number, as other sessions wait for this one to end"
        )
    usable = good & ~rows.is_bad
    arrival_s = np.where(np.isnan(own_s), 0.0, own_s)
    arrival_s[usable] = earliest_arrivals(arrival_s[usable], numbers[usable], think_s[usable])
    return SessionColumns(arrival_s, numbers, think_s)


def _session_numbers(rows: Rows, name: str) -> Ints:
    """Return the session of each row: its number, or if one is no number, that of its first appearance. int64[rows].

    A row without a session is one of its own.
    """
    count = len(rows.table.line)
    if not rows.has(name):
        return np.arange(count)
    known: dict[str, int] = {}
    texts = [cell_text(cell).strip() for cell in rows.table.columns[name]]
    if all(text.isascii() and text.isdigit() and len(text) <= 18 for text in texts):
        return np.array([int(text) for text in texts], dtype=np.int64)
    return np.array([known.setdefault(text or f" {i}", len(known)) for i, text in enumerate(texts)], dtype=np.int64)


def answer_ids(
    hash_ids: Sequence[Ints], after: Ints, prompt_tokens: Ints, output_tokens: Ints, block_tokens: int
) -> list[Ints]:
    """Return hash ids that cover each prompt and its answer, taken from the prompt of the turn that follows.

    A prompt that begins with all of the one before it, and is long enough for its answer, is taken to hold that answer
    next. Partly filled last blocks are left out.

    Args:
        hash_ids: of the prompts. after: the request that follows each; -1 for none.
    """
    found = []
    for i, (ids, following) in enumerate(zip(hash_ids, after.tolist(), strict=True)):
        full = int(prompt_tokens[i]) // block_tokens
        said = int(prompt_tokens[i] + output_tokens[i])
        ids = ids[:full]
        if following >= 0 and prompt_tokens[following] >= said:
            later = hash_ids[following]
            if np.array_equal(later[:full], ids):
                ids = later[: said // block_tokens]
        found.append(ids)
    return found


def session_arrivals(
    rows: Rows, own_s: Floats, history: list[str], *, time: str, session: str, delay: str, unit: TimeUnit
) -> SessionColumns:
    """Return sessions in which a turn without a time arrives its delay after the turn before it has ended.

    A turn with a time arrives then, whatever the server does.

    Args:
        own_s: the column ``time`` from ``Rows.times``, NaN for a turn without one.
        history: gets their number.
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
        history.append(f"{placed:,} later turns of sessions arrive their {delay} after the answer before them")
    think_s = np.where(np.isnan(own_s) & ~rows.is_bad, delay_s, np.nan)
    return SessionColumns(np.where(rows.is_bad, 0.0, arrival_s), _session_numbers(rows, session), think_s)


def _delays(rows: Rows, name: str, unit: TimeUnit) -> Floats:
    """Return the delays in seconds; 0 where a row has none."""
    if not rows.has(name):
        return np.zeros(len(rows.table.line))
    return np.nan_to_num(rows.times(name, unit=unit, rebase=False, missing=True))
