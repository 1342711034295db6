"""Text for measuring loss: files of rows, tokenised once, cut in windows."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sim.errors import ConfigError
from sim.paths import find_data


@dataclass(frozen=True, slots=True, kw_only=True)
class Windows:
    """Token ids [n, t] of equal windows of one text, and where they come from."""

    tokens: Tensor
    source: dict[str, Any]

    @property
    def count(self) -> int:
        """Number of tokens that are predicted: all but the first of each window."""
        return self.tokens.shape[0] * (self.tokens.shape[1] - 1)


def read_windows(
    path: str | Path,
    tokenizer: Any,
    *,
    tokens: int | None,
    window: int,
    seed: int | None,
    keep_newlines: bool = False,
) -> Windows:
    """Cut a text in windows, all of it or some.

    The rows that are not empty are joined by two newlines and tokenised once, as the perplexity guide of Hugging Face
    does; the text is cut in consecutive windows, the last incomplete one left out.

    Args:
        path: the file, as it is or under ``data_dir()``.
        tokenizer: of the model that is measured.
        tokens: how many tokens to take, rounded down to whole windows; None takes all.
        window: tokens of one window.
        seed: draws the windows at random; None takes the first ones.
        keep_newlines: whether a row keeps the newline at its end, so that three part it from the next. In the data set
            of Hugging Face it does; published perplexities are lower by that, for such tokens are easy.
    Raises:
        ConfigError: for a missing file, or fewer tokens than one window.
    """
    file = find_data(path)
    if not file.is_file():
        raise ConfigError(f"no text at {file}; set RAP_LAB_DATA to the folder that holds text/, or give a path")
    raw = file.read_bytes()
    rows = [row.removesuffix("\r") for row in raw.decode("utf-8").split("\n") if row.strip()]
    end = "\n" if keep_newlines else ""
    ids = torch.tensor(tokenizer("\n\n".join(row + end for row in rows), verbose=False).input_ids, dtype=torch.long)
    available = ids.numel() // window
    wanted = available if tokens is None else tokens // window
    if window < 2 or not 1 <= wanted <= available:
        raise ConfigError(
            f"{file.name} gives {available} windows of {window} tokens, and {wanted} were asked for; "
            f"set tokens between {window} and {available * window}, and a window of 2 at least"
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
            "tokens": wanted * window,
            "window_tokens": window,
            "windows": "all" if tokens is None else "the first" if seed is None else f"drawn with seed {seed}",
            **({"keep_newlines": True} if keep_newlines else {}),
        },
    )
