"""Runs a task in several processes of this machine, and says so when one of them is killed."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from typing import Any, TypeVar

from sim.errors import ConfigError

T = TypeVar("T")
R = TypeVar("R")


def in_processes(
    task: Callable[[Any], T], items: Iterable[Any], workers: int, *, start: str = "spawn", chunk: int = 1
) -> Iterator[T]:
    """Yield the task's result for each item, in their order.

    An error of a task, or a caller that stops, ends the processes at once; so does the end of this process.

    Args:
        task: with ``spawn`` it must be importable by name. chunk: how many items are sent to a process at a time.
    Raises:
        ConfigError: if a process is killed, for instance because the machine has no memory left.
    """
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context(start), initializer=_end_with_parent)
    own: list[Any] = []
    complete = False
    try:
        results = pool.map(task, items, chunksize=chunk)
        own = [process for process in multiprocessing.active_children() if process not in others]
        yield from results
        complete = True
    except BrokenProcessPool:
        raise ConfigError(
            f"one of {workers} processes was ended from outside before its task was complete, as a machine without "
            "free memory does; use fewer workers, or a smaller trace"
        ) from None
    finally:
        if not complete:
            for process in own:
                process.terminate()
        pool.shutdown(wait=True, cancel_futures=True)


def in_forks(task: Callable[[T], R], items: Sequence[T], workers: int, *, chunk: int = 1) -> Iterator[R]:
    """Yield the task's result for each item, in their order; ``workers`` below 2 use this process alone.

    The processes are forks, which have the task and the items already, so neither needs to be sent: both may hold
    closures. Results are sent.

    Args:
        chunk: how many items a process takes at a time.
    Raises:
        ConfigError: if this system cannot fork, or as ``in_processes``.
    """
    if workers < 2:
        yield from map(task, items)
        return
    if "fork" not in multiprocessing.get_all_start_methods():
        raise ConfigError(f"workers is {workers}, but this system cannot fork a process; use workers=1")
    before, _inherited[:] = list(_inherited), [task, items]
    try:
        yield from in_processes(_inherited_task, range(len(items)), workers, start="fork", chunk=chunk)
    finally:
        _inherited[:] = before


_inherited: list[Any] = []
"""The task and the items of ``in_forks``, from which processes are forked."""


def _inherited_task(number: int) -> Any:
    task, items = _inherited
    return task(items[number])


def _end_with_parent() -> None:
    """Let this process end as soon as the one that started it ends, however that ends, or sends it SIGTERM."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a fork has the handler of its parent
    threading.Thread(target=_wait_for_parent, name="parent", daemon=True).start()


def _wait_for_parent() -> None:
    if (parent := multiprocessing.parent_process()) is not None:
        wait([parent.sentinel])
        os._exit(1)
