"""Tasks in several processes: results in order, and an end when a process is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sim.config.failures import sigterm_as_ctrl_c
from sim.errors import ConfigError
from sim.paths import REPOSITORY
from sim.processes import in_forks, in_processes


def double(number: int) -> int:
    return 2 * number


def killed_at_two(number: int) -> int:
    if number == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def handler_of_sigterm(_: int) -> object:
    return signal.getsignal(signal.SIGTERM)


def fails_at_zero(number: int) -> int:
    if number == 0:
        raise ConfigError("number 0 is refused")
    time.sleep(60)
    return number


def note_and_wait(path: str) -> None:
    Path(path).write_text(str(os.getpid()))
    time.sleep(60)


def test_results_keep_the_order_of_the_items() -> None:
    assert list(in_processes(double, range(7), 2, chunk=2)) == [0, 2, 4, 6, 8, 10, 12]


@pytest.mark.parametrize("workers", [1, 2])
def test_forks_take_what_cannot_be_sent(workers: int) -> None:
    addends = [lambda number, addend=addend: number + addend for addend in range(5)]
    assert list(in_forks(lambda add: add(10), addends, workers)) == [10, 11, 12, 13, 14]


def test_two_pools_of_forks_at_once_have_tasks_of_their_own() -> None:
    first, second = (in_forks(lambda number, by=by: number * by, [1, 2, 3], 2) for by in (10, 100))
    assert list(zip(first, second, strict=True)) == [(10, 100), (20, 200), (30, 300)]


def test_a_fork_may_fork_again() -> None:
    def sums(number: int) -> int:
        return sum(in_forks(lambda addend: number + addend, [1, 2], 2))

    assert list(in_forks(sums, [10, 20, 30], 2)) == [23, 43, 63]


def test_a_killed_process_ends_the_work_with_an_error_instead_of_waiting_forever() -> None:
    with pytest.raises(ConfigError, match=r"one of 2 processes was ended from outside .* use fewer workers"):
        list(in_processes(killed_at_two, range(5), 2))


@pytest.mark.parametrize("start", ["spawn", "fork"])
def test_a_process_has_no_handler_of_sigterm_of_the_one_that_started_it(start: str) -> None:
    with sigterm_as_ctrl_c():
        assert list(in_processes(handler_of_sigterm, [0], 1, start=start)) == [signal.SIG_DFL]


def test_an_error_of_a_task_ends_the_others_at_once() -> None:
    started_s = time.monotonic()
    with pytest.raises(ConfigError, match="number 0 is refused"):
        list(in_processes(fails_at_zero, range(2), 2))
    assert time.monotonic() - started_s < 50


def test_processes_end_with_the_one_that_started_them(tmp_path: Path) -> None:
    notes = [tmp_path / "a", tmp_path / "b"]
    code = (
        "from sim.processes import in_processes\nfrom tests.sim.test_processes import note_and_wait\n"
        f"if __name__ == '__main__':\n    list(in_processes(note_and_wait, {[str(note) for note in notes]}, 2))\n"
    )
    script = tmp_path / "script.py"
    script.write_text(code)
    parent = subprocess.Popen([sys.executable, str(script)], cwd=REPOSITORY, env={**os.environ, "PYTHONPATH": "."})
    _until(lambda: all(note.exists() and note.read_text() for note in notes))
    parent.kill()
    parent.wait()
    _until(lambda: not any(_runs(int(note.read_text())) for note in notes))


def _runs(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def _until(condition: object, most_s: float = 50.0) -> None:
    assert callable(condition)
    end_s = time.monotonic() + most_s
    while not condition():
        assert time.monotonic() < end_s, "it takes too long"
        time.sleep(0.05)
