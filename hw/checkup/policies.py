"""Step: replays of one trace under several policies on the real model, while memory comes and goes."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from omegaconf import DictConfig

from hw.checkup.findings import Findings
from hw.checkup.setup import Setup
from hw.engine.hw_engine import HwEngine
from hw.replay.run import engine_over, hardware, write_hardware
from sim.config import build
from sim.cost.memory import weight_bytes
from sim.cost.model_spec import ModelSpec
from sim.cost.plan import dense_plan
from sim.policies import Policy
from sim.replay.run import RecordingEngine, about, build_trace, figures, replay_with, write_tables
from sim.results.run_folder import provenance, write_begun, write_json, write_parquet

MOST_OVER_BOUND = 1.5
"""Time of a dense decode iteration over what its bytes take at the device's bandwidth."""
FALLBACK_PRICES = {"llama2_7b": "llama2_7b_a100_trtllm"}
"""A calibration with 4-bit terms, for policies that read prices where this device has none yet."""
SHOWN = ("finished", "rejected", "unfinished", "preemptions", "transitions", "makespan_s", "output_tokens_per_s")


def policies_for(spec: ModelSpec) -> dict[str, tuple[str, ...]]:
    """Return the overrides of each policy that can serve this model; those of the papers for the models they name."""
    if spec.name == "llama2_7b":
        return {name: (f"policy={name}",) for name in ("dense", "rap_80", "morphserve", "greedy_stop", "learned_serve")}
    layers = spec.num_layers
    late = list(range(layers * 5 // 8, max(layers - 1, 1))) or [0]
    order = [f"{kind}{i}" for i in reversed(late) for kind in ("MHA", "FFN")]
    found = {
        "dense": ("policy=dense",),
        "fixed": ("policy=fixed", f"policy.drop_mha={late[::2]}", f"policy.drop_ffn={late[1::3]}"),
        "morphserve": ("policy=morphserve",),
        "greedy_stop": ("policy=greedy_stop", f"policy.order=[{','.join(order)}]", "policy.made_for=null"),
    }
    return found | ({"learned_prune": ("policy=learned_prune",)} if spec.name == "smollm2_135m" else {})


def configuration(setup: Setup, policy: str, command: str = "hw_replay") -> DictConfig:
    """Return the configuration of a replay, which the simulation of it shares."""
    spec, (high, low) = setup.model, (setup.budget_bytes(tokens) for tokens in setup.amounts.kv_tokens)
    trace_s = float(setup.config(command, *setup.amounts.trace).trace.duration_s)
    rows = f"[[0,{high}],[{trace_s / 3:.1f},{low}],[{trace_s * 2 / 3:.1f},{high}]]"
    more = [*setup.amounts.trace, "budget=steps", "budget.unit=bytes", f"budget.rows={rows}"]
    if setup.calibration.is_file():
        more.append(f"latency={setup.calibration}")
    elif spec.name in FALLBACK_PRICES:
        more.append(f"latency={FALLBACK_PRICES[spec.name]}")
    return setup.config(command, *more, *policies_for(spec)[policy])


def run(setup: Setup, findings: Findings) -> None:
    """Replay under each policy in turn, on one model that is loaded once."""
    end_s = time.monotonic() + setup.limit_s * 0.9
    loaded = setup.loaded()
    names = list(policies_for(setup.model))
    results: dict[str, Any] = {}
    for index, name in enumerate(names):
        cfg = configuration(setup, name)
        engine, policy = engine_over(cfg, *loaded)
        most_s = (end_s - time.monotonic()) / (len(names) - index)
        results[name] = replayed(setup.folder("replays") / name, cfg, engine, policy, most_s)
        if name == "dense":
            results[name]["over_bound"] = over_bound(engine, setup)
        findings.figure("policies", results)
        findings.check(
            f"{name}: requests without an end", not results[name]["unfinished"], results[name]["unfinished"], "0"
        )
        found = results[name]["largest_difference_bytes"]
        findings.check(f"{name}: difference between allocated and predicted bytes", found == 0, found, "0")
        keep_passes(setup, names[: index + 1])
        del engine
        gc.collect()
        loaded[0].hardware.give_back()
    found = results["dense"]["over_bound"]
    if setup.on_gpu:
        wanted = f"below {MOST_OVER_BOUND}"
        findings.check(
            "dense decode over the bound of its bytes", found is not None and found < MOST_OVER_BOUND, found, wanted
        )


def keep_passes(setup: Setup, names: Sequence[str]) -> None:
    """Write the iterations of all complete replays next to the results: a latency model can be judged by them later."""
    paths = {name: setup.folder("replays") / name / "passes.parquet" for name in names}
    found = [pd.read_parquet(path).assign(policy=name) for name, path in paths.items() if path.is_file()]
    if found:
        write_parquet(Path(setup.out) / "passes.parquet", pd.concat(found, ignore_index=True))


def replayed(folder: Path, cfg: DictConfig, engine: HwEngine, policy: Policy, most_s: float) -> dict[str, Any]:
    """Replay, write the run folder, and return the figures; stop between two iterations after ``most_s`` seconds."""
    timer = threading.Timer(max(most_s, 1.0), engine.interrupt)
    timer.start()
    start_s, stopped = time.monotonic(), False
    try:
        serve(folder, cfg, engine, policy)
    except KeyboardInterrupt:
        stopped = True
    finally:
        timer.cancel()
    summary = figures(engine, build(cfg.slo))
    row = {name: summary[name] for name in SHOWN} | {
        "seconds": time.monotonic() - start_s,
        "stopped": stopped,
        "ttft_p50_s": summary["ttft_s"]["p50"],
        "tpot_p50_s": summary["tpot_s"]["p50"],
    }
    row |= {
        key: hardware(engine, cfg)[key] for key in ("largest_difference_bytes", "out_of_memory", "peak_in_use_bytes")
    }
    engine.close()
    return row


def serve(folder: Path, cfg: DictConfig, engine: RecordingEngine, policy: Policy) -> None:
    """Replay one configuration and write its run folder, as ``hw.replay`` and ``sim.replay`` do."""
    trace, slo = build_trace(cfg), build(cfg.slo)
    command = "hw.replay" if isinstance(engine, HwEngine) else "sim.replay"
    made_by: Mapping[str, Any] = {**provenance(cfg.seed), "trace": about(trace), "command": f"python -m {command}"}
    replay_with(cfg, trace, engine, policy)
    write_begun(folder, cfg, made_by)
    write_tables(folder, slo, engine.records(), engine.transitions(), engine.kept_share(), engine.iterations())
    if isinstance(engine, HwEngine):
        write_hardware(folder, engine, cfg)
    write_json(folder / "summary.json", figures(engine, slo))  # last: a folder with a summary is complete


def over_bound(engine: HwEngine, setup: Setup) -> float | None:
    """Return the median over decode iterations of their time over what their bytes take; None without any.

    The bytes are the weights and the KV that is read, at the bandwidth of the device's data sheet.
    """
    spec, dense = engine.model, dense_plan(engine.model)
    weights = weight_bytes(spec, dense)
    per_token = spec.num_layers * spec.kv_bytes_per_token_layer
    ratios = [
        shape.forward_s * setup.gpu.memory_bandwidth_bytes_per_s / (weights + shape.decode_context_sum * per_token)
        for shape in engine.shapes()
        if shape.decode_batch and not shape.chunks
    ]
    return float(np.median(ratios)) if ratios else None
