"""Command ``python -m sim.results``: the page of simulation results, from the committed figures or from new replays."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig

from sim.atomic import write_whole
from sim.config import run_command
from sim.errors import ConfigError, nearest
from sim.results.run_folder import write_text
from sim.results.simulation_page import PAGE, PICTURES, RESULTS, RUNS, page, replay


@dataclass(kw_only=True)
class ResultsConfig:
    """What to write.

    measure: replay first; without, the page is written from the committed figures.
    only: results to replay; all when empty. workers: processes.
    """

    measure: bool = False
    only: list[str] = field(default_factory=list)
    workers: int = 2


ConfigStore.instance().store(name="results_schema", node=ResultsConfig)


def main() -> None:
    """Run the command."""
    run_command(_results, "results")


def _results(cfg: DictConfig) -> None:
    if cfg.measure:
        measure(list(cfg.only) or list(RUNS), cfg.workers)
    write_text(PAGE, page())
    print(f"written: {PAGE}")


def measure(names: Sequence[str], workers: int) -> None:
    """Replay results and keep their figures and plots.

    Raises:
        ConfigError: for an unknown result, with the nearest name.
    """
    for name in names:
        if name not in RUNS:
            raise ConfigError(f"there is no result {name!r}; {nearest(name, RUNS)}")
    with tempfile.TemporaryDirectory() as temporary:
        for name in names:
            replay(name, RUNS[name], workers, Path(temporary))
            print(f"replayed {name}", flush=True)
        # Copied at the end: a changed file would mark the commit of the next replay as dirty.
        for name in names:
            for kept in (f"{name}.json", *((f"{name}.png",) if name in PICTURES else ())):
                write_whole(RESULTS / kept, partial(shutil.copyfile, Path(temporary) / kept))


if __name__ == "__main__":
    main()
