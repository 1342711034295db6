"""Command ``python -m hw.fidelity``: the simulator against published runs of vLLM."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from hw.fit.error_page import error_graph, error_page
from hw.fit.studies import every_study
from hw.validate.fidelity import (
    CALIBRATION,
    FIT_UNTIL_S,
    RUN,
    SOURCE,
    STATISTICS,
    check_calibration,
    compare,
    counts,
    described,
    fit_fixed_s,
    page,
    read_run,
    simulate,
)
from sim.config import run_command
from sim.cost.latency import load_calibration
from sim.errors import CalibrationError
from sim.json_file import read_json_object
from sim.pages.render import show
from sim.paths import find_data
from sim.results.run_folder import commit, own_folder, write_json, write_text


@dataclass(kw_only=True)
class FidelityConfig:
    """Which run to compare with.

    run: its folder, a path or one under RAP_LAB_DATA. latency: of its model on its device, the name or path of a file.
    studies: with the published run, also simulate every other run at hand, with nothing fitted and fitted.
    out: the folder to write to; a new folder under runs/ when null.
    """

    run: str = RUN
    latency: str = CALIBRATION
    studies: bool = True
    out: str | None = None


ConfigStore.instance().store(name="hw_fidelity_schema", node=FidelityConfig)


def main() -> None:
    """Run the command."""
    run_command(_fidelity, "hw_fidelity")


def _fidelity(cfg: DictConfig) -> None:
    run, out = read_run(find_data(cfg.run)), Path(cfg.out) if cfg.out is not None else own_folder("fidelity")
    latency = load_calibration(cfg.latency)
    check_calibration(run, latency)
    fixed_s = fit_fixed_s(run, latency)
    engine = simulate(run, latency.with_fixed(fixed_s, f"hw.fidelity, first {FIT_UNTIL_S:.0f} s"))
    records = engine.records()
    errors = compare(run, records)
    content = {
        "commit": commit(),
        "command": _command(cfg),
        "source": SOURCE if cfg.run == RUN else cfg.run,
        "published": cfg.run == RUN,
        "calibration": latency.name,
        "fit_until_s": FIT_UNTIL_S,
        "fixed_s": fixed_s,
        "real": described(run),
        "errors": errors,
        "counts": counts(run, records, len(engine.iterations())),
    }
    if not _same_figures(out / "fidelity.json", content):
        write_json(out / "fidelity.json", content)
    else:
        content = read_json_object(out / "fidelity.json", CalibrationError, "remove it, or set out=")
    text = page(content)
    if cfg.studies and cfg.run == RUN:
        figures = _studies(out)
        text = error_page(figures, text)
    write_text(out / "index.md", text)
    Console().print(error_table(errors, fixed_s))
    print(f"files: {out / 'index.md'}, {out / 'fidelity.json'}")


def _studies(out: Path) -> dict[str, Any]:
    """Simulate every run at hand; write the figures and the graph, unless they are there; return the figures."""
    figures = {"commit": commit(), **every_study()}
    path = out / "errors.json"
    if not _same_figures(path, figures):
        write_json(path, figures)
        error_graph(out / "errors.png", figures)
    return read_json_object(path, CalibrationError, "remove it, or set out=")


def _command(cfg: DictConfig) -> str:
    """Return the command line that repeats the comparison."""
    plain = FidelityConfig()
    changed = [f" {key}={cfg[key]}" for key in ("run", "latency", "out") if cfg[key] != getattr(plain, key)]
    return "python -m hw.fidelity" + "".join(changed)


def _same_figures(path: Path, content: Mapping[str, Any]) -> bool:
    """Return whether a file holds the same figures already, whatever commit wrote it."""
    if not path.is_file():
        return False
    old = read_json_object(path, CalibrationError, "remove it, or set out=")
    return {**old, "commit": ""} == {**json.loads(json.dumps(content)), "commit": ""}


def error_table(errors: dict[str, Any], fixed_s: float) -> Table:
    """Return the relative errors as a table for a terminal."""
    table = Table(title=f"relative error, overhead {fixed_s * 1e3:.1f} ms fitted on the first {FIT_UNTIL_S:.0f} s")
    for column in ("", *STATISTICS, "correlation"):
        table.add_column(column, justify="right")
    for name in ("ttft_s", "tpot_s", "e2e_s"):
        cells = [f"{100 * errors[name][s]['error']:+.1f} %" for s in STATISTICS]
        table.add_row(name, *cells, show(errors[name]["correlation"], ".3f"))
    table.add_row("makespan_s", f"{100 * errors['makespan_s']['error']:+.1f} %", "", "", "", "")
    return table


if __name__ == "__main__":
    main()
