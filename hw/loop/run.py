"""``python -m hw.loop``: predict and serve one part of a round after the other; at the end the verdict."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig
from rich.console import Console

from hw.engine.hw_engine import check_gpu
from hw.loop.judged_runs import (
    BEFORE,
    RealServer,
    complete_repeats,
    measured_speed,
    missing_runs,
    precisions_of,
    real_outcomes,
    run_folder,
    run_missing,
)
from hw.loop.page import page, plot
from hw.loop.predictions import (
    JUDGED_FOR,
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
from hw.loop.settings import (
    PREDICTIONS,
    check_folder,
    check_settings,
    check_windows,
    description,
    parts_of,
    results_folder,
)
from hw.loop.verdict import judge, levels
from hw.validate.machine_speed import factors_by_precision, without_passes
from sim.atomic import sole_writer
from sim.config import build, one_thread, run_command
from sim.errors import ConfigError
from sim.json_file import read_json_object
from sim.paths import RESULTS
from sim.progress import progress
from sim.results.run_folder import provenance, write_json, write_text
from sim.types import Floats

OTHERS = "serve other rounds (first_round, rounds) meanwhile, or take another folder: runs=FOLDER"
DEFAULT_OUT = RESULTS / "loop"
RESULT, PAGE, PLOT = "loop.json", "index.md", "loop.png"


def main() -> None:
    """Run the command."""
    one_thread()
    run_command(_loop, "hw_loop")


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A window under one policy or all: the machine's speed, the predictions at it, and the real runs right after them.

    number: of the round, from 1 on. cfg: of this window and these policies. folder: of the runs. predictions: content
    of its file. real: policy -> figures of each judged run.
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


def _loop(cfg: DictConfig) -> int:
    check_settings(cfg)
    check_gpu(build(cfg.gpu))
    console = Console(width=None if sys.stdout.isatty() else 130)
    out = results_folder(cfg, DEFAULT_OUT)
    if cfg.page == "only":
        content = read_json_object(out / RESULT, ConfigError, "run python -m hw.loop")
        if not {"verdict", "rounds", "real", "provenance"} <= set(content):
            raise ConfigError(f"{out / RESULT} holds no results of the loop; delete it, and run python -m hw.loop")
        return _written(content, out, console)
    check_windows(cfg, 1.0)  # before the machine is measured, which takes a minute; the number of requests stays
    precisions_of(cfg)
    real, parts = RealServer(cfg), []
    for number in range(cfg.first_round, (cfg.first_round if cfg.page == "predict" else cfg.rounds) + 1):
        check_folder(cfg, number)
        with nullcontext() if cfg.page == "judge" else sole_writer(Path(cfg.runs) / f"round{number}", instead=OTHERS):
            for one, folder in parts_of(cfg, number):
                if cfg.page != "judge" or (folder / PREDICTIONS).is_file():
                    parts.append(_part(one, number, folder, real, console))
    if cfg.page in ("predict", "serve"):
        return 0
    content = judged(cfg, parts)
    write_json(out / RESULT, content)
    return _written(content, out, console)


def _part(cfg: DictConfig, number: int, folder: Path, real: RealServer, console: Console) -> Part:
    """Predict a part of a round and serve it, unless that was done; return what there is."""
    predictions = _predictions(cfg, folder, real, console)
    slowdown = float(predictions["slowdown"])
    if missing_runs(cfg, folder):
        _show_predictions(predictions, number, console)
        if cfg.page in ("also", "serve"):
            note_judged(folder, predictions)
            priced = priced_for(cfg, folder, machine_of(predictions, folder))
            run_missing(priced, folder, slowdown, real, lambda line: console.print(line, highlight=False))
    (by_policy,) = real_outcomes(cfg, folder, predictions, complete_repeats(cfg, folder)).values()
    return Part(number=number, cfg=cfg, folder=folder, predictions=predictions, real=by_policy)


def _predictions(cfg: DictConfig, folder: Path, real: RealServer, console: Console) -> dict[str, Any]:
    """Return the predictions of a part, after making them if there are none.

    Predictions at a measured speed are made again if no judged run began for them: the speed may have changed since.

    Raises:
        ConfigError: if they were made with other settings, if they were changed after the first judged run, or if there
            are none and judged runs exist.
    """
    found = read_predictions(folder)
    if found is not None:
        check_unchanged(found, folder)
        check_same_settings(found, cfg, folder)
        stale = cfg.measure and cfg.page in ("also", "serve") and not (folder / JUDGED_FOR).is_file()
        if not stale:
            return found
        console.print(
            f"{folder} was predicted at {found['provenance']['written_at']} and not served: it is predicted again",
            highlight=False,
            soft_wrap=True,
        )
    elif (folder / "real").exists():
        raise ConfigError(f"{folder} has judged runs but no predictions that came before them; take another folder")
    shutil.rmtree(folder / BEFORE, ignore_errors=True)  # of a measurement that did not end, or of another time
    return predict(cfg, folder, measured_speed(cfg, folder, real) if cfg.measure else None)


def judged(cfg: DictConfig, parts: Sequence[Part]) -> dict[str, Any]:
    """Return the content of the results file, from the rounds in which every window was served under every policy.

    Raises:
        ConfigError: if there is no such round, or if the reference runs of some predictions differ in kind.
    """
    windows, policies = list(map(str, cfg.windows)), list(map(str, cfg.policies))
    served = {(one.number, one.window, policy): len(runs) for one in parts for policy, runs in one.real.items()}
    numbers = [
        number
        for number in range(cfg.first_round, cfg.rounds + 1)
        if all(served.get((number, w, p), 0) == cfg.repeats for w in windows for p in policies)
    ]
    if not numbers:
        raise ConfigError(
            f"{cfg.runs} has no round in which every window and policy was served; run without page=judge"
        )
    kept = sorted((one for one in parts if one.number in numbers), key=lambda one: one.number)
    _check_alike(kept)
    of = {(w, p): [one for one in kept if one.window == w and p in one.real] for w in windows for p in policies}
    real = {w: {p: [run for one in of[w, p] for run in one.real[p]] for p in policies} for w in windows}
    simulated = {
        p: np.array([np.mean([predicted_utility(one.predictions, w, p) for one in of[w, p]]) for w in windows])
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
        ranges={p: [_at_speeds(of[w, p], w, p) for w in windows] for p in policies} if ranged else None,
    )
    return {
        "provenance": provenance(cfg.seed),
        "rounds": [_part_content(one) for one in kept],
        "left_out": _left_out(Path(cfg.runs), numbers),
        "commits": sorted({str(one.predictions["provenance"]["commit"]) for one in kept}),
        "settings": description(cfg),
        "repeats": len(numbers) * int(cfg.repeats),
        "note": str(cfg.note),
        "real": real,
        "device": _device(run_folder(kept[0].folder, kept[0].window, next(iter(kept[0].real)), 0)),
        "verdict": verdict,
        "hindsight": _hindsight_cells(kept, windows, reached, float(cfg.points)) if ranged else None,
    }


def _check_alike(parts: Sequence[Part]) -> None:
    """Check that all parts were predicted from the same kind of reference runs, and all with other speeds or none."""
    kinds = {
        (tuple(int(one["bits"]) for one in part.predictions["references"]), bool(part.predictions["run_speeds"]))
        for part in parts
    }
    if len(kinds) > 1:
        raise ConfigError(
            "some predictions were made with another number of reference runs, other reference_bits, or another value "
            "of ranges; serve again in another folder, runs=FOLDER"
        )


def _left_out(runs: Path, numbers: Sequence[int]) -> list[int]:
    """Return the rounds of which some judged run began, but which are not judged."""
    begun = {
        int(path.name[5:]) for path in runs.glob("round*") if path.name[5:].isdigit() and any(path.rglob(JUDGED_FOR))
    }
    return sorted(begun - set(numbers))


def _at_speeds(parts: Sequence[Part], window: str, policy: str) -> list[float]:
    """Return the utilities predicted at the speeds of single reference runs, of all rounds of a window."""
    return [utility for one in parts for utility in one.predictions["utility_at_run_speeds"][window][policy]]


def _hindsight_cells(
    parts: Sequence[Part], windows: Sequence[str], reached: Mapping[str, Floats], points: float
) -> list[dict[str, Any]]:
    """Return the cells of the level with the machine as fast as it was during each judged run."""
    found: dict[tuple[str, str], list[float]] = {}
    with progress("simulating at the speeds of the judged runs", len(parts), "predictions") as report:
        for number, one in enumerate(parts, start=1):
            slower = {policy: [run["slower"] for run in runs] for policy, runs in one.real.items()}
            for policy, utilities in in_hindsight(one.cfg, one.predictions, one.folder, slower).items():
                found.setdefault((one.window, policy), []).extend(utilities)
            report(number)
    known = {policy: np.array([np.mean(found[window, policy]) for window in windows]) for policy in reached}
    return levels(known, reached, windows, points)


def _part_content(one: Part) -> dict[str, Any]:
    """Return what the results file has of a part."""
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
    within = sum(abs(row["error"]) <= level["points"] for row in level["cells"])
    lines = [
        f"order: {order['agree']} of {order['beyond_noise']} differences beyond their noise have the predicted sign",
        f"level: {len(level['cells']) - len(missed)} of {len(level['cells'])} utilities as predicted, "
        f"{within} of them within the points alone",
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
    """Print the predicted utilities of a part, with plan changes a minute."""
    for window, by in predictions["outcomes"].items():
        for policy, one in by.items():
            console.print(
                f"round {number}, {window}, {policy}: {predictions['windows'][window]['requests']:.0f} requests, "
                f"predicted {predicted_utility(predictions, window, policy):.4f} "
                f"({one['changes_per_minute']:.0f} changes a minute), slowdown {predictions['slowdown']:.3f}",
                highlight=False,
                soft_wrap=True,
            )
    console.print(f"predictions: SHA-256 {predictions['sha256']}", highlight=False)
