"""Weights of which half of the bits are read, against slow arithmetic on single values."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

torch = pytest.importorskip("torch", reason="the real model needs torch: pip install -e '.[hw]'")

from hw.elastic.model import ElasticModel  # noqa: E402
from hw.elastic.nested import MOST, half_of_16, has_half, joined, read_upper, split  # noqa: E402
from hw.elastic.quantize import ElasticLinear, quantize  # noqa: E402
from hw.score.nll import measure_many  # noqa: E402
from sim.cost.plan import dense_plan  # noqa: E402
from tests.hw.elastic.test_model import some_tokens  # noqa: E402
from tests.hw.serving import LAYERS, tiny, tiny_spec  # noqa: E402


def slow_half_of_16(value: float) -> float:
    """Return a number rounded to 3 mantissa bits, ties to even, with the exponents of E4M3 over 256."""
    if value == 0.0:
        return 0.0
    exponent = max(math.frexp(abs(value))[1] - 1, -14)  # below 2^-14 values are subnormal
    step = 2.0 ** (exponent - 3)
    return math.copysign(round(abs(value) / step) * step, value)


def slow_half_of_8(code: int, scale: float) -> float:
    """Return the mean of the 16 codes that share the first 4 bits of one, times the scale."""
    first = (code & 0xFF) >> 4  # of two's complement
    sharing = [signed for signed in range(-128, 128) if (signed & 0xFF) >> 4 == first]
    return scale * sum(sharing) / len(sharing)


def all_fp16() -> torch.Tensor:
    """Return every FP16 number that has half of its bits."""
    numbers = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.float16)
    return numbers[numbers.abs() <= MOST]


def test_two_bytes_hold_every_fp16_weight_exactly() -> None:
    weights = all_fp16()
    assert len(weights) > 32_000
    upper, lower = split(weights)
    assert upper.nbytes + lower.nbytes == weights.nbytes
    assert torch.equal(joined(upper, lower).view(torch.int16), weights.view(torch.int16))
    assert torch.equal(read_upper(upper, torch.float16), half_of_16(weights))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_8_of_16_bits_are_the_nearest_number_of_3_mantissa_bits(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    random = torch.cat([torch.randn(500) * 0.05, torch.rand(500) * 2 * MOST - MOST, torch.randn(200) * 1e-5])
    weights = random.clamp(-MOST, MOST).to(dtype)
    expected = torch.tensor([slow_half_of_16(float(value)) for value in weights]).to(dtype)
    assert torch.equal(half_of_16(weights), expected)
    every = all_fp16()[::7]
    assert torch.equal(half_of_16(every), torch.tensor([slow_half_of_16(float(v)) for v in every]).to(torch.float16))


def test_a_larger_weight_has_no_half() -> None:
    assert has_half(torch.tensor([[MOST, -MOST]]))
    assert not has_half(torch.tensor([[0.1, -1.76]]))
    assert has_half(torch.empty(0))


@pytest.mark.parametrize("shape", [(6, 300), (4, 128), (3, 7)])
def test_4_of_8_bits_are_the_mean_of_the_codes_that_share_them(shape: tuple[int, int]) -> None:
    torch.manual_seed(shape[1])
    weight = quantize(torch.randn(shape), 8)
    codes, half = weight.packed.view(shape), weight.read(half=True)
    assert half.packed is weight.packed
    assert half.nbytes == weight.nbytes
    found = half.dequantize(torch.float32)
    for row in range(shape[0]):
        for column in range(shape[1]):
            expected = slow_half_of_8(int(codes[row, column]), float(weight.scales[row, column // 128]))
            assert float(found[row, column]) == pytest.approx(expected, rel=1e-6)
    assert torch.equal(half.rows(1, 3).dequantize(torch.float32), found[1:3])
    assert torch.equal(half.read(half=False).dequantize(torch.float32), weight.dequantize(torch.float32))


def test_4_bits_have_no_half() -> None:
    weight = quantize(torch.randn(4, 128), 4)
    assert not weight.read(half=True).half


@pytest.mark.parametrize("bits", [16, 8])
def test_a_product_is_that_with_the_weights_at_half_of_their_bits(bits: int) -> None:
    torch.manual_seed(bits)
    elastic = ElasticModel(tiny(), name="tiny")
    full = [linear.weight.data.clone() for linear in elastic.blocks["ffn"][1].linears]
    plan = replace(dense_plan(elastic.spec), weight_bits=(bits,) * LAYERS)
    elastic.apply(plan)
    held = elastic.bytes()
    elastic.apply(replace(plan, compute_bits=(bits, bits // 2, bits, bits)))
    assert elastic.bytes() == held
    for layer in (0, 1):
        for linear, weight in zip(elastic.blocks["ffn"][layer].linears, full, strict=True):
            assert isinstance(linear, ElasticLinear)
            x = torch.randn(3, weight.shape[1])
            if layer == 0:
                continue
            copy = half_of_16(weight) if bits == 16 else quantize(weight, 8).read(half=True).dequantize(weight.dtype)
            torch.testing.assert_close(linear(x), x @ copy.T, rtol=1e-5, atol=1e-6)
            assert not torch.allclose(linear(x), x @ weight.T, rtol=1e-5, atol=1e-6)
    elastic.apply(plan)
    for linear, weight in zip(elastic.blocks["ffn"][1].linears, full, strict=True):
        x = torch.randn(3, weight.shape[1])
        copy = weight if bits == 16 else quantize(weight, 8).dequantize(weight.dtype)
        torch.testing.assert_close(linear(x), x @ copy.T, rtol=1e-5, atol=1e-6)


def test_a_matrix_with_a_larger_weight_is_read_at_all_of_its_bits() -> None:
    model = tiny()
    model.model.layers[1].mlp.down_proj.weight.data[0, 0] = 2.0
    elastic = ElasticModel(model, name="tiny")
    elastic.apply(replace(dense_plan(elastic.spec), compute_bits=(8,) * LAYERS))
    halves = [[linear.reads_half for linear in elastic.blocks["ffn"][layer].linears] for layer in (0, 1)]
    assert halves == [[True, True, True], [True, True, False]]


@pytest.mark.parametrize("bits", [16, 8])
def test_the_measured_loss_is_that_of_the_model_as_it_runs(bits: int) -> None:
    plan = replace(
        dense_plan(tiny_spec()), weight_bits=(bits,) * LAYERS, compute_bits=(bits // 2, bits, bits // 2, bits)
    )
    window = torch.tensor([some_tokens(20, seed=3)])
    found = measure_many(ElasticModel(tiny(), name="tiny"), [plan, replace(plan, compute_bits=None)], window)
    elastic = ElasticModel(tiny(), name="tiny")
    elastic.apply(plan)
    logits = elastic.forward(window, all_logits=True)[0]
    loss = float(torch.nn.functional.cross_entropy(logits[:-1], window[0, 1:], reduction="sum"))
    assert found[0].total == pytest.approx(loss, rel=1e-5)
    assert found[0].total != found[1].total
