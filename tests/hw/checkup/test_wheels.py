"""The packages that a bare machine lacks: pinned as in constraints.txt, and needed."""

from __future__ import annotations

from pathlib import Path

import pytest

from hw.checkup.wheels import BUILT, NEEDED, WITH_NEEDS, command_for, constraints, main
from sim.paths import REPOSITORY
from tests.commands import exit_status

PINS = constraints(REPOSITORY / "constraints.txt") | BUILT


def test_the_versions_are_those_of_the_constraints() -> None:
    assert PINS["hydra-core"] == "1.3.8"
    command = command_for("hydra-core", PINS, Path("w"), "3.12")
    assert command[-1] == "hydra-core==1.3.8"
    assert "--no-deps" in command
    assert "--python-version=3.12" in command


def test_what_has_no_wheel_is_built_and_pydantic_comes_with_its_own_core() -> None:
    assert "wheel" in command_for("antlr4-python3-runtime", PINS, Path("w"), "3.12")
    assert "--no-deps" not in command_for(WITH_NEEDS[0], PINS, Path("w"), "3.12")


def test_every_package_is_one_that_the_project_or_its_packages_need() -> None:
    text = (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")
    assert [name for name in NEEDED if f'"{name}' not in text] == ["antlr4-python3-runtime", "click"]


def test_a_python_that_is_none_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_status(main, "python=three", f"folder={tmp_path}") == 2
    assert "such as 3.12" in capsys.readouterr().err
