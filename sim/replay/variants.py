"""Several variants of one configuration, each at every seed and window, in one table.

``sim.cluster`` and ``sim.disaggregate`` share this frame: a run folder for one configuration, or a table of variants.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from sim.config import SweepConfig, build, with_differences
from sim.errors import ConfigError, nearest
from sim.replay.sweep import Executor, cases_of, config_of, without_equal_seeds
from sim.results.report import Columns, columns_of, markdown, print_notes, print_rows
from sim.results.run_folder import begin_run, provenance, write_begun, write_json, write_text


@dataclass(kw_only=True)
class VariantsConfig(SweepConfig):
    """A configuration, or several variants of it.

    variants: label -> differences from the rest of the configuration, as ``key: value``; if there are any, the command
        writes one table of all variants instead of one run.
    only: labels to run; empty runs all.
    """

    variants: dict[str, Any] = field(default_factory=dict)
    only: list[str] = field(default_factory=list)


def variants(cfg: DictConfig) -> dict[str, DictConfig]:
    """Return label -> configuration with the differences of that variant; empty if ``cfg`` has no variants.

    Raises:
        ConfigError: for a label in ``only`` that does not exist, or a difference that names no key or file.
    """
    differences = {str(label): node for label, node in cfg.variants.items()}
    for label in cfg.only:
        if label not in differences:
            raise ConfigError(f"only: there is no label {label!r}; {nearest(label, differences)}")
    return {
        label: with_differences(cfg, dict(node or {}), f"variants.{label}")
        for label, node in differences.items()
        if not cfg.only or label in cfg.only
    }


def run_or_compare(
    cfg: DictConfig,
    *,
    write_run: Callable[[DictConfig, Path, str, dict[str, Any]], None],
    run_figures: Callable[[DictConfig], dict[str, Any]],
    columns: Columns,
) -> None:
    """Write the folder of one run, or one table if there are variants, seeds or windows.

    Args:
        write_run: runs one configuration and writes its files; takes the configuration, the folder, the label and the
            provenance.
        run_figures: runs one configuration and returns its summary; must be importable by name, for other processes.
        columns: of the table.
    """
    folder = Path(HydraConfig.get().runtime.output_dir)
    label = cfg.label or str(HydraConfig.get().runtime.choices["trace"])
    made_by = provenance(cfg.seed)
    if cfg.variants or cfg.seeds or cfg.windows:
        compare_variants(cfg, folder, label, made_by, run_figures, columns)
    else:
        write_run(cfg, folder, label, made_by)
    print(f"files: {folder}")


def compare_variants(
    cfg: DictConfig,
    folder: Path,
    label: str,
    made_by: dict[str, Any],
    run_figures: Callable[[DictConfig], dict[str, Any]],
    columns: Columns,
) -> None:
    """Run every variant at every seed and window; write and print one table."""
    cases = cases_of(cfg)
    jobs = [(name, config_of(one, case)) for name, one in (variants(cfg) or {"cluster": cfg}).items() for case in cases]
    executor: Executor = build(cfg.executor)
    begin_run(folder, cfg, made_by)
    summaries = executor(run_figures, [one for _, one in jobs])
    rows: dict[str, list[Mapping[str, Any]]] = {}
    for (name, _), summary in zip(jobs, summaries, strict=True):
        rows.setdefault(name, []).append(summary)
    shown_cases, shown_rows = without_equal_seeds(cases, rows)
    title, columns = label, columns_of(shown_rows, columns)
    if len(shown_cases) > 1:
        title += f": mean ± standard deviation of {len(shown_cases)} replays"
    try:
        write_begun(folder, cfg, made_by)
        write_text(folder / "compare.md", markdown(shown_rows, "variant", columns))
        names = [case.name.replace("_", " ") for case in cases]
        content = {"provenance": made_by, "title": title, "cases": names, "summaries": rows}
        write_json(folder / "compare.json", content)  # last: a folder with this file is complete
    finally:  # a full disk loses the files, not the figures
        print_rows(shown_rows, title, "variant", columns)
        print_notes(shown_rows)
