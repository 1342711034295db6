"""The plain operations of a pass against loops over tokens and heads, and against transformers' own modules."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="the real model needs torch: pip install -e '.[hw]'")

from torch import Tensor  # noqa: E402
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm  # noqa: E402
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb  # noqa: E402

from hw.elastic import ops  # noqa: E402
from sim.cost.plan import KVKeep  # noqa: E402
from sim.engine.block_table import ring_positions  # noqa: E402

P, KV_HEADS, GROUP, DIM = 4, 2, 3, 8
HEADS = KV_HEADS * GROUP


def attend(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Attention of one head: query [d], keys and values [k, d]."""
    return (keys @ query * DIM**-0.5).softmax(0) @ values


def pool(blocks: int = 20) -> Tensor:
    return torch.full((blocks, 2, P, KV_HEADS, DIM), float("nan"))


@pytest.mark.parametrize("window", [0, 1, 5, 1000])
def test_decode_attends_to_what_a_request_keeps_within_the_window(window: int) -> None:
    torch.manual_seed(0)
    keeps = [KVKeep(), KVKeep(), KVKeep(first_tokens=0, last_tokens=6), KVKeep(first_tokens=3, last_tokens=5), KVKeep()]
    tokens = [1, 14, 17, 30, 0]
    kv, order = pool(), torch.randperm(20).tolist()
    table = torch.full((5, 4), 1 << 30, dtype=torch.int32)
    query = torch.randn(5, HEADS, DIM)
    expected = torch.zeros(5, HEADS, DIM)
    for request, (keep, count) in enumerate(zip(keeps, tokens, strict=True)):
        positions = ring_positions(keep, count)
        needed = -(-len(positions) // P)
        blocks = [order.pop() for _ in range(needed)]
        table[request, :needed] = torch.tensor(blocks, dtype=torch.int32)
        keys, values = torch.randn(2, len(positions), KV_HEADS, DIM)
        for place in range(len(positions)):
            kv[blocks[place // P], :, place % P] = torch.stack((keys[place], values[place]))
        near = [place for place, position in enumerate(positions) if not window or position > count - 1 - window]
        for head in range(HEADS if near else 0):
            shared = head // GROUP
            expected[request, head] = attend(query[request, head], keys[near, shared], values[near, shared])
    first = torch.tensor([keep.first_tokens or 0 for keep in keeps], dtype=torch.int32)
    last = torch.tensor([keep.last_tokens or 0 for keep in keeps], dtype=torch.int32)
    counts = torch.tensor(tokens, dtype=torch.int32)
    found = ops.paged_decode(query, kv, table, counts, first, last, scale=DIM**-0.5, window=window)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("window", [0, 1, 6])
def test_prefill_attends_to_its_prefix_and_to_no_later_token(window: int) -> None:
    torch.manual_seed(1)
    kv, order = pool(), torch.randperm(20).tolist()
    chunks = [(0, 5), (0, 1), (7, 6), (12, 0), (20, 1)]
    starts = torch.tensor([0, 5, 6, 12, 12, 13], dtype=torch.int32)
    table = torch.full((len(chunks), 6), 1 << 30, dtype=torch.int32)
    query = torch.randn(13, HEADS, DIM)
    expected = torch.zeros(13, HEADS, DIM)
    row = 0
    for chunk, (prefix, new) in enumerate(chunks):
        total = prefix + new
        needed = -(-total // P)
        blocks = [order.pop() for _ in range(needed)]
        table[chunk, :needed] = torch.tensor(blocks, dtype=torch.int32)
        keys, values = torch.randn(2, total, KV_HEADS, DIM)
        for place in range(total):
            kv[blocks[place // P], :, place % P] = torch.stack((keys[place], values[place]))
        for position in range(prefix, total):
            near = slice(max(0, position + 1 - window) if window else 0, position + 1)
            for head in range(HEADS):
                shared = head // GROUP
                expected[row, head] = attend(query[row, head], keys[near, shared], values[near, shared])
            row += 1
    prefixes = torch.tensor([prefix for prefix, _ in chunks], dtype=torch.int32)
    found = ops.paged_prefill(query, kv, table, starts, prefixes, scale=DIM**-0.5, window=window)
    # The pool holds NaN behind the last token of each chunk's last block, which no query may see.
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("d_rot", [DIM, 4, 0])
@pytest.mark.parametrize("norm", [False, True])
def test_rope_and_store_is_that_of_transformers(d_rot: int, norm: bool) -> None:
    torch.manual_seed(2)
    n = 7
    qkv = torch.randn(n, (HEADS + 2 * KV_HEADS) * DIM)
    query, key, value = qkv.view(n, -1, DIM).split((HEADS, KV_HEADS, KV_HEADS), dim=1)
    cos = sin = q_norm = k_norm = None
    if norm:
        q_norm, k_norm = torch.randn(2, DIM)
        query, key = (ops.rms_norm_reference(x, w, 1e-5, 1.0) for x, w in ((query, q_norm), (key, k_norm)))
    if d_rot:
        cos, sin = torch.randn(2, n, d_rot // 2).repeat(1, 1, 2)
        parts = apply_rotary_pos_emb(query[None, ..., :d_rot], key[None, ..., :d_rot], cos[None], sin[None], 2)
        query, key = (torch.cat((p[0], x[..., d_rot:]), -1) for p, x in zip(parts, (query, key), strict=True))
    kv = pool(5)
    slots = torch.tensor([3, 19, 0, 8, -1, 5, 11])
    found = ops.rope_and_store(
        qkv, cos, sin, kv, slots, heads=HEADS, kv_heads=KV_HEADS, q_norm=q_norm, k_norm=k_norm, eps=1e-5, offset=1.0
    )
    for one, other in zip(found, (query, key, value), strict=True):
        torch.testing.assert_close(one, other)
    expected = pool(5)
    for row, slot in enumerate(slots.tolist()):
        if slot >= 0:
            expected[slot // P, :, slot % P] = torch.stack((key[row], value[row]))
    torch.testing.assert_close(kv, expected, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("module", "offset"), [(LlamaRMSNorm, 0.0), (Gemma3RMSNorm, 1.0)])
def test_norms_round_like_those_of_transformers(module: type, offset: float, dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    norm = module(24, eps=1e-5).to(dtype)
    norm.weight.data.normal_()
    x, residual = torch.randn(2, 5, 24).to(dtype)
    assert torch.equal(ops.rms_norm(x, norm.weight, 1e-5, offset), norm(x))
    normed, total = ops.add_rms_norm(x, residual, norm.weight, 1e-5, offset)
    assert torch.equal(total, residual + x)
    assert torch.equal(normed, norm(residual + x))


def test_gated_activations_are_those_of_torch() -> None:
    gate, up = torch.randn(2, 5, 12)
    both = torch.cat((gate, up), dim=1)
    torch.testing.assert_close(ops.gated(both, "silu"), torch.nn.functional.silu(gate) * up)
    gelu = torch.nn.functional.gelu(gate, approximate="tanh")
    torch.testing.assert_close(ops.gated(both, "gelu_tanh"), gelu * up)
