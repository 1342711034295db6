"""Run folders: whole files or none, and everything needed to run again."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sim.paths import REPOSITORY

if TYPE_CHECKING:
    import pandas as pd

PACKAGES = ("rap-lab", "numpy", "scipy", "numba", "pandas", "pyarrow", "simpy", "hydra-core")


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Make ``path`` appear complete or not at all: ``write`` fills a file beside it, which then takes its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    os.close(handle)
    part = Path(name)
    try:
        write(part)
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        part.chmod(0o644)
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    write_whole(path, lambda part: part.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file, whole or not at all; a NaN becomes an error, not invalid JSON."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def write_parquet(path: Path, frame: pd.DataFrame) -> None:
    """Write a Parquet file, whole or not at all; equal frames give equal bytes."""
    write_whole(path, lambda part: frame.to_parquet(part, index=False))


def commit() -> str:
    """Return the checked-out commit, ``-dirty`` behind it when the work tree differs, or ``unknown``."""
    try:
        run = ["git", "-C", str(REPOSITORY), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        return subprocess.run(run, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def _module() -> str:
    """Return the module that was started, as ``python -m`` takes it."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return spec.name.removesuffix(".__main__") if spec is not None else Path(sys.argv[0]).name


def provenance(seed: int) -> dict[str, Any]:
    """Return what else is needed to run again: command, commit, seed, versions, machine, date."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "command": " ".join(["python", "-m", _module(), *sys.argv[1:]]),
        "commit": commit(),
        "seed": seed,
        "python": platform.python_version(),
        "versions": versions,
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "written_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }
