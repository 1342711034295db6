"""The page of the validation suite, docs/results/validation/index.md, and its plot, from validation.json alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hw.validate.compare import seconds, verdicts
from hw.validate.machine_speed import factors_by_precision, said_factors
from sim.pages.render import render, show, table
from sim.results.plots import figure_file

TEMPLATE = Path(__file__).parent / "templates" / "validation.md.j2"
SHOWN = ("ttft_s.mean", "ttft_s.p50", "ttft_s.p95", "tpot_s.mean", "tpot_s.p50", "tpot_s.p95", "makespan_s")
AT_SPEED = (
    "ttft_s.mean",
    "ttft_s.p50",
    "ttft_s.p95",
    "tpot_s.p50",
    "tpot_s.p95",
    "e2e_s.mean",
    "e2e_s.p95",
    "makespan_s",
)
"""Figures that are also compared with the machine's speed taken out."""

Cells = Sequence[tuple[str, str, Mapping[str, Any]]]
"""(workload, policy, comparison) of every cell of the suite."""


def heading(name: str) -> str:
    """Return a figure's name as tables show it: ``ttft_s.p95`` is TTFT P95."""
    figure, _, statistic = name.partition(".")
    if figure == "makespan_s":
        return "makespan"
    return f"{figure.removesuffix('_s').upper()} {statistic if statistic == 'mean' else statistic.upper()}"


def page(content: Mapping[str, Any]) -> str:
    """Return the page, in Markdown."""
    cells = [(workload, policy, result) for workload, by in content["results"].items() for policy, result in by.items()]
    judged = [verdict for _, _, result in cells for verdict in verdicts(result).values()]
    speed = content.get("machine_speed", {})
    references = speed.get("references", ())
    each = next(iter(factors_by_precision(references).values()), [])  # of the dense model
    return render(
        TEMPLATE,
        content=content,
        made=content["provenance"],
        speed={
            "factor": speed["factor"],
            "runs": len(each),
            "low": min(each),
            "high": max(each),
            "factors": said_factors(speed.get("factors", {})),
        }
        if references
        else None,
        checks={verdict: judged.count(verdict) for verdict in ("held", "within noise", "missed")},
        judged=len(judged),
        exact=sum(result["memory"].get("exact") is True for _, _, result in cells),
        cells=len(cells),
        not_held=not_held_table(cells),
        errors=errors_table(cells),
        events=events_table(cells),
        at_speed=at_speed_table(cells),
        median_errors=median_errors_table(cells),
        median_factor=float(np.median([f for _, _, r in cells for f in r["at_the_speed_of_the_run"]["factors"]])),
        ranking=ranking_table(content["ranking"]),
    )


def _pair(error: float | None, noise: float | None) -> str:
    return f"{show(error, '+.1%')} / {show(noise, '.1%')}"


def _marked(text: str, verdict: str | None) -> str:
    return f"**{text}**" if verdict == "missed" else text


def not_held_table(cells: Cells) -> str:
    """Return the checks that did not hold; empty if all did."""
    rows = []
    for workload, policy, result in cells:
        for name, verdict in verdicts(result).items():
            if verdict != "held":
                figure = result["figures"].get(name, {})
                known = {"error": figure.get("error"), "noise": figure.get("noise"), "verdict": verdict}
                label = heading(name) if figure else name
                rows.append({"workload": workload, "policy": policy, "figure": label} | known)
    return table(rows, {"error": "+.1%", "noise": ".1%"}, left=3) if rows else ""


def errors_table(cells: Cells) -> str:
    """Return the error of the simulator / the noise of the repeats for every cell; misses are bold."""
    rows = []
    for workload, policy, result in cells:
        changes, figures = result["counts"]["transitions"], result["figures"]
        real = "-".join(map(str, sorted(changes["real"])))
        row = {"workload": workload, "policy": policy, "plan changes": f"{changes['simulated']} / {real}"}
        for name in SHOWN:
            figure = figures[name]
            row[heading(name)] = _marked(_pair(figure["error"], figure["noise"]), figure["verdict"])
        rows.append(row | {"admission order": result["requests_one_by_one"]["admission_order_tau"]})
    return table(rows, {"admission order": ".2f"}, left=2)


