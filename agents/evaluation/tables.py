"""Tables and plots that the sections of the agents page share."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from agents.evaluation.statistics import Interval
from sim.errors import ConfigError
from sim.pages.render import table
from sim.results.plots import line_style


def policies_of(frame: pd.DataFrame, oracles: Sequence[str] = ("oracle",)) -> list[str]:
    """Return the policies in the order of the frame, the oracles last."""
    names = [str(name) for name in frame["policy"].unique()]
    return [name for name in names if name not in oracles] + [name for name in oracles if name in names]


def signed(interval: Interval) -> str:
    """Return a difference with its interval; a mark shows that zero lies inside."""
    mark = "" if interval.excludes_zero() else " (0 inside)"
    return f"{interval.mean:+.4f} [{interval.low:+.4f}, {interval.high:+.4f}]{mark}"


def standing(against: Callable[[str], Interval], rules: Sequence[str]) -> dict[str, list[str]]:
    """Return which rules a policy beats, loses to, and which are undecided because the interval includes zero.

    Args:
        against: the difference to a rule, as an interval.
        rules: whom to compare with.
    """
    found = {name: against(name) for name in rules}
    beats = [name for name in rules if found[name].low > 0]
    loses_to = [name for name in rules if found[name].high < 0]
    undecided = [name for name in rules if name not in (*beats, *loses_to)]
    return {"beats": beats, "loses_to": loses_to, "undecided": undecided}


def by_kind(frame: pd.DataFrame, names: Sequence[str], columns: Mapping[str, str], value: str = "utility") -> str:
    """Return the mean utility of every policy by trace, budget or load, side by side; each trace counts the same.

    Args:
        frame: one row per policy, seed and window or load; numeric kinds are sorted, others keep their order.
        names: rows, in this order.
        columns: column of the frame -> what stands before its kinds in the headings.
    """
    parts = []
    for column, prefix in columns.items():
        by_trace = [] if column == "source" or "source" not in frame else ["source"]
        means = frame.groupby(["policy", column, *by_trace])[value].mean().groupby(["policy", column]).mean().unstack()
        kinds = means.columns if pd.api.types.is_numeric_dtype(frame[column]) else frame[column].unique().tolist()
        parts.append(means[list(kinds)].add_prefix(prefix))
    wide = pd.concat(parts, axis=1).loc[list(names)]
    return table(wide.reset_index(names="policy"), dict.fromkeys(wide.columns, ".3f"))


def training_table(curves: pd.DataFrame) -> str:
    """Return what each training took, as medians over seeds, and what it reached."""
    rows = []
    for name, part in curves.groupby("policy", sort=False):
        ends = part.groupby("seed").agg({"validation_utility": "max", "seconds": "max", "env_steps": "max"})
        best = ends["validation_utility"]
        rows.append(
            {
                "training": name,
                "seeds": len(ends),
                "best validation utility": best.mean(),
                "seed range": f"{best.min():.4f} to {best.max():.4f}",
                "seconds": ends["seconds"].median(),
                "environment steps": ends["env_steps"].median(),
            }
        )
    return table(rows, {"best validation utility": ".4f", "seconds": ".0f", "environment steps": ",.0f"})


def seconds_of(made: Mapping[str, Any]) -> str:
    """Return, for each policy, the range over seeds of the wall seconds until its best state."""
    taken = made.get("seconds", {}).items()
    return ", ".join(f"{name} {min(each):.0f} to {max(each):.0f}" for name, each in taken)


def plot_by_source(axes: Any, frame: pd.DataFrame, names: Sequence[str], minus: str | None = None) -> None:
    """Plot the utility of every policy by trace, or its distance to that of another policy."""
    means = frame.groupby(["source", "policy"])["utility"].mean()
    for source, marker in zip(frame["source"].unique(), itertools.cycle("os^Dv")):
        base = 0.0 if minus is None else float(means[(source, minus)])
        values = [float(means[(source, name)]) - base for name in names]
        axes.plot(values, range(len(names)), marker, label=str(source), markersize=5)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_ylim(len(names) - 0.5, -0.5)


def plot_training(axes: Any, curves: pd.DataFrame | None, steps: str = "environment steps") -> None:
    """Plot validation utility over training, one line per seed; nothing without curves."""
    if curves is None:
        axes.set_visible(False)
        return
    for rank, (label, part) in enumerate(curves.groupby("policy", sort=False), start=1):
        for line, (_, one) in enumerate(part.groupby("seed")):
            style = {**line_style(rank), "linewidth": 1, "label": str(label) if line == 0 else None}
            axes.plot(one["env_steps"] / 1e3, one["validation_utility"], alpha=0.8, **style)
    axes.set(xlabel=f"thousand {steps}", ylabel="validation utility in training, a line per seed")


def read_if_there(path: Path) -> pd.DataFrame | None:
    """Return a Parquet file as a frame; None where it was not measured."""
    return read_rows(path, ()) if path.exists() else None


def read_rows(path: Path, needed: Sequence[str] = ("policy",)) -> pd.DataFrame:
    """Return the rows of a result file; ``needed``: columns that it must have.

    Raises:
        ConfigError: for a file that is damaged or holds something else.
    """
    try:
        rows = pd.read_parquet(path)
    except (OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(f"{path} cannot be read ({reason}); delete it, and evaluate again without only=") from error
    if missing := [name for name in needed if name not in rows]:
        raise ConfigError(f"{path} has no column {', '.join(missing)}; delete it, and evaluate again without only=")
    return rows
