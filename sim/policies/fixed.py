"""Policies that run one plan for the entire replay."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sim.cost.ffn_width import FULL_WIDTH
from sim.cost.model_spec import ModelSpec
from sim.cost.plan import KVCompression, KVKeep, Plan, check_plan, drop, layer_list
from sim.engine.protocol import EngineState
from sim.errors import PlanError, nearest
from sim.limits import is_whole
from sim.policies.base import PolicyContext


@dataclass(frozen=True, slots=True)
class Fixed:
    """Always returns the same plan: dense, or any static compression."""

    first_plan: Plan

    @property
    def plans(self) -> tuple[Plan, ...]:
        """The one plan."""
        return (self.first_plan,)

    def __call__(self, state: EngineState) -> Plan:
        """Return the plan; the state does not matter."""
        return self.first_plan


def static_plan(
    model: ModelSpec,
    *,
    drop_mha: Sequence[int] = (),
    drop_ffn: Sequence[int] = (),
    prefill_drop_mha: Sequence[int] | None = None,
    prefill_drop_ffn: Sequence[int] | None = None,
    weight_bits: int | Sequence[int] | None = None,
    compute_bits: int | Sequence[int] | None = None,
    kv_first_tokens: int | None = None,
    kv_last_tokens: int | None = None,
    kv_layers: Sequence[int] | None = None,
    kv_bits: int | Sequence[int] = 16,
    streamed: Sequence[int] = (),
    kv_only: Sequence[int] = (),
    ffn_width: int | Sequence[int] = FULL_WIDTH,
    kv_method: str | None = None,
    kv_percent: int | None = None,
    kv_hidden: bool = False,
    max_running: int | None = None,
    max_waiting: int | None = None,
    max_wait_s: float | None = None,
) -> Plan:
    """Return the plan for the options of a configuration.

    Args:
        model: the model that the plan is for.
        drop_mha, drop_ffn: layers whose MHA or FFN block decode skips.
        prefill_drop_mha, prefill_drop_ffn: the same for prefill; None takes those of decode.
        weight_bits: 16, 8 or 4 for all layers, or one entry per layer; None takes those of the checkpoint.
        compute_bits: at how many bits products run, for all layers or one entry per layer; None takes ``weight_bits``.
        kv_first_tokens, kv_last_tokens: tokens whose KV stays after prefill; None keeps all tokens.
        kv_layers: layers in which they apply; None is all layers.
        kv_bits: 16, 8 or 4 for the KV of all layers after prefill, or one entry per layer.
        streamed: layers whose weights stay in host memory and are copied in by each iteration.
        kv_only: layers in which all tokens of a prompt but its last one only write keys and values.
        ffn_width: 8, 7, 6 or 5 eighths of the channels of all FFN blocks, or one entry per layer.
        kv_method: ada_kv, refree_kv, think or lorc, which compresses the KV of a prompt; None compresses none.
        kv_percent: of the bytes of that KV that stay.
        kv_hidden: whether requests keep hidden states after prefill in place of keys and values.
        max_running, max_waiting, max_wait_s: as in ``Plan``.
    Raises:
        PlanError: if the plan is not legal for the model; the message names the block.
    """
    layers = model.num_layers
    keep = KVKeep(first_tokens=kv_first_tokens, last_tokens=kv_last_tokens)
    if kv_layers and keep == KVKeep():
        raise PlanError("kv_layers shortens nothing alone; add kv_first_tokens and kv_last_tokens, or leave it out")
    shortened = set(range(layers)) if kv_layers is None else _known_layers(model, "kv_layers", kv_layers)
    crossing = _known_layers(model, "streamed", streamed)
    writing = _known_layers(model, "kv_only", kv_only)
    if (kv_method is None) != (kv_percent is None):
        raise PlanError(
            f"kv_method is {kv_method} and kv_percent {kv_percent}; give both, such as ada_kv and 70, or neither"
        )
    weight_bits = model.weight_bits if weight_bits is None else weight_bits
    for name, number in (("kv_bits", kv_bits), ("compute_bits", compute_bits), ("ffn_width", ffn_width)):
        if isinstance(number, Sequence) and not number:
            raise PlanError(f"{name} is an empty list; give one number, such as 8, or one for each of {layers} layers")
    plan = Plan(
        decode=drop(model, mha=layer_list("drop_mha", drop_mha), ffn=layer_list("drop_ffn", drop_ffn)),
        prefill=drop(
            model,
            mha=drop_mha if prefill_drop_mha is None else layer_list("prefill_drop_mha", prefill_drop_mha),
            ffn=drop_ffn if prefill_drop_ffn is None else layer_list("prefill_drop_ffn", prefill_drop_ffn),
        ),
        weight_bits=_per_layer(weight_bits, layers),
        compute_bits=None if compute_bits is None else _per_layer(compute_bits, layers),
        kv_keep=tuple(keep if layer in shortened else KVKeep() for layer in range(layers)),
        kv_bits=_per_layer(kv_bits, layers),
        streamed=tuple(layer in crossing for layer in range(layers)),
        kv_only=tuple(layer in writing for layer in range(layers)),
        ffn_width=_per_layer(ffn_width, layers),
        kv_compression=(
            None if kv_method is None or kv_percent is None else KVCompression(method=kv_method, percent=kv_percent)
        ),
        kv_hidden=kv_hidden,
        max_running=max_running,
        max_waiting=max_waiting,
        max_wait_s=max_wait_s,
    )
    check_plan(model, plan)
    return plan


def _known_layers(model: ModelSpec, name: str, listed: Sequence[int]) -> set[int]:
    """Return a set of layers; a layer that the model does not have is a PlanError that names it."""
    layers = set(layer_list(name, listed))
    if unknown := sorted(layer for layer in layers if not 0 <= layer < model.num_layers):
        raise PlanError(
            f"{name}: layer {unknown[0]} does not exist; {model.name} has layers 0 to {model.num_layers - 1}"
        )
    return layers


def _per_layer(numbers: int | Sequence[int], layers: int) -> tuple[int, ...]:
    """Return one entry per layer; ``check_plan`` checks what they are."""
    listed = isinstance(numbers, Sequence) and not isinstance(numbers, str)
    return tuple(numbers) if listed else (numbers,) * layers  # type: ignore[arg-type,return-value]


def fixed(served: PolicyContext, *, made_for: str | None = None, **options: Any) -> Fixed:
    """Build the policy that always runs ``static_plan(model, **options)``.

    Args:
        made_for: the model for which its blocks were chosen; None accepts any model.
    Raises:
        PlanError: for an option that ``static_plan`` does not have, a plan that is not legal for the model, or blocks
            that were chosen for another model.
    """
    if made_for is not None and made_for != served.model.name:
        raise PlanError(
            f"policy.drop_mha and drop_ffn were chosen for {made_for}, not for {served.model.name}; set blocks of this "
            f"model: policy=fixed policy.drop_mha=[...] policy.drop_ffn=[...] (conf/score has measured orders)"
        )
    return Fixed(plan_of(served.model, options))


def static_w4_prefix(served: PolicyContext, *, layers: int, bits: int = 4) -> Fixed:
    """Build the policy that always runs the first ``layers`` layers at ``bits`` bits, the others as in the checkpoint.

    Raises:
        PlanError: for more layers than the model has, or bits that are not supported.
    """
    most = served.model.num_layers
    if not is_whole(layers) or not 0 <= layers <= most:
        raise PlanError(f"policy.layers is {layers!r}; {served.model.name} has {most}, so 0 to {most} are allowed")
    return Fixed(
        static_plan(served.model, weight_bits=(bits,) * layers + (served.model.weight_bits,) * (most - layers))
    )


def plan_of(model: ModelSpec, options: Mapping[str, Any]) -> Plan:
    """Return ``static_plan(model, **options)``; the error for an unknown option names the nearest known one."""
    allowed = set(inspect.signature(static_plan).parameters) - {"model"}
    for option in options:
        if option == "kv_compression":  # its name in a table of plans, where it is one entry
            raise PlanError(
                "a plan has no option 'kv_compression'; give kv_method and kv_percent, such as ada_kv and 70"
            )
        if option not in allowed:
            raise PlanError(f"a plan has no option {option!r}; {nearest(option, allowed)}")
    return static_plan(model, **options)
