"""Compilation of the hot functions, cached on disk where that is possible.

Numba writes its cache beside the source, else into the user's cache folder (``NUMBA_CACHE_DIR`` names another). Where
none of them can be written everything still works, but each process compiles anew; the first time says so.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, TypeVar, cast

from numba import njit

F = TypeVar("F", bound=Callable[..., Any])
_told = False


def compiled(*, inline: bool = False) -> Callable[[F], F]:
    """Return a decorator that compiles a function over arrays that it does not own.

    Such a function may read and write arrays, not make any: without Numba's counting of references, which is atomic and
    happens for every array that a function is handed, the kernel is five times faster.

    Args:
        inline: compile the function into its callers; for small ones.
    """

    def decorate(function: F) -> F:
        global _told
        options: Any = {"error_model": "numpy", "forceinline": inline, "_nrt": False}
        try:
            return cast(F, njit(function, cache=True, **options))
        except RuntimeError:
            if not _told:
                _told = True
                print(
                    "rap-lab: no folder for compiled code can be written, so this process compiles its own "
                    "(about 15 s); set NUMBA_CACHE_DIR to a folder that can",
                    file=sys.stderr,
                )
            return cast(F, njit(function, cache=False, **options))

    return decorate
