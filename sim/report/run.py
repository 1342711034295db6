"""``python -m sim.report RUN [RUN ...]``: one HTML file, and a timeline for Perfetto, from run folders."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig

from sim.config import run_command
from sim.errors import ConfigError
from sim.progress import progress
from sim.report.page import page
from sim.report.run_data import read_runs, run_folders
from sim.report.timeline import output_path, write_timeline
from sim.results.run_folder import own_folder, provenance, write_text


@dataclass(kw_only=True)
class ReportConfig:
    """Which runs to show, and where to write.

    runs: run folders, or folders that hold some: of a sweep or of sim.compare.
    out: the HTML file; null takes report.html in the folder of the run, or of several runs in a new folder under runs/.
    html: whether to write it.
    chrome_trace: also write this timeline for ui.perfetto.dev or chrome://tracing; compressed if it ends with .gz.
    """

    runs: list[str] = field(default_factory=list)
    out: str | None = None
    html: bool = True
    chrome_trace: str | None = None


ConfigStore.instance().store(name="report_schema", node=ReportConfig)


def main() -> None:
    """Run the command."""
    run_command(_report, "report", positional="runs")


def _report(cfg: DictConfig) -> None:
    out, timeline = _outputs(cfg)
    if cfg.html:
        import_module("plotly.offline")  # before the work: the extra `report` may be missing
    named = [Path(folder) for folder in cfg.runs]
    folders = run_folders(named)
    with progress("reading", len(folders), "runs"):
        runs = read_runs(folders)
    if cfg.html:
        path = out or (named[0] if len(folders) == 1 else own_folder("report")) / "report.html"
        text = page(runs, provenance(0))
        write_text(path, text)
        print(f"{path}: {len(runs)} run{'s' if len(runs) > 1 else ''}, {len(text.encode()) / 1e6:.1f} MB")
    if timeline is not None:
        write_timeline(timeline, runs)


def _outputs(cfg: DictConfig) -> tuple[Path | None, Path | None]:
    """Return the paths of the HTML file and of the timeline.

    Raises:
        ConfigError: if nothing is to be written, or a path is a folder.
    """
    if not cfg.html and cfg.chrome_trace is None:
        raise ConfigError("html=false leaves nothing to write; set chrome_trace=FILE.json")
    return output_path(cfg, "out", "report.html"), output_path(cfg, "chrome_trace", "timeline.json")
