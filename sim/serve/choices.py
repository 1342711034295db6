"""The choices of one answer while the engine produces them: from tokens to pieces of text."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from sim.serve.engine_thread import EngineThread, ServedRequest
from sim.serve.text_stream import Detokenizer, StopStrings


@dataclass(frozen=True, slots=True)
class Piece:
    """What one token adds to a choice. first: whether it is the choice's first token. finish_reason: with its last."""

    index: int
    text: str
    first: bool
    finish_reason: str | None


@dataclass(slots=True)
class Choice:
    """One choice. produced: its tokens so far. finish_reason: None while it goes on."""

    served: ServedRequest
    detokenizer: Detokenizer
    stops: StopStrings
    produced: int = 0
    finish_reason: str | None = field(default=None)

    def add(self, index: int, token: int, last: bool) -> Piece:
        """Add a token. A stop string ends the choice, whatever the engine does."""
        self.produced += 1
        text, stopped = self.detokenizer.add(token, last), False
        if self.produced > self.served.min_tokens:
            text, stopped = self.stops.add(text, last)
        if stopped or last:
            self.served.stopped |= stopped
            self.finish_reason = "stop" if self.served.stopped else "length"
        return Piece(index, text, self.produced == 1, self.finish_reason)


class EndedEarlyError(Exception):
    """A request ended without its last token."""

    def __init__(self, served: ServedRequest) -> None:
        """Name the request, which says why."""
        super().__init__(served.error)
        self.served = served


class Choices:
    """All choices of one answer.

    The engine's thread passes tokens to the event loop, in which everything else happens.
    """

    def __init__(
        self, thread: EngineThread, tokenizer: Any, requests: Sequence[ServedRequest], stops: Sequence[str]
    ) -> None:
        """Collect the tokens of these requests, not submitted yet; their texts end at a stop string."""
        self._thread = thread
        self._tokens: asyncio.Queue[tuple[int, int | None, bool]] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def passes_on(index: int) -> Callable[[int | None, bool], None]:
            def pass_on(token: int | None, last: bool) -> None:
                loop.call_soon_threadsafe(self._tokens.put_nowait, (index, token, last))

            return pass_on

        self._choices = [Choice(served, Detokenizer(tokenizer), StopStrings(stops)) for served in requests]
        for index, served in enumerate(requests):
            served.on_token = passes_on(index)

    @property
    def produced(self) -> int:
        """Tokens so far, of all choices."""
        return sum(choice.produced for choice in self._choices)

    async def pieces(self) -> AsyncIterator[Piece]:
        """Yield one piece for each token, until all choices have ended.

        Raises:
            EndedEarlyError: if a request ends without its last token.
        """
        going_on = len(self._choices)
        while going_on:
            index, token, last = await self._tokens.get()
            choice = self._choices[index]
            if choice.finish_reason is not None:
                continue  # what the engine produced before it heard of the stop string
            if token is None:
                raise EndedEarlyError(choice.served)
            piece = choice.add(index, token, last)
            if piece.finish_reason is not None:
                going_on -= 1
                if not last:
                    self._thread.cancel(choice.served, "stop")
            yield piece

    def cancel(self) -> None:
        """End the requests that go on; called whenever the answer ends."""
        for choice in self._choices:
            if choice.finish_reason is None:
                self._thread.cancel(choice.served, "abort")
