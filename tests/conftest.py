"""What every test shares: one thread, and a skip with a reason where data is not at hand."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

from pathlib import Path

import pytest
from hypothesis import settings

from sim.paths import DATA_VARIABLE, data_dir

# The clock is no test: a first call compiles, and machines are shared.
settings.register_profile("rap-lab", deadline=None)
settings.load_profile("rap-lab")


@pytest.fixture(scope="session")
def data() -> Path:
    """Return the folder of shared data; skip the test where there is none."""
    folder = data_dir()
    if not (folder / "traces").is_dir():
        pytest.skip(
            f"no request traces at {folder}; set {DATA_VARIABLE} to a folder that holds traces/ and calibration/"
        )
    return folder
