"""Compilation of the hot functions, cached on disk where that is possible.

Numba writes its cache beside the source, else into the user's cache folder (``NUMBA_CACHE_DIR`` names another). Where
none of them can be written everything still works, but each process compiles for itself, and says so once. An empty
cache is filled by two processes (sim/engine/kernel/first_start.py).

Numba keeps a compiled function until the function's file changes. But it contains the functions that it calls, also
those of other files; so here the cache is valid for one content of all these files together.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
from numba import njit

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


def constant(value: int) -> int:
    """Return a constant to hand to compiled functions: numba makes a type of a plain one, and compiles them again."""
    return cast(int, np.int64(value))


def compiled(*, inline: bool = False, once: bool = False) -> Callable[[F], F]:
    """Return a decorator that compiles a function over arrays that it does not own.

    Such a function may read and write arrays, not make any: without Numba's counting of references, which is atomic and
    happens for every array that a function is handed, the kernel is five times faster.

    One whose name begins with ``_`` has no way in from Python, for that would cost seconds at the first start: only
    compiled code may call it (tests/test_imports.py sees to that; the call would end the process).

    Args:
        inline: compile the function into its callers; for small ones.
        once: make the function a part of the one that calls it, before anything is compiled. Each compiled function is
            optimised together with all that it calls, so a chain of them that call one another costs seconds at the
            first start; for large ones that are called in one place.
    """

    def decorate(function: F) -> F:
        global _warned
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
            return cast(F, made)
        except RuntimeError:
            if not _warned:
                _warned = True
                print(
                    "rap-lab: no folder for compiled code can be written, so this process compiles its own "
                    "(about 20 s); set NUMBA_CACHE_DIR to a folder that can",
                    file=sys.stderr,
                )
            return cast(F, njit(function, cache=False, **options))

    return decorate
