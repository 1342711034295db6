"""Runs a task in several processes of this machine, and says so when one of them is killed."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from typing import Any, TypeVar

from sim.errors import ConfigError

T = TypeVar("T")


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


def _end_with_parent() -> None:
    """End this process as soon as the one that started it ends, however that ends, or ends this one."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a fork has the handler of its parent
    threading.Thread(target=_wait_for_parent, name="parent", daemon=True).start()


def _wait_for_parent() -> None:
    if (parent := multiprocessing.parent_process()) is not None:
        wait([parent.sentinel])
        os._exit(1)
