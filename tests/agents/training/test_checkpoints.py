"""The folder of checkpoints: one complete checkpoint after every save, also where a kill has left parts of others."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("ray", reason="training needs Ray: pip install -e '.[agents]'")

from agents.training import checkpoints
from agents.training.checkpoints import RUNNER, Checkpoints


def algorithm() -> Any:
    """An algorithm that saves one file."""

    def save(path: Path) -> None:
        path.mkdir()
        (path / "algorithm_state.pkl").write_bytes(b"state")

    return SimpleNamespace(save_to_path=save, local_replay_buffer=None)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Checkpoints:
    """A folder whose training was saved at iteration 3."""
    monkeypatch.setattr(checkpoints, "runner_state", lambda _: {})
    found = Checkpoints(tmp_path)
    found.save(algorithm(), {"iteration": 2})
    found.save(algorithm(), {"iteration": 3})
    return found


def test_a_save_leaves_one_complete_checkpoint(saved: Checkpoints) -> None:
    assert names(saved.folder) == ["checkpoint.json", "checkpoint_000003"]
    last = saved.last()
    assert last == (saved.folder / "checkpoint_000003", {"iteration": 3, "checkpoint": "checkpoint_000003"})
    assert names(last[0]) == ["algorithm_state.pkl", RUNNER]


def test_a_kill_while_a_checkpoint_was_deleted_or_written_leaves_nothing_after_the_next_save(
    saved: Checkpoints,
) -> None:
    (saved.folder / "checkpoint_000002" / "learner_group").mkdir(parents=True)  # half deleted
    (saved.folder / "checkpoint_000009").mkdir()  # half written, by a training that went on longer
    (saved.folder / "checkpoint_of_mine").mkdir()
    saved.save(algorithm(), {"iteration": 4})
    assert names(saved.folder) == ["checkpoint.json", "checkpoint_000004", "checkpoint_of_mine"]


def test_a_kill_before_the_pointer_leaves_the_checkpoint_before(
    saved: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "write_json", killed)
        with pytest.raises(KeyboardInterrupt):
            saved.save(algorithm(), {"iteration": 4})
    last = saved.last()
    assert last is not None
    assert last[1]["iteration"] == 3
    assert last[0].is_dir()
    saved.save(algorithm(), {"iteration": 4})
    assert names(saved.folder) == ["checkpoint.json", "checkpoint_000004"]


def test_a_full_disk_leaves_the_checkpoint_before_alone_and_the_error_names_the_folder(saved: Checkpoints) -> None:
    def save(path: Path) -> None:
        path.mkdir()
        (path / "algorithm_state.pkl").write_bytes(b"st")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # a write names no file

    broken = SimpleNamespace(save_to_path=save, local_replay_buffer=None)
    with pytest.raises(OSError, match="checkpoint_000004"):
        saved.save(broken, {"iteration": 4})
    assert names(saved.folder) == ["checkpoint.json", "checkpoint_000003"]
