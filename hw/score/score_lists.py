"""Reads the lists of scores that ``hw.score`` wrote: orders of blocks or layers, and searches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sim.errors import ConfigError
from sim.json_file import read_json_object


def read_list(path: Path, key: str) -> list[Any]:
    """Return a list of a score of ``hw.score``.

    Raises:
        ConfigError: if the file is no score with this list.
    """
    found = read_json_object(path, ConfigError, "measure it again").get(key)
    if not isinstance(found, list):
        raise ConfigError(f"{path} has no list {key!r}; measure it again")
    return found
