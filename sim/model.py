"""What a decoder-only language model is made of: the parameters of every block, counted exactly."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sim.errors import ModelError

QUANT_GROUP_ELEMENTS = 128
"""Input elements of a linear layer that share one scale at 8 and 4 bits, as AWQ and GPTQ checkpoints do by default."""


@dataclass(frozen=True, slots=True)
class Linear:
    """One weight matrix of ``out_features x in_features``, and whether it has a bias."""

    name: str
    in_features: int
    out_features: int
    bias: bool = False

    @property
    def params(self) -> int:
        """Weights and bias entries."""
        return self.in_features * self.out_features + (self.out_features if self.bias else 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """The shape of a decoder-only transformer, as its checkpoint states it.

    One layer is an MHA block (norm, projections, output projection) and an FFN block (norm, up, gate, down).
    RAP's unit of pruning is one such block, its norm included (arXiv 2505.17138, section 3).
    """

    name: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    tied_embeddings: bool = False
    gated_ffn: bool = True
    qkv_bias: bool = False
    out_bias: bool = False
    ffn_bias: bool = False
    norm_bias: bool = False
    qk_norm: bool = False
    learned_positions: int = 0
    weight_dtype_bytes: int = 2
    kv_dtype_bytes: int = 2
    max_context_tokens: int = 4096

    def __post_init__(self) -> None:
        for field in ("num_layers", "hidden_size", "intermediate_size", "num_heads", "num_kv_heads", "head_dim",
                      "vocab_size", "weight_dtype_bytes", "kv_dtype_bytes", "max_context_tokens"):
            value = getattr(self, field)
            if not isinstance(value, int) or value < 1:
                raise ModelError(f"model {self.name!r}: {field} is {value!r}; it must be a whole number of at least 1")
        if self.num_heads % self.num_kv_heads:
            raise ModelError(
                f"model {self.name!r}: num_heads {self.num_heads} is no multiple of num_kv_heads {self.num_kv_heads}; "
                "grouped-query attention shares each KV head among an equal number of query heads"
            )

    @property
    def mha_linears(self) -> tuple[Linear, ...]:
        """The weight matrices of one MHA block: q, k, v and output projection."""
        q_size, kv_size = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        return (
            Linear("q_proj", self.hidden_size, q_size, self.qkv_bias),
            Linear("k_proj", self.hidden_size, kv_size, self.qkv_bias),
            Linear("v_proj", self.hidden_size, kv_size, self.qkv_bias),
            Linear("o_proj", q_size, self.hidden_size, self.out_bias),
        )

    @property
    def ffn_linears(self) -> tuple[Linear, ...]:
        """The weight matrices of one FFN block: gate (when gated), up and down projection."""
        up = Linear("up_proj", self.hidden_size, self.intermediate_size, self.ffn_bias)
        down = Linear("down_proj", self.intermediate_size, self.hidden_size, self.ffn_bias)
        gate = Linear("gate_proj", self.hidden_size, self.intermediate_size, self.ffn_bias)
        return (gate, up, down) if self.gated_ffn else (up, down)

    @property
    def norm_params(self) -> int:
        """Parameters of one norm: a scale, and a shift when it is a LayerNorm."""
        return self.hidden_size * (2 if self.norm_bias else 1)

    @property
    def mha_params(self) -> int:
        """Parameters of one MHA block, its norm included."""
        qk_norm = 2 * self.head_dim if self.qk_norm else 0
        return sum(linear.params for linear in self.mha_linears) + self.norm_params + qk_norm

    @property
    def ffn_params(self) -> int:
        """Parameters of one FFN block, its norm included."""
        return sum(linear.params for linear in self.ffn_linears) + self.norm_params

    @property
    def fixed_params(self) -> int:
        """Parameters that no plan can drop: embeddings, positions, final norm and head."""
        embedding = self.vocab_size * self.hidden_size
        head = 0 if self.tied_embeddings else embedding
        return embedding + self.learned_positions * self.hidden_size + self.norm_params + head

    @property
    def total_params(self) -> int:
        """Parameters of the whole model; tied embeddings count once."""
        return self.fixed_params + self.num_layers * (self.mha_params + self.ffn_params)

    @property
    def kv_bytes_per_token_layer(self) -> int:
        """Bytes of keys and values that one token holds in one MHA block (PagedAttention, SOSP 2023, section 3)."""
        return 2 * self.num_kv_heads * self.head_dim * self.kv_dtype_bytes


_FAMILIES: dict[str, dict[str, bool]] = {
    "llama": {},
    "mistral": {},
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": True},
}


def model_from_hf_config(config: Mapping[str, Any] | str | Path, name: str = "") -> ModelSpec:
    """Read a Hugging Face ``config.json``.

    Args:
        config: the parsed dict, the path of ``config.json``, or the folder that holds it.
        name: what to call the model; its ``_name_or_path`` or folder when empty.
    Raises:
        ModelError: for a missing file, a missing key, or a family whose blocks are not known here.
    """
    if not isinstance(config, Mapping):
        path = Path(config)
        path = path / "config.json" if path.is_dir() else path
        if not path.is_file():
            raise ModelError(f"no model config at {path}; give a config.json, its folder, or a name from conf/model")
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ModelError(f"{path} is not valid JSON: {error}") from error
        name = name or path.parent.name
        if not isinstance(config, Mapping):
            raise ModelError(f"{path} holds a {type(config).__name__}; a model config is a JSON object")
    name = name or str(config.get("_name_or_path") or config.get("model_type") or "model")

    def need(*keys: str) -> Any:
        for key in keys:
            if config.get(key) is not None:
                return config[key]
        raise ModelError(f"model config {name!r} lacks {' or '.join(keys)}; it has {', '.join(sorted(config))}")

    family = str(need("model_type"))
    hidden, heads = int(need("hidden_size")), int(need("num_attention_heads"))
    dtype_bytes = 4 if config.get("torch_dtype", config.get("dtype")) == "float32" else 2
    common = {
        "name": name,
        "num_layers": int(need("num_hidden_layers")),
        "hidden_size": hidden,
        "num_heads": heads,
        "vocab_size": int(need("vocab_size")),
        "weight_dtype_bytes": dtype_bytes,
        "kv_dtype_bytes": dtype_bytes,
        "max_context_tokens": int(config.get("max_position_embeddings", 4096)),
    }
    if family == "opt":
        if int(config.get("word_embed_proj_dim", hidden)) != hidden or not config.get("do_layer_norm_before", True):
            raise ModelError(f"model config {name!r}: OPT with an embedding projection or post-norm is not supported")
        bias = bool(config.get("enable_bias", True))
        return ModelSpec(
            **common,
            intermediate_size=int(need("ffn_dim")),
            num_kv_heads=heads,
            head_dim=hidden // heads,
            tied_embeddings=bool(config.get("tie_word_embeddings", True)),
            gated_ffn=False,
            qkv_bias=bias,
            out_bias=bias,
            ffn_bias=bias,
            norm_bias=True,
            learned_positions=int(need("max_position_embeddings")) + 2,
        )
    if family not in _FAMILIES:
        raise ModelError(
            f"model config {name!r} is of family {family!r}; known are {', '.join(sorted([*_FAMILIES, 'opt']))}. "
            "Write a conf/model/NAME.yaml with its shape instead"
        )
    flags = dict(_FAMILIES[family])
    if family in ("llama", "qwen3") and config.get("attention_bias"):
        flags.update(qkv_bias=True, out_bias=True)
    return ModelSpec(
        **common,
        intermediate_size=int(need("intermediate_size")),
        num_kv_heads=int(config.get("num_key_value_heads") or heads),
        head_dim=int(config.get("head_dim") or hidden // heads),
        tied_embeddings=bool(config.get("tie_word_embeddings", False)),
        ffn_bias=bool(config.get("mlp_bias", False)),
        **flags,
    )
