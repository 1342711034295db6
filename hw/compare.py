"""Command ``python -m hw.compare RUN_SIM RUN_HW [RUN_HW ...]``: the errors of a simulated run against real runs."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig
from rich.console import Console

from hw.validate.compare import compare, plot, print_comparison, read_run
from sim.config import run_command
from sim.errors import ConfigError
from sim.results.run_folder import provenance, write_json


@dataclass(kw_only=True)
class CompareRunsConfig:
    """Which runs to compare.

    runs: the folder of a simulated run, then those of real runs. out: where to write; the first real run when null.
    """

    runs: list[str] = field(default_factory=list)
    out: str | None = None


ConfigStore.instance().store(name="hw_compare_schema", node=CompareRunsConfig)


def main() -> None:
    """Run the command."""
    run_command(_compare, "hw_compare", positional="runs")


def _compare(cfg: DictConfig) -> int:
    folders = [Path(folder) for folder in cfg.runs]
    if len(folders) < 2:
        raise ConfigError("give the folder of one simulated run and of one or more real ones; --help shows how")
    simulated, *real = (read_run(folder) for folder in folders)
    result = compare(simulated, real)
    out = Path(cfg.out) if cfg.out is not None else folders[1]
    write_json(out / "compare.json", {"provenance": provenance(0), **result})
    plot(out / "compare.png", simulated, real)
    console = Console(width=None if sys.stdout.isatty() else 130)
    print_comparison(result, console)
    console.print(f"files: {out / 'compare.json'}, {out / 'compare.png'}", highlight=False, soft_wrap=True)
    return 0 if result["held"] else 1


if __name__ == "__main__":
    main()
