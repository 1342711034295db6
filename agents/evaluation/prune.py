"""Every policy of ``PruneToBudget`` on the same loads: which blocks each drops, what that loses, how long it thought.

All policies decide on losses of the calibration text; what they lose is reported on the test text. ``oracle`` alone
decides on the losses of the test text: an upper bound under the surrogate, not a policy.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from agents.envs.prune_loads import Draw, prune_draws
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

Decide = Callable[[Draw], Bools]
"""Which blocks [b] to drop for a load."""

SCENARIO = ["batch", "sequence_tokens", "budget_share"]
RANDOM_ORDERS = 20
STATIC_TRAIN_DRAWS = 2000


def stop_at_budget(model: ModelSpec, order: Sequence[int], draw: Draw) -> Bools:
    """Return which blocks [b] go when blocks go in this order until the load fits."""
    load = loads(model, [draw.batch], [draw.sequence_tokens], [draw.budget_bytes(model)])
    peak, budget_bytes = int(load.dense_bytes[0]), int(load.budget_bytes[0])
    freed = (int(load.mha_bytes[0]), int(load.ffn_bytes[0]))
    removed = np.zeros(2 * model.num_layers, dtype=np.bool_)
    for block in order:
        if peak <= budget_bytes:
            break
        removed[block] = True
        peak -= freed[block % 2]
    return removed


def read_order(model: ModelSpec, kind: str) -> list[int]:
    """Return an order of blocks that ``hw.score`` measured; an order of layers drops both blocks of each."""
    path = CONF_DIR / "score" / f"{model.name}_{kind}.json"
    if not path.exists():
        raise ConfigError(f"no {path.name} in conf/score; measure it: python -m hw.score kind={kind.split('_w')[0]}")
    order = json.loads(path.read_text(encoding="utf-8"))["order"]
    names = {name: i for i, name in enumerate(block_names(model.num_layers))}
    if isinstance(order[0], int):
        found = [2 * layer + kind_ for layer in order for kind_ in (0, 1)]
    else:
        found = [names[name] for name in order]
    if sorted(found) != list(range(len(names))):
        raise ConfigError(
            f"{path.name} orders {len(found)} of {len(names)} blocks; let its measurement finish: "
            f"python -m hw.score kind={kind.split('_w')[0]}"
        )
    return found


def needed_bytes(model: ModelSpec, draw: Draw) -> int:
    """Return the bytes that have to go."""
    dense = peak_bytes(model, keep_all(model), draw.batch, draw.sequence_tokens)
    return max(0, dense - draw.budget_bytes(model))


def freed_bytes(model: ModelSpec, draw: Draw) -> tuple[int, int]:
    """Return what one MHA and one FFN block free at this load."""
    kv = draw.batch * draw.sequence_tokens * model.kv_bytes_per_token_layer
    return mha_weight_bytes(model) + kv, ffn_weight_bytes(model)


def solver(model: ModelSpec, costs: np.ndarray[Any, np.dtype[np.float64]]) -> Decide:
    """Return the knapsack over these costs [b]."""
    by_cost = sorted_costs(costs)

    def decide(draw: Draw) -> Bools:
        return removed_blocks(cheapest_mask(by_cost, needed_bytes(model, draw), *freed_bytes(model, draw)))

    return decide


def by_ratio(model: ModelSpec, costs: np.ndarray[Any, np.dtype[np.float64]]) -> Decide:
    """Return greedy by cost a byte freed at the present load: the simple rule that knows the load."""

    def decide(draw: Draw) -> Bools:
        freed = np.tile(np.array(freed_bytes(model, draw), dtype=np.float64), model.num_layers)
        return stop_at_budget(model, np.argsort(costs / freed, kind="stable").tolist(), draw)

    return decide


def best_static(model: ModelSpec, solve: Decide, seed: int = 0) -> Bools:
    """Return the one mask with the highest mean utility on training draws, among the solutions of 200 others."""
    rng = np.random.default_rng(seed)
    draws = [prune_draws().sample(rng, "train") for _ in range(STATIC_TRAIN_DRAWS)]
    candidates = np.unique(np.stack([solve(draw) for draw in draws[:200]]), axis=0)
    kept = np.exp(-mask_losses(quality_on(model.name, "calibration"), candidates))
    mha, ffn = candidates[:, 0::2].sum(axis=1), candidates[:, 1::2].sum(axis=1)
    fits = np.stack(
        [
            mha * freed[0] + ffn * freed[1] >= needed_bytes(model, draw)
            for draw in draws
            for freed in (freed_bytes(model, draw),)
        ]
    )
    best: Bools = candidates[int((kept * fits.mean(axis=0)).argmax())]
    return best


def baselines(model: ModelSpec) -> dict[str, list[Decide]]:
    """Return every baseline; several entries are seeds."""
    quality = quality_on(model.name, "calibration")
    blocks = 2 * model.num_layers
    single = single_losses(quality)
    solve = solver(model, quality.blocks)
    static = best_static(model, solve)
    mha_first = sorted(range(blocks), key=lambda block: (block % 2, single[block]))
    ffn_first = sorted(range(blocks), key=lambda block: (1 - block % 2, single[block]))

    def ordered(order: Sequence[int]) -> Decide:
        return lambda draw: stop_at_budget(model, order, draw)

    found: dict[str, list[Decide]] = {
        "dense": [lambda draw: np.zeros(blocks, dtype=np.bool_)],
        "static": [lambda draw: static],
        "random": [ordered(np.random.default_rng(s).permutation(blocks).tolist()) for s in range(RANDOM_ORDERS)],
        "ffn_only": [ordered(ffn_first)],
        "mha_only": [ordered(mha_first)],
    }
    for kind in ("one_shot", "cosine", "lis_w4", "gsi"):
        found["greedy_stop" if kind == "gsi" else kind] = [ordered(read_order(model, kind))]
    found["ratio"] = [by_ratio(model, quality.blocks)]
    found["knapsack"] = [solve]
    found["oracle"] = [solver(model, quality_on(model.name, "test").blocks)]
    return found


def learned(model: ModelSpec, paths: Sequence[Path]) -> list[Decide]:
    """Return one policy a file."""

    def one(path: Path) -> Decide:
        prune = prune_network(model, path)
        return lambda draw: prune.removed_for(draw.batch, draw.sequence_tokens, draw.budget_bytes(model))

    return [one(path) for path in paths]


def contest(model_name: str, policies: Mapping[str, Sequence[Decide]], draws: Sequence[Draw]) -> pd.DataFrame:
    """Return one row a policy, seed and load."""
    model = load_model(model_name)
    names = block_names(model.num_layers)
    rows: list[dict[str, Any]] = []
    masks = []
    for policy, seeds in policies.items():
        for seed, decide in enumerate(seeds):
            decide(draws[0])  # the first call warms up
            for draw in draws:
                begun_s = time.perf_counter()
                removed = decide(draw)
                decision_s = time.perf_counter() - begun_s
                peak = peak_bytes(model, mask_of(removed), draw.batch, draw.sequence_tokens)
                masks.append(removed)
                rows.append(
                    {
                        "policy": policy,
                        "seed": seed,
                        "batch": draw.batch,
                        "sequence_tokens": draw.sequence_tokens,
                        "budget_share": draw.budget_share,
                        "fits": peak <= draw.budget_bytes(model),
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
    """Return a column of one policy as [seeds, scenarios], scenarios in the same order for every policy."""
    part = frame[frame["policy"] == policy]
    table = part.pivot_table(index="seed", columns=SCENARIO, values=column, sort=True)
    return table.to_numpy(dtype=np.float64)
