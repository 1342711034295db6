"""The reference runs and the judged runs of a part of a round, on the real model."""

from __future__ import annotations

import gc
import random
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from hw.calibrate.engine_runs import Load, load_of
from hw.checkup.policies import serve
from hw.elastic.model import ElasticModel
from hw.loop.predictions import outcome
from hw.loop.settings import cells, run_config
from hw.replay.run import engine_over, interrupt_between_iterations, load_elastic
from hw.validate.machine_speed import SERVED_S, MachineSpeed
from sim.config import build
from sim.cost.latency import LatencyModel
from sim.errors import ConfigError
from sim.json_file import read_json_object
from sim.progress import progress
from sim.replay.run import server_spec

BEFORE = "before"
"""Folder of the reference runs before the predictions, which set their speed."""


class RealServer:
    """The real model, loaded once, when the first run needs it."""

    def __init__(self, cfg: DictConfig) -> None:
        """Load nothing yet."""
        self._cfg = cfg
        self._loaded: tuple[ElasticModel, Any] | None = None

    @property
    def loaded(self) -> tuple[ElasticModel, Any]:
        """The model and its tokenizer."""
        if self._loaded is None:
            self._loaded = load_elastic(build(self._cfg.model), self._cfg.hw, self._cfg.model)
        return self._loaded

    def measure(self, speed: MachineSpeed) -> None:
        """Serve one reference run, at the precision whose turn it is."""
        elastic, _ = self.loaded
        speed.measure(
            elastic,
            self._cfg.hw.clock,
            self._prices(),
            self._load(elastic),
            precisions_of(self._cfg),
            float(self._cfg.reference_s),
        )

    def serve(self, folder: Path, cfg: DictConfig) -> None:
        """Serve one judged run."""
        engine, policy = engine_over(cfg, *self.loaded, quality_by_table=True)
        try:
            with interrupt_between_iterations(engine):
                serve(folder, cfg, engine, policy)
        finally:
            engine.close()
        del engine
        gc.collect()
        self.loaded[0].hardware.give_back()

    def _prices(self) -> LatencyModel:
        return server_spec(self._cfg).priced()

    def _load(self, elastic: ElasticModel) -> Load:
        gpu = build(self._cfg.gpu)
        return load_of(elastic, SERVED_S, gpu.memory_bytes, gpu.memory_bandwidth_bytes_per_s)


def precisions_of(cfg: DictConfig) -> tuple[int, ...]:
    """Return the precisions of weights at which the reference runs serve, the highest first.

    Raises:
        ConfigError: if ``reference_bits`` names one without prices, or leaves out the highest, which sets the slowdown.
    """
    priced = sorted(server_spec(cfg).priced().bits, reverse=True)
    chosen = sorted(set(cfg.reference_bits or priced), reverse=True)
    if not set(chosen) <= set(priced) or chosen[0] != priced[0]:
        raise ConfigError(
            f"reference_bits is {list(cfg.reference_bits)}; it must hold {priced[0]}, and nothing but precisions that "
            f"the calibration has: {', '.join(map(str, priced))}"
        )
    return tuple(chosen)


def measured_speed(cfg: DictConfig, folder: Path, real: RealServer) -> MachineSpeed:
    """Return the reference runs before the predictions, after serving those that are missing."""
    speed = MachineSpeed(folder / BEFORE)
    missing = int(cfg.references) * len(precisions_of(cfg)) - len(speed.references)
    with progress("measuring the machine's speed", max(missing, 0), "reference runs") as report:
        for number in range(missing):
            real.measure(speed)
            report(number + 1)
    return speed


def run_folder(folder: Path, window: str, policy: str, repeat: int) -> Path:
    """Return the folder of one judged run."""
    return folder / "real" / window / policy / f"hw{repeat}"


def missing_runs(cfg: DictConfig, folder: Path) -> list[tuple[str, str, int]]:
    """Return the judged runs that a part lacks: one repeat after the other, each in its own random order."""
    todo: list[tuple[str, str, int]] = []
    for repeat in range(cfg.repeats):
        jobs = [(window, policy, repeat) for window, policy in cells(cfg)]
        # In random order, so that a busy spell of the machine hits all policies.
        random.Random(f"{cfg.seed} {folder.parent.name} {folder.name} {repeat}").shuffle(jobs)
        todo += [job for job in jobs if not (run_folder(folder, *job) / "summary.json").is_file()]
    return todo


def complete_repeats(cfg: DictConfig, folder: Path) -> list[int]:
    """Return the repeats of a part in which every policy was served."""
    missing = {repeat for _, _, repeat in missing_runs(cfg, folder)}
    return [repeat for repeat in range(cfg.repeats) if repeat not in missing]


def run_missing(cfg: DictConfig, folder: Path, slowdown: float, real: RealServer, say: Callable[[str], None]) -> None:
    """Serve the judged runs that are missing; keep those that exist."""
    todo = missing_runs(cfg, folder)
    with progress("serving", len(todo), "runs") as report:
        for number, (window, policy, repeat) in enumerate(todo, start=1):
            one = run_config(cfg, window, policy, slowdown)
            at = run_folder(folder, window, policy, repeat)
            real.serve(at, one)
            say(f"{window}, {policy}: {outcome(at, one)['utility']:.4f}")
            report(number, f"{window}, {policy}")


def real_outcomes(
    cfg: DictConfig, folder: Path, predictions: Mapping[str, Any], repeats: Sequence[int]
) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Return window -> policy -> figures of the judged runs of a part, one for each of these repeats.

    ``slower`` is how much longer the passes of a run took than predicted.

    Raises:
        ConfigError: for a run that was not served for these predictions, or before they were written.
    """
    slowdown = float(predictions["slowdown"])
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for window, policy in cells(cfg):
        one = run_config(cfg, window, policy, slowdown)
        runs = [run_folder(folder, window, policy, repeat) for repeat in repeats]
        for at in runs:
            _check_after(at, predictions)
        found.setdefault(window, {})[policy] = [outcome(at, one) | {"slower": _slower(at, slowdown)} for at in runs]
    return found


def _check_after(run: Path, predictions: Mapping[str, Any]) -> None:
    """Check that a run was served at the speed of the predictions, after they were written."""
    slowdown = float(OmegaConf.load(run / "config.yaml").slowdown)
    began = read_json_object(run / "provenance.json", ConfigError, "serve again in another folder, runs=FOLDER")
    predicted_at, began_at = predictions["provenance"]["written_at"], began["written_at"]
    if slowdown != float(predictions["slowdown"]):
        raise ConfigError(
            f"{run} was served at a slowdown of {slowdown:g}, but its predictions are for {predictions['slowdown']:g}; "
            "predict and serve again in another folder, runs=FOLDER"
        )
    if datetime.fromisoformat(began_at) < datetime.fromisoformat(predicted_at):
        raise ConfigError(
            f"{run} began at {began_at}, before its predictions were written at {predicted_at}; predict and serve "
            "again in another folder, runs=FOLDER"
        )


def _slower(run: Path, slowdown: float) -> float:
    path = run / "hardware.json"
    content = read_json_object(path, ConfigError, "serve again in another folder, runs=FOLDER")
    if "busy_s" not in content:
        raise ConfigError(f"{path} is of an earlier version; serve again in another folder, runs=FOLDER")
    return float(content["busy_s"]) / (float(content["priced_s"]) * slowdown)
