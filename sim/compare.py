"""Command ``python -m sim.compare``: several policies on the same requests and the same memory, in one table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from sim.config import SweepConfig, build, name_of, one_thread, run_command, with_differences
from sim.errors import ConfigError, nearest
from sim.replay.sweep import (
    Case,
    Executor,
    Outcome,
    cases_of,
    config_of,
    replay_case,
    without_equal_seeds,
    write_outcome,
)
from sim.results.metrics import Slo
from sim.results.plots import Line, plot_comparison
from sim.results.report import columns_of, markdown, print_notes, print_rows
from sim.results.run_folder import begin_run, provenance, write_begun, write_json, write_text


@dataclass(kw_only=True)
class CompareConfig(SweepConfig):
    """A replay under several policies.

    policies: label -> what differs from the rest of the configuration, as ``key: value`` (``policy`` names an option
        of conf/policy, ``policy.mode`` one of its keys).
    only: labels to run; all when empty.
    """

    policies: dict[str, Any]
    only: list[str] = field(default_factory=list)


ConfigStore.instance().store(name="compare_schema", node=CompareConfig)


def compare_command() -> None:
    """Run ``python -m sim.compare``."""
    one_thread()
    run_command(_compare, "compare")


def variants(cfg: DictConfig) -> dict[str, DictConfig]:
    """Return one configuration per label, each with its differences applied.

    Raises:
        ConfigError: for no policies, or a difference that names no key or option, with the nearest name.
    """
    if not cfg.policies:
        raise ConfigError("policies is empty; give at least one label, e.g. +policies.dense={policy: dense}")
    for label in cfg.only:
        if label not in cfg.policies:
            raise ConfigError(f"only: there is no label {label!r}; {nearest(label, map(str, cfg.policies))}")
    made = {}
    for label, differences in cfg.policies.items():
        if cfg.only and label not in cfg.only:
            continue
        made[str(label)] = with_differences(cfg, differences or {}, f"policies.{label}")
    return made


def servers(made: Iterable[DictConfig]) -> str:
    """Return model and device of some configurations, each pair once: ``llama2_7b, a100_80gb``."""
    return " and ".join(dict.fromkeys(f"{name_of(one.model)}, {build(one.gpu).title}" for one in made))


def _compare(cfg: DictConfig) -> None:
    folder = Path(HydraConfig.get().runtime.output_dir)
    cases, slo = cases_of(cfg), build(cfg.slo)
    jobs = [(label, case, config_of(one, case)) for label, one in variants(cfg).items() for case in cases]
    made_by = provenance(cfg.seed)
    executor: Executor = build(cfg.executor)
    begin_run(folder, cfg, made_by)
    outcomes = executor(replay_case, [one for _, _, one in jobs])
    rows: dict[str, list[Mapping[str, Any]]] = {}
    for (label, _, _), outcome in zip(jobs, outcomes, strict=True):
        rows.setdefault(label, []).append(outcome.summary)
    shown_cases, shown_rows = without_equal_seeds(cases, rows)
    columns = columns_of(shown_rows)
    title = f"{cfg.label or HydraConfig.get().runtime.choices['trace']} on {servers(variants(cfg).values())}"
    if len(shown_cases) > 1:
        title += f": mean ± standard deviation of {len(shown_cases)} replays"
    try:
        for (label, case, one), outcome in zip(jobs, outcomes, strict=True):
            inner = folder / label / case.name if len(cases) > 1 else folder / label
            inner_title = f"{label}, {case.name.replace('_', ' ')}"
            write_outcome(inner, one, {**made_by, "seed": case.seed}, outcome, slo, inner_title)
        write_begun(folder, cfg, made_by)
        write_text(folder / "compare.md", markdown(shown_rows, columns=columns))
        _plot(folder / "compare.png", cases, rows, outcomes, slo, title)
        names = [case.name.replace("_", " ") for case in cases]
        content = {"provenance": made_by, "title": title, "cases": names, "summaries": rows}
        write_json(folder / "compare.json", content)  # last: a folder with it is complete
    finally:  # a full disk loses the files, not the figures
        print_rows(shown_rows, title, columns=columns)
        print_notes(shown_rows)
    print(f"files: {folder}")


def _plot(
    path: Path,
    cases: Sequence[Case],
    rows: Mapping[str, Sequence[Mapping[str, Any]]],
    outcomes: Sequence[Outcome],
    slo: Slo,
    title: str,
) -> None:
    """Draw the case that was hardest."""
    shown = hardest(rows)
    drawn = {label: outcomes[at * len(cases) + shown] for at, label in enumerate(rows)}
    lines = {label: Line(o.records, o.iterations, o.kept_share) for label, o in drawn.items()}
    # Each policy may have a budget of its own (policies.LABEL.budget).
    budgets = list(dict.fromkeys(outcome.budget for outcome in drawn.values()))
    if len(cases) > 1:
        title = f"{title.partition(': mean')[0]}: {cases[shown].name.replace('_', ' ')}"
    plot_comparison(path, lines, slo, title, budgets)


def hardest(rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> int:
    """Return which case the plot shows: the one in which the first policy had the lowest SLO attainment."""
    first = next(iter(rows.values()))
    return min(range(len(first)), key=lambda case: first[case]["slo_attainment"])


if __name__ == "__main__":
    compare_command()
