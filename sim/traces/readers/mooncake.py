"""Mooncake: requests to Kimi with the ids of their shareable prefix blocks; one JSON object per line.

Other tools write files of this kind: without ids, with hashes as ids, with Unix times, or with sessions whose later
turns have a delay instead of a time.
"""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import numpy as np

from sim.errors import TraceError
from sim.traces.readers.files import MAX_BYTES, MAX_ROWS, OnBadRow, TraceFile
from sim.traces.readers.hash_ids import check_number_of_ids, read_hash_ids
from sim.traces.readers.rows import Rows, TimeUnit, read_table
from sim.traces.readers.sessions import answer_ids, session_arrivals
from sim.traces.sessions import next_turns
from sim.traces.trace import HASH_BLOCK_TOKENS, MAX_TOKENS, Trace
from sim.types import Floats, Ints

log = logging.getLogger(__name__)

ORIGIN = (
    "https://github.com/kvcache-ai/Mooncake (FAST25-release/traces, commit 3b5a594133958449a1feaf1c9e0fc1b553e34a28)"
)
COLUMNS = ("timestamp", "input_length", "output_length")
OPTIONAL = ("hash_ids", "session_id", "delay")


def read_mooncake(
    path: str | Path,
    *,
    time_quantum_s: float = 3.0,
    time_unit: TimeUnit | None = None,
    block_tokens: int = HASH_BLOCK_TOKENS,
    on_bad_row: OnBadRow = "error",
    sort: bool = False,
    max_rows: int = MAX_ROWS,
    max_bytes: int = MAX_BYTES,
    name: str = "mooncake",
) -> Trace:
    """Return a Mooncake trace with its prefix ids; the first arrival is at time 0.

    Args:
        path: JSON lines (plain or packed) with ``timestamp``, ``input_length``, ``output_length`` and, optionally,
            ``hash_ids`` (whole numbers or text), ``session_id`` and ``delay``. A later turn of a session may have a
            delay instead of a timestamp: it arrives that long after the turn before it has ended.
        time_quantum_s: step of the clock. The conversation trace arrives in batches every 3 s (gaps of 2999 to
            3001 ms), so it does not show bursts shorter than 3 s: spread its arrivals with
            ``sim.traces.transforms.spread_ties``, or state that batches are replayed. The synthetic trace has a clock
            of 1 ms: set 0.
        time_unit: unit of ``timestamp`` and ``delay``; None takes full ms, and refuses timestamps with a fraction.
        block_tokens: prompt tokens per id; the number of ids must fit ``input_length``.
        on_bad_row, sort, max_rows, max_bytes, name: as ``read_azure``.
    Raises:
        TraceError: if the file or a row of it cannot be used, for example if the number of ids differs from the
            number of 512-token blocks of the prompt.
    Source:
        Qin et al., Mooncake (FAST 2025); kvcache-ai/Mooncake, Apache-2.0.
    """
    file = TraceFile(path=path, on_bad_row=on_bad_row, max_rows=max_rows, max_bytes=max_bytes, origin=ORIGIN)
    rows = Rows(read_table(file, required=COLUMNS, optional=OPTIONAL))
    return turns_trace(
        rows, time_unit=time_unit, block_tokens=block_tokens, sort=sort, name=name, time_quantum_s=time_quantum_s
    )


