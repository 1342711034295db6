"""kill -9 at random moments of commands that write files: nothing half-written, and the same results afterwards."""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sim.results.run_folder import commit
from tests.soak import figures
from tests.soak.commands import Command, replay_command, score_command
from tests.soak.forked import Run, start
from tests.soak.run_files import differences, half_written, leftovers, results
from tests.warm_up import main as warm_up

CLOCKS = ("cpu_seconds", "earlier_cpu_seconds", "seconds", "sample_seconds", "learn_seconds", "date", "command")
"""Keys of results that state how and how fast they were made; a run that was continued states another command."""
REFUSED = "already holds"
"""In the message of a command whose folder has a complete run."""
SKIPPED = "holds this run already"
"""In what a sweep prints of a job whose folder has the complete run of that job."""


@dataclass(frozen=True, slots=True)
class Scenario:
    """One command that is killed.

    again: what the second run adds to the command. share: of all kills.
    ready: whether the run in a folder has come so far that it may be killed.
    ignore: files that may be incomplete, because nothing names them yet.
    """

    name: str
    command: Command
    share: float
    again: tuple[str, ...] = ()
    ready: Callable[[Path], bool] = lambda _: True
    ignore: Callable[[Path], bool] = lambda _: False


def scenarios(files: Path) -> list[Scenario]:
    """Return all scenarios; ``files`` is where what they read is written."""
    files.mkdir(parents=True, exist_ok=True)
    trace = ("trace=poisson", "trace.rate_rps=60", "trace.duration_s=30")
    sweep = replay_command("--multirun", *trace, "seed=0,1,2", folder_key="hydra.sweep.dir")
    train = ("algorithm=ppo", "algorithm.steps_an_iteration=256", "algorithm.minibatch=128", "algorithm.epochs=2")
    train += ("num_envs=8", "hidden=[16]", "validate_every=1", "minutes=10", "iterations=12", "checkpoint_minutes=0")
    return [
        Scenario("sim.replay", replay_command(*trace, "iterations=true"), 0.3),
        Scenario("sim.replay seeds", replay_command(*trace, "seeds=[0,1,2]"), 0.2),
        Scenario("sim.replay --multirun", sweep, 0.2),
        Scenario("hw.score gsi", score_command(files, tokens=4096, sentences=2000), 0.24),
        Scenario(
            "agents.train",
            Command("agents.training.train", train),
            0.06,
            again=("resume=true",),
            ready=lambda folder: (folder / "checkpoint.json").exists(),
            ignore=lambda path: "checkpoint_" in str(path.parent),
        ),
    ]


@dataclass(slots=True)
class Count:
    """What happened to one scenario. kills: runs that were killed; ended_before: further runs that were too quick."""

    kills: int = 0
    ended_before: int = 0
    before_any_file: int = 0
    complete_already: int = 0
    leftovers: int = 0
    equal: int = 0
    seconds: float = 0.0
    not_compared: list[str] = field(default_factory=list)
    faults: list[dict[str, Any]] = field(default_factory=list)


def run(count: int, folder: Path, path: Path, *, only: str = "", seed: int = 0) -> dict[str, Any]:
    """Kill ``count`` runs; save the figures after every scenario, and return them."""
    shutil.rmtree(folder, ignore_errors=True)
    warm_up()  # the children find the kernels loaded
    for scenario in scenarios(folder / "files"):
        if only and only != scenario.name:
            continue
        found = kill_often(scenario, max(1, round(count * scenario.share)), folder / "runs", random.Random(seed))
        figures.add(path, "scenarios", scenario.name, asdict(found))
        print(f"{scenario.name}: {found.kills} kills, {found.equal} equal, {len(found.faults)} faults", flush=True)
    return figures.read(path)


def kill_often(scenario: Scenario, kills: int, folder: Path, rng: random.Random) -> Count:
    """Kill runs of one scenario and run each again."""
    found, began_s, present = Count(), time.monotonic(), commit()
    place = folder / "run"  # always the same one: its name is part of some results
    references, times = [], []
    for number in range(3):  # the first one fills caches
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        child = start(scenario.command.module, scenario.command.line(place), folder / "printed")
        if child.wait() != 0:
            raise RuntimeError(f"{scenario.name} does not run: {child.text()[-800:]}")
        times.append(time.monotonic() - child.started_s)
        references.append(results(place))
        if number == 1 and scenario.share < 0.15:
            break
    clock = differences(references[-1], references[-2])  # times and dates, which differ between equal runs
    found.not_compared = sorted({name.rpartition("/")[2] for name in clock})[:40]
    clock |= {name for name in references[-1] if name.rpartition(":")[2] in CLOCKS}
    while found.kills < kills:
        if found.ended_before > 2 * kills:
            raise RuntimeError(f"{scenario.name}: {found.ended_before} runs ended before they could be killed")
        shutil.rmtree(place, ignore_errors=True)
        _one(scenario, place, min(times), (references[-1], clock), found, rng)
    if commit() != present:  # which is part of the results
        raise RuntimeError(f"{present} was checked out at first, {commit()} is now; run this in a clone of its own")
    found.seconds = time.monotonic() - began_s
    return found


def _one(
    scenario: Scenario,
    folder: Path,
    usual_s: float,
    reference: tuple[dict[str, Any], set[str]],
    found: Count,
    rng: random.Random,
) -> None:
    folder.mkdir(parents=True)
    printed = folder.with_suffix(".txt")
    child = start(scenario.command.module, scenario.command.line(folder), printed)
    _kill_at_random(child, scenario, folder, usual_s, rng)
    if child.status == 0:
        found.ended_before += 1
        return
    found.kills += 1
    found.before_any_file += not any(folder.iterdir())
    found.leftovers += bool(leftovers(folder))
    if broken := half_written(folder, ignore=scenario.ignore):
        found.faults.append({"what": "half-written", "files": broken})
    wanted, clock = reference
    if not _again(scenario, folder, printed, found):
        return
    if different := sorted(differences(results(folder), wanted) - clock):
        found.faults.append({"what": "other results", "names": different[:20]})
    else:
        found.equal += 1


def _again(scenario: Scenario, folder: Path, path: Path, found: Count) -> bool:
    """Run the command again; return whether it ended well.

    A run that was complete when it was killed is refused, and complete jobs of a sweep are skipped.
    """
    child = start(scenario.command.module, scenario.command.line(folder, *scenario.again), path)
    status, printed = child.wait(), child.text()
    complete = (status == 0 and SKIPPED in printed) or (status == 2 and REFUSED in printed)
    if "Traceback" not in printed and (status == 0 or complete):
        found.complete_already += complete
        return True
    found.faults.append({"what": "does not run again", "status": status, "printed": printed[-800:]})
    return False


def _kill_at_random(child: Run, scenario: Scenario, folder: Path, usual_s: float, rng: random.Random) -> None:
    """Kill a child: half of the time at any moment, otherwise after its first file."""
    late = rng.random() < 0.5
    while child.look() is None:
        begun = any(folder.iterdir()) if late else True
        if begun and scenario.ready(folder):
            break
        time.sleep(0.001)
    left_s = max(0.0, usual_s - (time.monotonic() - child.started_s))
    # Most files are written within the last part of a run.
    time.sleep(rng.uniform(0.0, left_s if rng.random() < 0.7 else left_s / 20))
    if child.look() is None:
        child.kill()
