"""Results of guidellm: one JSON document with benchmarks, each with its requests."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sim.errors import TraceError
from sim.traces.readers.files import MAX_BYTES, MAX_ROWS, OnBadRow, TraceFile, read_content
from sim.traces.readers.json_table import load_document, table_of_objects
from sim.traces.readers.rows import Rows
from sim.traces.trace import Trace

# Names of the fields over guidellm's versions.
STARTS = ("request_start_time", "start_time")
ENDS = ("request_end_time", "end_time")
PROMPTS = ("prompt_tokens", "input_tokens")
OUTPUTS = ("output_tokens",)
TOTAL = "total_tokens"


def read_guidellm(
    path: str | Path,
    *,
    benchmark: int | None = None,
    on_bad_row: OnBadRow = "error",
    max_rows: int = MAX_ROWS,
    max_bytes: int = MAX_BYTES,
    name: str = "guidellm",
) -> Trace:
    """Return the requests of one benchmark, as seen by guidellm: when each started, its prompt and its output.

    Requests that guidellm lists as incomplete or errored are left out and counted.

    Args:
        path: the JSON file that ``guidellm benchmark`` wrote, plain or packed.
        benchmark: which one, from 0, of a file with several (a sweep has one per rate); None takes the only one.
        on_bad_row, max_rows, max_bytes, name: as ``read_azure``. Rows are always sorted by arrival.
    Raises:
        TraceError: if the file or an entry of it cannot be used, or the benchmark is not named.
    Source:
        vllm-project/guidellm, src/guidellm/benchmark, Apache-2.0.
    """
    file = TraceFile(path=path, on_bad_row=on_bad_row, max_rows=max_rows, max_bytes=max_bytes)
    requests = _requests(file, load_document(file, read_content(file)), benchmark)
    entries = requests["successful"]
    start, prompt, output = (_spelled(entries, names) for names in (STARTS, PROMPTS, OUTPUTS))
    end = _spelled(entries, ENDS)
    required, optional = (start, prompt, output), (end, TOTAL)
    rows = Rows(table_of_objects(file, enumerate(entries, start=1), required, optional, unit="entry"))
    arrival_s = rows.times(start)
    prompt_tokens, output_tokens = rows.tokens(prompt), rows.tokens(output)
    rows.check_end(end, arrival_s)
    rows.check_total(TOTAL, prompt_tokens, output_tokens)
    history = [
        f"left out {len(others):,} {kind} requests"
        for kind in ("incomplete", "errored")
        if isinstance(others := requests.get(kind), list) and others
    ]
    return rows.trace(
        arrival_s=arrival_s,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        sort=True,
        name=name,
        history=history,
    )


def _requests(file: TraceFile, report: Any, benchmark: int | None) -> dict[str, Any]:
    """Return the lists of requests of one benchmark.

    Raises:
        TraceError: if there is no such list.
    """
    benchmarks = report.get("benchmarks") if isinstance(report, dict) else None
    if not isinstance(benchmarks, list) or not benchmarks:
        raise TraceError(f"{file.path} has no list of benchmarks, so it is no result of guidellm; name its JSON file")
    if benchmark is None and len(benchmarks) > 1:
        raise TraceError(
            f"{file.path} has {len(benchmarks)} benchmarks, each a run of its own; set trace.benchmark to one of "
            f"0 to {len(benchmarks) - 1}"
        )
    place = 0 if benchmark is None else benchmark
    if isinstance(place, bool) or not isinstance(place, int) or not 0 <= place < len(benchmarks):
        raise TraceError(f"trace.benchmark is {benchmark!r}; {file.path} has benchmarks 0 to {len(benchmarks) - 1}")
    chosen = benchmarks[place]
    requests = chosen.get("requests") if isinstance(chosen, dict) else None
    successful = requests.get("successful") if isinstance(requests, dict) else None
    if not isinstance(requests, dict) or not isinstance(successful, list):
        raise TraceError(
            f"{file.path}: benchmark {place} has no list requests.successful; it needs one entry per request"
        )
    if not successful:
        raise TraceError(f"{file.path}: benchmark {place} has no successful request; choose another, trace.benchmark=N")
    return requests


def _spelled(entries: Sequence[Any], names: Sequence[str]) -> str:
    """Return the first of several names of one field that an entry has."""
    for name in names:
        if any(isinstance(entry, dict) and entry.get(name) is not None for entry in entries):
            return name
    return names[0]
