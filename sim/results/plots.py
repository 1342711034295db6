"""Figures of runs, in one style: the SLO is labeled, colors suit color-blind readers, no legend covers data."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sim.atomic import write_whole
from sim.results.metrics import Slo
from sim.results.records import Iterations, Records, Status
from sim.types import Floats

Steps = Sequence[tuple[float, int]]
"""A memory budget over time: (time_s, bytes), one entry per change, the first at 0 s."""

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Okabe and Ito's palette ("Color Universal Design", 2008), without black and the yellow that is faint on white."""
REFERENCE = "0.45"
"""Gray, for the line that the others are compared with."""
DASHES = ("-", "--", ":", "-.")
STYLE: Any = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.3,
    "lines.linewidth": 1.4,
    "font.size": 11,
    "legend.frameon": False,
    "savefig.dpi": 110,
}


@contextmanager
def figure_file(
    path: Path, rows: int = 1, columns: int = 1, *, size: tuple[float, float], title: str = "", **subplots: Any
) -> Iterator[tuple[Figure, Any]]:
    """Yield a figure and its axes, and write it as PNG at the end; a failed write leaves no partial file.

    Args:
        rows, columns: panels. size: width and height in inches. title: stands above the panels.
        subplots: further arguments of ``Figure.subplots``, such as ``sharex``.
    """
    import matplotlib as mpl  # imported late: it is slow, and plots are rare
    from cycler import cycler
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    logging.getLogger(mpl.__name__).setLevel(logging.WARNING)  # not that it made a list of fonts, at the first figure
    with mpl.rc_context({**STYLE, "axes.prop_cycle": cycler(color=COLORS)}):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        yield figure, figure.subplots(rows, columns, **subplots)
        if title:
            figure.suptitle(title)
        write_whole(path, lambda part: figure.savefig(part, format="png"))


def line_style(rank: int) -> dict[str, Any]:
    """Return color and dashes of the rank-th line; the first is the reference."""
    if rank == 0:
        return {"color": REFERENCE}
    turn, color = divmod(rank - 1, len(COLORS))
    return {"color": COLORS[color], "linestyle": DASHES[turn % len(DASHES)]}


def legend_above(axis: Any) -> None:
    """Put the legend of a panel above its upper edge, in one row."""
    handles, _ = axis.get_legend_handles_labels()
    axis.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=max(1, len(handles)), borderaxespad=0.1)


def mark_slo(axis: Any, target_s: float | None) -> None:
    """Draw a target of the SLO as a labeled horizontal line; nothing without a target."""
    if target_s is not None:
        axis.axhline(target_s, color="black", linestyle="--", linewidth=1.0, label=f"SLO: {target_s:g} s")


def plot_budgets(axis: Any, budgets: Sequence[Steps], end_s: float) -> None:
    """Draw moving memory budgets in GB; of several, the legend says how low each gets."""
    highest_gb = 0.0
    for rank, budget in enumerate(budgets):
        start_s, steps_gb = zip(*((at_s, size / 1e9) for at_s, size in budget if at_s < end_s), strict=True)
        style = {"color": "black", "linestyle": DASHES[rank % len(DASHES)]}
        label = f"budget, lowest {min(steps_gb):.1f} GB" if len(budgets) > 1 else None
        axis.step([*start_s, end_s], [*steps_gb, steps_gb[-1]], where="post", label=label, **style)
        highest_gb = max(highest_gb, *steps_gb)
    axis.set_ylabel("budget [GB]")
    axis.set_ylim(0, 1.05 * highest_gb)


def moves(budget: Steps, end_s: float) -> bool:
    """Return whether a budget changes before ``end_s``."""
    return any(0.0 < at_s < end_s for at_s, _ in budget)


