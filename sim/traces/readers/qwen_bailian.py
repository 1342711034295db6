"""Qwen-Bailian: anonymous requests to Alibaba's service, with one hash id for each 16 tokens of a prompt."""

from __future__ import annotations

from pathlib import Path

from sim.traces.readers.files import MAX_BYTES, MAX_ROWS, OnBadRow, TraceFile
from sim.traces.readers.hash_ids import check_number_of_ids, read_hash_ids
from sim.traces.readers.rows import Rows, read_table
from sim.traces.trace import Trace

ORIGIN = "https://github.com/alibaba-edu/qwen-bailian-usagetraces-anon"
BLOCK_TOKENS = 16
COLUMNS = ("timestamp", "input_length", "output_length")


def read_qwen_bailian(
    path: str | Path,
    *,
    block_tokens: int = BLOCK_TOKENS,
    on_bad_row: OnBadRow = "error",
    sort: bool = False,
    max_rows: int = MAX_ROWS,
    max_bytes: int = MAX_BYTES,
    name: str = "qwen_bailian",
) -> Trace:
    """Return a Qwen-Bailian trace with its prefix ids; the first arrival is at time 0.

    Every turn has a time of its own, and arrives then. With ``engine.prefix_caching=true``, set
    ``engine.hash_block_tokens=16``.

    Args:
        path: JSON lines (plain or packed): ``timestamp`` in seconds, ``input_length``, ``output_length``, ``hash_ids``.
        block_tokens: prompt tokens per id; the number of ids must fit ``input_length``.
        on_bad_row, sort, max_rows, max_bytes, name: as ``read_azure``.
    Raises:
        TraceError: if the file or a row of it cannot be used.
    Source:
        Wang et al., KVCache Cache in the Wild (USENIX ATC 2025); alibaba-edu/qwen-bailian-usagetraces-anon, Apache-2.0.
    """
    file = TraceFile(path=path, on_bad_row=on_bad_row, max_rows=max_rows, max_bytes=max_bytes, origin=ORIGIN)
    rows = Rows(read_table(file, required=COLUMNS, optional=("hash_ids", "turn")))
    arrival_s = rows.times("timestamp")
    prompt_tokens = rows.tokens("input_length")
    output_tokens = rows.tokens("output_length")
    if rows.has("turn"):
        rows.tokens("turn")
    history: list[str] = []
    hash_ids = read_hash_ids(rows, history)
    if hash_ids is not None:
        check_number_of_ids(rows, hash_ids, prompt_tokens, block_tokens)
    return rows.trace(
        arrival_s=arrival_s,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        hash_ids=hash_ids,
        sort=sort,
        name=name,
        history=history,
        hash_block_tokens=None if hash_ids is None else block_tokens,
    )
