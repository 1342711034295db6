"""Qwen-Bailian: anonymous requests to Alibaba's service, with one hash id for each 16 tokens of a prompt."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from sim.traces.readers.arguments import check_flag, check_number
from sim.traces.readers.files import MAX_BYTES, MAX_ROWS, OnBadRow, TraceFile
from sim.traces.readers.hash_ids import check_number_of_ids, read_hash_ids
from sim.traces.readers.rows import Rows, read_table
from sim.traces.readers.sessions import answer_ids
from sim.traces.sessions import earliest_arrivals, next_turns
from sim.traces.trace import Trace
from sim.types import Floats, Ints

ORIGIN = "https://github.com/alibaba-edu/qwen-bailian-usagetraces-anon"
BLOCK_TOKENS = 16
COLUMNS = ("timestamp", "input_length", "output_length")


def read_qwen_bailian(
    path: str | Path,
    *,
    block_tokens: int = BLOCK_TOKENS,
    follow: bool = False,
    recorded_tpot_s: float = 0.0,
    on_bad_row: OnBadRow = "error",
    sort: bool = False,
    max_rows: int = MAX_ROWS,
    max_bytes: int = MAX_BYTES,
    name: str = "qwen_bailian",
) -> Trace:
    """Return a Qwen-Bailian trace with its prefix ids; the first arrival is at time 0.

    Every turn has a time of its own, and arrives then, unless ``follow`` is set. With ``engine.prefix_caching=true``,
    set ``engine.hash_block_tokens=16``.

    Args:
        path: JSON lines (plain or packed): ``timestamp`` in seconds, ``input_length``, ``output_length``, ``hash_ids``,
            ``chat_id`` and ``parent_chat_id`` (-1 for none).
        follow: let a chat arrive after the answer of its parent. It thinks as long as lies between their timestamps,
            less the time that the recorded answer is taken to have lasted. A parent's further children, and chats whose
            parent is not in the file, keep their times.
        recorded_tpot_s: seconds per token of the recorded answers, which the file does not state; 0 thinks longest.
        block_tokens: prompt tokens per id; the number of ids must fit ``input_length``.
        on_bad_row, sort, max_rows, max_bytes, name: as ``read_azure``.
    Raises:
        TraceError: if the file or a row of it cannot be used.
    Source:
        Wang et al., KVCache Cache in the Wild (USENIX ATC 2025); alibaba-edu/qwen-bailian-usagetraces-anon, Apache-2.0.
    """
    file = TraceFile(path=path, on_bad_row=on_bad_row, max_rows=max_rows, max_bytes=max_bytes, origin=ORIGIN)
    check_flag("follow", follow)
    check_number("recorded_tpot_s", recorded_tpot_s)
    chats = ("chat_id", "parent_chat_id")
    required, optional = ((*COLUMNS, *chats), ("hash_ids", "turn")) if follow else (COLUMNS, ("hash_ids", "turn"))
    rows = Rows(read_table(file, required=required, optional=optional))
    arrival_s = rows.times("timestamp")
    prompt_tokens = rows.tokens("input_length")
    output_tokens = rows.tokens("output_length")
    if rows.has("turn"):
        rows.tokens("turn")
    history: list[str] = []
    hash_ids = read_hash_ids(rows, history)
    if hash_ids is not None:
        check_number_of_ids(rows, hash_ids, prompt_tokens, block_tokens)
    session = think_s = None
    if follow:
        session, think_s = _chats(rows, arrival_s, output_tokens.astype(np.float64) * recorded_tpot_s)
        arrival_s = _as_if_answered_at_once(rows, arrival_s, session, think_s)
        if hash_ids is not None:
            after = next_turns(session, think_s)
            hash_ids = answer_ids(hash_ids, after, prompt_tokens, output_tokens, block_tokens)
        history.append(f"{int((~np.isnan(think_s)).sum()):,} chats follow the answer of their parent")
    return rows.trace(
        arrival_s=arrival_s,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        hash_ids=hash_ids,
        sort=sort or follow,
        name=name,
        history=history,
        hash_block_tokens=None if hash_ids is None else block_tokens,
        session=session,
        think_s=think_s,
    )


def _chats(rows: Rows, arrival_s: Floats, answer_s: Floats) -> tuple[Ints, Floats]:
    """Return the session of each row, and how long it thinks after its parent; NaN if it follows none.

    Args:
        arrival_s: as recorded. answer_s: how long each recorded answer is taken to have lasted.
    """
    names, parents = rows.text("chat_id"), rows.text("parent_chat_id")
    first = {name: i for i, name in reversed(list(enumerate(names)))}
    count = len(names)
    repeated = np.array([first[name] != i for i, name in enumerate(names)], dtype=bool)
    rows.reject(repeated, "chat_id", "repeated", "an id of its own in each row")
    parent = np.array([first.get(name, -1) for name in parents], dtype=np.int64)
    early = (parent >= 0) & (arrival_s < arrival_s[parent]) | (parent == np.arange(count))
    rows.reject(early, "parent_chat_id", "a parent that comes later", "the id of an earlier row, or -1")
    session, think_s = np.arange(count), np.full(count, np.nan)
    followed: set[int] = set()
    for i in np.argsort(arrival_s, kind="stable").tolist():
        before = int(parent[i])
        if before >= 0 and before not in followed and not (rows.is_bad[i] or rows.is_bad[before]):
            followed.add(before)
            session[i] = session[before]
            think_s[i] = max(arrival_s[i] - arrival_s[before] - answer_s[before], 0.0)
    return session, think_s


def _as_if_answered_at_once(rows: Rows, arrival_s: Floats, session: Ints, think_s: Floats) -> Floats:
    """Return when each good row arrives if every answer comes at once; bad rows keep their values."""
    usable, found = ~rows.is_bad, arrival_s.copy()
    found[usable] = earliest_arrivals(arrival_s[usable], session[usable], think_s[usable])
    return found
