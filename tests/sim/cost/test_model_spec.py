"""Model shapes: parameter counts against published totals and against transformers itself."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sim.cost.model_spec import (
    MODEL_CONFIGS,
    SUPPORTED_FAMILIES,
    ModelSpec,
    load_model,
    model_from_hf_config,
    model_names,
)
from sim.errors import ModelError

PUBLISHED_PARAMS = {
    "llama2_7b": 6_738_415_616,
    "llama2_70b": 68_976_648_192,
    "llama3.1_70b": 70_553_706_496,
    "llama3_8b": 8_030_261_248,
    "llama3.1_8b": 8_030_261_248,
    "qwen1.5_7b": 7_721_324_544,
    "qwen2.5_7b": 7_615_616_512,
    "qwen2_7b": 7_615_616_512,
    "qwen2.5_72b": 72_706_203_648,
    "qwen3_32b": 32_762_123_264,
    "mistral_7b": 7_241_732_096,
    "codellama_34b": 33_743_970_304,
    "opt_13b": 12_853_473_280,
    "smollm2_135m": 134_515_008,
    "smollm3_3b": 3_075_098_624,
    "granite3.3_8b": 8_170_864_640,
    "phi3_mini": 3_821_079_552,
    "gemma3_1b": 999_885_952,
}

_COMMON = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
_LLAMA = _COMMON | {"intermediate_size": 56, "num_key_value_heads": 2, "max_position_embeddings": 64}
_OPT = _COMMON | {"model_type": "opt", "ffn_dim": 56, "word_embed_proj_dim": 32, "max_position_embeddings": 64}
# Small configs of every family, with each switch that changes a parameter count.
HF_CONFIGS: dict[str, dict[str, Any]] = {
    "llama": _LLAMA | {"model_type": "llama"},
    "llama_tied": _LLAMA | {"model_type": "llama", "tie_word_embeddings": True},
    "llama_biased": _LLAMA | {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "llama_wide_heads": _LLAMA | {"model_type": "llama", "head_dim": 16},
    "llama_without_gqa": {k: v for k, v in _LLAMA.items() if k != "num_key_value_heads"} | {"model_type": "llama"},
    "mistral": _LLAMA | {"model_type": "mistral"},
    "mistral_wide_heads": _LLAMA | {"model_type": "mistral", "head_dim": 16},
    "qwen2": _LLAMA | {"model_type": "qwen2"},
    "qwen2_tied": _LLAMA | {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": _LLAMA | {"model_type": "qwen3", "head_dim": 16},
    "qwen3_tied_biased": _LLAMA
    | {"model_type": "qwen3", "head_dim": 16, "tie_word_embeddings": True, "attention_bias": True},
    "smollm3": _LLAMA | {"model_type": "smollm3", "pad_token_id": 0},
    "smollm3_untied_biased": _LLAMA
    | {
        "model_type": "smollm3",
        "pad_token_id": 0,
        "tie_word_embeddings": False,
        "attention_bias": True,
        "mlp_bias": True,
    },
    "granite": _LLAMA | {"model_type": "granite"},
    "granite_tied_biased": _LLAMA
    | {"model_type": "granite", "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    "phi3": _LLAMA | {"model_type": "phi3", "pad_token_id": 0},
    "phi3_without_gqa": _LLAMA | {"model_type": "phi3", "pad_token_id": 0, "num_key_value_heads": None},
    "gemma3_text": _LLAMA | {"model_type": "gemma3_text", "head_dim": 16, "sliding_window": 64},
    "gemma3_text_untied_biased": _LLAMA
    | {
        "model_type": "gemma3_text",
        "head_dim": 16,
        "sliding_window": 64,
        "tie_word_embeddings": False,
        "attention_bias": True,
    },
    "opt": _OPT,
    "opt_untied": _OPT | {"tie_word_embeddings": False},
    "opt_without_bias": _OPT | {"enable_bias": False},
}


def test_every_model_of_conf_has_a_published_total():
    assert set(model_names()) - {"tiny"} == set(PUBLISHED_PARAMS)  # tiny is for quick checks with random weights


@pytest.mark.parametrize(("name", "params"), PUBLISHED_PARAMS.items())
def test_parameters_add_up_to_the_published_total(name: str, params: int):
    assert load_model(name).total_params == params


@pytest.mark.parametrize("name", PUBLISHED_PARAMS)
def test_a_model_file_bears_the_name_of_its_model_and_states_its_total_in_its_comment(name: str):
    text = (MODEL_CONFIGS / f"{name}.yaml").read_text(encoding="utf-8")
    assert load_model(name).name == name
    assert f"{PUBLISHED_PARAMS[name]:,} parameters" in text
    assert "huggingface.co/" in text


def test_blocks_of_llama_2_7b_have_the_bytes_that_rap_reports():
    model = load_model("llama2_7b")
    assert round(2 * model.total_params / 1e9, 4) == 13.4768
    assert round(2 * model.mha_params / 1e9, 4) == 0.1342
    assert round(2 * model.ffn_params / 1e9, 4) == 0.2705
    assert model.kv_bytes_per_token_layer == 16_384


@pytest.mark.parametrize("config", HF_CONFIGS.values(), ids=HF_CONFIGS.keys())
def test_counts_equal_the_parameters_of_the_model_that_transformers_builds(config: dict[str, Any]):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    keys = {key: value for key, value in config.items() if key != "model_type"}
    with torch.device("meta"):
        real = transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.for_model(config["model_type"], **keys)
        )
    spec = model_from_hf_config(config)
    attention_names = (".self_attn.", ".self_attn_layer_norm.", ".input_layernorm.")
    if spec.post_norms:  # under the name that is the FFN's first norm elsewhere
        attention_names += (".post_attention_layernorm.",)
    total = layers = mha = 0
    for name, parameter in real.named_parameters():  # a tied head is listed once
        total += parameter.numel()
        if ".layers.0." in name:
            layers += parameter.numel()
            mha += parameter.numel() if any(part in name for part in attention_names) else 0
    assert spec.total_params == total
    assert spec.mha_params == mha
    assert spec.ffn_params == layers - mha


COLUMN_PARALLEL = ("q_proj", "k_proj", "v_proj", "qkv_proj", "gate_proj", "up_proj", "gate_up_proj", "fc1")
ROW_PARALLEL = ("o_proj", "out_proj", "down_proj", "fc2")


def _held(name: str, shape: tuple[int, ...], tp: int, kv_heads: int) -> int:
    """Return the elements of a parameter that one of ``tp`` GPUs holds, by Megatron's rules."""
    size, layer = math.prod(shape), name.split(".")[-2]
    if layer in ("embed_tokens", "lm_head"):
        return -(-shape[0] // 64) * 64 // tp * shape[1]
    if layer in ("k_proj", "v_proj"):
        return size // min(tp, kv_heads)
    if layer in COLUMN_PARALLEL:
        return size // tp
    return size // tp if layer in ROW_PARALLEL and len(shape) == 2 else size


@pytest.mark.parametrize("tp", [2, 4])
@pytest.mark.parametrize("config", HF_CONFIGS.values(), ids=HF_CONFIGS.keys())
def test_a_gpu_of_a_divided_model_holds_its_share_of_every_parameter_of_transformers(config: dict[str, Any], tp: int):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    if config["model_type"] == "phi3" and config["num_key_value_heads"] == 2 and tp == 4:
        pytest.skip("the rows of a fused projection whose KV heads are on two GPUs each are not a share of the matrix")
    with torch.device("meta"):
        real = transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.for_model(
                config["model_type"], **{key: value for key, value in config.items() if key != "model_type"}
            )
        )
    spec = model_from_hf_config(config)
    held = sum(_held(name, tuple(each.shape), tp, spec.num_kv_heads) for name, each in real.named_parameters())
    assert spec.shard(tp).total_params == held


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_the_gpus_of_a_divided_model_hold_its_kv_once_and_its_weights_but_for_norms(tp: int):
    model = load_model("llama3.1_70b")
    shard = model.shard(tp)
    assert tp * shard.kv_bytes_per_token_layer == model.kv_bytes_per_token_layer
    assert shard.num_heads // shard.num_kv_heads == model.num_heads // model.num_kv_heads
    norms = (2 * model.num_layers + 1) * model.hidden_size
    assert tp * shard.total_params == model.total_params + (tp - 1) * norms
    if tp == 1:
        assert shard is model