def events_table(cells: Cells) -> str:
    """Return number and times of preemptions and plan changes, for cells that have any; empty if none has."""
    rows = []
    for workload, policy, result in cells:
        events = result.get("events", {})
        if not any(event["simulated"] or any(event["real"]) for event in events.values()):
            continue
        row = {"workload": workload, "policy": policy}
        for name, label in (("preemptions", "preemptions"), ("transitions", "plan changes")):
            event = events[name]
            counts = f"{event['simulated']} / {', '.join(map(str, event['real']))}"
            times = f"{seconds(event['time_error_s'])} / {seconds(event['time_noise_s'])}"
            row[label] = _marked(counts, event["verdict"])
            row[f"times of {label}"] = _marked(times, event["time_verdict"])
        ready_s = events["transitions"]["ready_after_s"]
        real_s = [value for value in ready_s["real"] if value is not None]
        middle_s = float(np.median(real_s)) if real_s else None
        rows.append(row | {"ready": f"{seconds(ready_s['simulated'])} / {seconds(middle_s)}"})
    return table(rows, left=2) if rows else ""


def at_speed_table(cells: Cells) -> str:
    """Return the errors of every cell with the machine's speed taken out."""
    rows = []
    for workload, policy, result in cells:
        one = result["at_the_speed_of_the_run"]
        factors = f"{min(one['factors']):.2f} to {max(one['factors']):.2f}"
        errors = {heading(name): one["errors"].get(name) for name in AT_SPEED}
        rows.append({"workload": workload, "policy": policy, "factor": factors} | errors)
    return table(rows, {heading(name): "+.1%" for name in AT_SPEED}, left=2)


def median_errors_table(cells: Cells) -> str:
    """Return the median absolute error over the cells, with the machine's speed taken out."""
    row = {}
    for name in AT_SPEED:
        errors = [abs(r["at_the_speed_of_the_run"]["errors"].get(name, np.nan)) for _, _, r in cells]
        row[heading(name)] = float(np.nanmedian(errors))
    return table([row], dict.fromkeys(row, ".1%"), left=0)


def ranking_table(ranking: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """Return how both sides order the policies of each workload."""
    rows = [
        {
            "workload": workload,
            "figure": heading(metric),
            "tau": row["tau"],
            "pairs beyond noise": row["pairs_beyond_noise"],
            "same order": row["agreed"],
            "tied": row["tied"],
            "regret": row["regret"],
        }
        for workload, by_metric in ranking.items()
        for metric, row in by_metric.items()
    ]
    return table(rows, {"tau": ".2f", "regret": ".1%"}, left=2)


PLOTTED = {"ttft_s.mean": "mean TTFT", "tpot_s.mean": "mean TPOT"}


def plot(path: Path, content: Mapping[str, Any]) -> None:
    """Write one PNG: the mean TTFT and TPOT of every cell, simulated against real, with the noise as bars."""
    with figure_file(path, 1, 2, size=(12, 5)) as (figure, axes):
        for axis, (metric, label) in zip(axes, PLOTTED.items(), strict=True):
            most = 0.0
            for policy in content["words"]["policies"]:
                cells = [by[policy]["figures"][metric] for by in content["results"].values()]
                cells = [cell for cell in cells if cell["real"] is not None and cell["simulated"] is not None]
                real, simulated = ([cell[side] for cell in cells] for side in ("real", "simulated"))
                noise = [cell["real"] * (cell["noise"] or 0.0) for cell in cells]
                axis.errorbar(real, simulated, xerr=noise, fmt="o", markersize=4, label=policy)
                most = max([most, *real, *simulated])
            axis.plot([0, most], [0, most], color="black", linewidth=0.8)
            axis.set(xlabel=f"{label}, real [s]", ylabel=f"{label}, simulated [s]")
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
