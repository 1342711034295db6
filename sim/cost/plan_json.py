"""Plans as JSON: removed blocks, layers by precision, and runs of kept KV; a dense plan is nearly empty."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sim.cost.model_spec import MOST_LAYERS
from sim.cost.plan import KV_KEEP_ALL, WEIGHT_BITS, KeepMask, KVKeep, Plan
from sim.errors import CalibrationError


def plan_to_json(plan: Plan) -> dict[str, Any]:
    """Return how a plan differs from dense, as plain values."""
    bits = {str(b): [i for i, x in enumerate(plan.weight_bits) if x == b] for b in (8, 4) if b in plan.weight_bits}
    runs: dict[tuple[int, int], list[int]] = {}
    for layer, keep in enumerate(plan.kv_keep):
        if keep.first_tokens is not None and keep.last_tokens is not None:
            runs.setdefault((keep.first_tokens, keep.last_tokens), []).append(layer)
    return {
        "layers": len(plan.weight_bits),
        "prefill_drop": _dropped(plan.prefill),
        "decode_drop": _dropped(plan.decode),
        "weight_bits": bits,
        "kv_keep": [
            {"first_tokens": first, "last_tokens": last, "layers": layers}
            for (first, last), layers in sorted(runs.items())
        ],
    }


def _dropped(mask: KeepMask) -> list[str]:
    """Return the names of the blocks that a mask drops, in the order in which blocks run."""
    return [
        f"{kind}{layer}"
        for layer, pair in enumerate(zip(mask.mha, mask.ffn, strict=True))
        for kind, keep in zip(("MHA", "FFN"), pair, strict=True)
        if not keep
    ]


def plan_from_json(value: Mapping[str, Any]) -> Plan:
    """Return the plan that ``plan_to_json`` wrote.

    Raises:
        CalibrationError: for anything else.
    """
    try:
        layers = value["layers"]
        if type(layers) is not int or not 1 <= layers <= MOST_LAYERS:
            raise ValueError(f"layers is {layers!r:.80}; it must be 1 to {MOST_LAYERS}")
        bits = [16] * layers
        for number, at in value["weight_bits"].items():
            if int(number) not in WEIGHT_BITS:
                raise ValueError(f"weights of {number:.80} bits")
            for layer in _known(at, layers):
                bits[layer] = int(number)
        kv_keep = [KV_KEEP_ALL] * layers
        for run in value["kv_keep"]:
            for layer in _known(run["layers"], layers):
                kv_keep[layer] = KVKeep(first_tokens=run["first_tokens"], last_tokens=run["last_tokens"])
        return Plan(
            decode=_mask(layers, value["decode_drop"]),
            prefill=_mask(layers, value["prefill_drop"]),
            weight_bits=tuple(bits),
            kv_keep=tuple(kv_keep),
        )
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise CalibrationError(
            f"not a plan of a quality table: {value!r:.200} ({type(error).__name__}: {error}); "
            "write plans with plan_to_json, or measure the table again: python -m hw.score kind=table"
        ) from error


def _known(numbers: Sequence[int], layers: int) -> Sequence[int]:
    """Return numbers of layers.

    Raises:
        ValueError: for a layer that the model does not have.
    """
    for layer in numbers:
        if type(layer) is not int or not 0 <= layer < layers:
            raise ValueError(f"no layer {layer!r:.80} in a model of {layers} layers")
    return numbers


def _mask(layers: int, dropped: Sequence[str]) -> KeepMask:
    """Return the mask without the named blocks.

    Raises:
        ValueError: for a block that the model does not have.
    """
    known = {f"{kind}{layer}" for kind in ("MHA", "FFN") for layer in range(layers)}
    if unknown := sorted(set(dropped) - known):
        raise ValueError(f"no block {unknown[0]} in a model of {layers} layers")
    return KeepMask(
        mha=tuple(f"MHA{layer}" not in dropped for layer in range(layers)),
        ffn=tuple(f"FFN{layer}" not in dropped for layer in range(layers)),
    )
