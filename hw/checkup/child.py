"""Runs one step in a process of its own: its output goes to a file, and it is ended at its limit.

``run_child`` starts ``python -m hw.checkup.child``, which reads from stdin which step to run.
A step that reaches its limit first writes the Python stack of every thread to its output; then it and every process
that it started are ended.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from hw.checkup.findings import Findings, Skip, hide, without_paths
from hw.checkup.machine import nvidia_smi
from hw.checkup.schedule import Step
from hw.checkup.setup import Setup
from sim.paths import REPOSITORY, data_dir

POLL_S = 0.05
GRACE_S = 2.0
"""Seconds that a step has at its limit to write its stacks, and again to exit before it is killed."""
SETUP = "setup.json"
_DIE_WITH_PARENT = 1
"""Linux's PR_SET_PDEATHSIG."""


def run_child(step: Step, work: Path, limit_s: float, watch: Callable[[float, str], None]) -> str | None:
    """Run a step; return why it ended early, None if it came to its end.

    watch: called now and then with the seconds so far and the last line of the output.
    """
    log = work / f"{step.name}.txt"
    paths = [str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "hw.checkup.child"],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
        start_s = time.monotonic()
        try:
            assert process.stdin is not None
            with process.stdin as pipe:
                pipe.write(json.dumps([step.name, step.run, str(work), limit_s]).encode())
            while process.poll() is None:
                seconds = time.monotonic() - start_s
                if seconds > limit_s:
                    _show_stacks(process)
                    return f"it did not end within {limit_s:.0f} s"
                watch(seconds, last_line(log))
                time.sleep(POLL_S)
        finally:
            _end(process)
    code = process.returncode
    if code < 0:
        return f"signal {signal.Signals(-code).name} ended it"
    return f"it ended with status {code}" if code else None


def _show_stacks(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(signal.SIGUSR1)
    time.sleep(min(GRACE_S, 1.0))


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process and all that it started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=GRACE_S)


def last_line(log: Path) -> str:
    """Return the last line of a file that holds text, at most 100 characters."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 2000))
        lines = file.read().decode(errors="replace").replace("\r", "\n").splitlines()
    return next((line.strip()[:100] for line in reversed(lines) if line.strip()), "")


def tail(log: Path, most: int) -> str:
    """Return the end of a file, at most ``most`` characters, without paths of this machine."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - 4 * most))
            return without_paths(file.read().decode(errors="replace"))[-most:]
    except OSError:
        return ""


def main(name: str, run: str, work: Path, limit_s: float) -> int:
    """Run a step here, by its function ``MODULE:FUNCTION``; return the exit status."""
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    with contextlib.suppress(OSError, AttributeError):  # only Linux has it
        ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
    findings = Findings(work / f"{name}.json")
    try:
        setup = replace(Setup.read(work / SETUP), limit_s=limit_s)
        hide(OUT=setup.out, WORK=setup.work, DATA=str(data_dir()))
        resolve_name(run)(setup, findings)
    except Skip as reason:
        findings.skip(str(reason))
    except BaseException as error:
        traceback.print_exc()
        findings.error(described(error))
        return 1
    return 0


def described(error: BaseException) -> dict[str, Any]:
    """Return an error with its traceback, and what is known of the device's memory if that ran out."""
    found: dict[str, Any] = {
        "type": type(error).__name__,
        "message": str(error),
        "traceback": "".join(traceback.format_exception(error)),
        "nvidia_smi": nvidia_smi(),
    }
    if "torch" in sys.modules:
        import torch

        from hw.elastic.device_memory import out_of_memory

        if out_of_memory(error) and torch.cuda.is_available():
            with contextlib.suppress(Exception):  # a device that failed may not answer
                found["memory"] = torch.cuda.memory_summary()
    return found


if __name__ == "__main__":
    step_name, function, folder, seconds = json.load(sys.stdin)
    sys.exit(main(step_name, function, Path(folder), seconds))
