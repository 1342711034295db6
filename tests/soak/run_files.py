"""Whether the files of a run folder are complete, and whether two folders hold the same results."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pa_parquet
import yaml

PNG_END = b"IEND\xaeB`\x82"


def temporary(path: Path) -> bool:
    """Return whether a file is one that was being written: it is renamed when it is complete."""
    return path.name.startswith(".") or path.suffix == ".part"


def _ends_with_a_line(path: Path) -> None:
    content = path.read_bytes()
    if content and not content.endswith(b"\n"):
        raise ValueError("the last line is cut")


def _png(path: Path) -> None:
    if not path.read_bytes().endswith(PNG_END):
        raise ValueError("the end is missing")


READERS: dict[str, Callable[[Path], Any]] = {
    ".parquet": pa_parquet.read_table,
    ".json": lambda path: json.loads(path.read_text(encoding="utf-8")),
    ".yaml": lambda path: yaml.safe_load(path.read_text(encoding="utf-8")),
    ".csv": _ends_with_a_line,
    ".md": _ends_with_a_line,
    ".png": _png,
}


def half_written(folder: Path, *, ignore: Callable[[Path], bool] = lambda _: False) -> list[str]:
    """Return the files that exist and cannot be read to their end."""
    broken = []
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not temporary(path) and not ignore(path) and path.suffix in READERS:
            try:
                READERS[path.suffix](path)
            except Exception as error:
                broken.append(f"{path.relative_to(folder)}: {type(error).__name__}: {error}"[:300])
    return broken


def leftovers(folder: Path) -> list[str]:
    """Return the temporary files of writes that were interrupted; a lock ends with its process, so its file is none."""
    found = sorted(path for path in folder.rglob("*") if path.is_file() and temporary(path))
    return [str(path.relative_to(folder)) for path in found if path.name != ".lock"]


def results(folder: Path) -> dict[str, Any]:
    """Return what a run folder says: the bytes of tables and weights, and every value of its JSON and CSV files."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if not path.is_file() or temporary(path):
            continue
        if path.suffix in (".parquet", ".safetensors") or path.name == "module_state.pkl":  # that of RLlib's networks
            found[name] = path.read_bytes()
        elif path.suffix == ".json":
            flatten(json.loads(path.read_text(encoding="utf-8")), name, found)
        elif path.suffix == ".csv":
            rows = [line.split(",") for line in path.read_text().splitlines()]
            for number, row in enumerate(rows):
                found |= {f"{name}:{number}:{rows[0][i]}": cell for i, cell in enumerate(row)}
    return found


def flatten(value: Any, name: str, found: dict[str, Any]) -> None:
    """Add the leaves of a JSON value to ``found``."""
    if isinstance(value, dict):
        for key, inner in value.items():
            flatten(inner, f"{name}:{key}", found)
    elif isinstance(value, list):
        found[name] = json.dumps(value)
    else:
        found[name] = value


def differences(one: dict[str, Any], other: dict[str, Any]) -> set[str]:
    """Return the names of results that differ or that only one has."""
    return {name for name in one.keys() | other.keys() if one.get(name) != other.get(name) or name not in one}
