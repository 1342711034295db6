"""The Plan: one frozen value that states which blocks run, at which precision, and which KV they keep."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from sim.cost.model_spec import ModelSpec
from sim.errors import PlanError

WEIGHT_BITS = (16, 8, 4)


@dataclass(frozen=True, slots=True, kw_only=True)
class KeepMask:
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
        if self.first_tokens < 0 or self.last_tokens < 1:
            raise PlanError(
                f"KVKeep(first_tokens={self.first_tokens}, last_tokens={self.last_tokens}): "
                "first_tokens must be at least 0 and last_tokens at least 1"
            )

    def tokens(self, context_tokens: int) -> int:
        """Return how many of ``context_tokens`` tokens stay."""
        if self.first_tokens is None or self.last_tokens is None:
            return context_tokens
        return min(context_tokens, self.first_tokens + self.last_tokens)


KV_KEEP_ALL = KVKeep()


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How the server runs until the next decision; everything that RAP, MorphServe and PDTrim adapt is a field.

    decode: the blocks that decode iterations run (RAP).
    prefill: the blocks that prefill runs; it keeps at least what decode keeps (PDTrim's nesting).
    weight_bits: 16, 8 or 4, one entry per layer, for both of its blocks (MorphServe).
    kv_keep: which tokens of each layer's KV stay after prefill (PDTrim).
    max_running: requests that may run at once; None keeps the engine's own limit (SABER).
    max_waiting: an arriving request is rejected when this many already wait; None rejects none.
    """

    decode: KeepMask
    prefill: KeepMask
    weight_bits: tuple[int, ...]
    kv_keep: tuple[KVKeep, ...]
    max_running: int | None = None
    max_waiting: int | None = None


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
    mha, ffn = set(mha), set(ffn)
    for kind, layers in (("MHA", mha), ("FFN", ffn)):
        for layer in sorted(layers):
            if not 0 <= layer < model.num_layers:
                raise PlanError(f"{kind}{layer} does not exist: {model.name} has layers 0 to {model.num_layers - 1}")
    return KeepMask(
        mha=tuple(i not in mha for i in range(model.num_layers)),
        ffn=tuple(i not in ffn for i in range(model.num_layers)),
    )


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


def check_plan(model: ModelSpec, plan: Plan) -> None:
    """Check that a plan is legal for a model.

    Raises:
        PlanError: if it is not; the message names the field or block, what is allowed and what to do.
    """
    check_layers(model, plan.decode, "plan.decode")
    check_layers(model, plan.prefill, "plan.prefill")
    for field, length in (("weight_bits", len(plan.weight_bits)), ("kv_keep", len(plan.kv_keep))):
        if length != model.num_layers:
            raise PlanError(
                f"plan.{field} has {length} entries; {model.name} has {model.num_layers} layers, one entry each"
            )
    for layer, bits in enumerate(plan.weight_bits):
        if bits not in WEIGHT_BITS:
            raise PlanError(f"plan.weight_bits of layer {layer} is {bits}; allowed are 16, 8 and 4")
        if bits > model.weight_bits:
            raise PlanError(
                f"plan.weight_bits of layer {layer} is {bits}, but the checkpoint of {model.name} holds "
                f"{model.weight_bits}-bit weights; use at most those, or the config of the unquantized model"
            )
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
    if plan.max_running is not None and plan.max_running < 1:
        raise PlanError(f"plan.max_running is {plan.max_running}; it must be at least 1, or null for no limit")
    if plan.max_waiting is not None and plan.max_waiting < 0:
        raise PlanError(
            f"plan.max_waiting is {plan.max_waiting}; it must be at least 0 waiting requests, or null for no limit"
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
    for bits in (8, 4):
        layers = [i for i, b in enumerate(plan.weight_bits) if b == bits]
        if layers:
            parts.append(f"W{bits} {_ranges(layers)}")
    for keep in sorted(set(plan.kv_keep) - {KV_KEEP_ALL}, key=str):
        layers = [i for i, k in enumerate(plan.kv_keep) if k == keep]
        parts.append(f"KV {keep.first_tokens}+{keep.last_tokens} {_ranges(layers)}")
    parts += [
        f"{name} {value}"
        for name, value in (("max_running", plan.max_running), ("max_waiting", plan.max_waiting))
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
