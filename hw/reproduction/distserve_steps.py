"""DistServe's fitted prices of OPT-13B on 1, 2 and 4 A100, next to calibrations composed of kernels.

DistServe publishes what a step takes as formulas, fitted to vLLM and to its own engine (LLMServe/DistServe,
Apache-2.0): prompts a + b * tokens + c * sum of squares, decodes a + b * sum of contexts + c * batch. They are read at
points of the range in which such engines run. OPT-66B is published too, but no file of kernels here has its 9,216
hidden features.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from hw.calibrate.calibration import Fixed, Target, calibrate
from hw.calibrate.published import composed_terms, gpu_named
from hw.reproduction.tensor_parallel import Step, fitted
from sim.cost.latency import LatencyModel, calibration_from_dict
from sim.cost.model_spec import load_model
from sim.cost.plan import dense_plan
from sim.errors import CalibrationError
from sim.json_file import read_json_object

ENGINES = {"vLLM": "vllm", "DistServe": "distserve"}
MODEL, GPU, DEGREES = "opt_13b", "a100_80gb", (1, 2, 4)
PROMPTS = ((512,), (1024,), (2048,), (256,) * 8, (512,) * 8)
BATCHES, CONTEXT_TOKENS = (1, 8, 32, 64, 128), 512


def steps_row(data: Path) -> dict[str, Any]:
    """Return the errors of steps by engine.

    Args:
        data: the folder of measurements.
    Raises:
        CalibrationError: if a file is missing.
    """
    models = {tp: _calibrated(data, tp) for tp in DEGREES}
    plan = dense_plan(load_model(MODEL))
    return {name: fitted(models, plan, _steps(data, file)) for name, file in ENGINES.items()}


def _calibrated(data: Path, tp: int) -> LatencyModel:
    gpu = replace(gpu_named(GPU), tp=tp)
    target = Target(
        name=f"{MODEL}_a100_tp{tp}",
        model=MODEL,
        device=GPU,
        kind="composed",
        stack="TensorRT-LLM 1.0.0 kernels, bf16",
        sources=(),
        read=lambda root: composed_terms(root, load_model(MODEL), gpu, "a100_sxm", "trtllm/1.0.0"),
        tp=tp,
    )
    return calibration_from_dict(calibrate(target, data, Fixed(us=0.0, source="none")))


def _steps(data: Path, engine: str) -> list[Step]:
    path = data / "distserve" / f"profiler-a100-80g.{engine}.json"
    if not path.is_file():
        raise CalibrationError(f"no {path}; set RAP_LAB_DATA to the folder that holds calibration/distserve")
    content = read_json_object(path, CalibrationError, "bring the file of LLMServe/DistServe again")
    found = []
    for tp in DEGREES:
        of = content["facebook/opt-13b"][str(tp)]
        a, b, c = of["prefill"]
        for chunks in PROMPTS:
            ms = a + b * sum(chunks) + c * sum(tokens**2 for tokens in chunks)
            kind = "one prompt" if len(chunks) == 1 else "several prompts"
            found.append(Step(kind=kind, tp=tp, ms=ms, chunks=chunks))
        for batch in BATCHES:
            few = batch < of["decoding_large_small_bs_threshold"]
            a, b, c = of["decoding_smallbs" if few else "decoding_largebs"]
            context_sum = batch * CONTEXT_TOKENS
            ms = a + b * context_sum + c * batch
            found.append(Step(kind="decode", tp=tp, ms=ms, decodes=batch, context_sum=context_sum))
    return found
