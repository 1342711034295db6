"""A run for people: tables on the terminal and in Markdown, and a plot."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from sim.atomic import write_whole
from sim.results.metrics import Slo
from sim.results.records import Iterations, Records, Status

COUNTS = (
    "requests",
    "finished",
    "rejected",
    "unfinished",
    "truncated",
    "not_arrived",
    "preemptions",
    "transitions",
    "iterations",
)
DISTRIBUTIONS = ("ttft_s", "tpot_s", "itl_s", "e2e_s")
COLUMNS = ("mean", "p50", "p90", "p95", "p99", "max")


def print_summary(summary: Mapping[str, Any], title: str, console: Console | None = None) -> None:
    """Print the figures of one replay: tables on a terminal, plain ``name value`` lines in a pipe or file."""
    console = console or Console()
    rates = {
        "SLO attainment": _percent(summary["slo_attainment"]),
        "goodput_rps": _number(summary["goodput_rps"]),
        "request_rate_rps": _number(summary["request_rate_rps"]),
        "output_tokens_per_s": _number(summary["output_tokens_per_s"]),
        "makespan_s": _number(summary["makespan_s"]),
        "KV peak share": _percent(summary["kv_peak_share"]),
        "budget_violation_s": _number(summary["budget_violation_s"]),
        "kept params share": _percent(summary["kept_params_share"]),
        "extrapolated iterations": _percent(summary["extrapolated_share"]),
        "requests_per_cpu_s": _number(summary["requests_per_cpu_s"]),
    }
    if not console.is_terminal:
        console.print(title, markup=False, highlight=False)
        for name in COUNTS:
            console.print(f"{name} {summary[name]}", highlight=False)
        for name in DISTRIBUTIONS:
            values = " ".join(f"{c}={_number(summary[name][c])}" for c in COLUMNS)
            console.print(f"{name} {values}", highlight=False, soft_wrap=True)
        for name, value in rates.items():
            console.print(f"{name.replace(' ', '_')} {value}", highlight=False)
        _print_note(summary, console)
        return
    latencies = Table(title=title, title_justify="left")
    latencies.add_column("seconds")
    for column in COLUMNS:
        latencies.add_column(column, justify="right")
    for name in DISTRIBUTIONS:
        latencies.add_row(name.removesuffix("_s").upper(), *(_number(summary[name][c]) for c in COLUMNS))
    console.print(latencies)
    counts = Table(show_header=False)
    for name, value in [*((n, str(summary[n])) for n in COUNTS), *rates.items()]:
        counts.add_row(name, value)
    console.print(counts)
    _print_note(summary, console)


def _print_note(summary: Mapping[str, Any], console: Console) -> None:
    if note := summary.get("quality_note"):
        console.print(f"note: {note}", markup=False, highlight=False, soft_wrap=True)


def print_notes(rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Print what readers of a table have to know of the quality of its rows, each sentence once per row."""
    for label, summaries in rows.items():
        for note in sorted({summary["quality_note"] for summary in summaries if summary.get("quality_note")}):
            print(f"note: {label}: {note}")


SUMMARY_COLUMNS = {
    "SLO attainment": ("slo_attainment", 100.0, 1, " %"),
    "TTFT P95 (s)": ("ttft_s.p95", 1.0, 2, ""),
    "TPOT P50 (ms)": ("tpot_s.p50", 1e3, 1, ""),
    "preemptions": ("preemptions", 1.0, 0, ""),
    "recomputed (k tokens)": ("recomputed_tokens", 1e-3, 0, ""),
    "over budget (s)": ("budget_violation_s", 1.0, 2, ""),
    "params kept": ("kept_params_share", 100.0, 1, " %"),
    "below 16 bits": ("low_precision_share", 100.0, 1, " %"),
    "perplexity / dense": ("perplexity_ratio", 1.0, 3, ""),
    "plan changes": ("transitions", 1.0, 0, ""),
    "makespan (s)": ("makespan_s", 1.0, 0, ""),
}
"""Heading -> (key of the summary, factor, decimals, unit).

params kept: share of the parameters that computed the tokens, at any precision. below 16 bits: share of the layers,
averaged over time.
"""


def _is_unknown(summary: Mapping[str, Any]) -> bool:
    """Return whether the quality of a run is unknown although others of its model have one."""
    return str(summary.get("quality_note") or "").startswith("quality unknown")


