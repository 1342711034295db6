"""Text for measuring loss: files of rows, tokenized once and cut into windows."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sim.errors import ConfigError
from sim.paths import find_data


@dataclass(frozen=True, slots=True, kw_only=True)
class Windows:
    """Token ids [n, t] of equal windows of one text, and a description of where they come from."""

    tokens: Tensor
    source: dict[str, Any]

    @property
    def count(self) -> int:
        """Number of predicted tokens: all but the first of each window."""
        return self.tokens.shape[0] * (self.tokens.shape[1] - 1)


IDS, TOKENIZER = "token_ids_sha256", "tokenizer_sha256"
"""Keys of ``Windows.source`` that pin what was measured; results of earlier versions lack them."""


def token_hash(tokens: Tensor) -> str:
    """Return the SHA-256 of token ids [n, t], as little-endian 64-bit integers in the order of the windows.

    It pins the measured slice; a hash of the file does not, for a changed way to read rows moves every window.
    """
    return hashlib.sha256(tokens.to(torch.int64).numpy().astype("<i8").tobytes()).hexdigest()


def tokenizer_hash(tokenizer: Any) -> str:
    """Return the SHA-256 of a tokenizer's vocabulary, in the order of the ids."""
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0]))
    return hashlib.sha256("\n".join(f"{number} {token}" for token, number in vocabulary).encode()).hexdigest()


def differing(described: Mapping[str, Any], old: Mapping[str, Any]) -> tuple[list[str], bool]:
    """Compare what is measured now with what an earlier result was measured on.

    Returns:
        The keys that differ, sorted, and whether the earlier result does not state its token ids. A hash that only one
        side has is no difference.
    """
    different, unstated = [], False
    for key, value in described.items():
        before = old.get(key)
        if isinstance(value, Mapping) and isinstance(before, Mapping):
            missing = {name for name in (IDS, TOKENIZER) if name in value and name not in before}
            unstated = unstated or bool(missing)
            value = {name: content for name, content in value.items() if name not in missing}
        if before != value:
            different.append(key)
    return sorted(different), unstated


def read_windows(
    path: str | Path,
    tokenizer: Any,
    *,
    tokens: int | None,
    window: int,
    seed: int | None,
    keep_newlines: bool = False,
) -> Windows:
    """Cut a text into windows and return all or some of them.

    The rows that are not empty are joined by two newlines and tokenized once, as in Hugging Face's guide to perplexity.
    The text is cut into consecutive windows; an incomplete last one is left out.

    Args:
        path: the file, absolute, relative, or below ``data_dir()``.
        tokenizer: of the measured model.
        tokens: how many tokens to take, rounded down to full windows; None takes all.
        window: tokens of one window.
        seed: of a random choice of windows; None takes the first ones.
        keep_newlines: whether a row keeps the newline at its end, so that three newlines follow it. The data set of
            Hugging Face keeps it. Newlines are easy to predict, so published perplexities are lower.
    Raises:
        ConfigError: for a missing file, or fewer tokens than one window.
    """
    file = find_data(path)
    if not file.is_file():
        raise ConfigError(f"no text at {file}; set RAP_LAB_DATA to the folder that holds text/, or give a path")
    raw = file.read_bytes()
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file} is not UTF-8 text ({error.reason} at byte {error.start}); convert it") from error
    rows = [row.removesuffix("\r") for row in text.split("\n") if row.strip()]
    end = "\n" if keep_newlines else ""
    ids = torch.tensor(tokenizer("\n\n".join(row + end for row in rows), verbose=False).input_ids, dtype=torch.long)
    available = ids.numel() // window
    wanted = available if tokens is None else tokens // window
    if window < 2 or not 1 <= wanted <= available:
        raise ConfigError(
            f"{file.name} has {available} windows of {window} tokens, but {wanted} were requested; "
            f"set tokens between {window} and {available * window}, and window to at least 2"
        )
    cut = ids[: available * window].view(available, window)
    chosen = torch.arange(wanted)
    if seed is not None:
        chosen = torch.randperm(available, generator=torch.Generator().manual_seed(seed))[:wanted].sort().values
    return Windows(
        tokens=cut[chosen],
        source={
            "text": file.name,
            "sha256": hashlib.sha256(raw).hexdigest(),
            IDS: token_hash(cut[chosen]),
            TOKENIZER: tokenizer_hash(tokenizer),
            "tokens": wanted * window,
            "window_tokens": window,
            "windows": "all" if tokens is None else "the first" if seed is None else f"drawn with seed {seed}",
            **({"keep_newlines": True} if keep_newlines else {}),
        },
    )