def plot_replay(path: Path, records: Records, iterations: Iterations, slo: Slo, title: str, budget: Steps = ()) -> None:
    """Write one PNG: arrivals, running and waiting requests, KV use, TTFT and, if it moves, the budget over time."""
    end_s = float(iterations.end_s[-1]) if len(iterations) else 1.0
    panels = 5 if moves(budget, end_s) else 4
    with figure_file(path, panels, size=(10, 2.2 * panels), title=title, sharex=True) as (_, axes):
        bin_s = max(1.0, math.ceil(end_s / 300))
        axes[0].hist(records.arrival_s, bins=np.arange(0.0, end_s + bin_s, bin_s), color=REFERENCE)
        axes[0].set_ylabel("arrivals per second" if bin_s == 1 else f"arrivals per {bin_s:g} s")
        axes[1].step(iterations.start_s, iterations.running, where="post", label="running", linewidth=0.8)
        axes[1].step(iterations.start_s, iterations.waiting, where="post", label="waiting", linewidth=0.8)
        axes[1].set_ylabel("requests")
        legend_above(axes[1])
        axes[2].step(iterations.start_s, 100 * iterations.kv_used_share, where="post", color=COLORS[2], linewidth=0.8)
        axes[2].set_ylabel("KV blocks held [%]")
        axes[2].set_ylim(0, 105)
        _plot_ttft(axes[3], records, slo)
        if panels == 5:
            plot_budgets(axes[4], [budget], end_s)
        axes[-1].set_xlabel("time [s]")
        axes[-1].margins(x=0.01)


def _plot_ttft(axis: Any, records: Records, slo: Slo) -> None:
    """Draw the TTFT of each request at its arrival, the SLO, and rejected requests at 0."""
    served, rejected = np.isfinite(records.first_token_s), records.status == Status.REJECTED
    axis.scatter(records.arrival_s[served], records.ttft_s[served], s=3, label="a request, at its arrival")
    if rejected.any():
        zeros = np.zeros(rejected.sum())
        axis.scatter(
            records.arrival_s[rejected], zeros, s=12, marker="x", color=COLORS[1], label="rejected", clip_on=False
        )
    mark_slo(axis, slo.ttft_s)
    axis.set_ylabel("TTFT [s]")
    axis.set_ylim(bottom=0)
    legend_above(axis)


@dataclass(frozen=True, slots=True)
class Line:
    """One run of a comparison.

    kept_share: (time_s, share of the dense weights' bytes that is resident), one entry per change.
    """

    records: Records
    iterations: Iterations
    kept_share: Sequence[tuple[float, float]]


def plot_comparison(path: Path, lines: Mapping[str, Line], slo: Slo, title: str, budgets: Sequence[Steps] = ()) -> None:
    """Write one PNG with a line per label: worst TTFT and longest queue in each of about 150 bins of time, weights.

    The first label is the reference: gray. Later ones lie on top. Budgets that move get a panel.
    """
    last_s = max([1.0, *(float(line.iterations.end_s[-1]) for line in lines.values() if len(line.iterations))])
    bin_s = max(1.0, math.ceil(last_s / 150))
    moving = [budget for budget in budgets if moves(budget, last_s)]
    panels = 4 if moving else 3
    ratios: dict[str, Any] = {"height_ratios": [3, 3, 3, 1.5][:panels]}
    with figure_file(path, panels, size=(9, 7.5 + 1.3 * (panels - 3)), title=title, sharex=True, **ratios) as made:
        figure, axes = made
        for rank, (label, line) in enumerate(lines.items()):
            style, records, iterations = line_style(rank), line.records, line.iterations
            served = np.isfinite(records.first_token_s)
            axes[0].plot(*worst_per_bin(records.arrival_s[served], records.ttft_s[served], bin_s), label=label, **style)
            axes[1].plot(*worst_per_bin(iterations.start_s, iterations.waiting, bin_s), **style)
            time_s, share = (np.array(column) for column in zip(*line.kept_share, strict=True))
            end_s = iterations.end_s[-1] if len(iterations) else last_s
            axes[2].step([*time_s, end_s], [*(100 * share), 100 * share[-1]], where="post", **style)
        mark_slo(axes[0], slo.ttft_s)
        # TTFT spans milliseconds to a minute; a linear axis would hide everything near the SLO.
        axes[0].set_yscale("log")
        axes[0].set_ylabel("TTFT [s]")
        axes[1].set_ylabel("waiting requests")
        axes[2].set_ylabel("weights in\nmemory [%]")
        axes[2].set_ylim(0, 105)
        if panels == 4:
            plot_budgets(axes[3], moving, last_s)
        axes[-1].set_xlabel("time [s]")
        axes[-1].margins(x=0.01)
        figure.legend(loc="outside lower center", ncols=4)


