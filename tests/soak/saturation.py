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
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tests.soak.loopback import HOST, Child, exchange, head, metrics, serve, status_of
from tests.soak.provenance import made_now
from tests.soak.tiny_checkpoint import LAYERS

CLIENTS = 40
MOST_WAITING = 32
ABORT_SHARE = 0.3
STREAM_SHARE = 0.5
SAMPLE_S = 10.0
SETTLE_S = 600.0
"""Growth is counted from here on: caches and pools of memory have filled."""
DRAIN_S = 120.0
PAGE_BYTES = 4096
NAMES = {
    "running": ("rap_lab_requests_running", "vllm:num_requests_running"),
    "waiting": ("rap_lab_requests_waiting", "vllm:num_requests_waiting"),
    "kv_used": ("rap_lab_kv_used_layer_blocks", "vllm:kv_cache_usage_perc"),
    "arrived": ("rap_lab_requests_arrived_total", "rap:requests_arrived_total"),
    "tokens": ("rap_lab_produced_tokens_total", "vllm:generation_tokens_total"),
}
"""What a sample takes from the server's metrics: the names under which it may stand there."""


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
    """The clients and what they have seen: answers by status, aborted requests, and requests without an answer."""

    def __init__(self, port: int, seed: int) -> None:
        self.port, self._rng = port, random.Random(seed)
        self.statuses: Counter[int] = Counter()
        self.aborted: Counter[str] = Counter()
        self.sent = self.unanswered = self.cut = self.refused_late = self.plans = 0
        self.plan_statuses: Counter[int] = Counter()

    async def client(self, until_s: float) -> None:
        """Send one request after another."""
        while time.monotonic() < until_s:
            path, body, streamed = random_request(self._rng)
            self.sent += 1
            try:
                await self._one(path, body, streamed, aborts=self._rng.random() < ABORT_SHARE)
            except (OSError, EOFError):
                self.unanswered += 1
                await asyncio.sleep(0.1)

    async def _one(self, path: str, body: Mapping[str, Any], streamed: bool, *, aborts: bool) -> None:
        raw = json.dumps(body).encode()
        reader, writer = await asyncio.open_connection(HOST, self.port)
        try:
            writer.write(head("POST", path, raw) + raw)
            await writer.drain()
            if aborts and not streamed:
                await asyncio.sleep(self._rng.expovariate(5.0))
                self.aborted["not streamed"] += 1
                return
            answer = await reader.readuntil(b"\r\n\r\n")
            status = status_of(answer)
            if aborts and status == 200:
                for _ in range(self._rng.randrange(8)):
                    await reader.readline()
                self.aborted["streamed"] += 1
                return
            rest = await reader.read()
            self.statuses[status] += 1
            if status == 200 and streamed and b"data: [DONE]" not in rest:
                self.refused_late += b'"error"' in rest
                self.cut += b'"error"' not in rest
            if status == 429:
                await asyncio.sleep(0.2)
        finally:
            writer.close()

    async def change_plans(self, until_s: float) -> None:
        """Set another plan every second."""
        while time.monotonic() < until_s:
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
    for name, allowed in NAMES.items():
        row[name] = next((found[key] for key in allowed if key in found), float("nan"))
    return row


async def run_load(child: Child, duration_s: float, seed: int, csv_path: Path) -> tuple[Load, list[dict[str, float]]]:
    """Load the server and sample it; then wait until it has nothing left to do, and sample once more."""
    load, rows, start_s = Load(child.port, seed), [], time.monotonic()
    until_s = start_s + duration_s
    tasks = [asyncio.create_task(load.client(until_s)) for _ in range(CLIENTS)]
    tasks.append(asyncio.create_task(load.change_plans(until_s)))
    while time.monotonic() < until_s and child.alive():
        await asyncio.sleep(min(SAMPLE_S, max(0.1, until_s - time.monotonic())))
        rows.append(await sample(child, start_s))
        write_rows(csv_path, rows)
    await asyncio.gather(*tasks)
    deadline = time.monotonic() + DRAIN_S
    while child.alive():
        rows.append(await sample(child, start_s))
        last = rows[-1]
        if last["running"] == last["waiting"] == last["kv_used"] == 0 or time.monotonic() > deadline:
            break
        await asyncio.sleep(1.0)
    write_rows(csv_path, rows)
    return load, rows


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
    """Serve under load for ``duration_s`` seconds; write ``saturation.csv`` into ``out`` and return the figures."""
    out.mkdir(parents=True, exist_ok=True)
    with serve(folder, "budget.blocks=96", f"serve.max_waiting={MOST_WAITING}") as child:
        start_s = time.monotonic()
        load, rows = asyncio.run(run_load(child, duration_s, seed, out / "saturation.csv"))
        took_s, alive = time.monotonic() - start_s, child.alive()
        if alive:
            child.process.send_signal(signal.SIGTERM)
            exit_status = child.process.wait(timeout=120)
        else:
            exit_status = child.process.returncode
    settled = [row for row in rows if row["time_s"] >= min(SETTLE_S, duration_s / 3)] or rows
    last = rows[-1]
    return {
        **made_now(),
        "load_s": duration_s,
        "took_s": took_s,
        "clients": CLIENTS,
        "max_waiting": MOST_WAITING,
        "requests_sent": load.sent,
        "answers_by_status": {str(k): v for k, v in sorted(load.statuses.items())},
        "aborted": dict(load.aborted),
        "streams_refused_by_the_plan": load.refused_late,
        "streams_cut_short": load.cut,
        "requests_without_answer": load.unanswered,
        "plan_changes": load.plans,
        "plan_answers_by_status": {str(k): v for k, v in sorted(load.plan_statuses.items())},
        "server_errors": sum(n for k, n in (load.statuses + load.plan_statuses).items() if k >= 500),
        "arrived": last["arrived"],
        "tokens": last["tokens"],
        "server_cpu_s": last["cpu_s"],
        "at_the_end": {name: last[name] for name in ("running", "waiting", "kv_used")},
        "growth": growth(rows, duration_s),
        "file_descriptors": between(settled, "file_descriptors"),
        "file_descriptors_at_the_end": last["file_descriptors"],
        "threads": between(settled, "threads"),
        "ended_early": not alive,
        "exit_status": exit_status,
        "tracebacks": child.printed().count("Traceback"),
    }
