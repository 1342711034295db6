"""What becomes of a layer's KV when a request's prefill ends: which tokens stay, and how many bits each takes.

    formats = kv_formats(model, plan, kv_block_tokens=16)
    formats[3].blocks(900)                          # KV blocks that layer 3 needs for 900 computed tokens

KV is computed and read by prefill at the model's own precision. At the end of a request's prefill each layer cuts its
tokens (``Plan.kv_keep``) and quantizes them (``Plan.kv_bits``). Tokens that are decoded later are stored in that way.
Or the prompt's KV is compressed to a share of its bytes (``Plan.kv_compression``), which counts as if fewer tokens were
stored; tokens that are decoded later are stored in full.
Or hidden states take its place (``Plan.kv_hidden``), at half the bytes; a decode reads the keys and values that it
computes from them.

Every KV block has the same bytes, whatever it holds, so that one pool serves all layers. A block of quantized KV holds
more tokens instead.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from sim.cost.memory import kv_blocks
from sim.cost.model_spec import ModelSpec
from sim.cost.plan import KV_BITS, KV_KEEP_ALL, KVKeep, Plan

HIDDEN_ROW = len(KV_BITS)
"""The row of ``kv_precisions`` for hidden states; those before it are of ``KV_BITS``."""


def kv_block_tokens_at(model: ModelSpec, kv_block_tokens: int, bits: int) -> int:
    """Return how many tokens of one layer fit into a KV block that holds ``kv_block_tokens`` of them at 16 bits."""
    return kv_block_tokens * model.kv_bytes_per_token_layer // model.kv_bytes_per_token_layer_at(bits)


def kv_precisions(model: ModelSpec, kv_block_tokens: int) -> tuple[list[int], list[int]]:
    """Return the tokens that fit into a KV block, and the bytes that a decode reads of each; at KV_BITS and hidden.

    For a model whose hidden states do not halve its KV, no plan uses the last row.
    """
    tokens = [kv_block_tokens_at(model, kv_block_tokens, bits) for bits in KV_BITS]
    read_bytes = [model.kv_bytes_per_token_layer_at(bits) for bits in KV_BITS]
    hidden = kv_block_tokens * model.kv_bytes_per_token_layer // model.hidden_bytes_per_token_layer
    return [*tokens, max(hidden, 1)], [*read_bytes, read_bytes[0]]


@dataclass(frozen=True, slots=True)
class KVFormat:
    """How one layer stores the KV of a request.

    keep: which tokens stay. bits: 16, 8 or 4. block_tokens: tokens that fit into a KV block. token_bytes,
    full_token_bytes: that a decode reads of one token, and of one at 16 bits. hidden: whether hidden states are stored,
    from which it first computes keys and values at 16 bits.
    """

    keep: KVKeep
    bits: int
    block_tokens: int
    token_bytes: int
    full_token_bytes: int
    hidden: bool = False

    def blocks(self, tokens: int) -> int:
        """Return the KV blocks that ``tokens`` computed tokens need."""
        return kv_blocks(self.keep.tokens(tokens), self.block_tokens)

    def read_bytes(self, tokens: int) -> int:
        """Return the bytes that a decode reads after ``tokens`` tokens."""
        return self.keep.tokens(tokens) * self.token_bytes


@functools.lru_cache(maxsize=1024)  # engines ask whenever a prefill ends
def _formats(
    model: ModelSpec, kv_keep: tuple[KVKeep, ...], kv_bits: tuple[int, ...], kv_hidden: bool, kv_block_tokens: int
) -> tuple[KVFormat, ...]:
    tokens, read_bytes = kv_precisions(model, kv_block_tokens)
    rows = [HIDDEN_ROW if kv_hidden else KV_BITS.index(bits) for bits in kv_bits]
    return tuple(
        KVFormat(keep, bits, tokens[row], read_bytes[row], read_bytes[0], hidden=kv_hidden)
        for keep, bits, row in zip(kv_keep, kv_bits, rows, strict=True)
    )


def stores_all(plan: Plan) -> bool:
    """Return whether every layer keeps the keys and values of all tokens at 16 bits after prefill."""
    alike = set(plan.kv_keep) == {KV_KEEP_ALL} and set(plan.kv_bits) == {16}
    return alike and plan.kv_compression is None and not plan.kv_hidden


def kv_formats(model: ModelSpec, plan: Plan, kv_block_tokens: int) -> tuple[KVFormat, ...] | None:
    """Return how each layer stores KV after prefill; None where every layer keeps all tokens at 16 bits.

    A prompt whose KV is compressed takes the place of fewer tokens (``saved_tokens``), in every layer.
    """
    if stores_all(plan):
        return None
    return _formats(model, plan.kv_keep, plan.kv_bits, plan.kv_hidden, kv_block_tokens)


def saved_tokens(plan: Plan, tokens: int) -> int:
    """Return how many tokens' bytes compressing the KV of a prompt frees in every layer, once ``tokens`` are computed.

    A layer then stores as many tokens less, of these and of all that follow.
    """
    return 0 if plan.kv_compression is None else plan.kv_compression.saved_tokens(tokens)


TYPICAL_TOKENS = 1024
"""The length of a prompt by which the KV bytes of a token are counted; what compressing frees depends little on it."""


def token_kv_bytes(model: ModelSpec, plan: Plan) -> float:
    """Return the bytes of KV that are stored per token of a prompt of ``TYPICAL_TOKENS``."""
    return stored_kv_bytes(model, plan, TYPICAL_TOKENS) / TYPICAL_TOKENS


def stored_kv_bytes(model: ModelSpec, plan: Plan, prompt_tokens: int) -> int:
    """Return the bytes that are stored of a prompt for decode: the tokens and bits of each MHA block that it runs.

    Source:
        PDTrim (arXiv 2509.04467) for layers that decode drops and tokens that do not stay.
    """
    layers = zip(plan.kv_keep, plan.kv_bits, plan.decode.mha, strict=True)
    if plan.kv_hidden:
        return prompt_tokens * model.hidden_bytes_per_token_layer * sum(plan.decode.mha)
    stored_tokens = prompt_tokens - saved_tokens(plan, prompt_tokens)
    return sum(
        keep.tokens(stored_tokens) * model.kv_bytes_per_token_layer_at(bits) for keep, bits, runs in layers if runs
    )
