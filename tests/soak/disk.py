"""A full disk at every write: runs under a limit on the size of files, which rises until everything fits."""

from __future__ import annotations

import json
import resource
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from tests.soak.forked import start
from tests.soak.provenance import made_now
from tests.soak.run_files import half_written, leftovers
from tests.soak.tiny_checkpoint import overrides, write_checkpoint
from tests.warm_up import main as warm_up


@dataclass(frozen=True, slots=True)
class Command:
    """One command that writes files. figure: text that it prints with its figures. folder_key: names its folder."""

    module: str
    arguments: tuple[str, ...]
    figure: str
    folder_key: str = "hydra.run.dir"


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


def commands(files: Path) -> dict[str, Command]:
    """Return the commands by name; ``files`` is where what they read is written."""
    trace = ("trace=poisson", "trace.rate_rps=8", "trace.duration_s=60")
    checkpoint = write_checkpoint(files / "checkpoint")
    text = files / "text.txt"
    text.write_text("the keeper counts the ships that pass in the night " * 500)
    score = ("kind=gsi", f"model.path={checkpoint}", "model.name=tiny", "model.dtype=float32", "model.device=cpu")
    score += (f"calibration.path={text}", f"test.path={text}", "calibration.tokens=512", "calibration.window=64")
    small = ("trace.duration_s=3", "hw.text=null", "budget.blocks=96", *overrides(checkpoint))
    return {
        "sim.replay": Command("sim.replay.__main__", (*trace, "iterations=true", "plot=true"), "SLO"),
        "sim.replay seeds": Command("sim.replay.__main__", (*trace, "seeds=[0,1]"), "seed"),
        "sim.compare": Command("sim.compare:compare_command", (*trace, "workers=1"), "dense"),
        "sim.cluster": Command("sim.cluster.run:cluster_command", trace, "SLO"),
        "sim.disaggregate": Command("sim.disaggregate.run:disaggregate_command", trace, "SLO"),
        "hw.replay": Command("hw.replay.run", small, "SLO"),
        "hw.score gsi": Command("hw.score.run", score, "", folder_key="out"),
    }


def run(folder: Path, path: Path, *, only: str = "") -> dict[str, Any]:
    """Run every command under every limit; save and return the figures."""
    content: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {"commands": {}}
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "files").mkdir(parents=True)
    warm_up()  # the children find the kernels loaded
    for name, command in commands(folder / "files").items():
        if only and only != name:
            continue
        found = fill_disk(command, folder / "run")
        figures = {key: getattr(found, key) for key in found.__dataclass_fields__}
        content["commands"][name] = {**figures, **made_now()}
        content["faults"] = sum(len(one["faults"]) for one in content["commands"].values())
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=1) + "\n")
        print(f"{name}: {found.runs} limits, {found.complete} complete, {len(found.faults)} faults", flush=True)
    return content


def limits(largest: int) -> Iterator[int]:
    """Yield limits on the size of a file, from none of it to more than the largest file of a run."""
    yield from (0, 1)
    limit = 64
    while limit < 2 * largest:
        yield from (limit, limit + limit // 3)
        limit *= 2
    yield limit


def fill_disk(command: Command, folder: Path) -> Found:
    """Run a command without a limit, then under each limit."""
    found, began_s = Found(), time.monotonic()
    status, printed = _run(command, folder, lambda: None)
    if status != 0:
        raise RuntimeError(f"{command.module} does not run: {printed[-800:]}")
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    first = {path.name for path in folder.rglob("*") if path.is_file()}
    for limit in limits(max(sizes)):
        status, printed = _run(command, folder, partial(_limit, limit))
        found.runs += 1
        found.limits.append(limit)
        _judge(command, folder, limit, status, printed, found, first)
    if not found.complete:
        found.faults.append({"what": "never complete", "limits": found.limits[-1:]})
    found.seconds = time.monotonic() - began_s
    return found


def _limit(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def _run(command: Command, folder: Path, before: Callable[[], None]) -> tuple[int, str]:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    place = folder / "score.json" if command.folder_key == "out" else folder
    arguments = [*command.arguments, f"{command.folder_key}={place}"]
    child = start(command.module, arguments, folder.with_suffix(".txt"), before=before, through_a_pipe=True)
    return child.wait(), child.text()


def _judge(
    command: Command, folder: Path, limit: int, status: int, printed: str, found: Found, names: set[str]
) -> None:
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
    has_begun = (folder / "provenance.json").exists() and (folder / "config.yaml").exists()
    if command.figure and has_begun and command.figure not in printed:
        fault("figures are lost", printed[-600:])
    figures = bool(command.figure) and command.figure in printed
    found.after_figures += figures
    found.at_once += not figures
