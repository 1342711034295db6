"""Splitwise's measurements of Llama-2-70B on 2, 4 and 8 GPUs, next to bounds and predictions.

No decode step may be faster than its weights and KV at the bandwidth of the data sheet, and where weights dominate, the
ratio of two devices is that of their bandwidths. Predictions come from the committed calibrations, with two numbers
fitted for each kind of server (``hw.reproduction.tensor_parallel``), and from the simulated engine for whole requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from hw.reproduction.tensor_parallel import Step, fitted, scaled
from sim.config import build_option
from sim.cost import memory
from sim.cost.gpu import Gpu
from sim.cost.model_spec import load_model
from sim.cost.plan import dense_plan, keep_all
from sim.engine.protocol import Request
from sim.engine.scheduler import Limits
from sim.engine.server_spec import ServerSpec
from sim.errors import CalibrationError

DATA = "calibration/splitwise-sim/perf_model.csv.gz"
GPUS = {"a100-80gb": "a100_80gb", "h100-80gb": "h100_80gb"}
PROMPT_TOKENS, DEGREES, BATCHES = 512, (2, 4, 8), (1, 8)
MODEL = "llama2_70b"
COLUMNS = ("model", "hardware", "prompt_size", "batch_size", "token_size", "prompt_time", "token_time", "e2e_time")
USABLE_SHARE = 0.9
"""Share of the device memory that vLLM uses by default."""
COMPLETE_SHARE = 0.9
"""An answer whose time is below this share of its stated tokens' ended early."""


def row(path: Path) -> dict[str, Any]:
    """Return measured, least and predicted times.

    Raises:
        CalibrationError: if the file is missing or lacks a column.
    """
    if not path.is_file():
        raise CalibrationError(f"no {path}; set RAP_LAB_DATA to the folder that holds {DATA}")
    table = pd.read_csv(path)
    if missing := [name for name in (*COLUMNS, "tensor_parallel") if name not in table]:
        raise CalibrationError(f"{path} has no column {missing[0]}; it has {', '.join(table.columns)}")
    table = table[table["model"] == "llama2-70b"]
    by = ["hardware", "tensor_parallel", "prompt_size", "batch_size", "token_size"]
    points = table.groupby(by, as_index=False)[["prompt_time", "token_time", "e2e_time"]].median()
    found = {GPUS[name]: points[points["hardware"] == name] for name in GPUS}
    return {
        "rows": _bounds(table),
        "predictions": {gpu.split("_")[0].upper(): _predictions(gpu, some) for gpu, some in found.items()},
    }


def _bounds(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Return measured and least milliseconds of a decode step."""
    model = load_model(MODEL)
    weights, token = memory.weight_bytes(model, dense_plan(model)), memory.kv_bytes_per_token(model, keep_all(model))
    rows = []
    for degree in DEGREES:
        for batch in BATCHES:
            cells: dict[str, Any] = {"GPUs": degree, "batch": batch}
            for name, gpu in GPUS.items():
                found = table[
                    (table["hardware"] == name)
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
    return rows


def _predictions(gpu: str, points: pd.DataFrame) -> dict[str, Any]:
    """Return the fit of one kind of server, the errors of its steps, and those of whole batches of requests."""
    servers = {degree: ServerSpec.from_names(model=MODEL, gpu=gpu, tp=degree) for degree in DEGREES}
    measured, points = len(points), points[_consistent(points)]
    steps = [step for one in points.itertuples() for step in _steps(one)]
    plan = dense_plan(load_model(MODEL))
    found = fitted({degree: server.priced() for degree, server in servers.items()}, plan, steps)
    whole = []
    for degree in DEGREES:
        latency = scaled(servers[degree].priced(), found["factor"], found["floor_ms"])
        some = points[points["tensor_parallel"] == degree]
        predicted = np.array(
            [_end_to_end_ms(replace(servers[degree], latency=latency), one) for one in some.itertuples()]
        )
        error = np.abs(predicted / some["e2e_time"].to_numpy() - 1.0)
        whole.append(
            {
                "GPUs": degree,
                "seen by the fit": degree in found["seen"],
                "batches of requests": len(some),
                "median error": float(np.median(error)),
                "largest": float(error.max()),
            }
        )
    return found | {"whole": whole, "left_out": measured - len(points), "measured": measured}


def _consistent(points: pd.DataFrame) -> Any:
    """Return which measured batches did what they state.

    Left out are answers that ended before their stated tokens, and prompts that took less time than those of a smaller
    batch: their first part alone, because the memory did not hold all.
    """
    stated_ms = points["prompt_time"] + (points["token_size"] - 1) * points["token_time"]
    by_batch = points.sort_values("batch_size").groupby(["tensor_parallel", "prompt_size", "token_size"])["prompt_time"]
    return (points["e2e_time"] > COMPLETE_SHARE * stated_ms) & (
        points["prompt_time"] >= by_batch.cummax().reindex(points.index)
    )


def _steps(point: Any) -> Sequence[Step]:
    """Return the prompts of a measured batch, and its mean decode step."""
    prompt, batch, outputs = int(point.prompt_size), int(point.batch_size), int(point.token_size)
    tp = int(point.tensor_parallel)
    kind = "one prompt" if batch == 1 else "several prompts"
    context_sum = batch * (prompt + outputs // 2)
    return (
        Step(kind=kind, tp=tp, ms=float(point.prompt_time), chunks=(prompt,) * batch),
        Step(kind="decode", tp=tp, ms=float(point.token_time), decodes=batch, context_sum=context_sum),
    )


def _end_to_end_ms(server: ServerSpec, point: Any) -> float:
    """Return the milliseconds in which the simulated engine answers a batch of requests that arrive together."""
    prompt, batch, outputs = int(point.prompt_size), int(point.batch_size), int(point.token_size)
    gpu: Gpu = server.gpu
    server = replace(
        server,
        model=replace(server.model, max_context_tokens=prompt + outputs),  # longer ones than the model's were measured
        config=replace(server.config, limits=Limits(max_batch_tokens=prompt * batch, max_running=batch)),
        quality_nll=None,
    )
    engine = server.build_engine(dense_plan(server.model), int(USABLE_SHARE * gpu.memory_bytes))
    engine.submit(
        [
            Request(request_id=number, arrival_s=0.0, prompt_tokens=prompt, output_tokens=outputs)
            for number in range(batch)
        ]
    )
    engine.run_until(float("inf"))
    return 1e3 * float(engine.records().finish_s.max())