Columns = Mapping[str, tuple[str, float, int, str]]


def cells(summaries: Sequence[Mapping[str, Any]], columns: Columns = SUMMARY_COLUMNS) -> list[str]:
    """Return the cells of one table row: the mean over its summaries and, of several, the standard deviation."""
    found = []
    for key, factor, decimals, unit in columns.values():
        values = []
        for value in summaries:
            for part in key.split("."):
                value = value[part]
            if value is not None:
                values.append(factor * float(value))  # type: ignore[arg-type]
        if key == "perplexity_ratio" and any(map(_is_unknown, summaries)):
            found.append("unknown")
        elif not values:
            found.append("-")
        elif len(summaries) == 1:
            found.append(f"{values[0]:,.{decimals}f}{unit}")
        else:
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            found.append(f"{statistics.fmean(values):,.{decimals}f} ± {spread:,.{decimals}f}{unit}")
    return found


def markdown(
    rows: Mapping[str, Sequence[Mapping[str, Any]]], first: str = "policy", columns: Columns = SUMMARY_COLUMNS
) -> str:
    """Return a Markdown table with one row per label, over that label's summaries."""
    lines = [f"| {first} | " + " | ".join(columns) + " |", "|---|" + "---:|" * len(columns)]
    lines += [f"| {label} | " + " | ".join(cells(summaries, columns)) + " |" for label, summaries in rows.items()]
    return "\n".join(lines) + "\n"


def print_rows(
    rows: Mapping[str, Sequence[Mapping[str, Any]]],
    title: str,
    first: str = "policy",
    columns: Columns = SUMMARY_COLUMNS,
) -> None:
    """Print the table of ``markdown``: with lines on a terminal, as Markdown in a pipe or file."""
    console = Console()
    if not console.is_terminal:
        print(title, markdown(rows, first, columns), sep="\n\n", end="")
        return
    table = Table(title=title, title_justify="left")
    table.add_column(first)
    for heading in columns:
        table.add_column(heading, justify="right")
    for label, summaries in rows.items():
        table.add_row(label, *cells(summaries, columns))
    console.print(table)


def plot_replay(path: Path, records: Records, iterations: Iterations, slo: Slo, title: str) -> None:
    """Write one PNG: arrivals, running and waiting requests, KV use and TTFT over time."""
    import matplotlib as mpl  # imported late: it is slow, and plots are rare

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(4, 1, figsize=(10, 9), sharex=True, layout="constrained")
    end_s = float(iterations.end_s[-1]) if len(iterations) else 1.0
    bin_s = max(1.0, np.ceil(end_s / 300))
    axes[0].hist(records.arrival_s, bins=np.arange(0.0, end_s + bin_s, bin_s), color="tab:gray")
    axes[0].set_ylabel(f"arrivals per {bin_s:g} s")
    axes[1].step(iterations.start_s, iterations.running, where="post", label="running", linewidth=0.8)
    axes[1].step(iterations.start_s, iterations.waiting, where="post", label="waiting", linewidth=0.8)
    axes[1].set_ylabel("requests")
    axes[1].legend(loc="upper right")
    axes[2].step(iterations.start_s, 100 * iterations.kv_used_share, where="post", color="tab:green", linewidth=0.8)
    axes[2].set_ylabel("KV blocks held, %")
    axes[2].set_ylim(0, 105)
    served = np.isfinite(records.first_token_s)
    axes[3].scatter(records.arrival_s[served], records.ttft_s[served], s=3, label="first token")
    rejected = records.status == Status.REJECTED
    if rejected.any():
        axes[3].scatter(
            records.arrival_s[rejected], np.zeros(rejected.sum()), s=12, marker="x", color="red", label="rejected"
        )
    if slo.ttft_s is not None:
        axes[3].axhline(slo.ttft_s, color="black", linestyle="--", linewidth=0.8, label=f"SLO {slo.ttft_s:g} s")
    axes[3].set_ylabel("TTFT, s")
    axes[3].set_xlabel("time (TTFT: of arrival), s")
    axes[3].legend(loc="upper right")
    figure.suptitle(title)
    write_whole(path, lambda part: figure.savefig(part, format="png", dpi=110))
    plt.close(figure)


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"
