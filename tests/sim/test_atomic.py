"""Run folders have one writer at a time, and a complete one keeps its files."""

from __future__ import annotations

from pathlib import Path

import pytest

from sim.atomic import sole_writer, write_whole
from sim.errors import ConfigError
from sim.replay.__main__ import main
from tests.commands import exit_status


def test_a_second_writer_of_a_folder_is_refused_until_the_first_has_ended(tmp_path: Path) -> None:
    with sole_writer(tmp_path):
        second = sole_writer(tmp_path)
        with pytest.raises(ConfigError, match=r"another process is writing into .*hydra\.run\.dir=FOLDER"):
            second.__enter__()
    with sole_writer(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_complete_folder_is_not_written_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("trace=poisson", "trace.duration_s=3", f"hydra.run.dir={tmp_path / 'kept'}")
    assert exit_status(main, *arguments) == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "kept").iterdir()}
    capsys.readouterr()
    assert exit_status(main, *arguments, "policy=int4", "latency=llama2_7b_a100_trtllm") == 2
    error = capsys.readouterr().err
    assert "already holds a run (summary.json); delete it, or choose another folder" in error
    assert {path.name: path.read_bytes() for path in (tmp_path / "kept").iterdir()} == before


def test_a_file_that_cannot_be_written_fully_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")

    def fail(part: Path) -> None:
        part.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_whole(path, fail)
    assert [(one.name, one.read_text()) for one in tmp_path.iterdir()] == [("a.txt", "old")]
