"""``python -m sim.cluster``: many replicas, one run folder; or several variants of a cluster over seeds, one table."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import simpy
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from sim.cluster.cluster import Cluster, Replica
from sim.config import SweepConfig, build, one_thread, run_command, with_differences
from sim.engine.sim_engine import SimEngine
from sim.errors import ConfigError, nearest
from sim.policies import Fixed, Policy
from sim.replay.loop import decisions
from sim.replay.run import build_engine, build_parts, build_trace
from sim.replay.sweep import Executor, cases_of, config_of
from sim.results.metrics import Slo, merged_gaps, merged_iterations, met_slo, records_frame, summarise
from sim.results.records import Status
from sim.results.report import Columns, markdown, print_rows, print_summary
from sim.results.run_folder import provenance, write_json, write_parquet, write_text

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
CACHE_COLUMNS: Columns = {"cached prompt tokens": ("cached_share", 100.0, 1, " %"), **CLUSTER_COLUMNS}
"""Of clusters of which one has a prefix cache. cached prompt tokens: share of the prompts' tokens."""


@dataclass(kw_only=True)
class ClusterConfig(SweepConfig):
    """A replay on many replicas.

    replicas: name -> what differs from the rest of the configuration, as ``key: value`` (``gpu``, ``model``,
        ``policy``, ... name files of their groups), and ``count``, how many there are of it; 1 by default.
    router, outages, autoscaler: who decides where; when replicas are away; how many serve.
    load_bytes_per_s, start_s: how fast a replica that comes back loads its weights, and what it takes besides.
    keep_iterations: whether every iteration is kept; without, memory is saved, and what is counted from them is null.
    variants: label -> what differs, as in ``replicas``; one table of all in the place of one run.
    only: labels to run; all when empty.
    """

    replicas: dict[str, Any]
    router: Any
    outages: Any
    autoscaler: Any
    load_bytes_per_s: float = 2e9
    start_s: float = 10.0
    keep_iterations: bool = True
    variants: dict[str, Any] = field(default_factory=dict)
    only: list[str] = field(default_factory=list)


ConfigStore.instance().store(name="cluster_schema", node=ClusterConfig)


def cluster_command() -> None:
    """Run ``python -m sim.cluster``."""
    one_thread()
    run_command(_cluster, "cluster")


def replicas_of(cfg: DictConfig) -> list[Replica]:
    """Return the replicas of a configuration.

    Each has its own seed, so that what is drawn for it (a budget, say) differs; the first has the configuration's.

    Raises:
        ConfigError: for none, for a count below 1, or a difference that names no key or file.
    """
    outages = build(cfg.outages)
    found: list[Replica] = []
    for name, words in cfg.replicas.items():
        differences = dict(OmegaConf.to_container(words) or {})  # type: ignore[arg-type]
        count = differences.pop("count", 1)
        if not isinstance(count, int) or count < 0:
            raise ConfigError(f"replicas.{name}.count is {count}; it must be a whole number, 0 for none of it")
        one = with_differences(cfg, differences, f"replicas.{name}")
        for k in range(count):
            i = len(found)
            mine = one.copy()
            mine.seed = cfg.seed + 1000 * i
            found.append(_replica(mine, f"{name}_{k}" if count > 1 else str(name), outages(i)))
    if not found:
        raise ConfigError("replicas has none; give at least one, e.g. replicas.main.count=2")
    return found


def _replica(cfg: DictConfig, name: str, outages: Any) -> Replica:
    parts = build_parts(cfg)

    def make(env: simpy.Environment) -> tuple[SimEngine, Policy]:
        return build_engine(cfg, env=env, external_clock=True, keep_iterations=bool(cfg.keep_iterations))

    def moments() -> Iterator[float]:
        return decisions(float(cfg.tick_s), parts.budget.change_s[1:])

    if not isinstance(parts.policy, Fixed) and not cfg.tick_s > 0:
        raise ConfigError(f"tick_s is {cfg.tick_s}; it must be above 0 seconds")
    asked = None if isinstance(parts.policy, Fixed) else moments
    return Replica(name=name, build=make, decisions_s=asked, outages=outages)


def build_cluster(cfg: DictConfig) -> Cluster:
    """Build the cluster of a configuration."""
    return Cluster(
        build_trace(cfg),
        replicas_of(cfg),
        build(cfg.router),
        seed=cfg.seed,
        load_bytes_per_s=float(cfg.load_bytes_per_s),
        start_s=float(cfg.start_s),
        autoscaler=build(cfg.autoscaler),
    )


def replica_figures(cluster: Cluster, slo: Slo) -> list[dict[str, Any]]:
    """Return the figures of each replica: one row each, as ``replicas.parquet`` holds them.

    Requests count where they were served last. up_s: seconds from beginning to load to the end, over all its engines.
    busy_share: of these, in iterations.
    """
    records, end_s = cluster.records(), cluster.end_s
    met = met_slo(records, slo)
    rows = []
    for i, replica in enumerate(cluster.replicas):
        mine = records.replica == i
        served = [one for one in cluster.engines() if one.replica == i]
        states = [one.engine.observe(min(one.ended_s, end_s)) for one in served]
        up_s = sum(min(one.ended_s, end_s) - one.begun_s for one in served)
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


