"""Plans as JSON: removed blocks, layers by precision and width, runs of kept KV, streamed and kv_only layers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from sim.cost.ffn_width import FFN_WIDTHS, FULL_WIDTH
from sim.cost.model_spec import MOST_LAYERS
from sim.cost.plan import KV_KEEP_ALL, WEIGHT_BITS, KeepMask, KVCompression, KVKeep, Plan, layer_list
from sim.errors import CalibrationError
from sim.limits import is_whole


def plan_to_json(plan: Plan) -> dict[str, Any]:
    """Return how a plan differs from dense, as plain values."""
    runs: dict[tuple[int, int], list[int]] = {}
    for layer, keep in enumerate(plan.kv_keep):
        if keep.first_tokens is not None and keep.last_tokens is not None:
            runs.setdefault((keep.first_tokens, keep.last_tokens), []).append(layer)
    return {
        "layers": len(plan.weight_bits),
        "prefill_drop": _dropped(plan.prefill),
        "decode_drop": _dropped(plan.decode),
        "weight_bits": _layers_by(plan.weight_bits, (8, 4)),
        "kv_keep": [
            {"first_tokens": first, "last_tokens": last, "layers": layers}
            for (first, last), layers in sorted(runs.items())
        ],
        **({"compute_bits": lower} if (lower := _layers_by(_nested(plan), (8, 4))) else {}),
        **({"kv_bits": kv_bits} if (kv_bits := _layers_by(plan.kv_bits, (8, 4))) else {}),
        **({"ffn_width": widths} if (widths := _layers_by(plan.ffn_width, FFN_WIDTHS[1:])) else {}),
        **({"streamed": [i for i, x in enumerate(plan.streamed) if x]} if any(plan.streamed) else {}),
        **({} if plan.kv_compression is None else {"kv_compression": asdict(plan.kv_compression)}),
        **({"kv_hidden": True} if plan.kv_hidden else {}),
        **({"kv_only": [i for i, x in enumerate(plan.kv_only) if x]} if any(plan.kv_only) else {}),
    }


def _nested(plan: Plan) -> list[int]:
    """Return the bits at which each layer computes below its resident ones, 16 for the others."""
    return [bits if nested else 16 for bits, nested in zip(plan.product_bits, plan.nested, strict=True)]


def _layers_by(listed: Sequence[int], numbers: Sequence[int]) -> dict[str, list[int]]:
    """Return the layers that have each of some numbers, such as bits; numbers that none has are left out."""
    return {str(number): [i for i, x in enumerate(listed) if x == number] for number in numbers if number in listed}


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
        if not is_whole(layers) or not 1 <= layers <= MOST_LAYERS:
            raise ValueError(f"layers is {layers!r:.80}; it must be a whole number from 1 to {MOST_LAYERS}")
        kv_keep = [KV_KEEP_ALL] * layers
        for run in value["kv_keep"]:
            for layer in _known(run["layers"], layers):
                kv_keep[layer] = KVKeep(first_tokens=run["first_tokens"], last_tokens=run["last_tokens"])
        weight_bits, lower, kv_bits = (
            _by_layer(layers, value.get(name, {}), WEIGHT_BITS, 16)
            for name in ("weight_bits", "compute_bits", "kv_bits")
        )
        streamed, kv_only = (set(_known(value.get(name, []), layers)) for name in ("streamed", "kv_only"))
        return Plan(
            decode=_mask(layers, value["decode_drop"]),
            prefill=_mask(layers, value["prefill_drop"]),
            weight_bits=weight_bits,
            compute_bits=tuple(map(min, weight_bits, lower)),
            kv_keep=tuple(kv_keep),
            kv_bits=kv_bits,
            streamed=tuple(layer in streamed for layer in range(layers)),
            kv_only=tuple(layer in kv_only for layer in range(layers)),
            ffn_width=_by_layer(layers, value.get("ffn_width", {}), FFN_WIDTHS, FULL_WIDTH),
            kv_compression=KVCompression(**value["kv_compression"]) if "kv_compression" in value else None,
            kv_hidden=_flag(value.get("kv_hidden", False)),
        )
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise CalibrationError(
            f"not a plan of a quality table: {value!r:.200} ({type(error).__name__}: {error}); "
            "write plans with plan_to_json, or measure the table again: python -m hw.score kind=table"
        ) from error


def _flag(value: object) -> bool:
    """Return true or false.

    Raises:
        ValueError: for anything else.
    """
    if not isinstance(value, bool):
        raise ValueError(f"{value!r:.80} is neither true nor false")
    return value


def _known(listed: Iterable[int], layers: int) -> list[int]:
    """Return listed layers.

    Raises:
        ValueError: for a layer that the model does not have, or anything that is no whole number.
    """
    found = layer_list("layers", listed)
    for layer in found:
        if not 0 <= layer < layers:
            raise ValueError(f"no layer {layer!r:.80} in a model of {layers} layers")
    return found


def _by_layer(
    layers: int, listed: Mapping[str, Iterable[int]], allowed: Sequence[int], default: int
) -> tuple[int, ...]:
    """Return the number of every layer, such as its bits; the default where none is listed."""
    found, known = [default] * layers, {str(number): number for number in allowed}
    for number, at in listed.items():
        for layer in _known(at, layers):
            found[layer] = known[number]
    return tuple(found)


def _mask(layers: int, dropped: Sequence[str]) -> KeepMask:
    """Return the mask without the named blocks.

    Raises:
        ValueError: for a block that the model does not have.
    """
    if isinstance(dropped, str):
        raise ValueError(f'dropped blocks are {dropped!r}; list their names, such as ["MHA3"]')
    known = {f"{kind}{layer}" for kind in ("MHA", "FFN") for layer in range(layers)}
    if unknown := sorted(set(dropped) - known):
        raise ValueError(f"no block {unknown[0]} in a model of {layers} layers")
    return KeepMask(
        mha=tuple(f"MHA{layer}" not in dropped for layer in range(layers)),
        ffn=tuple(f"FFN{layer}" not in dropped for layer in range(layers)),
    )
