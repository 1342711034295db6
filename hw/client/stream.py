"""Token times of one answer, from the server-sent events of its stream and the moments at which they came.

A *piece* is an event whose choice brings text, reasoning or a part of a tool call. Servers differ in what else they
send (roles, empty pieces, ends, token counts, keep-alives), so tokens are counted as follows:

- A piece brings at least one token. Reasoning tokens are tokens, under ``reasoning`` as under ``reasoning_content``.
- If ``usage`` says how many tokens there were, they are divided among the pieces: by the counts of ``usage`` if every
  piece has one (vLLM's ``continuous_usage_stats``), otherwise by the length of what each piece brings. Empty pieces
  bring tokens (special tokens, parts of a character) only if their number is exactly that of the missing tokens.
- Reasoning that ``usage`` counts and no piece brings (OpenAI's, which is hidden) never reaches the client, so it is not
  counted.
- Without ``usage`` a piece is one token. Gaps are then between pieces, *inter-chunk* latencies, and are named so.

Figures, and how other clients define them (docs/tasks/gpu.md has a table):

- TTFT: first token minus arrival in the trace, so time spent in this client counts. ``vllm bench serve``: the first
  event with a choice, even one with a role or an empty text, minus sending. guidellm: the first event with text or
  reasoning, minus sending.
- TPOT: (last - first token) / (tokens - 1). ``vllm bench serve``: the same between events with a choice; an end in an
  event of its own counts. guidellm: the same as here, but it calls that ``inter_token_latency_ms``; its
  ``time_per_output_token_ms`` is (last token - sending) / tokens.
- ITL: the gap before a piece divided by the tokens of the piece, once per token. ``vllm bench serve``: the gap between
  two events with a choice, once per event. guidellm: one mean per request.

All tokens of the first piece come at once, so a server that sends k tokens a piece has a TPOT below its mean ITL.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sim.errors import RapLabError

CONTENT_KEYS = ("content", "reasoning_content", "reasoning", "tool_calls", "function_call", "refusal")
"""What a piece of a chat may bring."""
OTHER_CONTENT_KEYS = ("reasoning_details", "thinking", "thinking_blocks", "audio")
"""What counts only where a piece has none of ``CONTENT_KEYS``: some servers send the same text here again."""
REASONING_KEYS = ("reasoning_content", "reasoning", "reasoning_details", "thinking", "thinking_blocks")
FAILED_ENDS = ("abort", "error")
"""Values of finish_reason with which servers end an answer that they could not complete."""
MOST_TOKENS = 10**9
"""A larger count in ``usage`` is not believed."""
CUT = "the connection was cut in the middle of the answer"


class StreamError(RapLabError):
    """The answer is an error, is incomplete, or is not what an OpenAI-compatible server streams."""


@dataclass(frozen=True, slots=True)
class Timeline:
    """When the tokens of a complete answer came.

    piece_s: time of each piece that brought tokens. piece_tokens: how many tokens it brought.
    prompt_tokens, completion_tokens: by ``usage``; None if the server did not say.
    per_token: whether the tokens of the pieces are known; if not, each piece counts as one token.
    """

    piece_s: tuple[float, ...]
    piece_tokens: tuple[int, ...]
    prompt_tokens: int | None
    completion_tokens: int | None
    per_token: bool

    @property
    def tokens(self) -> int:
        """Number of tokens: that of ``usage``, or the number of pieces."""
        return self.completion_tokens if self.completion_tokens is not None else len(self.piece_s)

    def gaps(self) -> list[tuple[float, int]]:
        """Return (seconds, count) of the gaps between tokens: the gap before a piece is shared by its tokens."""
        return [
            ((later - earlier) / tokens, tokens)
            for earlier, later, tokens in zip(self.piece_s, self.piece_s[1:], self.piece_tokens[1:], strict=False)
        ]


@dataclass(frozen=True, slots=True)
class _Piece:
    """A choice of an event.

    length: characters that it brings. count: completion tokens so far, by the usage of the event.
    ends: it has a finish_reason. has_role: it names the role of a chat.
    """

    time_s: float
    length: int
    count: int | None
    ends: bool
    has_role: bool


class AnswerStream:
    """Collects the events of one answer."""

    def __init__(self) -> None:
        """Start before the first event."""
        self._pieces: list[_Piece] = []
        self._prompt_tokens: int | None = None
        self._count: int | None = None
        self._reasoning_tokens = 0  # by usage
        self._shows_reasoning = False
        self._full_since_count = 0  # pieces since the last usage with a count
        self._counted_last = False  # an event with a count and without a choice came last
        self._finish_reason: Any = None
        self._texts: list[str] = []
        self.done = False

    @property
    def ended(self) -> bool:
        """Whether the server has marked the end of the answer."""
        return self.done or bool(self._finish_reason) or self._counted_last

    @property
    def text(self) -> str:
        """What the answer says so far, without its reasoning: what the next prompt of a chat repeats."""
        return "".join(self._texts)

    @property
    def started(self) -> bool:
        """Whether a token has come."""
        return any(piece.length for piece in self._pieces)

    def add(self, time_s: float, data: str, *, kind: str = "message") -> None:
        """Add the data of one event; ``kind`` is the event's name.

        Raises:
            StreamError: for an error of the server, or data that is no piece of an answer.
        """
        if self.done or not data.strip():
            return
        if data.strip() == "[DONE]":
            self.done = True
            return
        event = _json(data)
        if kind == "error":
            raise StreamError(f"the server ended the answer with an error: {message_of(event)}")
        if not event:  # null, an empty object
            return
        if not isinstance(event, dict):
            raise StreamError(f"an event of the answer is not a JSON object: {_short(data)}")
        if event.get("error") or (not event.get("choices") and _is_error(event)):
            raise StreamError(f"the server ended the answer with an error: {message_of(event)}")
        x_groq = event.get("x_groq")
        count = self._read_usage(event.get("usage") or (x_groq.get("usage") if isinstance(x_groq, dict) else None))
        choices = event.get("choices") or ()
        if not isinstance(choices, Sequence) or not all(isinstance(c, dict) for c in choices if c is not None):
            raise StreamError(f"the choices of an event are not a list of objects: {_short(data)}")
        self._counted_last = count is not None and not choices
        for choice in choices:
            if choice is not None:
                self._add_choice(time_s, choice, count)

    def timeline(self, requested_tokens: int) -> Timeline:
        """Return the times of a complete answer.

        Raises:
            StreamError: if there was no token, or nothing marks the end and fewer than the requested tokens came.
        """
        total, hidden = self._total(), self._hidden_tokens()
        if total is not None:
            total -= hidden
        chosen = (not hidden and self._counted_pieces()) or self._chosen_pieces(total)
        if not chosen:
            raise StreamError("the answer had no token")
        found = total if total is not None else len(chosen)
        if not self.ended and found < requested_tokens:
            raise StreamError(CUT)
        times, tokens = zip(*chosen, strict=True)
        per_token = total is not None and total >= len(chosen)
        return Timeline(times, tokens, self._prompt_tokens, total, per_token)

    def _read_usage(self, usage: Any) -> int | None:
        """Keep what the usage of an event says; return its count of completion tokens."""
        if not isinstance(usage, dict):
            return None
        prompt, count = _whole(usage.get("prompt_tokens")), _whole(usage.get("completion_tokens"))
        if prompt:
            self._prompt_tokens = prompt
        if count is not None:
            self._count, self._full_since_count = count, 0
        details = usage.get("completion_tokens_details")
        reasoning = _whole(details.get("reasoning_tokens")) if isinstance(details, dict) else None
        self._reasoning_tokens = reasoning or _whole(usage.get("reasoning_tokens")) or self._reasoning_tokens
        return count

    def _add_choice(self, time_s: float, choice: Mapping[str, Any], count: int | None) -> None:
        reason = choice.get("finish_reason")
        if reason in FAILED_ENDS:
            raise StreamError(f"the server ended the answer with finish_reason {reason!r}")
        self._finish_reason = self._finish_reason or reason
        delta = choice.get("delta")
        delta = delta if isinstance(delta, dict) else {}
        brought = [choice.get("text"), *(delta.get(key) for key in CONTENT_KEYS)]
        if not any(brought):
            brought += [delta.get(key) for key in OTHER_CONTENT_KEYS]
        self._shows_reasoning |= any(delta.get(key) for key in REASONING_KEYS)
        said = choice.get("text") or delta.get("content")
        if isinstance(said, str):
            self._texts.append(said)
        # Some servers send a piece of reasoning under both names.
        length = sum(len(text) for text in {str(value) for value in brought if value})
        if length and count is None:
            self._full_since_count += 1
        if length or reason or any(value is not None for value in brought):
            self._pieces.append(_Piece(time_s, length, count, bool(reason), bool(delta.get("role"))))

    def _total(self) -> int | None:
        """Return the number of tokens that ``usage`` says; None if it says none."""
        if not self._count:
            return None
        total = self._count + self._full_since_count
        final = self._counted_last or any(piece.ends and piece.count is not None for piece in self._pieces)
        # A count below the number of pieces is that of one piece, unless it comes with the end.
        return total if final or total >= sum(piece.length > 0 for piece in self._pieces) else None

    def _hidden_tokens(self) -> int:
        """Return the tokens of reasoning that usage counts and that no piece brings."""
        full = sum(piece.length > 0 for piece in self._pieces)
        # A server may count reasoning that it sends as content: then there are as many pieces as tokens.
        fits = full <= (self._total() or 0) - self._reasoning_tokens
        return self._reasoning_tokens if full and fits and not self._shows_reasoning else 0

    def _counted_pieces(self) -> list[tuple[float, int]]:
        """Return the pieces with the tokens that the usage of each one says; nothing unless every piece has one."""
        chosen, before, full = [], 0, 0
        for piece in self._pieces:
            new = (piece.count or 0) - before
            if piece.length and new < 1:
                return []
            full += piece.length > 0
            if new > 0:
                chosen.append((piece.time_s, new))
                before += new
        return chosen if full else []

    def _chosen_pieces(self, total: int | None) -> list[tuple[float, int]]:
        """Return the pieces that bring tokens, with their shares of the total."""
        full = [piece for piece in self._pieces if piece.length]
        empty = [piece for piece in self._pieces if not piece.length]
        also = _empty_with_token(empty, (total or 0) - len(full))
        chosen = [piece for piece in self._pieces if piece.length or id(piece) in also]
        if not chosen and self._count != 0:  # tokens without text: special ones, or parts of a character
            chosen = [piece for piece in empty if piece.ends or not piece.has_role]
        shares = _shares(max(total or 0, len(chosen)), [piece.length for piece in chosen])
        return [(piece.time_s, share) for piece, share in zip(chosen, shares, strict=True)]


def read_stream(events: Iterable[tuple[float, str]], requested_tokens: int) -> Timeline:
    """Return the token times of the events (time_s, data) of one answer.

    Raises:
        StreamError: for an error of the server, or an incomplete answer.
    """
    stream = AnswerStream()
    for time_s, data in events:
        stream.add(time_s, data)
    return stream.timeline(requested_tokens)


def _empty_with_token(empty: Sequence[_Piece], missing: int) -> set[int]:
    """Return the empty pieces, by identity, that bring the missing tokens; none unless some kinds of them are as many.

    vLLM and hw.serve send a piece for every token, the last one with the end. Others send the end separately, where it
    may stand for a counted end-of-text token. hw.serve names the role in the first token's piece.
    """
    inner = {id(piece) for piece in empty if not piece.ends and not piece.has_role}
    end = {id(piece) for piece in empty if piece.ends}
    role = {id(piece) for piece in empty if piece.has_role and not piece.ends}
    likely_first = (inner | end, inner | end | role, end, inner, inner | role, role)
    return next((pieces for pieces in likely_first if len(pieces) == missing), set())


def _shares(total: int, lengths: Sequence[int]) -> list[int]:
    """Divide tokens among pieces: at least one each, the rest in proportion to their lengths."""
    if not lengths:
        return []
    weights = np.array(lengths, dtype=np.float64)
    if not weights.sum():
        weights += 1.0
    exact = (total - len(lengths)) * weights / weights.sum()
    shares = np.floor(exact).astype(np.int64)
    rest = total - len(lengths) - int(shares.sum())
    shares[np.argsort(shares - exact, kind="stable")[:rest]] += 1
    return [1 + int(share) for share in shares]


def _whole(value: Any) -> int | None:
    """Return a count of tokens; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= MOST_TOKENS:
        return None
    return int(value) if value == int(value) else None


def _json(data: str) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise StreamError(f"an event of the answer is not JSON: {_short(data)}") from error


def _is_error(event: Mapping[str, Any]) -> bool:
    """Return whether an event without choices and without ``error`` is an error, as of older vLLM and FastChat."""
    stated = event.get("object") == "error" or bool(event.get("error_code"))
    return stated or (not event.get("usage") and any(isinstance(event.get(key), str) for key in ("message", "detail")))


def message_of(body: Any) -> str:
    """Return the message of an error that a server sends as JSON: OpenAI's shape, or one of its relatives."""
    if isinstance(body, dict):
        for key in ("error", "message", "detail"):
            if body.get(key):
                return message_of(body[key])
    return body if isinstance(body, str) else _short(json.dumps(body))


def _short(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:200]}..."
