"""``python -m sim.cluster``: many replicas; one run folder, or a table of variants."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import simpy
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from sim.cluster.cells import (
    CellJob,
    CellResult,
    cell_config,
    cells_summary,
    check_cells,
    merged,
    result_of,
)
from sim.cluster.cluster import Cluster, Phase, Replica
from sim.cluster.outages import check_replicas
from sim.compiled import cpu_clock
from sim.config import build, one_thread, run_command, with_differences
from sim.cost.front_end import NO_FRONT_END, FrontEnd
from sim.engine.sim_engine import SimEngine
from sim.errors import ConfigError
from sim.limits import MOST_REPLICAS, check_count, check_ticks
from sim.policies import Fixed, Policy
from sim.progress import progress
from sim.replay.loop import decisions
from sim.replay.max_rate import all_at_once, is_measured, rate_figures
from sim.replay.run import (
    about,
    build_engine,
    build_parts,
    build_trace,
    front_end_of,
    progress_period_s,
    simulated_progress_steps,
    turn_columns,
)
from sim.replay.sweep import Executor
from sim.replay.variants import VariantsConfig, run_or_compare, variants
from sim.results.metrics import Slo, merged_gaps, merged_iterations, met_slo, records_frame, summarise
from sim.results.plots import ReplicaLine, plot_replicas
from sim.results.records import Status, TokenGaps
from sim.results.report import Columns, print_summary
from sim.results.run_folder import begin_run, write_begun, write_json, write_parquet
from sim.traces.sessions import first_turns
from sim.traces.trace import Trace

if TYPE_CHECKING:
    import pandas as pd

CLUSTER_COLUMNS: Columns = {
    "SLO attainment": ("slo_attainment", 100.0, 1, " %"),
    "TTFT P50 (s)": ("ttft_s.p50", 1.0, 2, ""),
    "TTFT P95 (s)": ("ttft_s.p95", 1.0, 2, ""),
    "TPOT P95 (ms)": ("tpot_s.p95", 1e3, 1, ""),
    "E2E P99 (s)": ("e2e_s.p99", 1.0, 1, ""),
    "goodput (req/s)": ("goodput_rps", 1.0, 2, ""),
    "moved": ("moved", 1.0, 0, ""),
    "recomputed (k tokens)": ("recomputed_tokens", 1e-3, 0, ""),
    "preemptions": ("preemptions", 1.0, 0, ""),
    "replica hours": ("replica_hours", 1.0, 2, ""),
    "makespan (s)": ("makespan_s", 1.0, 0, ""),
}
"""As ``sim.results.report.SUMMARY_COLUMNS``. moved: requests that another replica had before."""
MIGRATION_COLUMNS: Columns = {
    **CLUSTER_COLUMNS,
    "moved with KV": ("moved_with_kv", 1.0, 0, ""),
    "KV moved (GB)": ("migrated_bytes", 1e-9, 1, ""),
}
"""Of clusters of which one has ``migrate_bytes_per_s``. moved with KV: moves after which no KV was computed again."""
CACHE_COLUMNS: Columns = {"cached prompt tokens": ("cached_share", 100.0, 1, " %"), **CLUSTER_COLUMNS}
"""Of clusters of which one has a prefix cache. cached prompt tokens: share of the prompts' tokens."""


@dataclass(kw_only=True)
class ClusterConfig(VariantsConfig):
    """A replay on many replicas.

    replicas: name -> differences from the rest of the configuration, as ``key: value`` (``gpu``, ``model``, ``policy``
        and other groups name a file), and ``count``, the number of such replicas, 1 by default.
    router: chooses the replica of a request. outages: when replicas are down. autoscaler: how many replicas serve.
    load_bytes_per_s, start_s: bandwidth at which each GPU of a returning replica loads its weights, and its additional
        start time.
    migrate_bytes_per_s: bandwidth at which each GPU of a replica that is taken away with notice sends the KV of its
        requests to other replicas; null sends none, and the KV is computed again.
    keep_iterations: keep every iteration; false saves memory, and figures that need iterations are null.
    cells: how many such clusters there are, each with its own router and its part of the requests; ``workers``
        processes (or Ray) serve them, with equal results, and the memory needed is that of one for each process.
    cell_requests: share (cell i serves every ``cells``-th request of the trace, from the i-th on) or own (each cell
        draws its own trace, by a seed of its own).
    """

    replicas: dict[str, Any]
    router: Any
    outages: Any
    autoscaler: Any
    load_bytes_per_s: float = 2e9
    start_s: float = 10.0
    migrate_bytes_per_s: float | None = None
    keep_iterations: bool = True
    cells: int = 1
    cell_requests: str = "share"


