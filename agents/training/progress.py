"""progress.csv of a training: one row for each validation."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sim.atomic import errors_name
from sim.results.run_folder import write_text

COLUMNS = (
    "iteration",
    "seconds",
    "env_steps",
    "episode_return",
    "validation_utility",
    "best_utility",
    "top_action_share",
    "sample_seconds",
    "learn_seconds",
    "healthy_runners",
    "critic_explained",
)
"""``critic_explained``: share of the variance of returns that the critic explains, 1 at most; nan without a critic."""


class Progress:
    """The file, and the lines of progress on stdout."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def start(self) -> None:
        """Write the header."""
        write_text(self.path, ",".join(COLUMNS) + "\n")

    def has_rows(self) -> bool:
        """Return whether the file has a row of an earlier run."""
        return self.path.exists() and len(self.path.read_text(encoding="utf-8", errors="replace").splitlines()) > 1

    def rewind(self, iteration: int) -> None:
        """Drop the rows that a killed run wrote after its last checkpoint; the resumed run writes them again."""
        lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines() if self.path.exists() else []
        # A killed run may end with half a row; an earlier version may lack a column, which stays empty.
        rows = [row for row in csv.DictReader(lines) if _iteration(row) <= iteration]
        kept = [",".join(row.get(name) or "" for name in COLUMNS) for row in rows]
        write_text(self.path, "\n".join([",".join(COLUMNS), *kept]) + "\n")

    def append(self, row: Mapping[str, Any]) -> None:
        """Append a row to the file."""
        with errors_name(self.path), self.path.open("a", newline="", encoding="utf-8") as file:
            csv.writer(file).writerow(row.values())

    def print(self, row: Mapping[str, Any]) -> None:
        """Print a row; say so if the validated policy always chose the same action."""
        alone = "; one action in every decision" if row["top_action_share"] == 1.0 else ""
        print(  # by Python's own print, which a progress bar on the same terminal makes room for
            f"{row['seconds']:7.0f} s  iteration {row['iteration']:5d}  {row['env_steps']:9,d} steps  "
            f"return {row['episode_return']:8.3f}  validation utility {row['validation_utility']:.4f} "
            f"(best {row['best_utility']:.4f}){alone}",
            flush=True,
        )


def _iteration(row: Mapping[str, Any]) -> float:
    """Return the iteration of a complete row, infinity for a row that was cut."""
    complete = None not in row and None not in row.values()
    return int(row["iteration"]) if complete and str(row.get("iteration")).isdigit() else math.inf


def progress_row(
    status: Mapping[str, Any], result: Mapping[str, Any], utility: float, top_share: float
) -> dict[str, Any]:
    """Return a row of progress.csv.

    Args:
        status: iteration, seconds and best utility of the training. result: what RLlib reports of the iteration.
        utility: mean validation utility. top_share: share of validation decisions that were the most frequent action.
    """
    timers = result.get("timers", {})
    modules = result.get("learners", {})
    learners = modules.get("__all_modules__", {})
    values = (
        status["iteration"],
        round(status["seconds"], 2),
        int(result.get("num_env_steps_sampled_lifetime", 0)),
        round(float(result.get("env_runners", {}).get("episode_return_mean", float("nan"))), 5),
        round(utility, 5),
        round(status["best"], 5),
        round(top_share, 4),
        round(float(timers.get("env_runner_sampling_timer", float("nan"))), 4),
        round(float(timers.get("learner_update_timer", learners.get("learner_update_timer", float("nan")))), 4),
        int(result.get("fault_tolerance", {}).get("num_healthy_workers", 0)),
        round(float(modules.get("default_policy", {}).get("vf_explained_var", float("nan"))), 4),
    )
    return dict(zip(COLUMNS, values, strict=True))
