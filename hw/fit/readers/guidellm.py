"""Results of ``guidellm benchmark``: one JSON document with benchmarks, each with its requests."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hw.fit.measured import Columns, MeasuredRun, measured_run
from hw.fit.readers.fields import field, numbers, objects
from sim.errors import ConfigError
from sim.traces.readers.guidellm import ENDS, OUTPUTS, PROMPTS, STARTS

TTFT_MS = ("time_to_first_token_ms",)
FIRST = ("first_token_time", "first_iteration", "timings.first_token_iteration", "timings.first_iteration")
LAST = ("last_token_time", "last_iteration", "timings.last_token_iteration", "timings.last_iteration")
GAP_MS = ("inter_token_latency_ms",)


def is_guidellm(content: Any) -> bool:
    """Return whether a document is such a result."""
    return isinstance(content, Mapping) and "benchmarks" in content


def read_guidellm(content: Mapping[str, Any], source: Path, benchmark: int | None) -> MeasuredRun:
    """Return one benchmark of a result as a run.

    Times of first and last tokens have had several names; without one of the last, it is the first plus the mean gap
    times the gaps, and without that the end of the request.

    Raises:
        ConfigError: if it has no such benchmark, or several and none is chosen.
    Source:
        vllm-project/guidellm, src/guidellm/benchmark, Apache-2.0.
    """
    benchmarks = objects(content["benchmarks"], source, "list of benchmarks")
    if benchmark is None and len(benchmarks) > 1:
        raise ConfigError(
            f"{source} has {len(benchmarks)} benchmarks, each a run of its own; set benchmark= to one of 0 to "
            f"{len(benchmarks) - 1}"
        )
    place = benchmark or 0
    if not 0 <= place < len(benchmarks):
        raise ConfigError(f"benchmark is {benchmark}; {source} has benchmarks 0 to {len(benchmarks) - 1}")
    requests = benchmarks[place].get("requests")
    found = requests.get("successful") if isinstance(requests, Mapping) else None
    entries = objects(found, source, "list requests.successful of that benchmark")
    sent_s, output = numbers(field(entries, *STARTS)), numbers(field(entries, *OUTPUTS))
    ttft_s = numbers(field(entries, *TTFT_MS), 1e3)
    first_s = np.where(np.isfinite(ttft_s), sent_s + ttft_s, numbers(field(entries, *FIRST)))
    last_s, end_s = numbers(field(entries, *LAST)), numbers(field(entries, *ENDS))
    by_gaps_s = first_s + numbers(field(entries, *GAP_MS), 1e3) * np.maximum(output - 1, 0)
    finish_s = np.where(np.isfinite(last_s), last_s, np.where(np.isfinite(by_gaps_s), by_gaps_s, end_s))
    columns = Columns(
        sent_s=sent_s,
        first_token_s=first_s,
        finish_s=finish_s,
        prompt_tokens=numbers(field(entries, *PROMPTS)),
        output_tokens=output,
    )
    name = f"{source.stem}_{place}" if len(benchmarks) > 1 else source.stem
    return measured_run(columns, name=name, source=str(source), kind="guidellm")
