"""``python -m hw.disaggregate_results``: write the page on KV transfer; ``measure=true`` measures first."""

from __future__ import annotations

import json
from dataclasses import dataclass

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig

from hw.disaggregate.transfer import measure
from hw.disaggregate.transfer_page import PAGE, RESULT, page
from sim.config import one_thread, run_command
from sim.errors import ConfigError
from sim.results.run_folder import write_json, write_text


@dataclass(kw_only=True)
class DisaggregateResultsConfig:
    """What to write.

    measure: measure first; without, the page is written from the committed figures.
    repeats: real runs of each variant.
    """

    measure: bool = False
    repeats: int = 3


ConfigStore.instance().store(name="disaggregate_results_schema", node=DisaggregateResultsConfig)


def main() -> None:
    """Run the command."""
    one_thread()
    run_command(_results, "disaggregate_results")


def _results(cfg: DictConfig) -> int:
    try:
        if cfg.measure:
            write_json(RESULT, measure(cfg.repeats))
    except KeyboardInterrupt:
        print("interrupted: nothing was written")
        return 130
    if not RESULT.is_file():
        raise ConfigError(f"{RESULT} is missing; make it: python -m hw.disaggregate_results measure=true")
    write_text(PAGE, page(json.loads(RESULT.read_text(encoding="utf-8"))))
    print(f"written: {PAGE}")
    return 0
