"""``python -m sim.trace RUN [RUN ...]``: a timeline for Perfetto or chrome://tracing from run folders. No Plotly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig

from sim.config import run_command
from sim.errors import ConfigError
from sim.progress import progress
from sim.report.chrome_trace import write_chrome_trace
from sim.report.run_data import RunData, read_runs, run_folders
from sim.results.run_folder import own_folder

NAME = "timeline.json.gz"


@dataclass(kw_only=True)
class TimelineConfig:
    """Which runs to show, and where to write.

    runs: run folders, or folders that hold some: of a sweep or of sim.compare.
    out: the JSON file, compressed if it ends with .gz; null takes timeline.json.gz in the folder of the run, or of
        several runs in a new folder under runs/.
    """

    runs: list[str] = field(default_factory=list)
    out: str | None = None


ConfigStore.instance().store(name="timeline_schema", node=TimelineConfig)


def main() -> None:
    """Run the command."""
    run_command(_timeline, "timeline", positional="runs")


def _timeline(cfg: DictConfig) -> None:
    out = output_path(cfg, "out", NAME)
    if not cfg.runs:
        raise ConfigError("runs is empty; give one or more run folders: python -m sim.trace RUN [RUN ...]")
    named = [Path(folder) for folder in cfg.runs]
    folders = run_folders(named)
    with progress("reading", len(folders), "runs"):
        runs = read_runs(folders)
    write_timeline(out or (named[0] if len(folders) == 1 else own_folder("trace")) / NAME, runs)


def output_path(cfg: DictConfig, key: str, example: str) -> Path | None:
    """Return the file that a key names; None if it names none.

    Raises:
        ConfigError: if it is a folder; ``example`` names a file in it.
    """
    path = None if cfg[key] is None else Path(cfg[key])
    if path is not None and (not path.name or path.is_dir()):
        raise ConfigError(f"{key} is {cfg[key]}, a folder; name a file, such as {key}={path / example}")
    return path


def write_timeline(path: Path, runs: Sequence[RunData]) -> None:
    """Write the timeline of runs and say what it holds."""
    events = write_chrome_trace(path, runs)
    size = path.stat().st_size / 1e6
    print(f"{path}: {events:,} events, {size:.1f} MB; open it in ui.perfetto.dev or chrome://tracing")