ConfigStore.instance().store(name="cluster_schema", node=ClusterConfig)


def cluster_command() -> None:
    """Run ``python -m sim.cluster``."""
    one_thread()
    run_command(_cluster, "cluster")


def replicas_of(cfg: DictConfig) -> list[Replica]:
    """Return the replicas of a configuration.

    Each has its own seed, so that random parts such as a budget differ; the first has that of the configuration.

    Raises:
        ConfigError: for no replicas, a count below 0, a difference that names no key or file, or an outage of a replica
            that is not there.
    """
    outages = build(cfg.outages)
    found: list[Replica] = []
    for name, node in cfg.replicas.items():
        differences = dict(OmegaConf.to_container(node) or {})  # type: ignore[arg-type]
        count = differences.pop("count", 1)
        if not isinstance(count, int) or isinstance(count, bool) or count < 0:
            raise ConfigError(f"replicas.{name}.count is {count}; it must be a whole number from 0")
        check_count(len(found) + count, "replicas", MOST_REPLICAS, f"lower replicas.{name}.count")
        one = with_differences(cfg, differences, f"replicas.{name}")
        for k in range(count):
            i = len(found)
            mine = one.copy()
            mine.seed = cfg.seed + 1000 * i
            found.append(_replica(mine, f"{name}_{k}" if count > 1 else str(name), outages(i)))
    if not found:
        raise ConfigError("replicas has none; set at least one, e.g. replicas.main.count=2")
    check_replicas(outages, len(found))
    return found


def _replica(cfg: DictConfig, name: str, outages: Any) -> Replica:
    parts = build_parts(cfg)

    def make(env: simpy.Environment) -> tuple[SimEngine, Policy]:
        return build_engine(cfg, env=env, external_clock=True, keep_iterations=bool(cfg.keep_iterations))

    def moments() -> Iterator[float]:
        return decisions(float(cfg.tick_s), parts.budget.change_s[1:])

    decisions_s = None if isinstance(parts.policy, Fixed) else moments
    return Replica(name=name, build=make, decisions_s=decisions_s, outages=outages)


def build_cluster(cfg: DictConfig, trace: Trace | None = None) -> Cluster:
    """Build the cluster of a configuration; ``trace`` takes the place of its own.

    Raises:
        ConfigError: as in ``replicas_of`` and ``Cluster``, and for too many decisions.
    """
    trace = build_trace(cfg) if trace is None else trace
    replicas, autoscaler = replicas_of(cfg), build(cfg.autoscaler)
    last_s = float(trace.arrival_s[-1])
    if any(replica.decisions_s is not None for replica in replicas):
        check_ticks(float(cfg.tick_s), last_s)
    if autoscaler is not None:
        check_ticks(float(autoscaler.period_s), last_s, "autoscaler.period_s")
    return Cluster(
        trace,
        replicas,
        build(cfg.router),
        seed=cfg.seed,
        load_bytes_per_s=float(cfg.load_bytes_per_s),
        start_s=float(cfg.start_s),
        autoscaler=autoscaler,
        migrate_bytes_per_s=cfg.migrate_bytes_per_s,
    )


