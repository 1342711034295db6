"""Splitwise's measured decode steps of Llama-2-70B, next to the least time that the bytes counted here allow.

The measurements are end to end, of a model that no calibration here covers. What they can check is the memory model: no
decode step may be faster than its weights and KV at the bandwidth of the data sheet, and where weights dominate, the
ratio of two devices is that of their bandwidths.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from sim.config import build_option
from sim.cost import memory
from sim.cost.model_spec import ModelSpec, load_model
from sim.cost.plan import dense_plan, keep_all
from sim.errors import CalibrationError

DATA = "calibration/splitwise-sim/perf_model.csv.gz"
GPUS = {"a100-80gb": "a100_80gb", "h100-80gb": "h100_80gb"}
PROMPT_TOKENS, DEGREES, BATCHES = 512, (2, 4, 8), (1, 8)


def llama2_70b() -> ModelSpec:
    """Return the shape of Llama-2-70B."""
    return replace(
        load_model("llama2_7b"),
        name="llama2_70b",
        num_layers=80,
        hidden_size=8192,
        intermediate_size=28672,
        num_heads=64,
        num_kv_heads=8,
    )


def row(path: Path) -> dict[str, Any]:
    """Return measured and least milliseconds of a decode step.

    Raises:
        CalibrationError: if the file is missing or lacks a column.
    """
    if not path.is_file():
        raise CalibrationError(f"no {path}; set RAP_LAB_DATA to the folder that holds {DATA}")
    table = pd.read_csv(path)
    wanted = ("model", "hardware", "prompt_size", "batch_size", "token_time", "tensor_parallel")
    if missing := [name for name in wanted if name not in table]:
        raise CalibrationError(f"{path} has no column {missing[0]}; it has {', '.join(table.columns)}")
    model = llama2_70b()
    weights, token = memory.weight_bytes(model, dense_plan(model)), memory.kv_bytes_per_token(model, keep_all(model))
    rows = []
    for degree in DEGREES:
        for batch in BATCHES:
            cells: dict[str, Any] = {"GPUs": degree, "batch": batch}
            for name, gpu in GPUS.items():
                found = table[
                    (table["model"] == "llama2-70b")
                    & (table["hardware"] == name)
                    & (table["tensor_parallel"] == degree)
                    & (table["batch_size"] == batch)
                    & (table["prompt_size"] == PROMPT_TOKENS)
                ]
                least = (weights + batch * PROMPT_TOKENS * token) / degree
                least_ms = 1e3 * least / build_option("gpu", gpu).memory_bandwidth_bytes_per_s
                short = name.split("-")[0].upper()
                cells[f"{short}, measured, ms"] = float(found["token_time"].mean())
                cells[f"{short}, least, ms"] = least_ms
            cells["H100 / A100, measured"] = cells["H100, measured, ms"] / cells["A100, measured, ms"]
            cells["least"] = cells["H100, least, ms"] / cells["A100, least, ms"]
            rows.append(cells)
    return {"rows": rows}
