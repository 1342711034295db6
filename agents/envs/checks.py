"""What a caller passes to an environment: actions, and the options of ``reset``. Anything that does not fit is refused.

NumPy takes an index of -1 as the last entry and cuts 2.7 to 2, so an action is never used before it is checked here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from agents.envs.serve_windows import Window
from sim.errors import ConfigError, nearest
from sim.types import Bools, Ints

RESET_MASK = "reset_mask"
"""Gymnasium's option of a vector ``reset``: bool[n], the environments to reset; the others stay as they are."""


def one_action(action: Any, count: int) -> int:
    """Return an action of ``Discrete(count)`` as an int.

    Raises:
        ConfigError: for anything but one whole number from 0 to ``count - 1``.
    """
    value = np.asarray(action)
    if value.dtype.kind not in "iu" or value.size != 1 or value.ndim > 1:
        raise ConfigError(f"action is {_short(action)}; it must be one whole number from 0 to {count - 1}")
    number = int(value.reshape(-1)[0])
    if not 0 <= number < count:
        raise ConfigError(
            f"action is {number}; it must be from 0 to {count - 1}, and info['action_mask'] flags the legal ones"
        )
    return number


def row_actions(actions: Any, rows: int, count: int) -> Ints:
    """Return one action of ``Discrete(count)`` for each row, int64[rows].

    Raises:
        ConfigError: for another shape, or anything but whole numbers from 0 to ``count - 1``; it names the first row.
    """
    value = np.asarray(actions)
    if value.dtype.kind not in "iu" or value.shape != (rows,):
        raise ConfigError(
            f"actions are {_short(actions)}, of type {value.dtype} and shape {value.shape}; pass {rows} whole numbers, "
            f"each from 0 to {count - 1}"
        )
    outside = (value < 0) | (value >= count)
    if outside.any():
        row = int(outside.argmax())
        raise ConfigError(
            f"action of row {row} is {value[row]}; it must be from 0 to {count - 1}, and info['action_mask'] flags the "
            "legal ones"
        )
    return value.astype(np.int64, copy=False)


def reset_options(options: Mapping[str, Any] | None, allowed: Sequence[str]) -> dict[str, Any]:
    """Return the options of ``reset``.

    Raises:
        ConfigError: for an option that this environment does not have.
    """
    given = dict(options or {})
    for name in given:
        if name not in allowed:
            raise ConfigError(f"reset has no option {name!r}; {nearest(str(name), allowed)}")
    return given


def rows_to_reset(options: Mapping[str, Any], rows: int, begun: bool) -> Bools:
    """Return which rows a vector ``reset`` begins again, bool[rows]: those of ``reset_mask``, or all.

    Args:
        options: of ``reset``. rows: their number. begun: whether every row has been reset before.
    Raises:
        ConfigError: for a mask of another shape or type, for one that is empty, or before the first full reset.
    """
    mask = options.get(RESET_MASK)
    if mask is None:
        return np.ones(rows, dtype=np.bool_)
    value = np.asarray(mask)
    if value.dtype != np.bool_ or value.shape != (rows,) or not value.any():
        raise ConfigError(
            f"options['{RESET_MASK}'] is {_short(mask)}; it must be an array of {rows} bools, True for each "
            "environment to reset, and at least one of them True"
        )
    if not begun and not value.all():
        raise ConfigError(f"options['{RESET_MASK}'] leaves out environments that never began; call reset() once first")
    return value.copy()


def for_each_row(options: Mapping[str, Any], name: str, rows: int) -> Sequence[Any] | None:
    """Return the option that has an entry for each row, or None.

    Raises:
        ConfigError: for another number of entries.
    """
    entries = options.get(name)
    if entries is None:
        return None
    if not isinstance(entries, Sequence) or isinstance(entries, str) or len(entries) != rows:
        count = len(entries) if isinstance(entries, Sequence) else type(entries).__name__
        raise ConfigError(f"options[{name!r}] has {count} entries; pass a list with one for each of {rows}")
    return entries


def episode_info(windows: Sequence[Window], requests: int, utility: float, illegal_actions: int) -> dict[str, Any]:
    """Return what ``info`` says of an episode that several windows make: the windows, and what happened so far."""
    return {
        "windows": [asdict(window) for window in windows],
        "requests": requests,
        "utility": utility,
        "illegal_actions": illegal_actions,
    }


def mask_info(legal: Bools) -> dict[str, Any]:
    """Return the ``info`` that flags the legal actions, 1 or 0 each, as ``Discrete.sample(mask=...)`` takes it."""
    return {"action_mask": legal.astype(np.int8)}


def _short(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else text[:77] + "..."
