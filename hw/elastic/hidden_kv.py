"""Hidden states in place of keys and values: a paged pool whose KV blocks hold what they are computed from (Apt-Serve).

    kv = HiddenKV(arena, block_tokens=2 * arena.block_tokens)
    kv.write(slots, normed)                         # what the product with q, k and v reads
    hidden = kv.read(blocks)                        # attention computes keys and values of it

Where every query head has its own keys and values, the normed hidden state of a token has half their values
(``ModelSpec.hidden_halves_kv``). While a prompt is computed, a KV block has as many tokens as one of keys and values,
whose first half they take; from the end of its prefill on it has twice as many, as in simulation.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from hw.elastic.paged_kv import KVArena

# Shapes: n tokens, c KV blocks, p tokens of one, e hidden size, h KV heads, d head_dim.

Project = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""``project(normed, positions)``: keys and values [n, h, d] of a layer, of normed hidden states [n, e] at positions."""


class HiddenKV:
    """The KV blocks of an arena, for hidden states. A slot is block * ``block_tokens`` + place in it."""

    def __init__(self, arena: KVArena, block_tokens: int) -> None:
        """View the memory of ``arena``."""
        states = arena.kv.view(arena.capacity, 2 * arena.block_tokens, -1)
        assert block_tokens <= states.shape[1]
        self.block_tokens = block_tokens
        self._states = states[:, :block_tokens]

    def write(self, slots: Tensor, normed: Tensor) -> None:
        """Store normed hidden states [n, e] in slots [n]."""
        self._states[slots // self.block_tokens, slots % self.block_tokens] = normed

    def read(self, blocks: Tensor) -> Tensor:
        """Return the hidden states [c, p, e] of blocks [c]."""
        return self._states.index_select(0, blocks)

    def read_slots(self, slots: Tensor) -> Tensor:
        """Return the hidden states [n, e] of slots [n]."""
        return self._states[slots // self.block_tokens, slots % self.block_tokens]
