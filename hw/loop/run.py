"""``python -m hw.loop``: predictions first, then the judged runs, then the verdict."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from hw.engine.hw_engine import check_gpu
from hw.loop.judged_runs import DURING, RealServer, measured_speed, real_outcomes, run_missing
from hw.loop.page import page, plot
from hw.loop.predictions import (
    check_same_settings,
    check_unchanged,
    factors_of,
    in_hindsight,
    machine_of,
    note_judged,
    predict,
    predicted_utility,
    priced_for,
    read_predictions,
)
from hw.loop.settings import check_settings, check_windows, results_folder
from hw.loop.verdict import judge, levels
from hw.validate.machine_speed import MachineSpeed, factors_by_precision, without_passes
from sim.config import build, one_thread, run_command
from sim.errors import ConfigError
from sim.json_file import read_json_object
from sim.paths import RESULTS
from sim.results.run_folder import provenance, write_json, write_text

DEFAULT_OUT = RESULTS / "loop"
RESULT, PAGE, PLOT = "loop.json", "index.md", "loop.png"


def main() -> None:
    """Run the command."""
    one_thread()
    run_command(_loop, "hw_loop")


def _loop(cfg: DictConfig) -> int:
    check_settings(cfg)
    check_gpu(build(cfg.gpu))
    console = Console(width=None if sys.stdout.isatty() else 130)
    out = results_folder(cfg, DEFAULT_OUT)
    if cfg.page == "only":
        content = read_json_object(out / RESULT, ConfigError, "run python -m hw.loop")
        return _written(content, out, console)
    folder = Path(cfg.runs)
    real = RealServer(cfg)
    predictions = _predictions(cfg, folder, real)
    _show_predictions(predictions, console)
    if cfg.page == "predict":
        return 0
    if cfg.page == "also":
        note_judged(folder, predictions)
        machine = machine_of(predictions, folder)
        priced = priced_for(cfg, folder, machine)
        run_missing(priced, folder, machine.slowdown, real, lambda line: console.print(line, highlight=False))
    content = judged(cfg, folder, predictions)
    write_json(out / RESULT, content)
    return _written(content, out, console)


def _predictions(cfg: DictConfig, folder: Path, real: RealServer) -> dict[str, Any]:
    """Return the predictions of the folder, after making them if there are none.

    Raises:
        ConfigError: if they were made with other settings, if they were changed after the first judged run, or if there
            are none and nothing may run.
    """
    found = read_predictions(folder)
    if found is not None:
        check_unchanged(found, folder)
        check_same_settings(found, cfg, folder)
        return found
    if cfg.page == "judge":
        raise ConfigError(f"{folder} has no predictions; run without page=judge")
    if (folder / "real").exists():
        raise ConfigError(f"{folder} has judged runs but no predictions that came before them; take another folder")
    check_windows(cfg, 1.0)  # before the machine is measured, which takes a minute; the number of requests stays
    return predict(cfg, folder, measured_speed(cfg, folder, real) if cfg.measure else None)


def judged(cfg: DictConfig, folder: Path, predictions: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of the results file.

    Raises:
        ConfigError: if a cell has no judged run.
    """
    outcomes = real_outcomes(cfg, folder, float(predictions["slowdown"]))
    complete = [
        repeat
        for repeat in range(cfg.repeats)
        if all(repeat in by_repeat for by_policy in outcomes.values() for by_repeat in by_policy.values())
    ]
    if not complete:
        raise ConfigError(f"{folder} has no repeat in which every window and policy was served; run without page=judge")
    windows, policies = list(outcomes), list(next(iter(outcomes.values())))
    simulated = {p: np.array([predicted_utility(predictions, w, p) for w in windows]) for p in policies}
    real = {p: np.array([[outcomes[w][p][r]["utility"] for r in complete] for w in windows]) for p in policies}
    changes = {
        p: float(np.mean([outcomes[w][p][r]["changes_per_minute"] for w in windows for r in complete]))
        for p in policies
        if p not in cfg.fixed
    }
    at_speeds = predictions.get("utility_at_run_speeds") or {}
    verdict = judge(
        simulated,
        real,
        windows,
        points=float(cfg.points),
        learner=cfg.learner,
        changes=changes,
        least_changes=float(cfg.least_changes),
        ranges={p: [at_speeds[w][p] for w in windows] for p in policies} if at_speeds else None,
    )
    during = MachineSpeed(folder / DURING)
    machine = factors_of(cfg, during)
    hindsight = in_hindsight(cfg, predictions, during)
    if hindsight is not None:
        known = {p: np.array([hindsight["utility"][w][p] for w in windows]) for p in policies}
        hindsight = {"speeds": hindsight["speeds"], "cells": levels(known, real, windows, float(cfg.points))}
    kept = {key: value for key, value in predictions.items() if key != "description"}
    return {
        "provenance": provenance(cfg.seed),
        "predictions": kept | {"references": [without_passes(one) for one in predictions["references"]]},
        "settings": predictions["description"],
        "repeats": len(complete),
        "note": str(cfg.note),
        "speed": {
            "before": predictions["slowdown"],
            "before_each": _by_precision(predictions["references"]),
            "factors": predictions["factors"],
            "during": machine.slowdown if during.references else None,
            "during_each": _by_precision(during.references),
            "factors_during": machine.pairs(),
        },
        "real": {w: {p: [outcomes[w][p][r] for r in complete] for p in policies} for w in windows},
        "device": _device(folder, windows[0], policies[0]),
        "verdict": verdict,
        "hindsight": hindsight,
    }


