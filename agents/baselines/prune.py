"""Baselines of ``PruneToBudget``: orders, ratios, static masks and the exact knapsack.

Policies decide on losses of the calibration text. Only ``oracle`` decides on the test text: it is an upper bound under
the surrogate, not a policy.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from agents.envs.prune_loads import PruneLoad, prune_loads
from agents.envs.surrogate import mask_losses, quality_on, single_losses
from sim.config import CONF_DIR
from sim.cost.memory import ffn_weight_bytes, mha_weight_bytes, peak_bytes
from sim.cost.model_spec import ModelSpec
from sim.cost.plan import keep_all
from sim.errors import ConfigError
from sim.policies.knapsack import cheapest_mask, sorted_costs
from sim.policies.learned import prune_network
from sim.policies.observation.prune import block_names, loads, removed_blocks
from sim.policies.prune_guard import first_that_fit
from sim.types import Bools

Decide = Callable[[PruneLoad], Bools]
"""Returns the blocks to drop for a load, bool[b]."""


RANDOM_ORDERS = 20


STATIC_TRAIN_LOADS, STATIC_CANDIDATES = 2000, 200


def stop_at_budget(model: ModelSpec, order: Sequence[int], load: PruneLoad) -> Bools:
    """Return the blocks to drop, bool[b], if blocks are dropped in this order until the load fits."""
    arrays = loads(model, [load.batch], [load.sequence_tokens], [load.budget_bytes(model)])
    freed = (int(arrays.mha_bytes[0]), int(arrays.ffn_bytes[0]))
    return first_that_fit(order, int(arrays.dense_bytes[0]), int(arrays.budget_bytes[0]), freed, 2 * model.num_layers)


def read_order(model: ModelSpec, kind: str) -> list[int]:
    """Return a block order measured by ``hw.score``; an order of layers becomes both blocks of each layer.

    Raises:
        ConfigError: if conf/score has no such order, or an unfinished one.
    """
    path = CONF_DIR / "score" / f"{model.name}_{kind}.json"
    if not path.exists():
        raise ConfigError(f"conf/score has no {path.name}; measure it: python -m hw.score kind={kind.split('_w')[0]}")
    order = json.loads(path.read_text(encoding="utf-8"))["order"]
    names = {name: i for i, name in enumerate(block_names(model.num_layers))}
    if isinstance(order[0], int):
        blocks = [2 * layer + half for layer in order for half in (0, 1)]
    else:
        blocks = [names[name] for name in order]
    if sorted(blocks) != list(range(len(names))):
        raise ConfigError(
            f"{path.name} orders {len(blocks)} of {len(names)} blocks; let its measurement finish: "
            f"python -m hw.score kind={kind.split('_w')[0]}"
        )
    return blocks


def needed_bytes(model: ModelSpec, load: PruneLoad) -> int:
    """Return the bytes that dropping blocks must free at this load."""
    dense = peak_bytes(model, keep_all(model), load.batch, load.sequence_tokens)
    return max(0, dense - load.budget_bytes(model))


def freed_bytes(model: ModelSpec, load: PruneLoad) -> tuple[int, int]:
    """Return the bytes that dropping one MHA block and one FFN block frees at this load."""
    kv = load.batch * load.sequence_tokens * model.kv_bytes_per_token_layer
    return mha_weight_bytes(model) + kv, ffn_weight_bytes(model)


def solver(model: ModelSpec, costs: np.ndarray[Any, np.dtype[np.float64]]) -> Decide:
    """Return the exact knapsack solver for these block costs, float64[b] in nats per token."""
    by_cost = sorted_costs(costs)

    def decide(load: PruneLoad) -> Bools:
        return removed_blocks(cheapest_mask(by_cost, needed_bytes(model, load), *freed_bytes(model, load)))

    return decide


def by_ratio(model: ModelSpec, costs: np.ndarray[Any, np.dtype[np.float64]]) -> Decide:
    """Return the greedy rule that drops blocks by cost per byte freed at the load, until the load fits."""

    def decide(load: PruneLoad) -> Bools:
        freed = np.tile(np.array(freed_bytes(model, load), dtype=np.float64), model.num_layers)
        return stop_at_budget(model, np.argsort(costs / freed, kind="stable").tolist(), load)

    return decide


def best_static(model: ModelSpec, solve: Decide, seed: int = 0) -> Bools:
    """Return the one set of blocks, bool[b], with the highest mean utility on training loads.

    The candidates are the solutions of the first ``STATIC_CANDIDATES`` loads.
    """
    rng = np.random.default_rng(seed)
    sampled = [prune_loads().sample(rng, "train") for _ in range(STATIC_TRAIN_LOADS)]
    candidates = np.unique(np.stack([solve(load) for load in sampled[:STATIC_CANDIDATES]]), axis=0)
    kept = np.exp(-mask_losses(quality_on(model.name, "calibration"), candidates))
    mha, ffn = candidates[:, 0::2].sum(axis=1), candidates[:, 1::2].sum(axis=1)
    fits = np.stack(
        [
            mha * freed[0] + ffn * freed[1] >= needed_bytes(model, load)
            for load in sampled
            for freed in (freed_bytes(model, load),)
        ]
    )
    best: Bools = candidates[int((kept * fits.mean(axis=0)).argmax())]
    return best


def baselines(model: ModelSpec) -> dict[str, list[Decide]]:
    """Return every baseline by name; a list of several holds one function for each seed."""
    quality = quality_on(model.name, "calibration")
    blocks = 2 * model.num_layers
    single = single_losses(quality)
    solve = solver(model, quality.blocks)
    static = best_static(model, solve)
    mha_first = sorted(range(blocks), key=lambda block: (block % 2, single[block]))
    ffn_first = sorted(range(blocks), key=lambda block: (1 - block % 2, single[block]))

    def ordered(order: Sequence[int]) -> Decide:
        return lambda load: stop_at_budget(model, order, load)

    policies: dict[str, list[Decide]] = {
        "dense": [lambda load: np.zeros(blocks, dtype=np.bool_)],
        "static": [lambda load: static],
        "random": [ordered(np.random.default_rng(s).permutation(blocks).tolist()) for s in range(RANDOM_ORDERS)],
        "ffn_only": [ordered(ffn_first)],
        "mha_only": [ordered(mha_first)],
    }
    for kind in ("one_shot", "cosine", "lis_w4", "gsi"):
        policies["greedy_stop" if kind == "gsi" else kind] = [ordered(read_order(model, kind))]
    policies["ratio"] = [by_ratio(model, quality.blocks)]
    policies["knapsack"] = [solve]
    policies["oracle"] = [solver(model, quality_on(model.name, "test").blocks)]
    return policies


def learned_prune_policies(model: ModelSpec, paths: Sequence[Path]) -> list[Decide]:
    """Return the exported policy of each file."""

    def read(path: Path) -> Decide:
        prune = prune_network(model, path)
        return lambda load: prune.removed_for(load.batch, load.sequence_tokens, load.budget_bytes(model))

    return [read(path) for path in paths]
