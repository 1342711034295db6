"""What the simulator says of a part of a round before it is served, at the speed that reference runs measured."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig, open_dict

from hw.calibrate.calibration import calibration_content
from hw.checkup.policies import serve
from hw.loop.settings import PREDICTIONS, cells, check_windows, description, run_config
from hw.validate.compare import read_run
from hw.validate.machine_speed import MachineFactors, MachineSpeed, machine_factors, run_speeds
from sim.config import CONF_DIR, with_differences
from sim.cost.plan import dense_plan
from sim.errors import ConfigError
from sim.json_file import read_json_object
from sim.progress import progress
from sim.replay.run import build_engine, server_spec
from sim.results.run_folder import provenance, write_json
from sim.results.utility import utility

CALIBRATION = "calibration.json"
"""The calibration with the prices of this machine; it follows from the predictions, and is written again from them."""
JUDGED_FOR = "judged_for.json"
"""Which predictions the judged runs of a folder are for; written before the first of them."""
EARLIER = "holds predictions of an earlier version; take another folder, runs=FOLDER"


def read_predictions(folder: Path) -> dict[str, Any] | None:
    """Return the predictions of a folder; None if it has none yet."""
    path = folder / PREDICTIONS
    if not path.is_file():
        return None
    found = read_json_object(path, ConfigError, "delete the folder, and predict again")
    return found | {"sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def note_judged(folder: Path, predictions: Mapping[str, Any]) -> None:
    """Write which predictions the judged runs are for, before the first of them."""
    if not (folder / JUDGED_FOR).is_file():
        write_json(folder / JUDGED_FOR, {"predictions_sha256": predictions["sha256"]})


def check_unchanged(predictions: Mapping[str, Any], folder: Path) -> None:
    """Check that the predictions are those that stood there before the first judged run.

    Raises:
        ConfigError: if not.
    """
    path = folder / JUDGED_FOR
    if not path.is_file():
        if (folder / "real").exists():
            raise ConfigError(
                f"{folder} has judged runs, but no {JUDGED_FOR} that says for which predictions; restore it, or serve "
                "again in another folder, runs=FOLDER"
            )
        return
    noted = read_json_object(path, ConfigError, "take another folder, runs=FOLDER").get("predictions_sha256")
    if noted != predictions["sha256"]:
        raise ConfigError(
            f"{folder / PREDICTIONS} has SHA-256 {predictions['sha256'][:16]}, but judged runs began for "
            f"{str(noted)[:16]}: it was changed after them; restore it, or serve again in another folder, runs=FOLDER"
        )


def check_same_settings(predictions: Mapping[str, Any], cfg: DictConfig, folder: Path) -> None:
    """Check that predictions were made for this configuration, and for the policies' files as they are.

    Raises:
        ConfigError: if not; judged runs of one and predictions of another say nothing.
    """
    ours, theirs = json.loads(json.dumps(description(cfg))), predictions["description"]
    if "points" not in theirs:
        raise ConfigError(f"{folder} {EARLIER}")
    different = sorted(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key))
    if not cfg.measure and abs(cfg.slowdown - predictions["slowdown"]) > 1e-9:
        different.append("slowdown")
    if policy_files(cfg) != predictions["policy_files"]:
        different.append("file of a policy")
    if cfg.measure and not predictions["references"]:
        raise ConfigError(
            f"{folder} holds predictions for a stated slowdown of {predictions['slowdown']:g}, which no reference run "
            "measured; take another folder, runs=FOLDER, or state it again: measure=false "
            f"slowdown={predictions['slowdown']:g}"
        )
    if different:
        raise ConfigError(
            f"{folder} holds predictions that were made with other settings ({', '.join(different)}); take another "
            "folder, runs=FOLDER, or the settings of the predictions"
        )


def policy_files(cfg: DictConfig) -> dict[str, str]:
    """Return policy -> SHA-256 of the files of its network, for those that have one."""
    found = {}
    for label, differences in cfg.policies.items():
        name = with_differences(cfg, dict(differences or {}), f"policies.{label}").policy.get("path")
        if name is None:
            continue
        path = Path(str(name)) if str(name).endswith(".json") else CONF_DIR / "policy" / f"{name}.json"
        digest = hashlib.sha256()
        for file in (path, path.with_suffix(".safetensors")):
            if not file.is_file():
                raise ConfigError(f"policies.{label}: policy.path is {name}, but there is no file {file}")
            digest.update(file.read_bytes())
        found[str(label)] = digest.hexdigest()
    return found


def predict(cfg: DictConfig, folder: Path, speed: MachineSpeed | None) -> dict[str, Any]:
    """Simulate the window under each policy of a part and write the predictions.

    Args:
        cfg, folder: of the part. speed: the reference runs that measured the machine; None if its speed is a setting.
    """
    machine = MachineFactors(slowdown=float(cfg.slowdown)) if speed is None else factors_of(cfg, speed)
    slowdown = machine.slowdown
    windows = check_windows(cfg, slowdown)
    files = policy_files(cfg)
    at_speed = priced_for(cfg, folder, machine)
    found: dict[str, dict[str, Any]] = {}
    every = cells(cfg)
    with progress("simulating", len(every), "runs") as report:
        for number, (window, policy) in enumerate(every, start=1):
            one = run_config(at_speed, window, policy, slowdown)
            at = folder / "sim" / window / policy
            serve(at, one, *build_engine(one))
            found.setdefault(window, {})[policy] = outcome(at, one)
            report(number)
    spec, speeds = server_spec(cfg), []
    if speed is not None and cfg.ranges:
        speeds = run_speeds(speed.references, _content(cfg), spec.model, machine)
    content = {
        "provenance": provenance(cfg.seed),
        "calibration": spec.priced().name,
        "slowdown": slowdown,
        "factors": machine.pairs(),
        "references": [] if speed is None else speed.references,
        "policy_files": files,
        "windows": windows,
        "outcomes": found,
        "run_speeds": speeds,
        "utility_at_run_speeds": at_run_speeds(at_speed, slowdown, speeds),
        "description": description(cfg),
    }
    write_json(folder / PREDICTIONS, content)
    read = read_predictions(folder)
    assert read is not None
    return read


def at_run_speeds(cfg: DictConfig, slowdown: float, speeds: Sequence[float]) -> dict[str, dict[str, list[float]]]:
    """Return window -> policy -> utilities, simulated with a machine as fast as in each single reference run.

    A replay is sensitive: an admission more or less changes what follows. So one simulated utility is one draw, and
    these say how far others lie from it on a machine whose speed varies as that of the reference runs did.

    Args:
        cfg: with the prices of the machine. slowdown: of the machine; requests arrive by it.
        speeds: of the reference runs, relative to the machine's (`run_speeds`).
    """
    found: dict[str, dict[str, list[float]]] = {}
    every = [(cell, speed) for cell in cells(cfg) for speed in speeds]
    with progress("simulating other speeds", len(every), "runs") as report:
        for number, ((window, policy), speed) in enumerate(every, start=1):
            reached = _utility_at(cfg, window, policy, slowdown, speed)
            found.setdefault(window, {}).setdefault(policy, []).append(reached)
            report(number)
    return found


def _utility_at(cfg: DictConfig, window: str, policy: str, slowdown: float, speed: float) -> float:
    """Simulate a run whose iterations take ``speed`` times as long as at the slowdown; return its utility."""
    one = run_config(cfg, window, policy, slowdown)
    with open_dict(one):
        one.slowdown = slowdown * speed
    with tempfile.TemporaryDirectory() as folder:
        serve(Path(folder) / "run", one, *build_engine(one))
        return float(outcome(Path(folder) / "run", one)["utility"])


def predicted_utility(predictions: Mapping[str, Any], window: str, policy: str) -> float:
    """Return the utility that is predicted: the mean of those at the speeds of single reference runs.

    One simulated replay is one draw (`at_run_speeds`), and a real one meets a machine that is now faster, now slower.
    Where no other speeds were simulated it is the utility at the frozen speed.
    """
    at_speeds = (predictions.get("utility_at_run_speeds") or {}).get(window, {}).get(policy)
    return float(np.mean(at_speeds)) if at_speeds else float(predictions["outcomes"][window][policy]["utility"])


def in_hindsight(
    cfg: DictConfig, predictions: Mapping[str, Any], folder: Path, slower: Mapping[str, Sequence[float]]
) -> dict[str, list[float]]:
    """Simulate a window again with the machine as fast as it was during each judged run, which no prediction can know.

    No claim depends on it. It says how much of the errors is due to a machine that became faster or slower.

    Args:
        cfg, folder: of the part, as for the predictions.
        slower: policy -> for each judged run, how much longer its passes took than predicted.
    Returns:
        Policy -> for each judged run the utility, a mean over speeds as predictions are.
    """
    priced, frozen = priced_for(cfg, folder, machine_of(predictions, folder)), float(predictions["slowdown"])
    (window,) = map(str, cfg.windows)
    spread = predictions["run_speeds"] or [1.0]
    return {
        policy: [
            float(np.mean([_utility_at(priced, window, policy, frozen, factor * speed) for speed in spread]))
            for factor in factors
        ]
        for policy, factors in slower.items()
    }


def factors_of(cfg: DictConfig, speed: MachineSpeed) -> MachineFactors:
    """Return by how much the machine of the reference runs differs from the calibration of a configuration."""
    return machine_factors(speed.references, _content(cfg), server_spec(cfg).model)


def machine_of(predictions: Mapping[str, Any], folder: Path) -> MachineFactors:
    """Return the machine that the predictions are for.

    Raises:
        ConfigError: for predictions of an earlier version.
    """
    if "factors" not in predictions:
        raise ConfigError(f"{folder} {EARLIER}")
    return MachineFactors.from_pairs(float(predictions["slowdown"]), predictions["factors"])


def priced_for(cfg: DictConfig, folder: Path, machine: MachineFactors) -> DictConfig:
    """Return the configuration with the prices of a machine, which are written into the folder of the part.

    The slowdown is not in them: it is a key of each run. Without factors, the calibration stays as it is.
    """
    if machine.factors.absent and not machine.block_factors:
        return cfg
    path = folder / CALIBRATION
    write_json(path, machine.over(_content(cfg)))
    found = cfg.copy()
    with open_dict(found):
        found.latency = str(path)
    return found


def _content(cfg: DictConfig) -> dict[str, Any]:
    return calibration_content(str(cfg.latency or server_spec(cfg).priced().name))


def outcome(folder: Path, cfg: DictConfig) -> dict[str, Any]:
    """Return the figures of a run folder by which policies are judged, and some that explain them."""
    run = read_run(folder)
    records, summary = run.records, run.summary
    charge = server_spec(cfg).quality_nll
    dense = charge(dense_plan(server_spec(cfg).model)) if charge is not None else 0.0
    met = records["met_slo"].to_numpy(dtype=np.bool_)
    nll = records["quality_nll"].to_numpy(dtype=np.float64) if charge is not None else np.zeros(len(met))
    minutes = float(records["arrival_s"].max()) / 60.0
    quality = utility(met, nll, dense)
    moved = run.transitions["bytes_in"] + run.transitions["bytes_freed"]  # others change admission alone
    return {
        "utility": quality,
        "slo_attainment": float(met.mean()),
        "quality_of_met": quality / float(met.mean()) if met.any() else None,
        "changes_per_minute": int((moved > 0).sum()) / minutes,
        "rejected": int(summary["rejected"]),
        "preemptions": int(summary["preemptions"]),
        "ttft_p50_s": summary["ttft_s"]["p50"],
        "ttft_p95_s": summary["ttft_s"]["p95"],
        "tpot_p50_s": summary["tpot_s"]["p50"],
        "makespan_s": summary["makespan_s"],
    }
