"""What a client and a server have said in one session, so that the next prompt begins with it."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class Dialog:
    """The turns of a session so far.

    first_id: request_id of its first turn. said_tokens: prompt and answer of the last turn, by the trace.
    parts: (message, answer) texts of the turns; empty for prompts of token ids.
    """

    first_id: int
    said_tokens: int = 0
    parts: list[tuple[str, str]] = field(default_factory=list)

    def begin_at(self, request_id: int, prompt_tokens: int) -> int:
        """Return how many tokens a turn adds to what has been said, by the trace.

        A prompt that is too short to hold what has been said begins the dialog again, with all of its tokens.
        """
        if prompt_tokens <= self.said_tokens:
            self.first_id, self.said_tokens = request_id, 0
            self.parts.clear()
        return prompt_tokens - self.said_tokens

    def add(self, message: str | None, answer: str, said_tokens: int) -> None:
        """Add a turn that has ended; a failed one has an empty answer. ``message`` is None for token ids."""
        self.said_tokens = said_tokens
        if message is not None:
            self.parts.append((message, answer))
