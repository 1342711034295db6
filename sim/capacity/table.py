"""Capacities for people: a table, notes on what to beware of, and a plot with its uncertainty."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from sim.capacity.search import Bracket, geometric_mean, interval
from sim.pages.render import table
from sim.results.plots import figure_file, line_style

MOST_SHARE = 1.1
"""Capacity over maximum rate above which a trace is too short; the end of a trace lowers that rate by some percent."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """The capacity of one policy on one device.

    error, kind: why there is none, and the name of the exception; empty if there is one.
    brackets, curves, requests: of each replay. rates: those at which all replays were measured.
    max_rate_rps: what the server finishes per second when all requests of the first replay come at once.
    limited_by: the target that requests miss just above the capacity.
    """

    policy: str
    gpu: str
    error: str = ""
    kind: str = ""
    brackets: Sequence[Bracket] = ()
    rates: Sequence[float] = ()
    curves: Sequence[dict[float, float]] = ()
    requests: Sequence[int] = ()
    max_rate_rps: float | None = None
    limited_by: str = ""

    # What the table shows of them.
    capacities: list[float] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        self.capacities.extend(bracket.met_rps for bracket in self.brackets)

    @property
    def label(self) -> str:
        """Its name in a plot."""
        return f"{self.policy}, {self.gpu}"

    @property
    def capacity_rps(self) -> float:
        """The capacity; of several replays, their geometric mean."""
        return geometric_mean(self.capacities)

    @property
    def unbounded(self) -> bool:
        """Whether some replay met the target at every rate."""
        return any(math.isinf(bracket.missed_rps) for bracket in self.brackets)

    @property
    def too_short(self) -> bool:
        """Whether the trace ends before a queue has grown: the target is met well above what the server sustains."""
        most = self.max_rate_rps
        return self.unbounded or (most is not None and self.capacity_rps > MOST_SHARE * most)

    @property
    def uncertainty(self) -> tuple[float, float]:
        """Return the 95 % interval over replays; of one replay, the bracket of the search."""
        first = self.brackets[0]
        return interval(self.capacities) or (first.met_rps, first.missed_rps)

    def content(self) -> dict[str, Any]:
        """Return everything as plain values for a JSON file."""
        if self.error:
            return {"policy": self.policy, "gpu": self.gpu, "error": self.error}
        low, high = self.uncertainty
        return {
            "policy": self.policy,
            "gpu": self.gpu,
            "capacity_rps": self.capacity_rps,
            "interval_rps": [low, _finite(high)],
            "interval": "95 % over replays" if len(self.capacities) > 1 else "bracket of the search",
            "too_short": self.too_short,
            "max_rate_rps": self.max_rate_rps,
            "limited_by": self.limited_by,
            "replays": [
                {
                    "requests": requests,
                    "met_rps": bracket.met_rps,
                    "missed_rps": _finite(bracket.missed_rps),
                    "met_again_rps": list(bracket.met_again_rps),
                    "rate_rps": list(curve),
                    "attainment": list(curve.values()),
                }
                for requests, bracket, curve in zip(self.requests, self.brackets, self.curves, strict=True)
            ],
        }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def table_of(rows: Sequence[Row]) -> str:
    """Return the Markdown table of the rows."""
    return table([_cells(row) for row in rows], left=2)


COLUMNS = ("capacity, req/s", "uncertainty", "over replays", "limited by", "maximum rate, req/s", "share of it")


def _cells(row: Row) -> dict[str, Any]:
    several = len(row.capacities) > 1
    cells: dict[str, Any] = {"policy": row.policy, "GPU": row.gpu}
    if row.error:
        return {**cells, **dict.fromkeys(COLUMNS)}
    if row.too_short:
        most = row.max_rate_rps or min(row.capacities)
        shown = {"capacity, req/s": f"above {most:.3g}", "uncertainty": "the trace is too short"}
        return {**cells, **dict.fromkeys(COLUMNS), **shown, "maximum rate, req/s": f"{most:.3g}"}
    low, high = row.uncertainty
    end = f"{high:.3g}" if math.isfinite(high) else "?"
    share = None if row.max_rate_rps is None else row.capacity_rps / row.max_rate_rps
    return {
        **cells,
        "capacity, req/s": f"{row.capacity_rps:.3g}",
        "uncertainty": f"{low:.3g} to {end}" + (" (95 %)" if several else " (bracket)"),
        "over replays": f"{min(row.capacities):.3g} to {max(row.capacities):.3g}, n={len(row.capacities)}"
        if several
        else None,
        "limited by": row.limited_by or None,
        "maximum rate, req/s": None if row.max_rate_rps is None else f"{row.max_rate_rps:.3g}",
        "share of it": None if share is None else f"{100 * share:.0f} %",
    }


def notes(rows: Sequence[Row]) -> list[str]:
    """Return sentences on what to beware of in these rows; rows with the same sentence share it."""
    found: dict[str, list[str]] = {}
    for row in rows:
        for sentence in _notes_of(row):
            found.setdefault(sentence, []).append(row.label)
    named = [f"{'; '.join(labels)}: {sentence}" for sentence, labels in found.items()]
    if any(len(row.capacities) == 1 for row in rows):
        named.append("one replay: the bracket is that of the search alone; seeds= or windows= show how far it varies")
    return named


def _notes_of(row: Row) -> list[str]:
    if row.error:
        return [f"no capacity: {row.error}"]
    found = []
    again = sorted({rate for bracket in row.brackets for rate in bracket.met_again_rps})
    if again:
        found.append(
            f"attainment does not fall monotonously, the target is met again at {again[0]:.3g} to {again[-1]:.3g} "
            "req/s; the capacity is where it is first missed"
        )
    if row.too_short:
        found.append(
            "the target is met well above the maximum rate, which the server cannot sustain: the trace ends before the "
            "queue has grown; take a longer one (trace.duration_s=, workload=repeat_3)"
        )
    return found


def plot_rows(path: Path, rows: Sequence[Row], target: float, title: str) -> None:
    """Plot attainment against rate: the mean over replays, the range of the replays, and the capacity's uncertainty."""
    shown = [row for row in rows if not row.error]
    with figure_file(path, size=(9.0, 4.8)) as (_, axis):
        for rank, row in enumerate(shown):
            style = {**line_style(rank + 1), "label": row.label}
            rates = sorted(row.curves[0]) if len(row.curves) == 1 else list(row.rates)
            values = 100 * np.array([[curve[rate] for rate in rates] for curve in row.curves])
            axis.plot(rates, values.mean(axis=0), marker="o", markersize=3, **style)
            if len(values) > 1:
                axis.fill_between(rates, values.min(axis=0), values.max(axis=0), color=style["color"], alpha=0.15)
            low, high = row.uncertainty
            axis.axvspan(low, high if math.isfinite(high) else max(rates), color=style["color"], alpha=0.2, linewidth=0)
        axis.axhline(100 * target, color="black", linestyle="--", linewidth=1.0, label=f"target: {100 * target:g} %")
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_formatter("{x:g}")
        axis.tick_params(axis="x", which="both", labelsize=9)
        axis.set_xlabel("requests per second")
        axis.set_ylabel("requests that meet the SLO [%]")
        axis.set_ylim(-2, 102)
        axis.set_title(title, fontsize=10, loc="left", wrap=True)
        axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
