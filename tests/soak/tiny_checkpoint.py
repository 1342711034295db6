"""A tiny random checkpoint in Hugging Face's format, and the overrides with which every command loads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sim.cost.model_spec import ModelSpec

LAYERS = 2
SPEC = ModelSpec(
    name="tiny",
    num_layers=LAYERS,
    hidden_size=16,
    intermediate_size=32,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    vocab_size=258,
    tied_embeddings=True,
    weight_dtype_bytes=4,
    kv_dtype_bytes=4,
    max_context_tokens=512,
)
END_OF_TEXT = 256


def overrides(folder: Path) -> list[str]:
    """Return what to add to a command line so that it loads the checkpoint of a folder."""
    known = ("num_layers", "hidden_size", "intermediate_size", "num_heads", "num_kv_heads", "head_dim", "vocab_size")
    shape = [f"model.{name}={getattr(SPEC, name)}" for name in (*known, "max_context_tokens")]
    shape += [f"+model.{name}={getattr(SPEC, name)}" for name in ("weight_dtype_bytes", "kv_dtype_bytes")]
    return ["model=smollm2_135m", f"model.name={SPEC.name}", *shape, f"hw.checkpoint={folder}", "hw.device=cpu"]


def tokenizer() -> Any:
    """Return a tokenizer of bytes, with an end of text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate(alphabet)} | {"<end>": END_OF_TEXT, "<pad>": END_OF_TEXT + 1}
    by_byte = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    by_byte.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    by_byte.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=by_byte, eos_token="<end>", pad_token="<pad>")


def random_model() -> Any:
    """Return the model with seeded random weights."""
    import torch
    import transformers

    torch.manual_seed(7)
    config = transformers.LlamaConfig(
        vocab_size=SPEC.vocab_size,
        hidden_size=SPEC.hidden_size,
        intermediate_size=SPEC.intermediate_size,
        num_hidden_layers=SPEC.num_layers,
        num_attention_heads=SPEC.num_heads,
        num_key_value_heads=SPEC.num_kv_heads,
        head_dim=SPEC.head_dim,
        max_position_embeddings=SPEC.max_context_tokens,
        tie_word_embeddings=True,
        initializer_range=0.2,
        eos_token_id=END_OF_TEXT,
        bos_token_id=None,
        pad_token_id=END_OF_TEXT + 1,
    )
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def write_checkpoint(folder: Path) -> Path:
    """Write model and tokenizer into a folder, unless it has them; return the folder."""
    if not (folder / "config.json").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        tokenizer().save_pretrained(folder)
        random_model().save_pretrained(folder)
    return folder
