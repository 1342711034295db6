"""How a request wants its tokens chosen: greedily, or sampled with temperature and top_p."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

LEAST_TEMPERATURE = 1e-5
"""Below this, sampling is greedy, as in vLLM: the division by it would overflow."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How a request's tokens are sampled.

    temperature: divides the logits; at least ``LEAST_TEMPERATURE``.
    top_p: only the likeliest tokens whose probabilities sum up to this are chosen from, at least one.
    seed: what the random numbers depend on, besides the number of tokens before.
    """

    temperature: float
    top_p: float
    seed: tuple[int, ...]

    def uniform(self, index: int) -> float:
        """Return the random number of the token with this index: a multiple of 2**-32 in [0, 1)."""
        text = ":".join(map(str, (*self.seed, index)))
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest()) / 2**32
