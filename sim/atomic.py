"""Files that appear complete or not at all, and folders that one process writes."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import IO

from sim.errors import ConfigError


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Make a file appear complete or not at all.

    Args:
        path: the file; its folder is made if it is missing.
        write: fills the temporary file that it is called with, which is then renamed to ``path``.
    Raises:
        ConfigError: if ``path`` is a device, a pipe or a folder, which a file would take the place of.
    """
    if path.exists() and not path.is_file():
        raise ConfigError(f"{path} is no regular file, so it cannot be written; name a file")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    except OSError as error:
        error.filename = str(path)  # the name that the user knows
        raise
    os.close(handle)
    part = Path(name)
    try:
        write(part)
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        part.chmod(0o644)
        part.replace(path)
    except BaseException as error:
        part.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None:
            error.filename = str(path)  # the name that the user knows
        raise


def check_writable(path: Path) -> None:
    """Check that ``write_whole`` can write a file, before the work whose result it holds.

    Raises:
        ConfigError: if it is a device, a pipe or a folder. OSError: if its folder cannot be made or written.
    """
    if path.exists() and not path.is_file():
        raise ConfigError(f"{path} is no regular file, so it cannot be written; name a file")
    path.parent.mkdir(parents=True, exist_ok=True)
    with errors_name(path), tempfile.TemporaryFile(dir=path.parent):
        pass


@contextlib.contextmanager
def errors_name(path: Path) -> Iterator[None]:
    """Let an error of the system inside the ``with`` block name ``path`` if it names no file, as those of a write."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


@contextlib.contextmanager
def sole_writer(
    folder: Path, complete: Collection[str] = (), *, instead: str = "choose another folder: hydra.run.dir=FOLDER"
) -> Iterator[None]:
    """Let one process at a time write into a folder, and none into one that is complete.

    The lock ends with the process, even if that is killed.

    Args:
        folder: made if it is missing.
        complete: names of files that only a complete folder has.
        instead: what a user can do while another process writes there.
    Raises:
        ConfigError: if another process writes there, or one of the files exists.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ".lock"
    with path.open("a") as lock:
        if not _lock(lock) or os.fstat(lock.fileno()).st_nlink == 0:  # 0: its holder has just removed it
            raise ConfigError(f"another process is writing into {folder}; {instead}")
        try:
            for name in complete:
                if (folder / name).exists():
                    raise ConfigError(
                        f"{folder} already holds a run ({name}); delete it, or choose another folder: "
                        "hydra.run.dir=FOLDER"
                    )
            yield
        finally:
            path.unlink(missing_ok=True)


def _lock(file: IO[str]) -> bool:
    """Return whether this process now holds the lock of a file; True where there are no locks."""
    if sys.platform == "win32":
        return True
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # some network file systems have no locks
        return True
    return True
