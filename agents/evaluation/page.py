"""The agents page: all sections, written from the result files of a folder."""

from __future__ import annotations

from pathlib import Path

from agents.evaluation.cluster_report import cluster_context
from agents.evaluation.prune_report import prune_context
from agents.evaluation.serve_report import serve_context
from sim.pages.render import render
from sim.paths import RESULTS
from sim.results.run_folder import write_text

FOLDER = RESULTS / "agents"
TEMPLATE = Path(__file__).parent / "templates" / "index.md.j2"


def page(folder: Path = FOLDER) -> str:
    """Return the page, in Markdown; write its plots into the folder."""
    contexts = {"prune": prune_context(folder), "serve": serve_context(folder), "cluster": cluster_context(folder)}
    return render(TEMPLATE, **contexts)


def write_report(folder: Path = FOLDER) -> Path:
    """Write the page and its plots next to the result files; return its path."""
    write_text(folder / "index.md", page(folder))
    return folder / "index.md"
