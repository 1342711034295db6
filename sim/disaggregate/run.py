"""``python -m sim.disaggregate``: disaggregated prefill and decode; one run folder, or a table of variants."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import simpy
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig

from sim.cluster.cluster import Cluster, Event, Replica
from sim.cluster.outages import check_replicas
from sim.cluster.routers import least_outstanding
from sim.compiled import cpu_clock
from sim.config import build, one_thread, run_command
from sim.cost.front_end import NO_FRONT_END, FrontEnd
from sim.cost.model_spec import ModelSpec
from sim.cost.plan import Plan, dense_plan, describe
from sim.disaggregate.disaggregate import Disaggregated, StagedRecords, decode_side, transfer_reduction, with_prefill
from sim.disaggregate.learned_roles import LearnedRoles
from sim.disaggregate.links import Link
from sim.disaggregate.members import RoleEvent, check_times, role_changes
from sim.engine.sim_engine import SimEngine
from sim.errors import ConfigError
from sim.limits import MOST_REPLICAS, check_count, check_ticks
from sim.policies import Fixed
from sim.progress import progress
from sim.replay.max_rate import all_at_once, is_measured, rate_figures
from sim.replay.run import (
    about,
    build_engine,
    build_parts,
    build_trace,
    front_end_of,
    progress_period_s,
    quality_figures,
    quality_of,
    shard_of,
    simulated_progress_steps,
    turn_columns,
)
from sim.replay.variants import VariantsConfig, run_or_compare, variants
from sim.results.metrics import Slo, distribution, merged_gaps, merged_iterations, records_frame, summarise
from sim.results.plots import ReplicaLine, plot_replicas
from sim.results.records import Iterations, Records
from sim.results.report import Columns, print_summary, shown_number
from sim.results.run_folder import begin_run, write_begun, write_json, write_parquet
from sim.traces.trace import Trace
from sim.types import Floats, Ints

if TYPE_CHECKING:
    import pandas as pd

STAGED_COLUMNS: Columns = {
    "SLO attainment": ("slo_attainment", 100.0, 1, " %"),
    "TTFT P95 (s)": ("ttft_s.p95", 1.0, 2, ""),
    "TPOT P50 (ms)": ("tpot_s.p50", 1e3, 1, ""),
    "TPOT P95 (ms)": ("tpot_s.p95", 1e3, 1, ""),
    "E2E mean (s)": ("e2e_s.mean", 1.0, 2, ""),
    "E2E P95 (s)": ("e2e_s.p95", 1.0, 2, ""),
    "KV sent per request (MB)": ("sent_bytes_mean", 1e-6, 2, ""),
    "KV reduction": ("transfer_reduction", 1.0, 2, "x"),
    "KV transfer, mean (ms)": ("transfer_s.mean", 1e3, 0, ""),
    "wait for KV room, mean (ms)": ("room_wait_s.mean", 1e3, 0, ""),
    "link busy": ("link_busy_share", 100.0, 1, " %"),
    "perplexity / dense": ("perplexity_ratio", 1.0, 3, ""),
    "preemptions": ("preemptions", 1.0, 0, ""),
}
"""As ``sim.results.report.SUMMARY_COLUMNS``. KV reduction: bytes that the dense model would have sent for the same
requests, over those sent. wait for KV room: from the end of its last prefill until a request's KV begins to be sent.
link busy: of the time in which the replicas of the links prefill."""
CHANGE_COLUMNS: Columns = {
    **STAGED_COLUMNS,
    "moved": ("moved", 1.0, 0, ""),
    "recomputed (k tokens)": ("recomputed_tokens", 1e-3, 0, ""),
    "role changes": ("role_changes", 1.0, 0, ""),
}
"""Of systems of which one has outages or changes roles. moved: requests that another replica had before."""


@dataclass(kw_only=True)
class DisaggregateConfig(VariantsConfig):
    """A replay with disaggregated prefill and decode.

    prefill_replicas, decode_replicas: how many of each. With 0 prefill replicas, all replicas do both stages behind the
        router least_outstanding: the baseline of disaggregation.
    link_bytes_per_s, link_latency_s: of the link out of each prefill replica, or out of each of its GPUs, where
        ``gpu.tp`` GPUs divide the model; they send their shares at once. one_link: whether they share one.
    overlap: whether KV is sent while its prompt is computed.
    outages: when replicas are down; those that begin with prefill are counted first.
    load_bytes_per_s: bandwidth at which each GPU of a replica loads weights: all of them when it returns, those that it
        lacks when it changes its role.
    start_s, turn_s: seconds that a return, or a change of role, takes in addition to loading.
    roles: decides how many replicas prefill while the system serves.
    """

    prefill_replicas: int
    decode_replicas: int
    link_bytes_per_s: float
    link_latency_s: float
    one_link: bool
    overlap: bool
    outages: Any
    roles: Any
    load_bytes_per_s: float = 2e9
    start_s: float = 10.0
    turn_s: float = 0.0


ConfigStore.instance().store(name="disaggregate_schema", node=DisaggregateConfig)


def disaggregate_command() -> None:
    """Run ``python -m sim.disaggregate``."""
    one_thread()
    run_command(_disaggregate, "disaggregate")


def plan_of(cfg: DictConfig) -> Plan:
    """Return the plan of a configuration.

    Raises:
        ConfigError: for a policy that changes plans, because prefill must send what decode expects.
    """
    policy = build_parts(cfg).policy
    if not isinstance(policy, Fixed):
        raise ConfigError(
            "disaggregated serving runs one plan; choose a fixed policy, e.g. policy=dense or policy=pdtrim"
        )
    return policy.first_plan


def build_system(cfg: DictConfig, decode_cfg: DictConfig | None = None, *, trace: Trace | None = None) -> Disaggregated:
    """Build the prefill and decode replicas of a configuration.

    decode_cfg: that of decode if it differs. trace: takes the place of the configuration's.
    """
    plan, quality = plan_of(cfg), quality_of(cfg)
    nll = quality.charge if quality is not None else None

    def side(of: DictConfig, own: Plan, priced: Any) -> Callable[[simpy.Environment], SimEngine]:
        return lambda env: build_engine(of, env=env, external_clock=True, plan=own, quality_nll=priced)[0]

    prefill, decode = int(cfg.prefill_replicas), int(cfg.decode_replicas)
    as_prefill = side(cfg, plan, nll)
    as_decode = side(decode_cfg or cfg, decode_side(plan), with_prefill(nll, plan.prefill))
    roles = build(cfg.roles)
    trace = build_trace(cfg) if trace is None else trace
    if isinstance(roles, LearnedRoles):
        roles.check_served(build(cfg.model).name, prefill + decode)
    if roles is not None:
        check_ticks(float(roles.period_s), float(trace.arrival_s[-1]), "roles.period_s")
    return Disaggregated(
        trace,
        plan=plan,
        prefill=[as_prefill] * prefill,
        decode=[as_decode] * decode,
        turned=None if roles is None else [as_decode] * prefill + [as_prefill] * decode,
        roles=roles,
        outages=build(cfg.outages),
        load_bytes_per_s=float(cfg.load_bytes_per_s),
        start_s=float(cfg.start_s),
        turn_s=float(cfg.turn_s),
        link_bytes_per_s=float(cfg.link_bytes_per_s),
        link_latency_s=float(cfg.link_latency_s),
        one_link=bool(cfg.one_link),
        overlap=bool(cfg.overlap),
    )


@dataclass(frozen=True, slots=True)
class Served:
    """A system that has served its trace: records, engines by name, links, and CPU seconds without compilation.

    events: phase changes of the replicas; the baseline's have no role. link_seconds: for how long links were there to
        be used until a time. turns: ``turn_columns`` of a trace with sessions, which the baseline alone takes.
    """

    trace: Trace
    records: Records
    engines: Mapping[str, SimEngine]
    links: Sequence[Link]
    events: Sequence[RoleEvent | Event]
    cpu_s: float
    link_seconds: Callable[[float], float] = lambda end_s: end_s
    turns: Mapping[str, Ints] = field(default_factory=dict)


def serve(
    cfg: DictConfig, trace: Trace | None = None, on_built: Callable[[Trace], None] = lambda trace: None
) -> Served:
    """Serve the trace of a configuration; with no prefill replicas, the decode replicas do both stages.

    trace: takes the place of the configuration's. on_built: called with the trace once the system is built, before it
    serves.
    """
    if cfg.prefill_replicas < 0 or cfg.decode_replicas < 1:
        raise ConfigError(
            f"prefill_replicas is {cfg.prefill_replicas} and decode_replicas {cfg.decode_replicas}; decode needs at "
            "least one replica, and without prefill replicas it does both stages: set e.g. prefill_replicas=2 "
            "decode_replicas=2"
        )
    check_times(float(cfg.load_bytes_per_s), float(cfg.start_s), float(cfg.turn_s))
    check_count(
        cfg.prefill_replicas + cfg.decode_replicas,
        "replicas",
        MOST_REPLICAS,
        "lower prefill_replicas or decode_replicas",
    )
    trace = build_trace(cfg) if trace is None else trace
    with progress("replaying", len(trace), "requests") as report, cpu_clock() as cpu_s:
        if int(cfg.prefill_replicas) == 0:
            cluster = _baseline(cfg, trace)
            on_built(trace)
            progress_s = progress_period_s(trace, simulated_progress_steps(len(trace)))
            cluster.run(lambda _, routed: report(routed), progress_s)
            engines = {f"replica {i}": one.engine for i, one in enumerate(cluster.engines())}
            turns = turn_columns(trace, cluster.arrival_order())
            return Served(trace, cluster.records(), engines, (), cluster.events(), cpu_s(), turns=turns)
        system = build_system(cfg, trace=trace)
        on_built(trace)
        system.run(report)
        records, engines, events = system.records(), system.engines(), system.events()
        return Served(trace, records, engines, system.links, events, cpu_s(), system.link_seconds)


def _baseline(cfg: DictConfig, trace: Trace) -> Cluster:
    """Return replicas that do both stages.

    Raises:
        ConfigError: for roles that change.
    """
    if build(cfg.roles) is not None:
        raise ConfigError("with prefill_replicas=0 all replicas do both stages and no role can change; set roles=fixed")
    outages, count = build(cfg.outages), int(cfg.decode_replicas)
    check_replicas(outages, count, "decode_replicas=8")
    return Cluster(
        trace,
        [Replica(name=str(i), build=_both_stages(cfg), outages=outages(i)) for i in range(count)],
        least_outstanding(),
        seed=cfg.seed,
        load_bytes_per_s=float(cfg.load_bytes_per_s),
        start_s=float(cfg.start_s),
    )


def _both_stages(cfg: DictConfig) -> Callable[[simpy.Environment], tuple[SimEngine, Any]]:
    return lambda env: build_engine(cfg, env=env, external_clock=True)


NOTHING_SENT: dict[str, Any] = {
    "sent_bytes_mean": None,
    "transfer_reduction": None,
    "transfer_s": {"mean": None},
    "room_wait_s": {"mean": None},
    "link_busy_share": None,
}


def transfer_figures(staged: StagedRecords, plan: Plan, model: ModelSpec) -> dict[str, Any]:
    """Return a run's figures on the KV that was sent, except the links' busy share."""
    shipped = np.isfinite(staged.sent_s)
    prompts, sent = staged.prompt_tokens[shipped], staged.sent_bytes[shipped]
    dense_bytes = int(prompts.sum()) * model.num_layers * model.kv_bytes_per_token_layer
    return {
        "sent_bytes_mean": float(sent.mean()) if len(sent) else None,
        "transfer_reduction": float(dense_bytes / sent.sum()) if sent.sum() else None,
        "reduction_at_mean_prompt": transfer_reduction(model, plan, max(int(prompts.mean()), 1)) if len(sent) else None,
        "transfer_s": distribution(staged.sent_s - staged.send_s),
        "room_wait_s": distribution(np.maximum(staged.send_s - staged.prefilled_s, 0.0)),
    }


def plan_quality(cfg: DictConfig, quality_nll: float | None, iterations: Iterations) -> dict[str, Any]:
    """Return what is known of the quality of the plan that requests ran (``quality_figures``).

    ``perplexity_ratio`` is its perplexity over dense; None without a quality table.
    """
    quality, ratio = quality_of(cfg), None
    if quality is not None and quality_nll is not None:
        ratio = float(np.exp(quality_nll - quality.nll(dense_plan(build(cfg.model)))))
    return {"perplexity_ratio": ratio, **quality_figures(cfg, [(0.0, plan_of(cfg))], iterations)}


def figures_of(cfg: DictConfig, served: Served) -> dict[str, Any]:
    """Return the figures of a system that has served its trace, as in ``summary.json``."""
    plan, model = plan_of(cfg), shard_of(cfg)
    extra = {"plan": describe(plan), **NOTHING_SENT}
    if isinstance(served.records, StagedRecords):
        end_s = max(float(np.nanmax(served.records.finish_s, initial=0.0)), 1e-9)
        extra |= transfer_figures(served.records, plan, model)
        extra["link_busy_share"] = sum(link.busy_s for link in served.links) / served.link_seconds(end_s)
    iterations = merged_iterations([engine.iterations() for engine in served.engines.values()])
    summary = summarise(
        served.records,
        iterations,
        merged_gaps([engine.token_gaps() for engine in served.engines.values()]),
        build(cfg.slo),
        cpu_s=served.cpu_s,
        front_end=front_end_of(cfg),
    )
    summary |= plan_quality(cfg, summary["quality_nll"], iterations)
    summary["moved"] = int((served.records.moves > 0).sum())  # type: ignore[attr-defined]
    summary["role_changes"] = role_changes(served.events)
    if is_measured(cfg):
        summary |= rate_figures(serve(cfg, all_at_once(served.trace)).records, summary)
    return summary | extra


def run(cfg: DictConfig) -> tuple[Records, dict[str, Any]]:
    """Replay one configuration; return its records and figures."""
    served = serve(cfg)
    return served.records, figures_of(cfg, served)


def run_figures(cfg: DictConfig) -> dict[str, Any]:
    """Replay one configuration; return only its figures."""
    return run(cfg)[1]


def _replicas_change(cfg: DictConfig) -> bool:
    """Return whether replicas have outages or change their roles."""
    return build(cfg.roles) is not None or cfg.outages.get("_target_") != "sim.cluster.outages.none"


def _disaggregate(cfg: DictConfig) -> None:
    change = any(_replicas_change(one) for one in (cfg, *variants(cfg).values()))
    columns = CHANGE_COLUMNS if change else STAGED_COLUMNS
    run_or_compare(cfg, write_run=_write_run, run_figures=run_figures, columns=columns)


def _write_run(cfg: DictConfig, folder: Path, label: str, made_by: dict[str, Any]) -> None:
    """Replay one configuration; write and print its results."""
    slo = build(cfg.slo)
    served = serve(cfg, on_built=lambda trace: begin_run(folder, cfg, {**made_by, "trace": about(trace)}))
    made_by |= {"trace": about(served.trace)}
    records, summary = served.records, figures_of(cfg, served)
    title = f"{label}: {cfg.prefill_replicas} prefill and {cfg.decode_replicas} decode replicas"
    try:
        write_begun(folder, cfg, made_by)
        frame = staged_frame(records, slo, front_end_of(cfg)).assign(**served.turns)
        write_parquet(folder / "records.parquet", frame)
        write_parquet(folder / "events.parquet", events_frame(served.events))
        if cfg.plot:
            lines = {name: ReplicaLine(engine.iterations()) for name, engine in served.engines.items()}
            plot_replicas(folder / "disaggregate.png", records, lines, slo, title, _transfers_s(records))
        write_json(folder / "summary.json", summary)  # last: a folder with this file is complete
    finally:  # a full disk loses the files, not the figures
        print_staged(summary, title)


def _transfers_s(records: Records) -> list[tuple[Floats, str]] | None:
    """Return the waits for room and the transfers of KV, for a figure; None where nothing is sent."""
    if not isinstance(records, StagedRecords):
        return None
    waits_s = np.column_stack([records.prefilled_s, np.maximum(records.send_s, records.prefilled_s)])
    return [(np.column_stack([records.send_s, records.sent_s]), "under way"), (waits_s, "waiting for room")]


def staged_frame(records: Records, slo: Slo, front_end: FrontEnd = NO_FRONT_END) -> pd.DataFrame:
    """Return the table of ``records.parquet``."""
    frame = records_frame(records, slo, front_end)
    for name in ("prefill_replica", "decode_replica", "sent_bytes", "prefilled_s", "send_s", "sent_s", "moves"):
        if hasattr(records, name):
            frame[name] = getattr(records, name)
    return frame


def events_frame(events: Sequence[RoleEvent | Event]) -> pd.DataFrame:
    """Return the table of ``events.parquet``: one row per phase change of a replica; without roles, "both"."""
    import pandas as pd

    return pd.DataFrame(
        {
            "time_s": [event.time_s for event in events],
            "replica": [event.replica for event in events],
            "role": [event.role.name.lower() if isinstance(event, RoleEvent) else "both" for event in events],
            "phase": [event.phase.name.lower() for event in events],
            "moved": [event.moved for event in events],
        }
    )


def print_staged(summary: Mapping[str, Any], title: str) -> None:
    """Print the figures of one run."""
    print_summary(summary, title)
    for name in ("sent_bytes_mean", "transfer_reduction", "link_busy_share", "perplexity_ratio"):
        print(name, shown_number(summary[name]))
