"""Evaluates policies of ``PruneToBudget`` on the same loads: the blocks each drops, the loss, and the decision latency.

Policies decide on losses of the calibration text, and results are reported on losses of the test text. Only ``oracle``
decides on the test text: it is an upper bound under the surrogate, not a policy.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from agents.baselines.prune import Decide
from agents.envs.prune_loads import PruneLoad
from agents.envs.surrogate import mask_losses, quality_on
from sim.cost.memory import peak_bytes
from sim.cost.model_spec import load_model
from sim.policies.observation.prune import block_names, mask_of
from sim.progress import progress

SCENARIO = ["batch", "sequence_tokens", "budget_share"]


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
    players = [(policy, seed, decide) for policy, seeds in policies.items() for seed, decide in enumerate(seeds)]
    with progress("pruning", len(players) * len(scenarios), "loads") as report:
        for policy, seed, decide in players:
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
                report(len(rows))
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
