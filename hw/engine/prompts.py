"""Prompts with the lengths of a trace: token ids cut from a text, or random ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from hw.elastic.random_weights import NumberTokenizer
from sim.engine.protocol import Sessions
from sim.errors import ConfigError
from sim.paths import find_data
from sim.types import Ints

DEFAULT_TEXT = "text/wikitext2_raw_test.txt"
TEXT_BYTES = 400_000
"""How much of a text prompts are cut from; tokenizing all of it would take seconds."""


class Prompts(Protocol):
    """The token ids of every request."""

    def __call__(self, request_id: int, tokens: int) -> Sequence[int]:
        """Return ``tokens`` token ids, the same for the same request."""
        ...


class TextPrompts:
    """Consecutive tokens of one text; seed and request determine where a prompt starts."""

    def __init__(self, ids: Sequence[int], seed: int = 0) -> None:
        """Cut prompts from these ids; one that is longer than the text continues at its start."""
        if len(ids) < 2:
            raise ConfigError("the text of the prompts gives fewer than two tokens; give a longer one")
        self._ids, self._seed = np.asarray(ids, dtype=np.int64), seed

    def __call__(self, request_id: int, tokens: int) -> Sequence[int]:
        """Return the prompt of a request."""
        start = int(np.random.default_rng((self._seed, request_id)).integers(len(self._ids)))
        return [int(i) for i in np.take(self._ids, range(start, start + tokens), mode="wrap")]


class RandomPrompts:
    """Uniformly random token ids of the vocabulary: for timing, when there is no text."""

    def __init__(self, vocabulary: int, seed: int = 0) -> None:
        """Use ids 0 to ``vocabulary - 1``."""
        self._vocabulary, self._seed = vocabulary, seed

    def __call__(self, request_id: int, tokens: int) -> Sequence[int]:
        """Return the prompt of a request."""
        drawn = np.random.default_rng((self._seed, request_id)).integers(self._vocabulary, size=tokens)
        return [int(i) for i in drawn]


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionPrompts:
    """Prompts of turns, which begin with the prompt and the real answer before them.

    A turn whose prompt in the trace is shorter than the prompt and the answer before it has a prompt of its own, and so
    has a first turn. Where an answer is shorter than in the trace, as after a rejection, more new tokens follow it.

    own: prompts of their own, and the new tokens of turns. before: the request that each turn follows. lengths: tokens
    that a prompt must have to hold what was said before it. tokens: of each request, its prompt and its answer so far.
    """

    own: Prompts
    before: Mapping[int, int]
    lengths: Mapping[int, int]
    tokens: Mapping[int, Sequence[int]]

    @classmethod
    def of(
        cls,
        own: Prompts,
        sessions: Sessions,
        prompt_tokens: Ints,
        output_tokens: Ints,
        tokens: Mapping[int, Sequence[int]],
        first_id: int,
    ) -> SessionPrompts:
        """Return the prompts of the requests of a trace with sessions, numbered from ``first_id``."""
        after: list[int] = sessions.after.tolist()
        before = {first_id + later: first_id + i for i, later in enumerate(after) if later >= 0}
        said = (prompt_tokens + output_tokens).tolist()
        lengths = {later: said[earlier - first_id] for later, earlier in before.items()}
        return cls(own=own, before=before, lengths=lengths, tokens=tokens)

    def __call__(self, request_id: int, tokens: int) -> Sequence[int]:
        """Return the prompt of a request; the turn before it has ended."""
        if tokens < self.lengths.get(request_id, tokens + 1):
            return self.own(request_id, tokens)
        said = list(self.tokens.get(self.before[request_id], ()))[:tokens]
        return [*said, *self.own(request_id, tokens - len(said))]


def read_prompts(path: str | Path | None, tokenizer: Any, vocabulary: int, seed: int) -> Prompts:
    """Build prompts from a text file at ``path`` or below ``data_dir()``; random ids for None or random weights.

    Raises:
        ConfigError: for a file that is not there.
    """
    if path is None or isinstance(tokenizer, NumberTokenizer):
        return RandomPrompts(vocabulary, seed)
    file = find_data(path)
    if not file.is_file():
        raise ConfigError(
            f"no text at {file}; set RAP_LAB_DATA to the folder that holds text/, hw.text= to any text file, or "
            "hw.text=null for random token ids"
        )
    with file.open("rb") as opened:
        text = opened.read(TEXT_BYTES).decode("utf-8", errors="ignore")
    ids = tokenizer(text, verbose=False).input_ids
    if max(ids, default=0) >= vocabulary:
        raise ConfigError(
            f"the tokenizer gives token {max(ids)}, but the model has tokens 0 to {vocabulary - 1}; "
            "save the model's own tokenizer into its checkpoint, or set hw.text=null"
        )
    return TextPrompts(ids, seed)
