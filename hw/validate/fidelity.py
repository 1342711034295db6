"""Compares the simulator with a published run of a real engine, request by request.

The run: 300 ShareGPT requests on Llama-3.1-8B, one RTX 4090, vLLM 0.19.0, at 10.3 requests per second with a KV cache
of 2,588 blocks, so that a request spends most of its time queued or preempted (casys-kaist/LLMServingSim,
``bench/examples/RTX4090/Llama-3.1-8B/vllm``, commit 5daddb21, MIT). The kernel times were measured separately. One
number is fitted on the run, the overhead of an iteration, and only on its first 60 seconds.
"""

from __future__ import annotations

import gzip
import json
import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sim.config import build_option
from sim.cost.latency import LatencyModel
from sim.cost.memory import budget_for_kv_blocks
from sim.cost.model_spec import load_model
from sim.cost.plan import dense_plan
from sim.engine.protocol import EngineConfig, Request
from sim.engine.scheduler import Limits
from sim.engine.server_spec import ServerSpec
from sim.engine.sim_engine import SimEngine
from sim.errors import CalibrationError, RapLabError
from sim.json_file import read_json_object
from sim.pages.render import render, show, table
from sim.results.records import Moments, Records
from sim.types import Floats

TEMPLATE = Path(__file__).parent / "templates" / "fidelity.md.j2"
RUN = "calibration/llmservingsim_e2e/RTX4090/Llama-3.1-8B"
SOURCE = "casys-kaist/LLMServingSim, commit 5daddb21, MIT; ShareGPT requests"
CALIBRATION = "llama3.1_8b_rtx4090"
FIT_UNTIL_S = 60.0
FIT_STEPS_S = tuple(k * 1e-4 for k in range(31))
STATISTICS = ("mean", "p50", "p95", "p99")
TARGETS = {"ttft_s": 0.10, "tpot_s": 0.05, "e2e_s": 0.10, "makespan_s": 0.05}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RealRun(Moments):
    """What a real engine did, in seconds since the first arrival, and its settings.

    kv_blocks: of all layers. model, device, engine: as the run states them; empty if it does not.
    """

    config: EngineConfig
    kv_blocks: int
    model: str = ""
    device: str = ""
    engine: str = ""


ADVICE = "give a folder of casys-kaist/LLMServingSim, bench/examples, whole"
MOST_BYTES = 256 * 1024 * 1024
"""Unpacked size of ``requests.jsonl.gz``; the published runs have less than 1 MB."""


def read_run(folder: Path) -> RealRun:
    """Read ``requests.jsonl.gz`` and ``meta.json`` of an LLMServingSim benchmark run.

    Arrivals are Unix time, the engine's times monotonic. The clocks are aligned at the request that went from arrival
    to the engine's queue the fastest, so the client's overhead stays in the real latencies.

    Raises:
        CalibrationError: if a file is missing, cannot be read or lacks a key.
    """
    for name in ("requests.jsonl.gz", "meta.json"):
        if not (folder / name).is_file():
            raise CalibrationError(
                f"no {name} in {folder}; point RAP_LAB_DATA at a folder that holds {RUN}, or give run=FOLDER "
                "(casys-kaist/LLMServingSim, bench/examples)"
            )
    rows = _rows(folder / "requests.jsonl.gz")
    meta = read_json_object(folder / "meta.json", CalibrationError, ADVICE)
    try:
        return _run_of(rows, meta)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        if isinstance(error, RapLabError):
            raise
        named = f"lacks {error}" if isinstance(error, KeyError) else f"has a value of the wrong type ({error})"
        raise CalibrationError(f"the run in {folder} {named}; {ADVICE}") from error


def _rows(path: Path) -> list[dict[str, Any]]:
    try:
        with gzip.open(path, "rb") as file:
            content = file.read(MOST_BYTES + 1)
        if len(content) > MOST_BYTES:
            raise CalibrationError(f"{path} unpacks to more than {MOST_BYTES:,} bytes; {ADVICE}")
        rows = [json.loads(line) for line in content.decode("utf-8").splitlines() if line.strip()]
    except RapLabError:
        raise
    except (OSError, EOFError, zlib.error, ValueError, RecursionError) as error:
        raise CalibrationError(f"{path} cannot be read: {' '.join(str(error).split())}; {ADVICE}") from error
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise CalibrationError(f"{path} has no requests; it must hold one JSON object a line; {ADVICE}")
    return rows


