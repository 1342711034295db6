"""What a wheel holds: the type marker of every package, and every file that the code reads."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from sim.paths import REPOSITORY

DATA = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]


@pytest.mark.parametrize("package", ["sim", "hw", "agents", "conf"])
def test_every_file_of_a_package_is_shipped(package: str) -> None:
    folder = REPOSITORY / package
    assert (folder / "py.typed").is_file()
    shipped = {path for pattern in DATA[package] for path in folder.glob(pattern)}
    others = {path for path in folder.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    caches = {path for path in others if "__pycache__" in path.parts}
    assert {path.relative_to(folder) for path in others - caches - shipped} == set[Path]()
