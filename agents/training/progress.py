"""progress.csv of a training: one row for each validation."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from sim.results.run_folder import write_text

COLUMNS = (
    "iteration",
    "seconds",
    "env_steps",
    "episode_return",
    "validation_utility",
    "best_utility",
    "sample_seconds",
    "learn_seconds",
    "healthy_runners",
)


class Progress:
    """The file, and the lines of progress on the console."""

    def __init__(self, path: Path, console: Console) -> None:
        self.path, self.console = path, console

    def start(self) -> None:
        """Write the header."""
        write_text(self.path, ",".join(COLUMNS) + "\n")

    def rewind(self, iteration: int) -> None:
        """Drop the rows that a killed run wrote after its last checkpoint; the resumed run writes them again."""
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else [",".join(COLUMNS)]
        kept = [lines[0], *(line for line in lines[1:] if line and int(line.split(",")[0]) <= iteration)]
        write_text(self.path, "\n".join(kept) + "\n")

    def append(self, row: Mapping[str, Any]) -> None:
        """Append a row to the file."""
        with self.path.open("a", newline="", encoding="utf-8") as file:
            csv.writer(file).writerow(row.values())

    def print(self, row: Mapping[str, Any]) -> None:
        """Print a row to the console."""
        self.console.print(
            f"{row['seconds']:7.0f} s  iteration {row['iteration']:5d}  {row['env_steps']:9,d} steps  "
            f"return {row['episode_return']:8.3f}  validation utility {row['validation_utility']:.4f} "
            f"(best {row['best_utility']:.4f})",
            highlight=False,
            soft_wrap=True,
        )


def progress_row(status: Mapping[str, Any], result: Mapping[str, Any], utility: float) -> dict[str, Any]:
    """Return a row of progress.csv.

    Args:
        status: iteration, seconds and best utility of the training. result: what RLlib reports of the iteration.
        utility: mean validation utility.
    """
    timers = result.get("timers", {})
    learners = result.get("learners", {}).get("__all_modules__", {})
    values = (
        status["iteration"],
        round(status["seconds"], 2),
        int(result.get("num_env_steps_sampled_lifetime", 0)),
        round(float(result.get("env_runners", {}).get("episode_return_mean", float("nan"))), 5),
        round(utility, 5),
        round(status["best"], 5),
        round(float(timers.get("env_runner_sampling_timer", float("nan"))), 4),
        round(float(timers.get("learner_update_timer", learners.get("learner_update_timer", float("nan")))), 4),
        int(result.get("fault_tolerance", {}).get("num_healthy_workers", 0)),
    )
    return dict(zip(COLUMNS, values, strict=True))
