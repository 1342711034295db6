"""What hw.fit prints, writes and plots."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from hw.fit.diagnosis import Diagnosis, shown_ms
from hw.fit.errors import LATENCIES, STATISTICS
from hw.fit.fitting import Fitted
from hw.fit.measured import MeasuredRun
from hw.fit.parameters import FLOOR, shown
from hw.fit.regression import Costs
from hw.fit.server import Simulated
from sim.cost.front_end import FrontEnd
from sim.pages.render import show
from sim.results.plots import COLORS, figure_file
from sim.results.run_folder import write_text
from sim.types import Floats

FRONT_END_HEAD = "# The front end of the server that calibration"
"""How the files of fitted front ends begin."""


def print_diagnosis(found: Diagnosis, console: Console) -> None:
    """Print what a run shows with nothing fitted."""
    run = found.run
    console.print(
        f"{run.source}: {run.kind}, {len(run):,} requests, {show(_finite(run.rate_rps), '.3g')} req/s, prompts of "
        f"{int(run.prompt_tokens.min()):,} to {int(run.prompt_tokens.max()):,} tokens, measured by the {run.side}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    for phrase in run.left_out:
        console.print(f"  left out: {phrase}", highlight=False, markup=False, soft_wrap=True)
    table = Table(title="nothing fitted")
    for heading in ("figure", "real", "simulated"):
        table.add_column(heading, justify="left" if heading == "figure" else "right")
    for row in _figures(found):
        table.add_row(*row)
    console.print(table)
    for sentence in found.sentences:
        console.print(f"- {sentence}", highlight=False, markup=False, soft_wrap=True)


def _figures(found: Diagnosis) -> list[tuple[str, str, str]]:
    run, done = found.run, found.simulated_run
    rows = []
    if found.real is not None and found.simulated is not None:
        for label, name, factor in (
            ("a token alone, ms", "base_s", 1e3),
            ("more for a running sequence, ms", "sequence_s", 1e3),
            ("more for a prompt that comes in, ms", "prompt_s", 1e3),
        ):
            place = ("base_s", "sequence_s", "prompt_s").index(name)
            cells = [_with_error(one, name, place, factor) for one in (found.real, found.simulated)]
            rows.append((label, *cells))
    rows += [
        ("TTFT P50, ms", *(f"{1e3 * float(np.nanmedian(one.ttft_s)):.4g}" for one in (run, done))),
        ("mean gap P50, ms", *(_median_ms(one.tpot_s) for one in (run, done))),
        ("TTFT gathers at, ms", shown_ms(found.steps_s[0]), shown_ms(found.steps_s[1])),
        ("most sequences that decode", str(found.peak[0]), str(found.peak[1])),
        ("prompt lengths repeat after", str(found.period or "-"), "-"),
        ("maximum rate, req/s", "-", show(found.most_rps, ".3g")),
        ("share of it that is offered", "-", show(found.utilization, ".0%")),
        ("busy time that prompts take", "-", show(found.prefill_share, ".0%")),
    ]
    return rows  # type: ignore[return-value]


def _with_error(costs: Costs, name: str, place: int, factor: float) -> str:
    return f"{factor * getattr(costs, name):.3g} +- {factor * costs.error[place]:.1g}"


def _median_ms(values: Floats) -> str:
    known = values[np.isfinite(values)]
    return f"{1e3 * float(np.median(known)):.4g}" if len(known) else "-"


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None


def print_fit(fitted: Fitted, console: Console) -> None:
    """Print the fitted numbers and their ranges."""
    table = Table(title="fitted on the first two thirds, after the warm-up")
    for heading in ("number", "value", "P5 to P95"):
        table.add_column(heading, justify="left" if heading == "number" else "right")
    for name, value in fitted.point.values.items():
        low, high = fitted.ranges[name]
        table.add_row(name, shown(name, value), f"{shown(name, low)} to {shown(name, high)}")
    console.print(table)
    console.print(
        f"loss of the held-out third: {fitted.fitted:.3g} fitted, {fitted.nothing:.3g} with nothing fitted",
        highlight=False,
    )


def print_errors(title: str, columns: Mapping[str, Mapping[str, Any]], console: Console) -> None:
    """Print relative errors, a column for each way to simulate."""
    table = Table(title=title)
    table.add_column("figure")
    table.add_column("real", justify="right")
    for heading in columns:
        table.add_column(heading, justify="right")
    for name in LATENCIES:
        for statistic in STATISTICS:
            cells = [column[name][statistic] for column in columns.values()]
            real = cells[0]["real"]
            shown_real = "-" if real is None else f"{real:.4g} s"
            table.add_row(
                f"{name.removesuffix('_s').upper()} {statistic if statistic == 'mean' else statistic.upper()}",
                shown_real,
                *(show(cell["error"], "+.1%") for cell in cells),
            )
    console.print(table)


def diagnosis_content(found: Diagnosis) -> dict[str, Any]:
    """Return a diagnosis as JSON."""
    return {
        "run": found.run.source,
        "kind": found.run.kind,
        "side": found.run.side,
        "requests": len(found.run),
        "rate_rps": _finite(found.run.rate_rps),
        "left_out": list(found.run.left_out),
        "costs": {
            "real": None if found.real is None else asdict(found.real),
            "simulated": None if found.simulated is None else asdict(found.simulated),
        },
        "ttft_steps_s": {"real": found.steps_s[0], "simulated": found.steps_s[1]},
        "most_decoding": {"real": found.peak[0], "simulated": found.peak[1]},
        "prompts_repeat_after": found.period,
        "distinct_prompts": found.distinct,
        "warm_up_requests": found.warm_up,
        "max_rate_rps": found.most_rps,
        "utilization": found.utilization,
        "prefill_share": found.prefill_share,
        "sentences": list(found.sentences),
    }


def calibration_content(
    base: Mapping[str, Any], name: str, fitted: Fitted, front_end: FrontEnd, about: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the calibration of a fit: the tables of its base with factors, and what they were fitted on."""
    factors = fitted.point.factors
    more_us = 1e6 * fitted.point.values.get("fixed_s", 0.0)
    fixed = {"fixed_us": base["fixed_us"] + more_us}
    if more_us:
        fixed["fixed_source"] = f"{base['fixed_source']}; plus {more_us:.4g} us by hw.fit"
    if FLOOR in fitted.point.values:
        fixed["host_floor_us"] = 1e6 * fitted.point[FLOOR]
    return {
        **base,
        **fixed,
        "name": name,
        "kind": "fitted",
        "date": datetime.date.today().isoformat(),
        "notes": [
            f"hw.fit fitted {', '.join(fitted.point.values)} to the run of a server, on the tables of {base['name']}; "
            "errors are those of these tables",
            *base["notes"],
        ],
        "factors": {"memory_bound": factors.memory_bound, "compute_bound": factors.compute_bound},
        "fit": {
            **about,
            "values": dict(fitted.point.values),
            "ranges_p5_p95": {key: list(value) for key, value in fitted.ranges.items()},
            "front_end": asdict(front_end),
            "held_out_loss": {"nothing_fitted": fitted.nothing, "fitted": fitted.fitted},
        },
    }


