"""Feeds hostile inputs to the project in worker processes, watches them, and stores every kind of fault once.

An input is made from its kind and its number alone, so ``python -m tests.soak one KIND NUMBER`` feeds it again.
"""

from __future__ import annotations

import importlib
import logging
import multiprocessing
import os
import random
import resource
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings

from tests.soak import figures
from tests.soak.kinds import Case, Kind, Outcome, judge

KINDS = {
    "traces": ("trace_inputs", "Traces"),
    "requests": ("request_inputs", "Requests"),
    "plans": ("plan_inputs", "Plans"),
    "policies": ("policy_inputs", "Policies"),
    "links": ("link_inputs", "Links"),
    "files": ("file_inputs", "Files"),
    "http": ("http_inputs", "Http"),
}
"""Name on the command line -> module and class."""
SHARES = {"traces": 0.3, "requests": 0.2, "plans": 0.17, "policies": 0.08, "links": 0.12, "files": 0.1, "http": 0.03}
"""How the inputs are divided among the kinds."""

LONGEST_S = 5.0
"""Processor seconds that one input may take."""
LONGEST_WALL_S = 120.0
"""Seconds that one input may take when it does not compute: the machine may be shared."""
MOST_BYTES = 2**30
"""Memory that one input may take in addition to what the process held before."""
OF_HYPOTHESIS = 50
LOOK_S = 0.25
BATCH = 100
WARM_UP = -20
NONE = -(2**40)
"""Shown by a worker between two inputs."""


@dataclass(slots=True)
class Tally:
    """Counts of one kind, and one example of each fault."""

    verdicts: Counter[str] = field(default_factory=Counter)
    targets: Counter[str] = field(default_factory=Counter)
    faults: dict[str, dict[str, Any]] = field(default_factory=dict)
    fault_counts: Counter[str] = field(default_factory=Counter)
    slowest_s: float = 0.0
    most_mb: float = 0.0

    def add_fault(self, label: str, number: int, detail: str, case: Case) -> None:
        """Count a fault; keep its first example."""
        self.verdicts["fault"] += 1
        self.fault_counts[label] += 1
        if label not in self.faults or len(case.content) < self.faults[label]["bytes"]:
            shown = case.content[:400].decode("latin-1")
            self.faults[label] = {
                "number": number,
                "detail": detail,
                "target": case.target,
                "bytes": len(case.content),
                "content": shown,
                "options": {k: str(v) for k, v in case.options.items()},
            }


def build(kind: str, folder: Path) -> Kind:
    """Build a kind by its name in KINDS, or by MODULE:CLASS."""
    module, name = KINDS.get(kind) or kind.split(":")
    made: Kind = getattr(importlib.import_module(f"tests.soak.{module}"), name)(folder)
    return made


def case_of(made: Kind, number: int) -> Case:
    """Return an input by its number: of every thousand, the first OF_HYPOTHESIS are examples of hypothesis."""
    block, place = divmod(number, 1000)
    if number >= 0 and place < OF_HYPOTHESIS and hasattr(made, "strategy"):
        found = _examples(made, block)
        if place < len(found):
            return found[place]
    return made.make(random.Random(f"{made.name}:{number}"))


