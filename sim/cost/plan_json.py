"""Plans as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sim.cost.plan import KV_KEEP_ALL, KeepMask, KVKeep, Plan
from sim.errors import CalibrationError


def plan_to_json(plan: Plan) -> dict[str, Any]:
    """Return what differs from dense, as plain values: removed blocks, layers by bits, KV runs."""
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
        "kv_keep": [{"first_tokens": a, "last_tokens": b, "layers": at} for (a, b), at in sorted(runs.items())],
    }


def _dropped(mask: KeepMask) -> list[str]:
    pairs = zip(mask.mha, mask.ffn, strict=True)
    return [
        f"{kind}{i}"
        for i, pair in enumerate(pairs)
        for kind, keep in zip(("MHA", "FFN"), pair, strict=True)
        if not keep
    ]


def plan_from_json(value: Mapping[str, Any]) -> Plan:
    """Return the plan that ``plan_to_json`` wrote.

    Raises:
        CalibrationError: for anything else.
    """
    try:
        layers = int(value["layers"])
        bits = [16] * layers
        for number, at in value["weight_bits"].items():
            for layer in at:
                bits[layer] = int(number)
        kv_keep = [KV_KEEP_ALL] * layers
        for run in value["kv_keep"]:
            for layer in run["layers"]:
                kv_keep[layer] = KVKeep(first_tokens=run["first_tokens"], last_tokens=run["last_tokens"])
        return Plan(
            decode=_mask(layers, value["decode_drop"]),
            prefill=_mask(layers, value["prefill_drop"]),
            weight_bits=tuple(bits),
            kv_keep=tuple(kv_keep),
        )
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise CalibrationError(f"not a plan of a quality table: {value!r} ({type(error).__name__}: {error})") from error


def _mask(layers: int, dropped: Sequence[str]) -> KeepMask:
    known = {f"{kind}{i}" for kind in ("MHA", "FFN") for i in range(layers)}
    if wrong := sorted(set(dropped) - known):
        raise ValueError(f"no block {wrong[0]}")
    return KeepMask(
        mha=tuple(f"MHA{i}" not in dropped for i in range(layers)),
        ffn=tuple(f"FFN{i}" not in dropped for i in range(layers)),
    )
