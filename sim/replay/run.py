"""From a configuration to a run folder: build the trace, the server and the policy, replay, write what happened."""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from rich.console import Console

from sim.compiled import cpu_clock
from sim.config import build, name_of
from sim.config.failures import interrupts_held_back
from sim.cost.front_end import NO_FRONT_END, FrontEnd, into_queue
from sim.cost.gpu import Gpu
from sim.cost.memory import weight_bytes
from sim.cost.model_spec import ModelSpec
from sim.cost.plan import Plan, dense_plan, describe
from sim.cost.quality import FittedQuality, PublishedQuality
from sim.engine.budget import Budget
from sim.engine.protocol import Engine, EngineConfig, check_hash_blocks
from sim.engine.server_spec import ServerSpec, find_quality, named_quality
from sim.engine.sim_engine import SimEngine
from sim.policies import Fixed, Policy, PolicyContext, checked_policy
from sim.progress import progress, say
from sim.replay.loop import replay
from sim.replay.max_rate import all_at_once, is_measured, rate_figures, without_queue_limit
from sim.replay.watch import Watched, outside_share, quality_note
from sim.results.metrics import (
    Slo,
    iterations_frame,
    kept_share_frame,
    met_slo,
    records_frame,
    summarise,
    transitions_frame,
)
from sim.results.plots import plot_replay
from sim.results.records import Iterations, Records, TokenGaps, Transitions
from sim.results.report import print_summary
from sim.results.run_folder import begin_run, provenance, write_begun, write_json, write_parquet
from sim.results.utility import utility
from sim.traces.sessions import turn_numbers
from sim.traces.trace import Trace
from sim.traces.transforms import apply_steps
from sim.types import Ints


class RecordingEngine(Engine, Protocol):
    """An engine with everything that a run folder records."""

    budget: Budget
    config: EngineConfig

    def iterations(self) -> Iterations:
        """Return one entry per iteration."""
        ...

    def token_gaps(self) -> TokenGaps:
        """Return the gaps between successive tokens of a request."""
        ...

    def transitions(self) -> Transitions:
        """Return one entry per plan change."""
        ...

    def kept_share(self) -> tuple[tuple[float, float], ...]:
        """Return (time_s, resident share of the dense weights' bytes), one entry per change."""
        ...

    @property
    def budget_violation_s(self) -> float:
        """Seconds in which the held bytes exceeded the budget."""
        ...


@dataclass(frozen=True, slots=True)
class Parts:
    """What a replay is made of besides its trace, whichever engine serves it."""

    server: ServerSpec
    policy: Policy
    budget: Budget

    @property
    def model(self) -> ModelSpec:
        """The served model."""
        return self.server.model

    @property
    def gpu(self) -> Gpu:
        """The device."""
        return self.server.gpu

    @property
    def config(self) -> EngineConfig:
        """The engine's settings."""
        return self.server.config


def shard_of(cfg: DictConfig) -> ModelSpec:
    """Return what each GPU of a configuration holds of its model."""
    model: ModelSpec = build(cfg.model)
    return model.shard(build(cfg.gpu).tp)


def front_end_of(cfg: DictConfig) -> FrontEnd:
    """Build the front end of a configuration; a real engine's has none."""
    node = cfg.frontend if "frontend" in cfg else None
    return NO_FRONT_END if node is None else build(node)


def sent_trace(cfg: DictConfig) -> Trace:
    """Build the trace of a configuration, its workload steps applied, as clients send it."""
    trace = build(cfg.trace)
    steps = [build(step) for step in cfg.workload.steps]
    return apply_steps(trace, steps, seed=cfg.seed)


def build_trace(cfg: DictConfig) -> Trace:
    """Build the trace of a configuration, its workload steps applied, as the engine's queue receives it."""
    return into_queue(sent_trace(cfg), front_end_of(cfg))


