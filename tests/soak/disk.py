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


@dataclass(frozen=True, slots=True)
class Case:
    """One command.

    shown: text that it prints with its figures; empty if it has none. before: text of the only error that may come up
    before there are figures; empty if none may.
    """

    command: Command
    shown: str
    before: str = ""


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


def cases(files: Path) -> dict[str, Case]:
    """Return the commands by name; ``files`` is where what they read is written."""
    trace = ("trace=poisson", "trace.rate_rps=8", "trace.duration_s=60")
    return {
        "sim.replay": Case(replay_command(*trace, "iterations=true", "plot=true"), "SLO_attainment"),
        "sim.replay seeds": Case(replay_command(*trace, "seeds=[0,1]"), "| seed_0"),
        "sim.compare": Case(Command("sim.compare:compare_command", (*trace, "workers=1")), "| dense"),
        "sim.cluster": Case(Command("sim.cluster.run:cluster_command", trace), "SLO_attainment"),
        "sim.disaggregate": Case(Command("sim.disaggregate.run:disaggregate_command", trace), "SLO_attainment"),
        "hw.replay": Case(real_replay_command(files), "SLO_attainment", before="set TMPDIR"),
        "hw.score gsi": Case(score_command(files, tokens=512, sentences=400), ""),
    }


def run(folder: Path, path: Path, *, only: str = "") -> dict[str, Any]:
    """Run every command under every limit; save and return the figures."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "files").mkdir(parents=True)
    warm_up()  # the children find the kernels loaded
    for name, case in cases(folder / "files").items():
        if only and only != name:
            continue
        found = fill_disk(case, folder / "run")
        figures.add(path, "commands", name, asdict(found))
        print(f"{name}: {found.runs} limits, {found.complete} complete, {len(found.faults)} faults", flush=True)
    return figures.read(path)


def limits() -> Iterator[int]:
    """Yield limits on the size of a file, from none of it to one that no run here needs."""
    yield from (0, 1)
    for power in range(6, 34):
        yield from (2**power, 2**power + 2**power // 3)


def fill_disk(case: Case, folder: Path) -> Found:
    """Run a command without a limit, then under rising limits until they are far above what it needs."""
    found, began_s = Found(), time.monotonic()
    status, printed = _run(case.command, folder, lambda: None)
    if status != 0 or case.shown not in printed:
        raise RuntimeError(f"{case.command.module} does not run, or prints no {case.shown!r}: {printed[-800:]}")
    files = {path.name: path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    for limit in limits():
        if found.complete and limit > 2 * max(files.values()):
            break
        status, printed = _run(case.command, folder, partial(_limit, limit))
        found.runs += 1
        found.limits.append(limit)
        _judge(case, folder, limit, status, printed, found, set(files))
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


def _judge(case: Case, folder: Path, limit: int, status: int, printed: str, found: Found, names: set[str]) -> None:
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
    has_figures = bool(case.shown) and case.shown in printed
    begins = bool(case.before) and case.before in printed
    if case.shown and not has_figures and not begins:
        fault("figures are lost", printed[-600:])
    found.after_figures += has_figures
    found.at_once += not has_figures
