"""What a wheel holds, and that the source archive and the wheel build, install and run."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from sim.paths import REPOSITORY

PYPROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
PROJECT, DATA = PYPROJECT["project"], PYPROJECT["tool"]["setuptools"]["package-data"]


@pytest.mark.parametrize("package", ["sim", "hw", "agents", "conf"])
def test_every_file_of_a_package_is_shipped(package: str) -> None:
    folder = REPOSITORY / package
    assert (folder / "py.typed").is_file()
    shipped = {path for pattern in DATA[package] for path in folder.glob(pattern)}
    others = {path for path in folder.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    caches = {path for path in others if "__pycache__" in path.parts}
    assert {path.relative_to(folder) for path in others - caches - shipped} == set[Path]()


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the source archive, and the wheel from it; return the folder of both."""
    folder = tmp_path_factory.mktemp("built")
    source = folder / "source"
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    for name in listed.stdout.split("\0"):
        if name and (REPOSITORY / name).is_file() and name.partition("/")[0] not in ("docs", "tests"):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(REPOSITORY / name, source / name)
    _build("sdist", source, folder)
    with tarfile.open(next(folder.glob("*.tar.gz"))) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    _build("wheel", next((folder / "unpacked").iterdir()), folder)
    return folder


def _build(kind: str, source: Path, folder: Path) -> None:
    code = f"from setuptools import build_meta; build_meta.build_{kind}({str(folder)!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def rap(built: Path) -> Callable[..., str]:
    """Install the wheel into a folder of its own; return a function that runs its ``rap`` there."""
    site, wheel = built / "site", next(built.glob("*.whl"))
    assert wheel.name.startswith(f"rap_lab-{PROJECT['version']}-")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-compile"]
    subprocess.run([*pip, "--target", str(site), str(wheel)], check=True, capture_output=True)
    environment = {key: value for key, value in os.environ.items() if key != "RAP_LAB_DATA"} | {"PYTHONPATH": str(site)}

    def run(*arguments: str) -> str:
        command = [sys.executable, str(site / "bin" / "rap"), *arguments]
        done = subprocess.run(command, cwd=built, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def test_the_wheel_of_the_source_archive_installs_and_knows_its_options(rap: Callable[..., str]) -> None:
    assert rap("--version") == f"rap-lab {PROJECT['version']}\n"
    assert "learned_serve_llama2" in rap("replay", "policy=learned_serve", "--cfg", "job")


@pytest.mark.slow  # it compiles the simulator
def test_the_wheel_of_the_source_archive_replays(rap: Callable[..., str], tmp_path: Path) -> None:
    learned = ("policy=learned_serve", "latency=llama2_7b_a100_trtllm")
    rap("replay", "trace.duration_s=5", *learned, f"hydra.run.dir={tmp_path / 'run'}")
    made = json.loads((tmp_path / "run" / "provenance.json").read_text(encoding="utf-8"))
    assert (tmp_path / "run" / "summary.json").is_file()
    assert str(REPOSITORY) not in json.dumps(made)


def test_the_change_log_and_the_citation_state_the_version() -> None:
    version = PROJECT["version"]
    assert re.search(rf"^## {re.escape(version)}\b", (REPOSITORY / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert f"\nversion: {version}\n" in (REPOSITORY / "CITATION.cff").read_text()


def test_every_file_that_the_container_copies_is_there() -> None:
    lines = (REPOSITORY / "Dockerfile").read_text().splitlines()
    copied = [name for line in lines if line.startswith("COPY ") for name in line.split()[1:-1]]
    assert {name for name in copied if not (REPOSITORY / name).exists()} == set()
    assert {"sim", "hw", "agents", "conf", "pyproject.toml"} <= set(copied)
    sent = {line.strip("!./") for line in (REPOSITORY / ".dockerignore").read_text().splitlines() if line[:1] == "!"}
    assert sent == {name.removeprefix("./") for name in copied}
