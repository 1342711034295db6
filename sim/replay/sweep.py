"""A sweep: one replay for each seed and window of the trace, run by processes or a Ray cluster with equal records."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from sim.compiled import cpu_clock
from sim.config import build, name_of
from sim.cost.plan import dense_plan
from sim.errors import ConfigError
from sim.limits import MOST_PROCESSES, check_count
from sim.policies import Fixed
from sim.processes import in_processes
from sim.progress import counted, progress
from sim.replay.run import (
    build_engine,
    build_trace,
    figures,
    front_end_of,
    measured_rate,
    quality_figures,
    quality_of,
    replay_with,
    server_figures,
    turn_columns,
    utility_of,
    write_tables,
)
from sim.replay.watch import Watched
from sim.results.metrics import Slo
from sim.results.plots import plot_replay
from sim.results.records import Iterations, Records, Transitions
from sim.results.report import columns_of, print_notes, print_rows
from sim.results.run_folder import begin_run, provenance, write_begun, write_json
from sim.types import Ints


@dataclass(frozen=True, slots=True)
class Case:
    """One replay of a sweep: its seed, and which window of the trace; None for the full trace."""

    seed: int
    window: int | None = None

    @property
    def name(self) -> str:
        """The name of its folder."""
        return f"seed_{self.seed}" + (f"_window_{self.window}" if self.window is not None else "")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one replay produced.

    kept_share: (time_s, share of the dense weights' bytes that is resident), one entry per change.
    budget: (time_s, bytes), one entry per change. server: the content of ``server.json``. turns: ``turn_columns``.
    """

    summary: Mapping[str, Any]
    records: Records
    iterations: Iterations
    transitions: Transitions
    kept_share: tuple[tuple[float, float], ...]
    budget: tuple[tuple[float, int], ...]
    server: Mapping[str, Any]
    turns: Mapping[str, Ints]


def cases_of(cfg: DictConfig) -> list[Case]:
    """Return the cases of a sweep: every window at every seed.

    Raises:
        ConfigError: for a repeated or negative value, or windows without a length.
    """
    for key in ("seeds", "windows"):
        values = list(cfg[key])
        if len(set(values)) != len(values) or any(value < 0 for value in values):
            raise ConfigError(f"{key} is {values}; values must be non-negative and unique")
    if cfg.windows and (cfg.window_s is None or not cfg.window_s > 0):
        raise ConfigError(f"window_s is {cfg.window_s}; windows need a length above 0 seconds, e.g. window_s=72")
    return [Case(seed, window) for seed in (cfg.seeds or [cfg.seed]) for window in (cfg.windows or [None])]


def config_of(cfg: DictConfig, case: Case) -> DictConfig:
    """Return the configuration of one case: an ordinary replay."""
    one = cfg.copy()
    OmegaConf.set_struct(one, False)
    one.seed, one.seeds, one.windows = case.seed, [], []
    if case.window is not None:
        cut = {"_target_": "sim.traces.transforms.window", "_partial_": True}
        cut |= {"start_s": case.window * cfg.window_s, "duration_s": cfg.window_s}
        one.workload.steps = [*one.workload.steps, cut]
    return one


def replay_case(cfg: DictConfig) -> Outcome:
    """Replay one configuration."""
    trace = build_trace(cfg)
    engine, policy = build_engine(cfg)
    seen = Watched(policy)
    with cpu_clock() as cpu_s:
        replay_with(cfg, trace, engine, policy if isinstance(policy, Fixed) else seen)
        slo, front_end = build(cfg.slo), front_end_of(cfg)
        summary = figures(engine, slo, cpu_s=cpu_s(), front_end=front_end)
    records = engine.records()
    summary |= measured_rate(cfg, trace, summary)
    summary["utility"] = utility_of(cfg, records, slo, front_end)
    iterations = engine.iterations()
    end_s = float(iterations.end_s[-1]) if len(iterations) else 0.0
    summary["low_precision_share"] = time_mean(seen.low, end_s)
    summary |= quality_figures(cfg, seen.plans, iterations)
    summary["perplexity_ratio"] = None
    if summary["quality_nll"] is not None and (quality := quality_of(cfg)) is not None:
        dense_nll = quality.nll(dense_plan(build(cfg.model)))
        summary["perplexity_ratio"] = math.exp(summary["quality_nll"] - dense_nll)
    budget = engine.budget.steps
    return Outcome(
        summary,
        records,
        iterations,
        engine.transitions(),
        engine.kept_share(),
        budget,
        server_figures(cfg, policy.first_plan, budget),
        turn_columns(trace, engine.arrival_order()),
    )


T = TypeVar("T")


class Executor(Protocol):
    """Runs a task for many items. Results keep the order of the items and do not depend on the executor."""

    def __call__(self, task: Callable[[Any], T], items: Sequence[Any]) -> list[T]:
        """Return the task's result for each item."""
        ...


