"""A trace file in any format that this folder reads, recognized by the names of its columns."""

from __future__ import annotations

import csv
import inspect
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sim.errors import TraceError
from sim.traces.readers.aiperf import read_aiperf
from sim.traces.readers.arguments import check_flag, check_number
from sim.traces.readers.azure import read_azure
from sim.traces.readers.burstgpt import read_burstgpt
from sim.traces.readers.csv_table import DELIMITERS
from sim.traces.readers.files import MAX_BYTES, MAX_ROWS, PARQUET_MAGIC, OnBadRow, TraceFile, read_head
from sim.traces.readers.formats import Format, format_of
from sim.traces.readers.guidellm import read_guidellm
from sim.traces.readers.inference_sim import read_inference_sim
from sim.traces.readers.llmservingsim import read_llmservingsim
from sim.traces.readers.mooncake import read_mooncake
from sim.traces.readers.native import column_names, read_trace
from sim.traces.readers.qwen_bailian import read_qwen_bailian
from sim.traces.readers.rows import TimeUnit
from sim.traces.readers.splitwise import read_splitwise
from sim.traces.readers.vidur import read_vidur
from sim.traces.readers.vllm_bench import read_vllm_bench
from sim.traces.trace import Trace

READERS: dict[str, Callable[..., Trace]] = {
    "aiperf": read_aiperf,
    "azure_conv": read_azure,
    "azure_multimodal": read_azure,
    "burstgpt": read_burstgpt,
    "guidellm": read_guidellm,
    "inference_sim": read_inference_sim,
    "llmservingsim": read_llmservingsim,
    "mooncake": read_mooncake,
    "qwen_bailian": read_qwen_bailian,
    "splitwise": read_splitwise,
    "vidur": read_vidur,
    "vllm_bench": read_vllm_bench,
}
"""What reads each option of conf/trace that a file can be recognized as."""
FINE_CLOCK = {"mooncake": {"time_quantum_s": 0.0}}
"""What the option's YAML states and its reader's defaults do not."""
KEY = re.compile(rb'"([A-Za-z_ ]{1,40})"\s*:')


def read_any(
    path: str | Path,
    *,
    columns: Mapping[str, str | None] | None = None,
    time_unit: TimeUnit | None = None,
    on_bad_row: OnBadRow = "error",
    sort: bool = False,
    rebase: bool = False,
    time_quantum_s: float = 0.0,
    max_rows: int = MAX_ROWS,
    max_bytes: int = MAX_BYTES,
    name: str | None = None,
) -> Trace:
    """Return the trace of a file in the project's own format, or in another one that its column names give away.

    Files of other formats are read as the option of that format does, with its defaults; the history says which.

    Args:
        path: the file; plain, gzip, bz2, xz or zstd.
        columns: as ``read_trace``; where a name differs from the own format's, the file is read with these names.
        time_unit: s, ms, us, ns or iso; None takes the format's own (seconds for the own format).
        on_bad_row, sort, rebase, time_quantum_s, max_rows, max_bytes, name: as ``read_trace``.
    Raises:
        TraceError: if the file or a row of it cannot be used, or an argument does not fit its format.
    """
    file = TraceFile(path=path, on_bad_row=on_bad_row, max_rows=max_rows, max_bytes=max_bytes)
    limits: dict[str, Any] = {"on_bad_row": on_bad_row, "sort": sort, "max_rows": max_rows, "max_bytes": max_bytes}
    renamed = any(own != name for own, name in column_names(columns).items())
    known = None if renamed else _recognized(file)
    if known is None or known.option not in READERS:
        return read_trace(
            path,
            columns=columns,
            time_unit=time_unit or "s",
            rebase=rebase,
            time_quantum_s=time_quantum_s,
            name=name,
            **limits,
        )
    reader = READERS[known.option]
    takes = inspect.signature(reader).parameters
    chosen = {"time_unit": time_unit} if time_unit is not None else {}
    check_flag("rebase", rebase)
    check_number("time_quantum_s", time_quantum_s)
    if time_quantum_s:
        chosen["time_quantum_s"] = time_quantum_s  # type: ignore[assignment]
    for key in chosen:
        if key not in takes:
            raise TraceError(
                f"{path} is {known.title} (trace={known.option}), which takes no trace.{key}; leave it out, or name "
                "the columns in trace.columns"
            )
    arguments = {**FINE_CLOCK.get(known.option, {}), **limits, **chosen, "name": name or Path(path).name.split(".")[0]}
    trace = reader(path, **{key: value for key, value in arguments.items() if key in takes})
    return trace.with_history(f"recognized as {known.title}, read as trace={known.option} does")


def _recognized(file: TraceFile) -> Format | None:
    """Return the format that the first megabyte of a file names, or None."""
    head = read_head(file)
    if head.startswith(PARQUET_MAGIC):
        return None
    if head.lstrip().startswith((b"{", b"[")):
        return format_of({key.decode() for key in KEY.findall(head)})
    line = head.split(b"\n", 1)[0].decode(errors="replace")[:100_000]
    for delimiter in DELIMITERS:
        try:
            known = format_of(next(csv.reader([line], delimiter=delimiter, skipinitialspace=True), []))
        except csv.Error:
            continue
        if known is not None:
            return known
    return None
