"""Where data that is not in the repository lies: request traces, measurements, text."""

from __future__ import annotations

import os
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
RESULTS = REPOSITORY / "docs" / "results"
"""Committed figures: one folder a page, with the page as ``index.md`` next to the files it is made from."""
CHECKOUT = (REPOSITORY / "pyproject.toml").is_file()
"""Whether this code runs from a checkout; an installed package has no file of its own to write."""
DATA_VARIABLE = "RAP_LAB_DATA"


def data_dir() -> Path:
    """Return the data folder: ``$RAP_LAB_DATA``, or ``shared/`` next to the checkout."""
    folder = os.environ.get(DATA_VARIABLE)
    return Path(folder) if folder else REPOSITORY.parent / "shared"


def results_folder(out: str, published: str) -> Path:
    """Return where a command writes results: the published folder of the checkout, or ``out`` as a user means it.

    Args:
        out: a path from the current folder; ``published`` or an empty text is the published folder. An installed
            package has none, so there it counts from the current folder too.
        published: its path in the repository.
    """
    return REPOSITORY / published if CHECKOUT and out in ("", published) else Path(out or published)


def find_data(path: str | Path) -> Path:
    """Return ``path`` itself if it exists or is absolute, else the path under ``data_dir()``."""
    path = Path(path).expanduser()
    if path.exists() or path.is_absolute():
        return path
    return data_dir() / path
