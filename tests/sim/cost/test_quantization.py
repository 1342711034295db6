"""A quantized checkpoint is sized by what its config states, or refused; it never passes for one of 16 bits."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sim.cost.memory import fixed_weight_bytes, peak_bytes, weight_bytes
from sim.cost.model_spec import ModelSpec, model_from_hf_config
from sim.cost.plan import dense_plan, keep_all
from sim.errors import ModelError, PlanError
from sim.policies.fixed import static_plan

SHAPE: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 3,
    "vocab_size": 1000,
    "max_position_embeddings": 4096,
    "dtype": "bfloat16",
}
LINEARS = [(256, 256), (256, 128), (256, 128), (256, 256), (256, 512), (256, 512), (512, 256)]
"""Inputs and outputs of q, k, v, o, gate, up and down."""
WEIGHTS = sum(i * o for i, o in LINEARS)


def quantized(stated: Any, **changed: Any) -> ModelSpec:
    return model_from_hf_config(SHAPE | {"quantization_config": stated} | changed, "tiny")


def layer_bytes(model: ModelSpec) -> float:
    """Return the bytes of the linear layers of one layer."""
    blocks = weight_bytes(model, dense_plan(model)) - fixed_weight_bytes(model)
    return blocks / model.num_layers - 2 * 2 * model.hidden_size  # two norms


def compressed(weights: dict[str, Any], **changed: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights}
    stated = {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}, "ignore": ["lm_head"]}
    return stated | changed


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True, "version": "gemm"}
GROUPS = {size: sum(-(-i // size) * o for i, o in LINEARS) for size in (32, 64, 128)}
ROWS = sum(o for _, o in LINEARS)
BLOCKS = sum(-(-i // 128) * -(-o // 128) for i, o in LINEARS)

SIZED = {
    "gptq": (GPTQ, WEIGHTS / 2 + GROUPS[128] * 2.5),
    "gptq with g_idx": (GPTQ | {"desc_act": True}, WEIGHTS / 2 + GROUPS[128] * 2.5 + 4 * sum(i for i, _ in LINEARS)),
    "gptq by rows": (GPTQ | {"bits": 8, "group_size": -1}, WEIGHTS + ROWS * 3),
    "awq": (AWQ, WEIGHTS / 2 + GROUPS[64] * 2.5),
    "awq, old keys": ({"quant_method": "awq", "w_bit": 4, "q_group_size": 64}, WEIGHTS / 2 + GROUPS[64] * 2.5),
    "awq without zero points": (AWQ | {"zero_point": False}, WEIGHTS / 2 + GROUPS[64] * 2),
    "nf4": ({"quant_method": "bitsandbytes", "load_in_4bit": True}, WEIGHTS / 2 + GROUPS[64] * 4),
    "nf4, method not stated": ({"load_in_4bit": True}, WEIGHTS / 2 + GROUPS[64] * 4),
    "int8": ({"quant_method": "bitsandbytes", "load_in_8bit": True}, WEIGHTS + ROWS * 4),
    "fp8 blocks": ({"quant_method": "fp8", "weight_block_size": [128, 128]}, WEIGHTS + BLOCKS * 4),
    "fp8 tensors": ({"quant_method": "fp8", "activation_scheme": "static"}, WEIGHTS + 7 * 4),
    "fbgemm": ({"quant_method": "fbgemm_fp8", "modules_to_not_convert": ["lm_head"]}, WEIGHTS + ROWS * 4),
    "w4a16": (
        compressed({"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True}),
        WEIGHTS / 2 + GROUPS[32] * 2,
    ),
    "w4a16 with zero points": (
        compressed({"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": False}),
        WEIGHTS / 2 + GROUPS[32] * 2.5,
    ),
    "w4a16 ordered by activation": (
        compressed({"num_bits": 4, "group_size": 32, "actorder": "group"}, format="pack-quantized"),
        WEIGHTS / 2 + GROUPS[32] * 2 + 4 * sum(i for i, _ in LINEARS),
    ),
    "w4a16 ordered by weight": (
        compressed({"num_bits": 4, "strategy": "group", "group_size": 32, "actorder": "weight"}, transform_config={}),
        WEIGHTS / 2 + GROUPS[32] * 2,
    ),
    "fp8 with norms kept": (
        {"quant_method": "fp8", "modules_to_not_convert": ["model.layers.0.input_layernorm", "model.norm", "q_norm"]},
        WEIGHTS + 7 * 4,
    ),
    "w8a8 fp8": (compressed({"num_bits": 8, "type": "float", "strategy": "channel"}), WEIGHTS + ROWS * 4),
}


@pytest.mark.parametrize(("stated", "expected"), SIZED.values(), ids=SIZED.keys())
def test_weights_are_sized_by_bits_scales_and_zero_points(stated: dict[str, Any], expected: float) -> None:
    model = quantized(stated)
    assert layer_bytes(model) == pytest.approx(expected, abs=7)
    assert fixed_weight_bytes(model) == 2 * model.fixed_params  # embeddings and head stay at 16 bits


def test_a_published_awq_checkpoint_has_its_published_size() -> None:
    # Meta-Llama-3.1-8B-Instruct-AWQ-INT4: two files of safetensors, 5.73 GB together.
    llama = SHAPE | {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32}
    llama |= {"num_key_value_heads": 8, "num_hidden_layers": 32, "vocab_size": 128256}
    model = model_from_hf_config(llama | {"quantization_config": AWQ | {"group_size": 128}}, "awq")
    assert round(weight_bytes(model, dense_plan(model)) / 1e9, 2) == 5.73


REFUSED = {
    "bits": ({"quant_method": "gptq", "bits": 3, "group_size": 128}, "bits is 3"),
    "group": ({"quant_method": "gptq", "bits": 4, "group_size": 0}, "group_size is 0"),
    "missing bits": ({"quant_method": "awq"}, "w_bit is None"),
    "head": (GPTQ | {"lm_head": True}, "lm_head is true"),
    "rules": (GPTQ | {"dynamic": {"-:.*down.*": {}}}, "dynamic"),
    "some modules": (GPTQ | {"modules_in_block_to_quantize": [["self_attn.q_proj"]]}, "unquantized"),
    "attention kept": (AWQ | {"modules_to_not_convert": ["self_attn"]}, "keeps 'self_attn' unquantized"),
    "first layer kept": ({"quant_method": "fp8", "modules_to_not_convert": ["model.layers.0"]}, "model.layers.0"),
    "int8 modules kept": ({"load_in_8bit": True, "llm_int8_skip_modules": ["down_proj"]}, "down_proj"),
    "a pattern": (compressed({"num_bits": 8}, ignore=["lm_head", "re:(a|b)+"]), "which is not read"),
    "a pattern of layers": (compressed({"num_bits": 8}, ignore=["lm_head", "re:.*mlp.*"]), "unquantized"),
    "head of compressed-tensors": (compressed({"num_bits": 8}, ignore=[]), "ignore lacks lm_head"),
    "two groups": (compressed({}, config_groups={"a": {}, "b": {}}), "one group"),
    "sparse": (compressed({"num_bits": 8}, sparsity_config={"format": "sparse-24-bitmask"}), "sparsity_config"),
    "weights that transform others": (
        compressed({"num_bits": 8}, transform_config={"config_groups": {"R1": {}}}),
        "transform",
    ),
    **{  # stored in half the bits, in 16 bits, in 8 bits, and in a way that is stated for a group
        form: (compressed({"num_bits": 4, "strategy": "channel"}, format=form), f"format '{form}' with 4 bits")
        for form in ("marlin-24", "dense", "int-quantized", "naive-quantized", "x" * 60)
    },
    "format of a group": (
        compressed({}, config_groups={"a": {"targets": ["Linear"], "weights": {"num_bits": 4}, "format": "dense"}}),
        "format 'dense'",
    ),
    "weights of LoRA": (GPTQ | {"adapter": {"name": "lora", "rank": 64}}, "adapter"),
    "int8 in 16 bits": ({"load_in_8bit": True, "llm_int8_has_fp16_weight": True}, "stay in 16 bits"),
    "fp8 loaded in 16 bits": ({"quant_method": "fp8", "dequantize": True}, "loaded in 16 bits"),
    "fp4": (compressed({"num_bits": 4, "type": "float"}), "'float' with 4 bits"),
    "fp8 cache of 4 bits": (GPTQ | {"kv_cache_scheme": {"num_bits": 4}}, "kv_cache_scheme"),
    "no method": ({"bits": 4}, "quant_method is None"),
    "no object": ("gptq", "must be an object"),
    **{
        method: ({"quant_method": method}, f"quant_method is '{method}'")
        for method in ("mxfp4", "torchao", "hqq", "quanto", "aqlm", "modelopt", "auto-round", "bitnet", "x" * 60)
    },
}


@pytest.mark.parametrize(("stated", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_is_not_sized_is_refused_in_one_sentence(stated: Any, message: str) -> None:
    with pytest.raises(ModelError) as caught:
        quantized(stated)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "unquantized model" in str(caught.value) or "object" in str(caught.value)
    assert "did you mean" not in str(caught.value)  # a scheme is not sized as the one with the nearest name


@pytest.mark.parametrize("stated", [None, {}, {"quant_method": "bitsandbytes", "load_in_8bit": False}])
def test_a_config_that_quantizes_nothing_is_one_of_16_bits(stated: Any) -> None:
    assert quantized(stated) == model_from_hf_config(SHAPE, "tiny")


@pytest.mark.parametrize(
    ("file", "stated", "bits"),
    [
        ("quantize_config.json", {"bits": 4, "group_size": 128, "desc_act": False}, 4),
        ("quant_config.json", {"w_bit": 4, "q_group_size": 128, "zero_point": True}, 4),
        ("hf_quant_config.json", {"quantization": {"quant_algo": "FP8"}}, None),
    ],
)
def test_a_file_next_to_the_config_states_the_quantization_too(
    tmp_path: Path, file: str, stated: dict[str, Any], bits: int | None
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SHAPE), encoding="utf-8")
    (tmp_path / file).write_text(json.dumps(stated), encoding="utf-8")
    if bits is None:
        with pytest.raises(ModelError, match="modelopt"):
            model_from_hf_config(tmp_path)
    else:
        assert model_from_hf_config(tmp_path).weight_bits == bits


def test_the_kv_cache_has_the_bits_that_the_checkpoint_asks_for() -> None:
    plain = quantized(None)
    stated = quantized(compressed({"num_bits": 8, "type": "float"}, kv_cache_scheme={"num_bits": 8, "type": "float"}))
    assert 2 * stated.kv_bytes_per_token_layer == plain.kv_bytes_per_token_layer


def test_no_plan_runs_at_more_bits_than_the_checkpoint_has() -> None:
    four, eight = quantized(GPTQ), quantized({"load_in_8bit": True})
    assert dense_plan(four).weight_bits == (4, 4, 4)
    assert static_plan(eight).weight_bits == (8, 8, 8)
    for model, bits in ((four, 16), (four, 8), (eight, 16)):
        with pytest.raises(PlanError, match=f"{model.weight_bits}-bit weights"):
            static_plan(model, weight_bits=bits)
    low = static_plan(eight, weight_bits=4)  # an 8-bit checkpoint may still run at 4
    assert weight_bytes(eight, low) < weight_bytes(eight, dense_plan(eight))


def test_the_peak_of_rap_counts_quantized_weights_too() -> None:
    model = quantized(GPTQ)
    assert peak_bytes(model, keep_all(model), 0, 0) == weight_bytes(model, dense_plan(model))
    full = replace(model, quantization=None)
    assert peak_bytes(full, keep_all(full), 0, 0) == 2 * full.total_params


# --- Other parts of a config that change bytes


@pytest.mark.parametrize(
    "changed",
    [
        {"num_local_experts": 8},
        {"n_routed_experts": 64, "model_type": "deepseek_v3"},
        {"kv_lora_rank": 512, "model_type": "deepseek_v2"},
        {"text_config": {"model_type": "llama"}, "model_type": "llava"},
        {"vision_config": {}} | {"audio_config": {"x": 1}},
        {"is_encoder_decoder": True, "model_type": "t5"},
        {"layer_types": ["full_attention", "mamba", "full_attention"]},
        {"layer_types": 3},
        {"mamba_d_state": 16, "model_type": "jamba"},
        {"pruned_heads": {"0": [1]}},
        {"block_configs": [{}]},
    ],
)
def test_a_model_with_parts_that_would_be_counted_wrong_is_refused(changed: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match="supported"):
        model_from_hf_config(SHAPE | changed)


MISTRAL = SHAPE | {"model_type": "mistral", "max_position_embeddings": 32768, "sliding_window": 4096}
QWEN = SHAPE | {"model_type": "qwen2", "max_position_embeddings": 32768, "sliding_window": 4096}


@pytest.mark.parametrize(
    "config",
    [
        MISTRAL,
        {key: value for key, value in MISTRAL.items() if key != "sliding_window"},  # the family's default is 4,096
        QWEN | {"use_sliding_window": True, "max_window_layers": 1},
        QWEN | {"use_sliding_window": True, "layer_types": ["full_attention", "full_attention", "sliding_attention"]},
    ],
)
def test_a_window_shorter_than_the_context_is_refused_until_the_user_says_which_kv_counts(
    config: dict[str, Any],
) -> None:
    with pytest.raises(ModelError, match="sliding_window is 4,096"):
        model_from_hf_config(config)
    assert model_from_hf_config(config, max_context_tokens=4096).max_context_tokens == 4096
    assert model_from_hf_config(config, keep_all_kv=True).max_context_tokens == 32768


@pytest.mark.parametrize(
    "config",
    [
        MISTRAL | {"sliding_window": None},
        MISTRAL | {"max_position_embeddings": 4096},
        QWEN,
        QWEN | {"use_sliding_window": True, "max_window_layers": 3},
        QWEN | {"use_sliding_window": True, "layer_types": ["full_attention"] * 3},
        SHAPE | {"sliding_window": 16},  # Llama has none
    ],
)
def test_a_window_that_no_layer_uses_changes_nothing(config: dict[str, Any]) -> None:
    assert model_from_hf_config(config).max_context_tokens == config["max_position_embeddings"]


@pytest.mark.parametrize("tokens", [0, 4097, 10**30])
def test_the_limit_of_the_context_is_at_most_that_of_the_config(tokens: int) -> None:
    with pytest.raises(ModelError, match="allows 1 to 4,096"):
        model_from_hf_config(SHAPE, max_context_tokens=tokens)


@pytest.mark.parametrize(
    "change", [{"num_hidden_layers": 10**9}, {"hidden_size": 10**12, "head_dim": 64}, {"vocab_size": 10**30}]
)
def test_a_shape_beyond_any_model_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match="at most"):
        model_from_hf_config(SHAPE | change)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[" * 100_000, "nests too deep"),
        ('{"a":' * 100_000, "nests too deep"),
        ('{"hidden_size": ' + "9" * 5000 + "}", "not valid JSON"),
        ("[1, 2]", "holds a list"),
        ('{"model_type": "llama", "hidden_size": NaN}', "hidden_size is nan"),
    ],
)
def test_a_hostile_config_is_one_line(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "config.json").write_text(content, encoding="utf-8")
    with pytest.raises(ModelError, match=message) as caught:
        model_from_hf_config(tmp_path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000