def server_spec(cfg: DictConfig) -> ServerSpec:
    """Build the server of a configuration: model, device, engine settings and prices.

    Raises:
        RapLabError: for a calibration or a quality table that does not exist, or is of another model.
    """
    return ServerSpec.from_parts(
        build(cfg.model),
        build(cfg.gpu),
        build(cfg.engine),
        latency=cfg.latency,
        quality=cfg.quality_table,
        workspace_bytes=cfg.workspace_bytes,
        fixed_s=cfg.fixed_s,
        host_floor_s=cfg.host_floor_s,
        nested_overhead=cfg.nested_overhead,
        slowdown=cfg.slowdown,
    )


def build_parts(cfg: DictConfig) -> Parts:
    """Build the server, the policy and the budget of a configuration."""
    server = server_spec(cfg)
    policy = checked_policy(build(cfg.policy)(PolicyContext.of(server)))
    return Parts(server, policy, build(cfg.budget)(server.budget_context(policy.first_plan)))


def quality_of(cfg: DictConfig) -> FittedQuality | PublishedQuality | None:
    """Return the quality model of a configuration; None where there is none for its model."""
    table = cfg.quality_table or find_quality(name_of(cfg.model))
    return named_quality(table) if table is not None else None


def build_engine(cfg: DictConfig, **overrides: Any) -> tuple[SimEngine, Policy]:
    """Build the simulated engine and the policy of a configuration.

    Args:
        overrides: arguments of ``SimEngine``, such as ``env`` or ``plan``; they take precedence over the configured
            ones.
    """
    parts = build_parts(cfg)
    arguments = {"plan": parts.policy.first_plan, "budget": parts.budget, **overrides}
    return parts.server.build_engine(**arguments), parts.policy


def replay_with(
    cfg: DictConfig,
    trace: Trace,
    engine: RecordingEngine,
    policy: Policy,
    on_progress: Callable[[float, int], None] | None = None,
    progress_s: float = math.inf,
) -> None:
    """Replay a trace; the policy decides every ``tick_s`` of the configuration and whenever the budget changes.

    on_progress, progress_s: as in ``replay``.
    """
    check_hash_blocks(engine.config, trace)
    tick_s = None if isinstance(policy, Fixed) else float(cfg.tick_s)  # a fixed plan needs no decisions
    trained_s = getattr(policy.policy if isinstance(policy, Watched) else policy, "trained_tick_s", None)
    if trained_s is not None and tick_s != trained_s:
        say(f"the policy decided every {trained_s:g} s in training, and every {tick_s:g} s here: tick_s={trained_s:g}")
    changes_s = engine.budget.change_s[1:]
    replay(
        trace,
        engine,
        policy,
        tick_s=tick_s,
        also_at_s=changes_s,
        on_progress=on_progress,
        progress_s=progress_s,
    )


def measured_rate(
    cfg: DictConfig, trace: Trace, summary: Mapping[str, Any], policy: Policy | None = None
) -> dict[str, float | None]:
    """Return the maximum rate of a configuration and the utilization of its replay; nothing if it is not measured.

    Args:
        trace: of the replay. summary: its figures. policy: as in ``is_measured``.
    """
    if not is_measured(cfg, policy):
        return {}
    parts = build_parts(cfg)
    tried = without_queue_limit(parts.policy)
    engine = parts.server.build_engine(tried.first_plan, parts.budget, keep_iterations=False)
    replay_with(cfg, all_at_once(trace), engine, tried)
    return rate_figures(engine.records(), summary)


def figures(
    engine: RecordingEngine,
    slo: Slo,
    *,
    not_arrived: int = 0,
    cpu_s: float = 0.0,
    front_end: FrontEnd = NO_FRONT_END,
) -> dict[str, Any]:
    """Return the figures of what an engine has served so far (``summarise``)."""
    return summarise(
        engine.records(),
        engine.iterations(),
        engine.token_gaps(),
        slo,
        transitions=len(engine.transitions()),
        budget_violation_s=engine.budget_violation_s,
        not_arrived=not_arrived,
        cpu_s=cpu_s,
        front_end=front_end,
    )