def test_kv_heads_that_are_fewer_than_gpus_are_on_several():
    model = load_model("qwen2.5_7b")  # 28 query heads over 4 KV heads
    assert model.shard(4).num_kv_heads == 1
    halved = replace(model, num_kv_heads=2)
    assert halved.shard(4).kv_bytes_per_token_layer * 4 == 2 * halved.kv_bytes_per_token_layer


@pytest.mark.parametrize(
    ("changes", "tp"), [({}, 8), ({"num_heads": 6, "num_kv_heads": 3}, 2), ({"intermediate_size": 18943}, 2), ({}, 3)]
)
def test_a_model_that_cannot_be_divided_is_refused_with_the_degrees_that_can(changes: dict[str, int], tp: int):
    model = replace(load_model("qwen2.5_7b"), **changes)
    with pytest.raises(ModelError, match=rf"among tp={tp} GPUs.*allowed are gpu.tp=1"):
        model.shard(tp)


def test_tied_embeddings_count_once():
    tied = load_model("smollm2_135m")
    untied = replace(tied, tied_embeddings=False)
    assert untied.total_params - tied.total_params == tied.vocab_size * tied.hidden_size


def test_a_hugging_face_config_reads_the_same_from_a_dict_a_file_and_a_folder(tmp_path: Path):
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(HF_CONFIGS["qwen3"]), encoding="utf-8")
    from_folder = model_from_hf_config(folder)
    assert from_folder.name == "tiny"
    assert from_folder == model_from_hf_config(str(folder / "config.json"))
    assert replace(from_folder, name="x") == model_from_hf_config(HF_CONFIGS["qwen3"], name="x")


