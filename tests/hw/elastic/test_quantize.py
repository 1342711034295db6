"""Group-wise weights: bytes as sim.cost.memory counts them, values as a plain loop over groups computes them."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the real model needs torch: pip install -e '.[hw]'")

from hw.elastic.quantize import _SLICE_VALUES, ElasticLinear, pack_4bit, quantize, unpack_4bit  # noqa: E402
from sim.cost.memory import linear_weight_bytes  # noqa: E402
from sim.cost.model_spec import Linear, load_model  # noqa: E402
from sim.errors import PlanError  # noqa: E402

SHAPES = [(8, 128), (576, 576), (3, 130), (5, 7), (1, 1), (64, 1536)]


def weights(shape: tuple[int, int], seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.05


def reference(weight: np.ndarray, bits: int) -> np.ndarray:
    """Round to nearest, one group of one row at a time."""
    result = np.empty_like(weight)
    for row in range(weight.shape[0]):
        for start in range(0, weight.shape[1], 128):
            group = weight[row, start : start + 128]
            if bits == 8:
                scale = np.float32(np.float16(np.abs(group).max() / np.float32(127)))
                result[row, start : start + 128] = np.clip(np.rint(group / scale), -127, 127) * scale
            else:
                low, high = min(group.min(), np.float32(0)), max(group.max(), np.float32(0))
                scale = np.float32(np.float16((high - low) / np.float32(15)))
                zero = np.clip(np.rint(-low / scale), 0, 15)
                result[row, start : start + 128] = (np.clip(np.rint(group / scale) + zero, 0, 15) - zero) * scale
    return result


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("shape", SHAPES)
def test_values_are_those_of_a_plain_loop_over_rows_and_groups(shape: tuple[int, int], bits: int) -> None:
    weight = weights(shape)
    found = quantize(weight, bits).dequantize(torch.float32).numpy()
    np.testing.assert_array_equal(found, reference(weight.numpy(), bits))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("slice_values", [1, 150, 1000])
def test_slices_of_rows_change_no_value(
    shape: tuple[int, int], bits: int, slice_values: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = quantize(weights(shape), bits)
    at_once = copy.dequantize(torch.bfloat16)
    monkeypatch.setitem(_SLICE_VALUES, "cpu", slice_values)
    out = torch.full((shape[0] * shape[1] + 3,), 7.0, dtype=torch.bfloat16)
    assert torch.equal(copy.dequantize(torch.bfloat16, out), at_once)
    assert torch.equal(out[:-3].view(shape), at_once)
    assert (out[-3:] == 7.0).all()


def test_a_product_in_inference_mode_leaves_those_outside_of_it_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hw.elastic.quantize._scratches", {})
    linear = ElasticLinear(576, 8)
    linear.quantized = quantize(weights((8, 576)), 8)
    with torch.inference_mode():
        inside = linear(torch.ones(1, 576)).clone()
    with torch.no_grad():
        assert torch.equal(linear(torch.ones(1, 576)), inside)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("shape", SHAPES)
def test_bytes_are_those_that_the_memory_model_counts(shape: tuple[int, int], bits: int) -> None:
    expected = linear_weight_bytes(load_model("smollm2_135m"), Linear("any", shape[1], shape[0]), bits)
    assert quantize(weights(shape), bits).nbytes == expected


@pytest.mark.parametrize("bits", [8, 4])
def test_no_value_is_further_off_than_half_a_step(bits: int) -> None:
    weight = weights((32, 300), seed=1)
    copy = quantize(weight, bits)
    step = copy.scales.float().repeat_interleave(128, dim=1)[:, :300]
    # The scale is rounded to FP16 and a zero point to a full step: the edge of a group can lose that much more.
    slack = 1.001 if bits == 8 else 2.001
    assert ((copy.dequantize(torch.float32) - weight).abs() <= step / 2 * slack).all()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("value", [0.0, 1e-30, 1.5, -1.5])
def test_a_constant_weight_survives(value: float, bits: int) -> None:
    found = quantize(torch.full((4, 200), value), bits).dequantize(torch.float32)
    assert torch.allclose(found, torch.full((4, 200), value), rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("count", [0, 1, 2, 7, 128])
def test_packing_two_values_a_byte_loses_nothing(count: int) -> None:
    values = torch.arange(count, dtype=torch.uint8) % 16
    packed = pack_4bit(values)
    assert packed.numel() == (count + 1) // 2
    assert torch.equal(unpack_4bit(packed, count), values)


@pytest.mark.parametrize("bits", [8, 4])
def test_an_elastic_linear_multiplies_with_its_quantized_copy(bits: int) -> None:
    linear = torch.nn.Linear(300, 17)
    linear.__class__ = ElasticLinear
    x = torch.randn(5, 300)
    copy = quantize(linear.weight, bits)
    linear.quantized = copy
    assert torch.equal(linear(x), torch.nn.functional.linear(x, copy.dequantize(torch.float32), linear.bias))


def test_three_bits_are_refused() -> None:
    with pytest.raises(PlanError, match="cannot be quantized to 3 bits; choose 8 or 4"):
        quantize(weights((4, 4)), 3)
