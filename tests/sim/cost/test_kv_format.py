"""How KV is stored after prefill: bytes and KV blocks, by hand."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from sim.cost.kv_format import kv_block_tokens_at, kv_formats, stored_kv_bytes
from sim.cost.memory import kv_block_layer_bytes
from sim.cost.model_spec import load_model
from sim.cost.plan import KV_BITS, KVKeep, dense_plan, drop

LLAMA = load_model("llama2_7b")
DENSE = dense_plan(LLAMA)


def test_a_kv_block_of_llama_2_7b_holds_16_31_or_60_tokens() -> None:
    assert [LLAMA.kv_bytes_per_token_layer_at(bits) for bits in KV_BITS] == [16_384, 64 * 132, 64 * 68]
    assert [kv_block_tokens_at(LLAMA, 16, bits) for bits in KV_BITS] == [16, 31, 60]


def test_a_plan_that_keeps_all_kv_has_no_formats() -> None:
    assert kv_formats(LLAMA, DENSE, 16) is None
    assert kv_formats(LLAMA, replace(DENSE, weight_bits=(4,) * 32), 16) is None


def test_layers_store_what_their_tokens_and_bits_say() -> None:
    cut = KVKeep(first_tokens=4, last_tokens=60)
    plan = replace(DENSE, kv_bits=(8, 4, 16, *(16,) * 29), kv_keep=(KVKeep(), cut, cut, *(KVKeep(),) * 29))
    formats = kv_formats(LLAMA, plan, 16)
    assert formats is not None
    assert [one.blocks(1000) for one in formats[:4]] == [33, 2, 4, 63]
    full = LLAMA.kv_bytes_per_token_layer
    assert [one.read_bytes(1000) for one in formats[:4]] == [1000 * 64 * 132, 64 * 64 * 68, 64 * full, 1000 * full]
    assert stored_kv_bytes(LLAMA, plan, 1000) == 1000 * 64 * 132 + 64 * 64 * 68 + 64 * full + 29 * 1000 * full
    without = replace(plan, decode=drop(LLAMA, mha=[0]))
    assert stored_kv_bytes(LLAMA, plan, 1000) - stored_kv_bytes(LLAMA, without, 1000) == 1000 * 64 * 132


@given(tokens=st.integers(0, 5000), block_tokens=st.integers(1, 64), bits=st.sampled_from(KV_BITS))
def test_blocks_hold_all_bytes_and_none_is_empty(tokens: int, block_tokens: int, bits: int) -> None:
    formats = kv_formats(LLAMA, replace(DENSE, kv_bits=(bits,) * 31 + (8,)), block_tokens)
    assert formats is not None
    size = kv_block_layer_bytes(LLAMA, block_tokens)
    stored, blocks = tokens * LLAMA.kv_bytes_per_token_layer_at(bits), formats[0].blocks(tokens)
    assert stored <= blocks * size
    # A block is left partly empty by less than one token, and the last one by less than its tokens.
    assert tokens == 0 or (blocks - 1) * formats[0].block_tokens < tokens
    assert size - formats[0].block_tokens * formats[0].token_bytes < formats[0].token_bytes
