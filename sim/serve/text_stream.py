"""Turns the tokens of an answer into text, piece by piece: no split characters, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

INCOMPLETE = "\ufffd"
"""What a tokenizer writes for the bytes of a character that is not complete."""


class Detokenizer:
    """Text of one answer, as its tokens come.

    Only the last few tokens are decoded again, because the text of a token depends on those before it.
    """

    def __init__(self, tokenizer: Any) -> None:
        """Begin with no tokens."""
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._context, self._written = 0, 0  # tokens before these are left out; tokens before these are written

    def add(self, token: int, last: bool) -> str:
        """Return the text that a token adds; a character comes with the token that completes it."""
        self._tokens.append(token)
        before = self._decode(self._tokens[self._context : self._written])
        text = self._decode(self._tokens[self._context :])
        if text.endswith(INCOMPLETE) and not last:
            return ""
        self._context, self._written = self._written, len(self._tokens)
        return text[len(before) :]

    def _decode(self, tokens: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=True)
        return text


class StopStrings:
    """Ends a text before the first stop string in it, which may come in several pieces."""

    def __init__(self, stops: Sequence[str]) -> None:
        """Look for any of these, none of them empty."""
        self._stops = stops
        self._held = ""

    def add(self, text: str, last: bool) -> tuple[str, bool]:
        """Return the text that can be sent now, and whether a stop string was found.

        What may be the beginning of a stop string is held back until more text has come.
        """
        text = self._held + text
        found = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self._held = ""
            return text[: min(found)], True
        held = 0 if last else max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held], False


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest beginning of ``stop`` with which ``text`` ends."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
