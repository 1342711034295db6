"""Finds run folders below a folder and reads what tables show of them: state, overrides, figures.

Only small files are read, and nothing that a configuration names is built.
"""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sim.config.command import BEGUN_FILES, RUN_FILES
from sim.config.sweeps import FAILED_JOBS
from sim.errors import ConfigError
from sim.json_file import read_json_object

COMPLETE, INTERRUPTED, UNFINISHED, FAILED = "complete", "interrupted", "unfinished", "failed"
STATES = (COMPLETE, INTERRUPTED, UNFINISHED, FAILED)
TRAINED = ("best/policy.json", "search.json", "demonstrations.npz")
"""What a folder of agents.train, agents.clone, agents.tune and agents.offline has when there is a result."""
PROGRESS = "progress.csv"


@dataclass(frozen=True, kw_only=True)
class Run:
    """One row of a table: a run, or one policy or case of a run that holds several.

    part: the policy or case; empty for the only one. state: one of STATES. error: why it failed.
    overrides: key -> value of this job. figures: key -> number, with dots for nested keys.
    """

    folder: Path
    state: str
    part: str = ""
    error: str = ""
    command: str = ""
    written_at: str = ""
    overrides: Mapping[str, str]
    figures: Mapping[str, float]

    def name_in(self, root: Path) -> str:
        """Return the folder as a path from ``root``; as it is if it lies elsewhere."""
        inside = self.folder.is_relative_to(root)
        return printable(self.folder.relative_to(root).as_posix() if inside else str(self.folder))


def printable(value: Any) -> str:
    """Return a value as text in one line; a stranger's run may hold characters that change a terminal."""
    return "".join(sign if sign.isprintable() else " " for sign in str(value))


def find_runs(folder: Path) -> list[Run]:
    """Return the runs in a folder and below it, and the failed jobs of sweeps, in the order of their paths."""
    found: list[Run] = []
    for path in _run_folders(folder):
        found += _read(path)
    for path in sorted(folder.rglob(f"{FAILED_JOBS}/*.json")):
        note = _json(path)
        at = path.parents[1] / str(note.get("folder", path.stem))
        if "error" in note:  # what is in the folder, if anything, is of another configuration
            found = [run for run in found if run.folder != at]
            found.append(Run(**_about(at, note), state=FAILED, error=printable(note["error"]), figures={}))
    return sorted(found, key=lambda run: [_natural(part) for part in run.folder.parts])


def _natural(name: str) -> tuple[int, str]:
    """Return a key by which 2_burst comes before 10_burst."""
    number = name.partition("_")[0]
    return (int(number) if number.isdecimal() else -1, name)


def _run_folders(folder: Path) -> Iterator[Path]:
    """Yield the folders of runs, not those inside of a run; links are not followed."""
    for where, inner, files in os.walk(folder):
        if set(files) & {*RUN_FILES, *BEGUN_FILES}:
            yield Path(where)
            inner.clear()
        inner.sort()


def _read(folder: Path) -> list[Run]:
    """Return the rows of one run folder."""
    shared = _about(folder, _json(folder / "provenance.json"))
    parts = _parts(folder)
    if parts:
        return [
            Run(
                **shared,
                state=INTERRUPTED if content.get("interrupted") else COMPLETE,
                part=printable(part),
                figures=_flat(content),
            )
            for part, content in parts
        ]
    if damaged := next((path for name in RUN_FILES if (path := folder / name).exists()), None):
        return [Run(**shared, state=FAILED, error=_damage(damaged), figures={})]
    if any((folder / name).exists() for name in TRAINED):
        return [Run(**shared, state=COMPLETE, figures=_training_figures(folder / PROGRESS))]
    return [Run(**shared, state=UNFINISHED, figures=_training_figures(folder / PROGRESS))]


def _about(folder: Path, made: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that every row of a run shares, from its provenance or from the note of its failure."""
    return {
        "folder": folder,
        "command": printable(made.get("command", "")),
        "written_at": printable(made.get("written_at", "")),
        "overrides": _overrides(made),
    }


def _parts(folder: Path) -> list[tuple[str, Mapping[str, Any]]]:
    """Return the summaries of a run folder, each with the policy or case that it is of."""
    if one := _json(folder / "summary.json"):
        return [("", one)]
    if cases := _json(folder / "summaries.json"):
        return [(str(case), content) for case, content in cases.items() if isinstance(content, Mapping)]
    return [*_compared(_json(folder / "compare.json")), *_capacities(_json(folder / "capacity.json"))]


def _compared(content: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the policies, and their cases if there are several, of a compare.json."""
    cases = content["cases"] if isinstance(content.get("cases"), list) else []
    for label, rows in _mapping(content.get("summaries")).items():
        for case, summary in zip(cases, rows if isinstance(rows, list) else [], strict=False):
            if isinstance(summary, Mapping):
                yield f"{label}, {case}" if len(cases) > 1 else str(label), summary


def _capacities(content: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the rows of a capacity.json."""
    rows = content.get("rows", [])
    for row in rows if isinstance(rows, list) else []:
        if isinstance(row, Mapping):
            yield ", ".join(str(row[key]) for key in ("policy", "gpu") if key in row), row


def _training_figures(path: Path) -> dict[str, float]:
    """Return the last row of a training's progress: numbers only."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error):
        return {}
    last = rows[-1] if rows else {}
    return {str(key): number for key, text in last.items() if (number := _number(text)) is not None}


def _flat(content: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Return the numbers of a summary, nested keys with dots."""
    found: dict[str, float] = {}
    for key, value in content.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{key}.")
        elif not isinstance(value, bool) and (number := _number(value)) is not None:
            found[f"{prefix}{key}"] = number
    return found


def _number(value: Any) -> float | None:
    if not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _overrides(made: Mapping[str, Any]) -> dict[str, str]:
    """Return key -> value of the overrides that a file states."""
    listed: Sequence[Any] = made["overrides"] if isinstance(made.get("overrides"), list) else []
    pairs = (printable(text).lstrip("+").partition("=") for text in listed)
    return {key: value for key, _, value in pairs}


def _json(path: Path) -> dict[str, Any]:
    """Return the object of a JSON file; empty if there is none, or if it cannot be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _damage(path: Path) -> str:
    """Return why a file of results gives no figures, and what to do."""
    try:
        read_json_object(path, ConfigError, "delete the folder, and run it again")
    except ConfigError as error:
        return str(error)
    return f"{path} holds no figures; delete the folder, and run it again"


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
