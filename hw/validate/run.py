"""``python -m hw.validate``: the simulator against the real engine of this machine."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from hw.validate.compare import verdicts
from hw.validate.suite import PAGE, PAGES, PLOT, RESULT, ValidateConfig, run_suite
from hw.validate.suite_page import page, plot
from sim.config import one_thread, run_command
from sim.errors import ConfigError, nearest
from sim.results.run_folder import write_json, write_text


def main() -> None:
    """Run the command."""
    one_thread()
    run_command(_validate, "hw_validate")


def _validate(cfg: DictConfig) -> int:
    settings = cast(ValidateConfig, OmegaConf.to_object(cfg))
    if settings.page not in PAGES:
        raise ConfigError(f"page is {settings.page!r}; {nearest(settings.page, PAGES)}")
    console = Console(width=None if sys.stdout.isatty() else 130)
    if settings.page == "only":
        content = json.loads(RESULT.read_text(encoding="utf-8"))
    else:
        content = run_suite(settings, console)
        write_json(RESULT, content)
    write_text(PAGE, page(content))
    plot(PLOT, content)
    missed = missed_checks(content)
    console.print(f"{len(missed)} checks missed; {PAGE}", highlight=False)
    return 1 if missed else 0


def missed_checks(content: Mapping[str, Any]) -> list[str]:
    """Return every missed check of the results as ``WORKLOAD, POLICY: FIGURE``."""
    return [
        f"{workload}, {policy}: {name}"
        for workload, by_policy in content["results"].items()
        for policy, result in by_policy.items()
        for name, verdict in verdicts(result).items()
        if verdict == "missed"
    ]
