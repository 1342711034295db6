"""Calibration files: written with their numbers, and left alone without a new one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="hw needs torch: pip install -e '.[hw]'")

from hw.calibrate.writing import write_calibration


def test_a_file_with_equal_numbers_keeps_its_date(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    content = {"name": "mine", "date": "2026-01-01", "tables": {"tokens": [1, 2], "us": (3.5, 4)}}
    write_calibration(content, path)
    first = path.read_bytes()
    write_calibration(content | {"date": "2026-02-02"}, path)
    assert path.read_bytes() == first
    write_calibration(content | {"date": "2026-02-02", "tables": {"tokens": [1, 3]}}, path)
    assert json.loads(path.read_text())["date"] == "2026-02-02"


@pytest.mark.parametrize("old", [b"{", b"[1]", b"\xff", b"[" * 100_000])
def test_a_broken_file_is_written_again(tmp_path: Path, old: bytes) -> None:
    path = tmp_path / "mine.json"
    path.write_bytes(old)
    write_calibration({"name": "mine", "date": "today"}, path)
    assert json.loads(path.read_text()) == {"name": "mine", "date": "today"}
