"""Stored weights: a disk without room for them is said in one line that names the folder."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch

from hw.elastic.blocks import DiskStore
from sim.errors import ModelError


def test_stored_tensors_are_read_back() -> None:
    store, tensors = DiskStore(), [torch.arange(6.0).reshape(2, 3), torch.arange(3, dtype=torch.uint8)]
    store.put("other", [torch.ones(5)])
    store.put("some", tensors)
    found, _ = store.get("some")
    assert all(map(torch.equal, found, tensors))
    assert "none" not in store


@pytest.mark.parametrize("count", [3, 100_000], ids=["less than a buffer", "more than a buffer"])
def test_a_full_disk_is_an_error_that_names_the_temporary_folder(count: int) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("this system has no /dev/full")
    store = DiskStore()
    store._file = full.open("r+b")
    with pytest.raises(ModelError, match=f"into the temporary folder {tempfile.gettempdir()} .*set TMPDIR"):
        store.put("some", [torch.ones(count)])
    assert "some" not in store