def _examples(made: Any, block: int) -> list[Case]:
    """Return examples of a kind's strategy; the last block is kept, as numbers come in order."""
    key = (made.name, block)
    if key not in _EXAMPLES:
        found: list[Case] = []

        @settings(
            max_examples=OF_HYPOTHESIS,
            database=None,
            deadline=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @seed(block)
        @given(made.strategy())
        def collect(case: Case) -> None:
            found.append(case)

        collect()
        _EXAMPLES.clear()
        _EXAMPLES[key] = found
    return _EXAMPLES[key]


_EXAMPLES: dict[tuple[str, int], list[Case]] = {}

# --- The worker ------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Batch:
    """What a worker has done since its last message. upto: the number of the next input."""

    upto: int
    verdicts: Counter[str] = field(default_factory=Counter)
    targets: Counter[str] = field(default_factory=Counter)
    faults: list[tuple[int, Outcome]] = field(default_factory=list)
    slowest_s: float = 0.0
    most_mb: float = 0.0


def _work(kind: str, numbers: Sequence[int], pipe: Connection, at: Any, limited: bool) -> None:
    """Feed inputs; ``at`` shows the number of the present one, and a batch is sent after every BATCH inputs."""
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory(prefix="soak-", dir=_quick_folder()) as folder:
        made = build(kind, Path(folder))
        for number in range(WARM_UP, 0):  # fill caches first, so that memory is counted from here on
            judge(made, case_of(made, number))
        if limited:
            size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (size + MOST_BYTES, resource.RLIM_INFINITY))
        batch = Batch(numbers[0] if numbers else 0)
        for done, number in enumerate(numbers, start=1):
            case = case_of(made, number)
            at.value = number
            _feed_one(made, case, number, batch)
            at.value = NONE
            batch.upto = number + 1
            if done % BATCH == 0 or done == len(numbers):
                pipe.send(batch)
                batch = Batch(number + 1)
        made.close()
    pipe.send(None)


def _feed_one(made: Kind, case: Case, number: int, batch: Batch) -> None:
    before_bytes, start_s = _peak_bytes(), time.process_time()
    outcome = judge(made, case)
    took_s, more = time.process_time() - start_s, _peak_bytes() - before_bytes
    batch.slowest_s, batch.most_mb = max(batch.slowest_s, took_s), max(batch.most_mb, more / 1e6)
    if outcome.verdict != "fault" and took_s > LONGEST_S:
        outcome = Outcome("fault", f"{case.target}: more than {LONGEST_S:g} s", f"{took_s:.1f} s, {outcome.verdict}")
    if outcome.verdict != "fault" and more > MOST_BYTES:
        outcome = Outcome("fault", f"{case.target}: more than 1 GiB", f"{more / 1e6:.0f} MB, {outcome.verdict}")
    batch.targets[case.target] += 1
    if outcome.verdict == "fault":
        batch.faults.append((number, outcome))
    else:
        batch.verdicts[outcome.verdict] += 1


def _quick_folder() -> str | None:
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# --- The watcher -----------------------------------------------------------------------------------------------------


def feed(kind: str, first: int, count: int, *, limited: bool = True) -> Tally:
    """Feed ``count`` inputs of a kind from number ``first`` on; a worker that ends or hangs is replaced."""
    tally, number, lost = Tally(), first, set[int]()
    while number < first + count:
        numbers = [n for n in range(number, first + count) if n not in lost]
        if not numbers:
            break
        number = _watch(kind, numbers, tally, lost, limited)
    return tally


