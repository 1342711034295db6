"""Where each supported model class of transformers keeps its layers, norms, attention and FFN."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sim.errors import ModelError


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """Names of the parts of a model, and what its layers do unlike Llama's.

    stack: path from the causal model to the module that holds ``layers``; ``final_norm`` belongs to that module.
    mha_norm, ffn_norm, attention, ffn: attributes of a layer; ``ffn`` lists the modules in the order in which they run.
    mha_post_norm, ffn_post_norm: norms of what a block adds; None for none.
    qkv, out: linear layers of the attention; those in ``qkv`` have the same input.
    up, down: paths to the linear layers of the FFN; those in ``up`` have the same input.
    gated: the product with ``up`` holds a gate and a value. activation: the key of its name in the config.
    norm_offset: what a norm adds to its weight. multipliers: the config states factors (Granite).
    """

    stack: str = "model"
    mha_norm: str = "input_layernorm"
    ffn_norm: str = "post_attention_layernorm"
    mha_post_norm: str | None = None
    ffn_post_norm: str | None = None
    attention: str = "self_attn"
    qkv: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    out: str = "o_proj"
    ffn: tuple[str, ...] = ("mlp",)
    up: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    down: str = "mlp.down_proj"
    gated: bool = True
    activation: str = "hidden_act"
    final_norm: str = "norm"
    norm_offset: float = 0.0
    multipliers: bool = False


LLAMA = Family()
FAMILIES = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "smollm3": LLAMA,
    "granite": Family(multipliers=True),
    "phi3": Family(qkv=("qkv_proj",), up=("mlp.gate_up_proj",)),
    "gemma3_text": Family(
        mha_post_norm="post_attention_layernorm",
        ffn_norm="pre_feedforward_layernorm",
        ffn_post_norm="post_feedforward_layernorm",
        activation="hidden_activation",
        norm_offset=1.0,
    ),
    "opt": Family(
        stack="model.decoder",
        mha_norm="self_attn_layer_norm",
        ffn_norm="final_layer_norm",
        out="out_proj",
        ffn=("fc1", "fc2"),
        up=("fc1",),
        down="fc2",
        gated=False,
        activation="activation_function",
        final_norm="final_layer_norm",
    ),
}
"""Family of every supported ``model_type`` of a Hugging Face config: those that ``sim.cost.model_spec`` sizes."""


def find_part(module: Any, path: str, model_type: str) -> Any:
    """Return the part of a module at a dotted path.

    Raises:
        ModelError: if an attribute on the path is missing.
    """
    for name in path.split("."):
        part = getattr(module, name, None)
        if part is None:
            raise ModelError(
                f"a {model_type} model was expected to have {path!r} in {type(module).__name__}, which lacks {name!r}; "
                "hw.elastic.families describes the classes of transformers 5"
            )
        module = part
    return module


def sliding_window(config: Any, layer: int) -> int | None:
    """Return how many tokens a layer's attention looks back; None if it sees all of them."""
    window: int | None = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None)
    return None if types is not None and types[layer] != "sliding_attention" else window
