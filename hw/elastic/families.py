"""Where each supported model class of transformers keeps its layers, norms, attention and FFN."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sim.errors import ModelError, nearest


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """Attribute names of the parts that a Plan switches.

    stack: path from the causal model to the module that holds ``layers``; ``final_norm`` belongs to that module.
    mha_norm, ffn_norm, attention, ffn: attributes of a layer; ``ffn`` lists the modules in the order in which they run.
    """

    stack: str
    mha_norm: str
    ffn_norm: str
    ffn: tuple[str, ...]
    attention: str = "self_attn"
    final_norm: str = "norm"


LLAMA = Family(stack="model", mha_norm="input_layernorm", ffn_norm="post_attention_layernorm", ffn=("mlp",))
FAMILIES = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "opt": Family(
        stack="model.decoder",
        mha_norm="self_attn_layer_norm",
        ffn_norm="final_layer_norm",
        ffn=("fc1", "fc2"),
        final_norm="final_layer_norm",
    ),
}
"""Family of every supported ``model_type`` of a Hugging Face config."""


def find_family(model_type: str) -> Family:
    """Return the family of a ``model_type``.

    Raises:
        ModelError: for an unsupported one; the message lists the supported ones and the attributes that are expected.
    """
    family = FAMILIES.get(model_type)
    if family is None:
        raise ModelError(
            f"model family {model_type!r} is not supported; {nearest(model_type, FAMILIES)}. "
            f"Looked for a stack of layers at model.{LLAMA.stack}.layers, each with {LLAMA.mha_norm}, "
            f"{LLAMA.attention}, {LLAMA.ffn_norm} and mlp; if it has them, add it to hw.elastic.families.FAMILIES "
            "and sim.cost.model_spec"
        )
    return family


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
