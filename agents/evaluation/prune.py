"""Evaluates policies of ``PruneToBudget`` on the same loads: the blocks each drops, the loss, and the decision latency.

Policies decide on losses of the calibration text, and results are reported on losses of the test text. Only ``oracle``
decides on the test text: it is an upper bound under the surrogate, not a policy.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from agents.envs.prune_loads import PruneLoad, prune_loads
from agents.envs.surrogate import mask_losses, quality_on, single_losses
from sim.config import CONF_DIR
from sim.cost.memory import ffn_weight_bytes, mha_weight_bytes, peak_bytes
from sim.cost.model_spec import ModelSpec, load_model
from sim.cost.plan import keep_all
from sim.errors import ConfigError
from sim.policies.knapsack import cheapest_mask, sorted_costs
from sim.policies.learned import prune_network
from sim.policies.observation.prune import block_names, loads, mask_of, removed_blocks
from sim.types import Bools

Decide = Callable[[PruneLoad], Bools]
"""Returns the blocks to drop for a load, bool[b]."""

SCENARIO = ["batch", "sequence_tokens", "budget_share"]
RANDOM_ORDERS = 20
STATIC_TRAIN_LOADS, STATIC_CANDIDATES = 2000, 200


# Shapes: b blocks in the order MHA0, FFN0, MHA1, ...


def stop_at_budget(model: ModelSpec, order: Sequence[int], load: PruneLoad) -> Bools:
    """Return the blocks to drop, bool[b], if blocks are dropped in this order until the load fits."""
    arrays = loads(model, [load.batch], [load.sequence_tokens], [load.budget_bytes(model)])
    peak, budget_bytes = int(arrays.dense_bytes[0]), int(arrays.budget_bytes[0])
    freed = (int(arrays.mha_bytes[0]), int(arrays.ffn_bytes[0]))
    removed = np.zeros(2 * model.num_layers, dtype=np.bool_)
    for block in order:
        if peak <= budget_bytes:
            break
        removed[block] = True
        peak -= freed[block % 2]
    return removed


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


def evaluate_prune(
    model_name: str, policies: Mapping[str, Sequence[Decide]], scenarios: Sequence[PruneLoad]
) -> pd.DataFrame:
    """Return one row for each policy, seed and load.

    Losses are in nats per token, decision_s in seconds. The suffix of a column names the text of the losses;
    test_neighbours also fits losses of neighboring blocks.
    """
    model = load_model(model_name)
    names = block_names(model.num_layers)
    rows: list[dict[str, Any]] = []
    masks = []
    for policy, seeds in policies.items():
        for seed, decide in enumerate(seeds):
            decide(scenarios[0])  # the first call is slower: it compiles or fills caches
            for load in scenarios:
                started_s = time.perf_counter()
                removed = decide(load)
                decision_s = time.perf_counter() - started_s
                peak = peak_bytes(model, mask_of(removed), load.batch, load.sequence_tokens)
                masks.append(removed)
                rows.append(
                    {
                        "policy": policy,
                        "seed": seed,
                        "batch": load.batch,
                        "sequence_tokens": load.sequence_tokens,
                        "budget_share": load.budget_share,
                        "fits": peak <= load.budget_bytes(model),
                        "dropped_mha": int(removed[0::2].sum()),
                        "dropped_ffn": int(removed[1::2].sum()),
                        "decision_s": decision_s,
                        "dropped": " ".join(name for name, gone in zip(names, removed.tolist(), strict=True) if gone),
                    }
                )
    frame = pd.DataFrame(rows)
    removed = np.stack(masks)
    for column, text, form in (
        ("calibration", "calibration", None),
        ("test", "test", None),
        ("test_neighbours", "test", "warped_neighbours"),
    ):
        quality = quality_on(model_name, text, form) if form else quality_on(model_name, text)
        loss = np.maximum(mask_losses(quality, removed), 0.0)
        frame[f"loss_{column}"] = loss
        frame[f"utility_{column}"] = np.where(frame["fits"], np.exp(-loss), 0.0)
    return frame


def grid(frame: pd.DataFrame, policy: str, column: str) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return a column of one policy, float64[seeds, loads], with the loads in the same order for every policy."""
    part = frame[frame["policy"] == policy]
    table = part.pivot_table(index="seed", columns=SCENARIO, values=column, sort=True)
    return table.to_numpy(dtype=np.float64)
