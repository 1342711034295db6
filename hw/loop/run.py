"""``python -m hw.loop``: in each round predictions first, then the judged runs; at the end the verdict."""

from __future__ import annotations

import json
import random
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
    in_hindsight,
    machine_of,
    note_judged,
    predict,
    predicted_utility,
    priced_for,
    read_predictions,
)
from hw.loop.settings import check_settings, check_windows, description, of_window, results_folder
from hw.loop.verdict import judge, levels
from hw.validate.machine_speed import factors_by_precision, without_passes
from sim.config import build, one_thread, run_command
from sim.errors import ConfigError
from sim.json_file import read_json_object
from sim.paths import RESULTS
from sim.progress import progress
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
    """A window once: the machine's speed, the predictions at it, and the real runs right after them.

    number: from 1 on. cfg: of this window alone. folder: of its runs. predictions: content of its file.
    real: policy -> figures of each judged run.
    """

    number: int
    cfg: DictConfig
    folder: Path
    predictions: dict[str, Any]
    real: dict[str, list[dict[str, Any]]]

    @property
    def window(self) -> str:
        """The label of the window."""
        return str(next(iter(self.cfg.windows)))

    @property
    def repeats(self) -> int:
        """How often each policy served the window."""
        return min(map(len, self.real.values()))


def _loop(cfg: DictConfig) -> int:
    check_settings(cfg)
    check_gpu(build(cfg.gpu))
    console = Console(width=None if sys.stdout.isatty() else 130)
    out = results_folder(cfg, DEFAULT_OUT)
    if cfg.page == "only":
        content = read_json_object(out / RESULT, ConfigError, "run python -m hw.loop")
        return _written(content, out, console)
    check_windows(cfg, 1.0)  # before the machine is measured, which takes a minute; the number of requests stays
    real, rounds = RealServer(cfg), []
    for number in range(1, (1 if cfg.page == "predict" else cfg.rounds) + 1):
        order = list(map(str, cfg.windows))
        random.Random(f"{cfg.seed} {number}").shuffle(order)
        for window in order:
            folder = Path(cfg.runs) / f"round{number}" / window
            if cfg.page != "judge" or (folder / PREDICTIONS).is_file():
                rounds.append(_round(of_window(cfg, window), number, folder, real, console))
    if cfg.page == "predict":
        return 0
    content = judged(cfg, rounds)
    write_json(out / RESULT, content)
    return _written(content, out, console)


def _round(cfg: DictConfig, number: int, folder: Path, real: RealServer, console: Console) -> Round:
    """Predict a window and serve it, unless that was done; return what there is."""
    predictions = _predictions(cfg, folder, real)
    slowdown = float(predictions["slowdown"])
    if missing_runs(cfg, folder):
        _show_predictions(predictions, number, console)
        if cfg.page == "also":
            note_judged(folder, predictions)
            priced = priced_for(cfg, folder, machine_of(predictions, folder))
            run_missing(priced, folder, slowdown, real, lambda line: console.print(line, highlight=False))
    (by_policy,) = real_outcomes(cfg, folder, slowdown, complete_repeats(cfg, folder)).values()
    return Round(number=number, cfg=cfg, folder=folder, predictions=predictions, real=by_policy)


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
    return predict(cfg, folder, measured_speed(cfg, folder, real) if cfg.measure else None)


def judged(cfg: DictConfig, rounds: Sequence[Round]) -> dict[str, Any]:
    """Return the content of the results file, from the rounds in which every window was served.

    Raises:
        ConfigError: if there is no such round.
    """
    windows, policies = list(map(str, cfg.windows)), list(map(str, cfg.policies))
    served = {(one.number, one.window): one.repeats for one in rounds}
    numbers = [n for n in range(1, cfg.rounds + 1) if all(served.get((n, w), 0) == cfg.repeats for w in windows)]
    if not numbers:
        raise ConfigError(
            f"{cfg.runs} has no round in which every window and policy was served; run without page=judge"
        )
    kept = sorted((one for one in rounds if one.number in numbers), key=lambda one: one.number)
    of = {w: [one for one in kept if one.window == w] for w in windows}
    real = {w: {p: [run for one in of[w] for run in one.real[p]] for p in policies} for w in windows}
    simulated = {
        p: np.array([np.mean([predicted_utility(one.predictions, w, p) for one in of[w]]) for w in windows])
        for p in policies
    }
    reached = {p: np.array([[run["utility"] for run in real[w][p]] for w in windows]) for p in policies}
    changes = {
        p: float(np.mean([run["changes_per_minute"] for w in windows for run in real[w][p]]))
        for p in policies
        if p not in cfg.fixed
    }
    ranged = all(one.predictions["utility_at_run_speeds"] for one in kept)
    verdict = judge(
        simulated,
        reached,
        windows,
        points=float(cfg.points),
        learner=cfg.learner,
        changes=changes,
        least_changes=float(cfg.least_changes),
        ranges={p: [_at_speeds(of[w], w, p) for w in windows] for p in policies} if ranged else None,
    )
    return {
        "provenance": provenance(cfg.seed),
        "rounds": [_round_content(one) for one in kept],
        "settings": description(cfg),
        "repeats": len(numbers) * int(cfg.repeats),
        "note": str(cfg.note),
        "real": real,
        "device": _device(run_folder(kept[0].folder, kept[0].window, policies[0], 0)),
        "verdict": verdict,
        "hindsight": _hindsight_cells(of, reached, float(cfg.points)) if ranged else None,
    }


def _at_speeds(rounds: Sequence[Round], window: str, policy: str) -> list[float]:
    """Return the utilities predicted at the speeds of single reference runs, of all rounds of a window."""
    return [utility for one in rounds for utility in one.predictions["utility_at_run_speeds"][window][policy]]


def _hindsight_cells(
    of: Mapping[str, Sequence[Round]], reached: Mapping[str, Floats], points: float
) -> list[dict[str, Any]]:
    """Return the cells of the level with the machine as fast as it was during each judged run."""
    known: dict[str, list[float]] = {policy: [] for policy in reached}
    every = [(window, one) for window, rounds in of.items() for one in rounds]
    found: dict[str, list[dict[str, list[float]]]] = {}
    with progress("simulating at the speeds of the judged runs", len(every), "windows") as report:
        for number, (window, one) in enumerate(every, start=1):
            slower = {policy: [run["slower"] for run in runs] for policy, runs in one.real.items()}
            found.setdefault(window, []).append(in_hindsight(one.cfg, one.predictions, one.folder, slower))
            report(number)
    for policy, utilities in known.items():
        for window in of:
            utilities.append(float(np.mean([utility for one in found[window] for utility in one[policy]])))
    return levels({p: np.array(utilities) for p, utilities in known.items()}, reached, list(of), points)


def _round_content(one: Round) -> dict[str, Any]:
    """Return what the results file has of a round."""
    kept = {key: value for key, value in one.predictions.items() if key != "description"}
    references = [without_passes(reference) for reference in one.predictions["references"]]
    return {
        "round": one.number,
        "window": one.window,
        "predictions": kept | {"references": references},
        "measured": _by_precision(one.predictions["references"]),
    }


def _by_precision(references: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    return {str(bits): each for bits, each in factors_by_precision(references).items()}


def _device(run: Path) -> dict[str, Any]:
    path = run / "hardware.json"
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
