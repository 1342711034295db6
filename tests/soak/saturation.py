"""hw.serve at saturation: many clients, of which some leave early, and a change of the plan every second.

Memory, file descriptors and threads of the server are sampled all the time. At the end no request may hold KV.
"""

from __future__ import annotations

import asyncio
import csv
import json
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tests.soak import figures
from tests.soak.loopback import HOST, Child, exchange, head, metrics, serve, status_of
from tests.soak.tiny_checkpoint import LAYERS

CLIENTS = 40
MOST_WAITING = 32
LEAVE_SHARE = 0.36
"""Of all requests sent, how many clients leave early: more than 30 %, for the server has by then ended some of them."""
STREAM_SHARE = 0.5
FIRST_PAUSE_S = 0.2
LONGEST_PAUSE_S = 6.4
"""How long a refused client waits: twice as long after every further refusal."""
SAMPLE_S = 10.0
SETTLE_S = 600.0
"""Growth is counted from here on: caches and pools of memory have filled."""
DRAIN_S = 120.0
PAGE_BYTES = 4096
NAMES = {
    "running": "vllm:num_requests_running",
    "waiting": "vllm:num_requests_waiting",
    "kv_used": "rap:kv_used_layer_blocks",
    "arrived": "rap:requests_arrived_total",
    "tokens": "vllm:generation_tokens_total",
}
"""What a sample takes from the server's metrics, and the name there."""
ENDED = "vllm:request_success_total"
REASONS = ("stop", "length", "abort", "error")
"""Why a request that the server accepted ended, as its metrics count it."""


def random_plan(rng: random.Random) -> dict[str, Any]:
    """Return the options of a legal plan."""
    plan: dict[str, Any] = {}
    if rng.random() < 0.5:
        plan["drop_mha"] = [rng.randrange(LAYERS)]
    if rng.random() < 0.5:
        plan["drop_ffn"] = [rng.randrange(LAYERS)]
    if rng.random() < 0.5:
        plan["weight_bits"] = rng.choice([16, 8, 4])
    if rng.random() < 0.3:
        plan |= {"kv_first_tokens": rng.randrange(4), "kv_last_tokens": rng.randrange(1, 40)}
    if rng.random() < 0.2:
        plan["max_running"] = rng.randrange(2, 12)
    if rng.random() < 0.2:
        plan["max_waiting"] = rng.randrange(4, 64)
    return plan


def random_request(rng: random.Random) -> tuple[str, dict[str, Any], bool]:
    """Return the path and the body of a valid request, and whether it is streamed."""
    text = "".join(rng.choice("the keeper counts ships, é ☃\n") for _ in range(rng.randrange(1, 200)))
    body: dict[str, Any] = {"max_tokens": rng.randrange(1, 48), "ignore_eos": rng.random() < 0.5}
    streamed = rng.random() < STREAM_SHARE
    if streamed:
        body |= {"stream": True, "stream_options": {"include_usage": rng.random() < 0.5}}
    if rng.random() < 0.5:
        return "/v1/chat/completions", {**body, "messages": [{"role": "user", "content": text}]}, streamed
    return "/v1/completions", {**body, "prompt": text}, streamed


