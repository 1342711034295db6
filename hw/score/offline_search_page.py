"""The page of ``python -m hw.score kind=offline_search``: GSI next to searches of whole masks, from the figures."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from scipy.stats import t as student_t

from hw.score.block_numbers import block_number
from hw.score.mask_search import drop_text
from sim.pages.render import commit_of, render, show, table

TEMPLATE = Path(__file__).parent / "templates" / "offline_search.md.j2"
GSI, ONE_SHOT = "GSI", "one-shot"
View = Literal["passes", "cpu"]
"""What a search had found: after as many passes as GSI has candidates, or in the CPU seconds that GSI took."""
Text = Literal["calibration", "test"]


def gsi_cpu_s(sample: Mapping[str, Any], removals: int) -> float:
    """Return the CPU seconds in which GSI removed some blocks."""
    return float(sum(row["cpu_s"] for row in sample["gsi"][:removals]))


def drops_of(sample: Mapping[str, Any], removals: int) -> dict[tuple[str, View], str | None]:
    """Return (method, view) -> the mask it gives on a sample, as names of blocks; None if it had found none by then."""
    found: dict[tuple[str, View], str | None] = {}
    order = [block_number(row["removed"]) for row in sample["gsi"][:removals]]
    cheapest = sorted(range(len(sample["singles"])), key=lambda block: (sample["singles"][block], block))
    views: tuple[View, View] = ("passes", "cpu")
    for view in views:
        found[GSI, view] = drop_text(frozenset(order))
        found[ONE_SHOT, view] = drop_text(frozenset(cheapest[:removals]))
        for row in sample["searches"]:
            if row["removals"] == removals:
                limit_s = math.inf if view == "passes" else gsi_cpu_s(sample, removals)
                within = [one for one in row["incumbents"] if one["cpu_s"] <= limit_s]
                found[row["method"], view] = within[-1]["drop"] if within else None
    return found


def losses(figures: Mapping[str, Any], removals: int, method: str, view: View, text: Text) -> list[float]:
    """Return the loss of a method's mask on each sample, in nats per token; NaN where it had found none."""
    found = []
    for sample in figures["samples"]:
        of_drop = {row["drop"]: row[text] for row in sample["measured"]}
        found.append(of_drop.get(drops_of(sample, removals)[method, view], math.nan))
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Gap:
    """By how much a method's loss exceeds that of GSI, in nats per token, over samples.

    mean, half_width: of its 95 % interval (Student's t). lower, higher: samples in which it is lower, or higher.
    """

    mean: float
    half_width: float
    lower: int
    higher: int

    @property
    def verdict(self) -> str:
        """``better`` or ``worse`` where the interval excludes zero, else ``-``."""
        return "-" if not abs(self.mean) > self.half_width else "better" if self.mean < 0 else "worse"


def gap(figures: Mapping[str, Any], removals: int, method: str, view: View, text: Text) -> Gap:
    """Return the difference of a method from GSI, sample by sample."""
    differences = np.array(losses(figures, removals, method, view, text)) - losses(figures, removals, GSI, view, text)
    count = len(differences)
    error = float(differences.std(ddof=1)) / math.sqrt(count) if count > 1 else math.nan
    return Gap(
        mean=float(differences.mean()),
        half_width=error * float(student_t.ppf(0.975, count - 1)) if count > 1 else math.nan,
        lower=int((differences < 0).sum()),
        higher=int((differences > 0).sum()),
    )


def perplexity_table(figures: Mapping[str, Any], view: View, text: Text) -> str:
    """Return the table of perplexities, by removals: of the mean loss over samples."""
    names = [GSI, ONE_SHOT, *figures["methods"]]
    rows = [
        {
            "removals": size,
            **{name: math.exp(float(np.mean(losses(figures, size, name, view, text)))) for name in names},
        }
        for size in figures["removals"]
    ]
    return table(rows, dict.fromkeys(names, ".2f"))


def gap_table(figures: Mapping[str, Any], view: View, text: Text) -> str:
    """Return the table of differences from GSI, with intervals."""
    rows = []
    for size in figures["removals"]:
        row: dict[str, Any] = {"removals": size}
        for name in (ONE_SHOT, *figures["methods"]):
            found = gap(figures, size, name, view, text)
            row[name] = f"{show(found.mean, '+.3f')} ± {show(found.half_width, '.3f')} ({found.lower})"
        rows.append(row)
    return table(rows)


