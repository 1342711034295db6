"""The notebooks of docs/examples run from the first cell to the last, and are committed without outputs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from sim.paths import REPOSITORY

EXAMPLES = REPOSITORY / "docs" / "examples"
NOTEBOOKS = sorted(path.name for path in EXAMPLES.glob("*.ipynb"))
LONG, SHORT = '"--steps", "80000"', '"--steps", "8192"'
"""How long the notebook trains, and how long it does here: whether that helps, tests/agents/test_examples.py says."""


def test_there_are_notebooks() -> None:
    assert NOTEBOOKS == ["quickstart.ipynb", "train_a_policy.ipynb"]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_runs(name: str, tmp_path: Path) -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    folder = tmp_path / "examples"
    shutil.copytree(EXAMPLES, folder)
    notebook = nbformat.read(folder / name, as_version=4)
    if name == "train_a_policy.ipynb":
        cell = next(cell for cell in notebook.cells if LONG in cell.source)
        cell.source = cell.source.replace(LONG, SHORT)
    nbclient.NotebookClient(notebook, timeout=400, resources={"metadata": {"path": str(folder)}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert any("learned_serve" in str(output) or "greedy_stop" in str(output) for output in outputs)
    if name == "quickstart.ipynb":
        assert any("image/png" in output.get("data", {}) for output in outputs)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_is_committed_without_outputs(name: str) -> None:
    cells = json.loads((EXAMPLES / name).read_text(encoding="utf-8"))["cells"]
    assert all(not cell.get("outputs") and cell.get("execution_count") is None for cell in cells)