def replica_figures(cluster: Cluster, slo: Slo, front_end: FrontEnd = NO_FRONT_END) -> list[dict[str, Any]]:
    """Return the figures of each replica, one row each, as in ``replicas.parquet``.

    A request counts at the replica that served it last. up_s: seconds from the start of loading to the end, summed over
    the replica's engines. busy_share: share of up_s in iterations.
    """
    records, end_s = cluster.records(), cluster.end_s
    met = met_slo(records, slo, front_end)
    rows = []
    for i, replica in enumerate(cluster.replicas):
        mine = records.replica == i
        served = [one for one in cluster.engines() if one.replica == i]
        states = [one.engine.observe(min(one.ended_s, end_s)) for one in served]
        up_s = sum(max(0.0, min(one.ended_s, end_s) - one.begun_s) for one in served)
        rows.append(
            {
                "replica": i,
                "name": replica.name,
                "model": served[0].engine.model.name if served else None,
                "requests": int(mine.sum()),
                "finished": int((records.status[mine] == Status.FINISHED).sum()),
                "slo_attainment": float(met[mine].mean()) if mine.any() else None,
                "ttft_p95_s": _quantile(records.ttft_s[mine], 0.95),
                "tpot_p95_s": _quantile(records.tpot_s[mine], 0.95),
                "preemptions": sum(state.preemptions for state in states),
                "produced_tokens": sum(state.produced_tokens for state in states),
                "iterations": sum(state.iterations for state in states),
                "plan_changes": sum(len(one.engine.transitions()) for one in served),
                "budget_violation_s": sum(one.engine.budget_violation_s for one in served),
                "moved_away": sum(event.moved for event in cluster.events() if event.replica == i),
                "starts": len(served),
                "up_s": up_s,
                "busy_share": sum(state.busy_s for state in states) / up_s if up_s > 0 else None,
            }
        )
    return rows


def cluster_figures(
    cluster: Cluster,
    slo: Slo,
    *,
    cpu_s: float = 0.0,
    front_end: FrontEnd = NO_FRONT_END,
    gaps: TokenGaps | None = None,
) -> dict[str, Any]:
    """Return the figures of a cluster, as in ``summary.json``: those of a replay, and more.

    ``gaps``: between the tokens of all engines; None collects them.
    """
    engines, records = cluster.engines(), cluster.records()
    iterations = merged_iterations([served.engine.iterations() for served in engines])
    rows = replica_figures(cluster, slo, front_end)
    summary = summarise(
        records,
        iterations,
        token_gaps(cluster) if gaps is None else gaps,
        slo,
        transitions=sum(row["plan_changes"] for row in rows),
        budget_violation_s=sum(row["budget_violation_s"] for row in rows),
        not_arrived=len(cluster.trace) - len(records),
        cpu_s=cpu_s,
        end_s=cluster.end_s,
        front_end=front_end,
    )
    if not len(iterations):
        summary |= dict.fromkeys(("recomputed_tokens", "kv_peak_share", "extrapolated_share"))
        summary["iterations"] = sum(row["iterations"] for row in rows)
    return summary | {
        "moved": int((records.moves > 0).sum()),
        "moves": int(records.moves.sum()),
        "moved_with_kv": sum(one.reused for one in cluster.migrations()),
        "migrated_bytes": sum(one.size_bytes for one in cluster.migrations()),
        "never_routed": int((records.replica < 0).sum()),
        "replica_hours": sum(row["up_s"] for row in rows) / 3600.0,
        "replicas": rows,
    }


def token_gaps(cluster: Cluster) -> TokenGaps:
    """Return the gaps between the tokens of all engines of a cluster."""
    return merged_gaps([served.engine.token_gaps() for served in cluster.engines()])


def cluster_frame(cluster: Cluster, slo: Slo, front_end: FrontEnd = NO_FRONT_END) -> pd.DataFrame:
    """Return the table of ``records.parquet``: that of a replay, with each request's replica and number of moves."""
    records = cluster.records()
    frame = records_frame(records, slo, front_end)
    frame["replica"], frame["moves"] = records.replica, records.moves
    return frame.assign(**turn_columns(cluster.trace, cluster.arrival_order()))


def events_frame(cluster: Cluster) -> pd.DataFrame:
    """Return the table of ``events.parquet``: one row per phase change of a replica."""
    import pandas as pd

    rows = cluster.events()
    return pd.DataFrame(
        {
            "time_s": [event.time_s for event in rows],
            "replica": [event.replica for event in rows],
            "phase": [event.phase.name.lower() for event in rows],
            "moved": [event.moved for event in rows],
        }
    )


