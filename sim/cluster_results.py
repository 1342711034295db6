"""Command ``python -m sim.cluster_results``: the page of cluster results, from the committed figures or new replays."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig

from sim.config import run_command
from sim.errors import ConfigError, nearest
from sim.results.cluster_page import PAGE, RESULTS, RUNS, page, replay
from sim.results.run_folder import write_json, write_text


@dataclass(kw_only=True)
class ClusterResultsConfig:
    """What to write.

    measure: replay first; without, the page is written from the committed figures.
    only: results to replay; all when empty. workers: processes.
    """

    measure: bool = False
    only: list[str] = field(default_factory=list)
    workers: int = 2


ConfigStore.instance().store(name="cluster_results_schema", node=ClusterResultsConfig)


def main() -> None:
    """Run the command."""
    run_command(_results, "cluster_results")


def _results(cfg: DictConfig) -> None:
    if cfg.measure:
        measure(list(cfg.only) or list(RUNS), cfg.workers)
    write_text(PAGE, page())
    print(f"written: {PAGE}")


def measure(names: Sequence[str], workers: int) -> None:
    """Replay results and write their figures.

    Raises:
        ConfigError: for an unknown result, with the nearest name.
    """
    for name in names:
        if name not in RUNS:
            raise ConfigError(f"there is no result {name!r}; {nearest(name, RUNS)}")
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            write_json(RESULTS / f"{name}.json", replay(name, workers, Path(folder)))
        print(f"replayed {name}", flush=True)


if __name__ == "__main__":
    main()
