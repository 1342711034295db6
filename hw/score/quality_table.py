"""The quality table: which plans are measured, and their NLL on calibration and test text."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from hw.elastic.model import ElasticModel
from hw.score.importance import block_number
from hw.score.nll import mask_without, measure_many
from sim.cost.model_spec import ModelSpec
from sim.cost.plan import KVKeep, Plan, dense_plan
from sim.cost.plan_json import plan_to_json
from sim.errors import ConfigError
from sim.results.run_folder import commit, write_json

DEEPEST_PREFIX = 40
LAYERS_SWAPPED = (1, 2, 4, 8, 12, 16, 24, 30)
RANDOM_MASKS = 150
MIXTURES = 36
STAGED = 24
SPREAD_MASKS = 24
STAGED_PREFIXES = (2, 4, 6, 8, 12, 16)
KV_ALONE = (4, 32)
KV_SUBSETS = 12
KV_RUNS = ((4, 16), (4, 32), (4, 64), (0, 32), (16, 16))


def table_plans(
    spec: ModelSpec,
    orders: Mapping[str, Sequence[int]],
    layer_orders: Mapping[str, Sequence[int]],
    seed: int,
    searches: Sequence[tuple[Sequence[int], Sequence[int]]] = (),
) -> Iterator[tuple[str, Plan]]:
    """Return the plans to measure, each with how it was chosen; the same ones for the same arguments.

    Args:
        orders: name -> order in which blocks are removed; ``one_shot`` also says which blocks random masks may spare.
        layer_orders: name -> order in which layers change precision or lose KV.
        searches: what PDTrim's search removes in prefill and in decode, a pair each.
    """
    rng = np.random.default_rng(seed)
    dense = dense_plan(spec)
    layers, blocks = spec.num_layers, 2 * spec.num_layers

    def without(removed: Sequence[int]) -> Plan:
        mask = mask_without(layers, set(removed))
        return replace(dense, prefill=mask, decode=mask)

    def prefixes(name: str) -> Iterator[tuple[str, Plan]]:
        for count in range(1, min(DEEPEST_PREFIX, len(orders[name])) + 1):
            yield f"prefix of {name}", without(orders[name][:count])

    yield "dense", dense
    for block in range(blocks):
        yield "single removal", without([block])
    if "gsi" in orders:
        yield from prefixes("gsi")
    swaps = {"front_to_back": range(layers), **{k: v for k, v in layer_orders.items() if k.startswith("lis")}}
    for bits in (4, 8):
        for name, order in swaps.items():
            if name in ("front_to_back", f"lis_w{bits}"):
                for count in (c for c in LAYERS_SWAPPED if c <= layers):
                    yield f"W{bits} prefix of {name}", _swap(dense, order[:count], bits)
    # Without the blocks that ruin a model on their own, random masks stay in the range in which a policy moves.
    harmless = list(orders.get("one_shot", range(blocks)))[: max(1, blocks * 3 // 4)]
    for index in range(RANDOM_MASKS):
        pool = list(range(blocks)) if index % 5 == 0 else harmless
        count = 1 + int(rng.integers(0, max(1, len(pool) // 4))) if index % 2 else 1 + int(rng.integers(0, 8))
        yield "random mask", without([pool[i] for i in rng.permutation(len(pool))[:count]])
    for index in range(MIXTURES):
        removed = [harmless[i] for i in rng.permutation(len(harmless))[: int(rng.integers(1, 9))]]
        bits = 4 if index % 2 else 8
        swapped = [int(i) for i in rng.permutation(layers)[: int(rng.integers(1, layers + 1))]]
        yield "mixture of pruning and precision", _swap(without(removed), swapped, bits)
    for index in range(STAGED):
        decode = [harmless[i] for i in rng.permutation(len(harmless))[: int(rng.integers(1, 11))]]
        prefill = decode[: 0 if index % 2 else int(rng.integers(0, len(decode) + 1))]
        kind = "decode mask alone" if not prefill else "nested masks"
        yield kind, replace(dense, prefill=mask_without(layers, set(prefill)), decode=mask_without(layers, set(decode)))
    local = list(layer_orders.get("attention", range(layers)))
    for first, last in KV_RUNS:
        for share in (4, 2, 1):
            chosen = set(local[: max(1, layers // share)])
            keep = KVKeep(first_tokens=first, last_tokens=last)
            yield "kv_keep", replace(dense, kv_keep=tuple(keep if i in chosen else KVKeep() for i in range(layers)))
    for name in sorted(orders.keys() - {"gsi"}):
        yield from prefixes(name)
    # From their own numbers, so that a table measured before these existed keeps its plans.
    rng = np.random.default_rng([seed, 1])
    for index in range(SPREAD_MASKS):
        low, high = (2, 12) if index % 4 else (13, DEEPEST_PREFIX)
        count = min(int(rng.integers(low, high + 1)), len(harmless))
        yield "random mask", without([harmless[i] for i in rng.permutation(len(harmless))[:count]])
    best = orders.get("gsi", ())
    for count in (count for count in STAGED_PREFIXES if count <= len(best)):
        mask, half = mask_without(layers, set(best[:count])), mask_without(layers, set(best[: count // 2]))
        yield "decode mask alone", replace(dense, decode=mask)
        yield "nested masks", replace(dense, decode=mask, prefill=half)
        for bits in (4, 8):
            yield "mixture of pruning and precision", _swap(without(best[:count]), range(layers), bits)
    for layer in range(layers):
        keep = KVKeep(first_tokens=KV_ALONE[0], last_tokens=KV_ALONE[1])
        yield (
            "single layer of cut KV",
            replace(dense, kv_keep=tuple(keep if i == layer else KVKeep() for i in range(layers))),
        )
    for _ in range(KV_SUBSETS):
        first, last = KV_RUNS[int(rng.integers(3))]  # those that keep the first four tokens
        chosen = {int(i) for i in rng.permutation(layers)[: int(rng.integers(2, max(3, 1 + layers // 2)))]}
        keep = KVKeep(first_tokens=first, last_tokens=last)
        yield "kv_keep", replace(dense, kv_keep=tuple(keep if i in chosen else KVKeep() for i in range(layers)))
    for in_prefill, in_decode in searches:
        masks = [mask_without(layers, set(removed)) for removed in (in_prefill, in_decode)]
        yield "PDTrim search", replace(dense, prefill=masks[0], decode=masks[1])


def _swap(plan: Plan, layers: Sequence[int], bits: int) -> Plan:
    chosen = set(layers)
    return replace(plan, weight_bits=tuple(bits if i in chosen else 16 for i in range(len(plan.weight_bits))))


def read_orders(folder: Path, model: str) -> tuple[dict[str, list[int]], dict[str, list[int]]]:
    """Return the orders of blocks and of layers that conf/score holds for a model."""
    orders, layer_orders = {}, {}
    for name in ("gsi", "one_shot", "cosine", "pdtrim"):
        if (path := folder / f"{model}_{name}.json").is_file():
            orders[name] = [block_number(b) for b in json.loads(path.read_text(encoding="utf-8"))["order"]]
    for name in ("lis_w4", "lis_w8", "attention"):
        if (path := folder / f"{model}_{name}.json").is_file():
            layer_orders[name] = [int(i) for i in json.loads(path.read_text(encoding="utf-8"))["order"]]
    return orders, layer_orders


def read_searches(folder: Path, model: str) -> list[tuple[list[int], list[int]]]:
    """Return what PDTrim's searches of conf/score remove in prefill and in decode."""
    path = folder / f"{model}_pdtrim.json"
    found = json.loads(path.read_text(encoding="utf-8"))["searches"] if path.is_file() else []
    return [([block_number(b) for b in s["prefill"]], [block_number(b) for b in s["decode"]]) for s in found]


