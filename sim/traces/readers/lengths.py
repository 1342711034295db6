"""Files with lengths but no arrivals: requests of a data set under a chosen arrival process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np

from sim.errors import TraceError
from sim.traces.readers.arguments import check_choice, check_name
from sim.traces.readers.files import MAX_BYTES, MAX_ROWS, OnBadRow, TraceFile
from sim.traces.readers.rows import Rows, read_table
from sim.traces.trace import Trace
from sim.types import Floats

ORIGIN = "https://github.com/microsoft/vidur (data/processed_traces, commit 7d47513363ec447a741ac5e47241580b47724fbf)"

Order = Literal["shuffle", "file"]


def read_lengths(
    path: str | Path,
    *,
    arrivals: Callable[[np.random.Generator], Floats],
    seed: int = 0,
    order: Order = "shuffle",
    prompt_column: str = "num_prefill_tokens",
    output_column: str = "num_decode_tokens",
    total_column: str | None = "num_total_tokens",
    on_bad_row: OnBadRow = "error",
    max_rows: int = MAX_ROWS,
    max_bytes: int = MAX_BYTES,
    name: str = "lengths",
) -> Trace:
    """Return a trace with lengths from a file and arrivals from a process.

    Each row is used at most once, so the process must not generate more requests than the file has rows.

    Args:
        path: CSV (plain or packed), JSON lines or Parquet with one row per request.
        arrivals: a process of ``sim.traces.generate`` with its parameters bound, such as
            ``partial(poisson_arrivals, rate_rps=2.0, duration_s=600.0)``: takes a random generator, returns sorted
            seconds.
        seed: of the arrivals and the order.
        order: "shuffle" takes the rows in random order, "file" in file order.
        prompt_column, output_column: the names of the two columns.
        total_column: a column that must be their sum, where the file has it.
        on_bad_row, max_rows, max_bytes, name: as ``read_azure``.
    Raises:
        TraceError: if the file or a row of it cannot be used, or it has fewer rows than the process has arrivals.
    Source:
        Agrawal et al., Vidur (MLSys 2024), whose repository publishes such files, MIT.
    """
    check_choice("order", order, Order)
    check_name("prompt_column", prompt_column)
    check_name("output_column", output_column)
    if total_column is not None:
        check_name("total_column", total_column)
    file = TraceFile(path=path, on_bad_row=on_bad_row, max_rows=max_rows, max_bytes=max_bytes, origin=ORIGIN)
    optional = () if total_column is None else (total_column,)
    rows = Rows(read_table(file, required=(prompt_column, output_column), optional=optional))
    prompt_tokens, output_tokens = rows.tokens(prompt_column), rows.tokens(output_column)
    if total_column is not None:
        rows.check_total(total_column, prompt_tokens, output_tokens)
    steps = [f"read {len(rows.table.line) + len(rows.table.broken):,} rows of {path}"]
    usable = np.flatnonzero(rows.good_rows(steps))
    arrivals_rng, order_rng = np.random.default_rng(seed).spawn(2)
    arrival_s = arrivals(arrivals_rng)
    if len(arrival_s) > len(usable):
        raise TraceError(
            f"{path} has {len(usable):,} usable rows but the arrival process generates {len(arrival_s):,} requests; "
            "lower trace.arrivals.rate_rps or trace.arrivals.duration_s, or repeat the result (workload=repeat_3)"
        )
    if order == "shuffle":
        usable = order_rng.permutation(usable)
    chosen = usable[: len(arrival_s)]
    steps.append(f"took {len(chosen):,} rows ({order} order) for the arrivals of the process, seed={seed}")
    return Trace(
        arrival_s=arrival_s,
        prompt_tokens=prompt_tokens[chosen],
        output_tokens=output_tokens[chosen],
        name=name,
        source=str(path),
        history=tuple(steps),
    )
