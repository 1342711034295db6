"""Reads the line that ``sim.cost.plan.describe`` writes of a plan, as it stands in ``transitions.parquet``."""

from __future__ import annotations

import re

from sim.cost.ffn_width import FULL_WIDTH
from sim.cost.model_spec import MOST_LAYERS
from sim.cost.plan import KV_KEEP_ALL, KV_METHODS, KeepMask, KVCompression, KVKeep, Plan
from sim.errors import PlanError

_RANGE = r"\d+(?:-\d+)?"
_RANGES = rf"{_RANGE}(?:,{_RANGE})*"
_DROPPED = re.compile(rf"(?:(prefill|decode) )?((?:-(?:MHA|FFN) {_RANGES} ?)+)")
_BITS = re.compile(rf"W(8|4) ({_RANGES})")
_COMPUTE_BITS = re.compile(rf"compute(8|4) ({_RANGES})")
_KV_BITS = re.compile(rf"KV(8|4) ({_RANGES})")
_FFN_WIDTH = re.compile(rf"FFN([567])/8 ({_RANGES})")
_STREAMED = re.compile(rf"streamed ({_RANGES})")
_KV_ONLY = re.compile(rf"KV only ({_RANGES})")
_KV_KEEP = re.compile(rf"KV (\d+)\+(\d+) ({_RANGES})")
_KV_COMPRESSION = re.compile(rf"({'|'.join(KV_METHODS)}) (\d+)%")
_LIMIT = re.compile(r"(max_running|max_waiting|max_wait_s) (\S+)")


def plan_from_text(text: str, num_layers: int) -> Plan:
    """Return the plan of a line such as ``decode -MHA 18,19 -FFN 13; W4 0-7``.

    Raises:
        PlanError: for anything that ``describe`` does not write, or a layer that the model does not have.
    """
    bits, computed = [16] * num_layers, [16] * num_layers
    kv_bits, kv_keep, streamed = [16] * num_layers, [KV_KEEP_ALL] * num_layers, [False] * num_layers
    kv_only, ffn_width = [False] * num_layers, [FULL_WIDTH] * num_layers
    kv_compression, kv_hidden = None, False
    kept = {stage: KeepMask(mha=(True,) * num_layers, ffn=(True,) * num_layers) for stage in ("prefill", "decode")}
    limits: dict[str, float] = {}
    for part in text.split("; "):
        if part == "dense":
            continue
        if part == "hidden states":
            kv_hidden = True
            continue
        if found := _DROPPED.fullmatch(part):
            for stage in [found[1]] if found[1] else ["prefill", "decode"]:
                kept[stage] = _mask(found[2], num_layers)
        elif found := _BITS.fullmatch(part):
            for layer in _layers(found[2], num_layers):
                bits[layer] = int(found[1])
        elif found := _COMPUTE_BITS.fullmatch(part):
            for layer in _layers(found[2], num_layers):
                computed[layer] = int(found[1])
        elif found := _KV_BITS.fullmatch(part):
            for layer in _layers(found[2], num_layers):
                kv_bits[layer] = int(found[1])
        elif found := _FFN_WIDTH.fullmatch(part):
            for layer in _layers(found[2], num_layers):
                ffn_width[layer] = int(found[1])
        elif found := _STREAMED.fullmatch(part):
            for layer in _layers(found[1], num_layers):
                streamed[layer] = True
        elif found := _KV_ONLY.fullmatch(part):
            for layer in _layers(found[1], num_layers):
                kv_only[layer] = True
        elif found := _KV_KEEP.fullmatch(part):
            for layer in _layers(found[3], num_layers):
                kv_keep[layer] = KVKeep(first_tokens=int(found[1]), last_tokens=int(found[2]))
        elif found := _KV_COMPRESSION.fullmatch(part):
            kv_compression = KVCompression(method=found[1], percent=int(found[2]))
        elif found := _LIMIT.fullmatch(part):
            limits[found[1]] = _number(found[2])
        else:
            raise PlanError(f"{part!r:.80} describes no part of a plan; an example is 'decode -MHA 18,19; W4 0-7'")
    return Plan(
        decode=kept["decode"],
        prefill=kept["prefill"],
        weight_bits=tuple(bits),
        compute_bits=tuple(map(min, bits, computed)),
        kv_keep=tuple(kv_keep),
        kv_bits=tuple(kv_bits),
        streamed=tuple(streamed),
        kv_only=tuple(kv_only),
        ffn_width=tuple(ffn_width),
        kv_compression=kv_compression,
        kv_hidden=kv_hidden,
        max_running=_whole(limits.get("max_running")),
        max_waiting=_whole(limits.get("max_waiting")),
        max_wait_s=limits.get("max_wait_s"),
    )


def most_layer(text: str) -> int:
    """Return the highest layer that a description names; -1 if it names none."""
    named = r"MHA|FFN|W8|W4|compute8|compute4|KV8|KV4|FFN[567]/8|streamed|KV only|KV \d+\+\d+"
    lists = re.findall(rf"(?:{named}) ({_RANGES})", text)
    return max((int(number) for listed in lists for number in re.split("[-,]", listed)), default=-1)


def _mask(text: str, num_layers: int) -> KeepMask:
    """Return the mask of ``-MHA 18,19 -FFN 13``."""
    dropped: dict[str, list[int]] = {"MHA": [], "FFN": []}
    for kind, listed in re.findall(rf"-(MHA|FFN) ({_RANGES})", text):
        dropped[kind] += _layers(listed, num_layers)
    return KeepMask(
        mha=tuple(layer not in dropped["MHA"] for layer in range(num_layers)),
        ffn=tuple(layer not in dropped["FFN"] for layer in range(num_layers)),
    )


def _layers(text: str, num_layers: int) -> list[int]:
    """Return the layers of ``0-7,9``."""
    found: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        if not int(first) <= int(last or first) < min(num_layers, MOST_LAYERS):
            raise PlanError(f"layers {part}: the model has layers 0 to {num_layers - 1}")
        found += range(int(first), int(last or first) + 1)
    return found


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise PlanError(f"{text!r:.80} is no number; a plan's limits are numbers, such as 'max_running 8'") from None


def _whole(value: float | None) -> int | None:
    return None if value is None else int(value)
