"""Budgets of an iteration on a GPU: operations, waits for the device, and copies from the host; at every precision.

Counted on a device whose tensors have no content, at the shape of Llama-2-7B.
"""

from __future__ import annotations

import pytest

pytest.importorskip("torch", reason="the real model needs torch: pip install -e '.[hw]'")
pytest.importorskip("triton", reason="triton has wheels for Linux on x86_64 alone: pip install -e '.[dev]' there")

from tests.bench.count_operations import count
from tests.hw import tiny_models
from tests.hw.tiny_models import FAMILIES

LAYERS, OPERATIONS_OF_A_LAYER, WAITS = 32, 14, 2


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize(("requests", "context"), [(8, 300), (8, 4000), (32, 300)])
def test_a_decode_iteration_stays_within_its_budget_at_any_number_of_kv_blocks(
    bits: int, requests: int, context: int
) -> None:
    prefill, decode = count("llama2_7b", bits, requests=requests, context=context)
    assert decode.total <= OPERATIONS_OF_A_LAYER * LAYERS, decode.launches
    for seen in (prefill, decode):
        assert seen.waits <= WAITS
        assert seen.host_copies == 0
        assert seen.uploads == 1


@pytest.mark.parametrize("bits", [16, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_decode_layer_of_every_family_stays_within_the_budget(family: str, bits: int) -> None:
    _, decode = count(family, bits)
    outside = 20  # embedding, rotations, head and the choice of tokens
    assert decode.total <= OPERATIONS_OF_A_LAYER * tiny_models.LAYERS + outside, decode.launches
    assert decode.waits <= WAITS
    assert decode.host_copies == 0


def test_sampled_tokens_cost_no_further_wait_and_no_copy() -> None:
    _, greedy = count("llama2_7b", 16)
    for seen in count("llama2_7b", 16, sampled=True):
        assert seen.waits == greedy.waits
        assert seen.host_copies == 0
        assert seen.uploads == 1


def test_layers_in_which_prompts_only_write_kv_cost_no_wait_no_copy_and_nothing_in_decodes() -> None:
    dense = count("llama2_7b", 16)
    found = count("llama2_7b", 16, kv_only=True)
    assert found[1].launches == dense[1].launches
    assert found[0].waits == dense[0].waits
    for seen in found:
        assert seen.host_copies == 0
        assert seen.uploads == 1


def test_a_pass_moves_its_weights_and_its_keys_about_once() -> None:
    """The bytes of Llama-2-7B at 16 bits without the embedding, and the keys and values of 8 contexts of 301 tokens."""
    weights = {16: 13.2e9, 8: 6.9e9, 4: 3.7e9}
    keys = 8 * 301 * 32 * 2 * 4096 * 2
    for bits, least in weights.items():
        moved = count("llama2_7b", bits)[1].moved_bytes
        assert least + keys < moved < 1.05 * (least + keys), bits
