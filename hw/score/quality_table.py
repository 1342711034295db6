"""Measures the quality table: the NLL of several hundred plans on calibration text and on test text."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from hw.elastic.model import ElasticModel
from hw.elastic.text import differing
from hw.score.block_numbers import block_number, plan_without, staged_plan
from hw.score.nll import measure_many
from hw.score.score_lists import read_list
from sim.cost.model_spec import ModelSpec
from sim.cost.plan import KVKeep, Plan, dense_plan
from sim.cost.plan_json import plan_to_json
from sim.errors import ConfigError
from sim.json_file import read_json_object
from sim.progress import progress
from sim.results.run_folder import commit, write_json

DEEPEST_PREFIX = 40
LAYERS_SWAPPED = (1, 2, 4, 8, 12, 16, 24, 30)
RANDOM_MASKS = 150
MIXTURES = 36
STAGED = 24
SPREAD_MASKS = 24
STAGED_PREFIXES = (2, 4, 6, 8, 12, 16)
KV_ALONE = KVKeep(first_tokens=4, last_tokens=32)
KV_SUBSETS = 12
KV_RUNS = ((4, 16), (4, 32), (4, 64), (0, 32), (16, 16))

Named = Iterator[tuple[str, Plan]]
"""Plans, each with how it was chosen."""


def table_plans(
    spec: ModelSpec,
    orders: Mapping[str, Sequence[int]],
    layer_orders: Mapping[str, Sequence[int]],
    seed: int,
    searches: Sequence[tuple[Sequence[int], Sequence[int]]] = (),
) -> Named:
    """Yield the plans to measure, each with how it was chosen; equal arguments give equal plans.

    Args:
        spec: the model.
        orders: name -> order in which blocks are removed; ``one_shot`` also says which blocks random masks spare.
        layer_orders: name -> order in which layers change precision or lose KV.
        seed: of random plans.
        searches: blocks that PDTrim's searches remove in prefill and in decode, one pair per search.
    """
    blocks = 2 * spec.num_layers
    # A few blocks ruin the model on their own. Without them, random masks stay in the range in which a policy moves.
    harmless = list(orders.get("one_shot", range(blocks)))[: max(1, blocks * 3 // 4)]
    choose = _Choice(spec, harmless)
    rng = np.random.default_rng(seed)
    yield "dense", dense_plan(spec)
    for block in range(blocks):
        yield "single removal", plan_without(spec, [block])
    if "gsi" in orders:
        yield from choose.prefixes("gsi", orders["gsi"])
    yield from choose.precision_prefixes(layer_orders)
    yield from choose.random_masks(rng)
    yield from choose.mixtures(rng)
    yield from choose.staged_masks(rng)
    yield from choose.kv_prefixes(layer_orders.get("attention", range(spec.num_layers)))
    for name in sorted(orders.keys() - {"gsi"}):
        yield from choose.prefixes(name, orders[name])
    # These came later. A generator of their own keeps the plans above as they were in tables that exist already.
    rng = np.random.default_rng([seed, 1])
    yield from choose.spread_masks(rng)
    yield from choose.staged_prefixes(orders.get("gsi", ()))
    for layer in range(spec.num_layers):
        yield "single layer of cut KV", choose.with_kv(KV_ALONE, {layer})
    yield from choose.kv_subsets(rng)
    for in_prefill, in_decode in searches:
        yield "PDTrim search", staged_plan(spec, prefill=in_prefill, decode=in_decode)


@dataclass(frozen=True, slots=True)
class _Choice:
    """Ways to choose plans of a model. harmless: the blocks that random plans may remove."""

    spec: ModelSpec
    harmless: Sequence[int]

    def prefixes(self, name: str, order: Sequence[int]) -> Named:
        """Yield a plan for each number of removals of an order."""
        for count in range(1, min(DEEPEST_PREFIX, len(order)) + 1):
            yield f"prefix of {name}", plan_without(self.spec, order[:count])

    def precision_prefixes(self, layer_orders: Mapping[str, Sequence[int]]) -> Named:
        """Yield plans with the first layers of an order at 4 or 8 bits."""
        layers = self.spec.num_layers
        swaps = {"front_to_back": range(layers), **{k: v for k, v in layer_orders.items() if k.startswith("lis")}}
        for bits in (4, 8):
            for name, order in swaps.items():
                if name in ("front_to_back", f"lis_w{bits}"):
                    for count in (c for c in LAYERS_SWAPPED if c <= layers):
                        yield f"W{bits} prefix of {name}", _swap(dense_plan(self.spec), order[:count], bits)

    def random_masks(self, rng: np.random.Generator) -> Named:
        """Yield masks without a few random blocks; every fifth may remove any block."""
        for index in range(RANDOM_MASKS):
            pool = list(range(2 * self.spec.num_layers)) if index % 5 == 0 else self.harmless
            count = 1 + int(rng.integers(0, max(1, len(pool) // 4))) if index % 2 else 1 + int(rng.integers(0, 8))
            yield "random mask", plan_without(self.spec, _some(rng, pool, count))

    def mixtures(self, rng: np.random.Generator) -> Named:
        """Yield random masks with random layers at 4 or 8 bits."""
        layers = self.spec.num_layers
        for index in range(MIXTURES):
            # The permutation comes before the count: the order of random numbers decides which plans a seed gives.
            order = rng.permutation(len(self.harmless))
            removed = [self.harmless[i] for i in order[: int(rng.integers(1, 9))]]
            order = rng.permutation(layers)
            swapped = [int(i) for i in order[: int(rng.integers(1, layers + 1))]]
            yield (
                "mixture of pruning and precision",
                _swap(plan_without(self.spec, removed), swapped, 4 if index % 2 else 8),
            )

    def staged_masks(self, rng: np.random.Generator) -> Named:
        """Yield random masks of decode; prefill drops a part of the same blocks, or none."""
        for index in range(STAGED):
            order = rng.permutation(len(self.harmless))
            decode = [self.harmless[i] for i in order[: int(rng.integers(1, 11))]]
            prefill = decode[: 0 if index % 2 else int(rng.integers(0, len(decode) + 1))]
            kind = "decode mask alone" if not prefill else "nested masks"
            yield kind, staged_plan(self.spec, prefill=prefill, decode=decode)

    def kv_prefixes(self, order: Sequence[int]) -> Named:
        """Yield plans that cut the KV of a quarter, half or all of the layers, in an order."""
        for first, last in KV_RUNS:
            for share in (4, 2, 1):
                chosen = set(order[: max(1, self.spec.num_layers // share)])
                yield "kv_keep", self.with_kv(KVKeep(first_tokens=first, last_tokens=last), chosen)

    def spread_masks(self, rng: np.random.Generator) -> Named:
        """Yield random masks over a wider range of sizes; every fourth is deep."""
        for index in range(SPREAD_MASKS):
            low, high = (2, 12) if index % 4 else (13, DEEPEST_PREFIX)
            count = min(int(rng.integers(low, high + 1)), len(self.harmless))
            yield "random mask", plan_without(self.spec, _some(rng, self.harmless, count))

    def staged_prefixes(self, order: Sequence[int]) -> Named:
        """Yield prefixes of an order for decode alone, nested in both stages, and with all layers at 4 or 8 bits."""
        for count in (count for count in STAGED_PREFIXES if count <= len(order)):
            yield "decode mask alone", staged_plan(self.spec, prefill=(), decode=order[:count])
            yield "nested masks", staged_plan(self.spec, prefill=order[: count // 2], decode=order[:count])
            for bits in (4, 8):
                plan = _swap(plan_without(self.spec, order[:count]), range(self.spec.num_layers), bits)
                yield "mixture of pruning and precision", plan

    def kv_subsets(self, rng: np.random.Generator) -> Named:
        """Yield plans that cut the KV of random layers; all keep the first four tokens."""
        layers = self.spec.num_layers
        for _ in range(KV_SUBSETS):
            first, last = KV_RUNS[int(rng.integers(3))]
            order = rng.permutation(layers)
            chosen = {int(i) for i in order[: int(rng.integers(2, max(3, 1 + layers // 2)))]}
            yield "kv_keep", self.with_kv(KVKeep(first_tokens=first, last_tokens=last), chosen)

    def with_kv(self, keep: KVKeep, layers: Collection[int]) -> Plan:
        """Return the dense plan with the KV of some layers cut."""
        kv_keep = tuple(keep if i in layers else KVKeep() for i in range(self.spec.num_layers))
        return replace(dense_plan(self.spec), kv_keep=kv_keep)


def _some(rng: np.random.Generator, pool: Sequence[int], count: int) -> list[int]:
    """Return ``count`` random blocks of a pool."""
    return [pool[i] for i in rng.permutation(len(pool))[:count]]


def _swap(plan: Plan, layers: Sequence[int], bits: int) -> Plan:
    """Return a plan with some layers at ``bits`` and all others at 16."""
    chosen = set(layers)
    return replace(plan, weight_bits=tuple(bits if i in chosen else 16 for i in range(len(plan.weight_bits))))


def read_orders(folder: Path, model: str) -> tuple[dict[str, list[int]], dict[str, list[int]]]:
    """Return the orders of blocks and the orders of layers in conf/score for a model, by name."""
    orders, layer_orders = {}, {}
    for name in ("gsi", "one_shot", "cosine", "pdtrim"):
        if (path := folder / f"{model}_{name}.json").is_file():
            orders[name] = [block_number(str(b)) for b in read_list(path, "order")]
    for name in ("lis_w4", "lis_w8", "attention"):
        if (path := folder / f"{model}_{name}.json").is_file():
            layer_orders[name] = [int(i) for i in read_list(path, "order")]
    return orders, layer_orders


def read_searches(folder: Path, model: str) -> list[tuple[list[int], list[int]]]:
    """Return the blocks that PDTrim's searches in conf/score remove, a pair (prefill, decode) a search."""
    path = folder / f"{model}_pdtrim.json"
    found = read_list(path, "searches") if path.is_file() else []
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
    """Measure every plan of ``table_plans`` and write the table; continue an earlier run on the same text.

    Args:
        elastic: with all blocks at full precision.
        calibration, test: token ids [n, t] of the two texts.
        path: the table to write.
        described: model, weights and text; stored in the table, and compared with an earlier one.
        scores: folder of the orders.
        seed: of ``table_plans``.
        say: prints a line of progress.
        save_every: how many plans to measure between two writes.
    Raises:
        ConfigError: if the file holds a table of another model or text.
    """
    rows: list[dict[str, Any]] = []
    if path.is_file():
        rows, unstated = _earlier_rows(path, described)
        if unstated:
            say(f"note: {path} states no hash of its token ids; the loss of its dense plan is measured again")
            _check_dense(path, rows, elastic, calibration, test)
    known = {_key(row["plan"]): row for row in rows}
    orders, layer_orders = read_orders(scores, elastic.spec.name)
    wanted = list(table_plans(elastic.spec, orders, layer_orders, seed, read_searches(scores, elastic.spec.name)))
    chosen: dict[str, list[str]] = {}
    for kind, plan in wanted:
        kinds = chosen.setdefault(_key(plan_to_json(plan)), [])
        if kind not in kinds:
            kinds.append(kind)
    for key, row in known.items():
        # Orders change when scores are measured again. Losses measured for an old order are still valid.
        row["chosen_as"] = chosen.get(key, ["earlier choice"])

    def save() -> None:
        write_json(path, {**described, "commit": commit(), "orders": sorted([*orders, *layer_orders]), "plans": rows})

    missing = {key: plan for _, plan in wanted if (key := _key(plan_to_json(plan))) not in known}
    # Neighbors in this order share their first layers, which then run once.
    order = sorted(missing, key=lambda key: _signature(missing[key]))
    with progress("measuring", len(order), "plans") as report:
        for first in range(0, len(order), save_every):
            keys = order[first : first + save_every]
            rows += _measured_rows(elastic, {key: missing[key] for key in keys}, chosen, calibration, test)
            save()
            report(first + len(keys))
    save()
    say(f"{len(rows)} plans in {path}")


