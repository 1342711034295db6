"""One local Ray for all tests of a session; it starts in a few seconds and needs about a gigabyte."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    os.environ["OMP_NUM_THREADS"] = "1"
    import ray
    import torch

    torch.set_num_threads(1)
    ray.init(address="local", include_dashboard=False, num_cpus=2, logging_level=logging.ERROR, log_to_driver=False)
    yield
    ray.shutdown()
