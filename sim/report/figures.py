"""The figures of a report, as Plotly's JSON: plain dictionaries, with arrays packed as Plotly reads them.

Lines carry the number of their run (``meta``), so that the page's one legend shows and hides it in every figure; no
figure has a legend of its own that could cover data.
"""

from __future__ import annotations

import base64
import html
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sim.report import series
from sim.report.run_data import RunData
from sim.results.plots import COLORS, DASHES, line_style
from sim.types import Floats

Figure = dict[str, Any]
"""``data`` and ``layout`` of a figure of Plotly."""
GRAY = "#737373"
"""``sim.results.plots.REFERENCE`` for a browser."""
PLOTLY_DASHES = dict(zip(DASHES, ("solid", "dash", "dot", "dashdot"), strict=True))
SYMBOLS = ("circle", "square", "diamond", "triangle-up")
STATES = {
    series.DROPPED: ("dropped", "#D55E00"),
    series.PREFILL_ONLY: ("kept in prefill only", "#E69F00"),
    series.BITS_4: ("4 bits", "#0072B2"),
    series.BITS_8: ("8 bits", "#56B4E9"),
    series.BITS_16: ("16 bits", "#dfe3e6"),
    series.STREAMED: ("streamed from the host", "#009E73"),
    series.KV_ONLY: ("prompts only write KV", "#CC79A7"),
    series.NESTED: ("computed at half its bits", "#F0E442"),
    series.NARROW: ("at fewer channels", "#8c6d31"),
}
"""State of a block -> its name and color; colors of Okabe and Ito's palette, with pale gray for the usual state."""
NAMES = {"ttft_s": "TTFT", "tpot_s": "TPOT", "e2e_s": "E2E"}
FONT = {"family": "system-ui, sans-serif", "size": 12, "color": "#222222"}
GRID = {"gridcolor": "#e6e6e6", "zeroline": False, "linecolor": "#999999", "showline": True, "ticks": "outside"}
PIXELS = 118
"""Height of a panel of the timeline."""
LEFT_PIXELS = 92
MOST_LABELS = 8
"""Runs up to which points carry their names."""


def packed(values: NDArray[Any]) -> Any:
    """Return an array as Plotly's packed form, a third of the size of its digits."""
    short = values.astype(np.int8 if values.dtype == np.int8 else np.float64)
    found = {"dtype": "i1" if short.dtype == np.int8 else "f8", "bdata": base64.b64encode(short.tobytes()).decode()}
    return found if short.ndim == 1 else {**found, "shape": ",".join(map(str, short.shape))}


def unpacked(value: Any) -> NDArray[Any]:
    """Return the array that ``packed`` packed."""
    types: dict[str, Any] = {"i1": np.int8, "f8": np.float64}
    found = np.frombuffer(base64.b64decode(value["bdata"]), dtype=types[value["dtype"]])
    return found.reshape([int(size) for size in value["shape"].split(",")]) if "shape" in value else found


def plain(text: str, most: int = 60) -> str:
    """Return text for Plotly, which reads a part of HTML: escaped, and cut if it is long."""
    short = text if len(text) <= most else f"{text[: most - 3]}..."
    # Plotly replaces %{name} in what it shows under the mouse.
    return html.escape(" ".join(short.split()), quote=False).replace("%{", "%&#123;")


def style_of(rank: int, runs: int) -> dict[str, str]:
    """Return color and dash of the rank-th of several runs; the first of several is the reference, in gray."""
    style = line_style(rank if runs > 1 else 1)
    color = style["color"] if style["color"].startswith("#") else GRAY
    return {"color": color, "dash": PLOTLY_DASHES[style.get("linestyle", "-")]}


