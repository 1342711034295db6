"""Notices that a client has left before its answer was complete."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

Result = TypeVar("Result")


async def unless_disconnected(request: Request, work: Coroutine[None, None, Result]) -> Result:
    """Return the result of some work, which is canceled at once if the client leaves.

    Raises:
        ClientDisconnect: if it has left.
    """
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(_disconnect(request))
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        working.cancel()
        watching.cancel()


async def _disconnect(request: Request) -> None:
    """Wait until the client has left; its body has been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


class EventStream(StreamingResponse):
    """Server-sent events. ``at_end`` is called when the stream ends in any way, also before its first event."""

    def __init__(self, content: AsyncIterator[str], at_end: Callable[[], None]) -> None:
        """Stream this content."""
        super().__init__(content, media_type="text/event-stream")
        self._at_end = at_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Stream until the content or the connection ends."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._at_end()
