"""``python -m hw.loop``: in each round predictions first, then the judged runs; at the end the verdict."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from hw.engine.hw_engine import check_gpu
from hw.loop.judged_runs import (
    DURING,
    RealServer,
    complete_repeats,
    measured_speed,
    missing_runs,
    real_outcomes,
    run_folder,
    run_missing,
)
from hw.loop.page import page, plot
from hw.loop.predictions import FILE as PREDICTIONS
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
from sim.types import Floats

DEFAULT_OUT = RESULTS / "loop"
RESULT, PAGE, PLOT = "loop.json", "index.md", "loop.png"


def main() -> None:
    """Run the command."""
    one_thread()
    run_command(_loop, "hw_loop")


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """The machine's speed, the predictions at it, and the real runs after them.

    folder: of its runs. predictions: content of its file. repeats: those that are complete.
    real: window -> policy -> figures of each of these repeats.
    """

    folder: Path
    predictions: dict[str, Any]
    repeats: list[int]
    real: dict[str, dict[str, list[dict[str, Any]]]]


def _loop(cfg: DictConfig) -> int:
    check_settings(cfg)
    check_gpu(build(cfg.gpu))
    console = Console(width=None if sys.stdout.isatty() else 130)
    out = results_folder(cfg, DEFAULT_OUT)
    if cfg.page == "only":
        content = read_json_object(out / RESULT, ConfigError, "run python -m hw.loop")
        return _written(content, out, console)
    real, rounds = RealServer(cfg), []
    for number in range(1, cfg.rounds + 1):
        folder = Path(cfg.runs) / f"round{number}"
        if cfg.page == "judge" and not (folder / PREDICTIONS).is_file():
            continue
        predictions = _predictions(cfg, folder, real)
        if missing_runs(cfg, folder):
            _show_predictions(predictions, number, console)
            if cfg.page == "predict":
                return 0
        if cfg.page == "also":
            note_judged(folder, predictions)
            machine = machine_of(predictions, folder)
            priced = priced_for(cfg, folder, machine)
            run_missing(priced, folder, machine.slowdown, real, lambda line: console.print(line, highlight=False))
        repeats = complete_repeats(cfg, folder)
        outcomes = real_outcomes(cfg, folder, float(predictions["slowdown"]), repeats)
        rounds.append(Round(folder=folder, predictions=predictions, repeats=repeats, real=outcomes))
    if cfg.page == "predict":
        raise ConfigError(f"{cfg.runs} has all runs of {cfg.rounds} rounds; raise rounds, or judge them: page=judge")
    content = judged(cfg, [one for one in rounds if one.repeats])
    write_json(out / RESULT, content)
    return _written(content, out, console)


def _predictions(cfg: DictConfig, folder: Path, real: RealServer) -> dict[str, Any]:
    """Return the predictions of a round, after making them if there are none.

    Raises:
        ConfigError: if they were made with other settings, if they were changed after the first judged run, or if there
            are none and judged runs exist.
    """
    found = read_predictions(folder)
    if found is not None:
        check_unchanged(found, folder)
        check_same_settings(found, cfg, folder)
        return found
    if (folder / "real").exists():
        raise ConfigError(f"{folder} has judged runs but no predictions that came before them; take another folder")
    check_windows(cfg, 1.0)  # before the machine is measured, which takes a minute; the number of requests stays
    return predict(cfg, folder, measured_speed(cfg, folder, real) if cfg.measure else None)


def judged(cfg: DictConfig, rounds: Sequence[Round]) -> dict[str, Any]:
    """Return the content of the results file.

    Raises:
        ConfigError: if no round has a repeat in which every window was served under every policy.
    """
    if not rounds:
        raise ConfigError(
            f"{cfg.runs} has no round with a repeat in which every window and policy was served; run without page=judge"
        )
    first, every = rounds[0], [one for each in rounds for one in [each.predictions] * len(each.repeats)]
    windows, policies = list(first.real), list(next(iter(first.real.values())))
    real = {w: {p: [one for each in rounds for one in each.real[w][p]] for p in policies} for w in windows}
    simulated = {
        p: np.array([np.mean([predicted_utility(one, w, p) for one in every]) for w in windows]) for p in policies
    }
    reached = {p: np.array([[one["utility"] for one in real[w][p]] for w in windows]) for p in policies}
    changes = {
        p: float(np.mean([one["changes_per_minute"] for w in windows for one in real[w][p]]))
        for p in policies
        if p not in cfg.fixed
    }
    verdict = judge(
        simulated,
        reached,
        windows,
        points=float(cfg.points),
        learner=cfg.learner,
        changes=changes,
        least_changes=float(cfg.least_changes),
        ranges={p: [_at_speeds(rounds, w, p) for w in windows] for p in policies}
        if all(each.predictions["utility_at_run_speeds"] for each in rounds)
        else None,
    )
    known = [in_hindsight(cfg, each.predictions, MachineSpeed(each.folder / DURING)) for each in rounds]
    return {
        "provenance": provenance(cfg.seed),
        "rounds": [_round_content(cfg, each) for each in rounds],
        "settings": first.predictions["description"],
        "repeats": len(every),
        "note": str(cfg.note),
        "real": real,
        "device": _device(first.folder, windows[0], policies[0], first.repeats[0]),
        "verdict": verdict,
        "hindsight": _hindsight_cells(rounds, known, reached, windows, float(cfg.points)),
    }


def _at_speeds(rounds: Sequence[Round], window: str, policy: str) -> list[float]:
    """Return the utilities predicted at the speeds of single reference runs, of all rounds."""
    return [utility for one in rounds for utility in one.predictions["utility_at_run_speeds"][window][policy]]


def _hindsight_cells(
    rounds: Sequence[Round],
    known: Sequence[Mapping[str, Any] | None],
    reached: Mapping[str, Floats],
    windows: Sequence[str],
    points: float,
) -> dict[str, Any] | None:
    """Return the cells of the level as simulation in hindsight gives them; None if some round has no hindsight."""
    if any(one is None for one in known):
        return None
    every = [one["utility"] for one, each in zip(known, rounds, strict=True) if one for _ in each.repeats]
    simulated = {p: np.array([np.mean([one[w][p] for one in every]) for w in windows]) for p in reached}
    return {"speeds": [one["speeds"] for one in known if one], "cells": levels(simulated, reached, windows, points)}


def _round_content(cfg: DictConfig, one: Round) -> dict[str, Any]:
    """Return what the results file has of a round."""
    kept = {key: value for key, value in one.predictions.items() if key != "description"}
    references = [without_passes(reference) for reference in one.predictions["references"]]
    during = MachineSpeed(one.folder / DURING)
    machine = factors_of(cfg, during)
    return {
        "predictions": kept | {"references": references},
        "repeats": len(one.repeats),
        "speed": {
            "before": one.predictions["slowdown"],
            "before_each": _by_precision(one.predictions["references"]),
            "factors": one.predictions["factors"],
            "during": machine.slowdown if during.references else None,
            "during_each": _by_precision(during.references),
            "factors_during": machine.pairs(),
        },
    }


def _by_precision(references: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    return {str(bits): each for bits, each in factors_by_precision(references).items()}


def _device(folder: Path, window: str, policy: str, repeat: int) -> dict[str, Any]:
    path = run_folder(folder, window, policy, repeat) / "hardware.json"
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


def _show_predictions(predictions: Mapping[str, Any], number: int, console: Console) -> None:
    """Print the predicted utilities of a round, with plan changes a minute."""
    outcomes = predictions["outcomes"]
    policies = list(next(iter(outcomes.values())))
    slowdown = float(predictions["slowdown"])
    shown = Table(title=f"round {number}: predicted utility (plan changes a minute), slowdown {slowdown:.3f}")
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