def turns_trace(
    rows: Rows,
    *,
    time_unit: TimeUnit | None,
    block_tokens: int,
    sort: bool,
    name: str,
    time_quantum_s: float = 0.0,
    characters_per_token: float = math.nan,
) -> Trace:
    """Return the trace of rows with the columns of ``COLUMNS`` and ``OPTIONAL``, or with ``text_input``.

    Args:
        characters_per_token: what turns the length of ``text_input`` into tokens, for rows without ``input_length``.
    Raises, other arguments: as ``read_mooncake``.
    """
    if time_unit is None:
        _refuse_fractions(rows)
    unit: TimeUnit = time_unit or "ms"
    in_sessions = rows.has("session_id") or rows.has("delay")
    history: list[str] = []
    arrival_s = rows.times("timestamp", unit=unit, missing=in_sessions)
    if rows.has("text_input"):
        prompt_tokens = _tokens_of_text(rows, characters_per_token, history)
    elif rows.has("input_length"):
        prompt_tokens = rows.tokens("input_length")
    else:  # the only rows with a text were broken
        prompt_tokens = np.zeros(len(rows.table.line), dtype=np.int64)
        rows.reject(
            prompt_tokens < 1, "output_length", "neither input_length nor text_input", "one of them in each row"
        )
    output_tokens = rows.tokens("output_length")
    hash_ids = read_hash_ids(rows, history)
    if hash_ids is not None:
        check_number_of_ids(rows, hash_ids, prompt_tokens, block_tokens)
    sessions = None
    if in_sessions:
        placed = session_arrivals(
            rows, arrival_s, history, time="timestamp", session="session_id", delay="delay", unit=unit
        )
        arrival_s = placed.arrival_s
        if not np.isnan(placed.think_s).all():  # otherwise no turn waits for another
            sessions = placed
            if hash_ids is not None:
                after = next_turns(placed.session, placed.think_s)
                hash_ids = answer_ids(hash_ids, after, prompt_tokens, output_tokens, block_tokens)
    return rows.trace(
        arrival_s=arrival_s,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        hash_ids=hash_ids,
        sort=sort or in_sessions,  # a file may list one session after the other
        name=name,
        history=history,
        time_quantum_s=time_quantum_s,
        hash_block_tokens=None if hash_ids is None else block_tokens,
        session=None if sessions is None else sessions.session,
        think_s=None if sessions is None else sessions.think_s,
    )


def _refuse_fractions(rows: Rows) -> None:
    """Raise a TraceError if a timestamp has a fraction: it is then probably in seconds, 1,000 times as long."""
    place = rows.first_fraction("timestamp")
    if place is not None:
        value = rows.table.columns["timestamp"][place]
        raise TraceError(
            f"{rows.table.path}, {rows.table.unit} {rows.table.line[place]}, column 'timestamp': {value} is no full "
            "number of ms, so the file may count seconds; set trace.time_unit=s, or trace.time_unit=ms if it is ms"
        )


def _tokens_of_text(rows: Rows, characters_per_token: float, history: list[str]) -> Ints:
    """Return ``input_length``, or an estimate from the length of ``text_input`` where a row has no length."""
    stated: list[Any] | Any = rows.table.columns.get("input_length")
    lengths = np.array([math.nan if cell is None else 1 for cell in stated]) if stated is not None else None
    texts = rows.table.columns["text_input"]
    characters = np.array([_characters(text) for text in (texts if isinstance(texts, list) else texts.to_pylist())])
    missing = np.ones(len(characters), dtype=bool) if lengths is None else np.isnan(lengths)
    rows.reject(missing & (characters < 1), "text_input", "no text", "text, or a number in input_length")
    estimate: Floats = np.clip(np.ceil(characters / characters_per_token), 1, MAX_TOKENS)
    if missing.any():
        history.append(
            f"{int(missing.sum()):,} prompts are text without input_length; their tokens are estimated as one per "
            f"{characters_per_token:g} characters (trace.characters_per_token)"
        )
        log.warning("%s: %s", rows.table.path, history[-1])
    if missing.all():
        return estimate.astype(np.int64)
    return np.where(missing, estimate.astype(np.int64), rows.tokens("input_length", missing=True))


def _characters(text: Any) -> int:
    """Return the characters of a text or of all texts in a list, which may nest deeply."""
    left, characters = [text], 0
    while left:
        part = left.pop()
        if isinstance(part, list):
            left += part
        elif isinstance(part, str):
            characters += len(part)
    return characters
