"""The page of errors over every run at hand, and its graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hw.fit.parameters import shown
from hw.fit.studies import SEVERAL, cell, judged
from sim.pages.render import render, table
from sim.results.plots import COLORS, REFERENCE, figure_file

TEMPLATE = Path(__file__).parent / "templates" / "errors.md.j2"
LABELS = {"ttft_s": "TTFT", "itl_s": "ITL", "tpot_s": "TPOT", "e2e_s": "E2E"}
COLUMNS = ("mean", "p50", "p90", "p95", "p99")
TOTALS = {"makespan_s": "makespan", "output_tokens_per_s": "output tokens/s", "max_rate_rps": "maximum rate"}
MARKERS = {"RTX 4090": "s", "H100": "o", "8 x A100": "^"}
MOST_SHOWN = 0.6
"""Errors beyond it stand at the edge of the graph."""


def error_page(content: Mapping[str, Any], detail: str) -> str:
    """Return the page of the figures of ``every_study``; ``detail``: what follows, a page of one run."""
    rows = content["rows"]
    every = judged(rows)
    return render(
        TEMPLATE,
        tables=[{"label": label, "table": _latency_table(rows, name)} for name, label in LABELS.items()]
        + [{"label": "Throughput", "table": _totals_table(rows)}],
        fits={name: _fit_text(fit) for name, fit in content["fits"].items()},
        targets=_target_table(every),
        missed=_missed_text(every),
        detail=detail.replace("# ", "## ", 1),
    )


def _named(one: Mapping[str, Any]) -> dict[str, Any]:
    text = f"{one['study']}, {one['part']}"
    return {
        "run": f"**{text}**" if one["role"] == "judged" and one["fitted_on"] != "nothing" else text,
        "fitted on": one["fitted_on"],
        "utilization": one["utilization"],
    }


def _latency_table(rows: Sequence[Mapping[str, Any]], name: str) -> str:
    found = [
        _named(one) | {_heading(s): cell(one, name, s) for s in COLUMNS}
        for one in rows
        if any(cell(one, name, s) is not None for s in COLUMNS)
    ]
    specs = dict.fromkeys(map(_heading, COLUMNS), "+.1%") | {"utilization": ".0%"}
    return table(found, specs, left=2)


def _totals_table(rows: Sequence[Mapping[str, Any]]) -> str:
    found = [
        _named(one) | {label: cell(one, name, "mean") for name, label in TOTALS.items()}
        for one in rows
        if cell(one, "makespan_s", "mean") is not None
    ]
    return table(found, dict.fromkeys(TOTALS.values(), "+.1%") | {"utilization": ".0%"}, left=2)


def _heading(statistic: str) -> str:
    return statistic if statistic == "mean" else statistic.upper()


def _fit_text(fit: Mapping[str, Any]) -> str:
    text = ", ".join(f"`{name}` {shown(name, value)}" for name, value in fit["values"].items())
    loss = fit["held_out_loss"]
    refused = loss is not None and not loss["fitted"] < loss["nothing_fitted"]
    return f"{text}; `hw.fit` refuses it: it predicts the last third no better than nothing fitted" if refused else text


def _target_table(every: Sequence[Mapping[str, Any]]) -> str:
    """Return how many figures meet their targets, for each target."""
    groups: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for one in every:
        way = "nothing fitted" if one["fitted_on"] == "nothing" else "fitted"
        several = f"{SEVERAL}, 1.3/s: " if one["study"] == SEVERAL else ""
        label = LABELS.get(one["figure"], "maximum rate")
        tail = " P99" if one["statistic"] == "p99" else " P50" if several else ""
        groups.setdefault((f"{several}{label}{tail}", way, f"{one['target']:.2f}"), []).append(one)
    rows = [
        {
            "figure": figure,
            "": way,
            "target": float(target),
            "met": f"{sum(one['met'] for one in some)} of {len(some)}",
            "largest error": max((one["error"] for one in some), key=abs),
        }
        for (figure, way, target), some in groups.items()
    ]
    return table(rows, {"target": ".0%", "largest error": "+.1%"}, left=2)


def _missed_text(every: Sequence[Mapping[str, Any]]) -> str:
    missed = [one for one in every if not one["met"]]
    if not missed:
        return "All targets are met."
    phrases = [
        f"{one['study']}, {one['part']}, {LABELS.get(one['figure'], one['figure'])} {_heading(one['statistic'])} "
        f"{'with nothing fitted' if one['fitted_on'] == 'nothing' else 'fitted'}: {100 * one['error']:+.1f} % "
        f"(target {100 * one['target']:.0f} %)"
        for one in missed
    ]
    return f"{len(missed)} of {len(every)} figures miss their target: " + "; ".join(phrases) + "."


def error_graph(path: Path, content: Mapping[str, Any]) -> None:
    """Draw the error of the mean (of several servers, the median) against utilization."""
    names = ("ttft_s", "tpot_s", "e2e_s")
    with figure_file(path, 1, 3, size=(13, 4.4), sharey=True) as (figure, axes):
        for axis, name in zip(axes, names, strict=True):
            axis.axhline(0.0, color=REFERENCE, linewidth=1.0)
            for one in content["rows"]:
                error = cell(one, name, "p50" if one["study"] == SEVERAL else "mean")
                if error is None or one["utilization"] is None or one["part"] == "all requests":
                    continue
                _mark(axis, one, min(max(error, -MOST_SHOWN), MOST_SHOWN))
            axis.set(xscale="log", xlabel="utilization [%]", title=LABELS[name], ylim=(-68, 68))
            axis.set_xticks([10, 20, 50, 100, 200, 500], labels=["10", "20", "50", "100", "200", "500"])
            axis.minorticks_off()
        axes[0].set(ylabel="simulated over real, minus 1 [%]")
        figure.legend(handles=_legend(), loc="outside lower center", ncols=5)


def _mark(axis: Any, one: Mapping[str, Any], error: float) -> None:
    nothing = one["fitted_on"] == "nothing"
    color = COLORS[list(MARKERS).index(one["study"])]
    axis.plot(
        100 * one["utilization"],
        100 * error,
        MARKERS[one["study"]],
        color=color,
        markerfacecolor="none" if nothing else color,
        markersize=8,
        alpha=0.35 if one["role"] == "fitted" else 1.0,
    )


def _legend() -> list[Any]:
    from matplotlib.lines import Line2D

    def entry(label: str, marker: str, color: str, face: str | None = None, alpha: float = 1.0) -> Any:
        face = color if face is None else face
        return Line2D([], [], color=color, marker=marker, linestyle="", markerfacecolor=face, label=label, alpha=alpha)

    runs = [entry(name, marker, COLORS[i]) for i, (name, marker) in enumerate(MARKERS.items())]
    return [*runs, entry("nothing fitted", "o", "0.3", "none"), entry("the fitted part", "o", "0.3", alpha=0.35)]
