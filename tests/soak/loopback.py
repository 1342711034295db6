"""``python -m hw.serve`` as a child process over the tiny checkpoint, and HTTP to it over plain sockets."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sim.paths import REPOSITORY
from tests.soak.tiny_checkpoint import overrides, write_checkpoint

HOST = "127.0.0.1"
START_S = 300.0
END_S = 120.0
JSON_TYPE = "content-type: application/json\r\n"


@dataclass(slots=True)
class Child:
    """The server's process, its port, and what it has printed."""

    process: subprocess.Popen[bytes]
    port: int
    log: Path

    def alive(self) -> bool:
        """Return whether the process runs."""
        return self.process.poll() is None

    def printed(self) -> str:
        """Return everything that the server has printed."""
        return self.log.read_text(errors="replace")


def free_port() -> int:
    """Return a port of loopback that was free a moment ago."""
    with socket.create_server((HOST, 0)) as server:
        return int(server.getsockname()[1])


@contextlib.contextmanager
def serve(folder: Path, *more: str) -> Iterator[Child]:
    """Serve the tiny model until the block ends; ``more`` are further overrides."""
    folder.mkdir(parents=True, exist_ok=True)
    port, log = free_port(), folder / "serve.log"
    command = [sys.executable, "-m", "hw.serve", *overrides(write_checkpoint(folder / "checkpoint"))]
    command += [f"serve.port={port}", f"hydra.run.dir={folder / 'run'}", *more]
    with log.open("wb") as printed:
        # A process group of its own: Ctrl-C ends the load, which then ends the server.
        process = subprocess.Popen(
            command, cwd=REPOSITORY, stdout=printed, stderr=subprocess.STDOUT, env=os.environ, process_group=0
        )
    child = Child(process, port, log)
    try:
        deadline = time.monotonic() + START_S
        while asyncio.run(exchange(port, "GET", "/v1/models"))[0] != 200:
            if not child.alive() or time.monotonic() > deadline:
                raise RuntimeError(f"hw.serve did not start: {child.printed()[-2000:]}")
            time.sleep(0.2)
        yield child
    finally:
        if child.alive():
            process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=END_S)
        if child.alive():
            process.kill()
            process.wait()


def head(method: str, path: str, body: bytes) -> bytes:
    """Return the head of a request that closes its connection."""
    lines = f"{method} {path} HTTP/1.1\r\nhost: {HOST}\r\nconnection: close\r\n{JSON_TYPE}"
    return f"{lines}content-length: {len(body)}\r\n\r\n".encode()


async def exchange(
    port: int, method: str, path: str, content: Any = None, *, wait_s: float = 60.0
) -> tuple[int, bytes]:
    """Send one request and return the status and the body; status 0 if no answer came."""
    body = content if isinstance(content, bytes) else b"" if content is None else json.dumps(content).encode()
    return await raw_exchange(port, head(method, path, body) + body, wait_s=wait_s)


async def raw_exchange(port: int, raw: bytes, *, wait_s: float = 60.0, ends: bool = False) -> tuple[int, bytes]:
    """Send bytes and return the status and the body of the answer; status 0 if none came, -1 if it took too long.

    Args:
        ends: say after the last byte that no more will come.
    """
    try:
        async with asyncio.timeout(wait_s):
            reader, writer = await asyncio.open_connection(HOST, port)
            try:
                writer.write(raw)
                await writer.drain()
                if ends:
                    writer.write_eof()
                answer = await reader.read()
            finally:
                writer.close()
    except TimeoutError:
        return -1, b""
    except OSError:
        return 0, b""
    return status_of(answer), answer.partition(b"\r\n\r\n")[2]


def status_of(answer: bytes) -> int:
    """Return the status of an answer, 0 if there is none."""
    words = answer.split(b" ", 2)
    return int(words[1]) if len(words) > 1 and words[0].startswith(b"HTTP/") and words[1].isdigit() else 0


def metrics(text: str, label: str = "") -> dict[str, float]:
    """Return the samples of Prometheus' text format by name; labels are left out, and equal names added.

    label: text of a label, such as ``reason="abort"``, that the samples must have.
    """
    found: dict[str, float] = {}
    for line in text.splitlines():
        if line and not line.startswith("#") and label in line:
            name, _, value = line.rpartition(" ")
            found[name.partition("{")[0]] = found.get(name.partition("{")[0], 0.0) + float(value)
    return found
