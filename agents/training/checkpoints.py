"""Checkpoints of a training, so that a killed run can resume."""

from __future__ import annotations

import json
import pickle
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ray import cloudpickle

from agents.training.runner_state import restore_runner, runner_state
from sim.atomic import errors_name
from sim.errors import ConfigError
from sim.results.run_folder import write_json

BUFFER = "replay_buffer.pickle"
RUNNER = "runner.pickle"
NAME = re.compile(r"checkpoint_\d{6,}")


class Checkpoints:
    """The last complete checkpoint of a run folder.

    checkpoint.json names it and is written last, so a killed run leaves either the previous checkpoint or the new one.
    RLlib's checkpoints are pickles: resume only runs that you trust. RLlib's new API stack (2.60) saves neither the
    replay buffer, whatever ``store_buffer_in_checkpoints`` says, nor the running episodes, so both are saved here.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.pointer = folder / "checkpoint.json"

    def last(self) -> tuple[Path, dict[str, Any]] | None:
        """Return the path of the last checkpoint and the status that was saved with it; None if there is none.

        Raises:
            ConfigError: if checkpoint.json is damaged.
        """
        if not self.pointer.exists():
            return None
        try:
            status = json.loads(self.pointer.read_text(encoding="utf-8"))
            return self.folder / str(status["checkpoint"]), status
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise ConfigError(
                f"{self.pointer} is damaged ({type(error).__name__}); delete {self.pointer.name} to train from the "
                "beginning"
            ) from error

    def save(self, algorithm: Any, status: Mapping[str, Any]) -> None:
        """Save the algorithm with its replay buffer, then delete all earlier checkpoints.

        A training that was killed while it saved or deleted one has left a part of it, which is deleted too.

        Raises:
            OSError: if the disk is full; the earlier checkpoint stays, and nothing of this one does.
        """
        name = f"checkpoint_{status['iteration']:06d}"
        path = self.folder / name
        shutil.rmtree(path, ignore_errors=True)
        try:
            with errors_name(path):
                algorithm.save_to_path(path.absolute())
                if algorithm.local_replay_buffer is not None:
                    with (path / BUFFER).open("wb") as file:
                        pickle.dump(algorithm.local_replay_buffer.get_state(), file, protocol=pickle.HIGHEST_PROTOCOL)
                with (path / RUNNER).open("wb") as file:
                    cloudpickle.dump(runner_state(algorithm), file)  # type: ignore[no-untyped-call]
            write_json(self.pointer, {**status, "checkpoint": name})
        except OSError:
            shutil.rmtree(path, ignore_errors=True)
            raise
        for other in self.folder.iterdir():
            if NAME.fullmatch(other.name) and other.name != name:
                shutil.rmtree(other, ignore_errors=True)

    def restore(self, algorithm: Any) -> dict[str, Any]:
        """Restore an algorithm from the last checkpoint; return the status saved with it, empty if there is none.

        Raises:
            ConfigError: if the checkpoint is not there or is damaged.
        """
        last = self.last()
        if last is None:
            return {}
        path, status = last
        try:
            algorithm.restore_from_path(str(path.absolute()))
            if algorithm.local_replay_buffer is not None:
                with (path / BUFFER).open("rb") as file:
                    algorithm.local_replay_buffer.set_state(pickle.load(file))
            if (path / RUNNER).exists():  # checkpoints of earlier versions have none: their episodes begin again
                with (path / RUNNER).open("rb") as file:
                    restore_runner(algorithm, pickle.load(file))
        except (OSError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
            text = " ".join(str(error).split())[:200]
            raise ConfigError(
                f"{path} cannot be restored ({type(error).__name__}: {text}); delete {self.pointer} to train from the "
                "beginning"
            ) from error
        return status
