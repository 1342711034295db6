"""The first start on a machine: two processes compile what a replay needs, each one half.

Compiling everything takes one core about 17 seconds. Numba keeps the results on disk, a file a function, so two
processes fill one cache together. Processes that start at the same time wait for the one that compiles, and read its
results. Where no cache can be written, or there is no second core, each function is compiled at its first call, as
always with Numba.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from numba import types

from sim.engine.kernel import admission, loop, plans
from sim.progress import say

TABLE, TIME = types.Array(types.int64, 2, "C"), types.float64
HALVES: tuple[tuple[tuple[Any, tuple[Any, ...]], ...], ...] = (
    (
        (loop._finish_due, (TABLE, TIME)),  # first, for the other half needs most of what it calls
        (plans.enter_residency, (TABLE, types.int64, TIME)),
        (plans._change_if_due, (TABLE, TIME)),
    ),
    (
        (loop._start, (TABLE, TIME)),  # first, for it shares nothing with the other half
        (admission._form, (TABLE, TIME)),
        (loop._end, (TABLE,)),
        (admission._form_eagerly, (TABLE, TIME)),
    ),
)
"""What each process compiles, with all that it calls; `loop.advance` joins both at the end."""
PATIENCE_S = 300.0
"""How long a process waits for another one before it compiles everything itself."""
HELPER = "from sim.engine.kernel.first_start import compile_half; compile_half(1)"


@cache
def prepare() -> None:
    """Fill the compile cache if it is empty; called before the kernel first runs in a process."""
    if not is_cold():
        return
    say("compiling the engine, once on this machine: about 15 s")
    if cores() < 2:
        return
    with alone():
        if not is_cold():  # another process has filled it meanwhile
            return
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        quiet = subprocess.DEVNULL
        try:
            helper = subprocess.Popen(
                [sys.executable, "-c", HELPER], env=environment, stdin=quiet, stdout=quiet, stderr=quiet
            )
        except OSError:
            return
        try:
            compile_half(0)
            with contextlib.suppress(subprocess.TimeoutExpired):
                helper.wait(PATIENCE_S)
            loop.advance.compile((TABLE, TIME))  # type: ignore[attr-defined]
        finally:
            helper.kill()  # without effect if it has ended
            helper.wait()


def compile_half(half: int) -> None:
    """Compile one of the `HALVES` into the cache."""
    for function, arguments in HALVES[half]:
        function.compile(arguments)


def cores() -> int:
    """Return the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def is_cold() -> bool:
    """Return whether there is a compile cache that does not hold the kernel yet."""
    kept = getattr(loop.advance, "_cache", None)  # a plain function with NUMBA_DISABLE_JIT
    file = getattr(kept, "_cache_file", None)  # none where no folder can be written
    if kept is None or file is None:
        return False
    try:
        key = kept._index_key((TABLE, TIME), loop.advance.targetctx.codegen())  # type: ignore[attr-defined]
        return key not in file._load_index()
    except AttributeError:  # a Numba that keeps its cache in another way: each process compiles what it needs
        return False


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Wait until no other process fills the cache, and let none begin meanwhile."""
    if sys.platform == "win32":  # without fcntl, each compiles for itself
        yield
        return
    import fcntl

    folder = Path(loop.advance._cache.cache_path)  # type: ignore[attr-defined]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / "first_start.lock").open("w")
    except OSError:
        yield
        return
    with lock:
        end_s = time.monotonic() + PATIENCE_S
        while time.monotonic() < end_s:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.05)
            except OSError:  # some network file systems have no locks
                break
        yield  # the lock goes with the file, even if this process is killed
