"""A run for people: tables on the terminal and in Markdown."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

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
CLIENT_DISTRIBUTIONS = ("client_ttft_s", "client_e2e_s")
COLUMNS = ("mean", "p50", "p90", "p95", "p99", "max")


EXTRAPOLATED_SHARE = 0.05
"""Share of iterations outside the measured range of a calibration above which a run warns."""


def warn_if_extrapolated(summaries: Iterable[Mapping[str, Any]]) -> None:
    """Warn on stderr if many iterations of a run lie outside what its calibration measured."""
    share = max((summary["extrapolated_share"] or 0.0 for summary in summaries), default=0.0)
    if share > EXTRAPOLATED_SHARE:
        print(
            f"warning: {100 * share:.1f} % of the iterations lie outside the range that the calibration measured, so "
            "their times are extrapolated; shorten the prompts (workload=only_4096), choose another gpu= or latency=, "
            "or measure the range (python -m hw.calibrate)",
            file=sys.stderr,
        )


NEAR_MAXIMUM = 0.9
"""Utilization from which a run warns."""


def warn_if_near_maximum(summaries: Iterable[Mapping[str, Any]]) -> None:
    """Warn on stderr if the requests of a run come about as fast as its server can finish them."""
    near = max(summaries, key=lambda summary: summary.get("utilization") or 0.0, default={})
    if (share := near.get("utilization") or 0.0) >= NEAR_MAXIMUM:
        print(
            f"warning: {near['request_rate_rps']:.3g} requests/s are {100 * share:.0f} % of the maximum rate of this "
            f"server, {near['max_rate_rps']:.3g} requests/s; near it TTFT depends on small errors of the prices: "
            "compare max_rate_rps, not TTFT",
            file=sys.stderr,
        )


def print_summary(summary: Mapping[str, Any], title: str, console: Console | None = None) -> None:
    """Print the figures of one replay: tables on a terminal, plain ``name value`` lines in a pipe or file."""
    warn_if_extrapolated([summary])
    warn_if_near_maximum([summary])
    console = console or Console()
    rates = {
        "SLO attainment": _percent(summary["slo_attainment"]),
        **({} if summary.get("utility") is None else {"utility": shown_number(summary["utility"])}),
        "goodput_rps": shown_number(summary["goodput_rps"]),
        "request_rate_rps": shown_number(summary["request_rate_rps"]),
        **_rates_shown(summary),
        "output_tokens_per_s": shown_number(summary["output_tokens_per_s"]),
        "makespan_s": shown_number(summary["makespan_s"]),
        "KV peak share": _percent(summary["kv_peak_share"]),
        "budget_violation_s": shown_number(summary["budget_violation_s"]),
        "kept params share": _percent(summary["kept_params_share"]),
        "extrapolated iterations": _percent(summary["extrapolated_share"]),
        "requests_per_cpu_s": shown_number(summary["requests_per_cpu_s"]),
    }
    distributions = (*DISTRIBUTIONS, *(CLIENT_DISTRIBUTIONS if _has_front_end(summary) else ()))
    if not console.is_terminal:
        console.print(title, markup=False, highlight=False)
        for name in COUNTS:
            console.print(f"{name} {summary[name]}", highlight=False)
        for name in distributions:
            values = " ".join(f"{c}={shown_number(summary[name][c])}" for c in COLUMNS)
            console.print(f"{name} {values}", highlight=False, soft_wrap=True)
        for name, value in rates.items():
            console.print(f"{name.replace(' ', '_')} {value}", highlight=False)
        _print_note(summary, console)
        return
    latencies = Table(title=title, title_justify="left")
    latencies.add_column("seconds")
    for column in COLUMNS:
        latencies.add_column(column, justify="right")
    for name in distributions:
        heading = name.removesuffix("_s").upper().replace("CLIENT_", "client ")
        latencies.add_row(heading, *(shown_number(summary[name][c]) for c in COLUMNS))
    console.print(latencies)
    counts = Table(show_header=False)
    for name, value in [*((n, str(summary[n])) for n in COUNTS), *rates.items()]:
        counts.add_row(name, value)
    console.print(counts)
    _print_note(summary, console)


def _rates_shown(summary: Mapping[str, Any]) -> dict[str, str]:
    """Return the maximum rate and the utilization as text, if they were measured."""
    if summary.get("max_rate_rps") is None:
        return {}
    return {"max_rate_rps": shown_number(summary["max_rate_rps"]), "utilization": _percent(summary["utilization"])}


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


UTILITY_COLUMNS = {"utility": ("utility", 1.0, 3, "")}
"""Columns of runs whose utility is known (``sim.results.utility``), next to their SLO attainment."""


CLIENT_COLUMNS = {"client TTFT P95 (s)": ("client_ttft_s.p95", 1.0, 2, "")}
"""Columns of runs with a front end, in addition."""


RATE_COLUMNS = {
    "maximum rate (req/s)": ("max_rate_rps", 1.0, 2, ""),
    "utilization": ("utilization", 100.0, 1, " %"),
}
"""Columns of runs whose maximum rate was measured, in addition."""


def _has_front_end(summary: Mapping[str, Any]) -> bool:
    """Return whether clients see other times than the engine."""
    return any(summary.get(f"client_{name}", summary[name]) != summary[name] for name in ("ttft_s", "e2e_s"))


def _is_unknown(summary: Mapping[str, Any]) -> bool:
    """Return whether the quality of a run is unknown although others of its model have one."""
    return str(summary.get("quality_note") or "").startswith("quality unknown")


Columns = Mapping[str, tuple[str, float, int, str]]


def columns_of(rows: Mapping[str, Sequence[Mapping[str, Any]]], columns: Columns = SUMMARY_COLUMNS) -> Columns:
    """Return the columns of a table of these rows: ``columns``, and others that some row needs."""
    summaries = [summary for row in rows.values() for summary in row]
    if "SLO attainment" in columns and any(summary.get("utility") is not None for summary in summaries):
        at = 1 + list(columns).index("SLO attainment")
        columns = dict([*list(columns.items())[:at], *UTILITY_COLUMNS.items(), *list(columns.items())[at:]])
    seen = CLIENT_COLUMNS if any(map(_has_front_end, summaries)) else {}
    rates = RATE_COLUMNS if any(summary.get("max_rate_rps") is not None for summary in summaries) else {}
    return {**columns, **seen, **rates}


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
    warn_if_extrapolated([summary for summaries in rows.values() for summary in summaries])
    warn_if_near_maximum([summary for summaries in rows.values() for summary in summaries])
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


def shown_number(value: float | None) -> str:
    """Return a number in four digits, or in whole numbers from 1,000 on; ``-`` for none."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"
