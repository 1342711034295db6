"""Options of installed packages: the example of the documentation, and packages that are broken."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import sim.compare
import sim.replay.__main__
from sim.config import build_option, compose_config, option_names, option_path
from sim.config.options import known_folders
from sim.console.completion import complete
from sim.plugins import ENTRY_POINTS, plugin_folders
from tests.commands import exit_status

EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "own_policy"
QUICK = ("trace=poisson", "trace.duration_s=3")

Install = Callable[[str, dict[str, str]], Path]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Return a function that states entry points of a package, as an installer would; it returns where packages lie."""
    monkeypatch.chdir(tmp_path)
    site = tmp_path / "site packages"
    site.mkdir()
    monkeypatch.syspath_prepend(str(site))

    def install(name: str, entries: dict[str, str]) -> Path:
        info = site / f"{name}-0.1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.1.0\n")
        lines = [f"{key} = {value}" for key, value in entries.items()]
        (info / "entry_points.txt").write_text("\n".join([f"[{ENTRY_POINTS}]", *lines, ""]))
        plugin_folders.cache_clear()
        return site

    yield install
    plugin_folders.cache_clear()
    for module in [one for one in sys.modules if one.partition(".")[0] in ("own_policy", "breaks_of_test")]:
        del sys.modules[module]


@pytest.fixture
def example(install: Install) -> Path:
    """Install the example and return the folder that it lies in."""
    project = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())["project"]
    site = install("own_policy", project["entry-points"][ENTRY_POINTS])
    shutil.copytree(EXAMPLE / "own_policy", site / "own_policy")
    return site


@pytest.mark.usefixtures("example")
def test_every_command_knows_the_options_of_an_installed_package(capsys: pytest.CaptureFixture[str]) -> None:
    replay = sim.replay.__main__.main
    assert "drop_when_busy" in option_names("policy", known_folders())
    assert exit_status(replay, "policy=drop_when_busy", "policy.limit=5", "hydra.run.dir=run", *QUICK) == 0
    assert "limit: 5" in Path("run/config.yaml").read_text()
    assert exit_status(replay, "policy=drop_when_busy", "policy.limit=many") == 2
    assert "policy.limit is 'many'; it must be a" in capsys.readouterr().err
    assert exit_status(replay, "policy=drop_when_bsy") == 2
    assert "did you mean 'drop_when_busy'" in capsys.readouterr().err
    assert exit_status(replay, "--help") == 0
    assert "drop_when_busy" in capsys.readouterr().out
    assert exit_status(sim.compare.compare_command, "+policies.x={policy: drop_when_busy}", "only=[x]", *QUICK) == 0
    assert "| x |" in capsys.readouterr().out
    assert complete("rap replay policy=drop_when") == ["policy=drop_when_busy"]
    assert "policy.limit=" in complete("rap replay policy=drop_when_busy policy.")


@pytest.mark.usefixtures("example")
def test_installed_options_and_folders_of_the_command_line_work_together(tmp_path: Path) -> None:
    (tmp_path / "mine" / "trace").mkdir(parents=True)
    shutil.copy(option_path("trace", "poisson"), tmp_path / "mine" / "trace" / "mine.yaml")
    for at, how in enumerate((["--config-dir", "mine"], ["hydra.searchpath=[mine]"])):
        folder = f"hydra.run.dir=run{at}"
        arguments = ("trace=mine", "trace.duration_s=3", "policy=drop_when_busy", folder, *how)
        assert exit_status(sim.replay.__main__.main, *arguments) == 0
    sweep = ("--multirun", "policy=drop_when_busy", "policy.limit=1,2", "hydra.sweep.dir=sweep", *QUICK)
    assert exit_status(sim.replay.__main__.main, *sweep) == 0
    assert (tmp_path / "sweep" / "table.md").read_text().count("drop_when_busy") >= 2


@pytest.mark.usefixtures("example")
def test_the_first_option_of_a_name_is_that_of_conf(example: Path) -> None:
    (example / "own_policy" / "options" / "policy" / "dense.yaml").write_text("_target_: nothing.at_all\n")
    assert "nothing" not in str(compose_config("replay", ["policy=dense"]).policy)
    build_option("policy", "dense")


@pytest.mark.parametrize(
    ("files", "value", "said"),
    [
        ({}, "not_there_of_test.options", "No module named 'not_there_of_test'"),
        ({"breaks_of_test/__init__.py": "1 / 0"}, "breaks_of_test.options", "ZeroDivisionError: division by zero"),
        (
            {"breaks_of_test/__init__.py": "print('hello'); raise SystemExit('bye')"},
            "breaks_of_test.options",
            "SystemExit: bye",
        ),
        ({"breaks_of_test.py": ""}, "breaks_of_test", "breaks_of_test is not a package"),
        ({}, "breaks_of_test:f(", "breaks_of_test:f( is not a package"),
    ],
)
def test_a_broken_package_is_left_out_with_one_line(
    install: Install, files: dict[str, str], value: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    site = install("broken", {"mine": value})
    for name, text in files.items():
        (site / name).parent.mkdir(exist_ok=True)
        (site / name).write_text(text)
    assert exit_status(sim.replay.__main__.main, *QUICK, "hydra.run.dir=run") == 0
    error = capsys.readouterr().err
    assert f"warning: the entry point mine = {value} of broken" in error
    assert said in error
    assert error.count("warning: ") == 1


def test_the_test_of_the_example_passes(example: Path) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(example), str(EXAMPLE.parents[2])])}
    plugin = ["-p", "sim.pytest_plugin"] if not _installed() else []
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *plugin, str(EXAMPLE)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def _installed() -> bool:
    from importlib.metadata import entry_points

    return any(point.value == "sim.pytest_plugin" for point in entry_points(group="pytest11"))
