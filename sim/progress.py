"""Progress of a long task, with the time left: a bar on a terminal, a line now and then in a log file or pipe.

Progress goes to stderr; results go to stdout. ``--quiet`` and ``RAP_LAB_PROGRESS=0`` turn it off.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol, TextIO, TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, Task, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column
from rich.text import Text

T = TypeVar("T")
_shown = False
VARIABLE = "RAP_LAB_PROGRESS"
FIRST_LINE_S = 2.0
LINE_EVERY_S = 10.0
LATER_LINE_EVERY_S = 60.0
"""Without a terminal: when the first line is printed, how often in the first minute, and how often after it.

A task shorter than that prints none.
"""


def is_off() -> bool:
    """Return whether the user wants no progress, or this process is one of several that serve a larger task."""
    return os.environ.get(VARIABLE) == "0" or multiprocessing.parent_process() is not None


def say(message: str) -> None:
    """Print one line of progress."""
    if not is_off():
        print(message, file=sys.stderr, flush=True)


class Report(Protocol):
    """Takes how much is done."""

    def __call__(self, done: float, note: str = "") -> None:
        """Set the amount that is done so far, in units of the task, and a few characters on where it stands."""
        ...


@contextmanager
def progress(
    what: str, total: float, unit: str, stream: TextIO | None = None, *, begun: float = 0.0
) -> Iterator[Report]:
    """Show progress of the task inside the ``with`` block; inside another such block, and in its processes, nothing.

    Args:
        what: names the task, such as "replaying". total: its size, in units. unit: their name, such as "requests".
        stream: where to show it; stderr if None. begun: what an earlier process has done, for the time left.
    """
    global _shown
    stream = stream or sys.stderr
    if is_off() or _shown:
        yield lambda done, note="": None
        return
    _shown = True
    try:
        with (_bar if stream.isatty() else _lines)(what, total, unit, stream, begun) as report:
            yield report
    finally:
        _shown = False


class _Yielding(TextColumn):
    """Text that is cut, in one line, where a terminal is too narrow for it and the times."""

    def __init__(self, text_format: str) -> None:
        super().__init__(text_format, table_column=Column())  # without no_wrap, so that it gives way first

    def render(self, task: Task) -> Text:
        text = super().render(task)
        text.no_wrap, text.overflow = True, "ellipsis"
        return text


@contextmanager
def _bar(what: str, total: float, unit: str, stream: TextIO, begun: float) -> Iterator[Report]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        _Yielding("{task.completed:,.0f} of {task.total:,.0f} {task.fields[unit]} {task.fields[note]}"),
        TimeElapsedColumn(Column(no_wrap=True)),
        TimeRemainingColumn(table_column=Column(no_wrap=True)),
    )
    # What is printed to the same terminal goes above the bar; a file or a pipe gets it as it is.
    with Progress(
        *columns,
        console=Console(file=stream),
        transient=True,
        redirect_stdout=sys.stdout.isatty(),
        redirect_stderr=sys.stderr.isatty(),
    ) as bar:
        task = bar.add_task(what, total=total, unit=unit, note="")
        bar.update(task, completed=begun)
        yield lambda done, note="": bar.update(task, completed=done, note=note)


@contextmanager
def _lines(what: str, total: float, unit: str, stream: TextIO, begun: float) -> Iterator[Report]:
    started_s = time.monotonic()
    state: tuple[float, str] = (begun, "")
    ended = threading.Event()

    def report(done: float, note: str = "") -> None:
        nonlocal state
        state = (done, note)

    def print_now_and_then() -> None:
        wait_s = FIRST_LINE_S
        while not ended.wait(wait_s):
            elapsed_s = time.monotonic() - started_s
            print(line(what, total, unit, *state, elapsed_s, begun), file=stream, flush=True)
            wait_s = LINE_EVERY_S if elapsed_s < LATER_LINE_EVERY_S else LATER_LINE_EVERY_S

    printer = threading.Thread(target=print_now_and_then, name="progress", daemon=True)
    printer.start()
    try:
        yield report
    finally:
        ended.set()
        printer.join()


def line(what: str, total: float, unit: str, done: float, note: str, elapsed_s: float, begun: float = 0.0) -> str:
    """Return one line of progress, such as ``replaying: 120 of 400 requests, 6 s, about 14 s left``."""
    left = f", about {duration(elapsed_s * (total - done) / (done - begun))} left" if begun < done <= total else ""
    return f"{what}: {done:,.0f} of {total:,.0f} {unit}{' ' + note if note else ''}, {duration(elapsed_s)}{left}"


def duration(seconds: float) -> str:
    """Return seconds for people: ``42 s``, ``3 min 20 s``, ``2 h 5 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def counted(items: Iterable[T], report: Report) -> list[T]:
    """Return the items as a list, and report how many have come so far."""
    found = []
    for item in items:
        found.append(item)
        report(len(found))
    return found