def run(cfg: DictConfig) -> tuple[Cluster, dict[str, Any]]:
    """Replay one configuration; return the cluster and its figures."""
    cluster = build_cluster(cfg)
    return cluster, _serve(cfg, cluster)


def _serve(cfg: DictConfig, cluster: Cluster) -> dict[str, Any]:
    """Serve the trace of a cluster; return its figures."""
    trace = cluster.trace
    with progress("replaying", len(trace), "requests") as report, cpu_clock() as cpu_s:
        progress_s = progress_period_s(trace, simulated_progress_steps(len(trace)))
        cluster.run(lambda _, routed: report(routed), progress_s)
        summary = cluster_figures(cluster, build(cfg.slo), cpu_s=cpu_s(), front_end=front_end_of(cfg))
    if is_measured(cfg):
        rushed = build_cluster(cfg, all_at_once(trace))
        rushed.run()
        summary |= rate_figures(rushed.records(), summary)
    return summary


def run_figures(cfg: DictConfig) -> dict[str, Any]:
    """Replay one configuration; return only its figures."""
    if cfg.cells > 1:  # of a table, whose replays are what processes share
        return cells_summary(merged([serve_cell(CellJob(cfg=cfg, cell=cell)) for cell in range(cfg.cells)]))
    return run(cfg)[1]


def cell_trace(cfg: DictConfig, cell: int) -> Trace:
    """Return the requests of a cell.

    With ``cell_requests=own`` its seed draws them. With ``share``, the requests of the trace are dealt to the cells in
    turn; where a trace has sessions, each session goes to one cell.

    Raises:
        ConfigError: if there are fewer requests, sessions or users of a closed loop than cells.
    """
    if cfg.cell_requests == "own":
        return build_trace(cell_config(cfg, cell))
    trace = build_trace(cfg)
    # Turns of a session stay together.
    dealt = np.arange(len(trace)) if trace.session is None else np.unique(trace.session, return_inverse=True)[1]
    if dealt.max() + 1 < cfg.cells:  # every cell says so, the first one too
        what = "requests" if trace.session is None else "sessions"
        raise ConfigError(f"the trace has {dealt.max() + 1} {what}, too few for cells={cfg.cells}; set fewer cells")
    if trace.session is not None and trace.think_s is not None:
        first = first_turns(trace.session)
        begun = np.bincount(dealt[first & np.isnan(trace.think_s)] % cfg.cells, minlength=cfg.cells)
        waits = np.bincount(dealt[first & ~np.isnan(trace.think_s)] % cfg.cells, minlength=cfg.cells)
        if ((begun == 0) & (waits > 0)).any():
            raise ConfigError(
                f"the trace is a closed loop of {begun.sum()} users, and {int((begun == 0).sum())} of "
                f"cells={cfg.cells} would have none; set fewer cells, or more users"
            )
    return trace.take(dealt % int(cfg.cells) == cell)


def serve_cell(job: CellJob) -> CellResult:
    """Serve one cell, and write its records where the job says."""
    cfg = job.cfg
    slo, front_end = build(cfg.slo), front_end_of(cfg)
    cluster = build_cluster(cell_config(cfg, job.cell), cell_trace(cfg, job.cell))
    with cpu_clock() as cpu_s:
        cluster.run()
        gaps = token_gaps(cluster)
        summary = cluster_figures(cluster, slo, cpu_s=cpu_s(), front_end=front_end, gaps=gaps)
    if job.folder is not None:
        write_parquet(job.folder / f"{job.cell:05d}.parquet", cluster_frame(cluster, slo, front_end))
    return result_of(cluster, summary, gaps, slo, front_end)


def _cluster(cfg: DictConfig) -> None:
    for one in (cfg, *variants(cfg).values()):
        check_cells(one)
    run_or_compare(cfg, write_run=_write_run, run_figures=run_figures, columns=_columns((cfg, *variants(cfg).values())))


def _columns(several: Sequence[DictConfig]) -> Columns:
    """Return the columns of a table of these configurations."""
    if any(one.engine.prefix_caching for one in several):
        return CACHE_COLUMNS
    migrate = any(one.migrate_bytes_per_s is not None for one in several)
    return MIGRATION_COLUMNS if migrate else CLUSTER_COLUMNS


