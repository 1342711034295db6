"""What all tests share: one thread, a skip where data is missing, and how parallel workers divide the tests."""

from __future__ import annotations

import os

# Before NumPy and torch are imported: they read it once. Two workers with two threads each stall on two cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Before triton is imported, for the same reason: without a GPU, kernels run in its interpreter.
if not any(os.path.exists(gpu) for gpu in ("/dev/nvidiactl", "/dev/dxg")):  # noqa: PTH110
    os.environ.setdefault("TRITON_INTERPRET", "1")

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from hydra._internal.hydra import Hydra
from hypothesis import settings

from sim.paths import DATA_VARIABLE, REPOSITORY, data_dir
from tests.sample import EXAMPLES

# No time limit per example: a first call compiles, and machines are shared.
settings.register_profile("rap-lab", deadline=None, max_examples=EXAMPLES)
settings.register_profile("thorough", deadline=None, max_examples=5 * EXAMPLES)  # make test-slow
settings.load_profile("rap-lab")


def pytest_sessionstart(session: pytest.Session) -> None:
    """Compile the kernels once before parallel workers start, or each of them would compile the same functions."""
    config = session.config
    if config.getoption("numprocesses", None) and not hasattr(config, "workerinput"):
        command = [sys.executable, "-m", "tests.warm_up"]
        subprocess.run(command, cwd=REPOSITORY, check=False)  # a failure here fails again in the tests, with its cause


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Divide the tests by group, with ``--dist loadgroup``."""
    from tests.workers import GroupScheduling

    return GroupScheduling(config, log) if config.getoption("dist") == "loadgroup" else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Put the long files first, in a parallel worker."""
    if hasattr(config, "workerinput"):
        from tests.workers import rank

        items.sort(key=lambda item: rank(item.path.relative_to(REPOSITORY).as_posix()))


@pytest.fixture
def ray_address() -> Iterator[str]:
    """Start a Ray cluster of two nodes with one CPU each and return its address."""
    ray = pytest.importorskip("ray", reason="the cluster of this test is Ray's: pip install -e '.[agents]'")
    ray.shutdown()  # what tests of training have joined
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    cluster.add_node(num_cpus=1)
    yield cluster.address
    cluster.shutdown()


@pytest.fixture(scope="session")
def data() -> Path:
    """Return the folder of shared data; skip the test where there is none."""
    folder = data_dir()
    if not (folder / "traces").is_dir():
        pytest.skip(
            f"no request traces at {folder}; set {DATA_VARIABLE} to a folder that holds traces/ and calibration/"
        )
    return folder


@pytest.fixture(scope="session", autouse=True)
def handlers_stay_open() -> Iterator[None]:
    """Let a command that runs inside a test leave the logging handlers open.

    Hydra sets up logging, which closes the handlers that exist, and with them the stderr of a test: absl's handler,
    which Ray and RLlib make, closes the stream that it was made with.
    """
    with patch("logging.config._clearExistingHandlers"):
        yield


@pytest.fixture(scope="session", autouse=True)
def no_composition_for_the_mode_alone() -> Iterator[None]:
    """Let a command compose its configuration once less, a quarter of its time.

    Hydra composes it also to read ``hydra.mode``, which nothing in conf/ sets.
    """
    known = Hydra.get_mode

    def mode(self: Hydra, config_name: str | None, overrides: list[str]) -> Any:
        return known(self, config_name, overrides) if any("hydra.mode" in text for text in overrides) else None

    with patch.object(Hydra, "get_mode", mode):
        yield


@dataclass
class Shown:
    """A task whose progress was shown: its name, its size, and the last amount that it reported."""

    what: str
    total: float
    done: float = 0.0


@pytest.fixture
def shown_progress(monkeypatch: pytest.MonkeyPatch) -> list[Shown]:
    """Return a list that gets every task whose progress is shown during the test."""
    tasks: list[Shown] = []

    @contextmanager
    def record(what: str, total: float, unit: str, stream: object, begun: float) -> Iterator[Callable[..., None]]:
        tasks.append(task := Shown(what, total))

        def report(done: float, note: str = "") -> None:
            task.done = done

        yield report

    monkeypatch.setattr("sim.progress._lines", record)
    return tasks