def turn_columns(trace: Trace, order: Ints) -> dict[str, Ints]:
    """Return what the records of a trace with sessions have in addition; nothing for another trace.

    ``session`` is the session's number, ``turn`` counts its requests from 0, and ``trace_row`` is the place in the
    trace, because records are in the order of arrival.

    Args:
        order: ``Engine.arrival_order``.
    """
    if trace.session is None:
        return {}
    return {"session": trace.session[order], "turn": turn_numbers(trace.session)[order], "trace_row": order}


def about(trace: Trace) -> dict[str, Any]:
    """Return what ``provenance.json`` says of a trace."""
    return {"source": trace.source, "sha256": trace.content_hash(), "history": trace.history}


def quality_figures(cfg: DictConfig, plans: list[tuple[float, Plan]], iterations: Iterations) -> dict[str, Any]:
    """Return what is known of the quality of the plans of a run; ``plans`` as in ``outside_share``.

    ``quality_outside_share`` is the share of computed tokens under plans outside the range that the quality was fitted
    on, which are charged its upper bound; None without a quality. ``quality_note`` is a sentence for people, or None.
    """
    quality = quality_of(cfg)
    outside = None if quality is None else outside_share(quality, plans, iterations)
    return {"quality_outside_share": outside, "quality_note": quality_note(quality, plans, outside)}


def utility_of(cfg: DictConfig, records: Records, slo: Slo, front_end: FrontEnd = NO_FRONT_END) -> float | None:
    """Return the utility of the requests of a run (``sim.results.utility``); None where their quality is unknown."""
    quality = quality_of(cfg)
    if quality is None:
        return None
    dense_nll = quality.nll(dense_plan(build(cfg.model)))
    found = utility(met_slo(records, slo, front_end), records.quality_nll, dense_nll)
    return None if math.isnan(found) else found


def server_figures(cfg: DictConfig, first_plan: Plan, budget: Sequence[tuple[float, int]]) -> dict[str, Any]:
    """Return what no table of a run folder says of its server, the content of ``server.json``.

    Bytes are those of one GPU. ``first_plan`` is the plan at 0 s (``describe``), ``budget`` a list of [time in
    seconds, bytes], one per change. ``dense_nll`` is that of the dense model in nats per token; None without a quality
    table.

    Args:
        first_plan: of the policy. budget: (time_s, bytes), one entry per change (``Budget.steps``).
    """
    model, quality = shard_of(cfg), quality_of(cfg)
    dense = dense_plan(model)
    return {
        "model": model.name,
        "gpu": build(cfg.gpu).title,
        "num_layers": model.num_layers,
        "weight_bits": model.weight_bits,
        "dense_weight_bytes": weight_bytes(model, dense),
        "dense_nll": None if quality is None else quality.nll(dense),
        "first_plan": describe(first_plan),
        "budget": [[time_s, size] for time_s, size in budget],
    }


def write_tables(
    folder: Path,
    slo: Slo,
    records: Records,
    transitions: Transitions,
    kept_share: Sequence[tuple[float, float]],
    iterations: Iterations | None = None,
    front_end: FrontEnd = NO_FRONT_END,
    turns: Mapping[str, Ints] | None = None,
) -> None:
    """Write the tables of a run folder; the one of iterations, which is long, only if it is passed.

    turns: further columns of the records (``turn_columns``).
    """
    write_parquet(folder / "records.parquet", records_frame(records, slo, front_end).assign(**(turns or {})))
    write_parquet(folder / "transitions.parquet", transitions_frame(transitions))
    write_parquet(folder / "kept_share.parquet", kept_share_frame(kept_share))
    if iterations is not None:
        write_parquet(folder / "iterations.parquet", iterations_frame(iterations))


