"""Results of ``vllm bench serve --save-result --save-detailed``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hw.fit.measured import Columns, MeasuredRun, measured_run
from hw.fit.readers.fields import gaps_of, numbers
from sim.errors import ConfigError

REQUIRED = ("input_lens", "output_lens", "ttfts", "itls")


def is_vllm_bench(content: Any) -> bool:
    """Return whether a document is such a result."""
    return isinstance(content, Mapping) and ("input_lens" in content or "request_throughput" in content)


def read_vllm_bench(content: Mapping[str, Any], source: Path) -> MeasuredRun:
    """Return the run of a result: each list has one entry per request, seconds.

    Raises:
        ConfigError: if it lacks a list, or lists differ in length.
    Source:
        vllm-project/vllm, vllm/benchmarks/serve.py, Apache-2.0.
    """
    lists = {name: content[name] for name in (*REQUIRED, "start_times", "errors") if content.get(name) is not None}
    missing = [name for name in (*REQUIRED, "start_times") if name not in lists]
    if missing:
        version = " of a version that writes start_times (0.10 and later)" if missing == ["start_times"] else ""
        raise ConfigError(f"{source} has no {missing[0]}; run vllm bench serve{version} with --save-detailed")
    lengths = {name: len(values) if isinstance(values, list) else -1 for name, values in lists.items()}
    if len(set(lengths.values())) != 1 or -1 in lengths.values():
        raise ConfigError(f"{source}: lists of different length: {lengths} (-1: no list); each needs one per request")
    sent_s, ttft_s = numbers(lists["start_times"]), numbers(lists["ttfts"])
    gaps = gaps_of(lists["itls"])
    output = numbers(lists["output_lens"])
    errors = lists.get("errors") or [""] * len(sent_s)
    columns = Columns(
        sent_s=sent_s,
        first_token_s=sent_s + ttft_s,
        finish_s=sent_s + ttft_s + np.array([sum(row) for row in gaps], dtype=np.float64),
        prompt_tokens=numbers(lists["input_lens"]),
        output_tokens=output,
        # A request without an answer has a TTFT of 0.
        failed=np.array([bool(error) for error in errors], dtype=bool) | ~(output > 0),
        itl_s=gaps,
    )
    return measured_run(columns, name=source.stem, source=str(source), kind="vllm bench serve")
