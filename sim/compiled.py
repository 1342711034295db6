"""Compilation of the hot functions, cached on disk where possible.

Numba writes its cache next to the source, or else into the user's cache folder (``NUMBA_CACHE_DIR`` names another). If
neither can be written, each process compiles for itself and prints a message once. An empty cache is filled by two
processes (sim/engine/kernel/first_start.py).

Numba keeps a compiled function until the function's own file changes. But compiled code contains the functions that it
calls, also those of other files; so here the cache is valid only while none of `_SOURCES` changes.
"""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
from numba import njit
from numba.core import event

F = TypeVar("F", bound=Callable[..., Any])
_warned = False
_HERE = Path(__file__).parent
_SOURCES = [
    _HERE / "compiled.py",
    _HERE / "cost" / "latency.py",
    _HERE / "cluster" / "kernel.py",
    *sorted(_HERE.glob("engine/kernel/*.py")),
]
SOURCE_HASH = hashlib.sha256(b"".join(path.read_bytes() for path in _SOURCES)).hexdigest()


def _warn() -> None:
    global _warned
    if not _warned:
        _warned = True
        print(
            "rap-lab: no folder for compiled code can be written, so this process compiles its own "
            "(about 20 s); set NUMBA_CACHE_DIR to a folder that can",
            file=sys.stderr,
        )


def _if_there_is_space(save: Callable[..., None]) -> Callable[..., None]:
    """Return a function that saves compiled code, or goes on without where the disk is full."""

    def saved(*arguments: Any) -> None:
        try:
            save(*arguments)
        except OSError:
            _warn()

    return saved


def _as_compilation(load: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that loads compiled code within an event of compilation, which `cpu_clock` leaves out."""

    def loaded(*arguments: Any) -> Any:
        with event.trigger_event("numba:compile"):
            return load(*arguments)

    return loaded


def constant(value: int) -> int:
    """Return a constant to pass to compiled functions; for a plain literal, Numba would compile them once more."""
    return cast(int, np.int64(value))


def compiled(*, inline: bool = False, once: bool = False) -> Callable[[F], F]:
    """Return a decorator that compiles a function over arrays that it does not own.

    Such a function may read and write arrays but not create any. Numba's reference counting is atomic and happens for
    every array argument; without it, the kernel is five times faster.

    A function whose name begins with ``_`` cannot be called from Python, because the wrapper would cost seconds at the
    first start: only compiled code may call it. A call from Python would end the process; tests/test_imports.py checks
    that there is none.

    Args:
        inline: compile the function into its callers; for small ones.
        once: merge the function into its caller before compilation; for large ones that are called in one place. Each
            compiled function is optimized together with all that it calls, so a chain of calls costs seconds at the
            first start.
    """

    def decorate(function: F) -> F:
        options: Any = {"error_model": "numpy", "forceinline": inline, "_nrt": False}
        if once:
            options["inline"] = "always"
        if function.__name__.startswith("_"):
            options |= {"no_cpython_wrapper": True, "no_cfunc_wrapper": True}
        try:
            made: Any = njit(function, cache=True, **options)
            if hasattr(made, "_cache"):  # with NUMBA_DISABLE_JIT it is the plain function
                own = Path(function.__code__.co_filename).read_bytes()
                made._cache._cache_file._source_stamp = SOURCE_HASH + hashlib.sha256(own).hexdigest()
                made._cache.save_overload = _if_there_is_space(made._cache.save_overload)
                made._cache.load_overload = _as_compilation(made._cache.load_overload)
            return cast(F, made)
        except RuntimeError:
            _warn()
            return cast(F, njit(function, cache=False, **options))

    return decorate


class _Compilation(event.Listener):
    """Counts the process CPU seconds in which Numba compiles, or loads what it has compiled before."""

    def __init__(self) -> None:
        self.cpu_s, self._depth, self._started_s = 0.0, 0, 0.0

    def on_start(self, event: object) -> None:
        if self._depth == 0:
            self._started_s = time.process_time()
        self._depth += 1

    def on_end(self, event: object) -> None:
        self._depth -= 1
        if self._depth == 0:
            self.cpu_s += time.process_time() - self._started_s


@contextmanager
def cpu_clock() -> Iterator[Callable[[], float]]:
    """Yield a clock of the process CPU seconds since now, without those in which Numba compiles or loads."""
    compilation, started_s = _Compilation(), time.process_time()
    with event.install_listener("numba:compile", compilation):
        yield lambda: time.process_time() - started_s - compilation.cpu_s
