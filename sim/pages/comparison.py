"""What the two simulation pages share: committed comparisons, how to make one again, and how to read and show it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig

from sim.atomic import write_whole
from sim.errors import ConfigError, nearest
from sim.pages.render import commit_of, table
from sim.progress import VARIABLE as PROGRESS
from sim.progress import progress
from sim.results.report import SUMMARY_COLUMNS, Columns, cells
from sim.results.run_folder import write_json, write_text

COUNTS = ("requests", "finished", "rejected", "unfinished")


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """A committed comparison: its command behind ``python -m``, its columns, other figures to keep, has it a plot."""

    command: str
    columns: Columns = field(default_factory=lambda: SUMMARY_COLUMNS)
    keep: tuple[str, ...] = COUNTS
    plot: bool = False


def replay(name: str, comparison: Comparison, workers: int, folder: Path) -> None:
    """Run one comparison; leave NAME.json, and NAME.png if it has a plot, in a folder.

    Raises:
        ConfigError: if the command fails.
    """
    run = folder / "run" / name
    command = [sys.executable, "-m", *comparison.command.split(), f"workers={workers}", f"hydra.run.dir={run}"]
    quiet = {**os.environ, PROGRESS: "0"}  # stderr then holds warnings, and last the error
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=quiet)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise ConfigError(f"python -m {comparison.command} failed: {reason}")
    write_json(folder / f"{name}.json", figures_of(comparison, run))
    if comparison.plot:
        _shrink(run / "compare.png", folder / f"{name}.png")


def figures_of(comparison: Comparison, run: Path) -> dict[str, Any]:
    """Return what the page needs from a run folder."""
    if (run / "compare.json").is_file():
        content: dict[str, Any] = json.loads((run / "compare.json").read_text(encoding="utf-8"))
    else:  # one run, without variants
        made_by, summary = (json.loads((run / f"{name}.json").read_text("utf-8")) for name in ("provenance", "summary"))
        content = {
            "provenance": made_by,
            "title": "",
            "cases": [f"seed {made_by['seed']}"],
            "summaries": {"run": [summary]},
        }
    content["provenance"]["command"] = f"python -m {comparison.command}"  # workers and folder change no figure
    kept = {key.split(".")[0] for key, *_ in comparison.columns.values()} | set(comparison.keep)
    content["summaries"] = {
        label: [{key: value for key, value in summary.items() if key in kept} for summary in row]
        for label, row in content["summaries"].items()
    }
    return content


def _shrink(source: Path, target: Path) -> None:
    """Store a plot with 128 colors, a third of the bytes."""
    from PIL import Image  # a dependency of matplotlib

    with Image.open(source) as image:
        small = image.convert("RGB").quantize(128, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
        write_whole(target, lambda part: small.save(part, format="png", optimize=True))


def read(folder: Path, name: str, program: str) -> dict[str, Any]:
    """Read a committed comparison.

    Raises:
        ConfigError: if it is missing, with the command that makes it.
    """
    path = folder / f"{name}.json"
    if not path.is_file():
        raise ConfigError(f"{path} is missing; make it with python -m {program} measure=true only='[{name}]'")
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def means(content: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Return label -> dotted name of a figure -> its mean over replays."""
    flat = {label: pd.json_normalize(list(row)) for label, row in content["summaries"].items()}
    return {label: {str(k): float(v) for k, v in f.mean(numeric_only=True).items()} for label, f in flat.items()}


def wins(content: Mapping[str, Any], ours: str, theirs: str, *, ties: bool = False) -> str:
    """Return in how many replays one row has the higher SLO attainment, or with ``ties`` not the lower: ``4 of 5``."""
    rows = content["summaries"]
    pairs = [(a["slo_attainment"], b["slo_attainment"]) for a, b in zip(rows[ours], rows[theirs], strict=True)]
    return f"{sum(a > b or (ties and a == b) for a, b in pairs)} of {len(pairs)}"


def shown(content: Mapping[str, Any], columns: Columns = SUMMARY_COLUMNS, first: str = "policy") -> dict[str, Any]:
    """Return what a template shows of a comparison: its table, and where it came from.

    Columns with one value in all rows leave the table; ``same`` lists them.
    """
    made, cases = content["provenance"], content["cases"]
    frame = pd.DataFrame({label: cells(row, columns) for label, row in content["summaries"].items()}).T
    frame.columns = pd.Index(columns)
    same = [heading for heading in frame if frame[heading].nunique() == 1]
    return {
        "command": made["command"],
        "title": content["title"].partition(":")[0],
        "cases": f"{cases[0]} to {cases[-1].split()[-1]}, {len(cases)} replays" if len(cases) > 1 else cases[0],
        "date": made["written_at"][:10],
        "commit": commit_of(made),
        "machine": made["machine"],
        "table": table(frame.drop(columns=same).rename_axis(first).reset_index()),
        "same": {heading: frame[heading].iloc[0] for heading in same},
    }


@dataclass(kw_only=True)
class ResultsConfig:
    """What to write.

    measure: repeat the comparisons first; without it, the page is made from the committed figures.
    only: comparisons to repeat; all when empty. workers: processes.
    """

    measure: bool = False
    only: list[str] = field(default_factory=list)
    workers: int = 2


ConfigStore.instance().store(name="results_schema", node=ResultsConfig)
ConfigStore.instance().store(name="cluster_results_schema", node=ResultsConfig)


def write_page(cfg: DictConfig, comparisons: Mapping[str, Comparison], folder: Path, page: Callable[[], str]) -> None:
    """Repeat comparisons if ``cfg.measure`` says so, then write FOLDER/index.md.

    Raises:
        ConfigError: for an unknown comparison, with the nearest name.
    """
    for name in cfg.only:
        if name not in comparisons:
            raise ConfigError(f"only: there is no result {name!r}; {nearest(name, comparisons)}")
    if cfg.measure:
        measure(list(cfg.only) or list(comparisons), comparisons, folder, cfg.workers)
    target = folder / "index.md"
    write_text(target, page())
    print(f"written: {target}")


def measure(names: Sequence[str], comparisons: Mapping[str, Comparison], folder: Path, workers: int) -> None:
    """Repeat comparisons and keep their figures and plots."""
    with tempfile.TemporaryDirectory() as temporary:
        with progress("replaying", len(names), "comparisons") as report:
            for done, name in enumerate(names):
                report(done, name)
                replay(name, comparisons[name], workers, Path(temporary))
                print(f"replayed {name}", flush=True)
        # Copied at the end: a changed file would mark the commit of the next replay as dirty.
        for path in sorted(Path(temporary).glob("*.*")):
            write_whole(folder / path.name, partial(shutil.copyfile, path))
