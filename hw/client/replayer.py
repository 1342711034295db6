"""Sends the requests of a trace and records when their tokens come."""

from __future__ import annotations

import asyncio
import json
import math
import re
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import anyio
import httpx
import numpy as np
from httpx_sse import EventSource

from hw.client.dialog import Dialog
from hw.client.payload import Payloads
from hw.client.settings import ClientSettings
from hw.client.stream import CUT, AnswerStream, StreamError, Timeline, message_of
from hw.client.target import Target
from sim.engine.protocol import Request, Sessions

MOST_ANSWER_CHARACTERS = 100_000_000
"""Of one answer; a piece of one token has about 300."""
MOST_ERROR_BYTES = 1 << 16
"""How much of the body of an error is read."""
MOST_REASON_CHARACTERS = 300


@dataclass(slots=True)
class Answer:
    """One request and what came back.

    arrival_s, sent_s: seconds since the start. timeline: the tokens, in seconds since the start; None unless the
    answer is complete. error: why the last attempt failed; None if it did not. retries: attempts after the first.
    ended_s: seconds since the start to the last token, or to the end of the last attempt. text: of a complete answer.
    """

    request: Request
    arrival_s: float
    sent_s: float = math.nan
    timeline: Timeline | None = None
    error: str | None = None
    retries: int = 0
    ended_s: float = math.nan
    text: str = ""


class Replayer:
    """Sends requests to one server.

    answers: one entry for each request that has arrived, complete or not; sorted by arrival once ``run`` has ended.
    """

    def __init__(
        self,
        settings: ClientSettings,
        target: Target,
        payloads: Payloads,
    ) -> None:
        """Connect to nothing yet.

        Raises:
            ConfigError: for settings out of range, or a proxy that cannot be used.
        """
        settings.check()
        self._settings, self._target, self._payloads = settings, target, payloads
        self._transport = target.transport(settings.max_connections)
        self._timeout_s = None if math.isinf(settings.timeout_s) else settings.timeout_s
        self.answers: list[Answer] = []
        self._ended = 0

    async def run(
        self,
        requests: Sequence[Request],
        on_progress: Callable[[float], None] = lambda _done: None,
        sessions: Sessions | None = None,
    ) -> list[Answer]:
        """Send all requests; return the answers in order of arrival.

        Args:
            on_progress: called with the number of requests that have ended, complete or not.
            sessions: which requests follow which, by their places in ``requests``.
        """
        self._on_progress = on_progress
        self._places = asyncio.Semaphore(self._settings.max_connections)
        try:
            async with httpx.AsyncClient(transport=self._transport, timeout=None, headers=self._target.headers) as http:
                await anyio.sleep(0)  # loads the network code, which takes 0.1 s that the first TTFT would include
                self._start_s = time.perf_counter()
                if sessions is not None:
                    starts = iter(sessions.starts.tolist())
                    own = np.flatnonzero(np.isnan(sessions.think_s)).tolist()
                    await asyncio.gather(*(self._turns(http, requests, sessions, first, starts) for first in own))
                elif self._settings.loop == "open":
                    await asyncio.gather(*(self._at_arrival(http, request) for request in requests))
                else:
                    waiting = iter(requests)
                    await asyncio.gather(*(self._user(http, waiting) for _ in range(self._settings.users)))
        finally:
            self.answers.sort(key=lambda answer: (answer.arrival_s, answer.request.request_id))
        return self.answers

    def _now_s(self) -> float:
        return time.perf_counter() - self._start_s

    async def _at_arrival(self, http: httpx.AsyncClient, request: Request) -> None:
        await asyncio.sleep(request.arrival_s - self._now_s())
        await self._send(http, Answer(request, request.arrival_s))

    async def _turns(
        self,
        http: httpx.AsyncClient,
        requests: Sequence[Request],
        sessions: Sessions,
        first: int,
        starts: Iterator[int],
    ) -> None:
        """Send the request ``first`` at its arrival, and all that follow it, each after an answer and a think time.

        starts: the sessions that wait for a user; this one takes the next of them when its own has ended.
        """
        place, arrival_s = first, requests[first].arrival_s
        dialog = Dialog(requests[first].request_id)
        while True:
            await asyncio.sleep(arrival_s - self._now_s())
            answer = Answer(requests[place], arrival_s)
            await self._send(http, answer, dialog)
            place = int(sessions.after[place])
            if place < 0:
                place = next(starts, -1)
                if place < 0:
                    return
                dialog = Dialog(requests[place].request_id)
            arrival_s = answer.ended_s + float(sessions.think_s[place])

    async def _user(self, http: httpx.AsyncClient, waiting: Iterator[Request]) -> None:
        for request in waiting:
            await self._send(http, Answer(request, self._now_s()))

    async def _send(self, http: httpx.AsyncClient, answer: Answer, dialog: Dialog | None = None) -> None:
        """Send a request until it is answered or retries are used up; record the outcome in ``answer``.

        dialog: what its prompt begins with; the turn is added to it.
        """
        self.answers.append(answer)
        request = answer.request
        message = self._payloads.message(request, dialog)
        async with self._places:
            for attempt in range(self._settings.retries + 1):
                answer.retries, answer.error = attempt, None
                stream = AnswerStream()
                try:
                    try:
                        async with asyncio.timeout(self._timeout_s):
                            await self._receive(http, answer, stream, self._payloads(request, message, dialog))
                    except (TimeoutError, httpx.TransportError):
                        if not stream.ended:  # otherwise only the connection was not closed properly
                            raise
                    answer.timeline = stream.timeline(request.output_tokens)
                    answer.text = stream.text
                    break
                except Exception as error:  # whatever a server sends, the other requests go on
                    answer.error = self._reason(error, started=stream.started)
        answer.ended_s = self._now_s() if answer.timeline is None else answer.timeline.piece_s[-1]
        if dialog is not None:
            dialog.add(message, answer.text, request.prompt_tokens + request.output_tokens)
        self._ended += 1
        self._on_progress(self._ended)

    async def _receive(
        self, http: httpx.AsyncClient, answer: Answer, stream: AnswerStream, body: dict[str, Any]
    ) -> None:
        """Send a request once and collect the events of its answer.

        Raises:
            StreamError: for an error of the server, or an answer that is no stream.
        """
        answer.sent_s = self._now_s()
        async with http.stream("POST", self._target.url, json=body) as response:
            kind = response.headers.get("content-type", "").partition(";")[0].strip().lower()
            if response.status_code != 200 or "json" in kind or "html" in kind:
                raise StreamError(await _refusal(response, kind))
            response.encoding = "utf-8-sig"  # events are UTF-8 by definition; this removes a byte order mark
            source = EventSource(cast(httpx.Response, _Events(response)))
            async for event in source.aiter_sse():
                stream.add(self._now_s(), event.data, kind=event.event)
                if stream.done:
                    return

    def _reason(self, error: Exception, *, started: bool) -> str:
        """Return why an attempt failed, in one line without the key; equal failures of several requests are equal."""
        detail = str(error) or type(error).__name__
        if isinstance(error, StreamError):
            reason = detail
        elif isinstance(error, TimeoutError):
            state = "the end of the answer" if started else "the first token"
            reason = f"client.timeout_s={self._settings.timeout_s:g} passed before {state}"
        elif isinstance(error, httpx.ConnectError | httpx.ProxyError):
            reason = f"no connection to {self._target.base}{self._by_proxy()}: {detail}"
        elif isinstance(error, httpx.TransportError):
            where = CUT if started else "the connection was cut before the first token"
            reason = f"{where}{self._by_proxy()}: {detail}"
        else:
            reason = f"{type(error).__name__}: {detail}"
        if self._target.key is not None:
            reason = reason.replace(self._target.key, "***")
        return _one_line(reason)

    def _by_proxy(self) -> str:
        return f" through the proxy {self._target.shown_proxy}" if self._target.proxy is not None else ""


