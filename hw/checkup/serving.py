"""Step: the server on loopback: streamed requests, of which some are aborted, then SIGTERM; nothing may be left."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from hw.checkup.findings import Findings
from hw.checkup.setup import Setup

ABORTED_SHARE = 0.3
TOKENS_BEFORE_ABORT = 3
AT_ONCE = 32
SETTLES_S = 10.0
STOPS_S = 15.0
REQUEST_S = 60.0


@dataclass
class Answers:
    """What the clients saw. errors: reason -> number of requests."""

    complete: int = 0
    aborted: int = 0
    tokens: int = 0
    ttft_s: list[float] = field(default_factory=list)
    errors: dict[str, int] = field(default_factory=dict)


def run(setup: Setup, findings: Findings) -> None:
    """Start the server, send the requests, and stop it."""
    amounts = setup.amounts
    budget = setup.budget_bytes(amounts.kv_tokens[0])
    hardware = [f"hw.device={setup.device}", "hw.text=null", f"engine={amounts.engine}"]
    command = [
        *(sys.executable, "-m", "hw.serve", *hardware, *setup.overrides),
        *(f"workspace_bytes={amounts.workspace_bytes}", "budget=steps", "budget.unit=bytes"),
        *(f"budget.rows=[[0,{budget}]]", "serve.port=0", "serve.drain_s=10"),
        f"hydra.run.dir={setup.folder('serving')}",
    ]
    print(" ".join(command), flush=True)
    log = setup.folder("server.txt")
    with log.open("wb") as output:
        start_s = time.monotonic()
        server = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        try:
            url = _wait_for_url(server, log, max(setup.limit_s - 5.0, 10.0))
            findings.figure("started_s", time.monotonic() - start_s)
            begin_s = time.monotonic()
            answers = asyncio.run(_send(url, setup))
            seconds = time.monotonic() - begin_s
            _check_answers(findings, answers, seconds, amounts.streams)
            held = _wait_until_idle(url)
            findings.check("KV held after all requests", held == 0, held, "0")
            begin_s = time.monotonic()
            server.send_signal(signal.SIGTERM)
            code = server.wait(timeout=STOPS_S)
            findings.figure("stopped_s", time.monotonic() - begin_s)
            findings.check("exit status after SIGTERM", code == 0, code, "0")
        finally:
            server.kill()
            server.wait()
            print(log.read_text(encoding="utf-8", errors="replace")[-3000:], flush=True)


def _wait_for_url(server: subprocess.Popen[bytes], log: Path, most_s: float) -> str:
    end_s = time.monotonic() + most_s
    while time.monotonic() < end_s:
        found = re.search(r"serving \S+ at (http://\S+?)(?:;|\s|$)", log.read_text(encoding="utf-8", errors="replace"))
        if found:
            return found[1]
        if server.poll() is not None:
            raise RuntimeError(f"the server ended with status {server.returncode} before it listened")
        time.sleep(0.1)
    raise RuntimeError(f"the server did not listen within {most_s:.0f} s")


async def _send(url: str, setup: Setup) -> Answers:
    """Send all requests, a few at once; every third or so is aborted after some tokens."""
    rng = np.random.default_rng(setup.seed)
    answers, gate, amounts = Answers(), asyncio.Semaphore(AT_ONCE), setup.amounts
    limits = httpx.Limits(max_connections=AT_ONCE)
    async with httpx.AsyncClient(base_url=url, timeout=REQUEST_S, limits=limits, trust_env=False) as client:

        async def one(number: int) -> None:
            prompt = rng.integers(1, setup.model.vocab_size, size=amounts.prompt_tokens).tolist()
            aborts = (number * ABORTED_SHARE) % 1.0 < ABORTED_SHARE
            body = {"prompt": prompt, "max_tokens": amounts.output_tokens, "stream": True, "ignore_eos": True}
            async with gate:
                try:
                    await _stream(client, body, aborts, answers)
                except (httpx.HTTPError, ValueError, KeyError) as error:
                    reason = f"{type(error).__name__}: {error}"[:200]
                    answers.errors[reason] = answers.errors.get(reason, 0) + 1

        await asyncio.gather(*(one(number) for number in range(amounts.streams)))
    return answers


async def _stream(client: httpx.AsyncClient, body: dict[str, Any], aborts: bool, answers: Answers) -> None:
    start_s, seen = time.monotonic(), 0
    async with client.stream("POST", "/v1/completions", json=body) as response:
        if response.status_code != 200:
            text = (await response.aread()).decode(errors="replace")
            raise ValueError(f"status {response.status_code}: {text[:120]}")
        async for line in response.aiter_lines():
            if not line.startswith("data: "):
                continue
            if line == "data: [DONE]":
                answers.complete += 1
                return
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                raise ValueError(str(event["error"]))
            if not seen:
                answers.ttft_s.append(time.monotonic() - start_s)
            seen += 1
            answers.tokens += 1
            if aborts and seen >= TOKENS_BEFORE_ABORT:
                answers.aborted += 1
                return  # leaving the block closes the connection
    raise ValueError("the answer ended without [DONE]")


def _check_answers(findings: Findings, answers: Answers, seconds: float, sent: int) -> None:
    findings.figure("answers", {"complete": answers.complete, "aborted": answers.aborted, "errors": answers.errors})
    findings.figure("events_per_s", answers.tokens / seconds)
    findings.figure("ttft_p50_s", float(np.median(answers.ttft_s)) if answers.ttft_s else None)
    ended = answers.complete + answers.aborted
    findings.check("requests answered or aborted", ended == sent, ended, str(sent))


def _wait_until_idle(url: str) -> float | None:
    """Return the KV blocks that are held once nothing runs, or after a while."""
    end_s, held = time.monotonic() + SETTLES_S, None
    with httpx.Client(base_url=url, timeout=REQUEST_S, trust_env=False) as client:
        while time.monotonic() < end_s:
            found = re.search(r"^rap:kv_used_layer_blocks\{.*?\} (\S+)$", client.get("/metrics").text, re.MULTILINE)
            held = float(found[1]) if found else None
            if held == 0:
                break
            time.sleep(0.2)
    return held
