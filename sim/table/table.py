"""One table of many runs: Parquet with every figure, Markdown and the terminal with those that most people want."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from rich.console import Console

from sim.errors import ConfigError
from sim.pages.render import table
from sim.results.run_folder import write_parquet, write_text
from sim.table.index import COMPLETE, FAILED, Run, find_runs

SHOWN = {
    "slo_attainment": ("SLO", ".1%"),
    "utility": ("utility", ".4f"),
    "ttft_s.p50": ("TTFT P50, s", ".3f"),
    "ttft_s.p95": ("TTFT P95, s", ".3f"),
    "tpot_s.p50": ("TPOT P50, s", ".4f"),
    "perplexity_ratio": ("perplexity / dense", ".3f"),
    "rejected": ("rejected", ".0f"),
    "transitions": ("plan changes", ".0f"),
    "rate_rps": ("highest rate, req/s", ".3f"),
    "best_utility": ("best utility", ".4f"),
    "env_steps": ("steps", ",.0f"),
}
"""Figures of the short table: key -> column and format; a column that no run has is left out."""
FILES = "table.parquet", "table.md"


def frame_of(runs: Sequence[Run], root: Path) -> pd.DataFrame:
    """Return one row a run: run, part, state, error, command, written_at, the overrides (``=KEY``), every figure."""
    rows = []
    for run in runs:
        first = {"run": run.name_in(root), "part": run.part, "state": run.state, "error": run.error}
        first |= {"command": run.command, "written_at": run.written_at}
        rows.append(first | {f"={key}": value for key, value in run.overrides.items()} | dict(run.figures))
    return pd.DataFrame(rows)


def markdown_of(runs: Sequence[Run], root: Path) -> str:
    """Return the short table and a line for each job that failed.

    Of the overrides it shows those in which runs differ.
    """
    keys = dict.fromkeys(key for run in runs for key in run.overrides)
    varied = [key for key in keys if len({run.overrides.get(key) for run in runs}) > 1]
    shown = {key: column for key, column in SHOWN.items() if any(key in run.figures for run in runs)}
    rows = []
    for run in runs:
        row: dict[str, object] = {"run": _cell(run.name_in(root))}
        if any(one.part for one in runs):
            row["part"] = _cell(run.part or "-")
        row |= {key: _cell(run.overrides.get(key, "-")) for key in varied}
        if any(one.state != COMPLETE for one in runs):
            row["state"] = run.state
        rows.append(row | {title: run.figures.get(key) for key, (title, _) in shown.items()})
    text = table(rows, dict(shown.values()), left=len(rows[0]) - len(shown)) + "\n"
    failures = [(row["run"], run) for row, run in zip(rows, runs, strict=True) if run.state == FAILED]
    return text + "".join(f"\n- {name} failed: {run.error}" for name, run in failures) + ("\n" if failures else "")


def _cell(text: str) -> str:
    """Return text for a cell of a Markdown table, which a ``|`` would end."""
    return text.replace("|", r"\|")


def write_table(folder: Path, out: Path | None = None) -> None:
    """Write table.parquet and table.md for the runs below a folder, and print the short table.

    Args:
        out: where to write; None takes the folder itself.
    Raises:
        ConfigError: if there is no run.
    """
    runs = find_runs(folder)
    if not runs:
        raise ConfigError(f"{folder} holds no run; name the folder of a sweep, or one that holds run folders")
    out = out or folder
    out.mkdir(parents=True, exist_ok=True)
    text = markdown_of(runs, folder)
    write_parquet(out / FILES[0], frame_of(runs, folder))
    write_text(out / FILES[1], text)
    console = Console(soft_wrap=True)
    console.print(text.rstrip("\n"), highlight=False, markup=False)
    console.print(f"{len(runs)} runs: {out / FILES[1]}, {out / FILES[0]}", highlight=False, markup=False)