def simulated_progress_steps(requests: int) -> int:
    """Return how often a simulated replay stops to report: about 20,000 requests take 20 ms, a stop 10 us."""
    return min(200, requests // 20_000)


def progress_period_s(trace: Trace, steps: int) -> float:
    """Return the seconds of a trace between two reports of progress; at least 1, for a trace may arrive all at once."""
    return max(trace.duration_s / steps, 1.0) if steps else math.inf


def run_replay(
    cfg: DictConfig,
    build_engine: Callable[[DictConfig], tuple[RecordingEngine, Policy]] = build_engine,
    progress_steps: Callable[[int], int] = simulated_progress_steps,
    note: str = "",
) -> dict[str, Any]:
    """Replay on the engine that ``build_engine`` makes, write the run folder, print the figures; return the summary.

    progress_steps: number of requests -> how often to report progress where the policy decides nothing.
    note: what readers have to know of the quality, in place of what the quality table says of it; empty for that.
    """
    folder = Path(HydraConfig.get().runtime.output_dir)
    console = Console()
    slo, front_end = build(cfg.slo), front_end_of(cfg)
    trace = build_trace(cfg)
    engine, policy = build_engine(cfg)
    label = cfg.label or str(HydraConfig.get().runtime.choices["trace"])
    title = f"{label}: {len(trace):,} requests on {name_of(cfg.model)}, {build(cfg.gpu).title}"
    made_by = {**provenance(cfg.seed), "trace": about(trace)}
    begin_run(folder, cfg, made_by)
    interrupted, seen, late = False, Watched(policy), False
    try:
        with progress("replaying", len(trace), "requests") as report, cpu_clock() as cpu_s:

            def on_progress(time_s: float, done: int) -> None:
                report(done, f"at {min(time_s, trace.duration_s):,.0f} s of the trace")

            progress_s = progress_period_s(trace, progress_steps(len(trace)))
            replay_with(cfg, trace, engine, policy if isinstance(policy, Fixed) else seen, on_progress, progress_s)
    except KeyboardInterrupt:
        interrupted = True
    summary: dict[str, Any] = {}
    try:
        with interrupts_held_back():
            records, iterations = engine.records(), engine.iterations()
            summary = figures(engine, slo, not_arrived=len(trace) - len(records), cpu_s=cpu_s(), front_end=front_end)
            summary["interrupted"] = interrupted
    except KeyboardInterrupt:
        if not summary:  # a second one, which does not wait
            raise
        late = True
    with contextlib.suppress(KeyboardInterrupt):  # the replay itself is complete
        summary |= {} if interrupted or late else measured_rate(cfg, trace, summary, policy)
    with interrupts_held_back():
        summary |= {"utility": utility_of(cfg, records, slo, front_end)}
        summary |= quality_figures(cfg, seen.plans, iterations)
        if note:
            summary |= {"quality_outside_share": None, "quality_note": note}
        try:
            write_begun(folder, cfg, made_by)
            write_tables(
                folder,
                slo,
                records,
                engine.transitions(),
                engine.kept_share(),
                iterations if cfg.iterations else None,
                front_end,
                turn_columns(trace, engine.arrival_order()),
            )
            write_json(folder / "server.json", server_figures(cfg, policy.first_plan, engine.budget.steps))
            if cfg.plot:
                plot_replay(folder / "replay.png", records, iterations, slo, title, engine.budget.steps)
            write_json(folder / "summary.json", summary)  # last: a folder with a summary is complete
        finally:  # a full disk loses the files, not the figures
            print_summary(summary, title, console)
        if interrupted:
            kept = f"interrupted: kept the records of {len(records):,} requests that had arrived, in {folder}"
            console.print(kept, highlight=False)
        else:
            console.print(f"files: {folder}", highlight=False, soft_wrap=True)
    if interrupted:
        sys.exit(130)
    if late:
        raise KeyboardInterrupt
    return summary
