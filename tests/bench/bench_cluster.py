"""How fast a cluster is: a table, and as the last line one JSON object.

python tests/bench/bench_cluster.py [REQUESTS [REPLICAS]]

REQUESTS (1,000,000) and REPLICAS (64): Poisson arrivals at the mean rate of the Azure conversation trace a replica,
with its requests drawn again and again (CC-BY 4.0, cite Patel et al., Splitwise, ISCA 2024); without RAP_LAB_DATA
made-up ones. Each replica has the memory and limits of bench_speed.py. CPU seconds of one process, one thread, without
the building of the trace: engines, serving, records. The bar: 64 replicas and a million requests in 20 s.

Rows: each router; failures (each replica fails every 600 s on average, for 60 s, and loads again); and a policy that
changes the plan of each replica every 60 s.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import simpy

sys.path.insert(0, str(Path(__file__).parent))
import bench_speed as one

from sim.cluster import outages, routers
from sim.cluster.cluster import Cluster, Replica
from sim.config import one_thread
from sim.cost.memory import budget_for_kv_blocks
from sim.engine.protocol import EngineConfig
from sim.engine.scheduler import Limits
from sim.engine.sim_engine import SimEngine
from sim.paths import find_data
from sim.replay.loop import decisions
from sim.results.records import Status
from sim.traces.readers.azure import read_azure
from sim.traces.trace import Trace

RATE_RPS = 5.9
CONFIG = EngineConfig(
    limits=Limits(max_running=one.MAX_RUNNING, max_batch_tokens=one.MAX_BATCH_TOKENS),
    max_context_tokens=one.MAX_CONTEXT_TOKENS,
)
BUDGET_BYTES = budget_for_kv_blocks(one.MODEL, one.DENSE, one.KV_BLOCKS, 0, 16)


@dataclass(frozen=True)
class Row:
    """One measurement: a router, and what else happens."""

    name: str
    router: routers.KernelRouter
    fails: bool = False
    policy: type = one.Always


ROWS = (
    Row("round robin", routers.round_robin()),
    Row("least outstanding", routers.least_outstanding()),
    Row("least KV", routers.least_kv()),
    Row("shortest expected wait", routers.shortest_expected_wait()),
    Row("prefix affinity", routers.prefix_affinity()),
    Row("power of two", routers.power_of_two()),
    Row("least outstanding, failures", routers.least_outstanding(), fails=True),
    Row("least outstanding, a plan a minute", routers.least_outstanding(), policy=one.Alternating),
)


def requests_of(count: int, replicas: int) -> Trace:
    """Return the requests; three prefix ids each, the first of 5,000 shared."""
    path = find_data(one.AZURE)
    source = read_azure(path) if path is not None else one.made_up(15_606)
    rng = np.random.default_rng(0)
    which = rng.integers(0, len(source), count)
    shared, own = rng.integers(0, 5000, count), np.arange(5000, 5000 + count)
    return Trace(
        arrival_s=np.cumsum(rng.exponential(1.0 / (RATE_RPS * replicas), count)),
        prompt_tokens=source.prompt_tokens[which],
        output_tokens=source.output_tokens[which],
        hash_ids=tuple(np.stack([shared, own], axis=1)),
    )


def run(row: Row, trace: Trace, replicas: int) -> dict[str, Any]:
    """Serve once; return CPU seconds and what came of it."""
    away = outages.markov(mean_up_s=600.0, mean_away_s=60.0, horizon_s=float(trace.arrival_s[-1]), seed=0)

    def build(env: simpy.Environment) -> tuple[SimEngine, Any]:
        engine = SimEngine(
            model=one.MODEL,
            latency=one.LATENCY,
            config=CONFIG,
            plan=one.DENSE,
            budget_bytes=BUDGET_BYTES,
            keep_iterations=False,
            env=env,
            external_clock=True,
        )
        return engine, row.policy()

    def moments() -> Iterator[float]:
        return decisions(60.0, ())

    begun_s = time.process_time()
    cluster = Cluster(
        trace,
        [
            Replica(
                name=str(i),
                build=build,
                decisions_s=moments if row.policy is one.Alternating else None,
                outages=away(i) if row.fails else (),
            )
            for i in range(replicas)
        ],
        row.router,
        load_bytes_per_s=2e9,
    )
    cluster.run()
    records = cluster.records()
    cpu_s = time.process_time() - begun_s
    states = [served.engine.observe(cluster.end_s) for served in cluster.engines()]
    return {
        "row": row.name,
        "cpu_s": cpu_s,
        "requests_per_cpu_s": len(records) / cpu_s,
        "iterations": sum(state.iterations for state in states),
        "finished": int((records.status == Status.FINISHED).sum()),
        "moves": int(records.moves.sum()),
    }


def main(requests: int, replicas: int) -> None:
    """Measure every row; print the table, then the JSON line."""
    one_thread()
    run(ROWS[0], requests_of(100, 2), 2)  # compiled, or read from the cache
    trace = requests_of(requests, replicas)
    found = []
    for row in ROWS:
        figures = run(row, trace, replicas)
        print(
            f"{row.name:36s} {figures['cpu_s']:7.2f} CPU s {figures['requests_per_cpu_s']:12,.0f} requests/CPU s "
            f"{figures['iterations']:12,d} iterations {figures['finished']:10,d} finished {figures['moves']:7,d} moves",
            flush=True,
        )
        found.append(figures)
    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"requests": requests, "replicas": replicas, "peak_bytes": peak_bytes, "rows": found}))


if __name__ == "__main__":
    numbers = [int(word) for word in sys.argv[1:]]
    main(*[*numbers, *(1_000_000, 64)[len(numbers) :]])
