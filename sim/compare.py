"""``python -m sim.compare``: several policies on the same requests and the same memory, side by side."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from sim.command import build_engine, build_trace, figures, replay_with
from sim.config import CONF_DIR, ReplayConfig, build, one_thread, run_command
from sim.errors import ConfigError, nearest
from sim.metrics import Slo, records_frame
from sim.records import Iterations, Records
from sim.runs import provenance, write_json, write_parquet, write_text, write_whole

COLUMNS = {
    "SLO attainment": ("slo_attainment", 100.0, "{:.1f} %"),
    "TTFT P95, s": ("ttft_s.p95", 1.0, "{:.2f}"),
    "TPOT P50, ms": ("tpot_s.p50", 1e3, "{:.1f}"),
    "preemptions": ("preemptions", 1.0, "{:,.0f}"),
    "over budget, s": ("budget_violation_s", 1.0, "{:.2f}"),
    "params kept": ("kept_params_share", 100.0, "{:.1f} %"),
    "plan changes": ("transitions", 1.0, "{:,.0f}"),
    "makespan, s": ("makespan_s", 1.0, "{:,.0f}"),
}
"""Heading: key of the summary, factor, format."""


@dataclass(kw_only=True)
class CompareConfig(ReplayConfig):
    """A replay told several policies.

    policies: label -> what differs from the rest of the configuration, as ``key: value`` (``policy`` names a file of
        conf/policy, ``policy.mode`` one of its keys).
    only: labels to run; all when empty.
    workers: processes; the results are the same for any number.
    """

    policies: dict[str, Any]
    only: list[str] = field(default_factory=list)
    workers: int = 1


ConfigStore.instance().store(name="compare_schema", node=CompareConfig)


@dataclass(frozen=True, slots=True)
class Outcome:
    """One policy's replay: its figures, its records, its memory over time."""

    label: str
    summary: Mapping[str, Any]
    records: Records
    iterations: Iterations
    kept_share: tuple[tuple[float, float], ...]  # (time_s, share of the weights' bytes that is resident)


def compare_command() -> None:
    """Run ``python -m sim.compare``."""
    one_thread()
    run_command(_compare, "compare")


def variants(cfg: DictConfig) -> dict[str, DictConfig]:
    """Return one configuration a label, each with its differences applied.

    Raises:
        ConfigError: for no policies, or a difference that names no key or file; it names the nearest.
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
        one = cfg.copy()
        OmegaConf.set_struct(one, True)
        for key, value in OmegaConf.to_container(differences).items():  # type: ignore[union-attr]
            if key in ("policy", "budget", "engine", "workload"):
                options = {path.stem: path for path in (CONF_DIR / key).glob("*.yaml")}
                if value not in options:
                    raise ConfigError(f"policies.{label}.{key}: there is no {value!r}; {nearest(str(value), options)}")
                OmegaConf.set_struct(one, False)
                one[key] = OmegaConf.load(options[value])
                OmegaConf.set_struct(one, True)
                continue
            parent, _, name = str(key).rpartition(".")
            node = OmegaConf.select(one, parent) if parent else one
            if node is None or name not in node:
                raise ConfigError(f"policies.{label}: there is no {key!r}; {nearest(name, map(str, node or one))}")
            OmegaConf.update(one, str(key), value)
        made[str(label)] = one
    return made


def run_variant(label: str, cfg: DictConfig) -> Outcome:
    """Replay one configuration."""
    trace = build_trace(cfg)
    engine, policy = build_engine(cfg)
    started_cpu_s = time.process_time()
    replay_with(cfg, trace, engine, policy)
    summary = figures(engine, build(cfg.slo), cpu_s=time.process_time() - started_cpu_s)
    return Outcome(label, summary, engine.records(), engine.iterations(), engine.kept_share())


def _compare(cfg: DictConfig) -> None:
    folder = Path(HydraConfig.get().runtime.output_dir)
    jobs = list(variants(cfg).items())
    slo = build(cfg.slo)
    if cfg.workers > 1:
        with multiprocessing.get_context("spawn").Pool(min(int(cfg.workers), len(jobs))) as pool:
            outcomes = pool.starmap(run_variant, jobs)
    else:
        outcomes = [run_variant(*job) for job in jobs]
    for outcome in outcomes:
        write_parquet(folder / outcome.label / "records.parquet", records_frame(outcome.records, slo))
    write_text(folder / "config.yaml", OmegaConf.to_yaml(cfg, resolve=True))
    write_text(folder / "compare.md", markdown(outcomes))
    title = f"{cfg.label or HydraConfig.get().runtime.choices['trace']} on {cfg.model.name}, {cfg.gpu.name}"
    plot(folder / "compare.png", outcomes, slo, title)
    write_json(
        folder / "compare.json",
        {"provenance": provenance(cfg.seed), "summaries": {o.label: dict(o.summary) for o in outcomes}},
    )
    console = Console()
    table = Table(title=title, title_justify="left")
    table.add_column("policy")
    for heading in COLUMNS:
        table.add_column(heading, justify="right")
    for outcome in outcomes:
        table.add_row(outcome.label, *cells(outcome.summary))
    if console.is_terminal:
        console.print(table)
    else:
        print(title, markdown(outcomes), sep="\n\n", end="")
    print(f"files: {folder}")


def cells(summary: Mapping[str, Any]) -> list[str]:
    """Return the figures of one policy as they stand in the table."""
    found = []
    for key, factor, form in COLUMNS.values():
        value: Any = summary
        for part in key.split("."):
            value = value[part]
        found.append("-" if value is None else form.format(factor * value))
    return found


def markdown(outcomes: list[Outcome]) -> str:
    """Return the table as Markdown."""
    lines = ["| policy | " + " | ".join(COLUMNS) + " |", "|---|" + "---:|" * len(COLUMNS)]
    lines += [f"| {o.label} | " + " | ".join(cells(o.summary)) + " |" for o in outcomes]
    return "\n".join(lines) + "\n"


def plot(path: Path, outcomes: list[Outcome], slo: Slo, title: str) -> None:
    """Write one PNG: TTFT by arrival, requests that wait, and what each policy keeps resident over time."""
    import matplotlib as mpl  # drawing is rare and its import slow

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(3, 1, figsize=(10, 8), sharex=True, layout="constrained")
    for outcome in outcomes:
        records, iterations = outcome.records, outcome.iterations
        served = np.isfinite(records.first_token_s)
        axes[0].plot(records.arrival_s[served], records.ttft_s[served], ".", markersize=2, label=outcome.label)
        axes[1].step(iterations.start_s, iterations.waiting, where="post", linewidth=0.8, label=outcome.label)
        time_s, share = zip(*outcome.kept_share, strict=True)
        axes[2].step([*time_s, float(iterations.end_s[-1])], [*share, share[-1]], where="post", label=outcome.label)
    if slo.ttft_s is not None:
        axes[0].axhline(slo.ttft_s, color="black", linestyle="--", linewidth=0.8)
    axes[0].set_ylabel("TTFT, s")
    axes[1].set_ylabel("waiting requests")
    axes[2].set_ylabel("weights resident, share of bytes")
    axes[2].set_ylim(0, 1.05)
    axes[2].set_xlabel("time, s")
    axes[0].legend(loc="upper left", markerscale=5)
    figure.suptitle(title)
    write_whole(path, lambda part: figure.savefig(part, format="png", dpi=110))
    plt.close(figure)


if __name__ == "__main__":
    compare_command()
