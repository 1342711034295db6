"""The architecture, read from the code: who may import whom."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from sim.data import REPOSITORY

FORBIDDEN = {
    "sim": {"hw", "agents", "torch", "transformers", "ray", "gymnasium", "tests"},
    "hw": {"agents", "ray", "gymnasium", "tests"},
    "agents": {"hw", "tests"},
    "conf": {"sim", "hw", "agents", "tests"},
}


def imported_packages(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: write absolute imports"
            names.add((node.module or "").split(".")[0])
    return names


@pytest.mark.parametrize("package", FORBIDDEN)
def test_no_package_imports_what_the_architecture_forbids(package: str) -> None:
    wrong = {
        path.relative_to(REPOSITORY).as_posix(): sorted(found)
        for path in (REPOSITORY / package).rglob("*.py")
        if (found := imported_packages(path) & FORBIDDEN[package])
    }
    assert wrong == {}


def test_the_top_level_holds_the_five_source_folders_and_no_other() -> None:
    folders = {path.parent.name for path in REPOSITORY.glob("*/*.py")}
    assert folders == {"sim", "hw", "agents", "conf", "tests"}
