"""Bodies of requests: prompts of about the lengths of the trace, and OpenAI's fields."""

from __future__ import annotations

from itertools import cycle, islice
from typing import Any

import numpy as np

from hw.client.dialog import Dialog
from hw.client.settings import ClientSettings
from hw.engine.prompts import RandomPrompts
from sim.engine.protocol import Request
from sim.errors import ConfigError
from sim.paths import find_data

TEXT_CHARACTERS = 400_000
"""How much of a text prompts are cut from."""


class Payloads:
    """Makes the body of each request: random token ids, or a part of a text."""

    def __init__(self, settings: ClientSettings, model: str, vocabulary: int, *, seed: int = 0) -> None:
        """Read the text.

        Raises:
            ConfigError: for a text that is missing or empty.
        """
        self._settings, self._seed = settings, seed
        self._model = settings.served_model or model
        self._ids = RandomPrompts(vocabulary, seed)
        self._text = _read_text(settings.text) if settings.text is not None else None
        if settings.chat and self._text is None:
            raise ConfigError("client.chat=true sends text, but client.text is null; set it to a file")

    def message(self, request: Request, dialog: Dialog | None = None) -> str | None:
        """Return the text that a request adds to what has been said; None for prompts of token ids.

        dialog: of its session, which begins again here if the prompt is too short to hold it.
        """
        added = request.prompt_tokens if dialog is None else dialog.begin_at(request.request_id, request.prompt_tokens)
        return None if self._text is None else self._cut(self._text, request.request_id, added)

    def __call__(self, request: Request, message: str | None = None, dialog: Dialog | None = None) -> dict[str, Any]:
        """Return the body of a request.

        Args:
            message: what ``message`` has returned for it; None asks for it here, or is that of token ids.
            dialog: what its prompt begins with.
        """
        body: dict[str, Any] = {
            "model": self._model,
            "max_tokens": request.output_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self._settings.ignore_eos:
            body["ignore_eos"] = True
        if self._text is None:
            # All turns of a session are cut from one sequence. Answers are in it as other ids: theirs are not known.
            first = request.request_id if dialog is None else dialog.first_id
            return body | {"prompt": list(self._ids(first, request.prompt_tokens))}
        message = self.message(request, dialog) if message is None else message
        assert message is not None
        before = [] if dialog is None else dialog.parts
        if not self._settings.chat:
            return body | {"prompt": "".join((*(text for part in before for text in part), message))}
        messages = []
        for asked, answer in before:
            messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
        return body | {"messages": [*messages, {"role": "user", "content": message}]}

    def _cut(self, text: str, request_id: int, tokens: int) -> str:
        """Return the part of the text that a request sends; at its end the text continues at its start."""
        length = max(1, round(self._settings.characters_per_token * tokens))
        generator = np.random.default_rng((self._seed, request_id))
        room = len(text) - length
        start = int(generator.integers(room if room > 0 else len(text)))
        if start + length <= len(text):
            return text[start : start + length]
        return "".join(islice(cycle(text), start, start + length))


def _read_text(path: str) -> str:
    file = find_data(path)
    if not file.is_file():
        raise ConfigError(f"no text at {file}; set client.text= to a file, or to null for random token ids")
    try:
        with file.open(encoding="utf-8", errors="ignore") as opened:
            text = opened.read(TEXT_CHARACTERS)
    except OSError as error:
        raise ConfigError(f"the text {file} cannot be read: {error.strerror}; set client.text= to another") from error
    if not text.strip():
        raise ConfigError(f"the text {file} is empty; set client.text= to a file with text")
    return text