def _watch(kind: str, numbers: Sequence[int], tally: Tally, lost: set[int], limited: bool) -> int:
    """Run one worker until it ends; return the number from which on inputs have not been counted."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    at = context.Value("q", NONE, lock=False)
    worker = context.Process(target=_work, args=(kind, numbers, theirs, at, limited), daemon=False)
    worker.start()
    theirs.close()
    upto, seen, cpu_s, wall_s = numbers[0], NONE, 0.0, time.monotonic()
    why = ""
    try:
        while not why:
            try:
                if ours.poll(LOOK_S):
                    batch: Batch | None = ours.recv()
                    if batch is None:
                        return numbers[-1] + 1
                    _count(tally, kind, batch)
                    upto = batch.upto
                    continue
            except EOFError:
                worker.join()
                why = f"the process ended ({_status(worker.exitcode)})"
                break
            if at.value == NONE or at.value != seen:
                seen, cpu_s, wall_s = at.value, _cpu_s(worker.pid), time.monotonic()
            elif _cpu_s(worker.pid) - cpu_s > LONGEST_S + 1.0:
                why = "no end: it computes"
            elif time.monotonic() - wall_s > LONGEST_WALL_S:
                why = "no end: it waits"
    finally:
        if worker.is_alive():
            worker.kill()
        worker.join()
    if at.value == NONE:
        raise RuntimeError(f"the worker of {kind} was lost between two inputs, after {upto}: {why}")
    lost.add(at.value)
    case = _again(kind, at.value)
    tally.targets[case.target] += 1
    tally.add_fault(f"{case.target}: {why}", at.value, why, case)
    return upto


def _count(tally: Tally, kind: str, batch: Batch) -> None:
    tally.targets.update(batch.targets)
    tally.verdicts.update(batch.verdicts)
    tally.slowest_s, tally.most_mb = max(tally.slowest_s, batch.slowest_s), max(tally.most_mb, batch.most_mb)
    for number, outcome in batch.faults:
        tally.add_fault(outcome.label, number, outcome.detail, _again(kind, number))


_MADE: dict[str, Kind] = {}


def _again(kind: str, number: int) -> Case:
    """Make an input once more, in the process of the watcher."""
    if kind not in _MADE:
        _MADE[kind] = build(kind, Path(tempfile.mkdtemp(prefix="soak-", dir=_quick_folder())))
    return case_of(_MADE[kind], number)


def _status(exit_code: int | None) -> str:
    return f"signal {-exit_code}" if exit_code is not None and exit_code < 0 else f"status {exit_code}"


def _cpu_s(process_id: int | None) -> float:
    try:
        fields = Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


# --- Slices, so that a run can be interrupted and go on --------------------------------------------------------------


def divide(total: int, kinds: Sequence[str] = tuple(SHARES)) -> dict[str, int]:
    """Return how many of ``total`` inputs each kind gets; the first takes what rounding leaves."""
    whole = sum(SHARES[kind] for kind in kinds)
    counts = {kind: int(total * SHARES[kind] / whole) for kind in kinds}
    counts[kinds[0]] += total - sum(counts.values())
    return counts


def run(
    total: int,
    slice_size: int,
    path: Path,
    *,
    kinds: Sequence[str] = tuple(SHARES),
    first: int = 0,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Feed ``total`` inputs slice by slice and save the figures of every slice in ``path``.

    The inputs of each kind have numbers from ``first`` on. A slice that the file holds without a fault is not played
    again; remove it there to repeat it.
    """
    content = {"slices": {}, **figures.read(path)}
    done: dict[str, Any] = content["slices"]
    for kind, count in divide(total, kinds).items():
        for start in range(first, first + count, slice_size):
            size = min(slice_size, first + count - start)
            key = f"{kind} {start}"
            if key in done and done[key]["inputs"] == size and not done[key]["faults"]:
                continue
            start_s = time.monotonic()
            tally = feed(kind, start, size)
            done[key] = {**_plain(tally), "inputs": size, "wall_s": time.monotonic() - start_s, **figures.made_now()}
            figures.save(path, content)
            say(f"{key}: {size} inputs, {dict(tally.verdicts)}, {len(tally.faults)} kinds of fault")
    return content


def _plain(tally: Tally) -> dict[str, Any]:
    return {
        "verdicts": dict(tally.verdicts),
        "targets": dict(sorted(tally.targets.items())),
        "faults": tally.faults,
        "fault_counts": dict(tally.fault_counts),
        "slowest_s": round(tally.slowest_s, 3),
        "most_mb": round(tally.most_mb, 1),
    }


def one(kind: str, number: int) -> Mapping[str, Any]:
    """Feed one input in this process and return it with what happened."""
    with tempfile.TemporaryDirectory() as folder:
        made = build(kind, Path(folder))
        case = case_of(made, number)
        found = judge(made, case)
        made.close()
    return {"target": case.target, "options": case.options, "content": case.content, "outcome": found}
