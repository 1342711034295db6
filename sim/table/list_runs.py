"""``python -m sim.runs``: the latest runs in a folder, each with its command, state and main figure."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from sim.config import run_command
from sim.errors import ConfigError, nearest
from sim.pages.render import show
from sim.table.index import STATES, Run, find_runs
from sim.table.table import SHOWN


@dataclass(kw_only=True)
class RunsConfig:
    """Which runs to list.

    folders: where to look, and below; each gets a list. last: at most this many runs of it, the latest; null for all.
    state: only complete, interrupted, unfinished or failed ones; null for all.
    contains: only runs with this text in their folder, command or overrides; null for all.
    """

    folders: list[str] = field(default_factory=lambda: ["runs"])
    last: int | None = 30
    state: str | None = None
    contains: str | None = None


ConfigStore.instance().store(name="runs_schema", node=RunsConfig)


def main() -> None:
    """Run the command."""
    run_command(_lists, "runs", positional="folders")


def _lists(cfg: DictConfig) -> None:
    if cfg.state is not None and cfg.state not in STATES:
        raise ConfigError(f"state is {cfg.state!r}; {nearest(cfg.state, STATES)}")
    if cfg.last is not None and cfg.last < 1:
        raise ConfigError(f"last is {cfg.last}; it must be at least 1, or null for all runs")
    for name in cfg.folders:
        if not Path(name).is_dir():
            raise ConfigError(f"there is no folder {name}; run a command, or name another: python -m sim.runs FOLDER")
    for name in cfg.folders:
        _list(cfg, Path(name))


def _list(cfg: DictConfig, folder: Path) -> None:
    every = find_runs(folder)
    runs = [
        run
        for run in every
        if cfg.state in (None, run.state)
        and (not cfg.contains or cfg.contains in f"{run.folder} {run.part} {_job(run)}")
    ]
    runs.sort(key=lambda run: run.written_at, reverse=True)
    shown = runs[: cfg.last]
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(_table(shown, folder))
    console.print(f"{len(shown)} of {len(every)} runs in {folder}", highlight=False, markup=False)


def _job(run: Run) -> str:
    """Return the command of a run with the overrides of its job; of a sweep the command line is that of all jobs."""
    if not run.overrides:
        return run.command.removeprefix("python -m ")
    module = " ".join(run.command.split()[2:3])
    return " ".join((module, *(f"{key}={value}" for key, value in run.overrides.items())))


def _table(runs: Sequence[Run], folder: Path) -> Table:
    table = Table()
    for heading in ("written", "run", "command", "state"):
        table.add_column(heading, overflow="fold")
    table.add_column("main figure", justify="right")
    for run in runs:
        name = run.name_in(folder)
        figure = next((key for key in SHOWN if key in run.figures), None)
        main = "" if figure is None else f"{SHOWN[figure][0]} {show(run.figures[figure], SHOWN[figure][1])}"
        named = f"{name}: {run.part}" if run.part else name
        state = f"{run.state}: {run.error}" if run.error else run.state
        cells = (run.written_at[:16].replace("T", " "), named, _job(run), state, main)
        table.add_row(*(cell.replace("[", r"\[") for cell in cells))
    return table
