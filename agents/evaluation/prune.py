"""Evaluates policies of ``PruneToBudget`` on the same loads: the blocks each drops, the loss, and the decision latency.

Policies decide on losses of the calibration text, and results are reported on losses of the test text. Only ``oracle``
decides on the test text: it is an upper bound under the surrogate, not a policy.
"""

from __future__ import annotations

import math
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
from sim.cost.quality import BEST_FORM, Text
from sim.policies.observation.prune import block_names, mask_of

SCENARIO = ["batch", "sequence_tokens", "budget_share"]


def evaluate_prune(
    model_name: str, policies: Mapping[str, Sequence[Decide]], scenarios: Sequence[PruneLoad]
) -> pd.DataFrame:
    """Return one row for each policy, seed and load: the dropped blocks, decision_s in seconds, and ``with_losses``."""
    model = load_model(model_name)
    names = block_names(model.num_layers)
    rows: list[dict[str, Any]] = []
    for policy, seeds in policies.items():
        for seed, decide in enumerate(seeds):
            decide(scenarios[0])  # the first call is slower: it compiles or fills caches
            for load in scenarios:
                started_s = time.perf_counter()
                removed = decide(load)
                decision_s = time.perf_counter() - started_s
                peak = peak_bytes(model, mask_of(removed), load.batch, load.sequence_tokens)
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
    return with_losses(model_name, pd.DataFrame(rows))


LOSSES: tuple[tuple[str, Text, str], ...] = (
    ("calibration", "calibration", BEST_FORM),
    ("test", "test", BEST_FORM),
    ("test_neighbours", "test", "warped_neighbours"),
)
"""Suffix of a column, the text of its losses, the form of their fit; the last also fits neighboring blocks."""


def with_losses(model_name: str, frame: pd.DataFrame) -> pd.DataFrame:
    """Return a table of plans with their losses under the present quality, in nats per token, and their utilities.

    Args:
        model_name: a model with a measured table in conf/quality.
        frame: one row per plan; ``dropped`` names its blocks, ``fits`` says whether it fits its budget.
    Returns:
        The table with the columns loss_* and utility_* (``LOSSES``), and ``in_range``: whether the fit to the test text
        holds for the plan. If not, loss_test is an upper bound and utility_test a lower one.
    """
    place = {name: at for at, name in enumerate(block_names(load_model(model_name).num_layers))}
    removed = np.zeros((len(frame), len(place)), dtype=np.bool_)
    for row, dropped in zip(removed, frame["dropped"], strict=True):
        row[[place[name] for name in dropped.split()]] = True
    frame = frame.copy()
    for column, text, form in LOSSES:
        quality = quality_on(model_name, text, form)
        loss = np.maximum(mask_losses(quality, removed), 0.0)
        frame[f"loss_{column}"] = loss
        frame[f"utility_{column}"] = np.where(frame["fits"], np.exp(-loss), 0.0)
        if column == "test":
            frame["in_range"] = loss <= (math.inf if quality.range is None else quality.range.loss)
    return frame


def grid(frame: pd.DataFrame, policy: str, column: str) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return a column of one policy, float64[seeds, loads], with the loads in the same order for every policy."""
    part = frame[frame["policy"] == policy]
    table = part.pivot_table(index="seed", columns=SCENARIO, values=column, sort=True)
    return table.to_numpy(dtype=np.float64)