def _by_precision(references: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    return {str(bits): each for bits, each in factors_by_precision(references).items()}


def _device(folder: Path, window: str, policy: str) -> dict[str, Any]:
    path = folder / "real" / window / policy / "hw0" / "hardware.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    return {key: content[key] for key in ("device", "processor", "torch", "transformers", "clock", "attention")} | {
        "weights_note": content["weights_note"]
    }


def _written(content: Mapping[str, Any], out: Path, console: Console) -> int:
    """Write the page and the graph, print the verdict; return the exit status."""
    write_text(out / PAGE, page(content))
    plot(out / PLOT, content)
    verdict = content["verdict"]
    order, level = verdict["order"], verdict["level"]
    missed = [row for row in level["cells"] if not row["holds"]]
    lines = [
        f"order: {order['agree']} of {order['beyond_noise']} differences beyond their noise have the predicted sign",
        f"level: {len(level['cells']) - len(missed)} of {len(level['cells'])} utilities as predicted",
        "plan changes a minute: " + ", ".join(f"{k} {v:.1f}" for k, v in verdict["changes"]["per_minute"].items()),
    ]
    if "learner" in verdict:
        one = verdict["learner"]
        noise = "unknown" if one["noise"] is None else f"{one['noise']:.4f}"
        lines.append(
            f"{one['learner']} - {one['best_rule']}: {one['difference']:+.4f}, noise {noise}: {one['verdict']}"
        )
    for line in (*lines, f"files: {out / RESULT}, {out / PAGE}, {out / PLOT}"):
        console.print(line, highlight=False, soft_wrap=True)
    return 0 if verdict["holds"] else 1


def _show_predictions(predictions: Mapping[str, Any], console: Console) -> None:
    """Print the predicted utilities, with plan changes a minute."""
    outcomes = predictions["outcomes"]
    policies = list(next(iter(outcomes.values())))
    shown = Table(title=f"predicted utility (plan changes a minute), slowdown {predictions['slowdown']:.3f}")
    shown.add_column("window")
    for policy in policies:
        shown.add_column(policy, justify="right")
    utilities = {w: {p: predicted_utility(predictions, w, p) for p in policies} for w in outcomes}
    for window, by in outcomes.items():
        named = f"{window}: {predictions['windows'][window]['requests']:.0f}"
        cells = (f"{utilities[window][p]:.4f} ({by[p]['changes_per_minute']:.0f})" for p in policies)
        shown.add_row(named, *cells)
    means = [float(np.mean([each[p] for each in utilities.values()])) for p in policies]
    shown.add_row("mean", *(f"{mean:.4f}" for mean in means))
    console.print(shown)
    console.print(f"predictions: SHA-256 {predictions['sha256']}", highlight=False)
