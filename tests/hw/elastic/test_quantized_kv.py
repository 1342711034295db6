"""KV at 8 and 4 bits: how exact it comes back, what it takes, and that the paged pool returns what was stored."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

torch = pytest.importorskip("torch")

from hw.elastic.device import Cpu  # noqa: E402
from hw.elastic.paged_kv import KVArena  # noqa: E402
from hw.elastic.quantized_kv import QuantizedKV, hadamard, pack, rotated, stored, unpack  # noqa: E402
from sim.cost.kv_format import kv_block_tokens_at  # noqa: E402
from sim.cost.model_spec import load_model  # noqa: E402


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("head_dim", [8, 15, 64, 96, 128])
def test_a_value_comes_back_within_half_a_step_of_its_head(head_dim: int, bits: int) -> None:
    torch.manual_seed(head_dim)
    values = 3.0 * torch.randn(50, 2, head_dim) + 5.0
    packed = pack(values, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (50, 2, -(-head_dim * bits // 8) + 4)
    codes = rotated(values)
    step = (codes.amax(-1, keepdim=True) - codes.amin(-1, keepdim=True)) / (2**bits - 1)
    error = (unpack(packed, bits, head_dim, torch.float32) - codes).abs()
    # FP16 rounds the least value by 2^-11 of itself, and the scale likewise, over all of its steps.
    rounding = codes.abs().amax(-1, keepdim=True) * 2**-10
    assert bool((error <= 0.5 * step + rounding).all())


def test_equal_values_and_values_beyond_fp16_come_back_and_no_number_stays_none() -> None:
    equal = torch.full((1, 15), 0.5)  # of a size that is not rotated
    assert torch.equal(unpack(pack(equal, 4), 4, 15, torch.float32), equal)
    large = torch.linspace(-1e5, 1e5, 16)[None]
    assert bool(torch.isfinite(unpack(pack(large, 8), 8, 16, torch.float32)).all())
    half = torch.full((1, 128), 30_000.0, dtype=torch.float16)  # rotated, its first value is beyond FP16
    assert all(bool(back.isfinite().all()) for back in stored(half, half, 8))
    for size in (15, 16):
        for value in (torch.nan, torch.inf, -torch.inf):
            lost = torch.zeros(1, size)
            lost[0, 3] = value
            assert bool(unpack(pack(lost, 8), 8, size, torch.float32).isnan().any())


def test_a_rotation_keeps_products_and_spares_the_other_channels_of_a_large_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    matrix = hadamard(64, torch.device("cpu"))
    assert matrix is not None
    torch.testing.assert_close(matrix @ matrix, torch.eye(64))
    assert hadamard(96, torch.device("cpu")) is None
    torch.manual_seed(1)
    keys, query = torch.randn(200, 64), torch.randn(64)
    keys[:, 7] += 30.0  # in all tokens, as in many models
    torch.testing.assert_close(rotated(keys) @ rotated(query[None])[0], keys @ query, rtol=1e-4, atol=1e-4)
    better = stored(keys, keys, 4)[0]
    monkeypatch.setattr("hw.elastic.quantized_kv.rotated", lambda values: values)
    plain = stored(keys, keys, 4)[0]
    others = [i for i in range(64) if i != 7]
    assert (better - keys)[:, others].square().mean() < 0.5 * (plain - keys)[:, others].square().mean()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_pool_returns_what_was_stored_and_counts_its_bytes(dtype: torch.dtype, bits: int) -> None:
    rng = random.Random(bits)
    torch.manual_seed(bits)
    arena = KVArena(Cpu(), capacity=20, block_tokens=4, heads=3, head_dim=16, dtype=dtype)
    arena.resize(20)
    spec = replace(load_model("smollm2_135m"), num_kv_heads=3, head_dim=16, kv_dtype_bytes=dtype.itemsize)
    kv = QuantizedKV(arena, bits)
    assert kv.token_bytes == spec.kv_bytes_per_token_layer_at(bits)
    assert kv.block_tokens == kv_block_tokens_at(spec, 4, bits) > 4
    full = torch.randn(20, 2, 4, 3, 16).to(dtype)
    arena.kv.copy_(full)
    blocks = rng.sample(range(20), 5)
    tokens = 4 * kv.block_tokens + 2
    slots = torch.tensor([blocks[t // kv.block_tokens] * kv.block_tokens + t % kv.block_tokens for t in range(tokens)])
    keys, values = torch.randn(2, tokens, 3, 16).to(dtype)
    order = torch.randperm(tokens)
    kv.write(slots[order], keys[order], values[order])
    read = [half.flatten(0, 1)[:tokens] for half in kv.read(torch.tensor(blocks))]
    for found, expected in zip(read, stored(keys, values, bits), strict=True):
        assert torch.equal(rotated(found).to(dtype), expected)
    others = [block for block in range(20) if block not in blocks]
    assert torch.equal(arena.kv[others], full[others])
    again = QuantizedKV(arena, bits)
    again.write_bytes(slots, kv.read_bytes(slots.flip(0)).flip(0))
    assert torch.equal(again.read(torch.tensor(blocks))[0].flatten(0, 1)[:tokens], read[0])
