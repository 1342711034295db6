"""The shape of a decoder-only language model, and the exact number of parameters of every block."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from sim.cost.gpu import TP_DEGREES
from sim.cost.quantization import Quantization, kv_bits, read_quantization
from sim.errors import ModelError, nearest
from sim.immutable import Immutable
from sim.json_file import read_json_object
from sim.paths import REPOSITORY

MODEL_CONFIGS = REPOSITORY / "conf" / "model"
"""The folder of the models known by name, one YAML each."""

KV_SCALE_BYTES = 4
"""A scale and a least value in FP16, for the keys of one head of a token that are quantized, and for its values."""
QUANT_GROUP_ELEMENTS = 128
"""Input elements of a linear layer that share one scale at 8 and 4 bits: the default of AWQ and GPTQ."""

VOCAB_PADDING = 64
"""A vocabulary that is divided among GPUs is padded to a multiple of this first, as vLLM does."""

MOST_LAYERS, MOST_PARAMS = 1_000, 10**15
"""More than any model has; bytes of larger ones would not fit the integers of compiled code."""
MOST_CONFIG_BYTES = 16 * 1024 * 1024


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
class ModelSpec(Immutable):
    """The shape of a decoder-only transformer, as in its checkpoint.

    One layer is an MHA block (norm, projections, output projection) and an FFN block (norm, up, gate, down).
    RAP's unit of pruning is one such block, its norm included (arXiv 2505.17138, section 3).

    gated_ffn: the FFN has a gate projection in addition to up and down (SwiGLU); OPT has none.
    qkv_bias, out_bias, ffn_bias: which linear layers have a bias.
    norm_bias: True for LayerNorm with a shift, False for RMSNorm.
    qk_norm: queries and keys pass a norm over head_dim, shared by all heads of a layer (Qwen3, Gemma 3).
    post_norms: a block has a second norm, of what it adds to the hidden states (Gemma 3).
    fused_projections: q, k and v are one matrix in the checkpoint, and so are gate and up (Phi-3).
    learned_positions: rows of a learned position table; 0 for rotary positions.
    weight_dtype_bytes: bytes of one unquantized weight, 2 (FP16, BF16) or 4 (FP32).
    kv_dtype_bytes: bytes of one key or value entry; 1 is an FP8 cache.
    quantization: how the checkpoint stores the linear layers of its layers; None for unquantized ones.
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
    post_norms: bool = False
    fused_projections: bool = False
    learned_positions: int = 0
    weight_dtype_bytes: int = 2
    kv_dtype_bytes: int = 2
    max_context_tokens: int = 4096
    quantization: Quantization | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            # Annotations are strings here, so the declared type is compared by name.
            if field.type == "bool" and not isinstance(value, bool):
                raise ModelError(f"model {self.name!r}: {field.name} is {value!r}; it must be true or false")
            if field.type == "int":
                least = 0 if field.name == "learned_positions" else 1
                if isinstance(value, bool) or not isinstance(value, int) or value < least:
                    raise ModelError(
                        f"model {self.name!r}: {field.name} is {value!r}; it must be a whole number of at least {least}"
                    )
        if self.weight_dtype_bytes not in (2, 4):
            raise ModelError(
                f"model {self.name!r}: weight_dtype_bytes is {self.weight_dtype_bytes}; allowed are 2 and 4. "
                "For a quantized copy, keep the model and set weight_bits of the plan"
            )
        if self.num_layers > MOST_LAYERS or self.total_params > MOST_PARAMS:
            raise ModelError(
                f"model {self.name!r} has {self.num_layers:,} layers and {self.total_params:,} parameters; at most "
                f"{MOST_LAYERS:,} layers and {MOST_PARAMS:,} parameters are supported"
            )
        if self.num_heads % self.num_kv_heads:
            raise ModelError(
                f"model {self.name!r}: num_heads {self.num_heads} is not a multiple of num_kv_heads "
                f"{self.num_kv_heads}; "
                "grouped-query attention shares each KV head among an equal number of query heads"
            )

    @property
    def weight_bits(self) -> int:
        """Bits of the checkpoint's own weights in its layers: 16 stands for unquantized ones, FP32 too."""
        return 16 if self.quantization is None else self.quantization.bits

    @property
    def mha_linears(self) -> tuple[Linear, ...]:
        """The weight matrices of one MHA block: q, k, v and output projection."""
        q_size, kv_size = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        out = Linear("o_proj", q_size, self.hidden_size, self.out_bias)
        if self.fused_projections:
            return Linear("qkv_proj", self.hidden_size, q_size + 2 * kv_size, self.qkv_bias), out
        return (
            Linear("q_proj", self.hidden_size, q_size, self.qkv_bias),
            Linear("k_proj", self.hidden_size, kv_size, self.qkv_bias),
            Linear("v_proj", self.hidden_size, kv_size, self.qkv_bias),
            out,
        )

    @property
    def qkv_share(self) -> float:
        """The share of q, k and v in the multiplications with the weights of an MHA block."""
        *qkv, out = (linear.in_features * linear.out_features for linear in self.mha_linears)
        return sum(qkv) / (sum(qkv) + out)

    @property
    def ffn_linears(self) -> tuple[Linear, ...]:
        """The weight matrices of one FFN block: gate (if gated), up and down projection."""
        up = Linear("up_proj", self.hidden_size, self.intermediate_size, self.ffn_bias)
        down = Linear("down_proj", self.intermediate_size, self.hidden_size, self.ffn_bias)
        if self.gated_ffn and self.fused_projections:
            return Linear("gate_up_proj", self.hidden_size, 2 * self.intermediate_size, self.ffn_bias), down
        gate = Linear("gate_proj", self.hidden_size, self.intermediate_size, self.ffn_bias)
        return (gate, up, down) if self.gated_ffn else (up, down)

    @property
    def norm_params(self) -> int:
        """Parameters of one norm: a scale, and a shift for a LayerNorm."""
        return self.hidden_size * (2 if self.norm_bias else 1)

    @property
    def block_norm_params(self) -> int:
        """Parameters of the norms of one block: before it, and after it where a family has one."""
        return self.norm_params * (2 if self.post_norms else 1)

    @property
    def mha_params(self) -> int:
        """Parameters of one MHA block, its norms included."""
        qk_norm = 2 * self.head_dim if self.qk_norm else 0
        return sum(linear.params for linear in self.mha_linears) + self.block_norm_params + qk_norm

    @property
    def ffn_params(self) -> int:
        """Parameters of one FFN block, its norms included."""
        return sum(linear.params for linear in self.ffn_linears) + self.block_norm_params

    @property
    def fixed_params(self) -> int:
        """Parameters that no plan can drop: embeddings, positions, final norm and head."""
        embedding = self.vocab_size * self.hidden_size
        head = 0 if self.tied_embeddings else embedding
        return embedding + self.learned_positions * self.hidden_size + self.norm_params + head

    @property
    def total_params(self) -> int:
        """Parameters of the full model; tied embeddings count once."""
        return self.fixed_params + self.num_layers * (self.mha_params + self.ffn_params)

    @property
    def kv_bytes_per_token_layer(self) -> int:
        """Bytes of keys and values that one token holds in one MHA block (PagedAttention, SOSP 2023, section 3)."""
        return 2 * self.num_kv_heads * self.head_dim * self.kv_dtype_bytes

    @property
    def hidden_bytes_per_token_layer(self) -> int:
        """Bytes of the hidden state of one token before one MHA block, from which keys and values can be computed."""
        return self.hidden_size * self.weight_dtype_bytes

    @property
    def hidden_halves_kv(self) -> bool:
        """Whether hidden states take half the bytes of keys and values: every query head has its own, at full width."""
        width = self.num_kv_heads * self.head_dim
        alike = self.num_heads == self.num_kv_heads and width == self.hidden_size
        return alike and 2 * self.hidden_bytes_per_token_layer == self.kv_bytes_per_token_layer

    def shard(self, tp: int) -> ModelSpec:
        """Return what each GPU holds if ``tp`` GPUs divide the model among them, as the shape of a smaller model.

        Query heads, the FFN's inner features and the vocabulary are divided; norms and the biases of output and down
        projection are on every GPU, as are KV heads where there are fewer than GPUs. So bytes that are computed of the
        result are those of one GPU.

        Args:
            tp: GPUs; 1 returns the model itself.
        Raises:
            ModelError: for a model that cannot be divided by ``tp``.
        Source:
            Megatron-LM (arXiv 1909.08053), section 3; vLLM's padding of the vocabulary to a multiple of 64.
        """
        if tp == 1:
            return self
        if tp not in (allowed := _tp_degrees(self)):
            raise ModelError(
                f"model {self.name!r} cannot be divided among tp={tp} GPUs: {self.num_heads} query heads and "
                f"{self.intermediate_size} inner features must be multiples of tp, and {self.num_kv_heads} KV heads a "
                f"multiple or a divisor of it; allowed are gpu.tp={', '.join(map(str, allowed))}"
            )
        padded = -(-self.vocab_size // VOCAB_PADDING) * VOCAB_PADDING
        return replace(
            self,
            num_heads=self.num_heads // tp,
            num_kv_heads=max(1, self.num_kv_heads // tp),
            intermediate_size=self.intermediate_size // tp,
            vocab_size=padded // tp,
        )

    def kv_bytes_per_token_layer_at(self, bits: int) -> int:
        """Return the bytes of keys and values of one token in one MHA block at some bits; 16 is the model's own.

        2 * num_kv_heads * (head_dim * bits / 8 + 4)        at 8 and 4 bits, with scale and least value of each head
        """
        if bits == 16:
            return self.kv_bytes_per_token_layer
        return 2 * self.num_kv_heads * (-(-self.head_dim * bits // 8) + KV_SCALE_BYTES)


def _tp_degrees(model: ModelSpec) -> tuple[int, ...]:
    """Return the degrees of tensor parallelism that a model can be divided by."""
    heads, kv_heads, inner = model.num_heads, model.num_kv_heads, model.intermediate_size
    return tuple(n for n in TP_DEGREES if not heads % n and not inner % n and (not kv_heads % n or not n % kv_heads))


def load_model(name: str) -> ModelSpec:
    """Build the model of ``conf/model/NAME.yaml``, without Hydra.

    Raises:
        ModelError: for an unknown name (the message suggests the nearest), or a file that is not a ModelSpec.
    """
    names = model_names()
    if name == "hf":
        raise ModelError("model 'hf' stands for any Hugging Face config; call model_from_hf_config(path) with its file")
    if name not in names:
        raise ModelError(f"no model {name!r} in conf/model; {nearest(name, names)}")
    path = MODEL_CONFIGS / f"{name}.yaml"
    try:
        values = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except (OSError, UnicodeDecodeError, YAMLError, OmegaConfBaseException, RecursionError) as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ModelError(f"{path} cannot be read as YAML: {reason}") from error
    if not isinstance(values, dict) or values.pop("_target_", None) != "sim.cost.model_spec.ModelSpec":
        raise ModelError(
            f"{path} must say `_target_: sim.cost.model_spec.ModelSpec` and then the fields of a ModelSpec"
        )
    known = {field.name for field in fields(ModelSpec)}
    for key in values:
        if key not in known:
            raise ModelError(f"{path} sets {key!r}, which is not a field of a model; {nearest(str(key), known)}")
    try:
        return ModelSpec(**{str(key): value for key, value in values.items()})
    except TypeError as error:  # a field without default is missing
        raise ModelError(f"{path} is incomplete: {error}") from error


def model_names() -> tuple[str, ...]:
    """Return the names that ``load_model`` accepts, sorted."""
    return tuple(sorted(path.stem for path in MODEL_CONFIGS.glob("*.yaml") if path.stem != "hf"))


def file_name(name: str) -> str:
    """Return the name of a model as it stands in names of files that ``hw.score`` writes."""
    return name.lower().replace(".", "_").replace("-", "_")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Family:
    """What the configs of a ``model_type`` state.

    flags: fields that are true for every model of the family.
    biased: keys that add a bias to all linear layers of the attention (``attention_bias``) or the FFN (``mlp_bias``).
    tied: the default of ``tie_word_embeddings``. required: keys whose default differs between families.
    """

    flags: tuple[str, ...] = ()
    biased: tuple[str, ...] = ()
    tied: bool = False
    required: tuple[str, ...] = ()


_FAMILIES = {
    "llama": _Family(biased=("attention_bias", "mlp_bias")),
    "mistral": _Family(required=("num_key_value_heads",)),
    "qwen2": _Family(flags=("qkv_bias",), required=("num_key_value_heads",)),
    "qwen3": _Family(flags=("qk_norm",), biased=("attention_bias",), required=("num_key_value_heads", "head_dim")),
    "smollm3": _Family(biased=("attention_bias", "mlp_bias"), tied=True, required=("num_key_value_heads",)),
    "granite": _Family(biased=("attention_bias", "mlp_bias")),
    "phi3": _Family(flags=("fused_projections",)),
    "gemma3_text": _Family(
        flags=("qk_norm", "post_norms"),
        biased=("attention_bias",),
        tied=True,
        required=("num_key_value_heads", "head_dim"),
    ),
}
SUPPORTED_FAMILIES = (*_FAMILIES, "opt")
"""The ``model_type`` of every supported Hugging Face config."""
_NULL_ADVICE = {"num_key_value_heads": "; state it, null for num_attention_heads"}
_OTHER_PARTS = {
    "a mixture of experts": (
        "num_local_experts",
        "num_experts",
        "n_routed_experts",
        "num_experts_per_tok",
        "moe_intermediate_size",
        "moe_num_experts",
    ),
    "multi-head latent attention": ("kv_lora_rank", "q_lora_rank", "qk_rope_head_dim"),
    "a vision, audio or nested text part": ("vision_config", "audio_config", "text_config", "llm_config"),
    "an encoder": ("is_encoder_decoder", "add_cross_attention", "encoder_layers"),
    "a state-space or linear-attention layer": (
        "ssm_cfg",
        "ssm_state_size",
        "mamba_d_state",
        "attn_layer_period",
        "linear_num_value_heads",
        "hybrid_override_pattern",
        "mamba_n_heads",
        "conv_L_cache",
    ),
    "cross attention": ("cross_attention_layers", "cross_attention_hidden_size", "cross_attention_freq"),
    "a cap on the logits": ("attn_logit_softcapping", "final_logit_softcapping", "attn_logit_soft_cap"),
    "attention that is not causal": ("use_bidirectional_attention",),
    "attention within chunks": ("attention_chunk_size",),
    "a layer unlike the others": ("block_configs", "pruned_heads", "num_kv_shared_layers", "num_nextn_predict_layers"),
}
"""Keys of a config that, when set, state parts that a ModelSpec does not have."""
_DTYPE_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}


def model_from_hf_config(
    config: Mapping[str, Any] | str | Path,
    name: str = "",
    *,
    max_context_tokens: int | None = None,
    keep_all_kv: bool = False,
) -> ModelSpec:
    """Read a Hugging Face ``config.json``.

    Args:
        config: the parsed dict, the path of ``config.json``, or the folder that holds it.
        name: the name of the model; if empty, its ``_name_or_path`` or its folder.
        max_context_tokens: a lower limit than the config's ``max_position_embeddings``; None keeps that.
        keep_all_kv: charge the KV of all tokens to layers with a sliding window, as ``hw.elastic`` keeps it.
    Raises:
        ModelError: for a missing file, a missing or malformed key, or a model whose bytes would be counted wrong: a
            family, a part or a quantization that is not supported, or a sliding window shorter than the context.
    Source:
        The classes of transformers 5 (models/llama, mistral, qwen2, qwen3, smollm3, granite, phi3, gemma3 and opt):
        which linear layers have a bias, and the default of a missing key. A key whose default differs between families
        is required.
    """
    if not isinstance(config, Mapping):
        path = Path(config).expanduser()
        config = _read_config(path / "config.json" if path.is_dir() else path)
        name = name or (path if path.is_dir() else path.parent).resolve().name
    name = name or " ".join(str(config.get("_name_or_path") or config.get("model_type") or "model").split())[:200]
    model = _Reader(config, name).model()
    if max_context_tokens is not None:
        if not 1 <= max_context_tokens <= model.max_context_tokens:
            raise ModelError(
                f"model.max_context_tokens is {max_context_tokens}; the config of {name!r} allows 1 to "
                f"{model.max_context_tokens:,}"
            )
        model = replace(model, max_context_tokens=max_context_tokens)
    window = _Reader(config, name).sliding_window()
    if window is not None and window < model.max_context_tokens and not keep_all_kv:
        raise ModelError(
            f"model config {name!r}: sliding_window is {window:,}, so a layer needs the KV of that many tokens only, "
            f"which is not modeled. Set model.max_context_tokens={window} to serve requests within the window, or "
            "model.keep_all_kv=true to charge the KV of all tokens, as the real engine here keeps it"
        )
    return model


_QUANTIZED_BY_FILE = {"quantize_config.json": "gptq", "quant_config.json": "awq", "hf_quant_config.json": "modelopt"}
"""Files next to a config.json that state the quantization of checkpoints whose config does not."""


def _read_config(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        raise ModelError(
            f"no model config at {path}; give a config.json, its folder, or a name from conf/model: "
            f"{', '.join(model_names())}"
        )
    advice = "a model config is a JSON object"
    config = read_json_object(path, ModelError, advice, most_bytes=MOST_CONFIG_BYTES)
    if not config.get("quantization_config"):
        for file, method in _QUANTIZED_BY_FILE.items():
            if (path.parent / file).is_file():
                stated = read_json_object(path.parent / file, ModelError, advice, most_bytes=MOST_CONFIG_BYTES)
                return {**config, "quantization_config": {"quant_method": method, **stated}}
    return config


@dataclass(frozen=True, slots=True)
class _Reader:
    """Reads typed values of one Hugging Face config; an error names the key."""

    config: Mapping[str, Any]
    name: str

    def integer(self, key: str, default: int | None = None) -> int:
        """Return an integer; ``default`` if the key is missing or null, and an error without a default."""
        value = self.config.get(key)
        if value is None:
            if default is None:
                raise ModelError(
                    f"model config {self.name!r} lacks {key}; it has {', '.join(sorted(self.config))[:400]}"
                )
            return default
        if isinstance(value, bool) or not isinstance(value, int):
            raise ModelError(f"model config {self.name!r}: {key} is {value!r:.80}; it must be a whole number")
        return value

    def flag(self, key: str, default: bool) -> bool:
        """Return true or false; ``default`` if the key is missing or null."""
        value = self.config.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise ModelError(f"model config {self.name!r}: {key} is {value!r:.80}; it must be true or false")
        return value

    def dtype_bytes(self) -> int:
        """Return the bytes of one weight; 2 if the config does not state a dtype."""
        # transformers 4 wrote torch_dtype, transformers 5 writes dtype.
        stated = self.config.get("dtype") or self.config.get("torch_dtype") or "float16"
        dtype = str(stated).removeprefix("torch.")
        if dtype not in _DTYPE_BYTES:
            raise ModelError(
                f"model config {self.name!r} has dtype {dtype[:40]!r}; allowed are {', '.join(sorted(_DTYPE_BYTES))}. "
                "Give the config of the unquantized model, and set weight_bits of the plan"
            )
        return _DTYPE_BYTES[dtype]

    def kv_bytes(self) -> int:
        """Return the bytes of one key or value entry."""
        return 1 if kv_bits(self.name, self.config) == 8 else self.dtype_bytes()

    def sliding_window(self) -> int | None:
        """Return how many tokens back the layers attend that attend to a window; None if all attend to all tokens."""
        family, types = self.config.get("model_type"), self.config.get("layer_types")
        if family in ("mistral", "gemma3_text"):
            window = self.integer("sliding_window", 4096) if self.config.get("sliding_window", 0) is not None else None
            slides = family == "mistral" or self.integer("sliding_window_pattern", 6) > 1
        elif family == "phi3":
            return self.integer("sliding_window") if self.config.get("sliding_window") is not None else None
        elif family == "smollm3" and self.flag("use_sliding_window", False) and self.config.get("sliding_window"):
            window, slides = self.integer("sliding_window"), True  # of the layers without rotary positions
        elif family in ("qwen2", "qwen3") and self.flag("use_sliding_window", False):
            window = self.integer("sliding_window", 4096)
            slides = self.integer("max_window_layers", 28) < self.integer("num_hidden_layers")
        else:
            return None
        if isinstance(types, list):
            slides = "sliding_attention" in types
        return window if slides else None

    def _refuse_other_parts(self) -> None:
        """Check that the config describes nothing that a ModelSpec does not count."""
        for what, keys in _OTHER_PARTS.items():
            if found := next((key for key in keys if self.config.get(key)), None):
                raise ModelError(
                    f"model config {self.name!r} states {found}: a model with {what} is not supported: its "
                    f"bytes or its output would be wrong; supported are the families {', '.join(SUPPORTED_FAMILIES)}"
                )
        types = self.config.get("layer_types") or []
        known = ("full_attention", "sliding_attention")
        other = [kind for kind in types if kind not in known] if isinstance(types, list) else [types]
        if other:
            raise ModelError(
                f"model config {self.name!r}: layer_types has {str(other[0])[:40]!r}; supported are "
                "full_attention and sliding_attention"
            )

    def model(self) -> ModelSpec:
        """Return the shape in the config."""
        self._refuse_other_parts()
        name = self.config.get("model_type")
        if not isinstance(name, str):
            known = ", ".join(SUPPORTED_FAMILIES)
            raise ModelError(f"model config {self.name!r}: model_type is {str(name)[:40]!r}; known are {known}")
        if name == "opt":
            return self._opt()
        if name not in _FAMILIES:
            raise ModelError(
                f"model config {self.name!r} is of family {name[:40]!r}, which is not supported; supported are "
                f"{', '.join(SUPPORTED_FAMILIES)}. To simulate another model whose layers are one MHA block and one "
                "dense FFN block each, describe its shape in a conf/model/NAME.yaml"
            )
        family = _FAMILIES[name]
        for key in family.required:
            if key not in self.config:
                advice = _NULL_ADVICE.get(key, "; state it")
                raise ModelError(f"model config {self.name!r} lacks {key}{advice}")
        hidden, heads = self.integer("hidden_size"), self.integer("num_attention_heads")
        flags = dict.fromkeys(family.flags, True)
        if "attention_bias" in family.biased and self.flag("attention_bias", False):
            flags.update(qkv_bias=True, out_bias=True)
        if "mlp_bias" in family.biased:
            flags["ffn_bias"] = self.flag("mlp_bias", False)
        # Heads of Qwen3 and Gemma 3 have the same width for any hidden_size, so a null head_dim is not hidden / heads.
        head_dim = (
            self.integer("head_dim")
            if "head_dim" in family.required or self.config.get("head_dim") is not None
            else self._head_dim(hidden, heads)
        )
        return ModelSpec(
            name=self.name,
            num_layers=self.integer("num_hidden_layers"),
            hidden_size=hidden,
            intermediate_size=self.integer("intermediate_size"),
            num_heads=heads,
            num_kv_heads=self.integer("num_key_value_heads", heads),
            head_dim=head_dim,
            vocab_size=self.integer("vocab_size"),
            tied_embeddings=self.flag("tie_word_embeddings", family.tied),
            weight_dtype_bytes=self.dtype_bytes(),
            kv_dtype_bytes=self.kv_bytes(),
            quantization=read_quantization(self.name, self.config),
            max_context_tokens=self.integer("max_position_embeddings"),
            **flags,
        )

    def _head_dim(self, hidden: int, heads: int) -> int:
        if heads < 1 or hidden % heads:
            raise ModelError(
                f"model config {self.name!r}: hidden_size {hidden} is not a multiple of num_attention_heads {heads}; "
                "state head_dim"
            )
        return hidden // heads

    def _opt(self) -> ModelSpec:
        hidden, heads = self.integer("hidden_size"), self.integer("num_attention_heads")
        positions = self.integer("max_position_embeddings")
        if self.integer("word_embed_proj_dim", hidden) != hidden:
            raise ModelError(
                f"model config {self.name!r}: OPT with an embedding projection (OPT-350M) is not supported; "
                "use another size"
            )
        for key, needed in (
            ("do_layer_norm_before", True),
            ("layer_norm_elementwise_affine", True),
            ("_remove_final_layer_norm", False),
        ):
            if self.flag(key, needed) != needed:
                raise ModelError(f"model config {self.name!r}: OPT with {key} {not needed} is not supported")
        bias = self.flag("enable_bias", True)
        return ModelSpec(
            name=self.name,
            num_layers=self.integer("num_hidden_layers"),
            hidden_size=hidden,
            intermediate_size=self.integer("ffn_dim"),
            num_heads=heads,
            num_kv_heads=heads,
            head_dim=self._head_dim(hidden, heads),
            vocab_size=self.integer("vocab_size"),
            tied_embeddings=self.flag("tie_word_embeddings", True),
            gated_ffn=False,
            qkv_bias=bias,
            out_bias=bias,
            ffn_bias=bias,
            norm_bias=True,
            learned_positions=positions + 2,  # OPTLearnedPositionalEmbedding keeps two rows before position 0
            weight_dtype_bytes=self.dtype_bytes(),
            kv_dtype_bytes=self.kv_bytes(),
            quantization=read_quantization(self.name, self.config),
            max_context_tokens=positions,
        )