class _Events:
    """The text of a response as ``EventSource`` reads it: limited, and taken for events whatever its content type."""

    headers = {"content-type": "text/event-stream"}  # noqa: RUF012

    def __init__(self, response: httpx.Response) -> None:
        self._response = response

    async def aiter_text(self) -> AsyncIterator[str]:
        """Yield the text as it comes.

        Raises:
            StreamError: for a text that is too long for an answer.
        """
        length = 0
        async for text in self._response.aiter_text():
            length += len(text)
            if length > MOST_ANSWER_CHARACTERS:
                raise StreamError(f"the answer has more than {MOST_ANSWER_CHARACTERS:,} characters")
            yield text
        yield "\n\n"  # some servers leave out the empty line after the last event


async def _refusal(response: httpx.Response, kind: str) -> str:
    """Return what a response says that is no stream."""
    raw = bytearray()
    async for chunk in response.aiter_bytes():
        raw += chunk
        if len(raw) > MOST_ERROR_BYTES:
            break
    text = bytes(raw[:MOST_ERROR_BYTES]).decode("utf-8", errors="replace")
    status = response.status_code
    if response.is_redirect:
        target = response.headers.get("location", "an unknown address")
        return f"HTTP {status}: the server redirects to {target}; set client.url to the new address"
    said = _said(text)
    if status == 200 and "json" in kind and not _has_error(text):
        return "the server answered without streaming (stream=true), so the times of its tokens are unknown"
    if status == 200 and "html" in kind:
        return f"the server answered with a web page ({said}); check client.url"
    hint = ""
    if status == 404:
        hint = "; check client.url and client.served_model"
    elif status in (401, 403):
        hint = "; set client.api_key to the name of an environment variable that holds the key"
    return f"HTTP {status}: {said}{hint}"


def _has_error(text: str) -> bool:
    try:
        body = json.loads(text)
    except (ValueError, RecursionError):
        return False
    return isinstance(body, dict) and bool(body.get("error"))


def _said(text: str) -> str:
    """Return the message in the body of an error: JSON in OpenAI's shape, the title of a web page, or the text."""
    try:
        return message_of(json.loads(text))
    except (ValueError, RecursionError):
        pass
    title = re.search(r"<title[^>]*>(.*?)</title>", text, flags=re.IGNORECASE | re.DOTALL)
    return title.group(1) if title else text or "no explanation"


def _one_line(text: str) -> str:
    """Return a text as one printable line of limited length; what a server sends may hold anything."""
    line = " ".join(text.split())
    line = "".join(c if c.isprintable() else "?" for c in line)
    return line if len(line) <= MOST_REASON_CHARACTERS else f"{line[:MOST_REASON_CHARACTERS]}..."