class Load:
    """The clients and what they have seen: answers by status, requests that they left, and requests without an answer.

    until_s: when clients send their last request, by the monotonic clock.
    """

    def __init__(self, port: int, seed: int, duration_s: float) -> None:
        self.port, self._rng = port, random.Random(seed)
        self.start_s = time.monotonic()
        self.until_s = self.start_s + duration_s
        self.statuses: Counter[int] = Counter()
        self.left: Counter[str] = Counter()
        self.sent = self.unanswered = self.hanging = self.cut = self.refused_late = self.plans = 0
        self.plan_statuses: Counter[int] = Counter()

    def end(self) -> None:
        """Let clients send no more requests from now on."""
        self.until_s = min(self.until_s, time.monotonic())

    def goes_on(self) -> bool:
        """Return whether clients go on to send requests."""
        return time.monotonic() < self.until_s

    async def client(self) -> None:
        """Send one request after another; wait longer after each refusal in a row."""
        pause_s = FIRST_PAUSE_S
        while self.goes_on():
            path, body, streamed = random_request(self._rng)
            self.sent += 1
            leaves = self.left.total() < LEAVE_SHARE * self.sent and self._rng.random() < 0.5
            try:
                status = await self._one(path, body, streamed, leaves=leaves)
            except (OSError, EOFError):
                self.unanswered += 1
                await asyncio.sleep(0.1)
                continue
            if status != 429:
                pause_s = FIRST_PAUSE_S
                continue
            await asyncio.sleep(pause_s * self._rng.uniform(0.5, 1.0))
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    async def _one(self, path: str, body: Mapping[str, Any], streamed: bool, *, leaves: bool) -> int | None:
        """Send a request; return the status of the answer, None if the client left before it was complete."""
        raw = json.dumps(body).encode()
        reader, writer = await asyncio.open_connection(HOST, self.port)
        try:
            writer.write(head("POST", path, raw) + raw)
            await writer.drain()
            patience_s = self._rng.expovariate(5.0) if leaves and not streamed else None
            try:
                answer = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), patience_s)
            except TimeoutError:
                self.left["not streamed"] += 1
                return None
            status = status_of(answer)
            if leaves and streamed and status == 200:
                for _ in range(self._rng.randrange(8)):
                    await reader.readline()
                self.left["streamed"] += 1
                return None
            rest = await reader.read()
            self.statuses[status] += 1
            if status == 200 and streamed and b"data: [DONE]" not in rest:
                self.refused_late += b'"error"' in rest
                self.cut += b'"error"' not in rest
            return status
        finally:
            writer.close()

    async def change_plans(self) -> None:
        """Set another plan every second."""
        while self.goes_on():
            status, _ = await exchange(self.port, "PUT", "/plan", random_plan(self._rng))
            self.plans += 1
            self.plan_statuses[status] += 1
            await asyncio.sleep(1.0)


def resources(process_id: int) -> dict[str, float]:
    """Return the resident memory, file descriptors and threads of a process."""
    folder = Path("/proc") / str(process_id)
    resident = int((folder / "statm").read_text().split()[1]) * PAGE_BYTES
    fields = (folder / "stat").read_text().rpartition(")")[2].split()
    return {
        "resident_mb": resident / 1e6,
        "file_descriptors": len(list((folder / "fd").iterdir())),
        "threads": int(fields[17]),
        "cpu_s": (int(fields[11]) + int(fields[12])) / 100.0,
    }


async def sample(child: Child, start_s: float) -> dict[str, float]:
    """Return one row of samples."""
    row = {"time_s": time.monotonic() - start_s, **resources(child.process.pid)}
    _, text = await exchange(child.port, "GET", "/metrics")
    found = metrics(text.decode())
    row |= {name: found.get(key, float("nan")) for name, key in NAMES.items()}
    for reason in REASONS:
        row[reason] = metrics(text.decode(), f'finished_reason="{reason}"').get(ENDED, float("nan"))
    return row


async def run_load(child: Child, load: Load, keep: Callable[[Sequence[Mapping[str, float]]], None]) -> None:
    """Load the server and sample it; then wait until it has nothing left to do, and sample once more.

    SIGTERM or Ctrl-C ends the load early. ``keep`` gets all samples so far after each one.
    """
    rows = []
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, load.end)
    tasks = [asyncio.create_task(load.client()) for _ in range(CLIENTS)]
    tasks.append(asyncio.create_task(load.change_plans()))
    while load.goes_on() and child.alive():
        await asyncio.sleep(min(SAMPLE_S, max(0.1, load.until_s - time.monotonic())))
        rows.append(await sample(child, load.start_s))
        keep(rows)
    await asyncio.wait(tasks, timeout=DRAIN_S)
    load.hanging = sum(not task.done() for task in tasks)
    for task in tasks:
        task.cancel() if not task.done() else task.result()
    deadline = time.monotonic() + DRAIN_S
    while child.alive():
        rows.append(await sample(child, load.start_s))
        last = rows[-1]
        if last["running"] == last["waiting"] == last["kv_used"] == 0 or time.monotonic() > deadline:
            break
        await asyncio.sleep(1.0)
    keep(rows)


