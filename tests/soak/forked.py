"""Commands of the project in forked children of this process, so that a run starts at once and can be killed."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DEADLINE_S = 900.0


@dataclass(slots=True)
class Run:
    """A child that runs a command. printed: where its stdout and stderr go."""

    process_id: int
    started_s: float
    printed: Path
    reader: subprocess.Popen[bytes] | None = None
    status: int | None = None

    def wait(self, until_s: float = DEADLINE_S) -> int:
        """Return the exit status, negative for a signal; kill the child if it takes too long."""
        while self.status is None and time.monotonic() - self.started_s < until_s:
            self.look()
            time.sleep(0.005)
        if self.status is None:
            self.kill()
            raise RuntimeError(f"a run took longer than {until_s:g} s: {self.text()[-500:]}")
        return self.status

    def look(self) -> int | None:
        """Return the exit status if the child has ended."""
        if self.status is None:
            ended, status = os.waitpid(self.process_id, os.WNOHANG)
            if ended:
                self.status = os.waitstatus_to_exitcode(status)
        return self.status

    def kill(self) -> None:
        """Send signal 9 to the child and all its children, and wait."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process_id, signal.SIGKILL)
        if self.status is None:
            _, status = os.waitpid(self.process_id, 0)
            self.status = os.waitstatus_to_exitcode(status)

    def text(self) -> str:
        """Return what the child has printed."""
        if self.reader is not None:
            self.reader.wait()
        return self.printed.read_text(errors="replace") if self.printed.exists() else ""


def start(
    module: str,
    arguments: Sequence[str],
    printed: Path,
    *,
    before: Callable[[], None] = lambda: None,
    through_a_pipe: bool = False,
) -> Run:
    """Fork a child that runs ``main`` of a module, or MODULE:FUNCTION, after ``before``, in a group of its own.

    Args:
        printed: file for what it prints.
        through_a_pipe: let ``cat`` write that file, for a child with a limit on the size of files.
    """
    name, _, function = module.partition(":")
    main = getattr(importlib.import_module(name), function or "main")
    printed.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    out = os.open(printed, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    reader = None
    if through_a_pipe:
        reader = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=out)
        os.close(out)
        assert reader.stdin is not None
        out = reader.stdin.fileno()
    child = os.fork()
    if child:
        if reader is None:
            os.close(out)
        elif reader.stdin is not None:
            reader.stdin.close()
        with contextlib.suppress(OSError):
            os.setpgid(child, child)
        return Run(child, time.monotonic(), printed, reader)
    status = 1
    try:
        os.setpgid(0, 0)
        os.dup2(out, 1)
        os.dup2(out, 2)
        sys.stdout = io.TextIOWrapper(io.FileIO(1, "w", closefd=False), encoding="utf-8", line_buffering=True)
        sys.stderr = io.TextIOWrapper(io.FileIO(2, "w", closefd=False), encoding="utf-8", write_through=True)
        before()
        status = _main_status(main, module, arguments)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
        os._exit(status)


def _main_status(main: Callable[[], Any], module: str, arguments: Sequence[str]) -> int:
    from hydra.core.global_hydra import GlobalHydra

    sys.argv = [module.partition(":")[0], *arguments]
    GlobalHydra.instance().clear()
    try:
        main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0