def _write_run(cfg: DictConfig, folder: Path, label: str, made_by: dict[str, Any]) -> None:
    """Replay one configuration; write and print its results."""
    import pandas as pd

    if cfg.cells > 1:
        return _write_cells(cfg, folder, label, made_by)
    slo, cluster = build(cfg.slo), build_cluster(cfg)
    trace = cluster.trace
    made_by |= {"trace": about(trace)}
    begin_run(folder, cfg, made_by)
    summary = _serve(cfg, cluster)
    try:
        write_begun(folder, cfg, made_by)
        write_parquet(folder / "records.parquet", cluster_frame(cluster, slo, front_end_of(cfg)))
        write_parquet(folder / "events.parquet", events_frame(cluster))
        write_parquet(folder / "replicas.parquet", pd.DataFrame(summary["replicas"]))
        if cfg.plot:
            title = f"{label} on {len(cluster.replicas)} replicas"
            plot_replicas(folder / "cluster.png", cluster.records(), replica_lines(cluster), slo, title)
        write_json(folder / "summary.json", summary)  # last: a folder with this file is complete
    finally:  # a full disk loses the files, not the figures
        print_summary(summary, f"{label}: {len(trace):,} requests on {len(cluster.replicas)} replicas")
        for row in summary["replicas"]:
            busy = "-" if row["busy_share"] is None else f"{100 * row['busy_share']:.1f} %"
            print(f"{row['name']}: {row['requests']} requests, busy {busy}, {row['moved_away']} moved away")


def _write_cells(cfg: DictConfig, folder: Path, label: str, made_by: dict[str, Any]) -> None:
    """Serve all cells; write a file of records for each, and the figures of all together."""
    import pandas as pd

    made_by |= {"trace": about(cell_trace(cfg, 0)) | {"of": f"cell 0 of {cfg.cells}"}}
    begin_run(folder, cfg, made_by)
    records = folder / "records"
    for left in (*records.glob("*.parquet"), *records.glob(".*.part")):  # by a run that was killed or failed
        left.unlink()
    executor: Executor = build(cfg.executor)
    jobs = [CellJob(cfg=cfg, cell=cell, folder=records) for cell in range(cfg.cells)]
    began_s = time.perf_counter()
    whole = merged(executor(serve_cell, jobs))
    summary = cells_summary(whole) | {"wall_s": time.perf_counter() - began_s}
    try:
        write_begun(folder, cfg, made_by)
        write_parquet(folder / "replicas.parquet", pd.DataFrame(whole.replicas))
        write_json(folder / "summary.json", summary)  # last: a folder with this file is complete
    finally:  # a full disk loses the files, not the figures
        print_summary(summary, f"{label}: {cfg.cells:,} cells, {len(whole.replicas):,} replicas")
        least, middle, most = (f"{100 * one:.1f}" for one in summary["cell_attainment"] or [math.nan] * 3)
        print(f"SLO attainment of a cell: {least} to {most} %, median {middle} %")
        print(f"{summary['wall_s']:,.0f} s, at most {summary['peak_process_bytes'] / 1e9:.2f} GB in a process")


def replica_lines(cluster: Cluster) -> dict[str, ReplicaLine]:
    """Return what a figure shows of each replica: its iterations, and when it was down or loaded weights."""
    names = [one.name for one in cluster.replicas]
    served = [[one.engine.iterations() for one in cluster.engines() if one.replica == i] for i in range(len(names))]
    away: dict[int, list[tuple[float, float]]] = {i: [] for i in range(len(names))}
    since_s: dict[int, float] = {}
    for event in cluster.events():
        serves = event.phase in (Phase.SERVING, Phase.LEAVING)
        if not serves:
            since_s.setdefault(event.replica, event.time_s)
        elif event.replica in since_s:
            away[event.replica].append((since_s.pop(event.replica), event.time_s))
    for i, from_s in since_s.items():
        away[i].append((from_s, math.inf))
    return {name: ReplicaLine(merged_iterations(served[i]), away[i]) for i, name in enumerate(names) if served[i]}


def _quantile(values: Any, q: float) -> float | None:
    finite = values[np.isfinite(values)]
    return float(np.quantile(finite, q)) if len(finite) else None
