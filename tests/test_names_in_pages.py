"""Every test and every file of the repository that a page names exists."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from sim.paths import REPOSITORY

PAGES = sorted(
    path.relative_to(REPOSITORY).as_posix()
    for path in (*(REPOSITORY / "docs").rglob("*.md"), *REPOSITORY.glob("*.md"))
    if path.name != "CHANGELOG.md"  # it names what was, too
)
WRITTEN = ("docs/results/agents/claim.json", "conf/rules")
"""What a command writes, and is not there before."""
FOLDERS = ("sim", "hw", "agents", "conf", "tests", "docs")


@cache
def names_of_tests() -> frozenset[str]:
    """Return the names of all test functions, and of the files with tests."""
    names: set[str] = set()
    for path in (*(REPOSITORY / "tests").rglob("*.py"), *(REPOSITORY / "docs" / "examples").rglob("test_*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names |= {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)} | {path.name, path.stem}
    return frozenset(names)


@pytest.mark.parametrize("page", PAGES)
def test_a_page_names_tests_and_files_that_exist(page: str) -> None:
    text = (REPOSITORY / page).read_text(encoding="utf-8")
    named = set(re.findall(r"\b(test_\w+(?:\.py)?)\b", " ".join(re.findall(r"`([^`\n]+)`", text))))
    assert named - names_of_tests() == set()
    paths = re.findall(rf"`((?:{'|'.join(FOLDERS)})/[\w./-]*)`", text)
    paths = [path for path in paths if not re.search("[A-Z]{3}", path)]  # NAME stands for the reader's own name
    assert [path for path in paths if path not in WRITTEN and not Path(REPOSITORY, path).exists()] == []