def _earlier_rows(path: Path, described: Mapping[str, Any]) -> tuple[list[dict[str, Any]], bool]:
    """Return the rows of an unfinished or older table of the same model and text, and whether it lacks token hashes."""
    old = read_json_object(path, ConfigError, "remove it, or set out=")
    different, unstated = differing(described, old)
    if different:
        raise ConfigError(f"{path} holds another table: {', '.join(different)} differ; remove it, or set out=")
    rows = old.get("plans")
    if not isinstance(rows, list) or not all(isinstance(row, dict) and "plan" in row for row in rows):
        raise ConfigError(f"{path} holds no rows of plans; remove it, or set out=")
    return rows, unstated


SAME_NLL = 0.01
"""Nats per token that the dense plan's loss may differ between processors; other tokens differ by more."""


def _check_dense(
    path: Path, rows: Sequence[Mapping[str, Any]], elastic: ElasticModel, calibration: Tensor, test: Tensor
) -> None:
    """Check that an old table was measured on these tokens, by the loss of its dense plan.

    Raises:
        ConfigError: if the loss is another one; rows of different tokens are never mixed.
    """
    key = _key(plan_to_json(dense_plan(elastic.spec)))
    for row in (row for row in rows if _key(row["plan"]) == key):
        for name, tokens in (("nll_calibration", calibration), ("nll_test", test)):
            now = measure_many(elastic, [dense_plan(elastic.spec)], tokens)[0].mean
            if not abs(now - float(row[name])) <= SAME_NLL:
                raise ConfigError(
                    f"{path} was measured on other tokens: {name} of its dense plan is {row[name]:.4f} there and "
                    f"{now:.4f} here; remove it, or set out="
                )


