"""Command ``python -m sim.compare``: several policies on the same requests and the same memory, in one table."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from numpy.typing import NDArray
from omegaconf import DictConfig, OmegaConf

from sim.atomic import write_whole
from sim.config import SweepConfig, build, name_of, one_thread, run_command, with_differences
from sim.errors import ConfigError, nearest
from sim.replay.sweep import Executor, Outcome, cases_of, config_of, replay_case
from sim.results.metrics import Slo, records_frame
from sim.results.report import markdown, print_notes, print_rows
from sim.results.run_folder import provenance, write_json, write_parquet, write_text
from sim.types import Floats


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


def _compare(cfg: DictConfig) -> None:
    folder = Path(HydraConfig.get().runtime.output_dir)
    cases, slo = cases_of(cfg), build(cfg.slo)
    jobs = [(label, case, config_of(one, case)) for label, one in variants(cfg).items() for case in cases]
    made_by = provenance(cfg.seed)
    executor: Executor = build(cfg.executor)
    outcomes = executor(replay_case, [one for _, _, one in jobs])
    rows: dict[str, list[Mapping[str, Any]]] = {}
    for (label, case, _), outcome in zip(jobs, outcomes, strict=True):
        inner = folder / label / case.name if len(cases) > 1 else folder / label
        write_parquet(inner / "records.parquet", records_frame(outcome.records, slo))
        rows.setdefault(label, []).append(outcome.summary)
    write_text(folder / "config.yaml", OmegaConf.to_yaml(cfg, resolve=True))
    write_text(folder / "compare.md", markdown(rows))
    choices = HydraConfig.get().runtime.choices
    title = f"{cfg.label or choices['trace']} on {name_of(cfg.model)}, {name_of(cfg.gpu)}"
    names = [case.name.replace("_", " ") for case in cases]
    shown = hardest(rows)
    drawn = {label: outcomes[at * len(cases) + shown] for at, label in enumerate(rows)}
    plot(folder / "compare.png", drawn, slo, title if len(cases) == 1 else f"{title}: {names[shown]}")
    if len(cases) > 1:
        title += f": mean ± standard deviation of {len(cases)} replays"
    content = {"provenance": made_by, "title": title, "cases": names, "summaries": rows}
    write_json(folder / "compare.json", content)  # last: a folder with it is complete
    print_rows(rows, title)
    print_notes(rows)
    print(f"files: {folder}")


def hardest(rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> int:
    """Return which case the plot shows: the one in which the first policy had the lowest SLO attainment."""
    first = next(iter(rows.values()))
    return min(range(len(first)), key=lambda case: first[case]["slo_attainment"])


def plot(path: Path, outcomes: Mapping[str, Outcome], slo: Slo, title: str) -> None:
    """Write one PNG: worst TTFT and longest queue in each of about 150 bins of time, and the weights in memory."""
    import matplotlib as mpl  # only here: its import is slow and most runs write no figure

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    last_s = max(float(outcome.iterations.end_s[-1]) for outcome in outcomes.values())
    bin_s = max(1.0, math.ceil(last_s / 150))
    with mpl.rc_context(PLOT_STYLE):
        figure, axes = plt.subplots(3, 1, figsize=(9, 7.5), sharex=True, layout="constrained")
        for rank, (label, outcome) in enumerate(outcomes.items()):
            # Later policies lie on top. The first is the reference that the others are compared with: gray.
            style: dict[str, Any] = {"color": "0.45"} if rank == 0 else {"color": f"C{rank - 1}"}
            records, iterations = outcome.records, outcome.iterations
            served = np.isfinite(records.first_token_s)
            arrivals_s, ttft_s = records.arrival_s[served], records.ttft_s[served]
            axes[0].plot(*worst_per_bin(arrivals_s, ttft_s, bin_s), label=label, **style)
            axes[1].plot(*worst_per_bin(iterations.start_s, iterations.waiting, bin_s), **style)
            time_s, share = (np.array(column) for column in zip(*outcome.kept_share, strict=True))
            end_s = iterations.end_s[-1]
            axes[2].step([*time_s, end_s], [*(100 * share), 100 * share[-1]], where="post", **style)
        if slo.ttft_s is not None:
            axes[0].axhline(slo.ttft_s, color="black", linestyle="--", linewidth=1.0, label=f"SLO: {slo.ttft_s:g} s")
        # TTFT spans milliseconds to a minute; a linear axis would hide everything near the SLO.
        axes[0].set_yscale("log")
        axes[0].set_ylabel("TTFT [s]")
        axes[1].set_ylabel("waiting requests")
        axes[2].set_ylabel("weights in memory [%]")
        axes[2].set_ylim(0, 105)
        axes[2].set_xlabel("time [s]")
        axes[2].margins(x=0.01)
        figure.legend(loc="outside lower center", ncols=4, frameon=False)
        figure.suptitle(title)
        write_whole(path, lambda part: figure.savefig(part, format="png", dpi=100))
        plt.close(figure)


PLOT_STYLE: Any = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "lines.linewidth": 1.4,
    "font.size": 11,
}


def worst_per_bin(time_s: Floats, values: NDArray[Any], bin_s: float) -> tuple[Floats, Floats]:
    """Return the start of each bin of time that has values, and the largest value in it."""
    bins = np.floor(time_s / bin_s)
    order = np.argsort(bins, kind="stable")
    found, first = np.unique(bins[order], return_index=True)
    worst = np.maximum.reduceat(np.asarray(values, dtype=np.float64)[order], first) if len(first) else np.empty(0)
    return found * bin_s, worst


if __name__ == "__main__":
    compare_command()
