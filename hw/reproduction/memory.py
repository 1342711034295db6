"""Published byte counts next to this project's: RAP's peaks, MorphServe's KV blocks, DistServe's KV capacity."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from sim.cost import memory
from sim.cost.model_spec import ModelSpec, load_model
from sim.cost.plan import KeepMask, dense_plan, drop, keep_all
from sim.errors import CalibrationError
from sim.types import GIB

RAP_LOAD = (8, 2048)
"""Batch and sequence length of RAP's table."""
RAP_MASKS: dict[str, dict[str, list[int]]] = {
    "dense": {},
    "80 %": {"mha": [18, 19, 21, 23, 24, 25, 27, 28, 30], "ffn": [13, 22, 24, 27]},
    "60 %": {
        "mha": [8, 10, 12, 13, 14, 18, 19, 21, 22, 23, 24, 25, 27, 28, 30],
        "ffn": [7, 8, 9, 12, 13, 18, 20, 22, 24, 26, 27],
    },
}
RAP_PEAKS_GB = {"dense": (22.07, 23.70), "80 %": (17.36, 18.45), "60 %": (13.05, 13.61)}
"""Mask -> theoretical and measured peak (RTX 5090), GB (arXiv 2505.17138)."""
RAP_SHARES = {(2, 2048): 0.815, (8, 1024): 0.803, (8, 2048): 0.787, (8, 4096): 0.768}
"""Batch and sequence length -> share of the dense peak that the 80 % mask takes, derived from the published masks."""


def rap() -> dict[str, Any]:
    """Return RAP's peaks, and the share of one mask at several loads."""
    model = load_model("llama2_7b")
    masks: dict[str, KeepMask] = {name: drop(model, **blocks) for name, blocks in RAP_MASKS.items()}
    rows = []
    for name, (theoretical, measured) in RAP_PEAKS_GB.items():
        here = memory.peak_bytes(model, masks[name], *RAP_LOAD) / 1e9
        rows.append(
            {
                "mask": name,
                "peak, GB, published": theoretical,
                "here": here,
                "difference": here - theoretical,
                "measured on a GPU, published": measured,
                "above the peak": measured / here - 1,
            }
        )
    shares = []
    for (batch, tokens), published in RAP_SHARES.items():
        dense = memory.peak_bytes(model, keep_all(model), batch, tokens)
        here = memory.peak_bytes(model, masks["80 %"], batch, tokens) / dense
        shares.append({"batch": batch, "tokens": tokens, "share of dense": here, "expected": published})
    return {"rows": rows, "shares": shares}


def kv_blocks() -> dict[str, Any]:
    """Return MorphServe's KV blocks of two models on one device: both must leave the same bytes."""
    budgets = {}
    for name, blocks in (("llama2_7b", 958), ("llama3_8b", 2599)):
        model = load_model(name)
        budgets[name] = memory.budget_for_kv_blocks(model, dense_plan(model), blocks, 0, 16)
    llama3 = load_model("llama3_8b")
    left = budgets["llama2_7b"] - memory.weight_bytes(llama3, dense_plan(llama3))
    block = llama3.num_layers * memory.kv_block_layer_bytes(llama3, 16)
    return {"llama2_blocks": 958, "llama3_blocks": 2599, "llama3_blocks_here": left // block}


def _opt(name: str, layers: int, hidden: int, heads: int) -> ModelSpec:
    from dataclasses import replace

    return replace(
        load_model("opt_13b"),
        name=name,
        num_layers=layers,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_heads=heads,
        num_kv_heads=heads,
    )


DISTSERVE = "calibration/distserve/max_num_tokens.csv"
DISTSERVE_SHARE = 0.93
"""Usable share of 80 GiB, inferred from the table itself: its settings are not published."""


def distserve(path: Path) -> dict[str, Any]:
    """Return DistServe's KV capacity in tokens by model and parallelism, next to what the bytes allow.

    Raises:
        CalibrationError: if the file is missing.
    """
    if not path.is_file():
        raise CalibrationError(f"no {path}; set RAP_LAB_DATA to the folder that holds {DISTSERVE}")
    models = {
        "facebook/opt-13b": load_model("opt_13b"),
        "facebook/opt-66b": _opt("opt_66b", layers=64, hidden=9216, heads=72),
        "facebook/opt-175b": _opt("opt_175b", layers=96, hidden=12288, heads=96),
    }
    usable_bytes = round(DISTSERVE_SHARE * 80 * GIB)
    with path.open(encoding="utf-8", newline="") as file:
        table = list(csv.DictReader(file))
    rows = []
    for name, model in models.items():
        found = [row for row in table if row["model"] == name]
        errors = []
        for row in found:
            gpus, published = int(row["tp"]) * int(row["pp"]), int(row["max_num_tokens"])
            blocks_bytes = model.num_layers * memory.layer_weight_bytes(model)
            left_bytes = gpus * (usable_bytes - memory.fixed_weight_bytes(model)) - blocks_bytes
            here = left_bytes // memory.kv_bytes_per_token(model, keep_all(model))
            errors.append((abs(here / published - 1), published, here, gpus))
        worst = max(errors)
        rows.append(
            {
                "model": name.removeprefix("facebook/"),
                "rows": len(found),
                "largest error": worst[0],
                "GPUs there": worst[3],
                "tokens, published": worst[1],
                "here": worst[2],
            }
        )
    return {"rows": rows, "share": DISTSERVE_SHARE}