def _measured_rows(
    elastic: ElasticModel,
    plans: Mapping[str, Plan],
    chosen: Mapping[str, list[str]],
    calibration: Tensor,
    test: Tensor,
) -> Iterator[dict[str, Any]]:
    """Yield the measured rows of plans by key."""
    calibration_losses = measure_many(elastic, list(plans.values()), calibration)
    test_losses = measure_many(elastic, list(plans.values()), test)
    for (key, plan), on_calibration, on_test in zip(plans.items(), calibration_losses, test_losses, strict=True):
        yield {
            "plan": plan_to_json(plan),
            "chosen_as": chosen[key],
            "nll_calibration": on_calibration.mean,
            "nll_test": on_test.mean,
            "nll_test_decode": on_test.decode_mean,
            "tokens": {"calibration": on_calibration.tokens, "test": on_test.tokens},
        }


def _key(plan: Mapping[str, Any]) -> str:
    return json.dumps(plan, sort_keys=True)


def _signature(plan: Plan) -> list[tuple[int, ...]]:
    """Return a sort key that compares plans layer by layer."""
    keep = [(k.first_tokens or 0, k.last_tokens or 0) for k in plan.kv_keep]
    masks = (plan.prefill.mha, plan.decode.mha, plan.prefill.ffn, plan.decode.ffn)
    return [(*map(int, layer), bits, *kv) for *layer, bits, kv in zip(*masks, plan.weight_bits, keep, strict=True)]
