"""Prompts of a trace's lengths: real token ids cut from a text, or drawn at random."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from sim.errors import ConfigError
from sim.paths import find_data

DEFAULT_TEXT = "text/wikitext2_raw_test.txt"
TEXT_BYTES = 400_000
"""A prompt starts anywhere in so much of a text; all of it would take seconds to tokenise."""


class Prompts(Protocol):
    """The token ids of every request."""

    def __call__(self, request_id: int, tokens: int) -> Sequence[int]:
        """Return ``tokens`` token ids, the same for the same request."""
        ...


class TextPrompts:
    """Runs of consecutive tokens of one text, each starting at a place that the seed and the request decide."""

    def __init__(self, ids: Sequence[int], seed: int = 0) -> None:
        """Cut from these ids; a prompt longer than the text begins again at its start."""
        if len(ids) < 2:
            raise ConfigError("the text of the prompts gives fewer than two tokens; give a longer one")
        self._ids, self._seed = np.asarray(ids, dtype=np.int64), seed

    def __call__(self, request_id: int, tokens: int) -> Sequence[int]:
        """Return the prompt of a request."""
        start = int(np.random.default_rng((self._seed, request_id)).integers(len(self._ids)))
        return [int(i) for i in np.take(self._ids, range(start, start + tokens), mode="wrap")]


class RandomPrompts:
    """Token ids drawn evenly from the vocabulary: for timing alone, where no text is at hand."""

    def __init__(self, vocabulary: int, seed: int = 0) -> None:
        """Draw ids 0 to ``vocabulary - 1``."""
        self._vocabulary, self._seed = vocabulary, seed

    def __call__(self, request_id: int, tokens: int) -> Sequence[int]:
        """Return the prompt of a request."""
        drawn = np.random.default_rng((self._seed, request_id)).integers(self._vocabulary, size=tokens)
        return [int(i) for i in drawn]


def read_prompts(path: str | Path | None, tokenizer: Any, vocabulary: int, seed: int) -> Prompts:
    """Build prompts from a text file, as it lies or under ``data_dir()``; None draws token ids at random.

    Raises:
        ConfigError: for a file that is not there.
    """
    if path is None:
        return RandomPrompts(vocabulary, seed)
    file = find_data(path)
    if not file.is_file():
        raise ConfigError(
            f"no text at {file}; set RAP_LAB_DATA to the folder that holds text/, hw.text= to any text file, or "
            "hw.text=null to draw token ids at random"
        )
    with file.open("rb") as opened:
        text = opened.read(TEXT_BYTES).decode("utf-8", errors="ignore")
    return TextPrompts(tokenizer(text, verbose=False).input_ids, seed)
