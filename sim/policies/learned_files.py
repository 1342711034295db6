"""The two files of a learned policy, read strictly: NAME.json and NAME.safetensors may come from anywhere.

Every size is checked before memory is taken for it, every value before it is used. Nothing is unpickled.
"""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load

from sim.errors import nearest
from sim.results.metrics import Side

MAX_JSON_BYTES = 40 * 2**20
MAX_HEADER_BYTES = 2**20
MAX_WEIGHT_BYTES = 64 * 2**20
"""A policy may have this many bytes of weights: 16 million parameters."""
MAX_LAYERS, MAX_SIZE = 32, 65_536
"""Limits on the number of layers, and on the inputs and outputs of one."""
MAX_MEMBERS = 64
"""A policy may average this many networks."""

# --- JSON ------------------------------------------------------------------------------------------------------------


def _text(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= 200 and value.isprintable()


def _whole(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**53


def _number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e18 and math.isfinite(value)


def _flag(value: Any) -> bool:
    return isinstance(value, bool)


def _all(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(check, value))


def _layer(value: Any) -> bool:
    return _all(_whole)(value) and len(value) == 2 and all(1 <= size <= MAX_SIZE for size in value)


def _layers(value: Any) -> bool:
    return _all(_layer)(value) and 1 <= len(value) <= MAX_LAYERS


def _entry(value: Any) -> bool:
    if not isinstance(value, dict) or set(value) != {"name", "unit", "low", "high", "meaning"}:
        return False
    return all(_text(value[key]) for key in ("name", "unit", "meaning")) and all(
        _number(value[key]) for key in ("low", "high")
    )


def _optional(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or check(value)


def _table(value: Any) -> bool:
    return isinstance(value, dict)


Check = tuple[Callable[[Any], bool], str]
NAME, NAMES, TABLE = (_text, "a line of text"), (_all(_text), "a list of names"), (_table, "a table")
REQUIRED: Mapping[str, Check] = {
    "task": NAME,
    "model": NAME,
    "layers": (
        _layers,
        f"a list of 1 to {MAX_LAYERS} pairs [outputs, inputs] of whole numbers from 1 to {MAX_SIZE:,}",
    ),
    "activation": NAME,
    "actions": NAMES,
    "observation": (_all(_entry), "a list of entries with name, unit, low, high and meaning"),
}
OPTIONAL: Mapping[str, Check] = {
    "parameters": (_whole, "a whole number"),
    "members": (
        lambda value: _whole(value) and 2 <= value <= MAX_MEMBERS,
        f"a whole number from 2 to {MAX_MEMBERS}; leave the key out for one network",
    ),
    "heads": (
        lambda value: _layer(value) and math.prod(value) <= MAX_SIZE,
        f"a pair of whole numbers of at least 1, whose product is at most {MAX_SIZE:,}",
    ),
    "environment": TABLE,
    "training": TABLE,
    "trainings": (_all(_table), "a list of tables, one for each member"),
    "quality_sha256": NAME,
    "commit": NAME,
    "plans": TABLE,
    "tick_s": (lambda value: _number(value) and value > 0, "a number of seconds above 0"),
    "scores": (_all(_number), "a list of numbers"),
    "guard": TABLE,
    "slo": TABLE,
    "low_loss": (lambda value: _number(value) and value >= 0, "a number of nats, at least 0"),
    "pace_share": (lambda value: _number(value) and value > 0, "a share of the TPOT target, above 0"),
    "wait_share": (lambda value: _number(value) and value > 0, "a share of the TTFT target, above 0"),
    "run_share": (lambda value: _number(value) and value > 0, "a share of the TPOT target, above 0"),
    "room_weight": (lambda value: _number(value) and value > 0, "a number above 0 and below 1e18"),
}
GUARD: Mapping[str, Check] = {
    "rule": (lambda value: value == "greedy_stop", "greedy_stop"),
    "order": NAMES,
    "form": NAME,
    "margin_nats": (lambda value: _number(value) and value >= 0, "a number of nats, at least 0"),
}
TARGET: Check = (_optional(lambda value: _number(value) and value > 0), "a number of seconds above 0, or null")
SLO: Mapping[str, Check] = {
    **dict.fromkeys(("ttft_s", "tpot_s", "e2e_s"), TARGET),
    "side": (lambda value: value in get_args(Side), " or ".join(get_args(Side))),
}
ENVIRONMENT: Mapping[str, Check] = {
    "restore": (_flag, "true or false"),
    "scores": (_flag, "true or false"),
    "sequence": (_whole, "a whole number"),
    "hide": NAMES,
    "sources": NAMES,
}
"""The keys of ``environment`` that a policy reads; others describe the training."""
PLANS: Mapping[str, Check] = {
    "order": NAMES,
    "made_for": NAME,
    "drops": (_all(_whole), "a list of whole numbers"),
    "low_layers": (_all(_whole), "a list of whole numbers"),
    "low_bits": (_whole, "a whole number"),
    "start_drops": (_optional(_whole), "a whole number, or null"),
    "admits": (_all(_optional(_whole)), "a list of whole numbers or null"),
    "runs": (
        _all(_optional(lambda value: _whole(value) and value > 0)),
        "a list of whole numbers of at least 1, or null",
    ),
    "waits": (
        _all(_optional(lambda value: _number(value) and value > 0)),
        "a list of numbers of seconds above 0, or null",
    ),
    "kv_bits": (_all(lambda value: _whole(value) or isinstance(value, str)), "a list of whole numbers, or hidden"),
    "compute_bits": (_all(_whole), "a list of whole numbers"),
    "kv_only": (_all(_whole), "a list of whole numbers"),
    "kv_compression": (
        _all(_optional(lambda value: isinstance(value, Mapping))),
        "a list of {method: NAME, percent: NUMBER} or null",
    ),
    "streamed": (_all(_whole), "a list of whole numbers"),
    "ffn_width": (_all(_whole), "a list of whole numbers"),
    "dwell_s": (lambda value: _number(value) and value >= 0, "a number of seconds, at least 0 and below 1e18"),
}
"""The options of ``sim.policies.observation.serve.serve_actions``, which checks their values."""
TRAINING: Mapping[str, Check] = {
    "seconds": (_number, "a number"),
    "validation_utility": (_number, "a number"),
}


def read_about(path: Path) -> dict[str, Any]:
    """Return the checked content of NAME.json.

    Raises:
        ValueError: for a file that is too large, is not strict JSON, or lacks or misstates a key; it names the key.
        OSError: if it cannot be read.
    """
    text = _read(path, MAX_JSON_BYTES).decode("utf-8")
    about = strict_json(text)
    if not isinstance(about, dict):
        raise ValueError(f"the file holds {reprlib.repr(about)}, not a table of keys")
    for key in REQUIRED:
        if key not in about:
            raise ValueError(f"there is no key {key!r}")
    _check_all(about, {**REQUIRED, **OPTIONAL}, "")
    _check(about.get("environment", {}), ENVIRONMENT, "environment.")
    _check(about.get("training", {}), TRAINING, "training.")
    _check_all(about.get("slo", {}), SLO, "slo.")
    if "guard" in about:
        for key in GUARD:
            if key not in about["guard"]:
                raise ValueError(f"there is no key guard.{key}")
        _check_all(about["guard"], GUARD, "guard.")
    _check_members(about)
    _check_plans(about)
    _check_terms(about)
    return about


SERVING_TERMS = ("pace_share", "run_share", "wait_share", "room_weight")
"""Keys of policies that serve: what is added to the network (``sim.policies.learned_serve``)."""


SERVING = ("ServeTrace", "ServeCluster")
"""Environments whose policies may have such terms."""


def _check_terms(about: Mapping[str, Any]) -> None:
    """Check that only a policy that serves has ``SERVING_TERMS``, and one limit of what runs."""
    if about["task"] not in SERVING and (found := [name for name in SERVING_TERMS if name in about]):
        raise ValueError(f"{found[0]} is for policies of {' and '.join(SERVING)}, and this one is of {about['task']}")
    if {"pace_share", "run_share"} <= about.keys():
        raise ValueError("pace_share and run_share both limit what runs; leave one of them out")


def _check_all(values: Mapping[str, Any], checks: Mapping[str, Check], prefix: str) -> None:
    """Check a table in which no other keys may stand."""
    for key in values:
        if key not in checks:
            raise ValueError(f"unknown key {prefix}{reprlib.repr(key)}; {nearest(key, checks)}")
    _check(values, checks, prefix)


def _check(values: Mapping[str, Any], checks: Mapping[str, Check], prefix: str) -> None:
    """Check the keys of a table that are read."""
    for key, (check, allowed) in checks.items():
        if key in values and not check(values[key]):
            raise ValueError(f"{prefix}{key} is {reprlib.repr(values[key])}; it must be {allowed}")


def _check_members(about: Mapping[str, Any]) -> None:
    """Check that heads and trainings fit the layers and the number of members."""
    outputs, heads = about["layers"][-1][0], about.get("heads")
    if heads is not None and sum(heads) != outputs:
        raise ValueError(f"heads is {heads}, which need {sum(heads)} outputs; the last layer has {outputs}")
    trainings, members = about.get("trainings"), about.get("members", 1)
    if trainings is not None and len(trainings) != members:
        raise ValueError(f"trainings lists {len(trainings)}, but the policy has {members} members")
    for number, training in enumerate(trainings or ()):
        _check(training, TRAINING, f"trainings.{number}.")


def _check_plans(about: Mapping[str, Any]) -> None:
    """Check the table of plans before any plan is made: there is one for each action of the network."""
    plans = about.get("plans", {})
    _check_all(plans, PLANS, "plans.")
    count = _plan_count(plans)
    actions = math.prod(about.get("heads", about["layers"][-1][:1]))
    if plans and count != actions:
        raise ValueError(f"plans lists {count} plans, but the network has {actions} actions")


def _plan_count(plans: Mapping[str, Any]) -> int:
    """Return how many plans the lists of a table combine to: all but compressed hidden states."""
    count = math.prod(len(value) for key, value in plans.items() if isinstance(value, list) and key != "order")
    compressions = plans.get("kv_compression", [None])
    hidden = [kept for kept in plans.get("kv_bits", [16]) if isinstance(kept, str)]
    kept = max(1, len(plans.get("kv_bits", [16])) * len(compressions))
    return count * (kept - len(hidden) * sum(way is not None for way in compressions)) // kept


def strict_json(text: str) -> Any:
    """Return the value of a JSON text; no repeated key, no NaN or Infinity, no number out of range, no deep nesting.

    Raises:
        ValueError: for a text that is not such JSON.
    """

    def refuse(constant: str) -> Any:
        raise ValueError(f"{constant} is not a JSON number")

    def pairs(items: Sequence[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(items)
        if len(value) != len(items):
            raise ValueError("a key stands twice in one table")
        return value

    try:
        return json.loads(text, parse_constant=refuse, object_pairs_hook=pairs)
    except RecursionError as error:
        raise ValueError("the JSON is nested too deeply") from error


# --- Weights ---------------------------------------------------------------------------------------------------------


def read_weights(
    path: Path, layers: Sequence[Sequence[int]], members: int = 1
) -> list[tuple[NDArray[np.float32], NDArray[np.float32]]]:
    """Return weights [out, in] and biases [out] of each layer from NAME.safetensors; [k, ...] for k members above 1.

    Args:
        path: the file. layers: [outputs, inputs] of each layer, which the file must have, in finite float32.
        members: networks in the file.
    Raises:
        ValueError: for anything else in the file; it names the tensor. OSError: if the file cannot be read.
    """
    shapes: dict[str, list[int]] = {}
    first = [members] if members > 1 else []
    for number, (outputs, inputs) in enumerate(layers):
        shapes[f"{number}.weight"], shapes[f"{number}.bias"] = [*first, outputs, inputs], [*first, outputs]
    size = 4 * sum(map(math.prod, shapes.values()))
    if size > MAX_WEIGHT_BYTES:
        raise ValueError(f"the layers have {size:,} bytes of weights; at most {MAX_WEIGHT_BYTES:,} are allowed")
    data = _read(path, MAX_WEIGHT_BYTES + MAX_HEADER_BYTES)
    _check_header(path.name, data, shapes)
    try:
        arrays = load(data)
    except SafetensorError as error:
        raise ValueError(f"{path.name}: {error}") from error
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            raise ValueError(f"{path.name}: tensor {name} has values that are not finite numbers")
    return [(arrays[f"{number}.weight"], arrays[f"{number}.bias"]) for number in range(len(layers))]


def _check_header(file: str, data: bytes, shapes: Mapping[str, list[int]]) -> None:
    """Check that the header lists exactly these tensors, in float32, before any of them is loaded."""
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > len(data) - 8:
        raise ValueError(f"{file} is cut short: {len(data):,} bytes")
    if length > MAX_HEADER_BYTES:
        raise ValueError(f"{file}: a header of {length:,} bytes; at most {MAX_HEADER_BYTES:,} are allowed")
    header = strict_json(data[8 : 8 + length].decode("utf-8"))
    if not isinstance(header, dict):
        raise ValueError(f"{file}: its header is not a table of tensors")
    header.pop("__metadata__", None)
    for name in header:
        if name not in shapes:
            raise ValueError(f"{file}: unknown tensor {reprlib.repr(name)}; {nearest(name, shapes)}")
    for name, shape in shapes.items():
        tensor = header.get(name)
        if not isinstance(tensor, dict):
            raise ValueError(f"{file}: there is no tensor {name}")
        if tensor.get("dtype") != "F32":
            raise ValueError(f"{file}: tensor {name} is {reprlib.repr(tensor.get('dtype'))}; it must be 'F32'")
        if tensor.get("shape") != shape:
            raise ValueError(f"{file}: tensor {name} has shape {reprlib.repr(tensor.get('shape'))}, expected {shape}")


def _read(path: Path, limit: int) -> bytes:
    """Return the bytes of a regular file.

    Raises:
        ValueError: if it has more than ``limit`` bytes, or is no file. OSError: if it cannot be read.
    """
    if path.exists() and not path.is_file():
        raise ValueError(f"{path.name} is not a file")
    with path.open("rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise ValueError(f"{path.name} has more than {limit:,} bytes, the limit")
    return data
