"""Command ``python -m hw.calibrate``: writes the latency tables that the simulator reads."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig
from rich.console import Console

from hw.calibrate.published import from_measurements
from hw.calibrate.writing import error_table
from sim.config import build, run_command
from sim.cost.latency import CALIBRATIONS
from sim.errors import ConfigError, nearest
from sim.paths import CHECKOUT, find_data


@dataclass(kw_only=True)
class GridConfig:
    """Where the tables of ``source=device`` end; null takes what suits the device."""

    tokens: int | None = None
    batch: int | None = None
    context: int | None = None


@dataclass(kw_only=True)
class CalibrateConfig:
    """What to calibrate.

    source: measurements (published ones), or device (this machine). out: the folder to write to; when null,
        conf/calibration of a checkout, where a file changes only with its numbers, else ./calibration.
    target: of source=measurements: names of targets, or all. data: their folder, a path or one under RAP_LAB_DATA.
    model, gpu: of source=device: what is measured on what.
    checkpoint: weights, as in hw.replay; the model's own when empty. threads: of PyTorch.
    attention: which code computes it, as in hw.replay.
    clock: cpu or wall; null takes cpu on a CPU, which others may share, and wall on a GPU.
    seconds: to measure, at most. only: all, or changes (what plan changes cost).
    grid: where the tables end: tokens of an iteration, batch of decodes, context of each; null takes 256, 24 and 512 on
        a CPU, and 8,192, 256 and 8,192 on a GPU. The memory of the device and the positions of the model may end them
        earlier; the file says so.
    """

    model: Any
    gpu: Any
    source: str = "measurements"
    target: Any = "all"
    data: str = "calibration"
    out: str | None = None
    checkpoint: str = ""
    clock: str | None = None
    threads: int = 1
    attention: str = "auto"
    seconds: float = 480.0
    seed: int = 0
    only: str = "all"
    grid: GridConfig = field(default_factory=GridConfig)


ConfigStore.instance().store(name="calibrate_schema", node=CalibrateConfig)
SOURCES, ONLY = ("measurements", "device"), ("all", "changes")


def main() -> None:
    """Run the command."""
    run_command(_calibrate, "calibrate")


def _calibrate(cfg: DictConfig) -> None:
    for key, allowed in (("source", SOURCES), ("only", ONLY)):
        if cfg[key] not in allowed:
            raise ConfigError(f"unknown {key}={cfg[key]}; {nearest(cfg[key], allowed)}")
    if cfg.attention != "auto":
        from hw.elastic.attention_choice import check_attention  # imported late: source=measurements needs no torch

        check_attention(cfg.attention, "attention")
    out = Path(cfg.out) if cfg.out is not None else CALIBRATIONS if CHECKOUT else Path("calibration")
    if cfg.source == "device":
        contents = [_from_device(cfg, out)]
    else:
        names = [cfg.target] if isinstance(cfg.target, str) else [str(name) for name in cfg.target]
        contents = from_measurements([] if names == ["all"] else names, find_data(cfg.data), out)
    Console(width=None if sys.stdout.isatty() else 150).print(error_table(contents))
    for content in contents:
        print(f"calibration: {out / content['name']}.json")
    if out != CALIBRATIONS:
        print(f"use one: python -m sim.replay latency={out / contents[0]['name']}.json")


def _from_device(cfg: DictConfig, out: Path) -> dict[str, Any]:
    from hw.calibrate import this_device  # imported late: source=measurements needs no torch
    from hw.calibrate.device import DeviceSettings
    from hw.calibrate.grid import ON_CPU, ON_GPU, Limits
    from hw.elastic.checkpoint import checkpoint_of, config_of
    from hw.engine.clock import CLOCKS, check_clock
    from hw.engine.hw_engine import check_gpu

    model, gpu = build(cfg.model), build(cfg.gpu)
    check_gpu(gpu)
    place = this_device.place_of(gpu)
    clock = cfg.clock or ("cpu" if place == "cpu" else "wall")
    if clock not in CLOCKS:
        raise ConfigError(f"unknown clock {clock!r}; {nearest(clock, CLOCKS)}")
    check_clock(clock, place)
    chosen = {str(key): value for key, value in cfg.grid.items() if value is not None}
    limits = Limits(**asdict(ON_CPU if place == "cpu" else ON_GPU) | chosen)
    path = out / f"{model.name}_{gpu.name}.json"
    if cfg.only == "changes" and not path.is_file():
        raise ConfigError(f"only=changes adds to {path}, which does not exist; measure all first")
    checkpoint = checkpoint_of(cfg.model, cfg.checkpoint, model.name)
    elastic = this_device.load(model, gpu, checkpoint, cfg.threads, cfg.seed, config_of(cfg.model))
    settings = DeviceSettings(
        model=model.name,
        device=gpu.name,
        clock=clock,
        seconds=cfg.seconds,
        seed=cfg.seed,
        limits=limits,
        memory_bytes=gpu.memory_bytes,
        attention=cfg.attention,
    )
    if cfg.only == "changes":
        return this_device.measure_changes(elastic, settings, path)
    return this_device.measure_all(elastic, settings, gpu, out)


if __name__ == "__main__":
    main()
