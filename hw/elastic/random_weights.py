"""Random weights for any model description, made on the device: to measure times and memory without a download.

model = random_model(spec, seed=0, dtype=torch.bfloat16, place=torch.device("cuda"))
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from sim.cost.model_spec import ModelSpec
from sim.errors import ModelError

PREFIX = "random:"
MOST_SEED = 2**32 - 1


def seed_of(checkpoint: str) -> int | None:
    """Return the seed of a checkpoint that is named ``random:SEED``; None for all others.

    Raises:
        ModelError: for a seed that is no number.
    """
    if not checkpoint.startswith(PREFIX):
        return None
    seed = checkpoint.removeprefix(PREFIX)
    if not (seed.isascii() and seed.isdigit() and len(seed) <= 10 and int(seed) <= MOST_SEED):
        raise ModelError(
            f"the checkpoint {checkpoint[:40]!r} has no seed; set it to {PREFIX}SEED, a whole number up to {MOST_SEED}"
        )
    return int(seed)


def note_of(seed: int) -> str:
    """Return what every output of a run on random weights has to say."""
    return f"weights are random ({PREFIX}{seed}): tokens and quality mean nothing; times and memory do"


def random_model(
    spec: ModelSpec, *, seed: int, dtype: torch.dtype, place: torch.device, config_path: Path | None = None
) -> Any:
    """Return a model of this shape with random weights.

    Args:
        spec: its shape. seed: of the weights. dtype, place: of the weights.
        config_path: the model's own config.json, or its folder. None: the model is of the nearest family of
            transformers; ``ElasticModel`` tells where its shape differs.
    Raises:
        ModelError: for a config that transformers cannot read.
    """
    from transformers import AutoModelForCausalLM

    config = _config(spec) if config_path is None else _read_config(config_path)
    devices = [place] if place.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.device(place):
        torch.manual_seed(seed)
        made: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)  # type: ignore[no-untyped-call]
        return made.eval()


def _read_config(path: Path) -> Any:
    """Return the configuration in a file or folder, without a token that ends a text: random weights have none."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(str(path), trust_remote_code=False)
    except Exception as error:  # transformers raises errors of many types for a file that it cannot read
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(f"no model config at {path}: {reason}; give a config.json, or its folder") from error
    config.bos_token_id = config.eos_token_id = None
    return config


def _config(spec: ModelSpec) -> Any:
    """Return the configuration of the family that has the shape."""
    from transformers import Gemma3TextConfig, LlamaConfig, OPTConfig, Phi3Config, Qwen2Config, Qwen3Config

    shape: dict[str, Any] = {
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.hidden_size,
        "num_hidden_layers": spec.num_layers,
        "num_attention_heads": spec.num_heads,
        "tie_word_embeddings": spec.tied_embeddings,
        "max_position_embeddings": spec.max_context_tokens,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    if spec.learned_positions:
        positions = {"max_position_embeddings": spec.learned_positions - 2, "word_embed_proj_dim": spec.hidden_size}
        return OPTConfig(**shape | positions, ffn_dim=spec.intermediate_size, enable_bias=spec.qkv_bias)
    shape |= {
        "intermediate_size": spec.intermediate_size,
        "num_key_value_heads": spec.num_kv_heads,
        "head_dim": spec.head_dim,
    }
    if spec.post_norms:
        # Without windows: the description charges the KV of all tokens.
        types = ["full_attention"] * spec.num_layers
        return Gemma3TextConfig(**shape, attention_bias=spec.out_bias, layer_types=types)
    if spec.fused_projections:
        return Phi3Config(**shape)
    if spec.qk_norm:
        return Qwen3Config(**shape, attention_bias=spec.out_bias)
    if spec.qkv_bias and not spec.out_bias:
        return Qwen2Config(**shape)
    return LlamaConfig(**shape, attention_bias=spec.out_bias, mlp_bias=spec.ffn_bias)


class NumberTokenizer:
    """Stands for the tokenizer of a model with random weights: texts become their bytes, and tokens their numbers."""

    eos_token_id = None

    def __init__(self, vocabulary: int) -> None:
        """Make tokens 0 to ``vocabulary - 1``."""
        self._vocabulary = vocabulary

    def __call__(self, text: str, **_: Any) -> SimpleNamespace:
        """Return the ids of a text."""
        return SimpleNamespace(input_ids=[byte % self._vocabulary for byte in text.encode()])

    def decode(self, ids: Sequence[int], **_: Any) -> str:
        """Return the numbers of some tokens."""
        return "".join(f" {i}" for i in ids)
