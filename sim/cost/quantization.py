"""How a checkpoint stores quantized weights, read from the ``quantization_config`` of its Hugging Face config.

A scheme is sized or refused: a quantized checkpoint never passes for one of 16 bits. Sized are weights of 8 and 4 bits
of GPTQ, AWQ, bitsandbytes, FP8 (fine-grained, per tensor, and FBGEMM) and compressed-tensors, if all linear layers of
all layers are quantized alike; embeddings, norms and the head keep their precision.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sim.errors import ModelError, nearest

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "out_proj", "fc1", "fc2")
FUSED = {**dict.fromkeys(("q_proj", "k_proj", "v_proj"), "qkv_proj"), **dict.fromkeys(LINEARS[4:6], "gate_up_proj")}
"""Names of matrices that some families store as one -> the name of that one (Phi-3)."""
PARENTS = ("self_attn", "mlp", "layers")
NORM = re.compile(r"(norm|layernorm)$")
"""How the name of a module ends that is a norm: no scheme quantizes it."""
FORMATS = {"float-quantized": (8,), "int-quantized": (8,), "naive-quantized": (8,), "pack-quantized": (4, 8)}
"""Formats of compressed-tensors -> bits of weights that they store as such; all but the last store at least 8."""
ADVICE = "give the config of the unquantized model, and set weight_bits of the plan"


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantization:
    """How each linear layer of a checkpoint is stored.

    method: its ``quant_method``. bits: of a weight, 8 or 4.
    group_inputs: input elements that share one scale; None takes all of a row.
    group_outputs: output rows that share one scale; None takes all.
    group_bits: bits of scale and zero point of one group.
    index_bytes: bytes for each input element (GPTQ's g_idx).
    """

    method: str
    bits: int
    group_inputs: int | None = None
    group_outputs: int | None = 1
    group_bits: float = 16
    index_bytes: int = 0

    def weight_bytes(self, in_features: int, out_features: int) -> int:
        """Return the bytes of one linear layer without its bias."""
        rows = 1 if self.group_outputs is None else -(-out_features // self.group_outputs)
        columns = 1 if self.group_inputs is None else -(-in_features // self.group_inputs)
        packed = -(-in_features * out_features * self.bits // 8)
        return packed + -(-int(rows * columns * self.group_bits) // 8) + in_features * self.index_bytes


def read_quantization(model: str, config: Mapping[str, Any]) -> Quantization | None:
    """Return how the weights of a Hugging Face config are quantized; None if they are not.

    Raises:
        ModelError: for a scheme, or a part of one, that is not sized; the message names it.
    """
    stated = config.get("quantization_config") or config.get("compression_config")
    if not stated:
        return None
    if not isinstance(stated, Mapping):
        raise ModelError(f"model config {model!r}: quantization_config is {_short(stated)}; it must be an object")
    return _Scheme(model, stated).read()


def kv_bits(model: str, config: Mapping[str, Any]) -> int | None:
    """Return the bits of a key or value entry that a checkpoint's quantization asks for; None for the model's dtype."""
    stated = config.get("quantization_config") or config.get("compression_config")
    scheme = stated.get("kv_cache_scheme") if isinstance(stated, Mapping) else None
    if scheme is None:
        return None
    if not isinstance(scheme, Mapping) or scheme.get("num_bits") != 8:
        raise ModelError(f"model config {model!r}: kv_cache_scheme is {_short(scheme)}; 8 bits are sized; {ADVICE}")
    return 8


class _Scheme:
    """One ``quantization_config``; an error names the model and the key."""

    def __init__(self, model: str, stated: Mapping[str, Any]) -> None:
        self._model, self._stated = model, stated

    def read(self) -> Quantization | None:
        method = self._stated.get("quant_method")
        if method is None and any(str(key).startswith(("load_in_", "bnb_", "_load_in_")) for key in self._stated):
            method = "bitsandbytes"
        known: dict[str, Callable[[], Quantization | None]] = {
            "gptq": self._gptq,
            "awq": self._awq,
            "bitsandbytes": self._bitsandbytes,
            "fp8": self._fp8,
            "fbgemm_fp8": self._fbgemm_fp8,
            "compressed-tensors": self._compressed_tensors,
        }
        name = str(method).lower().replace("_", "-").replace("fbgemm-fp8", "fbgemm_fp8")
        if name not in known:
            # No nearest name: to write it into the config would size another scheme.
            raise self._error(f"quant_method is {_short(method)}, which is not sized; sized are {', '.join(known)}")
        return known[name]()

    def _gptq(self) -> Quantization:
        self._refuse_true("lm_head", "so the head is quantized too")
        self._refuse_filled("dynamic", "quantizes modules differently")
        self._refuse_filled("adapter", "adds weights to the quantized ones")
        inside = self._stated.get("modules_in_block_to_quantize")
        if inside is not None:
            flat = str(inside)
            if missing := [name for name in LINEARS[:7] if name not in flat and FUSED.get(name, name) not in flat]:
                raise self._error(f"modules_in_block_to_quantize leaves {missing[0]} unquantized")
        return Quantization(
            method="gptq",
            bits=(bits := self._bits("bits")),
            group_inputs=self._group("group_size"),
            group_bits=16 + bits,  # an FP16 scale and a packed zero point, which symmetric checkpoints store too
            index_bytes=4 if self._flag("desc_act", False) else 0,
        )

    def _awq(self) -> Quantization:
        self._check_kept("modules_to_not_convert")
        bits = self._bits("bits" if "bits" in self._stated else "w_bit")
        zero = bits if self._flag("zero_point", True) else 0
        group = self._group("group_size" if "group_size" in self._stated else "q_group_size")
        return Quantization(method="awq", bits=bits, group_inputs=group, group_bits=16 + zero)

    def _bitsandbytes(self) -> Quantization | None:
        self._check_kept("llm_int8_skip_modules")
        self._refuse_true("llm_int8_has_fp16_weight", "so the weights stay in 16 bits")
        if self._flag("load_in_4bit", self._flag("_load_in_4bit", False)):
            # FP32 scales of 64 weights each; double quantization stores them in 8 bits, with an FP32 scale of 256.
            scale = 8 + 32 / 256 if self._flag("bnb_4bit_use_double_quant", False) else 32
            return Quantization(method="bitsandbytes", bits=4, group_inputs=64, group_bits=scale)
        if self._flag("load_in_8bit", self._flag("_load_in_8bit", False)):
            return Quantization(method="bitsandbytes", bits=8, group_bits=32)
        return None

    def _fp8(self) -> Quantization:
        for key in ("modules_to_not_convert", "ignored_layers"):
            self._check_kept(key)
        self._refuse_true("dequantize", "so the weights are loaded in 16 bits")
        block = self._stated.get("weight_block_size")
        if block is None:
            return Quantization(method="fp8", bits=8, group_outputs=None, group_bits=32)
        outputs, inputs = self._block(block, "weight_block_size")
        return Quantization(method="fp8", bits=8, group_inputs=inputs, group_outputs=outputs, group_bits=32)

    def _fbgemm_fp8(self) -> Quantization:
        self._check_kept("modules_to_not_convert")
        return Quantization(method="fbgemm_fp8", bits=8, group_bits=32)

    def _compressed_tensors(self) -> Quantization:
        self._check_kept("ignore")
        if not any("lm_head" in str(name) for name in self._list("ignore")):
            raise self._error("ignore lacks lm_head, so the head is quantized too")
        sparsity = self._stated.get("sparsity_config")
        if sparsity and not (isinstance(sparsity, Mapping) and sparsity.get("format", "dense") == "dense"):
            raise self._error("sparsity_config compresses the weights")
        self._refuse_filled("transform_config", "adds weights that transform others")
        groups = self._stated.get("config_groups")
        if not isinstance(groups, Mapping) or len(groups) != 1:
            raise self._error(f"config_groups is {_short(groups)}; one group for all linear layers is sized")
        group = next(iter(groups.values()))
        if not isinstance(group, Mapping) or group.get("targets") != ["Linear"]:
            raise self._error("the config group does not target all linear layers (targets: ['Linear'])")
        weights = group.get("weights")
        if not isinstance(weights, Mapping):
            raise self._error(f"weights of the config group is {_short(weights)}; it must be an object")
        stored_as = group.get("format") or self._stated.get("format")
        return _Scheme(self._model, weights)._compressed_weights(stored_as)

    def _compressed_weights(self, stored_as: Any) -> Quantization:
        """Return how the weights of a config group are stored; the scheme is its ``weights``."""
        bits, kind = self._bits("num_bits"), self._stated.get("type", "int")
        if stored_as is not None and bits not in FORMATS.get(str(stored_as), ()):
            known = ", ".join(FORMATS)
            raise self._error(f"format {_short(stored_as)} with {bits} bits is not sized; sized are {known}")
        if kind not in ("int", "float") or (kind == "float" and bits != 8):
            raise self._error(f"weights of type {_short(kind)} with {bits} bits are not sized")
        scale = (16 if kind == "int" else 32) + (0 if self._flag("symmetric", True) else bits)
        strategy = self._stated.get("strategy") or ("group" if self._stated.get("group_size") else "tensor")
        # Only weights reordered by activation store an index; "weight" and "static" do not.
        index = 4 if self._stated.get("actorder") in (True, "group", "dynamic") else 0
        stored = Quantization(method="compressed-tensors", bits=bits, group_bits=scale, index_bytes=index)
        if strategy == "tensor":
            return replace(stored, group_outputs=None)
        if strategy == "channel":
            return stored
        if strategy == "group":
            return replace(stored, group_inputs=self._group("group_size"))
        if strategy == "block":
            outputs, inputs = self._block(self._stated.get("block_structure"), "block_structure")
            return replace(stored, group_inputs=inputs, group_outputs=outputs)
        allowed = ("tensor", "channel", "group", "block")
        raise self._error(f"strategy is {_short(strategy)}; {nearest(str(strategy)[:40], allowed)}")

    # --- Keys

    def _bits(self, key: str) -> int:
        value = self._stated.get(key)
        if isinstance(value, bool) or value not in (8, 4):
            raise self._error(f"{key} is {_short(value)}; weights of 8 and 4 bits are sized")
        return int(value)

    def _group(self, key: str) -> int | None:
        value = self._stated.get(key)
        if isinstance(value, bool) or not isinstance(value, int) or not (value == -1 or value >= 1):
            raise self._error(f"{key} is {_short(value)}; it must be at least 1, or -1 for a full row")
        return None if value == -1 else value

    def _block(self, value: Any, key: str) -> tuple[int, int]:
        if not isinstance(value, Sequence) or len(value) != 2 or not all(type(n) is int and n > 0 for n in value):
            raise self._error(f"{key} is {_short(value)}; it must be two whole numbers of at least 1")
        return value[0], value[1]

    def _flag(self, key: str, default: bool) -> bool:
        value = self._stated.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self._error(f"{key} is {_short(value)}; it must be true or false")
        return value

    def _list(self, key: str) -> list[Any]:
        value = self._stated.get(key)
        if value is None:
            return []
        if not isinstance(value, list):
            raise self._error(f"{key} is {_short(value)}; it must be a list of names of modules")
        return value

    def _refuse_true(self, key: str, why: str) -> None:
        if self._flag(key, False):
            raise self._error(f"{key} is true, {why}")

    def _refuse_filled(self, key: str, why: str) -> None:
        if self._stated.get(key):
            raise self._error(f"{key} {why}")

    def _check_kept(self, key: str) -> None:
        """Check that the modules which stay unquantized are none of a layer's linear layers.

        Schemes match names in different ways (equal, a part of the name, a pattern), so any resemblance counts.
        """
        for name in self._list(key):
            plain = str(name).removeprefix("re:")
            if plain in ("lm_head", "model.lm_head", "re:.*lm_head") or plain.strip("^.*$\\") == "lm_head":
                continue
            if NORM.search(plain) and not plain.startswith(("^", ".")):
                continue
            if any(part in plain or plain.strip("^.*$\\") in part for part in (*LINEARS, *FUSED.values(), *PARENTS)):
                raise self._error(f"{key} keeps {_short(name)} unquantized, and a layer has one precision in a plan")
            if set(plain) & set("|()[]?+{}"):
                raise self._error(f"{key} has the pattern {_short(name)}, which is not read")

    def _error(self, what: str) -> ModelError:
        return ModelError(f"model config {self._model!r}: quantization_config: {what}; {ADVICE}")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
