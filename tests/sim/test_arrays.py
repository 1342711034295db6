"""Files of arrays: what is written is read back, here and by the safetensors library; damage is named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from sim.arrays import ArraysError, read_arrays, write_arrays

ARRAYS = {
    "a.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.array([1.5, np.nan]),
    "c": np.array([], dtype=np.int64),
}


def test_arrays_come_back_as_they_were_written(tmp_path: Path) -> None:
    write_arrays(tmp_path / "x.safetensors", ARRAYS)
    found = read_arrays(tmp_path / "x.safetensors")
    assert list(found) == list(ARRAYS)
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(found[name], array)
        assert found[name].dtype == array.dtype


def test_the_files_are_safetensors_in_both_directions(tmp_path: Path) -> None:
    write_arrays(tmp_path / "ours.safetensors", ARRAYS)
    save_file(ARRAYS, tmp_path / "theirs.safetensors")
    for name, array in load_file(tmp_path / "ours.safetensors").items():
        np.testing.assert_array_equal(array, ARRAYS[name])
    for name, array in read_arrays(tmp_path / "theirs.safetensors").items():
        np.testing.assert_array_equal(array, ARRAYS[name])


def test_equal_arrays_give_equal_bytes(tmp_path: Path) -> None:
    for name in ("x", "y"):
        write_arrays(tmp_path / name, ARRAYS)
    assert (tmp_path / "x").read_bytes() == (tmp_path / "y").read_bytes()


@pytest.mark.parametrize("keep", [0, 5, 40, -1])
def test_a_cut_file_is_an_error_that_names_it(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "x.safetensors"
    write_arrays(path, ARRAYS)
    path.write_bytes(path.read_bytes()[: keep if keep >= 0 else len(path.read_bytes()) - 4])
    with pytest.raises(ArraysError, match=r"x\.safetensors"):
        read_arrays(path)
