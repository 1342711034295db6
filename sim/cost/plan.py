"""The Plan: one frozen value that states which blocks run, at which precision, and which KV they keep."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from sim.cost.ffn_width import FFN_WIDTHS, FULL_WIDTH, LEAST_CHANNELS
from sim.cost.model_spec import ModelSpec
from sim.cost.streaming import LEAST_STREAMED, SLOTS
from sim.errors import PlanError
from sim.immutable import Immutable
from sim.limits import is_whole

WEIGHT_BITS = KV_BITS = (16, 8, 4)
LARGEST = 2**31 - 1
"""Largest count in a plan."""


def _is_count(value: object, least: int) -> bool:
    """Return whether a value is a whole number from ``least`` to ``LARGEST``."""
    return is_whole(value) and least <= value <= LARGEST  # type: ignore[operator]


def is_positive(value: object) -> bool:
    """Return whether a value is a finite number above 0."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= sys.float_info.max


@dataclass(frozen=True, slots=True, kw_only=True)
class KeepMask(Immutable):
    """Which MHA and FFN blocks run: one entry per layer in each tuple, True keeps the block (RAP's unit of pruning)."""

    mha: tuple[bool, ...]
    ffn: tuple[bool, ...]

    def contains(self, other: KeepMask) -> bool:
        """Return whether every block that ``other`` keeps is kept here too."""
        return all(
            here or not there
            for ours, theirs in ((self.mha, other.mha), (self.ffn, other.ffn))
            for here, there in zip(ours, theirs, strict=True)
        )

    def union(self, other: KeepMask) -> KeepMask:
        """Return the mask of the blocks that either mask keeps."""
        return KeepMask(
            mha=tuple(a or b for a, b in zip(self.mha, other.mha, strict=True)),
            ffn=tuple(a or b for a, b in zip(self.ffn, other.ffn, strict=True)),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class KVKeep:
    """Which tokens of a layer's KV cache stay after prefill (PDTrim's token-aware pruning).

    Either all tokens (both fields None), or the first ``first_tokens`` and the last ``last_tokens``.
    """

    first_tokens: int | None = None
    last_tokens: int | None = None

    def __post_init__(self) -> None:
        if (self.first_tokens is None) != (self.last_tokens is None):
            raise PlanError("KVKeep needs both first_tokens and last_tokens, or neither (all tokens stay)")
        if self.first_tokens is None or self.last_tokens is None:
            return
        if not _is_count(self.first_tokens, 0) or not _is_count(self.last_tokens, 1):
            raise PlanError(
                f"KVKeep(first_tokens={_short(self.first_tokens)}, last_tokens={_short(self.last_tokens)}): "
                "first_tokens must be at least 0 and last_tokens at least 1, both whole numbers of tokens up to "
                f"{LARGEST}"
            )

    def tokens(self, context_tokens: int) -> int:
        """Return how many of ``context_tokens`` tokens stay."""
        if self.first_tokens is None or self.last_tokens is None:
            return context_tokens
        return min(context_tokens, self.first_tokens + self.last_tokens)


KV_KEEP_ALL = KVKeep()
KV_METHODS = ("ada_kv", "refree_kv", "think", "lorc")
"""Published ways to hold less KV of a prompt: Ada-KV, ReFreeKV, ThinK and LoRC."""
LEAST_THINK_PERCENT = 51
"""ThinK drops channels of keys only: more than half of the bytes stay."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KVCompression:
    """How the KV of a prompt is compressed when its prefill ends, in all layers.

    method: one of KV_METHODS. percent: of its bytes that stay, 1 to 99; tokens that are decoded later stay in full.
    """

    method: str
    percent: int

    def __post_init__(self) -> None:
        if self.method not in KV_METHODS:
            raise PlanError(
                f"there is no way {_short(self.method)} to compress KV; allowed are {', '.join(KV_METHODS)}"
            )
        least = LEAST_THINK_PERCENT if self.method == "think" else 1
        if not is_whole(self.percent) or not least <= self.percent <= 99:
            raise PlanError(
                f"KV compressed by {self.method} to {_short(self.percent)} percent of its bytes; it must be a whole "
                f"number from {least} to 99, or leave the method out"
            )

    def saved_tokens(self, tokens: int) -> int:
        """Return how many tokens have the bytes that compressing ``tokens`` of them frees, rounded down."""
        return tokens * (100 - self.percent) // 100


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan(Immutable):
    """How the server runs until the next decision; everything that RAP, MorphServe and PDTrim adapt is a field.

    decode: the blocks that decode iterations run (RAP).
    prefill: the blocks that prefill runs; it keeps at least what decode keeps (PDTrim's nesting).
    weight_bits: 16, 8 or 4, one entry per layer, for both of its blocks (MorphServe).
    kv_keep: which tokens of each layer's KV stay after prefill (PDTrim).
    compute_bits: one entry per layer: at how many bits products with its weights run, in any iteration and at no copy,
        as the bits stored first of each weight are a weight of half as many (NestedFP, Any-precision LLM). Either the
        layer's ``weight_bits``, or half of them; None: everywhere ``weight_bits``.
    kv_bits: 16, 8 or 4, one entry per layer: how its KV is stored after prefill (KIVI); 16 everywhere if left out.
    streamed: one entry per layer: True keeps its weights in host memory, and each iteration copies them to the device
        before the layer runs (Oneiros); none if left out.
    kv_only: one entry per layer: True lets all tokens of a prompt but its last one write only their keys and values
        there, and pass on to the next layer unchanged (POP); none if left out.
    ffn_width: one entry per layer: how many eighths of its FFN block's channels run, 8, 7, 6 or 5 (AmoebaLLM); 8
        everywhere if left out. In a layer whose FFN block does not run, the number means nothing.
    kv_compression: how the KV of a prompt is compressed when its prefill ends (Ada-KV, ThinK, LoRC, ReFreeKV); None
        keeps all of it. It makes its own choice, so no ``kv_keep`` may drop tokens next to it.
    kv_hidden: whether a request keeps hidden states instead of keys and values when its prefill ends (Apt-Serve): half
        the bytes, and each decode computes the keys and values of its context again. Nothing is lost; only for models
        without GQA, and with all of the KV at 16 bits.
    max_running: requests that may run at once; None keeps the engine's own limit (SABER).
    max_waiting: an arriving request is rejected when this many already wait; None rejects none.
    max_wait_s: a request that has waited this long without being admitted is rejected; None lets all wait.
    """

    decode: KeepMask
    prefill: KeepMask
    weight_bits: tuple[int, ...]
    kv_keep: tuple[KVKeep, ...]
    compute_bits: tuple[int, ...] | None = None
    kv_bits: tuple[int, ...] = ()
    streamed: tuple[bool, ...] = ()
    kv_only: tuple[bool, ...] = ()
    ffn_width: tuple[int, ...] = ()
    kv_compression: KVCompression | None = None
    kv_hidden: bool = False
    max_running: int | None = None
    max_waiting: int | None = None
    max_wait_s: float | None = None

    def __post_init__(self) -> None:
        if self.kv_bits == ():
            object.__setattr__(self, "kv_bits", (16,) * len(self.weight_bits))
        if self.streamed == ():
            object.__setattr__(self, "streamed", (False,) * len(self.weight_bits))
        if self.kv_only == ():
            object.__setattr__(self, "kv_only", (False,) * len(self.weight_bits))
        if self.ffn_width == ():
            object.__setattr__(self, "ffn_width", (FULL_WIDTH,) * len(self.weight_bits))
        if self.compute_bits == self.weight_bits:  # one value for one meaning: plans are compared
            object.__setattr__(self, "compute_bits", None)

    @property
    def product_bits(self) -> tuple[int, ...]:
        """At how many bits the products of each layer run: ``compute_bits``, or ``weight_bits`` without them."""
        return self.weight_bits if self.compute_bits is None else self.compute_bits

    @property
    def nested(self) -> tuple[bool, ...]:
        """Whether each layer's products run at fewer bits than its resident weights have."""
        return tuple(a < b for a, b in zip(self.product_bits, self.weight_bits, strict=True))

    @property
    def cuts_ffn(self) -> bool:
        """Whether some FFN block that runs has a width below 8 eighths."""
        if min(self.ffn_width) == FULL_WIDTH:  # quicker: engines look in every iteration
            return False
        return any(width < FULL_WIDTH and keep for width, keep in zip(self.ffn_width, self.prefill.ffn, strict=True))


def nested_bits(weight_bits: int, wanted: int) -> int:
    """Return the bits closest to ``wanted`` at which weights of ``weight_bits`` can be read: those, or half of them."""
    return max(wanted, weight_bits // 2) if wanted < weight_bits else weight_bits


def dense_plan(model: ModelSpec) -> Plan:
    """Return the plan that keeps everything at the precision of the checkpoint."""
    keep = keep_all(model)
    layers = model.num_layers
    return Plan(decode=keep, prefill=keep, weight_bits=(model.weight_bits,) * layers, kv_keep=(KV_KEEP_ALL,) * layers)


def keep_all(model: ModelSpec) -> KeepMask:
    """Return the mask that keeps every block."""
    return KeepMask(mha=(True,) * model.num_layers, ffn=(True,) * model.num_layers)


def drop(model: ModelSpec, *, mha: Iterable[int] = (), ffn: Iterable[int] = ()) -> KeepMask:
    """Return the mask without the MHA blocks of layers ``mha`` and the FFN blocks of layers ``ffn``.

    Raises:
        PlanError: if a layer does not exist; the message names it.
    """
    dropped = {
        "MHA": set(layer_list("MHA blocks to drop", mha)),
        "FFN": set(layer_list("FFN blocks to drop", ffn)),
    }
    for kind, layers in dropped.items():
        for layer in sorted(layers):
            if not 0 <= layer < model.num_layers:
                raise PlanError(f"{kind}{layer} does not exist: {model.name} has layers 0 to {model.num_layers - 1}")
    return KeepMask(
        mha=tuple(i not in dropped["MHA"] for i in range(model.num_layers)),
        ffn=tuple(i not in dropped["FFN"] for i in range(model.num_layers)),
    )


def layer_list(name: str, layers: Iterable[int]) -> list[int]:
    """Return layer numbers as a list.

    Raises:
        PlanError: for anything but whole numbers in a list; the message starts with ``name``.
    """
    listed = None if isinstance(layers, str | bytes | Mapping) or not isinstance(layers, Iterable) else list(layers)
    if listed is None or not all(is_whole(layer) for layer in listed):
        raise PlanError(f"{name} are {_short(layers)}; list the numbers of layers, such as [18, 7]")
    return listed


def _short(value: object) -> str:
    """Return a value as text for a message, cut to a length that fits one line."""
    try:
        text = repr(value)
    except ValueError:  # Python writes no integer of more than 4,300 digits
        return "a number with too many digits"
    return text if len(text) <= 60 else f"{text[:57]}..."


def with_mask(plan: Plan, mask: KeepMask) -> Plan:
    """Return ``plan`` with the same mask for prefill and decode."""
    return replace(plan, decode=mask, prefill=mask)


def check_layers(model: ModelSpec, keep: KeepMask, name: str = "mask") -> None:
    """Check that a mask has one entry per layer for MHA and for FFN.

    Raises:
        PlanError: if it has not; the message names the field and both lengths.
    """
    for field, kept in (("mha", keep.mha), ("ffn", keep.ffn)):
        if len(kept) != model.num_layers:
            raise PlanError(
                f"{name}.{field} has {len(kept)} entries; {model.name} has {model.num_layers} layers, one entry each"
            )
        _check_flags(f"{name}.{field}", kept)


def check_plan(model: ModelSpec, plan: Plan) -> None:
    """Check that a plan is legal for a model.

    Raises:
        PlanError: if it is not; the message names the field or block, what is allowed and what to do.
    """
    if type(plan) is not Plan:  # of a policy without annotations, most often one that lacks a return
        raise PlanError(f"{plan!r} is no Plan; a policy returns a Plan in every call, such as its first_plan")
    check_layers(model, plan.decode, "plan.decode")
    check_layers(model, plan.prefill, "plan.prefill")
    for field in ("weight_bits", "compute_bits", "kv_keep", "kv_bits", "streamed", "kv_only", "ffn_width"):
        if (listed := getattr(plan, field)) is None:
            continue
        if len(listed) != model.num_layers:
            raise PlanError(
                f"plan.{field} has {len(listed)} entries; {model.name} has {model.num_layers} layers, one entry each"
            )
    _check_flags("plan.streamed", plan.streamed)
    _check_flags("plan.kv_only", plan.kv_only)
    _check_bits("weight_bits", plan.weight_bits)
    _check_bits("kv_bits", plan.kv_bits)
    _check_compute_bits(model, plan)
    _check_widths(model, plan)
    for bits in sorted(set(plan.kv_bits) - {16}):
        if model.kv_bytes_per_token_layer_at(bits) >= model.kv_bytes_per_token_layer:
            raise PlanError(
                f"plan.kv_bits of layer {plan.kv_bits.index(bits)} is {bits}, but with its scales that takes "
                f"{model.kv_bytes_per_token_layer_at(bits)} bytes a token, and the KV of {model.name} takes "
                f"{model.kv_bytes_per_token_layer} as it is; use fewer bits, or 16"
            )
    if (most_bits := max(plan.weight_bits)) > model.weight_bits:
        raise PlanError(
            f"plan.weight_bits of layer {plan.weight_bits.index(most_bits)} is {most_bits}, but the checkpoint of "
            f"{model.name} holds {model.weight_bits}-bit weights; use at most those, or the config of the unquantized "
            "model"
        )
    if 0 < (count := sum(plan.streamed)) < LEAST_STREAMED:
        raise PlanError(
            f"plan.streamed names {count} of the layers of {model.name}; the room for {SLOTS} layers stays on the "
            f"device for those that are copied in, so fewer than {LEAST_STREAMED} free nothing: stream more, or none"
        )
    if set(map(type, plan.kv_keep)) != {KVKeep}:
        layer = next(i for i, keep in enumerate(plan.kv_keep) if not isinstance(keep, KVKeep))
        raise PlanError(f"plan.kv_keep of layer {layer} is {_short(plan.kv_keep[layer])}; it must be a KVKeep")
    if plan.kv_compression is not None:
        if type(plan.kv_compression) is not KVCompression:
            raise PlanError(
                f"plan.kv_compression is {_short(plan.kv_compression)}; it must be a KVCompression, or None"
            )
        if set(plan.kv_keep) != {KV_KEEP_ALL}:
            raise PlanError(
                f"the plan compresses KV by {plan.kv_compression.method} and drops tokens by kv_keep; the two were not "
                "measured together: leave kv_keep out, or kv_compression"
            )
    _check_hidden(model, plan)
    for kind, kept_decode, kept_prefill, why in (
        ("MHA", plan.decode.mha, plan.prefill.mha, "because decode reads the KV that prefill writes"),
        (
            "FFN",
            plan.decode.ffn,
            plan.prefill.ffn,
            "because quality depends more on prefill, whose weights stay resident",
        ),
    ):
        for layer, (in_decode, in_prefill) in enumerate(zip(kept_decode, kept_prefill, strict=True)):
            if in_decode and not in_prefill:
                raise PlanError(
                    f"decode keeps {kind}{layer} but prefill drops it; prefill must keep at least what decode keeps, "
                    f"{why}: keep it in prefill or drop it in decode"
                )
    for field, limit, least in (("max_running", plan.max_running, 1), ("max_waiting", plan.max_waiting, 0)):
        if limit is not None and not _is_count(limit, least):
            raise PlanError(
                f"plan.{field} is {_short(limit)}; it must be at least {least}, a whole number of requests up to "
                f"{LARGEST}, or null for no limit"
            )
    if plan.max_wait_s is not None and not is_positive(plan.max_wait_s):
        raise PlanError(
            f"plan.max_wait_s is {_short(plan.max_wait_s)}; it must be seconds above 0, or null for no limit"
        )


def _check_flags(field: str, flags: tuple[bool, ...]) -> None:
    if not set(map(type, flags)) <= {bool, np.bool_}:
        layer = next(i for i, flag in enumerate(flags) if not isinstance(flag, bool | np.bool_))
        raise PlanError(f"{field} of layer {layer} is {_short(flags[layer])}; it must be true or false")


def _check_bits(field: str, listed: tuple[int, ...]) -> None:
    if not set(map(type, listed)) <= {int} or not set(listed) <= set(WEIGHT_BITS):
        for layer, bits in enumerate(listed):
            if not is_whole(bits) or bits not in WEIGHT_BITS:
                raise PlanError(f"plan.{field} of layer {layer} is {_short(bits)}; allowed are 16, 8 and 4")


def _check_widths(model: ModelSpec, plan: Plan) -> None:
    if set(map(type, plan.ffn_width)) == {int} and set(plan.ffn_width) == {FULL_WIDTH}:
        return
    for layer, width in enumerate(plan.ffn_width):
        if not is_whole(width) or width not in FFN_WIDTHS:
            raise PlanError(
                f"plan.ffn_width of layer {layer} is {_short(width)}; allowed are {', '.join(map(str, FFN_WIDTHS))} "
                "eighths of its channels, or drop the FFN block"
            )
    if model.intermediate_size < LEAST_CHANNELS:
        raise PlanError(
            f"plan.ffn_width cuts FFN blocks of {model.name}, which have {model.intermediate_size} channels on a GPU; "
            f"blocks of fewer than {LEAST_CHANNELS} are not cut: leave ffn_width at {FULL_WIDTH} (of a divided model, "
            "each of fewer GPUs has more channels)"
        )


def _check_compute_bits(model: ModelSpec, plan: Plan) -> None:
    if plan.compute_bits is None:
        return
    _check_bits("compute_bits", plan.compute_bits)
    for layer, (bits, weights) in enumerate(zip(plan.compute_bits, plan.weight_bits, strict=True)):
        if bits > weights:
            raise PlanError(
                f"plan.compute_bits of layer {layer} is {bits}, but its weights have {weights} bits; use at most those"
            )
        if bits < weights and bits != nested_bits(weights, bits):
            raise PlanError(
                f"plan.compute_bits of layer {layer} is {bits}, but its weights have {weights} bits, of which those "
                f"stored first are weights of {weights // 2}; use {weights // 2} or {weights}, or set weight_bits to "
                f"{2 * bits}"
            )
        if bits < weights and model.quantization is not None:
            raise PlanError(
                f"plan.compute_bits of layer {layer} is {bits}, but the checkpoint of {model.name} stores "
                f"{model.quantization.method} weights, which hold no weights of fewer bits; leave compute_bits out, "
                "or use the config of the unquantized model"
            )


def _check_hidden(model: ModelSpec, plan: Plan) -> None:
    if not isinstance(plan.kv_hidden, bool | np.bool_):
        raise PlanError(f"plan.kv_hidden is {_short(plan.kv_hidden)}; it must be true or false")
    if not plan.kv_hidden:
        return
    if not model.hidden_halves_kv:
        raise PlanError(
            f"plan.kv_hidden keeps hidden states, which take {model.hidden_bytes_per_token_layer} bytes a token of "
            f"each layer of {model.name}, in place of keys and values, which take {model.kv_bytes_per_token_layer}; it "
            "needs half of them: a model on one GPU in which every query head has its own keys and values (no GQA), at "
            "16 bits. Leave kv_hidden, hidden in lists of kv_bits, policy=hidden_cache and policy=apt_serve out; KV at "
            "fewer bits (kv_bits, policy=kv_precision) saves as much"
        )
    if set(plan.kv_keep) != {KV_KEEP_ALL} or set(plan.kv_bits) != {16} or plan.kv_compression is not None:
        raise PlanError(
            "the plan keeps hidden states (kv_hidden), and changes keys and values by kv_keep, kv_bits or "
            "kv_compression, of which it stores none; leave kv_hidden out, or those"
        )


def describe(plan: Plan) -> str:
    """Return a plan's differences from dense in one line, such as ``decode -MHA 18,19 -FFN 13; W4 0-7``."""
    parts = []
    for name, mask in (("prefill", plan.prefill), ("decode", plan.decode)):
        dropped = [
            f"-{kind} {_ranges([i for i, keep in enumerate(kept) if not keep])}"
            for kind, kept in (("MHA", mask.mha), ("FFN", mask.ffn))
            if not all(kept)
        ]
        if dropped:
            parts.append(f"{name} {' '.join(dropped)}")
    if len(parts) == 2 and plan.prefill == plan.decode:
        parts = [parts[0].removeprefix("prefill ")]
    computed = tuple(bits if nested else 16 for bits, nested in zip(plan.product_bits, plan.nested, strict=True))
    for kind, listed in (("W", plan.weight_bits), ("compute", computed), ("KV", plan.kv_bits)):
        for bits in (8, 4):
            layers = [i for i, b in enumerate(listed) if b == bits]
            if layers:
                parts.append(f"{kind}{bits} {_ranges(layers)}")
    for width in FFN_WIDTHS[1:]:
        layers = [i for i, w in enumerate(plan.ffn_width) if w == width]
        if layers:
            parts.append(f"FFN{width}/8 {_ranges(layers)}")
    for name, flags in (("streamed", plan.streamed), ("KV only", plan.kv_only)):
        if any(flags):
            parts.append(f"{name} {_ranges([i for i, flag in enumerate(flags) if flag])}")
    for keep in sorted(set(plan.kv_keep) - {KV_KEEP_ALL}, key=str):
        layers = [i for i, k in enumerate(plan.kv_keep) if k == keep]
        parts.append(f"KV {keep.first_tokens}+{keep.last_tokens} {_ranges(layers)}")
    if plan.kv_compression is not None:
        parts.append(f"{plan.kv_compression.method} {plan.kv_compression.percent}%")
    if plan.kv_hidden:
        parts.append("hidden states")
    parts += [
        f"{name} {value}"
        for name, value in (
            ("max_running", plan.max_running),
            ("max_waiting", plan.max_waiting),
            ("max_wait_s", plan.max_wait_s),
        )
        if value is not None
    ]
    return "; ".join(parts) or "dense"


def _ranges(numbers: list[int]) -> str:
    """Return ``0-7,9`` for [0, ..., 7, 9]."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
