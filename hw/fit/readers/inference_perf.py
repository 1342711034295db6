"""Results of inference-perf: ``per_request_lifecycle_metrics.json``, one object per request."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hw.fit.measured import Columns, MeasuredRun, measured_run
from hw.fit.readers.fields import field, numbers
from sim.types import Ints


def is_inference_perf(entries: Sequence[Any]) -> bool:
    """Return whether the entries of a list are such objects."""
    return bool(entries) and all(
        isinstance(entry, Mapping) and isinstance(entry.get("info"), Mapping) and "start_time" in entry
        for entry in entries[:3]
    )


def read_inference_perf(entries: Sequence[Mapping[str, Any]], source: Path) -> MeasuredRun:
    """Return the run of a list of requests. Texts of prompts, where the file has them, show which ones repeat.

    Source:
        kubernetes-sigs/inference-perf, docs/reports.md, Apache-2.0.
    """
    sent_s = numbers(field(entries, "start_time"))
    tokens = field(entries, "info.output_token_times", "info.response_chunk_times", "info.chunk_times")
    times = [numbers(cell) if isinstance(cell, list) else np.zeros(0) for cell in tokens]
    first_s = np.array([row[0] if len(row) else np.nan for row in times], dtype=np.float64)
    last_s = np.array([row[-1] if len(row) else np.nan for row in times], dtype=np.float64)
    ends_s = numbers(field(entries, "end_time"))
    errors = field(entries, "error")
    columns = Columns(
        sent_s=sent_s,
        first_token_s=first_s,
        finish_s=np.where(np.isfinite(last_s), last_s, ends_s),
        prompt_tokens=numbers(field(entries, "info.input_tokens", "info.request_metrics.text.input_tokens")),
        output_tokens=numbers(field(entries, "info.output_tokens", "info.response_metrics.output_tokens")),
        failed=np.array([bool(error) for error in errors], dtype=bool),
        itl_s=[np.diff(row)[np.diff(row) >= 0].tolist() for row in times],
        prompts=_prompts(field(entries, "request")),
    )
    return measured_run(columns, name=source.stem, source=str(source), kind="inference-perf")


def _prompts(requests: Sequence[Any]) -> Ints | None:
    """Return a number for each text, equal for equal texts; None if a request has none."""
    if not all(isinstance(text, str) and text for text in requests):
        return None
    digests = [hashlib.sha256(text.encode(errors="replace")).hexdigest() for text in requests]
    return np.unique(digests, return_inverse=True)[1].astype(np.int64)
