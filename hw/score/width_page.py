"""The page of ``python -m hw.score kind=width``: its tables, its picture, and numbers in its sentences."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from sim.cost.ffn_width import FFN_WIDTHS, FULL_WIDTH
from sim.cost.latency import load_calibration
from sim.cost.model_spec import load_model
from sim.cost.plan import dense_plan
from sim.cost.quality import Text
from sim.pages.render import commit_of, render, table
from sim.results.plots import figure_file, line_style
from sim.types import GIB

TEMPLATE = Path(__file__).parent / "templates" / "width.md.j2"
MIB = GIB / 1024
WAYS = ("width", "dropped FFN", "4 bits")
"""Kinds of variants that are compared at equal bytes."""
PRICED = ("llama2_7b_a100", "llama3.1_8b_a100")
"""Calibrations of the speed-ups."""
ITERATIONS = {
    "1 decode": ([], 1, 512, 1),
    "64 decodes": ([], 64, 64 * 512, 64),
    "a prompt of 2,048 tokens": ([(2048, 0)], 0, 0, 1),
}
"""Name -> chunks, decodes, the sum of their contexts, and sequences that get a token."""
ALIKE = 0.005
"""Numbers of freed bytes that differ by less than this share are one level."""


@dataclass(frozen=True, slots=True)
class Loss:
    """What a variant loses over the dense model on test text.

    layers: how many are cut. mean: nats per token. error: its standard error over windows. chosen_by: its mean on
    calibration text.
    """

    kind: str
    setting: str
    layers: int
    freed: int
    mean: float
    error: float
    chosen_by: float

    @property
    def text(self) -> str:
        """The loss with its standard error, which one window alone does not have."""
        return f"{self.mean:.3f}" if math.isnan(self.error) else f"{self.mean:.3f} ± {self.error:.3f}"

    @property
    def named(self) -> str:
        """The setting, with the number of layers that are cut, if any."""
        return f"{self.layers} layers to {self.setting}" if self.layers else self.setting


def mean_loss(row: Mapping[str, Any], dense: Mapping[str, Any], text: Text) -> float:
    """Return what a variant loses over dense, in nats a token: the mean over equal windows of a text."""
    return float(np.mean(row["nll"][text]) - np.mean(dense["nll"][text]))


def losses(figures: Mapping[str, Any]) -> list[Loss]:
    """Return the loss of every variant but dense, in the order of the file."""
    (dense,) = (row for row in figures["variants"] if row["kind"] == "dense")
    found = []
    for row in figures["variants"]:
        if row is dense:
            continue
        difference = np.array(row["nll"]["test"]) - np.array(dense["nll"]["test"])
        error = float(difference.std(ddof=1)) / math.sqrt(len(difference)) if len(difference) > 1 else math.nan
        mean, chosen_by = mean_loss(row, dense, "test"), mean_loss(row, dense, "calibration")
        layers = sum(width < FULL_WIDTH for width in row["widths"])
        found.append(Loss(row["kind"], row["setting"], layers, row["freed_bytes"], mean, error, chosen_by))
    return found


def levels(listed: Sequence[Loss]) -> list[int]:
    """Return the different numbers of bytes that widths free, in ascending order; of alike ones the least."""
    found: list[int] = []
    for freed in sorted({one.freed for one in listed if one.kind == "width"}):
        if not found or freed > found[-1] * (1 + ALIKE):
            found.append(freed)
    return found


def best(listed: Sequence[Loss], kind: str, level: int) -> Loss | None:
    """Return the variant of a kind that frees a level's bytes and loses least on calibration text.

    Widths free these bytes exactly; of the other kinds, it is the fewest blocks or layers that free as much. None if
    there is none.
    """
    enough = [one for one in listed if one.kind == kind and one.freed >= level]
    if not enough:
        return None
    least = min(one.freed for one in enough)
    return min((one for one in enough if one.freed <= least * (1 + ALIKE)), key=lambda one: one.chosen_by)


def equal_bytes(figures: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return one row a level: the bytes, and the best variant of each way."""
    listed = losses(figures)
    return [{"level": level, **{kind: best(listed, kind, level) for kind in WAYS}} for level in levels(listed)]


def equal_table(figures: Mapping[str, Any]) -> str:
    """Return the table of ``equal_bytes``."""
    rows = []
    for found in equal_bytes(figures):
        row: dict[str, Any] = {
            "freed (MiB)": found["level"] / MIB,
            "of all weights": found["level"] / figures["weight_bytes"],
        }
        for kind in WAYS:
            one = found[kind]
            row[kind] = None if one is None else one.named
            row[f"loss: {kind}"] = None if one is None else one.text
        rows.append(row)
    return table(rows, {"freed (MiB)": ".1f", "of all weights": ".1%"})