class Processes:
    """Runs tasks in processes of this machine."""

    def __init__(self, workers: int) -> None:
        """Set the number of processes; with 1, tasks run in this process.

        Raises:
            ConfigError: for less than 1, or more than any machine runs.
        """
        if workers < 1:
            raise ConfigError(f"workers is {workers}; it must be at least 1")
        check_count(workers, "processes", MOST_PROCESSES, "lower workers to the number of cores")
        self.workers = workers

    def __call__(self, task: Callable[[Any], T], items: Sequence[Any]) -> list[T]:
        """Return the task's result for each item."""
        workers = min(self.workers, len(items))
        with progress("replaying", len(items), "runs") as report:
            if workers < 2:
                return counted(map(task, items), report)
            return counted(in_processes(task, items, workers), report)


def write_outcome(
    folder: Path, cfg: DictConfig, made_by: Mapping[str, Any], outcome: Outcome, slo: Slo, title: str
) -> None:
    """Write the run folder of one replay of a sweep, as ``sim.replay`` writes it.

    Args:
        cfg: of this replay. title: stands above its figure.
    """
    write_begun(folder, cfg, made_by)
    iterations = outcome.iterations if cfg.iterations else None
    tables = outcome.records, outcome.transitions, outcome.kept_share, iterations
    write_tables(folder, slo, *tables, front_end_of(cfg), outcome.turns)
    write_json(folder / "server.json", dict(outcome.server))
    if cfg.plot:
        plot_replay(folder / "replay.png", outcome.records, outcome.iterations, slo, title, outcome.budget)
    write_json(folder / "summary.json", dict(outcome.summary))  # last: a folder with a summary is complete


def replay_sweep(cfg: DictConfig) -> None:
    """Replay every case on the simulated engine; write one folder per case and one table."""
    folder = Path(HydraConfig.get().runtime.output_dir)
    cases = cases_of(cfg)
    configs = [config_of(cfg, case) for case in cases]
    slo, made_by = build(cfg.slo), provenance(cfg.seed)
    executor: Executor = build(cfg.executor)
    begin_run(folder, cfg, made_by)
    outcomes = executor(replay_case, configs)
    try:
        write_begun(folder, cfg, made_by)
        for case, one, outcome in zip(cases, configs, outcomes, strict=True):
            inner = folder / case.name
            write_outcome(inner, one, {**made_by, "seed": case.seed}, outcome, slo, case.name.replace("_", " "))
        # Last: a folder with this file is complete.
        summaries = {case.name: dict(outcome.summary) for case, outcome in zip(cases, outcomes, strict=True)}
        write_json(folder / "summaries.json", summaries)
    finally:  # a full disk loses the files, not the figures
        _print_sweep(cfg, cases, [outcome.summary for outcome in outcomes])
    print(f"files: {folder}")


def _print_sweep(cfg: DictConfig, cases: Sequence[Case], summaries: Sequence[Mapping[str, Any]]) -> None:
    label = cfg.label or str(HydraConfig.get().runtime.choices["trace"])
    cases, shown = without_equal_seeds(cases, {"": summaries})
    title = (
        f"{label} on {name_of(cfg.model)}, {build(cfg.gpu).title}: {len(cases)} replay{'s' if len(cases) > 1 else ''}"
    )
    rows = {case.name: [summary] for case, summary in zip(cases, shown[""], strict=True)}
    if len(cases) > 1:
        rows["mean ± sd"] = shown[""]
    print_rows(rows, title, first="replay", columns=columns_of(rows))
    print_notes(rows)


def without_equal_seeds(
    cases: Sequence[Case], rows: Mapping[str, Sequence[Mapping[str, Any]]]
) -> tuple[Sequence[Case], dict[str, list[Mapping[str, Any]]]]:
    """Return cases and rows of the first seed alone, and say so, if every seed gave the same figures; else all.

    Args:
        rows: label -> one summary for each case.
    """
    seeds = list(dict.fromkeys(case.seed for case in cases))
    first = [index for index, case in enumerate(cases) if case.seed == seeds[0]]
    for row in rows.values():
        of = {case: _without_cpu(summary) for case, summary in zip(cases, row, strict=True)}
        if len(seeds) == 1 or any(of[case] != of[Case(seeds[0], case.window)] for case in cases):
            return cases, {label: list(row) for label, row in rows.items()}
    print(
        f"The {len(seeds)} seeds gave the same figures: nothing in this configuration is random. One is shown. "
        "Choose a random trace or budget, e.g. trace=poisson or budget=random_walk, or windows of the trace: windows=."
    )
    return [cases[i] for i in first], {label: [row[i] for i in first] for label, row in rows.items()}


def _without_cpu(summary: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in summary.items() if key not in ("cpu_s", "requests_per_cpu_s")}


def time_mean(changes: Sequence[tuple[float, float]], end_s: float) -> float:
    """Return the mean over time until ``end_s`` of a step function, a sequence of (time_s, value)."""
    times = [*(min(time_s, end_s) for time_s, _ in changes), end_s]
    if end_s <= times[0]:
        return changes[0][1]
    weights = [after - before for before, after in itertools.pairwise(times)]
    return statistics.fmean([value for _, value in changes], weights)
