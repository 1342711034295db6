"""The page of ``python -m hw.score kind=kv_compression``: its tables, its picture, and numbers in its sentences."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hw.elastic.kv_compression.refree_kv import PUBLISHED
from sim.cost.quality import Text
from sim.pages.render import commit_of, render, table
from sim.results.plots import figure_file, line_style

TEMPLATE = Path(__file__).parent.parent / "templates" / "kv_compression.md.j2"
FULL = "full"


@dataclass(frozen=True, slots=True)
class Loss:
    """What a variant loses over full KV.

    share: of the bytes, in the mean over windows. mean: nats per token. error: its standard error over windows.
    """

    method: str
    factor: float | None
    setting: str
    share: float
    mean: float
    error: float

    @property
    def text(self) -> str:
        """The loss with its standard error."""
        return f"{self.mean:.3f} ± {self.error:.3f}"


def losses(figures: Mapping[str, Any], text: Text = "test") -> list[Loss]:
    """Return the loss of every variant but full KV, on the windows of a text."""
    (base,) = (row for row in figures["variants"] if row["method"] == FULL)
    found = []
    for row in figures["variants"]:
        if row is base:
            continue
        difference = np.array(row["nll"][text]) - np.array(base["nll"][text])
        error = difference.std(ddof=1) / math.sqrt(len(difference)) if len(difference) > 1 else math.nan
        share = float(np.mean(row["share"][text]))
        found.append(Loss(row["method"], row["factor"], row["setting"], share, float(difference.mean()), float(error)))
    return found


def methods(listed: Sequence[Loss]) -> list[str]:
    """Return the methods that were measured at factors, in the order of the file."""
    return list(dict.fromkeys(one.method for one in listed if one.factor is not None))


def by_factor(figures: Mapping[str, Any]) -> str:
    """Return the table of losses: one row for each method, one column for each factor."""
    listed = losses(figures)
    rows = []
    for method in methods(listed):
        own = {one.factor: one.text for one in listed if one.method == method}
        rows.append({"method": method, **{f"{factor:g}": own.get(factor) for factor in figures["factors"]}})
    return table(rows)


def details(figures: Mapping[str, Any]) -> str:
    """Return the table of every variant: the bytes that are left, the setting and the loss."""
    return table(
        [
            {
                "method": one.method,
                "factor": "-" if one.factor is None else f"{one.factor:g}",
                "setting": one.setting or "-",
                "share of bytes": one.share,
                "loss (nats)": one.mean,
                "standard error": one.error,
                "perplexity over full": math.exp(one.mean),
            }
            for one in losses(figures)
        ],
        {"share of bytes": ".3f", "loss (nats)": ".4f", "standard error": ".4f", "perplexity over full": ".3f"},
        left=3,
    )


def best(listed: Sequence[Loss], factor: float) -> Loss:
    """Return the variant with the lowest loss at a factor."""
    return min((one for one in listed if one.factor == factor), key=lambda one: one.mean)


def better_than(listed: Sequence[Loss], method: str) -> list[str]:
    """Return which variants lose less than a method at the same factor, by more than both standard errors."""
    own = {one.factor: one for one in listed if one.method == method and one.factor is not None}
    pairs = [(one, own[one.factor]) for one in listed if one.factor in own]
    return [f"{one.factor:g} {one.method}" for one, other in pairs if one.mean + one.error < other.mean - other.error]


def find(figures: Mapping[str, Any], method: str, factor: float | None, setting: str = "") -> Loss | None:
    """Return the loss of a method at a factor, or at a setting; None if it was not measured."""
    for one in losses(figures):
        if (one.method, one.factor) == (method, factor) and setting in one.setting:
            return one
    return None


def reach(figures: Mapping[str, Any], ratio: float) -> dict[str, float | None]:
    """Return the smallest factor of each method up to which perplexity stays within a ratio of full; None if none."""
    listed = losses(figures)
    found: dict[str, float | None] = {}
    for method in methods(listed):
        least = None
        for factor in sorted(figures["factors"], reverse=True):
            one = next((x for x in listed if (x.method, x.factor) == (method, factor)), None)
            if one is None or math.exp(one.mean) > ratio:
                break
            least = factor
        found[method] = least
    return found


def reach_table(figures: Mapping[str, Any]) -> str:
    """Return the table of the smallest factors within 1, 5 and 10 % of the perplexity of full KV."""
    ratios = {"within 1 %": 1.01, "within 5 %": 1.05, "within 10 %": 1.10}
    found = {name: reach(figures, ratio) for name, ratio in ratios.items()}
    rows = [{"method": method} | {name: found[name][method] for name in ratios} for method in methods(losses(figures))]
    return table(rows, dict.fromkeys(ratios, "g"))


def page(figures: Mapping[str, Any]) -> str:
    """Return the page of the figures, in Markdown."""
    (base,) = (row for row in figures["variants"] if row["method"] == FULL)
    listed, factors = losses(figures), figures["factors"]
    half = min(factors, key=lambda factor: abs(factor - 0.5))
    highest = max(factors)
    return render(
        TEMPLATE,
        figures=figures,
        commit=commit_of(figures),
        windows={text: len(nll) for text, nll in base["nll"].items()},
        perplexity=math.exp(float(np.mean(base["nll"]["test"]))),
        by_factor=by_factor(figures),
        details=details(figures),
        reach=reach_table(figures),
        at=lambda method: find(figures, method, half),
        think=[one for one in listed if one.method == "ThinK"],
        half=half,
        better=better_than(listed, "kv_bits"),
        second=best([one for one in listed if one.method != "kv_bits"], half),
        published=find(figures, "ReFreeKV", None, f"{PUBLISHED:.0%}"),
        eight=find(figures, "kv_bits", None, "at 8 bits"),
        four=find(figures, "kv_bits", None, "at 4 bits"),
        lorc=find(figures, "LoRC", highest),
        keys_alone=find(figures, "LoRC, keys alone", highest),
    )


def plot(path: Path, figures: Mapping[str, Any]) -> None:
    """Plot loss against the share of the bytes that is left, for each method."""
    listed = losses(figures)
    title = f"{figures['model']}: KV of prompts of {figures['prompt_tokens']:,} tokens"
    with figure_file(path, size=(9.0, 5.5), title=title) as (figure, axis):
        for rank, method in enumerate(methods(listed), start=1):
            own = sorted((one for one in listed if one.method == method), key=lambda one: one.share)
            axis.errorbar(
                [one.share for one in own],
                [one.mean for one in own],
                yerr=[one.error for one in own],
                marker="o",
                markersize=3,
                label=method,
                **line_style(rank),
            )
        axis.set_xlabel("share of the bytes of the prompt's KV")
        axis.set_ylabel("loss [nats per token]")
        axis.set_yscale("symlog", linthresh=0.01)
        axis.set_xlim(1.0, 0.2)
        handles, names = axis.get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=5)