def test_the_official_config_of_smollm2_gives_the_model_of_conf():
    official = {
        "model_type": "llama",
        "attention_bias": False,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "max_position_embeddings": 8192,
        "num_attention_heads": 9,
        "num_hidden_layers": 30,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "vocab_size": 49152,
    }
    assert model_from_hf_config(official, name="smollm2_135m") == load_model("smollm2_135m")


@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("bfloat16", 2), ("torch.float16", 2), (None, 2)])
@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_dtype_is_read_under_its_old_and_its_new_key(key: str, dtype: str | None, size: int):
    model = model_from_hf_config(HF_CONFIGS["llama"] | {key: dtype})
    assert model.weight_dtype_bytes == model.kv_dtype_bytes == size


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "family 'gpt2', which is not supported; supported are llama, mistral, qwen2, qwen3"),
        ({"model_type": ["llama"]}, "known are llama"),
        ({"hidden_size": None}, "lacks hidden_size"),
        ({"hidden_size": "big"}, "hidden_size is 'big'; it must be a whole number"),
        ({"hidden_size": 33}, "state head_dim"),
        ({"num_attention_heads": 0}, "num_attention_heads 0"),
        ({"num_hidden_layers": 0}, "num_layers is 0; it must be a whole number of at least 1"),
        ({"num_key_value_heads": 3}, "not a multiple of num_kv_heads 3"),
        ({"tie_word_embeddings": "false"}, "it must be true or false"),
        ({"torch_dtype": "float8_e4m3fn"}, "allowed are bfloat16, float16, float32"),
    ],
)
def test_a_hugging_face_config_that_cannot_be_used_says_which_key_and_what_is_allowed(
    change: dict[str, Any], message: str
):
    with pytest.raises(ModelError) as caught:
        model_from_hf_config(HF_CONFIGS["llama"] | change)
    assert message in str(caught.value)


UNSUPPORTED: dict[str, tuple[dict[str, Any], str]] = {
    "mixtral": ({"num_local_experts": 8}, "a mixture of experts"),
    "t5": ({"is_encoder_decoder": True}, "an encoder"),
    "gemma2": ({"attn_logit_softcapping": 50.0}, "a cap on the logits"),
    "gemma3": ({"text_config": {"hidden_size": 8}}, "a vision, audio or nested text part"),
    "gemma3_text": ({"use_bidirectional_attention": True}, "attention that is not causal"),
    "granitemoehybrid": ({"mamba_n_heads": 4}, "a state-space or linear-attention layer"),
    "lfm2": ({"conv_L_cache": 3}, "a state-space or linear-attention layer"),
    "mllama_text_model": ({"cross_attention_layers": [3]}, "cross attention"),
    "deepseek_v3": ({"kv_lora_rank": 512}, "multi-head latent attention"),
}


@pytest.mark.parametrize("family", UNSUPPORTED)
def test_a_model_with_other_parts_is_refused_with_the_part_and_the_families_that_are_supported(family: str):
    change, part = UNSUPPORTED[family]
    with pytest.raises(ModelError) as caught:
        model_from_hf_config(HF_CONFIGS["gemma3_text"] | change | {"model_type": family})
    said = str(caught.value)
    assert f"states {next(iter(change))}: a model with {part} is not supported" in said
    assert said.endswith(f"supported are the families {', '.join(SUPPORTED_FAMILIES)}")
    assert "did you mean" not in said


