"""JSON to columns: one object a line (JSONL), or a list of objects."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from sim.errors import TraceError
from sim.traces.readers.files import TraceFile, read_content
from sim.traces.readers.table import (
    ENOUGH_BAD_ROWS,
    BadRow,
    BadRows,
    RawTable,
    check_header,
    find_columns,
)

MAX_LINE_BYTES = 16 * 2**20
DOCUMENT_SHARE = 4
"""A JSON document is parsed in one go and then needs many times its size, so its limit is max_bytes over this."""
BATCH_ROWS = 1000
"""Rows that become columns together. The first of these batches decides how the fields are spelled."""
BATCH_FIELDS = 100_000
"""Fields of rows that become columns together."""
MAX_FIELDS = 10_000
"""Of one object; each costs as much as a value."""
VALUES_PER_LINE = 16
"""Lines may hold this many values for each row that max_rows allows; parsing them takes seconds."""
DECODER = json.JSONDecoder()


def read_json(
    file: TraceFile, *, required: Sequence[str], optional: Sequence[str] = (), content: bytes | None = None
) -> RawTable:
    """Return the named fields of a file with one JSON object a line, or of one list of objects.

    Args:
        required: fields that the file must have. A name that differs only in case is accepted.
        optional: fields that may be missing from the entire file, or (None then) from some rows.
        content: the file's content, if it was read already.
    Raises:
        TraceError: if the file is wrong, or no row has the required fields.
    """
    content = read_content(file) if content is None else content
    content = content.strip()
    if content.startswith(b"["):
        entries = load_document(file, content)
        return table_of_objects(file, enumerate(entries, start=1), required, optional, unit="entry")
    if (rows := content.count(b"\n") + 1) > file.max_rows:
        raise file.too_many_rows(rows)
    if (values := content.count(b",")) > VALUES_PER_LINE * file.max_rows:
        raise TraceError(
            f"{file.path} has about {values:,} values, more than {VALUES_PER_LINE} times trace.max_rows="
            f"{file.max_rows}; cut the file, or raise trace.max_rows"
        )
    # Not with Arrow, whose JSON reader ends the process on some lines that are no objects (pyarrow 26: null).
    lines = ((line, parse_line(text)) for line, text in enumerate(io.BytesIO(content), start=1))
    return table_of_objects(file, lines, required, optional, unit="line")


def load_document(file: TraceFile, content: bytes, *, hint: str = "write a list of objects, or one a line") -> Any:
    """Return the value of a file that is one JSON document.

    Args:
        hint: what to do about a file that is none.
    Raises:
        TraceError: if it is not JSON, or too large.
    """
    if len(content) > file.max_bytes // DOCUMENT_SHARE:
        raise file.too_large("a JSON document", factor=DOCUMENT_SHARE)
    values = content.count(b",") + content.count(b"[") + content.count(b"{")
    if values > file.max_rows:
        raise TraceError(
            f"{file.path}: a JSON document of about {values:,} values, more than the limit of {file.max_rows:,}; "
            "cut the file, or raise trace.max_rows"
        )
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        if isinstance(error, json.JSONDecodeError):
            where = f"line {error.lineno}, character {error.colno}: {error.msg}"
        else:
            where = "nested too deeply" if isinstance(error, RecursionError) else str(error)[:200]
        raise TraceError(f"{file.path} is not one JSON document ({where}); {hint}") from error


def parse_line(line: bytes) -> Any:
    """Return the value of a line of JSON; for a line that has none, an object that ``table_of_objects`` reports."""
    if len(line) > MAX_LINE_BYTES:
        return _NotJson(f"{line[:40].decode(errors='replace')}...", f"longer than {MAX_LINE_BYTES // 2**20} MiB")
    try:
        return DECODER.decode(line.decode())
    except (ValueError, RecursionError):
        text = line.decode(errors="replace").rstrip("\n")
        return _NotJson(text[:80], "not a JSON object" if text.strip() else "blank line")


class _NotJson:
    """A line that cannot be parsed."""

    def __init__(self, text: str, kind: str) -> None:
        self.text, self.kind = text, kind


def table_of_objects(
    file: TraceFile, objects: Iterable[tuple[int, Any]], required: Sequence[str], optional: Sequence[str], *, unit: str
) -> RawTable:
    """Return the named fields of JSON objects as columns; what is no object is a broken row.

    Args:
        objects: the number of each row in the file, and its value.
        required: fields that the first rows must have. optional: fields that may be missing.
        unit: see ``RawTable``.
    """
    columns: dict[str, list[Any]] = {name: [] for name in (*required, *optional)}
    lines: list[int] = []
    broken = BadRows()
    keys: dict[str, str] = {}
    values: Counter[str] = Counter()
    batch: list[dict[str, Any]] = []
    fields = 0

    def flush() -> None:
        if not keys:
            keys.update(_spelling(file, list(dict.fromkeys(key for row in batch for key in row)), required, optional))
        for name, column in columns.items():
            key = keys[name]
            cells = [row.get(key) for row in batch]
            column.extend(cells)
            values[name] += sum([len(cell) for cell in cells if type(cell) is list])
            file.check_values(values[name])
        batch.clear()

    for line, row in objects:
        if not isinstance(row, dict):
            kind, text = (row.kind, row.text) if isinstance(row, _NotJson) else ("not a JSON object", str(row)[:80])
            broken.add(BadRow(line=line, column="all", value=text, kind=kind, allowed=f"one {{...}} per {unit}"))
            if file.on_bad_row == "error" and len(broken) >= ENOUGH_BAD_ROWS:
                break
            continue
        if len(row) > MAX_FIELDS:
            allowed = f"at most {MAX_FIELDS:,} fields"
            broken.add(BadRow(line=line, column="all", value=f"{len(row):,} fields", kind="too many", allowed=allowed))
            continue
        lines.append(line)
        batch.append(row)
        fields += len(row)
        is_long = any(type(cell) is list and len(cell) > BATCH_ROWS for cell in row.values())
        if is_long or len(batch) == BATCH_ROWS or fields > BATCH_FIELDS:
            flush()
            fields = 0
            if len(lines) > file.max_rows:
                raise file.too_many_rows(len(lines))
    if batch:
        flush()
    present = {n: c for n, c in columns.items() if n not in optional or any(cell is not None for cell in c)}
    return RawTable(file=file, unit=unit, line=np.array(lines, dtype=np.int64), columns=present, broken=broken)


def _spelling(file: TraceFile, seen: Sequence[str], required: Sequence[str], optional: Sequence[str]) -> dict[str, str]:
    """Return how the file spells each field."""
    check_header(file, seen, required, where="")
    found = find_columns(seen, (*required, *optional))
    return {name: seen[found[name]] if name in found else name for name in (*required, *optional)}
