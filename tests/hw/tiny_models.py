"""Tiny random models of every supported family, with every part that sets the family off."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the real model needs torch: pip install -e '.[hw]'")
transformers = pytest.importorskip("transformers", reason="the real model needs transformers: pip install -e '.[hw]'")

from sim.cost.memory import ffn_weight_bytes  # noqa: E402

LAYERS = 4
VOCABULARY = 97
FAMILIES = (
    "llama",
    "mistral",
    "sliding",
    "qwen2",
    "qwen3",
    "smollm3",
    "granite",
    "phi3",
    "phi3_longrope",
    "gemma3",
    "opt",
)
SHORT_TOKENS = 200
"""Up to which context ``phi3_longrope`` uses its short factors."""


def tiny_config(family: str, positions: int = 512) -> Any:
    """Return the configuration of a tiny model with a table of this many positions."""
    shape = {
        "vocab_size": VOCABULARY,
        "hidden_size": 48,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 6,
        "max_position_embeddings": positions,
        "pad_token_id": 0,
        "eos_token_id": None,
        "bos_token_id": None,
    }
    gated = {**shape, "intermediate_size": 72, "num_key_value_heads": 2, "initializer_range": 0.2}
    own_kv = {**gated, "num_key_value_heads": 6}
    half = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    long = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.1] * 4, "long_factor": [2.0, 3.0, 4.0, 5.0]}
    long["original_max_position_embeddings"] = SHORT_TOKENS
    makers = {
        "llama": lambda: transformers.LlamaConfig(**gated, attention_bias=True, mlp_bias=True),
        "llama without gqa": lambda: transformers.LlamaConfig(**own_kv, attention_bias=True, mlp_bias=True),
        "phi3 without gqa": lambda: transformers.Phi3Config(**own_kv, sliding_window=9, rope_parameters=half),
        "mistral": lambda: transformers.MistralConfig(**gated),
        "sliding": lambda: transformers.MistralConfig(**gated, sliding_window=9),
        "qwen2": lambda: transformers.Qwen2Config(**gated, tie_word_embeddings=True),
        "qwen3": lambda: transformers.Qwen3Config(**gated, head_dim=16),
        "smollm3": lambda: transformers.SmolLM3Config(**gated, no_rope_layer_interval=2),
        "granite": lambda: transformers.GraniteConfig(
            **gated,
            attention_bias=True,
            embedding_multiplier=3.0,
            attention_multiplier=0.3,
            residual_multiplier=0.7,
            logits_scaling=2.0,
        ),
        "phi3": lambda: transformers.Phi3Config(**gated, sliding_window=9, rope_parameters=half),
        "phi3_longrope": lambda: transformers.Phi3Config(
            **gated, original_max_position_embeddings=SHORT_TOKENS, rope_parameters=long
        ),
        "gemma3": lambda: transformers.Gemma3TextConfig(
            **gated, head_dim=16, sliding_window=9, sliding_window_pattern=2, query_pre_attn_scalar=20
        ),
        "opt": lambda: transformers.OPTConfig(**shape, ffn_dim=80, word_embed_proj_dim=48, init_std=0.2),
    }
    return makers[family]()


@lru_cache
def _tiny(family: str, positions: int, dtype: Any) -> Any:
    torch.manual_seed(7)
    model = transformers.AutoModelForCausalLM.from_config(tiny_config(family, positions), dtype=dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:  # at the start all weights of a norm are equal, and an error in them would not show
                parameter += 0.3 * torch.randn_like(parameter)
    return model


def tiny(family: str = "llama", *, positions: int = 512, dtype: Any = torch.float32) -> Any:
    """Return a new tiny random model, which the caller may change."""
    return copy.deepcopy(_tiny(family, positions, dtype))


@pytest.fixture
def few_channels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let plans cut the few channels of tiny models, to multiples of 8."""
    monkeypatch.setattr("sim.cost.plan.LEAST_CHANNELS", 1)
    monkeypatch.setattr("sim.cost.ffn_width.CHANNEL_MULTIPLE", 8)
    ffn_weight_bytes.cache_clear()  # it may know the bytes of other multiples
    yield
    ffn_weight_bytes.cache_clear()