def _run_of(rows: list[dict[str, Any]], meta: Mapping[str, Any]) -> RealRun:
    rows = sorted(rows, key=lambda row: float(row["arrival_time"]))
    cache, engine = meta["kv_cache"], meta["engine_kwargs"]
    scheduler = meta["resolved_config"]["scheduler_config"]

    def column(name: str) -> Floats:
        found = np.array([row[name] for row in rows], dtype=np.float64)
        if not np.isfinite(found).all():
            raise ValueError(f"{name} is not a finite number")
        return found

    arrival = column("arrival_time")
    start = arrival[0] + np.min(column("queued_ts") - arrival)
    version = meta.get("vllm_version")
    return RealRun(
        arrival_s=arrival - arrival[0],
        first_token_s=column("first_token_ts") - start,
        finish_s=column("last_token_ts") - start,
        prompt_tokens=column("input_toks").astype(np.int64),
        produced_tokens=column("output_toks").astype(np.int64),
        config=EngineConfig(
            scheduler="chunked",
            limits=Limits(
                max_batch_tokens=int(engine["max_num_batched_tokens"]),
                max_running=int(engine["max_num_seqs"]),
                long_prefill_tokens=int(scheduler["long_prefill_token_threshold"]),
                reserve_full_prompt=bool(scheduler["scheduler_reserve_full_isl"]),
            ),
            kv_block_tokens=int(cache["block_size"]),
            reuse_preempted_kv=bool(cache["enable_prefix_caching"]),
            max_context_tokens=int(engine["max_model_len"]),
            schedules_ahead=bool(scheduler.get("async_scheduling", False)),
        ),
        kv_blocks=int(cache["num_gpu_blocks"]) - 1,  # vLLM keeps its first block as the null block
        model=str(meta.get("model") or ""),
        device=str(meta.get("hardware", {}).get("device_name") or ""),
        engine=f"vLLM {version}" if version else "",
    )


def check_calibration(run: RealRun, latency: LatencyModel) -> None:
    """Check that a calibration is of the run's model and device, as far as the run states them.

    Raises:
        CalibrationError: if not.
    """
    for what, stated, ours in (
        ("model", run.model.rpartition("/")[2], latency.model),
        ("device", run.device, latency.device.split("_")[0]),
    ):
        if stated and letters(ours) not in letters(stated):
            raise CalibrationError(
                f"the run is of {what} {stated!r}, but calibration {latency.name!r} is of {ours!r}; set latency= "
                "to one of that model and device"
            )


def letters(name: str) -> str:
    """Return the letters and digits of a name in lower case, to compare spellings of it."""
    return "".join(letter for letter in name.lower() if letter.isalnum())


def described(run: RealRun) -> dict[str, Any]:
    """Return what the page states of the real run."""
    return {
        "requests": len(run.arrival_s),
        "arrivals_s": float(run.arrival_s.max()),
        "model": run.model.rpartition("/")[2],
        "device": run.device,
        "engine": run.engine,
        "kv_blocks": run.kv_blocks + 1,
        "kv_block_tokens": run.config.kv_block_tokens,
        "batch_tokens": run.config.limits.max_batch_tokens,
        "prefix_caching": run.config.reuse_preempted_kv,
        "schedules_ahead": run.config.schedules_ahead,
    }


def simulate(run: RealRun, latency: LatencyModel) -> SimEngine:
    """Serve the requests of the run with its settings; return the engine when all are done."""
    model = load_model(latency.model)
    plan = dense_plan(model)
    server = ServerSpec(
        model=model,
        gpu=build_option("gpu", latency.device),
        config=run.config,
        workspace_bytes=0,  # the run states its KV blocks, so the rest of its memory does not matter
        latency=latency,
    )
    engine = server.build_engine(plan, budget_for_kv_blocks(model, plan, run.kv_blocks, 0, run.config.kv_block_tokens))
    columns = (run.arrival_s.tolist(), run.prompt_tokens.tolist(), run.produced_tokens.tolist())
    engine.submit(
        [
            Request(request_id=i, arrival_s=arrival_s, prompt_tokens=prompt, output_tokens=output)
            for i, (arrival_s, prompt, output) in enumerate(zip(*columns, strict=True))
        ]
    )
    engine.run_until(math.inf)
    return engine


