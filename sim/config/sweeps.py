"""What ``--multirun`` leaves next to the folders of its jobs: why jobs failed, and one table of all of them.

A failed job leaves ``failed/JOB.json`` in the folder of the sweep, and takes it away when it runs again. The table is
written when the sweep ends, also if jobs failed or it was interrupted (``sim.table``).
"""

from __future__ import annotations

import json
import sys
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, ClassVar

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from sim.atomic import write_whole
from sim.config.failures import INTERRUPTED, SWEEP_FOLDER, explain
from sim.errors import ConfigError, RapLabError

FAILED_JOBS = "failed"


class JobFailedError(ConfigError):
    """A job in a process of its own failed; the message is its number and overrides. Its folder holds the reason."""


class NoteFolder(Callback):
    """Notes the folder of a sweep when it starts. Hydra tells it to callbacks alone."""

    folder: ClassVar[Path | None] = None

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Note the folder of the sweep."""
        NoteFolder.folder = Path(config.hydra.sweep.dir).absolute()


def sweep_callback() -> str:
    """Return the override that makes Hydra call ``NoteFolder``."""
    return f"+hydra.callbacks.rap_lab_sweep={{_target_: {NoteFolder.__module__}.{NoteFolder.__qualname__}}}"


def _failure_file() -> Path:
    """Return where the present job notes its failure."""
    sweep = HydraConfig.get().sweep
    return Path(sweep.dir).absolute() / FAILED_JOBS / f"{str(sweep.subdir).replace('/', '_')}.json"


def note_failure(error: BaseException) -> None:
    """Write why the present job failed; a full disk loses the note alone."""
    job = HydraConfig.get().job
    note = {
        "folder": str(HydraConfig.get().sweep.subdir),
        "overrides": [str(text) for text in HydraConfig.get().overrides.task],
        "error": "interrupted" if _is_interrupt(error) else explain(error, SWEEP_FOLDER),
        "job": str(job.num),
        "command": f"python -m {HydraConfig.get().help.app_name}",
        "written_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    with suppress(OSError):
        path = _failure_file()
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, lambda part: part.write_text(json.dumps(note, indent=1) + "\n", encoding="utf-8"))


def _is_interrupt(error: BaseException) -> bool:
    """Return whether Ctrl-C ended a job, also one that kept its records and then ended with that status."""
    return isinstance(error, KeyboardInterrupt) or (isinstance(error, SystemExit) and error.code == INTERRUPTED)


def forget_failure() -> None:
    """Take away what an earlier run of the present job noted."""
    with suppress(OSError):
        _failure_file().unlink(missing_ok=True)
        _failure_file().parent.rmdir()


def failed_jobs() -> int:
    """Return how many jobs of the sweep that runs now have noted a failure."""
    return 0 if NoteFolder.folder is None else len(list((NoteFolder.folder / FAILED_JOBS).glob("*.json")))


def sweep_ended() -> None:
    """Write and print the table of a sweep, if a sweep began."""
    folder, NoteFolder.folder = NoteFolder.folder, None
    if folder is not None and folder.is_dir():
        try:
            resolve_name("sim.table.table:write_table")(folder)
        except RapLabError:  # no job left a run
            pass
        except OSError as error:
            print(
                f"warning: {explain(error, SWEEP_FOLDER)}; make the table with python -m sim.table {folder}",
                file=sys.stderr,
            )