def write_rows(path: Path, rows: Sequence[Mapping[str, float]]) -> None:
    """Write samples as CSV."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: round(value, 3) for name, value in row.items()} for row in rows)


def growth(rows: Sequence[Mapping[str, float]], load_s: float) -> dict[str, float]:
    """Return how resident memory grew by a straight line through the samples under load, after the first minutes."""
    from_s = min(SETTLE_S, load_s / 3)
    used = [row for row in rows if from_s <= row["time_s"] <= load_s]
    if len(used) < 3:
        return {"fit_from_s": from_s, "samples": len(used)}
    time_s, resident = np.array([row["time_s"] for row in used]), np.array([row["resident_mb"] for row in used])
    arrived = np.array([row["arrived"] for row in used])
    slope = float(np.polyfit(time_s, resident, 1)[0])
    per_request = slope * 1e6 / max(1e-9, float(np.polyfit(time_s, arrived, 1)[0]))
    return {
        "fit_from_s": from_s,
        "samples": len(used),
        "mb_per_hour": slope * 3600,
        "bytes_per_request": per_request,
        "first_mb": float(resident[0]),
        "last_mb": float(resident[-1]),
        "most_mb": float(resident.max()),
    }


def between(rows: Sequence[Mapping[str, float]], name: str) -> list[float]:
    """Return the lowest and the highest value of a column of samples."""
    return [min(row[name] for row in rows), max(row[name] for row in rows)]


def run(duration_s: float, folder: Path, out: Path, *, seed: int = 0) -> dict[str, Any]:
    """Serve under load for ``duration_s`` seconds; return the figures.

    ``out`` gets saturation.csv and saturation.json after every sample, so that a run that is ended in any way leaves
    them: ``died`` and ``exit_status`` are only in those of a complete one.
    """
    made_now = figures.made_now()
    with serve(folder, "budget.blocks=96", f"serve.max_waiting={MOST_WAITING}") as child:
        load = Load(child.port, seed, duration_s)
        found: dict[str, Any] = {}

        def keep(rows: Sequence[Mapping[str, float]]) -> None:
            load_s = min(load.until_s, time.monotonic()) - load.start_s
            found.update(made_now, **seen_by_clients(load), **seen_of_the_server(rows, load_s))
            found["tracebacks"] = child.printed().count("Traceback")
            figures.save(out / "saturation.json", found)
            write_rows(out / "saturation.csv", rows)

        asyncio.run(run_load(child, load, keep))
        found["died"] = not child.alive()
        child.process.send_signal(signal.SIGTERM)
        found["exit_status"] = child.process.wait(timeout=120)
    found["tracebacks"] = child.printed().count("Traceback")
    figures.save(out / "saturation.json", found)
    return found


def seen_by_clients(load: Load) -> dict[str, Any]:
    """Return the figures of the clients."""
    return {
        "clients": CLIENTS,
        "max_waiting": MOST_WAITING,
        "requests_sent": load.sent,
        "answers_by_status": {str(k): v for k, v in sorted(load.statuses.items())},
        "left": dict(load.left),
        "streams_refused_by_the_plan": load.refused_late,
        "streams_cut_short": load.cut,
        "requests_without_answer": load.unanswered,
        "clients_without_end": load.hanging,
        "plan_changes": load.plans,
        "plan_answers_by_status": {str(k): v for k, v in sorted(load.plan_statuses.items())},
        "server_errors": sum(n for k, n in (load.statuses + load.plan_statuses).items() if k >= 500),
    }


def seen_of_the_server(rows: Sequence[Mapping[str, float]], load_s: float) -> dict[str, Any]:
    """Return the figures of the samples; ``load_s``: how long the server was under load."""
    settled = [row for row in rows if row["time_s"] >= min(SETTLE_S, load_s / 3)] or rows
    last = rows[-1]
    return {
        "load_s": load_s,
        "accepted": sum(last[reason] for reason in REASONS),
        "accepted_by_end": {reason: last[reason] for reason in REASONS},
        "arrived": last["arrived"],
        "tokens": last["tokens"],
        "server_cpu_s": last["cpu_s"],
        "mean_running": _mean(settled, "running"),
        "mean_waiting": _mean(settled, "waiting"),
        "last": {name: last[name] for name in ("running", "waiting", "kv_used")},
        "growth": growth(rows, load_s),
        "file_descriptors": between(settled, "file_descriptors"),
        "last_file_descriptors": last["file_descriptors"],
        "threads": between(settled, "threads"),
    }


def _mean(rows: Sequence[Mapping[str, float]], name: str) -> float:
    return sum(row[name] for row in rows) / len(rows)
