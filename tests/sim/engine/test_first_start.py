"""The compile cache is filled by two processes, once, and only where that helps."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sim.engine.kernel import first_start
from sim.paths import REPOSITORY

RUN = """
import subprocess
from sim.engine.kernel import loop, plans
from tests.sim.serving import requests, tiny_engine
begun = []
start = subprocess.Popen
subprocess.Popen = lambda *arguments, **options: begun.append(1) or start(*arguments, **options)
engine = tiny_engine()
engine.submit(requests((0.0, 20, 5)))
engine.run_until(9.0)
hits = [sum(function.stats.cache_hits.values()) for function in (loop._start, plans.enter_residency, loop.advance)]
print(len(begun), *hits, engine.records().finish_s[0])
"""


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[object]]:
    """Record the helpers that are started instead of starting them."""
    started: list[object] = []

    def popen(*arguments: object, **options: object) -> object:
        started.append(arguments)
        raise OSError("no helper in this test")

    monkeypatch.setattr(subprocess, "Popen", popen)
    first_start.prepare.cache_clear()
    yield started
    first_start.prepare.cache_clear()


@pytest.mark.parametrize(("cores", "cold", "helpers"), [(1, True, 0), (2, False, 0), (2, True, 1)])
def test_a_helper_starts_only_with_a_second_core_and_an_empty_cache(
    cores: int, cold: bool, helpers: int, calls: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(first_start, "cores", lambda: cores)
    monkeypatch.setattr(first_start, "is_cold", lambda: cold)
    first_start.prepare()
    first_start.prepare()  # once a process
    assert len(calls) == helpers


def test_no_helper_starts_without_a_cache(calls: list[object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(first_start, "cores", lambda: 2)
    monkeypatch.setattr(first_start.loop, "advance", lambda table, horizon_s: 0)  # as with NUMBA_DISABLE_JIT
    first_start.prepare()
    assert calls == []


@pytest.mark.slow
def test_two_first_starts_at_once_compile_everything_once(tmp_path: Path) -> None:
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-c", RUN]
    pair = [subprocess.Popen(command, env=environment, cwd=REPOSITORY, stdout=subprocess.PIPE) for _ in range(2)]
    found = [one.communicate()[0].decode().split() for one in pair]
    assert len({finish for *_, finish in found}) == 1
    if first_start.cores() > 1:
        waited, first = sorted(found)
        assert (waited[0], waited[3]) == ("0", "1")  # no helper; it found all in the cache
        assert (first[0], first[1]) == ("1", "1")  # it found the helper's half there