def measure_table(
    elastic: ElasticModel,
    calibration: Tensor,
    test: Tensor,
    path: Path,
    described: Mapping[str, Any],
    scores: Path,
    *,
    seed: int,
    say: Callable[[str], None],
    save_every: int = 16,
) -> None:
    """Measure every plan of ``table_plans`` and write the table; go on where an earlier run on the same text stopped.

    Raises:
        ConfigError: if the file holds a table of another model or text.
    """
    rows: list[dict[str, Any]] = []
    if path.is_file():
        old = json.loads(path.read_text(encoding="utf-8"))
        if any(old.get(key) != value for key, value in described.items()):
            different = sorted(key for key, value in described.items() if old.get(key) != value)
            raise ConfigError(f"{path} holds another table: {', '.join(different)} differ; remove it, or set out=")
        rows = old["plans"]
    known = {json.dumps(row["plan"], sort_keys=True): row for row in rows}
    orders, layer_orders = read_orders(scores, elastic.spec.name)
    wanted = list(table_plans(elastic.spec, orders, layer_orders, seed, read_searches(scores, elastic.spec.name)))
    chosen: dict[str, list[str]] = {}
    for kind, plan in wanted:
        kinds = chosen.setdefault(json.dumps(plan_to_json(plan), sort_keys=True), [])
        if kind not in kinds:
            kinds.append(kind)
    for key, row in known.items():
        # Orders change when scores are measured again; what was measured for an old one is as true as before.
        row["chosen_as"] = chosen.get(key, ["earlier choice"])
    started = time.perf_counter()

    def save() -> None:
        write_json(path, {**described, "commit": commit(), "orders": sorted([*orders, *layer_orders]), "plans": rows})

    missing = {key: plan for _, plan in wanted if (key := json.dumps(plan_to_json(plan), sort_keys=True)) not in known}
    # Neighbours in this order begin alike, and what they have in common is run once.
    order = sorted(missing, key=lambda key: _signature(missing[key]))
    for first in range(0, len(order), save_every):
        keys = order[first : first + save_every]
        plans = [missing[key] for key in keys]
        losses = zip(measure_many(elastic, plans, calibration), measure_many(elastic, plans, test), strict=True)
        for key, plan, (on_calibration, on_test) in zip(keys, plans, losses, strict=True):
            row = {
                "plan": plan_to_json(plan),
                "chosen_as": chosen[key],
                "nll_calibration": on_calibration.mean,
                "nll_test": on_test.mean,
                "nll_test_decode": on_test.decode_mean,
                "tokens": {"calibration": on_calibration.tokens, "test": on_test.tokens},
            }
            rows.append(row)
        save()
        measured = first + len(keys)
        left = (time.perf_counter() - started) / measured * (len(missing) - measured)
        say(f"{len(rows)} plans measured, about {left / 60:.1f} min left")
    save()
    say(f"{len(rows)} plans in {path}")


def _signature(plan: Plan) -> list[tuple[int, ...]]:
    """Return a sort key that compares plans layer by layer."""
    keep = [(k.first_tokens or 0, k.last_tokens or 0) for k in plan.kv_keep]
    masks = (plan.prefill.mha, plan.decode.mha, plan.prefill.ffn, plan.decode.ffn)
    return [(*map(int, layer), bits, *kv) for *layer, bits, kv in zip(*masks, plan.weight_bits, keep, strict=True)]
