"""Fit the tables of the embedded default trace to a real one.

    python -m sim.fit_trace              # both Azure traces of 2023 -> conf/trace/tables/azure_{code,conv}.yaml

The same files give the same tables, byte for byte. The real traces are found as ``sim.paths.find_data`` finds them.
"""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from sim.errors import RapLabError
from sim.traces.generate import TABLES
from sim.traces.readers.azure import read_azure
from sim.traces.trace import Trace
from sim.types import Floats, Ints

BIN_S = 5.0
"""Short enough that bursts and pauses of the code trace keep their shape, long enough for a table of one page."""

# Every percent, and finer where the tails are.
SHARES = np.unique(
    np.round(np.concatenate([[0, 0.001, 0.0025, 0.005], np.arange(0.01, 1, 0.01), [0.995, 0.9975, 0.999, 1]]), 4)
)

FILES = {
    "azure_code": "traces/azure2023/AzureLLMInferenceTrace_code.head_before_1900.csv.gz",
    "azure_conv": "traces/azure2023/AzureLLMInferenceTrace_conv.head_before_1900.csv.gz",
}


def requests_per_bin(trace: Trace, bin_s: float) -> Ints:
    """Return how many requests arrive in each bin from time 0, without the last, which the trace only begins."""
    counts: Ints = np.bincount((trace.arrival_s // bin_s).astype(np.int64))
    return counts[: max(1, int(trace.arrival_s[-1] // bin_s))]


def gaps_inside_bins_s(trace: Trace, bin_s: float) -> Floats:
    """Return the gaps between successive requests that lie in the same bin."""
    bin_of = trace.arrival_s // bin_s
    gaps: Floats = np.diff(trace.arrival_s)[bin_of[1:] == bin_of[:-1]]
    return gaps


def table_text(name: str, trace: Trace, *, bin_s: float = BIN_S) -> str:
    """Return the table of a trace as YAML, with its source, licence and the facts it was fitted to."""
    lines = [
        f"# Azure LLM inference trace 2023, {name.removeprefix('azure_')}: what sim.traces.generate.burst draws from.",
        "# Written by `python -m sim.fit_trace`; do not edit by hand.",
        f"name: {name}",
        "repository: https://github.com/Azure/AzurePublicDataset",
        "commit: b469a113cedca53ddc3bdea71a143dc4b7d8700c",
        "licence: CC-BY 4.0",
        "cite: Patel et al., Splitwise, ISCA 2024",
        f"file: {FILES.get(name, trace.source)}  # rows of the original before 2023-11-16 19:00:00",
        f"rows: {len(trace)}",
        f"mean_rate_rps: {trace.mean_rate_rps:.4f}",
        f"interarrival_cv: {trace.interarrival_cv:.4f}",
        f"peak_rate_60s_rps: {trace.peak_rate_rps(60.0):.4f}  # any 60 s",
        f"bin_s: {bin_s:g}",
        "requests_per_bin:",
        _list(str(count) for count in requests_per_bin(trace, bin_s)),
    ]
    columns = {
        "gap_s": (gaps_inside_bins_s(trace, bin_s), "seconds between requests of one bin"),
        "prompt_tokens": (trace.prompt_tokens, "tokens"),
        "output_tokens": (trace.output_tokens, "tokens"),
    }
    for column, (values, comment) in columns.items():
        digits = 5 if column == "gap_s" else 1
        quantiles = np.quantile(values, SHARES)
        lines += [
            f"{column}:  # {comment}; value is the quantile at each share",
            "  share:",
            _list((f"{share:g}" for share in SHARES), indent=4),
            "  value:",
            _list((f"{value:.{digits}f}".rstrip("0").rstrip(".") for value in quantiles), indent=4),
        ]
    return "\n".join(lines) + "\n"


def _list(items: Iterable[str], *, indent: int = 2) -> str:
    text = "[" + ", ".join(items) + "]"
    pad = " " * indent
    return textwrap.fill(text, width=118, initial_indent=pad, subsequent_indent=pad + " ", break_on_hyphens=False)


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the tables; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m sim.fit_trace", description=__doc__.split("\n")[0] if __doc__ else ""
    )
    parser.add_argument("--out", type=Path, default=TABLES, help="folder to write to (default: conf/trace/tables)")
    out: Path = parser.parse_args(arguments).out
    try:
        tables = {name: table_text(name, read_azure(file, name=name)) for name, file in FILES.items()}
    except RapLabError as error:
        print(error, file=sys.stderr)
        return 1
    out.mkdir(parents=True, exist_ok=True)
    for name, text in tables.items():
        (out / f"{name}.yaml").write_text(text, encoding="utf-8")
        print(f"wrote {out / name}.yaml")
    return 0
