"""What a step of the check-up finds: figures, checks and errors, saved after each, so that a killed step loses none."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sim.paths import REPOSITORY
from sim.results.run_folder import write_json


class Skip(Exception):  # noqa: N818 - the step has not failed
    """A step does not apply to this machine; the message says why."""


class Findings:
    """Figures and checks of one step, in a file that is complete after each."""

    def __init__(self, path: Path) -> None:
        """Save to this file."""
        self._path = path
        self.content: dict[str, Any] = {"figures": {}, "checks": [], "skipped": None, "error": None}
        self.save()

    def figure(self, name: str, value: Any) -> None:
        """Record a figure."""
        self.content["figures"][name] = value
        print(f"{name}: {value}", flush=True)
        self.save()

    def check(self, name: str, passed: bool, found: Any, wanted: str) -> None:
        """Record whether something holds, what was found, and what is wanted."""
        self.content["checks"].append({"name": name, "passed": bool(passed), "found": found, "wanted": wanted})
        print(f"{'passed' if passed else 'FAILED'}: {name}: {found}; wanted: {wanted}", flush=True)
        self.save()

    def skip(self, reason: str) -> None:
        """Record that the step does not apply."""
        self.content["skipped"] = reason
        self.save()

    def error(self, error: Mapping[str, Any]) -> None:
        """Record what ended the step early."""
        self.content["error"] = dict(error)
        self.save()

    def save(self) -> None:
        """Write the file."""
        write_json(self._path, plain(self.content))


def plain(value: Any) -> Any:
    """Return a value as JSON takes it: without NaN, NumPy's types and paths of this machine."""
    if isinstance(value, Mapping):
        return {str(key): plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(one) for one in value]
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, int):
        return int(value)
    if hasattr(value, "item"):  # a number of NumPy or torch
        return plain(value.item())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return without_paths(str(value))


_names = {str(REPOSITORY): ".", sys.prefix: "PYTHON", sys.base_prefix: "PYTHON", str(Path.home()): "~"}
"""Folders of this machine, and what stands for them in the results."""


def hide(**folders: str) -> None:
    """Let names stand for further folders in the results."""
    _names.update({folder: name for name, folder in folders.items()})


def without_paths(text: str) -> str:
    """Return a text with names in place of this machine's folders."""
    for folder, name in sorted(_names.items(), key=lambda pair: -len(pair[0])):  # a folder before those around it
        if len(folder) > 1:
            text = re.sub(rf"{re.escape(folder)}(?=[/\"'\s:,)]|$)", name, text)
    return text