@pytest.mark.parametrize("family", ["gemma3_text", "phi3", "smollm3"])
def test_a_window_of_the_new_families_must_hold_the_context_or_be_charged_in_full(family: str):
    config = HF_CONFIGS[family] | {"sliding_window": 16, "use_sliding_window": True}
    with pytest.raises(ModelError, match="sliding_window is 16"):
        model_from_hf_config(config)
    assert model_from_hf_config(config, keep_all_kv=True).max_context_tokens == 64
    assert model_from_hf_config(config, max_context_tokens=16).max_context_tokens == 16


@pytest.mark.parametrize(
    ("family", "key"),
    [
        ("gemma3_text", "head_dim"),
        ("smollm3", "num_key_value_heads"),
        ("mistral", "num_key_value_heads"),
        ("qwen2", "num_key_value_heads"),
        ("qwen3", "head_dim"),
    ],
)
def test_a_key_whose_default_differs_between_families_is_never_guessed(family: str, key: str):
    config = {name: value for name, value in HF_CONFIGS[family].items() if name != key}
    with pytest.raises(ModelError, match=f"lacks {key}"):
        model_from_hf_config(config)


@pytest.mark.parametrize(
    "change",
    [
        {"word_embed_proj_dim": 16},
        {"do_layer_norm_before": False},
        {"layer_norm_elementwise_affine": False},
        {"_remove_final_layer_norm": True},
    ],
)
def test_an_opt_with_other_blocks_is_refused(change: dict[str, Any]):
    with pytest.raises(ModelError, match="not supported"):
        model_from_hf_config(HF_CONFIGS["opt"] | change)


@pytest.mark.parametrize(("text", "message"), [("{", "not valid JSON"), ("[1]", "holds a list"), ("\xff", "JSON")])
def test_a_config_file_that_is_no_json_object_is_a_model_error(tmp_path: Path, text: str, message: str):
    path = tmp_path / "config.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ModelError, match=message):
        model_from_hf_config(path)


def test_a_missing_config_file_is_named_with_the_models_known_by_name(tmp_path: Path):
    with pytest.raises(ModelError, match=r"no model config at .*missing.*llama2_7b"):
        model_from_hf_config(tmp_path / "missing")


def test_an_unknown_model_name_offers_the_nearest():
    with pytest.raises(ModelError, match="did you mean 'llama2_7b'"):
        load_model("llama2-7b")
    with pytest.raises(ModelError, match="model_from_hf_config"):
        load_model("hf")
    with pytest.raises(ModelError, match="no model"):
        load_model("../gpu/a100_80gb")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("_target_: sim.cost.model_spec.ModelSpec\nnum_layer: 3\n", "did you mean 'num_layers'"),
        ("_target_: sim.cost.model_spec.ModelSpec\nname: x\n", "incomplete.*num_layers"),
        ("_target_: os.system\n", "must say `_target_: sim.cost.model_spec.ModelSpec`"),
        ("- 1\n", "must say"),
        ("a: [\n", "cannot be read as YAML"),
    ],
)
def test_a_malformed_model_file_says_what_to_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, message: str
):
    monkeypatch.setattr("sim.cost.model_spec.MODEL_CONFIGS", tmp_path)
    (tmp_path / "mine.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(ModelError, match=message):
        load_model("mine")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_heads": 5}, "not a multiple"),
        ({"num_layers": True}, "num_layers is True"),
        ({"head_dim": 64.0}, "head_dim is 64.0"),
        ({"learned_positions": -1}, "at least 0"),
        ({"tied_embeddings": "no"}, "must be true or false"),
        ({"weight_dtype_bytes": 1}, "allowed are 2 and 4"),
    ],
)
def test_a_shape_that_cannot_be_is_refused_by_its_constructor(change: dict[str, Any], message: str):
    with pytest.raises(ModelError, match=message):
        replace(load_model("smollm2_135m"), **change)


def test_hydra_builds_the_same_model_as_load_model_and_any_hugging_face_config(tmp_path: Path):
    from hydra import compose, initialize_config_dir
    from hydra.utils import instantiate

    path = tmp_path / "config.json"
    path.write_text(json.dumps(HF_CONFIGS["mistral"]), encoding="utf-8")
    with initialize_config_dir(str(MODEL_CONFIGS.parent), version_base=None):
        for name in model_names():
            assert instantiate(compose(overrides=[f"+model={name}"]).model) == load_model(name)
        mine = instantiate(compose(overrides=["+model=hf", f"model.config={path}"]).model)
    assert isinstance(mine, ModelSpec)
    assert mine == model_from_hf_config(path)