def cluster_figures(cluster: Cluster, slo: Slo, *, cpu_s: float = 0.0) -> dict[str, Any]:
    """Return the figures of a cluster, as ``summary.json`` holds them: those of a replay, and more."""
    engines, records = cluster.engines(), cluster.records()
    iterations = merged_iterations([served.engine.iterations() for served in engines])
    rows = replica_figures(cluster, slo)
    summary = summarise(
        records,
        iterations,
        merged_gaps([served.engine.token_gaps() for served in engines]),
        slo,
        transitions=sum(row["plan_changes"] for row in rows),
        budget_violation_s=sum(row["budget_violation_s"] for row in rows),
        not_arrived=len(cluster.trace) - len(records),
        cpu_s=cpu_s,
        end_s=cluster.end_s,
    )
    if not len(iterations):
        summary |= dict.fromkeys(("recomputed_tokens", "kv_peak_share", "extrapolated_share"))
        summary["iterations"] = sum(row["iterations"] for row in rows)
    return summary | {
        "moved": int((records.moves > 0).sum()),
        "moves": int(records.moves.sum()),
        "never_routed": int((records.replica < 0).sum()),
        "replica_hours": sum(row["up_s"] for row in rows) / 3600.0,
        "replicas": rows,
    }


def cluster_frame(cluster: Cluster, slo: Slo) -> pd.DataFrame:
    """Return the table that ``records.parquet`` holds: that of a replay, where each was served, how often moved."""
    records = cluster.records()
    frame = records_frame(records, slo)
    frame["replica"], frame["moves"] = records.replica, records.moves
    return frame


def events_frame(cluster: Cluster) -> pd.DataFrame:
    """Return the table that ``events.parquet`` holds: one row a change of a replica's phase."""
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
    started_cpu_s = time.process_time()
    cluster.run()
    return cluster, cluster_figures(cluster, build(cfg.slo), cpu_s=time.process_time() - started_cpu_s)


def run_figures(cfg: DictConfig) -> dict[str, Any]:
    """Replay one configuration; return its figures alone."""
    return run(cfg)[1]


def variants(cfg: DictConfig) -> dict[str, DictConfig]:
    """Return one configuration a label, each with its differences applied; the configuration itself where none are.

    Raises:
        ConfigError: for a label that does not exist, or a difference that names no key or file.
    """
    labels = {str(label): words for label, words in cfg.variants.items()}
    for label in cfg.only:
        if label not in labels:
            raise ConfigError(f"only: there is no label {label!r}; {nearest(label, labels)}")
    return {
        label: with_differences(cfg, words or {}, f"variants.{label}")
        for label, words in labels.items()
        if not cfg.only or label in cfg.only
    }


def _cluster(cfg: DictConfig) -> None:
    folder = Path(HydraConfig.get().runtime.output_dir)
    label = cfg.label or str(HydraConfig.get().runtime.choices["trace"])
    made_by = provenance(cfg.seed)
    write_text(folder / "config.yaml", OmegaConf.to_yaml(cfg, resolve=True))
    if cfg.variants or cfg.seeds or cfg.windows:
        caching = any(one.engine.prefix_caching for one in (cfg, *variants(cfg).values()))
        compare_variants(cfg, folder, label, made_by, run_figures, CACHE_COLUMNS if caching else CLUSTER_COLUMNS)
        return
    cluster, summary = run(cfg)
    slo, trace = build(cfg.slo), cluster.trace
    about = {"source": trace.source, "sha256": trace.content_hash(), "history": trace.history}
    write_json(folder / "provenance.json", {**made_by, "trace": about})
    write_parquet(folder / "records.parquet", cluster_frame(cluster, slo))
    write_parquet(folder / "events.parquet", events_frame(cluster))
    import pandas as pd

    write_parquet(folder / "replicas.parquet", pd.DataFrame(summary["replicas"]))
    write_json(folder / "summary.json", summary)  # last: a folder with a summary is complete
    print_summary(summary, f"{label}: {len(trace):,} requests on {len(cluster.replicas)} replicas")
    for row in summary["replicas"]:
        busy = "-" if row["busy_share"] is None else f"{100 * row['busy_share']:.1f} %"
        print(f"{row['name']}: {row['requests']} requests, busy {busy}, {row['moved_away']} moved away")
    print(f"files: {folder}")


def compare_variants(
    cfg: DictConfig,
    folder: Path,
    label: str,
    made_by: dict[str, Any],
    task: Callable[[DictConfig], dict[str, Any]],
    columns: Columns,
) -> None:
    """Do a task for every variant at every seed and window; write and print one table."""
    cases = cases_of(cfg)
    jobs = [(name, config_of(one, case)) for name, one in (variants(cfg) or {"cluster": cfg}).items() for case in cases]
    executor: Executor = build(cfg.executor)
    summaries = executor(task, [one for _, one in jobs])
    rows: dict[str, list[Mapping[str, Any]]] = {}
    for (name, _), summary in zip(jobs, summaries, strict=True):
        rows.setdefault(name, []).append(summary)
    title = label
    if len(cases) > 1:
        title += f": mean ± standard deviation of {len(cases)} replays"
    write_text(folder / "compare.md", markdown(rows, "variant", columns))
    names = [case.name.replace("_", " ") for case in cases]
    content = {"provenance": made_by, "title": title, "cases": names, "summaries": rows}
    write_json(folder / "compare.json", content)  # last: a folder with it is complete
    print_rows(rows, title, "variant", columns)
    print(f"files: {folder}")


def _quantile(values: Any, q: float) -> float | None:
    finite = values[np.isfinite(values)]
    return float(np.quantile(finite, q)) if len(finite) else None
