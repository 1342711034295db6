"""``python -m hw.disaggregate``: from a configuration to the run folder of a prefill and a decode process.

The parent (hw/disaggregate/pair.py) collects what both processes (hw/disaggregate/processes.py) report during the run,
so that records survive if either process dies.
"""

from __future__ import annotations

import math
import platform
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from hw.disaggregate.kv_link import LinkError
from hw.disaggregate.pair import Outcome, Pair
from hw.elastic.checkpoint import pick_device
from hw.elastic.processor import processor_name
from hw.elastic.random_weights import note_of, seed_of
from hw.engine.hw_engine import check_config, check_gpu
from hw.replay.run import HwReplayConfig
from sim.config import build, name_of, one_thread, run_command
from sim.cost.plan import describe
from sim.disaggregate.run import plan_of, plan_quality, print_staged, staged_frame, transfer_figures
from sim.engine.iteration_log import IterationLog
from sim.results.metrics import iterations_frame, merged_gaps, merged_iterations, summarise
from sim.results.plots import plot_replay
from sim.results.run_folder import begin_run, provenance, write_begun, write_json, write_parquet
from sim.types import Floats


@dataclass(kw_only=True)
class HwDisaggregateConfig(HwReplayConfig):
    """The configuration of ``python -m hw.disaggregate``.

    link_bytes_per_s: the bandwidth that transfers share, enforced by the sender; null for as fast as the socket allows.
    link_latency_s: seconds between the request for a transfer and its first byte, in addition to the socket's own.
    """

    link_bytes_per_s: float | None = None
    link_latency_s: float = 0.0


ConfigStore.instance().store(name="hw_disaggregate_schema", node=HwDisaggregateConfig)


def figures(cfg: DictConfig, outcome: Outcome) -> dict[str, Any]:
    """Return the summary of a run, with the keys of ``sim.disaggregate`` and ``interrupted`` and ``failure``."""
    records, plan = outcome.records, plan_of(cfg)
    logs = list(outcome.logs.values())
    end_s = max(float(np.nanmax(records.finish_s, initial=0.0)), 1e-9)
    iterations = merged_iterations([log.iterations for log in logs] or [IterationLog().table()])
    summary = summarise(
        records,
        iterations,
        merged_gaps([log.gaps for log in logs] or [IterationLog().token_gaps()]),
        build(cfg.slo),
        not_arrived=outcome.not_arrived,
        cpu_s=sum(log.cpu_s for log in logs),
    )
    summary |= plan_quality(cfg, summary["quality_nll"], iterations)
    seed = seed_of(str(cfg.hw.checkpoint))
    if seed is not None:
        summary |= {"quality_outside_share": None, "quality_note": note_of(seed)}
    summary |= {"plan": describe(plan), **transfer_figures(records, plan, build(cfg.model))}
    summary["link_busy_share"] = _busy_s(records.send_s, records.sent_s) / end_s
    return summary | {"interrupted": outcome.interrupted, "failure": outcome.failure}


def _busy_s(send_s: Floats, sent_s: Floats) -> float:
    """Return the seconds during which at least one transfer was under way."""
    busy_s, until_s = 0.0, -math.inf
    for start_s, end_s in sorted(zip(send_s.tolist(), sent_s.tolist(), strict=True)):
        if math.isfinite(end_s):
            busy_s += max(0.0, end_s - max(start_s, until_s))
            until_s = max(until_s, end_s)
    return busy_s


def hardware(cfg: DictConfig, outcome: Outcome) -> dict[str, Any]:
    """Return the content of ``hardware.json``: device, link, and the cost of each process."""
    place, on_cpu = pick_device(cfg.hw.device), f"{platform.machine()} CPU, {cfg.hw.threads} thread(s) each"
    return {
        "device": on_cpu if place.type == "cpu" else processor_name(place),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "clock": "wall",
        "link": "loopback TCP socket",
        "link_bytes_per_s": cfg.link_bytes_per_s,
        "link_latency_s": float(cfg.link_latency_s),
        "header_bytes": {stage: log.header_bytes for stage, log in outcome.logs.items()},
        "cpu_s": {stage: log.cpu_s for stage, log in outcome.logs.items()},
        "largest_difference_bytes": max((log.difference_bytes for log in outcome.logs.values()), default=0),
    }


def write_run(folder: Path, cfg: DictConfig, outcome: Outcome, summary: Mapping[str, Any]) -> None:
    """Write the run folder."""
    slo = build(cfg.slo)
    write_begun(folder, cfg, provenance(cfg.seed))
    write_parquet(folder / "records.parquet", staged_frame(outcome.records, slo))
    write_parquet(folder / "transfers.parquet", outcome.transfers)
    if outcome.logs:
        iterations = merged_iterations([log.iterations for log in outcome.logs.values()])
        if cfg.iterations:
            write_parquet(folder / "iterations.parquet", iterations_frame(iterations))
        if cfg.plot:
            plot_replay(folder / "replay.png", outcome.records, iterations, slo, summary["plan"])
    write_json(folder / "hardware.json", hardware(cfg, outcome))
    write_json(folder / "summary.json", summary)  # last: a folder with a summary is complete


def run_disaggregate(cfg: DictConfig) -> None:
    """Serve a configuration, write the run folder, and print the summary.

    Raises:
        ConfigError: for engine settings that only the simulated engine has.
        LinkError: if a process failed; the records so far are written.
    """
    check_config(build(cfg.engine))
    check_gpu(build(cfg.gpu))
    folder = Path(HydraConfig.get().runtime.output_dir)
    label = cfg.label or str(HydraConfig.get().runtime.choices["trace"])
    with Pair() as pair:
        begin_run(folder, cfg, provenance(cfg.seed))
        outcome = pair.serve(cfg)
    summary = figures(cfg, outcome)
    try:
        write_run(folder, cfg, outcome, summary)
    finally:  # a full disk loses the files, not the figures
        print_staged(summary, f"{label}: a prefill and a decode process of {name_of(cfg.model)}")
    if outcome.failure is not None and not outcome.interrupted:
        raise LinkError(f"{outcome.failure}; records of {len(outcome.records)} requests so far are in {folder}")
    if outcome.interrupted:
        print(f"interrupted: kept the records of {len(outcome.records)} requests that had arrived, in {folder}")
        sys.exit(130)
    print(f"files: {folder}")


def disaggregate_command() -> None:
    """Run ``python -m hw.disaggregate``."""
    one_thread()
    run_command(run_disaggregate, "hw_disaggregate")
