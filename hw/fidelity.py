"""Command ``python -m hw.fidelity``: the simulator against a published run of vLLM."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from hw.validate.fidelity import (
    CALIBRATION,
    FIT_UNTIL_S,
    RUN,
    STATISTICS,
    compare,
    counts,
    fit_fixed_s,
    page,
    read_run,
    simulate,
)
from sim.config import run_command
from sim.cost.latency import load_calibration
from sim.paths import RESULTS, find_data
from sim.results.run_folder import commit, write_json, write_text


@dataclass(kw_only=True)
class FidelityConfig:
    """Which run to compare with. run: its folder, a path or one under RAP_LAB_DATA. out: the folder to write to."""

    run: str = RUN
    out: str = str(RESULTS / "fidelity")


ConfigStore.instance().store(name="hw_fidelity_schema", node=FidelityConfig)


def main() -> None:
    """Run the command."""
    run_command(_fidelity, "hw_fidelity")


def _fidelity(cfg: DictConfig) -> None:
    run, out = read_run(find_data(cfg.run)), Path(cfg.out)
    latency = load_calibration(CALIBRATION)
    fixed_s = fit_fixed_s(run, latency)
    engine = simulate(run, latency.with_fixed(fixed_s, f"hw.fidelity, first {FIT_UNTIL_S:.0f} s"))
    records = engine.records()
    errors = compare(run, records)
    content = {
        "commit": commit(),
        "calibration": CALIBRATION,
        "fit_until_s": FIT_UNTIL_S,
        "fixed_s": fixed_s,
        "errors": errors,
        "counts": counts(run, records, len(engine.iterations())),
    }
    write_json(out / "fidelity.json", content)
    write_text(out / "index.md", page(content))
    Console().print(error_table(errors, fixed_s))
    print(f"files: {out / 'index.md'}, {out / 'fidelity.json'}")


def error_table(errors: dict[str, Any], fixed_s: float) -> Table:
    """Return the relative errors as a table for a terminal."""
    table = Table(title=f"relative error, overhead {fixed_s * 1e3:.1f} ms fitted on the first {FIT_UNTIL_S:.0f} s")
    for column in ("", *STATISTICS, "correlation"):
        table.add_column(column, justify="right")
    for name in ("ttft_s", "tpot_s", "e2e_s"):
        cells = [f"{100 * errors[name][s]['error']:+.1f} %" for s in STATISTICS]
        table.add_row(name, *cells, f"{errors[name]['correlation']:.3f}")
    table.add_row("makespan_s", f"{100 * errors['makespan_s']['error']:+.1f} %", "", "", "", "")
    return table


if __name__ == "__main__":
    main()
