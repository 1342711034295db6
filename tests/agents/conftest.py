"""One local ray for the tests of this folder; it starts in a few seconds and takes about a gigabyte."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import sys
from collections.abc import Iterator

import pytest

if importlib.util.find_spec("absl"):
    # RLlib imports absl. Its log handler keeps the stderr of its import and closes it when Hydra configures logging. If
    # that were pytest's capture file, every later test would fail; the process's own stderr it never closes.
    with contextlib.redirect_stderr(sys.__stderr__):
        importlib.import_module("absl.logging")


@pytest.fixture(scope="package")
def local_ray() -> Iterator[None]:
    os.environ["OMP_NUM_THREADS"] = "1"
    import ray
    import torch

    torch.set_num_threads(1)
    ray.init(address="local", include_dashboard=False, num_cpus=2, logging_level=logging.ERROR, log_to_driver=False)
    yield
    ray.shutdown()
