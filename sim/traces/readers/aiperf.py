"""aiperf: its request traces (JSON lines like Mooncake's, or with text), and its results (one record a line)."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sim.traces.readers.arguments import check_number
from sim.traces.readers.files import MAX_BYTES, MAX_ROWS, OnBadRow, TraceFile, read_content, read_head
from sim.traces.readers.json_table import parse_line, table_of_objects
from sim.traces.readers.mooncake import COLUMNS, OPTIONAL, turns_trace
from sim.traces.readers.rows import Rows, TimeUnit, read_table
from sim.traces.trace import HASH_BLOCK_TOKENS, Trace

RESULT_FIELDS = ("request_start_ns", "input_sequence_length", "output_sequence_length")
RESULT_OPTIONAL = ("request_end_ns",)
PHASE = "profiling"


def read_aiperf(
    path: str | Path,
    *,
    characters_per_token: float = 4.0,
    time_unit: TimeUnit | None = None,
    block_tokens: int = HASH_BLOCK_TOKENS,
    on_bad_row: OnBadRow = "error",
    sort: bool = False,
    max_rows: int = MAX_ROWS,
    max_bytes: int = MAX_BYTES,
    name: str = "aiperf",
) -> Trace:
    """Return a trace that aiperf replays, or the requests of a result of it; the first arrival is at time 0.

    A result (``profile_export.jsonl``) is recognized by its fields ``metadata`` and ``metrics``. Its requests have the
    lengths really seen; warm-up, failed and cancelled requests are left out and counted.

    Args:
        path: JSON lines, plain or packed. A trace has ``timestamp`` in ms, ``input_length`` or ``text_input``,
            ``output_length`` and, optionally, ``hash_ids``, ``session_id`` and ``delay``, as for ``read_mooncake``.
        characters_per_token: estimates the tokens of a ``text_input`` without ``input_length``; a warning counts them.
        time_unit, block_tokens: as ``read_mooncake``.
        on_bad_row, sort, max_rows, max_bytes, name: as ``read_azure``. Results are always sorted by arrival.
    Raises:
        TraceError: if the file or a row of it cannot be used.
    Source:
        ai-dynamo/aiperf, Apache-2.0.
    """
    check_number("characters_per_token", characters_per_token, above=0.0)
    file = TraceFile(path=path, on_bad_row=on_bad_row, max_rows=max_rows, max_bytes=max_bytes)
    head = read_head(file)
    if b'"metadata"' in head and b'"metrics"' in head:
        return _read_result(file, name)
    has_text = b'"text_input"' in head
    if has_text:
        optional = (*OPTIONAL, "text_input", "input_length")
        table = read_table(file, required=("timestamp", "output_length"), optional=optional)
    else:
        table = read_table(file, required=COLUMNS, optional=OPTIONAL)
    return turns_trace(
        Rows(table),
        time_unit=time_unit,
        block_tokens=block_tokens,
        sort=sort,
        name=name,
        characters_per_token=characters_per_token,
    )


def _read_result(file: TraceFile, name: str) -> Trace:
    left_out = {"requests of another phase than profiling": 0, "failed or cancelled requests": 0}
    content = read_content(file).strip()
    objects = _records(content, left_out)
    rows = Rows(table_of_objects(file, objects, RESULT_FIELDS, RESULT_OPTIONAL, unit="line"))
    arrival_s = rows.times("request_start_ns", unit="ns")
    prompt_tokens, output_tokens = (rows.tokens(field) for field in RESULT_FIELDS[1:])
    rows.check_end("request_end_ns", arrival_s, unit="ns")
    return rows.trace(
        arrival_s=arrival_s,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        sort=True,
        name=name,
        history=[f"left out {count:,} {kind}" for kind, count in left_out.items() if count],
    )


def _records(content: bytes, left_out: dict[str, int]) -> Iterator[tuple[int, Any]]:
    """Yield the records of a result as flat objects, without those that are left out."""
    phase_kind, failed_kind = left_out
    for line, text in enumerate(io.BytesIO(content), start=1):
        record = parse_line(text)
        metadata = record.get("metadata") if isinstance(record, dict) else None
        if not isinstance(record, dict) or not isinstance(metadata, dict):
            yield line, record if not isinstance(record, dict) else json.dumps(list(record))[:80]
        elif metadata.get("benchmark_phase", PHASE) != PHASE:
            left_out[phase_kind] += 1
        elif record.get("error") or metadata.get("was_cancelled"):
            left_out[failed_kind] += 1
        else:
            yield line, _flat(metadata, record.get("metrics"))


def _flat(metadata: dict[str, Any], metrics: Any) -> dict[str, Any]:
    values = {name: _value(metric) for name, metric in metrics.items()} if isinstance(metrics, dict) else {}
    output = values.get("output_sequence_length")
    if output is None and (answer := values.get("output_token_count")) is not None:
        # Reasoning tokens are tokens too.
        reasoning = values.get("reasoning_token_count") or 0
        output = answer + reasoning if isinstance(answer, int) and isinstance(reasoning, int) else answer
    return {
        "request_start_ns": metadata.get("request_start_ns"),
        "request_end_ns": metadata.get("request_end_ns"),
        "input_sequence_length": values.get("input_sequence_length"),
        "output_sequence_length": output,
    }


def _value(metric: Any) -> Any:
    return metric.get("value") if isinstance(metric, dict) else metric
