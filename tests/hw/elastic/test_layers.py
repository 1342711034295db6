"""Matrices in one tensor: parameters are views of it, bytes count once, and quantized rows are those of each part."""

from __future__ import annotations

from dataclasses import replace

import pytest

torch = pytest.importorskip("torch", reason="the real model needs torch: pip install -e '.[hw]'")

from hw.elastic.layers import Matrix, find_activation  # noqa: E402
from hw.elastic.model import ElasticModel  # noqa: E402
from hw.elastic.quantize import quantize  # noqa: E402
from sim.cost.plan import dense_plan, drop, with_mask  # noqa: E402
from sim.errors import ModelError  # noqa: E402
from tests.hw.tiny_models import FAMILIES, LAYERS, tiny  # noqa: E402


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_are_views_of_the_matrices_also_after_a_drop_and_a_restore(family: str) -> None:
    elastic = ElasticModel(tiny(family))
    dense = dense_plan(elastic.spec)
    for _ in range(2):
        for layer in elastic.layers:
            for matrix in (layer.qkv, layer.out, layer.up, layer.down):
                start, first = matrix.weight.value.data_ptr(), 0
                for linear in matrix.linears:
                    assert linear.weight.data_ptr() == start + first * matrix.weight.value.stride(0) * 4
                    first += linear.out_features
                assert first == matrix.shape[0]
                if matrix.bias is not None:
                    assert matrix.bias.value.data_ptr() == matrix.linears[0].bias.data_ptr()
        elastic.apply(with_mask(dense, drop(elastic.spec, mha=range(LAYERS), ffn=range(LAYERS))))
        assert all(layer.qkv.weight.value.numel() == 0 for layer in elastic.layers)
        elastic.apply(dense)


@pytest.mark.parametrize("bits", [8, 4])
def test_the_rows_of_a_quantized_matrix_are_the_quantized_rows_of_its_parts(bits: int) -> None:
    model = tiny("qwen3")
    weights = [getattr(model.model.layers[1].self_attn, name).weight.detach().clone() for name in ("q_proj", "k_proj")]
    elastic = ElasticModel(model)
    elastic.apply(replace(dense_plan(elastic.spec), weight_bits=(bits,) * LAYERS))
    qkv = elastic.layers[1].qkv
    assert qkv.quantized is not None
    for linear, weight in zip(qkv.linears[:2], weights, strict=True):
        assert linear.quantized is not None
        assert linear.quantized.nbytes == quantize(weight, bits).nbytes
        assert torch.equal(linear.quantized.dequantize(torch.float32), quantize(weight, bits).dequantize(torch.float32))
        storage = linear.quantized.packed.untyped_storage().data_ptr()
        assert storage == qkv.quantized.packed.untyped_storage().data_ptr()
    both = torch.cat([linear.quantized.dequantize(torch.float32) for linear in qkv.linears])
    assert torch.equal(both, qkv.quantized.dequantize(torch.float32))


def test_parts_whose_quantized_rows_would_begin_inside_a_byte_are_refused() -> None:
    odd = [torch.nn.Linear(5, 3), torch.nn.Linear(5, 3)]
    with pytest.raises(ModelError, match="each must have an even number of rows"):
        Matrix(odd)
    assert Matrix(odd[:1]).shape == (3, 5)


@pytest.mark.parametrize("name", ["silu", "gelu_pytorch_tanh", "gelu", "relu"])
def test_an_activation_is_that_of_transformers(name: str) -> None:
    from transformers.activations import ACT2FN

    x = torch.randn(3, 10)
    torch.testing.assert_close(find_activation(name, gated=True)(x), ACT2FN[name](x[:, :5]) * x[:, 5:])
    torch.testing.assert_close(find_activation(name, gated=False)(x), ACT2FN[name](x))
