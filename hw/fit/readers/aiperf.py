"""Results of aiperf: ``profile_export.jsonl``, one record a line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hw.fit.measured import Columns, MeasuredRun, measured_run
from hw.fit.readers.fields import PER_SECOND, field, number, numbers
from sim.traces.readers.aiperf import PHASE
from sim.types import Floats


def is_aiperf(entries: Sequence[Any]) -> bool:
    """Return whether the lines of a file are such records."""
    return bool(entries) and all(isinstance(entry, Mapping) and "metadata" in entry for entry in entries[:3])


def read_aiperf(entries: Sequence[Mapping[str, Any]], source: Path) -> MeasuredRun:
    """Return the run of the records of the phase ``profiling``.

    Source:
        ai-dynamo/aiperf, Apache-2.0.
    """
    rows = [row for row in entries if (_value(row, "metadata.benchmark_phase") or PHASE) == PHASE]
    sent_s = numbers(field(rows, "metadata.request_start_ns"), 1e9)
    ttft_s, latency_s = (_seconds(rows, name) for name in ("time_to_first_token", "request_latency"))
    ends_s = numbers(field(rows, "metadata.request_end_ns"), 1e9)
    errors = field(rows, "error")
    cancelled = field(rows, "metadata.was_cancelled")
    columns = Columns(
        sent_s=sent_s,
        first_token_s=sent_s + ttft_s,
        finish_s=np.where(np.isfinite(latency_s), sent_s + latency_s, ends_s),
        prompt_tokens=_plain(rows, "input_sequence_length"),
        output_tokens=_plain(rows, "output_sequence_length"),
        failed=np.array([bool(e) or bool(c) for e, c in zip(errors, cancelled, strict=True)], dtype=bool),
    )
    return measured_run(columns, name=source.stem, source=str(source), kind="aiperf")


def _value(row: Mapping[str, Any], name: str) -> Any:
    return field([row], name)[0]


def _plain(rows: Sequence[Mapping[str, Any]], name: str) -> Floats:
    """Return a metric, which is a number or an object with ``value``."""
    found = field(rows, f"metrics.{name}")
    return numbers([value.get("value") if isinstance(value, Mapping) else value for value in found])


def _seconds(rows: Sequence[Mapping[str, Any]], name: str) -> Floats:
    """Return a metric of time in seconds; without a unit it is in milliseconds."""
    found = []
    for value in field(rows, f"metrics.{name}"):
        unit = value.get("unit", "ms") if isinstance(value, Mapping) else "ms"
        each = PER_SECOND.get(str(unit), 1e3)
        found.append(number(value.get("value") if isinstance(value, Mapping) else value) / each)
    return np.array(found, dtype=np.float64)
