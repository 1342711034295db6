"""``python -m hw.swap_results``: what swapping preempted requests is worth on the real model, next to simulation.

Each workload is served with ``engine.preemption=recompute`` and ``swap``, in turns, so that a change of the machine's
speed meets both. One number is taken from the real runs: the speed of the machine, on the runs that recompute. The
simulation of swapping is a prediction with it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig

from hw.engine.hw_engine import HwEngine
from hw.replay.run import engine_over, load_elastic
from sim.config import build, compose_config, one_thread, run_command
from sim.cost.latency import LatencyModel, load_calibration
from sim.cost.memory import kv_block_layer_bytes
from sim.cost.model_spec import load_model
from sim.errors import ConfigError
from sim.pages.render import commit_of, render, table
from sim.paths import RESULTS
from sim.progress import progress
from sim.replay.run import RecordingEngine, build_engine, build_trace, figures, replay_with
from sim.results.run_folder import provenance, write_json, write_text

RESULT, PAGE = (RESULTS / "swapping" / name for name in ("swapping.json", "index.md"))
TEMPLATE = Path(__file__).parent / "templates" / "swapping.md.j2"
CALIBRATION = "smollm2_135m_cpu_epyc_1thread"
MODEL = "smollm2_135m"
COMMON = (
    "trace=small",
    f"model={MODEL}",
    "gpu=cpu_epyc_1thread",
    f"latency={CALIBRATION}",
    "engine=small",
    "budget=kv_blocks",
    "workspace_bytes=1e8",
    "trace.on_rate_rps=3",
    "trace.lengths.output_tokens_p50=60",
    "trace.lengths.max_output_tokens=200",
    "hw.device=cpu",
    "hw.clock=cpu",
)
WORKLOADS: Mapping[str, tuple[str, ...]] = {
    "short prompts": ("budget.blocks=32", "trace.duration_s=12"),
    "long prompts": (
        "budget.blocks=48",
        "trace.duration_s=10",
        "trace.lengths.prompt_tokens_p50=128",
        "trace.lengths.max_prompt_tokens=300",
    ),
}
MODES: Mapping[str, tuple[str, ...]] = {
    "recompute": (),
    "swap": ("engine.preemption=swap", "engine.host_kv_blocks=256"),
}
SHOWN = {"makespan_s": "makespan", "busy_s": "computing", "ttft_s": "TTFT", "tpot_s": "TPOT", "e2e_s": "E2E"}
CROWDED_LOAD = 0.5
"""Load of the machine before the runs, in programs that want to run, above which times say little."""


@dataclass(kw_only=True)
class SwapResultsConfig:
    """What to write.

    measure: measure first; without, the page is written from the committed figures.
    repeats: real runs of each workload with each kind of preemption.
    """

    measure: bool = False
    repeats: int = 3


ConfigStore.instance().store(name="hw_swap_results_schema", node=SwapResultsConfig)


def main() -> None:
    """Run the command."""
    one_thread()
    run_command(_results, "hw_swap_results")


def _results(cfg: DictConfig) -> int:
    if cfg.measure:
        if cfg.repeats < 1:
            raise ConfigError(f"repeats is {cfg.repeats}; it must be at least 1")
        write_json(RESULT, measure(int(cfg.repeats)))
    if not RESULT.is_file():
        raise ConfigError(f"{RESULT} is missing; make it: python -m hw.swap_results measure=true")
    write_text(PAGE, page(json.loads(RESULT.read_text(encoding="utf-8"))))
    print(f"written: {PAGE}")
    return 0


# --- Measured --------------------------------------------------------------------------------------------------------


def configuration(workload: str, mode: str, *more: str) -> DictConfig:
    """Return the configuration of a run, which hw.replay and sim.replay share."""
    return compose_config("hw_replay", [*COMMON, *WORKLOADS[workload], *MODES[mode], *more])


def measure(repeats: int) -> dict[str, Any]:
    """Serve every workload in both ways, for real and in simulation; return the content of the results file."""
    first = configuration(next(iter(WORKLOADS)), "recompute")
    load, latency = os.getloadavg()[0], load_calibration(CALIBRATION)
    elastic, tokenizer = load_elastic(build(first.model), first.hw, first.model)
    real: dict[str, dict[str, list[dict[str, Any]]]] = {name: {mode: [] for mode in MODES} for name in WORKLOADS}
    with progress("serving", repeats * len(WORKLOADS) * len(MODES), "runs") as report:
        for repeat in range(repeats):
            for workload in WORKLOADS:
                for mode in list(MODES)[:: 1 if repeat % 2 == 0 else -1]:  # neither is always the first
                    cfg = configuration(workload, mode)
                    engine, policy = engine_over(cfg, elastic, tokenizer)
                    try:
                        replay_with(cfg, build_trace(cfg), engine, policy)
                        real[workload][mode].append(figures_of(cfg, engine) | {"priced_s": priced_s(engine, latency)})
                    finally:
                        engine.close()
                    report(sum(len(runs) for by in real.values() for runs in by.values()))
    factor = speed_factor([run for by in real.values() for run in by["recompute"]])
    return {
        "provenance": provenance(int(first.seed)),
        "device": latency.device,
        "load_before": load,
        "repeats": repeats,
        "factor": factor,
        "host_bytes_per_s": build(first.gpu).host_to_device_bytes_per_s,
        "words": {"common": list(COMMON), "workloads": WORKLOADS, "modes": MODES},
        "workloads": {
            workload: {
                mode: {"real": real[workload][mode], "simulated": simulate(workload, mode, factor)} for mode in MODES
            }
            for workload in WORKLOADS
        },
    }


def simulate(workload: str, mode: str, factor: float) -> dict[str, Any]:
    """Return the figures of a simulation on a machine that is ``factor`` times as slow as the calibrated one."""
    cfg = configuration(workload, mode, f"slowdown={factor}")
    engine, policy = build_engine(cfg)
    replay_with(cfg, build_trace(cfg), engine, policy)
    return figures_of(cfg, engine)


def figures_of(cfg: DictConfig, engine: RecordingEngine) -> dict[str, Any]:
    """Return the figures by which runs are compared, real or simulated; times are means over requests, in seconds."""
    found, records, iterations = figures(engine, build(cfg.slo)), engine.records(), engine.iterations()
    return {
        "requests": len(records),
        "finished": int(found["finished"]),
        "preemptions": int(records.preemptions.sum()),
        "recomputed_tokens": int(iterations.prefill_tokens.sum() - records.prompt_tokens.sum()),
        "busy_s": float((iterations.end_s - iterations.start_s).sum()),
        "makespan_s": float(found["makespan_s"]),
        "ttft_s": float(np.nanmean(records.ttft_s)),
        "tpot_s": float(np.nanmean(records.tpot_s)),
        "e2e_s": float(np.nanmean(records.e2e_s)),
    }


def priced_s(engine: HwEngine, latency: LatencyModel) -> float:
    """Return the seconds that a calibration expects of the iterations of a real run, without copies of KV."""
    return float(
        sum(
            latency.iteration_s(shape.plan, shape.chunks, shape.decode_batch, shape.decode_context_sum, shape.sequences)
            for shape in engine.shapes()
        )
    )


def speed_factor(runs: Sequence[Mapping[str, float]]) -> float:
    """Return how many times as long as calibrated the iterations of real runs took."""
    return sum(run["busy_s"] for run in runs) / sum(run["priced_s"] for run in runs)


# --- The page --------------------------------------------------------------------------------------------------------


def page(content: Mapping[str, Any]) -> str:
    """Return the page, in Markdown."""
    spec, found = load_model(MODEL), [ratios(modes, "busy_s") for modes in content["workloads"].values()]
    token_bytes = spec.num_layers * kv_block_layer_bytes(spec, 16) / 16
    return render(
        TEMPLATE,
        content=content,
        made=content["provenance"],
        commit=commit_of(content["provenance"]),
        crowded=content["load_before"] > CROWDED_LOAD,
        counts=counts_table(content["workloads"]),
        times=times_table(content["workloads"]),
        ratios=ratios_table(content["workloads"]),
        faster=(sum(ratio < 1 for one in found for ratio in one), sum(map(len, found))),
        kv_bytes_a_token=round(token_bytes),
    )


def counts_table(workloads: Mapping[str, Any]) -> str:
    """Return what was preempted and computed again, for real (all repeats) and in simulation."""
    rows = []
    for workload, modes in workloads.items():
        for mode, runs in modes.items():
            row: dict[str, Any] = {"workload": workload, "preemption": mode, "requests": runs["real"][0]["requests"]}
            for name, heading in (("preemptions", "preemptions"), ("recomputed_tokens", "tokens computed again")):
                row[f"{heading}, real"] = ", ".join(str(run[name]) for run in runs["real"])
                row[f"{heading}, simulated"] = runs["simulated"][name]
            rows.append(row)
    return table(rows, left=2)


def times_table(workloads: Mapping[str, Any]) -> str:
    """Return every time: real median with its range, and simulated."""
    rows = []
    for workload, modes in workloads.items():
        for mode, runs in modes.items():
            for name, heading in SHOWN.items():
                real, simulated = [run[name] for run in runs["real"]], runs["simulated"][name]
                median = float(np.median(real))
                rows.append(
                    {
                        "workload": workload,
                        "preemption": mode,
                        "time (s)": heading,
                        "real": median,
                        "least": min(real),
                        "most": max(real),
                        "simulated": simulated,
                        "error": simulated / median - 1.0,
                    }
                )
    return table(rows, dict.fromkeys(("real", "least", "most", "simulated"), ".3g") | {"error": "+.1%"}, left=3)


def ratios_table(workloads: Mapping[str, Any]) -> str:
    """Return each time with swapping over that with recomputation: within each repeat, and in simulation."""
    rows = []
    for workload, modes in workloads.items():
        for name, heading in SHOWN.items():
            found = ratios(modes, name)
            simulated = modes["swap"]["simulated"][name] / modes["recompute"]["simulated"][name]
            rows.append(
                {
                    "workload": workload,
                    "swap / recompute": heading,
                    "real": float(np.median(found)),
                    "least": min(found),
                    "most": max(found),
                    "simulated": simulated,
                }
            )
    return table(rows, dict.fromkeys(("real", "least", "most", "simulated"), ".3f"), left=2)


def ratios(modes: Mapping[str, Any], name: str) -> list[float]:
    """Return a figure with swapping over the same with recomputation, for each repeat."""
    pairs = zip(modes["swap"]["real"], modes["recompute"]["real"], strict=True)
    return [swapped[name] / recomputed[name] for swapped, recomputed in pairs]