@dataclass(frozen=True, slots=True)
class ReplicaLine:
    """One replica of a system: its iterations, and when it did not serve, as (start_s, end_s)."""

    iterations: Iterations
    away_s: Sequence[tuple[float, float]] = ()


def plot_replicas(
    path: Path,
    records: Records,
    replicas: Mapping[str, ReplicaLine],
    slo: Slo,
    title: str,
    transfers_s: Sequence[tuple[Floats, str]] | None = None,
) -> None:
    """Write one PNG: requests and KV on every replica, when one was away, TTFT and, if any, KV transfers over time.

    Args:
        transfers_s: (start and end of each transfer as float64[n, 2] in seconds, label) of each kind of transfer.
    """
    ends_s = [float(one.iterations.end_s[-1]) for one in replicas.values() if len(one.iterations)]
    end_s = max([1.0, *ends_s])
    bin_s = max(1.0, math.ceil(end_s / 150))
    panels = 3 if transfers_s is None else 4
    with figure_file(path, panels, size=(10, 2.6 * panels), title=title, sharex=True) as (figure, axes):
        for rank, (name, one) in enumerate(replicas.items()):
            style, iterations = line_style(rank + 1), one.iterations
            here = iterations.running + iterations.waiting
            axes[0].plot(*most_per_bin(iterations.start_s, here, bin_s), label=name, **style)
            axes[1].plot(*most_per_bin(iterations.start_s, 100 * iterations.kv_used_share, bin_s), **style)
            for start_s, until_s in one.away_s:
                for axis in axes[:2]:
                    axis.axvspan(start_s, min(until_s, end_s), color=style["color"], alpha=0.15, linewidth=0)
        axes[0].set_ylabel("requests, most")
        axes[1].set_ylabel("KV blocks held,\nmost [%]")
        axes[1].set_ylim(0, 105)
        _plot_ttft(axes[2], records, slo)
        if transfers_s is not None:
            for (spans_s, label), style in zip(transfers_s, (line_style(1), line_style(2)), strict=False):
                axes[3].plot(*most_per_bin(*under_way(spans_s), bin_s), label=label, **style)
            axes[3].set_ylabel("KV transfers, most")
            axes[3].set_ylim(bottom=0)
            legend_above(axes[3])
        if any(one.away_s for one in replicas.values()):
            axes[0].fill_between([], [], color="0.6", alpha=0.4, label="shaded: does not serve")
        axes[-1].set_xlabel("time [s]")
        axes[-1].margins(x=0.01)
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)


def under_way(spans_s: Floats) -> tuple[Floats, Floats]:
    """Return when the number of open spans changes, and the number from then on.

    Args:
        spans_s: float64[n, 2], start and end of each; those that did not begin or end (NaN), or took no time, count
            nothing.
    """
    spans_s = spans_s[np.isfinite(spans_s).all(axis=1) & (spans_s[:, 1] > spans_s[:, 0])]
    times_s = np.concatenate([spans_s[:, 0], spans_s[:, 1]])
    steps = np.repeat([1.0, -1.0], len(spans_s))
    order = np.argsort(times_s, kind="stable")
    return times_s[order], np.cumsum(steps[order])


def worst_per_bin(time_s: Floats, values: NDArray[Any], bin_s: float) -> tuple[Floats, Floats]:
    """Return the start of each bin of time that has values, and the largest value in it."""
    bins = np.floor(time_s / bin_s)
    order = np.argsort(bins, kind="stable")
    found, first = np.unique(bins[order], return_index=True)
    worst = np.maximum.reduceat(np.asarray(values, dtype=np.float64)[order], first) if len(first) else np.empty(0)
    return found * bin_s, worst


def most_per_bin(time_s: Floats, values: NDArray[Any], bin_s: float) -> tuple[Floats, Floats]:
    """Return the start of each bin of time up to the last value, and the largest value in it; 0 if it has none."""
    starts_s, worst = worst_per_bin(time_s, values, bin_s)
    if not len(starts_s):
        return starts_s, worst
    all_s = np.arange(0.0, starts_s[-1] + 1.5 * bin_s, bin_s)
    most = np.zeros(len(all_s))
    most[np.rint(starts_s / bin_s).astype(np.int64)] = worst
    return all_s, most
