"""The run folder of a simulated server: the files of ``sim.replay``, and the requests as a trace to replay."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig
from rich.console import Console

from sim.config import build, name_of
from sim.engine.priced_replica import PricedReplica
from sim.replay.run import figures, write_tables
from sim.results.records import Status
from sim.results.report import print_summary
from sim.results.run_folder import provenance, write_begun, write_json
from sim.traces.readers.native import write_trace
from sim.traces.trace import Trace

SERVED = "served.parquet"
"""The file with the requests, which ``trace=file trace.path=`` reads."""


def served_trace(engine: PricedReplica) -> Trace:
    """Return the requests that have arrived as a trace; its times are those of the engine.

    With a prefix cache each request is a session of its own, because only sessions have their answers cached.
    """
    live = list(engine.queues.all.values())
    requests = [one.request for one in live]
    # A request that ended early was as long as what it had produced; one that was refused keeps its length.
    early = [one.produced_tokens if one.status is Status.REJECTED else 0 for one in live]
    outputs = [produced or one.request.output_tokens for produced, one in zip(early, live, strict=True)]
    caching = engine.config.prefix_caching
    return Trace(
        name="served",
        source="python -m sim.serve",
        arrival_s=np.array([request.arrival_s for request in requests], dtype=np.float64),
        prompt_tokens=np.array([request.prompt_tokens for request in requests], dtype=np.int64),
        output_tokens=np.array(outputs, dtype=np.int64),
        hash_ids=tuple(np.array(request.hash_ids, dtype=np.int64) for request in requests) if caching else None,
        hash_block_tokens=engine.config.hash_block_tokens if caching else None,
        session=np.arange(len(requests)) if caching else None,
        think_s=np.full(len(requests), np.nan) if caching else None,
    )


def write_run(folder: Path, cfg: DictConfig, engine: PricedReplica) -> dict[str, Any]:
    """Write what a server has served to its run folder and print the figures; return the summary."""
    slo = build(cfg.slo)
    write_begun(folder, cfg, provenance(cfg.seed))
    records, iterations = engine.records(), engine.iterations()
    summary = figures(engine, slo) | {"interrupted": False}
    write_tables(
        folder, slo, records, engine.transitions(), engine.kept_share(), iterations if cfg.iterations else None
    )
    if len(records):
        write_trace(served_trace(engine), folder / SERVED)
    write_json(folder / "summary.json", summary)  # last: a folder with a summary is complete
    print_summary(summary, f"{len(records):,} requests to {name_of(cfg.model)}, {build(cfg.gpu).title}", Console())
    return summary
