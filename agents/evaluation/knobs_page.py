"""The page of ``python -m agents.knobs``: its tables, its picture, and sentences that follow from the figures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sim.pages.render import commit_of, render, table
from sim.results.plots import figure_file, line_style

TEMPLATE = Path(__file__).parent / "templates" / "knobs.md.j2"
DENSE, DROPPED = "dense", "dropped blocks"
GB = 1e9


def label_of(row: Mapping[str, Any]) -> str:
    """Return the name of a knob, with its link where that matters."""
    return f"{row['knob']}, {row['link']}" if row["link"] else str(row["knob"])


def labels(figures: Mapping[str, Any]) -> list[str]:
    """Return the names of all knobs of the table at equal bytes, in its order."""
    return list(dict.fromkeys(label_of(row) for row in figures["equal_bytes"]))


def first_that_frees(figures: Mapping[str, Any], batch: int, label: str, freed_gb: float) -> dict[str, Any] | None:
    """Return the first step of a knob that frees ``freed_gb`` GB with ``batch`` decodes; None if none does."""
    for row in figures["equal_bytes"]:
        if row["batch"] == batch and label_of(row) == label and row["freed_bytes"] >= freed_gb * GB:
            return dict(row)
    return None


def equal_bytes_table(figures: Mapping[str, Any]) -> str:
    """Return the table of what it takes to free the same bytes."""
    qualities = list(figures["equal_bytes"][0]["loss_nats"])
    rows = []
    for batch in dict.fromkeys(row["batch"] for row in figures["equal_bytes"]):
        for freed_gb in figures["freed_gb"]:
            for label in labels(figures):
                row = first_that_frees(figures, batch, label, freed_gb)
                cells: dict[str, Any] = {"decodes": batch, "frees (GB)": freed_gb, "by": label}
                if row is None:
                    rows.append({**cells, "step": "cannot"})
                    continue
                cells |= {"step": row["amount"], "freed (GB)": row["freed_bytes"] / GB}
                cells |= {f"loss (nats), {_short(name)}": row["loss_nats"][name] for name in qualities}
                rows.append({**cells, "token (ms)": 1e3 * row["decode_s"], "times dense": row["times_dense"]})
    formats = {"frees (GB)": "g", "freed (GB)": ".2f", "token (ms)": ".1f", "times dense": ".2f"}
    return table(rows, formats | {f"loss (nats), {_short(name)}": ".3f" for name in qualities}, left=4)


def _short(quality: str) -> str:
    return {"llama2_7b_transferred": "published W4", "llama2_7b_transferred_w4": "measured W4"}.get(quality, quality)


def cells_of(figures: Mapping[str, Any], quality: str) -> list[Mapping[str, Any]]:
    """Return the budgets and loads that were served, for one quality."""
    return [row for row in figures["by_load"] if row["quality"] == quality]


def by_load_table(figures: Mapping[str, Any], quality: str) -> str:
    """Return the table of utilities: a row for each knob, a column for each budget and load; the best is bold."""
    cells = cells_of(figures, quality)
    best = [max(found["utility"] for found in cell["knobs"].values()) for cell in cells]
    return table(
        [
            {"knob": label}
            | {
                _where(cell): ("**{:.3f}**" if cell["knobs"][label]["utility"] == top else "{:.3f}").format(
                    cell["knobs"][label]["utility"]
                )
                for cell, top in zip(cells, best, strict=True)
            }
            for label in cells[0]["knobs"]
        ],
        {},
    )


def _where(cell: Mapping[str, Any]) -> str:
    return f"{cell['budget_bytes'] / GB:.0f} GB, {cell['load']:g}"


def steps_table(figures: Mapping[str, Any], quality: str) -> str:
    """Return the table of the steps that validation windows chose, a row for each budget and load."""
    return table(
        [
            {"budget, load": _where(cell)}
            | {label: found["step"] for label, found in cell["knobs"].items() if label != DENSE}
            for cell in cells_of(figures, quality)
        ],
        {},
    )


def combined_table(figures: Mapping[str, Any]) -> str:
    """Return the table of the combinations that lose least under both bounds; links with the same ones share a row."""
    rows: dict[tuple[Any, ...], list[str]] = {}
    found: dict[tuple[Any, ...], Mapping[str, Any]] = {}
    order = sorted(figures["combined"], key=lambda row: (row["batch"], row["freed_gb"], row["times_dense"]))
    for row in order:
        plans = tuple(None if best is None else best["plan"] for best in row["best"].values())
        key = row["batch"], row["freed_gb"], row["times_dense"], plans
        rows.setdefault(key, []).append(row["link"])
        found.setdefault(key, row)
    return table(
        [_combined_row(found[key], links, figures) for key, links in rows.items()], {"frees (GB)": "g"}, left=4
    )


def _combined_row(row: Mapping[str, Any], links: Sequence[str], figures: Mapping[str, Any]) -> dict[str, Any]:
    cells: dict[str, Any] = {"decodes": row["batch"], "frees (GB)": row["freed_gb"]}
    cells["at most times dense"] = f"{row['times_dense']:g}"
    cells["link"] = "any" if len(links) == len(figures["links"]) else ", ".join(links)
    for quality, best in row["best"].items():
        name = _short(quality)
        cells[f"best, {name}"] = "none" if best is None else best["plan"]
        cells[f"loss, {name}"] = "-" if best is None else f"{best['loss_nats']:.3f}"
        cells[f"times dense, {name}"] = "-" if best is None else f"{best['times_dense']:.2f}"
    return cells


def difference(cell: Mapping[str, Any], label: str, other: str) -> tuple[float, float]:
    """Return by how much one knob's utility exceeds another's on the same windows, and the standard error."""
    gained = np.array(cell["knobs"][label]["by_window"]) - np.array(cell["knobs"][other]["by_window"])
    error = gained.std(ddof=1) / math.sqrt(len(gained)) if len(gained) > 1 else math.nan
    return float(gained.mean()), float(error)


def against_dropping(figures: Mapping[str, Any], quality: str) -> str:
    """Return the table of how often each knob is better than dropping blocks, by more than two standard errors."""
    cells = cells_of(figures, quality)
    rows = []
    for label in cells[0]["knobs"]:
        if label == DROPPED:
            continue
        pairs = [difference(cell, label, DROPPED) for cell in cells]
        rows.append(
            {
                "instead of dropping blocks": label,
                "better in": sum(gain > 2 * error for gain, error in pairs),
                "worse in": sum(gain < -2 * error for gain, error in pairs),
                "neither in": sum(not abs(gain) > 2 * error for gain, error in pairs),
                "mean difference": float(np.mean([gain for gain, _ in pairs])),
            }
        )
    return table(rows, {"mean difference": "+.3f"})


def wins(figures: Mapping[str, Any], quality: str) -> dict[str, int]:
    """Return in how many cells each knob has the highest utility, most often first."""
    best = [
        max(cell["knobs"], key=lambda label: cell["knobs"][label]["utility"]) for cell in cells_of(figures, quality)
    ]
    return dict(sorted(((label, best.count(label)) for label in set(best)), key=lambda pair: (-pair[1], pair[0])))


def page(figures: Mapping[str, Any]) -> str:
    """Return the page of the figures, in Markdown."""
    qualities = list(dict.fromkeys(row["quality"] for row in figures["by_load"]))
    return render(
        TEMPLATE,
        made=figures,
        commit=commit_of(figures),
        windows=figures["by_load"][0]["windows"],
        equal_bytes=equal_bytes_table(figures),
        qualities=qualities,
        first_loss=_short(qualities[0]),
        by_load={name: by_load_table(figures, name) for name in qualities},
        combined=combined_table(figures),
        plans=figures["combined"][0]["plans"],
        steps=steps_table(figures, qualities[0]),
        against_dropping={name: against_dropping(figures, name) for name in qualities},
        wins={name: wins(figures, name) for name in qualities},
        cells=len(cells_of(figures, qualities[0])),
        dropping={name: wins(figures, name).get(DROPPED, 0) for name in qualities},
        dropping_too={
            name: sum(count for label, count in wins(figures, name).items() if label.startswith(f"{DROPPED} and"))
            for name in qualities
        },
        speeds=", ".join(f"{name} {speed / GB:g} GB/s" for name, speed in figures["links"].items()),
    )


def plot_steps(path: Path, figures: Mapping[str, Any], batch: int | None = None) -> None:
    """Plot loss, and seconds per token over dense, against the bytes that each step frees at one load.

    Args:
        batch: decodes of an iteration; None takes the middle one of the table.
    """
    batches: Sequence[int] = list(dict.fromkeys(row["batch"] for row in figures["equal_bytes"]))
    batch = batches[len(batches) // 2] if batch is None else batch
    quality = next(iter(figures["equal_bytes"][0]["loss_nats"]))
    title = f"{figures['model']}, {figures['gpu']}: {batch} decodes of {figures['context_tokens']} tokens"
    with figure_file(path, 1, 2, size=(12.0, 5.0), title=title) as (figure, (left, right)):
        for rank, label in enumerate(labels(figures), start=1):
            rows = [row for row in figures["equal_bytes"] if row["batch"] == batch and label_of(row) == label]
            freed = [row["freed_bytes"] / GB for row in rows]
            style = {**line_style(rank), "label": label} | ({"marker": "o"} if len(rows) == 1 else {})
            left.plot(freed, [row["loss_nats"][quality] for row in rows], **style)
            right.plot(freed, [row["times_dense"] for row in rows], **style)
        left.set_ylabel("loss [nats per token]")
        left.set_yscale("symlog", linthresh=0.01)
        right.set_ylabel("time per token / dense")
        right.set_yscale("log")
        right.set_yticks([0.5, 1, 2, 5, 10, 20, 50], minor=False)
        right.yaxis.set_major_formatter("{x:g}")
        right.yaxis.set_minor_formatter("")
        right.autoscale(axis="y")
        for axis in (left, right):
            axis.set_xlabel("bytes freed [GB]")
            axis.set_xlim(left=0)
        handles, names = right.get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=3)