def width_table(figures: Mapping[str, Any]) -> str:
    """Return the table of losses by width and layers: importance, and random channels where they were measured."""
    listed = losses(figures)
    at_random = {one.setting: one.text for one in listed if one.kind == "random channels"}
    return table(
        [
            {
                "cut": one.named,
                "freed (MiB)": one.freed / MIB,
                "loss (nats)": one.text,
                "perplexity over dense": math.exp(one.mean),
                "loss with random channels": at_random.get(one.setting),
            }
            for one in listed
            if one.kind == "width"
        ],
        {"freed (MiB)": ".1f", "perplexity over dense": ".3f"},
    )


def layer_table(figures: Mapping[str, Any], count: int = 5) -> str:
    """Return the mean loss of one cut layer, over runs of layers from front to back."""
    alone = [one.mean for one in losses(figures) if one.kind == "one layer"]
    parts = [(first, alone[first : first + count]) for first in range(0, len(alone), count)]
    return table(
        [
            {"layers": f"{first} to {first + len(part) - 1}", "mean loss (nats)": float(np.mean(part))}
            for first, part in parts
        ],
        {"mean loss (nats)": ".4f"},
    )


def speed_table(calibration: str) -> str:
    """Return how many times faster iterations are with all FFN blocks cut, by width, from a calibration."""
    latency = load_calibration(calibration)
    dense = dense_plan(load_model(latency.model))
    rows = []
    for name, iteration in ITERATIONS.items():
        dense_s = latency.iteration_s(dense, *iteration)
        row: dict[str, Any] = {"iteration": name}
        for width in FFN_WIDTHS[1:]:
            plan = replace(dense, ffn_width=(width,) * len(dense.ffn_width))
            row[f"{width}/8"] = dense_s / latency.iteration_s(plan, *iteration)
        rows.append(row)
    return table(rows, {f"{width}/8": ".2f" for width in FFN_WIDTHS[1:]})


def beyond(one: Loss, other: Loss) -> bool:
    """Return whether a loss is below another by more than both standard errors."""
    return one.mean + one.error < other.mean - other.error


def verdict(pairs: Sequence[tuple[Loss, Loss]]) -> dict[str, int]:
    """Return at how many levels the first of two losses is better, worse, or equal within both standard errors."""
    better = sum(beyond(own, other) for own, other in pairs)
    worse = sum(beyond(other, own) for own, other in pairs)
    return {"better": better, "equal": len(pairs) - better - worse, "worse": worse}


def page(figures: Mapping[str, Any]) -> str:
    """Return the page of the figures, in Markdown."""
    (dense,) = (row for row in figures["variants"] if row["kind"] == "dense")
    listed, rows = losses(figures), equal_bytes(figures)
    found = {kind: verdict([(row["width"], row[kind]) for row in rows if row[kind] is not None]) for kind in WAYS[1:]}
    return render(
        TEMPLATE,
        figures=figures,
        commit=commit_of(figures),
        windows={text: len(nll) for text, nll in dense["nll"].items()},
        perplexity=math.exp(float(np.mean(dense["nll"]["test"]))),
        rows=rows,
        mib=MIB,
        found=found,
        everywhere={one.setting: one for one in listed if one.kind == "width" and one.setting.endswith("all")},
        at_random={one.setting: one for one in listed if one.kind == "random channels"},
        equal=equal_table(figures),
        widths=width_table(figures),
        layers=layer_table(figures),
        errors=figures["fits"]["test"]["errors"],
        priced=[{"name": name, "table": speed_table(name)} for name in PRICED],
    )


def plot(path: Path, figures: Mapping[str, Any]) -> None:
    """Plot loss against freed bytes: the best of each way by calibration text, and all variants as points."""
    listed = losses(figures)
    with figure_file(path, size=(9.0, 5.0), title=f"{figures['model']}: loss by freed bytes of weights") as (_, axis):
        for rank, kind in enumerate(WAYS, start=1):
            own = [one for one in listed if one.kind == kind]
            style = line_style(rank)
            axis.scatter([one.freed / MIB for one in own], [one.mean for one in own], s=10, alpha=0.5, **style)
            chosen = {one.freed: one for level in levels(listed) if (one := best(listed, kind, level)) is not None}
            shown = [chosen[freed] for freed in sorted(chosen)]
            axis.errorbar(
                [one.freed / MIB for one in shown],
                [one.mean for one in shown],
                yerr=[one.error for one in shown],
                label=f"{kind}, best by calibration text",
                **style,
            )
        axis.set_xlabel("freed bytes of weights [MiB]")
        axis.set_ylabel("loss [nats per token]")
        axis.set_yscale("symlog", linthresh=0.1)
        axis.legend(loc="upper left")
