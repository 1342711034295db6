"""A full disk at every write: runs under a limit on the size of files, which rises until everything fits."""

from __future__ import annotations

import resource
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from tests.soak import figures
from tests.soak.commands import Command, real_replay_command, replay_command, score_command
from tests.soak.forked import start
from tests.soak.run_files import half_written, leftovers
from tests.warm_up import main as warm_up


@dataclass(slots=True)
class Found:
    """What happened under all limits."""

    runs: int = 0
    at_once: int = 0
    after_figures: int = 0
    complete: int = 0
    half_written: int = 0
    leftovers: int = 0
    seconds: float = 0.0
    limits: list[int] = field(default_factory=list)
    faults: list[dict[str, Any]] = field(default_factory=list)


def commands(files: Path) -> dict[str, tuple[Command, str]]:
    """Return name -> the command and a text of its figures; ``files`` is where what they read is written."""
    trace = ("trace=poisson", "trace.rate_rps=8", "trace.duration_s=60")
    return {
        "sim.replay": (replay_command(*trace, "iterations=true", "plot=true"), "SLO_attainment"),
        "sim.replay seeds": (replay_command(*trace, "seeds=[0,1]"), "| seed_0"),
        "sim.compare": (Command("sim.compare:compare_command", (*trace, "workers=1")), "| dense"),
        "sim.cluster": (Command("sim.cluster.run:cluster_command", trace), "SLO_attainment"),
        "sim.disaggregate": (Command("sim.disaggregate.run:disaggregate_command", trace), "SLO_attainment"),
        "hw.replay": (real_replay_command(files), "SLO_attainment"),
        "hw.score gsi": (score_command(files, tokens=512, sentences=400), ""),
    }


def run(folder: Path, path: Path, *, only: str = "") -> dict[str, Any]:
    """Run every command under every limit; save and return the figures."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "files").mkdir(parents=True)
    warm_up()  # the children find the kernels loaded
    for name, (command, shown) in commands(folder / "files").items():
        if only and only != name:
            continue
        found = fill_disk(command, shown, folder / "run")
        figures.add(path, "commands", name, asdict(found))
        print(f"{name}: {found.runs} limits, {found.complete} complete, {len(found.faults)} faults", flush=True)
    return figures.read(path)


def limits(largest: int) -> Iterator[int]:
    """Yield limits on the size of a file, from none of it to more than the largest file of a run."""
    yield from (0, 1)
    limit = 64
    while limit < 2 * largest:
        yield from (limit, limit + limit // 3)
        limit *= 2
    yield limit


def fill_disk(command: Command, shown: str, folder: Path) -> Found:
    """Run a command without a limit, then under each limit; ``shown``: text of its figures, empty if it has none."""
    found, began_s = Found(), time.monotonic()
    status, printed = _run(command, folder, lambda: None)
    if status != 0:
        raise RuntimeError(f"{command.module} does not run: {printed[-800:]}")
    if shown not in printed:
        raise RuntimeError(f"{command.module} does not print {shown!r}: {printed[-800:]}")
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    first = {path.name for path in folder.rglob("*") if path.is_file()}
    for limit in limits(max(sizes)):
        status, printed = _run(command, folder, partial(_limit, limit))
        found.runs += 1
        found.limits.append(limit)
        _judge(shown, folder, limit, status, printed, found, first)
    if not found.complete:
        found.faults.append({"what": "never complete", "limits": found.limits[-1:]})
    found.seconds = time.monotonic() - began_s
    return found


def _limit(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def _run(command: Command, folder: Path, before: Callable[[], None]) -> tuple[int, str]:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    child = start(command.module, command.line(folder), folder.with_suffix(".txt"), before=before, through_a_pipe=True)
    return child.wait(), child.text()


def _judge(shown: str, folder: Path, limit: int, status: int, printed: str, found: Found, names: set[str]) -> None:
    def fault(what: str, detail: Any) -> None:
        for known in found.faults:
            if known["what"] == what:
                known["limits"].append(limit)
                return
        found.faults.append({"what": what, "limits": [limit], "detail": detail})

    if broken := half_written(folder):
        found.half_written += 1
        fault("half-written", broken)
    if left := leftovers(folder):
        found.leftovers += 1
        fault("temporary files left", left)
    if "Traceback" in printed:
        fault("traceback", printed[-600:])
        return
    if status == 0:
        found.complete += 1
        missing = names - {path.name for path in folder.rglob("*") if path.is_file()}
        if missing:
            fault("status 0 although files are missing", sorted(missing))
        return
    errors = [line for line in printed.splitlines() if line.startswith("error:")]
    if len(errors) != 1 or status < 0:
        fault("no error of one line", {"status": status, "printed": printed[-600:]})
    has_figures = bool(shown) and shown in printed
    if shown and not has_figures:
        fault("figures are lost", printed[-600:])
    found.after_figures += has_figures
    found.at_once += not has_figures
