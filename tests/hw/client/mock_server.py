"""A server on loopback that sends exactly the bytes that a test wants."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

Step = bytes | float
"""Bytes to send, or seconds to wait."""
Script = Callable[[dict[str, Any]], Iterable[Step]]
"""From the body of a request to the response, with its head; afterwards the connection is closed."""


class MockServer:
    """Serves one script. bodies, heads: of the requests that came."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.bodies: list[dict[str, Any]] = []
        self.heads: list[str] = []
        self.url = ""

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[None]:
        """Listen; connections that are open at the end end with the event loop."""
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        yield
        server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            length = next(int(h.split(":")[1]) for h in head.splitlines() if h.lower().startswith("content-length"))
            body = json.loads(await reader.readexactly(length))
            self.heads.append(head)
            self.bodies.append(body)
            for step in self.script(body):
                if isinstance(step, float):
                    await asyncio.sleep(step)
                else:
                    writer.write(step)
                    await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # the client went away
        finally:
            writer.close()


@contextmanager
def serving(script: Script) -> Iterator[MockServer]:
    """Serve a script from another thread."""
    mock, started, stop = MockServer(script), threading.Event(), threading.Event()

    async def run() -> None:
        async with mock.listening():
            started.set()
            await asyncio.to_thread(stop.wait)

    thread = threading.Thread(target=lambda: asyncio.run(run()), daemon=True)
    thread.start()
    assert started.wait(10)
    yield mock
    stop.set()
    thread.join(10)


def head(status: str = "200 OK", kind: str | None = "text/event-stream", **headers: str) -> bytes:
    """Return the head of a response that ends with its connection."""
    lines = [f"HTTP/1.1 {status}", "connection: close", *(f"{name}: {value}" for name, value in headers.items())]
    if kind is not None:
        lines.append(f"content-type: {kind}")
    return "\r\n".join([*lines, "", ""]).encode()


def event(content: Any, end: str = "\n") -> bytes:
    """Return one server-sent event."""
    return f"data: {content if isinstance(content, str) else json.dumps(content)}{end}{end}".encode()


def text(piece: str | None, finish_reason: Any = None, **more: Any) -> dict[str, Any]:
    """Return a piece of a completion."""
    return {"choices": [{"index": 0, "text": piece, "finish_reason": finish_reason}], **more}


def chat(delta: Any, finish_reason: Any = None, **more: Any) -> dict[str, Any]:
    """Return a piece of a chat."""
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": finish_reason}], **more}


def usage(prompt_tokens: Any, completion_tokens: Any) -> dict[str, Any]:
    """Return an event with token counts alone."""
    return {"choices": [], "usage": {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens}}


DONE = "[DONE]"


def plain(body: dict[str, Any]) -> Iterator[Step]:
    """Answer with the requested tokens, one a piece, as vLLM does."""
    yield head()
    for _ in range(body["max_tokens"]):
        yield event(text("a"))
    prompt = body.get("prompt")
    yield event(usage(len(prompt) if isinstance(prompt, list) else 10, body["max_tokens"]))
    yield event(DONE)
