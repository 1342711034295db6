"""Command ``python -m hw.compare RUN_SIM RUN_HW [RUN_HW ...]``: the errors of a simulated run against real runs."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig
from rich.console import Console

from hw.calibrate.calibration import slower
from hw.calibrate.writing import write_calibration
from hw.validate.compare import Run, as_seen, check_sides, compare, plot, print_comparison, read_run
from hw.validate.machines import SAME_SPEED, calibration_name, machine_note
from sim.config import run_command
from sim.cost.latency import CALIBRATIONS
from sim.errors import ConfigError
from sim.json_file import read_json_object
from sim.results.run_folder import own_folder, provenance, write_json


@dataclass(kw_only=True)
class CompareRunsConfig:
    """Which runs to compare.

    runs: the folder of a simulated run, then those of real runs.
    out: where to write; a new folder under runs/ when null.
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
    check_sides(simulated, real)
    simulated = as_seen(simulated, real)
    result = compare(simulated, real)
    out = Path(cfg.out) if cfg.out is not None else own_folder("compare")
    if not result["held"]:
        result["machine_note"] = _machine_note(simulated, real, result["speed_factor"], out)
    notes = sorted({str(note) for run in real if (note := (run.hardware or {}).get("weights_note"))})
    if notes:
        result["weights_notes"] = notes
    write_json(out / "compare.json", {"provenance": provenance(0), **result})
    plot(out / "compare.png", simulated, real)
    console = Console(width=None if sys.stdout.isatty() else 130)
    print_comparison(result, console)
    for note in notes:
        console.print(f"note: {note}", highlight=False, soft_wrap=True)
    console.print(f"files: {out / 'compare.json'}, {out / 'compare.png'}", highlight=False, soft_wrap=True)
    return 0 if result["held"] else 1


def _machine_note(simulated: Run, real: Sequence[Run], factor: float | None, out: Path) -> str | None:
    """Return the note on a machine other than the calibrated one, after writing a calibration at its speed."""
    name = calibration_name(simulated.config)
    calibrated_on, scaled = None, None
    if name is not None and factor is not None:
        path = Path(name) if name.endswith(".json") else CALIBRATIONS / f"{name}.json"
        if path.is_file():
            content = read_json_object(path, ConfigError, "write it again with hw.calibrate")
            run = content.get("device_run")
            calibrated_on = run.get("processor") if isinstance(run, dict) else None
            if abs(factor - 1.0) > SAME_SPEED:
                scaled = out / f"{path.stem}_x{factor:.2f}.json"
                write_calibration(_at_speed(content, factor, scaled.stem), scaled)
    hardware = [run.hardware or {} for run in real]
    ran_on = next((one.get("processor") or one.get("device") for one in hardware), None)
    return machine_note(factor, calibrated_on, ran_on, name, scaled)


def _at_speed(content: dict[str, Any], factor: float, name: str) -> dict[str, Any]:
    """Return a calibration with all times multiplied by a factor, which states so."""
    note = (
        f"hw.compare multiplied all times of {content['name']} by {factor:.4f}, the speed of the machine of a real run"
    )
    return slower(content, factor) | {"name": name, "kind": "derived", "notes": [*content["notes"], note]}


if __name__ == "__main__":
    main()