def budget_table(figures: Mapping[str, Any]) -> str:
    """Return the table of what was spent: passes, and CPU seconds, as means over samples."""
    rows = []
    for size, passes in zip(figures["removals"], figures["passes"], strict=True):
        row: dict[str, Any] = {
            "removals": size,
            "passes": passes,
            "GSI (CPU s)": np.mean([gsi_cpu_s(sample, size) for sample in figures["samples"]]),
        }
        for name in figures["methods"]:
            runs = [
                found
                for sample in figures["samples"]
                for found in sample["searches"]
                if (found["method"], found["removals"]) == (name, size)
            ]
            row[f"{name} (passes)"] = np.mean([run["passes"] for run in runs])
            row[f"{name} (CPU s)"] = np.mean([run["cpu_s"] for run in runs])
        rows.append(row)
    return table(rows, {heading: ".0f" for heading in rows[0] if heading not in ("removals", "passes")})


def verdicts(figures: Mapping[str, Any], view: View, text: Text) -> dict[str, dict[str, list[int]]]:
    """Return method -> verdict of ``Gap`` -> the numbers of removals with this verdict."""
    found: dict[str, dict[str, list[int]]] = {}
    for name in figures["methods"]:
        found[name] = {"better": [], "worse": [], "-": []}
        for size in figures["removals"]:
            found[name][gap(figures, size, name, view, text).verdict].append(size)
    return found


def verdict_counts(figures: Mapping[str, Any], view: View, text: Text) -> dict[str, int]:
    """Return in how many pairs of a search and a number of removals the search is better and worse than GSI."""
    found = verdicts(figures, view, text).values()
    return {verdict: sum(len(at[verdict]) for at in found) for verdict in ("better", "worse")}


def verdict_table(figures: Mapping[str, Any]) -> str:
    """Return the table of the numbers of removals at which a search is better or worse than GSI."""
    judged: list[tuple[str, str, View, Text]] = [
        ("held-out", "passes", "passes", "test"),
        ("held-out", "CPU seconds", "cpu", "test"),
        ("calibration", "passes", "passes", "calibration"),
    ]
    return table(
        [
            {
                "text": label,
                "at equal": budget,
                "search": name,
                "better than GSI at": _listed(at["better"]),
                "worse than GSI at": _listed(at["worse"]),
                "undecided at": _listed(at["-"]),
            }
            for label, budget, view, text in judged
            for name, at in verdicts(figures, view, text).items()
        ],
        left=3,
    )


def _listed(sizes: list[int]) -> str:
    return ", ".join(map(str, sizes)) or "none"


def lowest(figures: Mapping[str, Any], view: View, text: Text) -> dict[str, list[int]]:
    """Return method -> the numbers of removals at which its mean loss is the lowest; equal ones count for each."""
    names = [GSI, *figures["methods"]]
    found: dict[str, list[int]] = {name: [] for name in names}
    for size in figures["removals"]:
        means = {name: float(np.mean(losses(figures, size, name, view, text))) for name in names}
        least = min(value for value in means.values() if not math.isnan(value))
        for name, value in means.items():
            if value == least:
                found[name].append(size)
    return found


def _cpu_s(sample: Mapping[str, Any]) -> float:
    """Return the CPU seconds of all searches of a sample; single removals, charged to each, were measured once."""
    charged_again = sample["singles_cpu_s"] * (len(sample["searches"]) - 1)
    return float(sum(row["cpu_s"] for row in (*sample["gsi"], *sample["searches"])) - charged_again)


def page(figures: Mapping[str, Any]) -> str:
    """Return the page of the figures, in Markdown."""
    samples = figures["samples"]
    dense = {
        text: math.exp(np.mean([row[text] for sample in samples for row in sample["measured"] if row["drop"] == ""]))
        for text in ("calibration", "test")
    }
    return render(
        TEMPLATE,
        made=figures,
        commit=commit_of(figures),
        sample=samples[0]["text"],
        dense=dense,
        held_out={view: perplexity_table(figures, view, "test") for view in ("passes", "cpu")},
        gaps={view: gap_table(figures, view, "test") for view in ("passes", "cpu")},
        calibration=gap_table(figures, "passes", "calibration"),
        budget=budget_table(figures),
        verdicts=verdict_table(figures),
        held_out_counts={view: verdict_counts(figures, view, "test") for view in ("passes", "cpu")},
        calibration_counts=verdict_counts(figures, "passes", "calibration"),
        comparisons=len(figures["methods"]) * len(figures["removals"]),
        one_shot_below=[
            size
            for size in figures["removals"]
            if gap(figures, size, ONE_SHOT, "passes", "test").mean < 0
            and gap(figures, size, ONE_SHOT, "passes", "calibration").mean > 0
        ],
        lowest={view: lowest(figures, view, "test") for view in ("passes", "cpu")},
        lowest_calibration=lowest(figures, "passes", "calibration"),
        cpu_s=sum(map(_cpu_s, samples)),
    )
