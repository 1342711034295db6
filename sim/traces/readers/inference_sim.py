"""inference-sim's TraceV2: CSV with times in microseconds, next to a YAML file that states the version.

Its column ``input_tokens`` is not the prompt in every file. A request of a prefix group has the prefix before it. Where
the header says ``session_context_growth: accumulate``, a later round of a session states only what it adds to the
prompt and the answer of the round before.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import yaml

from sim.errors import TraceError
from sim.paths import find_data
from sim.traces.readers.arguments import check_choice
from sim.traces.readers.files import MAX_BYTES, MAX_ROWS, OnBadRow, TraceFile, read_content
from sim.traces.readers.rows import Failed, Rows, read_table
from sim.traces.trace import MAX_TOKENS, Trace
from sim.types import Ints

ORIGIN = "https://github.com/inference-sim/inference-sim (blis observe, or blis run --trace-output)"
VERSIONS = (2, 3)
HEADER_BYTES = 2**20
STEPS = ("send_time_us", "first_chunk_time_us", "last_chunk_time_us")
COLUMNS = ("arrival_time_us", "input_tokens", "output_tokens")
PREFIX = ("prefix_group", "prefix_length")
SESSION = ("session_id", "round_index", "input_tokens_reset")
SERVER_COUNT = "server_input_tokens"
ACCUMULATE = "accumulate"
GOOD_STATUS = ("ok", "")


def read_inference_sim(
    path: str | Path,
    *,
    header: str | Path | None = None,
    failed: Failed = "drop",
    on_bad_row: OnBadRow = "error",
    sort: bool = False,
    max_rows: int = MAX_ROWS,
    max_bytes: int = MAX_BYTES,
    name: str = "inference_sim",
) -> Trace:
    """Return a TraceV2; the first arrival is at time 0.

    Rounds of a session come at the times that the file records; their order is not enforced again. A prompt has the
    tokens that the server counted (``server_input_tokens``), or else those of its prefix and of ``input_tokens``. In a
    session that accumulates, those of the rounds before come first.

    Args:
        path: the CSV file with ``arrival_time_us``, ``input_tokens`` and ``output_tokens``. Where the times of sending
            and of the first and last chunk are there, they must be in this order (0 means not recorded).
        header: the YAML file with ``trace_version`` 2 or 3; None takes the one with the name of the CSV file, if any.
        failed: handling of rows whose ``status`` is not ok: "drop" leaves them out and counts them; "error" treats
            them as bad rows.
        on_bad_row, sort, max_rows, max_bytes, name: as ``read_azure``.
    Raises:
        TraceError: if a file or a row cannot be used, or the header states another version.
    Source:
        inference-sim/inference-sim, sim/workload/tracev2.go, Apache-2.0.
    """
    check_choice("failed", failed, Failed)
    file = TraceFile(path=path, on_bad_row=on_bad_row, max_rows=max_rows, max_bytes=max_bytes, origin=ORIGIN)
    described, found = _read_header(file, header)
    history = [found]
    optional = (*STEPS, "status", *PREFIX, *SESSION, SERVER_COUNT)
    rows = Rows(read_table(file, required=COLUMNS, optional=optional))
    arrival_s = rows.times("arrival_time_us", unit="us")
    is_failed = np.zeros(len(arrival_s), dtype=bool)
    if rows.has("status"):
        is_failed = np.array([status.lower() not in GOOD_STATUS for status in rows.text("status")], dtype=bool)
        if failed == "error":
            rows.reject(is_failed, "status", "failed request", "ok")
    # A request that failed has no tokens.
    output_tokens = rows.tokens("output_tokens", minimum=0)
    prompt_tokens = _prompts(rows, output_tokens, accumulate=described.get("session_context_growth") == ACCUMULATE)
    for column, tokens in (("input_tokens", prompt_tokens), ("output_tokens", output_tokens)):
        rows.reject(~is_failed & (tokens == 0), column, "zero", "a whole number from 1")
    _check_steps(rows)
    return rows.trace(
        arrival_s=arrival_s,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        leave_out=rows.failed(is_failed, "status is not ok", history),
        sort=sort,
        name=name,
        history=history,
    )


def _prompts(rows: Rows, output_tokens: Ints, *, accumulate: bool) -> Ints:
    """Return the tokens of each prompt with all that stands before ``input_tokens``; 0 for bad rows."""
    prompt_tokens = rows.tokens("input_tokens", minimum=0)
    if all(rows.has(name) for name in PREFIX):
        in_group = np.array([bool(group) for group in rows.text("prefix_group")], dtype=bool)
        prompt_tokens = prompt_tokens + np.where(in_group, rows.tokens("prefix_length", minimum=0, missing=True), 0)
    if accumulate:
        prompt_tokens = _grown(rows, prompt_tokens, output_tokens)
    if rows.has(SERVER_COUNT):
        counted = rows.tokens(SERVER_COUNT, minimum=0, missing=True)
        prompt_tokens = np.where(counted > 0, counted, prompt_tokens)
    rows.reject(prompt_tokens > MAX_TOKENS, "input_tokens", "too large with its prefix", f"at most {MAX_TOKENS:,}")
    return np.where(rows.is_bad, 0, prompt_tokens)


def _grown(rows: Rows, added: Ints, output_tokens: Ints) -> Ints:
    """Return the prompts of rounds that state what they add; rows of no session stay as they are.

    A round with ``input_tokens_reset`` begins with that many tokens, because the client has shortened the context.
    """
    for name in SESSION[:2]:
        if not rows.has(name):
            raise TraceError(
                f"{rows.table.path}: its header says session_context_growth: {ACCUMULATE}, but there is no column "
                f"{name!r} to find the round before; add it, or state full prompts without this line of the header"
            )
    sessions, number = rows.text("session_id"), rows.tokens("round_index", minimum=0)
    reset = rows.tokens("input_tokens_reset", minimum=0, missing=True) if rows.has("input_tokens_reset") else 0 * added
    prompt_tokens, lost = added.copy(), np.zeros(len(added), dtype=bool)
    last: dict[str, int] = {}
    for row in np.argsort(number, kind="stable").tolist():
        session = sessions[row]
        if not session or rows.is_bad[row]:
            continue
        before = last.get(session)
        if number[row] > 0:
            if before is None or number[before] != number[row] - 1:
                lost[row] = True
                continue
            grown = prompt_tokens[before] + output_tokens[before] + added[row]
            prompt_tokens[row] = reset[row] or min(int(grown), MAX_TOKENS + 1)
        last[session] = row
    rows.reject(lost, "round_index", "the round before is missing", "rounds of a session that count up from 0")
    return prompt_tokens


def _check_steps(rows: Rows) -> None:
    """Mark rows as bad whose recorded times are not in order."""
    before = np.zeros(len(rows.table.line))
    for step in ("arrival_time_us", *STEPS):
        if rows.has(step):
            at = rows.numbers(step, minimum=0)
            rows.reject((at > 0) & (at < before), step, "before the step ahead of it", "0, or a time not before it")
            before = np.where(at > 0, at, before)


def _read_header(file: TraceFile, header: str | Path | None) -> tuple[dict[str, Any], str]:
    """Return the YAML header, empty if there is none, and a sentence about it for the history.

    Raises:
        TraceError: if it cannot be read, or states what is not known here.
    """
    if header is not None and not isinstance(header, str | Path):
        raise TraceError(f"trace.header is {header!r}; it must be the path of a YAML file")
    csv = Path(file.path)
    if csv.suffix in (".yaml", ".yml"):
        raise TraceError(f"{csv} is the header of a TraceV2; trace.path names its CSV file, trace.header the header")
    if header is None:
        plain = csv.with_suffix("") if csv.suffix in (".gz", ".bz2", ".xz", ".zst") else csv
        found = [plain.with_suffix(suffix) for suffix in (".yaml", ".yml")]
        header = next((path for path in found if find_data(path).is_file()), None)
    if header is None:
        return {}, f"no header file next to {csv}, so its version is not known; read as version {VERSIONS[0]}"
    content = read_content(TraceFile(path=header, max_bytes=HEADER_BYTES))
    try:
        described: Any = yaml.safe_load(content)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise TraceError(
            f"{header} is not YAML ({' '.join(str(error).split())[:200]}); write trace_version: 2"
        ) from error
    version = described.get("trace_version") if isinstance(described, dict) else None
    if isinstance(version, bool) or version not in VERSIONS:
        raise TraceError(
            f"{header}: trace_version is {version!r}; allowed: {', '.join(map(str, VERSIONS))}; convert the trace, or "
            "mend it"
        )
    unit = described.get("time_unit", "microseconds")
    if unit not in ("microseconds", "us"):
        raise TraceError(f"{header}: time_unit is {unit!r}; allowed: microseconds, as the names of the columns say")
    growth = described.get("session_context_growth")
    if growth not in (None, "", ACCUMULATE):
        raise TraceError(f"{header}: session_context_growth is {growth!r}; allowed: {ACCUMULATE}, or nothing")
    return described, f"version {version} by {header}"