def write_front_end(path: Path, front_end: FrontEnd, calibration: str) -> None:
    """Write an option of the group ``frontend``."""
    write_text(
        path,
        f"{FRONT_END_HEAD} {calibration} was fitted to, by hw.fit.\n"
        "_target_: sim.cost.front_end.FrontEnd\n"
        f"front_s: {front_end.front_s:.6g}\n"
        f"front_token_s: {front_end.front_token_s:.6g}\n"
        f"back_s: {front_end.back_s:.6g}\n",
    )


def plot(path: Path, run: MeasuredRun, sides: Mapping[str, Simulated]) -> None:
    """Draw the distributions of TTFT and of mean gaps, and TTFT over time, real and simulated."""
    series: list[tuple[str, Any, str, str]] = [("real", run, "0.25", "-")]
    series += [(name, one, COLORS[i], "--") for i, (name, one) in enumerate(sides.items())]
    with figure_file(path, 1, 3, size=(15, 4.5), title=run.name) as (figure, axes):
        for label, moments, color, style in series:
            for axis, values in zip(axes[:2], (1e3 * moments.ttft_s, 1e3 * moments.tpot_s), strict=True):
                known = np.sort(values[np.isfinite(values)])
                axis.step(
                    known, 100 * np.arange(1, len(known) + 1) / max(len(known), 1), style, color=color, label=label
                )
            axes[2].plot(run.arrival_s, 1e3 * moments.ttft_s, ".", markersize=3, color=color)
        axes[0].set(xlabel="TTFT [ms]", ylabel="requests up to it [%]", xscale="log")
        axes[1].set(xlabel="mean gap between tokens of a request [ms]", ylabel="requests up to it [%]")
        axes[2].set(xlabel="sent [s]", ylabel="TTFT [ms]", yscale="log")
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(series))


def joined(phrases: Sequence[str]) -> str:
    """Return phrases as one."""
    return "; ".join(phrases)
