"""Writes calibration files with readable diffs, and prints their errors."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from hw.calibrate.calibration import TARGET_MEDIAN, TARGET_P95, is_met
from sim.results.run_folder import write_text


def write_calibration(content: Mapping[str, Any], path: Path) -> None:
    """Write a calibration file, complete or not at all, with one table row per line.

    A file that has the same numbers already stays as it is, with the date on which they were made.
    """
    if not _has_same_numbers(path, content):
        write_text(path, _compact(json.dumps(content, indent=1, ensure_ascii=False)) + "\n")


def _has_same_numbers(path: Path, content: Mapping[str, Any]) -> bool:
    try:
        old = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    new = json.loads(json.dumps(content))
    return isinstance(old, dict) and {**old, "date": ""} == {**new, "date": ""}


def _compact(text: str) -> str:
    """Return JSON with every list of plain numbers on one line."""
    out: list[str] = []
    numbers: list[str] | None = None
    for line in text.splitlines():
        stripped = line.strip()
        if numbers is not None:
            if stripped in ("]", "],"):
                out[-1] += ",".join(numbers) + stripped
                numbers = None
            elif stripped[0] in "-0123456789":
                numbers.append(stripped.rstrip(","))
            else:
                out.append(line)
                numbers = None
        else:
            out.append(line)
            if stripped.endswith("["):
                numbers = []
    return "\n".join(out)


def error_table(contents: Sequence[dict[str, Any]]) -> Table:
    """Return the held-out errors of calibrations as a table for a terminal."""
    table = Table(title=f"Held-out error of each term (target: median < {TARGET_MEDIAN:.0%}, P95 < {TARGET_P95:.0%})")
    for column in ("calibration", "term"):
        table.add_column(column)
    for column in ("median", "P95", "points"):
        table.add_column(column, justify="right")
    table.add_column("target")
    for content in contents:
        for term, error in content["errors"].items():
            verdict = "met" if is_met(error) else f"missed: {error['note']}"
            table.add_row(
                content["name"], term, f"{error['median']:.2%}", f"{error['p95']:.1%}", str(error["points"]), verdict
            )
    return table
