"""Run folders: files that are complete or absent, and everything needed to run again."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from sim.atomic import write_whole
from sim.config.failures import SPACE
from sim.paths import REPOSITORY

if TYPE_CHECKING:
    import pandas as pd

PACKAGES = ("rap-lab", "numpy", "scipy", "numba", "pandas", "pyarrow", "simpy", "hydra-core")


def write_text(path: Path, text: str) -> None:
    """Write a text file."""
    write_whole(path, lambda part: part.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file; a NaN is an error, not invalid JSON."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def write_parquet(path: Path, frame: pd.DataFrame) -> None:
    """Write a Parquet file; equal frames give equal bytes."""
    write_whole(path, lambda part: frame.to_parquet(part, index=False))


def begin_run(folder: Path, cfg: DictConfig, made_by: Mapping[str, Any]) -> None:
    """Write configuration and provenance before a run, so that a killed one leaves what it was.

    Such a folder is not complete: a run writes its summary last. A full disk does not stop the run, whose figures can
    still be printed: ``write_begun`` after it says what is wrong.
    """
    try:
        write_begun(folder, cfg, made_by)
    except OSError as error:
        if error.errno not in SPACE:
            raise


def write_begun(folder: Path, cfg: DictConfig, made_by: Mapping[str, Any]) -> None:
    """Write config.yaml and provenance.json."""
    write_text(folder / "config.yaml", OmegaConf.to_yaml(cfg, resolve=True))
    write_json(folder / "provenance.json", made_by)


def own_folder(command: str) -> Path:
    """Return the path of a new folder under ``runs/`` for what a command writes."""
    return Path("runs") / datetime.now().strftime(f"%Y-%m-%d/%H-%M-%S-%f_{command}")


def commit() -> str:
    """Return the checked-out commit, with ``-dirty`` appended when the work tree differs, or ``unknown``."""
    try:
        run = ["git", "-C", str(REPOSITORY), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        return subprocess.run(run, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def _module() -> str:
    """Return the name of the module that ``python -m`` started, also in the processes of a sweep."""
    if HydraConfig.initialized():
        return str(HydraConfig.get().help.app_name)
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return spec.name.removesuffix(".__main__") if spec is not None else Path(sys.argv[0]).name


def provenance(seed: int) -> dict[str, Any]:
    """Return what is needed to run again besides the configuration: command, commit, seed, versions, machine, date.

    ``overrides`` are those of this job, where the command is that of a whole sweep.
    """
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "command": " ".join(["python", "-m", _module(), *sys.argv[1:]]),
        "overrides": [str(text) for text in HydraConfig.get().overrides.task] if HydraConfig.initialized() else [],
        "commit": commit(),
        "seed": seed,
        "python": platform.python_version(),
        "versions": versions,
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "written_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }
