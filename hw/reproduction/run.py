"""Command ``python -m hw.reproduction``: published figures next to this project's, one row of the page at a time."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig

from hw.calibrate.rtx3090 import NAME, Runs
from hw.fit.settings import names_of
from hw.reproduction import distserve_steps, memory, morphserve, rtx3090, splitwise, watermark
from hw.reproduction.page import page
from hw.validate import fidelity
from sim.config import one_thread, run_command
from sim.cost.latency import load_calibration
from sim.errors import ConfigError, RapLabError, nearest
from sim.json_file import read_json_object
from sim.paths import find_data
from sim.progress import progress
from sim.results.run_folder import commit, own_folder, write_json, write_text


@dataclass(kw_only=True)
class ReproductionConfig:
    """What to reproduce.

    row: names of rows, or all. out: the folder to write to; a new folder under runs/ when null.
    data: the folder of measurements, a path or one under RAP_LAB_DATA. workers: processes for the rows of replays.
    """

    row: Any = "all"
    out: str | None = None
    data: str = "calibration"
    workers: int = 1


ConfigStore.instance().store(name="reproduction_schema", node=ReproductionConfig)


def _rtx3090(cfg: DictConfig) -> dict[str, Any]:
    return rtx3090.row(Runs.read(find_data(cfg.data) / "morphserve_rtx3090"), load_calibration(NAME))


def _llmservingsim(cfg: DictConfig) -> dict[str, Any]:
    folder = find_data(cfg.data) / Path(fidelity.RUN).relative_to("calibration")
    run, latency = fidelity.read_run(folder), load_calibration(fidelity.CALIBRATION)
    fixed_s = fidelity.fit_fixed_s(run, latency)
    engine = fidelity.simulate(run, latency.with_fixed(fixed_s, "hw.reproduction"))
    return {"errors": fidelity.compare(run, engine.records()), "fixed_s": fixed_s, "until_s": fidelity.FIT_UNTIL_S}


def _distserve(data: Path) -> dict[str, Any]:
    capacity = memory.distserve(data / Path(memory.DISTSERVE).relative_to("calibration"))
    return capacity | {"steps": distserve_steps.steps_row(data)}


ROWS: dict[str, Callable[[DictConfig], dict[str, Any]]] = {
    "rap_memory": lambda cfg: memory.rap() | {"morphserve": memory.kv_blocks()},
    "morphserve_table": lambda cfg: morphserve.table_row(cfg.workers),
    "morphserve_windows": lambda cfg: morphserve.windows_row(cfg.workers),
    "morphserve_rtx3090": _rtx3090,
    "vllm_watermark": lambda cfg: watermark.row(),
    "distserve": lambda cfg: _distserve(find_data(cfg.data)),
    "splitwise": lambda cfg: splitwise.row(find_data(cfg.data) / Path(splitwise.DATA).relative_to("calibration")),
    "llmservingsim": _llmservingsim,
}
"""Name of a row, which is also that of its JSON file: what computes it."""


def main() -> None:
    """Run the command."""
    one_thread()
    run_command(_reproduce, "reproduction")


def _reproduce(cfg: DictConfig) -> None:
    names = names_of(cfg.row, "row")
    names = list(ROWS) if names == ["all"] else names
    for name in names:
        if name not in ROWS:
            raise ConfigError(f"row: there is no row {name!r}; {nearest(name, [*ROWS, 'all'])}")
    if not names:
        raise ConfigError(f"row is empty; name some of {', '.join(ROWS)}, or all")
    if cfg.workers < 1:
        raise ConfigError(f"workers is {cfg.workers}; it must be at least 1")
    out = Path(cfg.out) if cfg.out is not None else own_folder("reproduction")
    left_out = {}
    with progress("reproducing", len(names), "rows") as report:
        for number, name in enumerate(names, start=1):
            try:
                command, content = f"python -m hw.reproduction row={name}", ROWS[name](cfg)
                _write(out / f"{name}.json", {"commit": commit(), "command": command, **content})
            except RapLabError as error:  # its data is not here, most likely; the other rows do not need it
                if len(names) == 1:
                    raise
                left_out[name] = str(error)
            report(number)
    found = {
        name: read_json_object(out / f"{name}.json", ConfigError, f"run python -m hw.reproduction row={name}")
        for name in ROWS
        if (out / f"{name}.json").is_file()
    }
    text = page(found)
    write_text(out / "index.md", text)
    if len(names) < len(ROWS):
        text = page({name: found[name] for name in names if name in found})
    print(text, end="")
    print(f"files: {out}")
    for name, reason in left_out.items():
        print(f"row {name} is left out: {reason}", file=sys.stderr)
    if left_out:
        sys.exit(1)


def _write(path: Path, content: Mapping[str, Any]) -> None:
    """Write a row, unless its file holds the same figures already, whatever commit wrote it."""
    plain = json.loads(json.dumps(content))
    if path.is_file():
        old = read_json_object(path, ConfigError, "remove it, or set out=")
        if {**old, "commit": ""} == {**plain, "commit": ""}:
            return
    write_json(path, plain)
