"""Parallel workers: what the tests of a file share is made once."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("xdist", reason="only parallel workers divide the tests: pip install -e '.[dev]'")

from sim.paths import REPOSITORY
from tests.conftest import pytest_xdist_make_scheduler
from tests.workers import LONG_FILES, RAY_FIXTURES, RAY_GROUP, group_of


class Worker:
    """A worker that only remembers what it is sent."""

    shutting_down = False
    gateway = SimpleNamespace(id="gw")

    def __init__(self) -> None:
        self.sent: list[int] = []

    def send_runtest_some(self, indices: list[int]) -> None:
        self.sent += indices

    def shutdown(self) -> None:
        self.shutting_down = True


def dist(name: str) -> Any:
    options = {"tx": ["2*popen"], "dist": name, "loadscopereorder": False}
    return SimpleNamespace(option=SimpleNamespace(**options), getvalue=options.get, getoption=options.get)


def test_the_tests_of_a_file_and_of_all_files_that_use_ray_go_to_one_worker() -> None:
    files = ["agents/training/test_train.py", "sim/test_errors.py", "sim/test_atomic.py", "sim/replay/test_sweep.py"]
    tests = [f"tests/{file}::test_{number}[a::b@c]" for file in files for number in range(3)]
    workers = Worker(), Worker()
    scheduler = pytest_xdist_make_scheduler(dist("loadgroup"), None)
    for worker in workers:
        scheduler.add_node(worker)
        scheduler.add_node_collection(worker, tests)
    scheduler.schedule()
    for done in range(len(tests)):
        for worker in workers:
            if done < len(worker.sent):
                scheduler.mark_test_complete(worker, worker.sent[done])
    assert [sorted(worker.sent) for worker in workers] == [[0, 1, 2, 9, 10, 11], [3, 4, 5, 6, 7, 8]]


def test_another_way_to_divide_is_left_to_xdist() -> None:
    assert pytest_xdist_make_scheduler(dist("load"), None) is None


def test_every_long_file_exists_and_the_fixtures_of_ray_are_those_that_start_it() -> None:
    assert [file for file in LONG_FILES if not (REPOSITORY / file).is_file()] == []
    starts = {
        path
        for path in (REPOSITORY / "tests").rglob("*.py")
        if any(f"def {name}()" in path.read_text(encoding="utf-8") for name in RAY_FIXTURES)
    }
    assert len(starts) == len(RAY_FIXTURES)
    assert group_of("tests/sim/replay/test_sweep.py") == RAY_GROUP