def symbol_of(rank: int) -> str:
    """Return the marker of the rank-th run."""
    return SYMBOLS[max(rank - 1, 0) // len(COLORS) % len(SYMBOLS)]


def timeline(runs: Sequence[RunData]) -> Figure:
    """Return the panels over time: arrivals, SLO, requests, KV, memory and plan changes, with one time axis."""
    end_s = max(run.end_s for run in runs)
    in_bytes = all(run.server is not None for run in runs if run.kept_share is not None)
    lines: dict[str, list[dict[str, Any]]] = {}

    def add(panel: str, rank: int, steps: series.Steps | None, shown: str, factor: float = 1.0) -> None:
        if steps is None or not len(steps.time_s):
            return
        drawn = steps.until(runs[rank].end_s).thinned(end_s)
        lines.setdefault(panel, []).append(_line(drawn.time_s, factor * drawn.values, rank, runs, shown))

    for rank, run in enumerate(runs):
        lines.setdefault("arrivals<br>per second", []).append(_arrivals(rank, runs, end_s))
        lines.setdefault("SLO attainment<br>by arrival [%]", []).append(_attainment(rank, runs, end_s))
        add("waiting<br>requests", rank, series.waiting(run), "%{y:,.0f} waiting")
        add("running<br>requests", rank, series.running(run), "%{y:,.0f} running")
        add("KV blocks<br>in use [%]", rank, series.kv_share(run), "KV %{y:.1f} %", 100.0)
        dense = run.server.dense_weight_bytes if run.server is not None else 1.0
        panel, shown, factor = ("weights in<br>memory [GB]", "weights %{y:.2f} GB", dense / 1e9)
        if not in_bytes:
            panel, shown, factor = ("weights<br>[% of dense]", "weights %{y:.1f} %", 100.0)
        add(panel, rank, series.weight_share(run), shown, factor)
    if budgets := _budgets(runs):
        lines["memory<br>budget [GB]"] = budgets
    marks = [mark for rank in range(len(runs)) for mark in _changes(rank, runs, end_s)]
    if marks:
        lines["plan<br>changes"] = marks
    order = [
        "arrivals<br>per second",
        "waiting<br>requests",
        "running<br>requests",
        "KV blocks<br>in use [%]",
        "memory<br>budget [GB]",
        "weights in<br>memory [GB]",
        "weights<br>[% of dense]",
        "plan<br>changes",
        "SLO attainment<br>by arrival [%]",
    ]
    return _stacked({panel: lines[panel] for panel in order if panel in lines}, runs, end_s)


def _line(x: NDArray[Any], y: NDArray[Any], rank: int, runs: Sequence[RunData], shown: str) -> dict[str, Any]:
    """Return a line that holds each value until the next; ``shown`` is what stands under the mouse."""
    style = style_of(rank, len(runs))
    return {
        "type": "scatter",
        "mode": "lines",
        "x": packed(x),
        "y": packed(y),
        "line": {"shape": "hv", "width": 1.4, **style},
        "meta": {"run": rank},
        "name": plain(runs[rank].label),
        "hovertemplate": f"{shown}<extra>{plain(runs[rank].label)}</extra>",
        "showlegend": False,
    }


def _arrivals(rank: int, runs: Sequence[RunData], end_s: float) -> dict[str, Any]:
    found = series.arrivals(runs[rank], end_s)
    steps = _closed(found.start_s, found.arrived / found.width_s, found.width_s)
    return _line(*steps, rank, runs, "%{y:.3g} arrivals per second")


def _attainment(rank: int, runs: Sequence[RunData], end_s: float) -> dict[str, Any]:
    found = series.arrivals(runs[rank], end_s)
    line = _line(*_closed(found.start_s, 100 * found.attainment, found.width_s), rank, runs, "")
    line["customdata"] = [*found.arrived.tolist(), 0]
    name = plain(runs[rank].label)
    line["hovertemplate"] = f"%{{y:.1f}} % of %{{customdata}} met the SLO<extra>{name}</extra>"
    return line


def _closed(start_s: Any, values: Any, width_s: float) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return the steps of bins with the end of the last."""
    return (
        (np.append(start_s, start_s[-1] + width_s), np.append(values, values[-1]))
        if len(start_s)
        else (start_s, values)
    )


def _budgets(runs: Sequence[RunData]) -> list[dict[str, Any]]:
    """Return one black line for each budget that differs from the others."""
    found: dict[tuple[tuple[float, float], ...], list[int]] = {}
    for rank, run in enumerate(runs):
        if run.server is not None:
            found.setdefault(run.server.budget, []).append(rank)
    made = []
    for number, (budget, ranks) in enumerate(found.items()):
        end_s = max(runs[rank].end_s for rank in ranks)
        time_s, size = (np.array(column) for column in zip(*budget, strict=True))
        before = time_s <= end_s
        steps = series.Steps(time_s[before], size[before] / 1e9).until(end_s).thinned(end_s)
        line = _line(steps.time_s, steps.values, ranks[0], runs, "budget %{y:.2f} GB")
        line["line"] |= {"color": "#000000", "dash": list(PLOTLY_DASHES.values())[(number + 1) % len(DASHES)]}
        line["meta"] = {"budget_of": ranks}
        if len(found) == 1:
            line["hovertemplate"] = "budget %{y:.2f} GB<extra></extra>"
        made.append(line)
    return made


def _changes(rank: int, runs: Sequence[RunData], end_s: float) -> list[dict[str, Any]]:
    """Return a mark for each plan change of a run, and a bar from it until the plan ran in full."""
    found = series.changes(runs[rank], end_s)
    if not found:
        return []
    color, label = style_of(rank, len(runs))["color"], plain(runs[rank].label)
    marks = {
        "type": "scatter",
        "mode": "markers",
        "x": packed(np.array([one.time_s for one in found])),
        "y": [rank] * len(found),
        "marker": {"color": color, "size": 6, "symbol": "line-ns-open", "line": {"width": 1.5}},
        "text": [_about(one) for one in found],
        "hovertemplate": f"%{{text}}<extra>{label}</extra>",
        "meta": {"run": rank},
        "name": label,
        "showlegend": False,
    }
    spans = [(one.time_s, one.ready_s) for one in found if one.count == 1 and one.ready_s > one.time_s]
    bars = {
        "type": "scatter",
        "mode": "lines",
        "x": [value for start_s, ready_s in spans for value in (start_s, ready_s, None)],
        "y": [value for _ in spans for value in (rank, rank, None)],
        "line": {"color": color, "width": 5},
        "opacity": 0.45,
        "hoverinfo": "skip",
        "meta": {"run": rank},
        "name": label,
        "showlegend": False,
    }
    return [bars, marks]


def _about(change: series.Change) -> str:
    lead = (
        f"to {plain(change.to_plan, 90)}"
        if change.count == 1
        else f"{change.count} changes, the last to {plain(change.to_plan, 70)}"
    )
    ready = "superseded" if math.isnan(change.ready_s) else f"in full after {change.ready_s - change.time_s:.3g} s"
    more = f", {change.preempted} preempted" if change.preempted else ""
    return f"{lead}<br>{change.bytes_in / 1e9:.2f} GB in, {change.bytes_freed / 1e9:.2f} GB freed, {ready}{more}"


def _stacked(panels: dict[str, list[dict[str, Any]]], runs: Sequence[RunData], end_s: float) -> Figure:
    """Return panels above each other, with one time axis below them."""
    heights = {panel: 0.5 + 0.12 * len(runs) if panel.startswith("plan") else 1.0 for panel in panels}
    total, gap = sum(heights.values()), 0.14
    below, data = 0.0, []
    layout: dict[str, Any] = {
        **_base(PIXELS * total + 60),
        "hovermode": "x unified" if len(runs) == 1 else "closest",
        "xaxis": {**GRID, **_time_axis(end_s), "anchor": "y", "domain": [0, 1]},
        "annotations": [],
    }
    for number, panel in enumerate(reversed(panels)):
        axis = f"y{number + 1}" if number else "y"
        top = below + (heights[panel] - gap) / total
        layout[f"yaxis{number + 1 if number else ''}"] = {
            **GRID,
            "anchor": "x",
            "domain": [below, min(top, 1.0)],
            "fixedrange": True,
            "rangemode": "tozero",
            **_panel_axis(panel, runs),
        }
        layout["annotations"].append(_title_of(panel, (below + top) / 2))
        data += [{**line, "xaxis": "x", "yaxis": axis} for line in panels[panel]]
        below += heights[panel] / total
    return {"data": data, "layout": layout}


def _panel_axis(panel: str, runs: Sequence[RunData]) -> dict[str, Any]:
    if panel.startswith("plan"):
        return {"range": [len(runs) - 0.5, -0.5], "showticklabels": False, "ticks": "", "showgrid": False}
    if panel.startswith(("KV", "SLO")):
        return {"range": [0, 105], "tickvals": [0, 50, 100]}
    return {"nticks": 4}


def _title_of(panel: str, middle: float) -> dict[str, Any]:
    """Return the name of a panel, to the left of its axis: a turned title would not fit a low panel."""
    return {
        "text": panel,
        "x": 0,
        "xref": "paper",
        "xanchor": "right",
        "xshift": -40,
        "y": middle,
        "yref": "paper",
        "yanchor": "middle",
        "align": "right",
        "showarrow": False,
    }


def _base(height: float) -> dict[str, Any]:
    return {
        "height": round(height),
        "autosize": True,
        "font": FONT,
        "paper_bgcolor": "#ffffff",
        "plot_bgcolor": "#ffffff",
        "margin": {"l": LEFT_PIXELS + 48, "r": 16, "t": 30, "b": 46},
        "showlegend": False,
        "hoverlabel": {"align": "left", "namelength": 40, "font": {"size": 12}},
    }


def _time_axis(end_s: float) -> dict[str, Any]:
    return {"title": {"text": "time [s]"}, "range": [0, end_s if end_s > 0 else 1.0], "showgrid": True}


def latencies(runs: Sequence[RunData]) -> Figure:
    """Return the cumulative distributions of TTFT, TPOT and E2E, with ITL as marks and the targets of the SLO."""
    layout: dict[str, Any] = {**_base(380), "annotations": [], "shapes": []}
    layout["margin"] = {**layout["margin"], "l": 64, "t": 34}
    data = []
    for column, name in enumerate(NAMES):
        axis, place = str(column + 1 if column else ""), f"y{column + 1 if column else ''}"
        left = column * (1 + 0.05) / 3.15 * 1.05
        domain = [min(left, 1), min(left + 0.29, 1)]
        sides = {run.judged_side for run in runs} if name != "tpot_s" else {"engine"}
        side = " (client)" if sides == {"client"} else ""
        layout[f"xaxis{axis}"] = {
            **GRID,
            "type": "log",
            "domain": domain,
            "anchor": place,
            "title": {"text": f"{NAMES[name]}{side} [s]"},
            **_log_ticks([run.latency_s(name) for run in runs]),
        }
        layout[f"yaxis{axis}"] = {
            **GRID,
            "domain": [0, 1],
            "anchor": f"x{axis}",
            "range": [0, 102],
            "ticksuffix": " %",
            "fixedrange": True,
        }
        for rank, run in enumerate(runs):
            values, shares = series.distribution(run.latency_s(name))
            # A logarithmic axis has no 0; a request whose first token came at once is drawn at the left edge.
            line = _line(np.maximum(values, 1e-6), 100 * shares, rank, runs, "%{y:.1f} %: up to %{x:.4g} s")
            line["line"]["shape"] = "linear"
            data.append({**line, "xaxis": f"x{axis}", "yaxis": place})
            if name == "tpot_s" and (itl := _itl(rank, runs)):
                data.append({**itl, "xaxis": f"x{axis}", "yaxis": place})
        targets_s = sorted({run.targets_s[name] for run in runs if name in run.targets_s})
        layout["shapes"] += [_vertical(target_s, axis) for target_s in targets_s]
        if targets_s:
            layout["annotations"].append(
                {
                    "text": f"SLO {', '.join(f'{target_s:g}' for target_s in targets_s)} s",
                    "xref": f"x{axis}",
                    "yref": f"{place} domain",
                    "x": math.log10(targets_s[0] * targets_s[-1]) / 2,
                    "y": 1.0,
                    "yanchor": "bottom",
                    "showarrow": False,
                }
            )
    return {"data": data, "layout": layout}


def _vertical(target_s: float, axis: str) -> dict[str, Any]:
    """Return the line of a target of the SLO in a panel."""
    where = {"xref": f"x{axis}", "yref": f"y{axis} domain", "x0": target_s, "x1": target_s, "y0": 0, "y1": 1}
    return {"type": "line", **where, "line": {"color": "#000000", "dash": "dash", "width": 1}}


def _log_ticks(values: Sequence[Floats]) -> dict[str, Any]:
    """Return labels for a logarithmic axis: powers of ten, and 2 and 5 times them where there are few of those."""
    positive = np.concatenate([one[np.isfinite(one) & (one > 0)] for one in values])
    if not len(positive):
        return {"dtick": 1, "range": [-2, 2]}  # nothing to fit an axis to: from 10 ms to 100 s
    first, last = math.floor(math.log10(positive.min())), math.ceil(math.log10(positive.max()))
    factors = (1, 2, 5) if last - first <= 2 else (1,)
    shown = [factor * 10.0**power for power in range(first - 1, last + 2) for factor in factors]
    return {"tickvals": shown, "ticktext": [f"{value:g}" for value in shown]}


def _itl(rank: int, runs: Sequence[RunData]) -> dict[str, Any] | None:
    """Return the quantiles of ITL that the summary states; the gaps themselves are not in a run folder."""
    stated = {share: runs[rank].summary["itl_s"].get(f"p{share}") for share in (50, 90, 95, 99)}
    known = {share: value for share, value in stated.items() if isinstance(value, int | float) and value > 0}
    if not known:
        return None
    label = plain(runs[rank].label)
    return {
        "type": "scatter",
        "mode": "markers",
        "x": packed(np.array(list(known.values()), dtype=np.float64)),
        "y": packed(np.array(list(known), dtype=np.float64)),
        "marker": {
            "symbol": "x-thin-open",
            "size": 8,
            "color": style_of(rank, len(runs))["color"],
            "line": {"width": 2},
        },
        "meta": {"run": rank},
        "name": label,
        "hovertemplate": f"ITL P%{{y}}: %{{x:.4g}} s<extra>{label}</extra>",
        "showlegend": False,
    }


def plan_maps(runs: Sequence[RunData]) -> Figure | None:
    """Return the decided plan of each run as a map: blocks by time, colored by precision; None if all are unknown."""
    end_s = max(run.end_s for run in runs)
    maps = [(rank, found) for rank, run in enumerate(runs) if (found := series.plan_map(run, end_s=run.end_s))]
    if not maps:
        return None
    height = 300 if len(maps) == 1 else 190 if len(maps) < 4 else 140
    layout: dict[str, Any] = {
        **_base(height * len(maps) + 60),
        "xaxis": {**GRID, **_time_axis(end_s), "anchor": "y", "domain": [0, 1], "showgrid": False},
        "annotations": [],
    }
    data: list[dict[str, Any]] = []
    for number, (rank, found) in enumerate(reversed(maps)):
        layers = len(found.state) // 2
        # A gap between MHA and FFN blocks; there is no block in it.
        rows = np.arange(2 * layers) + np.repeat([0.0, 1.0 + layers // 12], layers)
        edges = np.concatenate([rows[:layers] - 0.5, [layers - 0.5], rows[layers:] - 0.5, [rows[-1] + 0.5]])
        states = np.full((2 * layers + 1, found.state.shape[1]), -1, dtype=np.int8)
        states[:layers], states[layers + 1 :] = found.state[:layers], found.state[layers:]
        below, top = number / len(maps), (number + (0.9 if len(maps) > 1 else 1.0)) / len(maps)
        axis = f"y{number + 1 if number else ''}"
        layout[f"yaxis{number + 1 if number else ''}"] = {
            **GRID,
            "anchor": "x",
            "domain": [below, top],
            "fixedrange": True,
            "range": [rows[-1] + 0.5, -0.5],
            "showgrid": False,
            **_block_ticks(layers, rows, 4 if height > 140 else 2),
        }
        data.append(
            {
                "type": "heatmap",
                "x": packed(found.edges_s),
                "y": packed(edges),
                "z": packed(states),
                "zmin": -1.5,
                "zmax": max(STATES) + 0.5,
                "colorscale": _color_steps(),
                "showscale": False,
                "xaxis": "x",
                "yaxis": axis,
                "text": _state_names(states),
                "hovertemplate": f"%{{text}}<br>around %{{x:.1f}} s<extra>{plain(runs[rank].label)}</extra>",
                "meta": {"run": rank},
                "name": plain(runs[rank].label),
            }
        )
        if len(maps) > 1:
            title = {**_title_of(plain(runs[rank].label, 40), top), "x": 0.0, "xanchor": "left", "xshift": 0}
            layout["annotations"].append({**title, "yanchor": "bottom"})
    return {"data": data, "layout": layout}


def _state_names(states: NDArray[np.int8]) -> list[list[str]]:
    """Return what stands under the mouse for each cell: the block and its state."""
    layers = len(states) // 2
    blocks = [f"MHA {i}" for i in range(layers)] + [""] + [f"FFN {i}" for i in range(layers)]
    names = {state: name for state, (name, _) in STATES.items()} | {-1: ""}
    return [
        [f"{block}: {names[int(state)]}" if block else "" for state in row]
        for block, row in zip(blocks, states, strict=True)
    ]


def _block_ticks(layers: int, rows: NDArray[Any], most: int) -> dict[str, Any]:
    """Return labels for the first and some later layers of both kinds of blocks, at most ``most`` of each kind."""
    step = 1
    while layers / step > most:
        step *= 2
    shown = list(range(0, layers, step))
    return {
        "tickvals": [float(rows[offset + layer]) for offset in (0, layers) for layer in shown],
        "ticktext": [f"{kind} {layer}" for kind in ("MHA", "FFN") for layer in shown],
    }


def _color_steps() -> list[list[Any]]:
    """Return a color scale with one flat step per state, white for the gap."""
    colors = ["#ffffff", *(color for _, color in STATES.values())]
    return [[edge / len(colors), color] for at, color in enumerate(colors) for edge in (at, at + 1)]


def pareto(runs: Sequence[RunData]) -> tuple[Figure, list[int], list[str]] | None:
    """Return SLO attainment against quality and against bytes, the runs on the Pareto front, and what they excel in.

    A run is on the front if no other is at least as good in every figure and better in one: more requests that meet the
    SLO, less perplexity, fewer bytes of weights. A run with an unknown figure is not drawn where it lacks it, and runs
    are compared in the figures that all of them have. None for one run.
    """
    if len(runs) < 2:
        return None
    misses = np.array([1.0 - float(run.summary["slo_attainment"] or 0.0) for run in runs])
    # To six decimals: runs of one plan differ by rounding errors, which would be spread over the axis.
    quality = np.array([_or_nan(run.perplexity_ratio) for run in runs]).round(6)
    in_bytes = all(run.server is not None for run in runs if run.kept_share is not None)
    memory = np.array([_or_nan(run.mean_weight_bytes if in_bytes else run.mean_weight_share) for run in runs])
    figures = {"SLO attainment": misses, "perplexity": quality, "weights in memory": memory}
    known = {name: column for name, column in figures.items() if np.isfinite(column).all()}
    front = series.undominated(np.column_stack(list(known.values())))
    panels = (
        (quality, 1.0, "perplexity / dense (less is better)"),
        (
            memory,
            1e-9 if in_bytes else 100.0,
            f"mean weights in memory [{'GB' if in_bytes else '% of dense'}] (less is better)",
        ),
    )
    layout: dict[str, Any] = {**_base(420), "hovermode": "closest"}
    layout["margin"] = {**layout["margin"], "l": 78, "t": 26}
    data = []
    for column, (values, factor, title) in enumerate(panels):
        axis, domain = str(column + 1 if column else ""), [0.54 * column, 0.46 + 0.54 * column]
        layout[f"xaxis{axis}"] = {**GRID, "domain": domain, "anchor": f"y{axis}", "title": {"text": title}}
        layout[f"yaxis{axis}"] = {**GRID, "domain": [0, 1], "anchor": f"x{axis}", "ticksuffix": " %"}
        if column == 0:
            layout["yaxis"]["title"] = {"text": "SLO attainment (more is better)"}
        else:
            layout[f"yaxis{axis}"]["matches"] = "y"
        places = label_places(values, 1.0 - misses, [len(plain(run.label, 24)) for run in runs])
        for rank, run in enumerate(runs):
            if not math.isfinite(values[rank]):
                continue
            color = style_of(rank, len(runs))["color"]
            symbol = symbol_of(rank) + ("" if front[rank] else "-open")
            data.append(
                {
                    "type": "scatter",
                    "mode": "markers+text" if len(runs) <= MOST_LABELS else "markers",
                    "x": [factor * float(values[rank])],
                    "y": [100.0 * float(1.0 - misses[rank])],
                    "text": [plain(run.label, 24)],
                    "textposition": places[rank],
                    "cliponaxis": False,
                    "marker": {"color": color, "size": 12, "symbol": symbol, "line": {"width": 2, "color": color}},
                    "meta": {"run": rank},
                    "name": plain(run.label),
                    "hovertemplate": _point(run),
                    "showlegend": False,
                    "xaxis": f"x{axis}",
                    "yaxis": f"y{axis}",
                }
            )
    return {"data": data, "layout": layout}, np.flatnonzero(front).tolist(), list(known)


Box = tuple[float, float, float, float]
"""Left, lower, right and upper edge."""
PANEL_PIXELS = (520.0, 320.0)
CHARACTER_PIXELS, LINE_PIXELS, MARK_PIXELS = 7.5, 16.0, 9.0
PANEL: Box = (-24.0, -24.0, PANEL_PIXELS[0] + 24.0, PANEL_PIXELS[1] + 24.0)
"""Plotly leaves some room around the outermost points."""
PLACES = {"top center": (0, 1), "bottom center": (0, -1), "middle right": (1, 0), "middle left": (-1, 0)} | {
    f"{vertical} {horizontal}": (x, y)
    for vertical, y in (("top", 1), ("bottom", -1))
    for horizontal, x in (("right", 1), ("left", -1))
}
"""Where a label stands, as Plotly calls it -> its direction from the mark."""


def label_places(x: Floats, y: Floats, characters: Sequence[int]) -> list[str]:
    """Return where the label of each point stands so that few labels cover each other or a mark.

    Each takes the place that overlaps least with all marks and the labels placed before, in a panel of usual size.

    Args:
        x, y: float64[n], NaN for a point that is not drawn. characters: length of each label.
    """

    def pixels(values: Floats, size: float) -> Floats:
        low, high = np.nanmin(values), np.nanmax(values)
        return (values - low) / (high - low) * size if high > low else np.where(np.isnan(values), np.nan, size / 2)

    drawn = np.isfinite(x) & np.isfinite(y)
    if not drawn.any():
        return ["top center"] * len(x)
    at = np.column_stack([pixels(x, PANEL_PIXELS[0]), pixels(y, PANEL_PIXELS[1])])
    taken = [(px - MARK_PIXELS, py - MARK_PIXELS, px + MARK_PIXELS, py + MARK_PIXELS) for px, py in at[drawn].tolist()]
    found = []
    for (px, py), length, is_drawn in zip(at.tolist(), characters, drawn.tolist(), strict=True):
        if not is_drawn:
            found.append("top center")
            continue
        width, boxes = CHARACTER_PIXELS * length, {}
        for name, (right, up) in PLACES.items():
            middle_x, middle_y = px + right * (width / 2 + MARK_PIXELS), py + up * (LINE_PIXELS / 2 + MARK_PIXELS)
            boxes[name] = (
                middle_x - width / 2,
                middle_y - LINE_PIXELS / 2,
                middle_x + width / 2,
                middle_y + LINE_PIXELS / 2,
            )
        best = min(
            boxes,
            key=lambda name: (
                width * LINE_PIXELS
                - _overlap(boxes[name], PANEL)  # what lies outside
                + sum(_overlap(boxes[name], other) for other in taken)
            ),
        )
        taken.append(boxes[best])
        found.append(best)
    return found


def _overlap(one: Box, other: Box) -> float:
    """Return the area that two boxes share."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    return max(width, 0.0) * max(height, 0.0)


def _point(run: RunData) -> str:
    """Return what stands under the mouse for a run."""
    share, ratio, size = run.summary["slo_attainment"], run.perplexity_ratio, run.mean_weight_bytes
    rows = [
        f"SLO attainment {'-' if share is None else f'{100 * share:.1f} %'}",
        f"perplexity / dense {'unknown' if ratio is None else f'{ratio:.3f}'}",
        f"weights {'unknown' if size is None else f'{size / 1e9:.2f} GB'}",
    ]
    return f"{'<br>'.join(rows)}<extra>{plain(run.label)}</extra>"


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value
