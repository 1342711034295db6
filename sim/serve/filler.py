"""Tokens without a tokenizer: a rule that counts those of a text, and words that fill answers.

A token is a run of up to eight letters or digits with the space before it; another visible character, such as a sign or
a Chinese one, with the space before it; or a run of other white space. English texts get about as many tokens as from a
real tokenizer; exact counts take prompts of token ids.

Answers consist of filler words of one token each. An answer that comes back in a later prompt, as in a chat, therefore
has as many tokens there as it had when it was produced.
"""

from __future__ import annotations

import hashlib
import re
import zlib
from collections.abc import Sequence
from types import SimpleNamespace

import numpy as np

TOKEN = re.compile(r" ?[A-Za-z0-9_\u00aa-\u1fff]{1,8}| ?\S|\s+")
END = 0
"""The token that ends an answer; it has no text."""
_TEXT = """\
the of and to in that it was for on are with as at be this have from or had by word but what some we can out other were
all there when up use your how said an each she which do their time if will way about many then them write would like so
these her long make thing see him two has look more day could go come did number sound no most people my over know water
than call first who may down side been now find"""
WORDS = tuple(_TEXT.split())
"""The words of answers. Word i, with a space before it, is token 1 + i."""
_IDS = {f" {word}": 1 + i for i, word in enumerate(WORDS)}


class FillerTokenizer:
    """Turns a text into token ids by the rule above, and filler tokens into words."""

    eos_token_id = END

    def __init__(self, vocabulary: int) -> None:
        """Use ids below ``vocabulary``, that of the model, unless the filler words are more."""
        self._others = max(1, vocabulary - len(WORDS) - 1)

    def __call__(self, text: str, verbose: bool = True) -> SimpleNamespace:
        """Return the token ids of a text as ``input_ids``; equal tokens have equal ids."""
        return SimpleNamespace(input_ids=[self._id(token) for token in TOKEN.findall(text)])

    def decode(self, tokens: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Return the text of the tokens of an answer."""
        return "".join(f" {WORDS[token - 1]}" for token in tokens if token != END)

    def _id(self, token: str) -> int:
        known = _IDS.get(token)
        return (
            1 + len(WORDS) + zlib.crc32(token.encode("utf-8", "surrogatepass")) % self._others
            if known is None
            else known
        )


def answer_key(prompt: Sequence[int], seed: Sequence[int]) -> int:
    """Return a number of 64 bits that stands for a prompt and a seed; an answer depends on nothing else."""
    digest = hashlib.blake2b(np.array([*seed, len(prompt)], dtype=np.uint64).tobytes(), digest_size=8)
    digest.update(np.array(prompt, dtype=np.int64).tobytes())
    return int.from_bytes(digest.digest(), "little")


def filler_token(key: int, index: int) -> int:
    """Return the token with this index of the answer of a key."""
    # The finalizer of MurmurHash3: neighboring keys and indices give unrelated words.
    mixed = (key + index * 0x9E3779B97F4A7C15) & (2**64 - 1)
    mixed = ((mixed ^ (mixed >> 33)) * 0xFF51AFD7ED558CCD) & (2**64 - 1)
    mixed = ((mixed ^ (mixed >> 33)) * 0xC4CEB9FE1A85EC53) & (2**64 - 1)
    return 1 + (mixed ^ (mixed >> 33)) % len(WORDS)


def filler_answer(key: int, length: int) -> list[int]:
    """Return the first ``length`` tokens of the answer of a key."""
    return [filler_token(key, index) for index in range(length)]


def hash_ids(tokens: Sequence[int], block_tokens: int) -> tuple[int, ...]:
    """Return one id per ``block_tokens`` tokens of a prompt, or of a prompt and its answer.

    An id depends on its tokens and on all before them. A last block that is not full gets none.
    """
    ids, digest = [], hashlib.blake2b(digest_size=8)
    for start in range(0, len(tokens) - block_tokens + 1, block_tokens):
        digest.update(np.array(tokens[start : start + block_tokens], dtype=np.int64).tobytes())
        ids.append(int.from_bytes(digest.copy().digest(), "little") >> 1)
    return tuple(ids)
