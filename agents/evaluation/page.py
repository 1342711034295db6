"""The agents page: all sections, written from the result files of a folder."""

from __future__ import annotations

from pathlib import Path

from agents.evaluation import prune_report
from agents.evaluation.choose import write_choices
from agents.evaluation.cluster_report import cluster_context
from agents.evaluation.prune_report import prune_context
from agents.evaluation.roles_report import roles_context
from agents.evaluation.serve_report import serve_context
from agents.evaluation.tables import read_if_there
from sim.pages.render import render
from sim.paths import RESULTS
from sim.results.run_folder import write_text

FOLDER = RESULTS / "agents"
TEMPLATE = Path(__file__).parent / "templates" / "index.md.j2"


NEEDED = {
    "prune": ("dense", prune_report.REFERENCE, "knapsack", "oracle"),
    "serve": ("dense",),
    "cluster": ("dense",),
    "roles": ("by_load",),
}
"""The policies that each section of the page compares others with."""


def is_complete(folder: Path) -> bool:
    """Return whether a folder has the results of prune, and in each task the policies that others are compared with."""
    frames = {name: read_if_there(folder / f"{name}.parquet") for name in NEEDED}
    return frames["prune"] is not None and all(
        frame is None or set(NEEDED[name]) <= set(frame["policy"].unique()) for name, frame in frames.items()
    )


def page(folder: Path = FOLDER) -> str:
    """Return the page, in Markdown; write its plots into the folder."""
    contexts = {
        "prune": prune_context(folder),
        "serve": serve_context(folder),
        "cluster": cluster_context(folder),
        "roles": roles_context(folder),
    }
    return render(TEMPLATE, **contexts)


def write_report(folder: Path = FOLDER) -> Path:
    """Write the pages and their plots next to the result files; return the path of the first."""
    write_text(folder / "index.md", page(folder))
    write_choices(folder)
    return folder / "index.md"