def fit_fixed_s(
    run: RealRun, latency: LatencyModel, until_s: float = FIT_UNTIL_S, steps_s: Sequence[float] = FIT_STEPS_S
) -> float:
    """Return the overhead of an iteration that fits the first ``until_s`` seconds best.

    It minimizes the mean absolute error of finish times over the requests that the real engine finished by then. A
    grid search, because preemptions make the error jump.
    """
    seen = run.finish_s <= until_s

    def error_s(fixed_s: float) -> float:
        records = simulate(run, latency.with_fixed(fixed_s, "trial of hw.fidelity")).records()
        return float(np.mean(np.abs(records.finish_s[seen] - run.finish_s[seen])))

    return min(steps_s, key=error_s)


def compare(run: RealRun, records: Records) -> dict[str, Any]:
    """Return the relative error of each statistic, and the correlation over requests."""
    errors: dict[str, Any] = {}
    for name in ("ttft_s", "tpot_s", "e2e_s"):
        real, simulated = getattr(run, name), getattr(records, name)
        figures = {s: (_statistic(real, s), _statistic(simulated, s)) for s in STATISTICS}
        errors[name] = {
            **{s: {"real": r, "simulated": v, "error": v / r - 1} for s, (r, v) in figures.items()},
            "correlation": _correlation(real, simulated),
        }
    real_s, simulated_s = float(run.finish_s.max()), float(records.finish_s.max())
    errors["makespan_s"] = {"real": real_s, "simulated": simulated_s, "error": simulated_s / real_s - 1}
    return errors


def _correlation(real: Floats, simulated: Floats) -> float | None:
    """Return the correlation over requests; None if one side is constant."""
    if len(real) < 2 or np.ptp(real) < 1e-9 or np.ptp(simulated) < 1e-9:
        return None
    return round(float(np.corrcoef(real, simulated)[0, 1]), 6)  # rounded: the last digits depend on the processor


def _statistic(values: Floats, name: str) -> float:
    return float(values.mean()) if name == "mean" else float(np.quantile(values, int(name[1:]) / 100))


def counts(run: RealRun, records: Records, iterations: int) -> dict[str, Any]:
    """Return what the page states next to the errors; ``moved``: requests whose TTFT is off by more than 5 s."""
    return {
        "requests": len(records),
        "iterations": iterations,
        "preemptions": int(records.preemptions.sum()),
        "moved": int((np.abs(records.ttft_s - run.ttft_s) > 5.0).sum()),
        "first_ttft_s": {"real": float(run.ttft_s[0]), "simulated": float(records.ttft_s[0])},
    }


def page(content: dict[str, Any]) -> str:
    """Return the Markdown page of a comparison, the content of fidelity.json."""
    errors = content["errors"]
    rows = []
    for name in TARGETS:
        row = errors[name] if name != "makespan_s" else {"mean": errors[name]}
        label = name.removesuffix("_s")
        real = show(row["mean"]["real"], ".4g" if name != "makespan_s" else ".1f")
        relative = {("mean" if s == "mean" else s.upper()): row[s]["error"] if s in row else None for s in STATISTICS}
        rows.append(
            {"": label if name == "makespan_s" else label.upper(), "real mean (s)": real}
            | relative
            | {"correlation by request": row.get("correlation")}
        )
    specs = {"mean": "+.1%", "P50": "+.1%", "P95": "+.1%", "P99": "+.1%", "correlation by request": ".3f"}
    return render(TEMPLATE, content=content, errors=table(rows, specs), missed=missed(errors))


def missed(errors: dict[str, Any]) -> list[str]:
    """Return the figures beyond their target, each as a phrase."""
    found = []
    for name, target in TARGETS.items():
        rows = errors[name] if name != "makespan_s" else {"": errors[name]}
        for statistic in STATISTICS if name != "makespan_s" else ("",):
            error = rows[statistic]["error"]
            if abs(error) > target:
                found.append(f"{name} {statistic} by {100 * error:+.1f} % against {100 * target:.0f} %")
    return found
