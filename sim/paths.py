"""Where data that is not committed lives: request traces, measurements, text."""

from __future__ import annotations

import os
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
RESULTS = REPOSITORY / "docs" / "results"
"""Committed figures: one folder a page, with the page as ``index.md`` next to the files it is made from."""
DATA_VARIABLE = "RAP_LAB_DATA"


def data_dir() -> Path:
    """Return the folder of data: ``$RAP_LAB_DATA``, or ``shared/`` beside the checkout."""
    given = os.environ.get(DATA_VARIABLE)
    return Path(given) if given else REPOSITORY.parent / "shared"


def find_data(path: str | Path) -> Path:
    """Return ``path`` as it is when it exists or is absolute, else as it lies under ``data_dir()``."""
    path = Path(path).expanduser()
    if path.exists() or path.is_absolute():
        return path
    return data_dir() / path
