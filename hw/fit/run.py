"""``python -m hw.fit``: diagnose, fit, judge, write."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig
from rich.console import Console

from hw.calibrate.writing import write_calibration
from hw.fit.diagnosis import NEAR_MOST, PREFILL_SHARE, Diagnosis, diagnose
from hw.fit.errors import errors
from hw.fit.fitting import Case, Fitted, fit_and_judge
from hw.fit.measured import MeasuredRun
from hw.fit.parameters import FLOOR, check_free, far_values, server_at
from hw.fit.report import (
    FRONT_END_HEAD,
    calibration_content,
    diagnosis_content,
    plot,
    print_diagnosis,
    print_errors,
    print_fit,
    write_front_end,
)
from hw.fit.server import Server, as_stated, most_rate_rps, simulate
from hw.fit.settings import name_of_fit, names_of, runs_of, server_of
from hw.fit.settings_tried import sentences_of, try_settings
from hw.validate.fidelity import letters
from sim.config import CONF_DIR, run_command
from sim.cost.front_end import FrontEnd
from sim.cost.latency import CALIBRATIONS
from sim.engine.server_spec import find_calibration
from sim.errors import CalibrationError, ConfigError
from sim.json_file import read_json_object
from sim.paths import CHECKOUT
from sim.results.run_folder import own_folder, provenance, write_json
from sim.types import Ints

REPORT = "fit.json"
WRITTEN = CALIBRATIONS
"""Where a fit is written so that every command finds it by its name."""
# By how many times the smaller one two medians may differ, beyond once.
MOST_OFF = {"ttft_s": 0.20, "tpot_s": 0.10}
"""A fit that misses a median by more is reported to miss it."""
GOOD_ENOUGH = {"ttft_s": 0.10, "tpot_s": 0.05}
"""A description that misses no median by more with nothing fitted needs no fit."""
USELESS = {"ttft_s": 1.0, "tpot_s": 0.5}
"""A fit that misses a median by more is refused: such a description misses a setting."""
USELESS_IF_FULL = USELESS | {"ttft_s": 4.0}
"""Near the maximum rate TTFT is waiting, which depends on small errors."""
HELD_OUT = "the held-out third"


def main() -> None:
    """Run the command."""
    run_command(run_fit, "fit")


def run_fit(cfg: DictConfig) -> int:
    """Diagnose and fit; return 0, or 1 if the fit was refused."""
    console = Console(width=None if sys.stdout.isatty() else 130)
    server, runs, judged = server_of(cfg), runs_of(cfg), runs_of(cfg, "judge")
    base = base_content(cfg, server)
    name, (folder, report) = name_of_fit(cfg, base["name"]), _folders(cfg)
    check_written(folder, report, name)
    cases = [_case(cfg, server, run) for run in runs]
    found = [diagnose(case.run, case.server) for case in cases]
    cases = [replace(case, first=_first(cfg, one)) for case, one in zip(cases, found, strict=True)]
    free = free_numbers(cfg.free, cases, found)
    for case, one in zip(cases, found, strict=True):
        one.sentences.extend(of_description(case.run, case.server, bool(cfg.stated)))
        if cfg.settings:
            one.sentences.extend(sentences_of(*try_settings(case, one, free)))
        print_diagnosis(one, console)
    content: dict[str, Any] = {
        "provenance": provenance(cfg.seed),
        "diagnosis": [diagnosis_content(one) for one in found],
        "free": free,
    }
    fitted = fit_and_judge(cases, free, seed=cfg.seed) if free else None
    content["held_out"] = [_judge(case, fitted, HELD_OUT, case.held_out, console) for case in cases]
    content["judged"] = [
        _judge(_case(cfg, server, run), fitted, "all requests, in no fit", np.arange(len(run)), console)
        for run in judged
    ]
    status, why = 0, None
    if fitted is not None:
        print_fit(fitted, console)
        content["fit"] = _fit_content(fitted, content["held_out"])
        for sentence in content["fit"]["sentences"]:
            console.print(f"- {sentence}", highlight=False, markup=False, soft_wrap=True)
        why = refusal(fitted, content["held_out"], found, cfg.latency or base["name"])
        content["fit"]["accepted"] = why is None
        status = 0 if why is None else 1
    _write_report(report, cases[0], fitted, content)
    if fitted is not None and why is None:
        front = server_at(cases[0].server, fitted.point).front_end
        about = {"calibration": base["name"], "runs": content["diagnosis"], "held_out": content["held_out"]}
        made = {key: content["provenance"][key] for key in ("command", "commit", "written_at")}
        calibration = calibration_content(base, name, fitted, front, about | made)
        _write(calibration, front, folder, cases[0].run.side, console)
    elif why is not None:
        print(f"refused: {why}", file=sys.stderr)
    console.print(f"files: {report / REPORT}, {report / 'fit.png'}", highlight=False, soft_wrap=True)
    return status


def refusal(
    fitted: Fitted, held_out: Sequence[Mapping[str, Any]], found: Sequence[Diagnosis], calibration: str
) -> str | None:
    """Return why no calibration is written, and what to do; None if one is."""
    if not fitted.accepted:
        said = "the fit does not predict the held-out third better than nothing fitted, so no calibration is written; "
        if any(still_off(one, "nothing fitted", GOOD_ENOUGH) for one in held_out):
            return said + "mend the description (see above), or measure longer"
        return said + f"nothing needs a fit: the description as it is predicts that third, so use latency={calibration}"
    for one, diagnosis in zip(held_out, found, strict=True):
        full = diagnosis.utilization is not None and diagnosis.utilization >= NEAR_MOST
        if still_off(one, most_off=USELESS_IF_FULL if full else USELESS):
            return (
                "the fit is far off where it was held out, so no calibration is written; mend the description (see "
                "above)"
            )
    return None


def _write_report(folder: Path, case: Case, fitted: Fitted | None, content: dict[str, Any]) -> None:
    ways = {"nothing fitted": simulate(case.server, case.run)}
    if fitted is not None:
        ways["fitted"] = simulate(server_at(case.server, fitted.point), case.run)
    plot(folder / "fit.png", case.run, ways)
    write_json(folder / REPORT, content)


def base_content(cfg: DictConfig, server: Server) -> dict[str, Any]:
    """Return the calibration file of the server's prices.

    Raises:
        ConfigError: for a calibration that was fitted already, unless nothing is to be fitted.
    """
    named = cfg.latency or find_calibration(server.spec.model.name, server.spec.gpu.name, server.spec.gpu.tp)
    path = Path(named) if named.endswith(".json") else CALIBRATIONS / f"{named}.json"
    content = read_json_object(path, CalibrationError, "write it again with hw.calibrate")
    if "fit" in content and (cfg.free is None or names_of(cfg.free, "free")):
        below = content["fit"].get("calibration") if isinstance(content["fit"], dict) else None
        raise ConfigError(
            f"latency={named} was fitted already; fit the prices below it, latency={below}, or only judge it: free=[]"
        )
    return content


def _folders(cfg: DictConfig) -> tuple[Path, Path]:
    """Return the folder of the calibration and that of the report."""
    if cfg.out is not None:
        return Path(cfg.out), Path(cfg.out)
    return WRITTEN if CHECKOUT else Path("calibration"), own_folder("fit")


def _case(cfg: DictConfig, server: Server, run: MeasuredRun) -> Case:
    return Case(run=run, server=as_stated(server, run) if cfg.stated else server)


def _first(cfg: DictConfig, found: Diagnosis) -> int:
    """Return the first request after the warm-up."""
    if cfg.warm_up is None:
        return found.warm_up
    if not 0 <= cfg.warm_up <= len(found.run) // 2:
        raise ConfigError(
            f"warm_up is {cfg.warm_up}; it must be from 0 to half of the {len(found.run)} requests of "
            f"{found.run.source}"
        )
    return int(cfg.warm_up)


def free_numbers(free: Any, cases: Sequence[Case], found: Sequence[Diagnosis]) -> list[str]:
    """Return the numbers to fit: those named, or the front end and memory, and arithmetic where prompts tell it.

    Raises:
        ConfigError: for names that are unknown, or that these runs cannot tell.
    """
    engine_side = any(case.run.side == "engine" for case in cases)
    if free is not None:
        names = names_of(free, "free")
        check_free(names, [case.run.served_rps for case in cases], engine_side)
        if FLOOR in names and not any(np.isfinite(case.run.tpot_s).any() for case in cases):
            raise ConfigError(
                f"free has {FLOOR}, but every answer has a single token, so no gap shows an iteration; measure with "
                "longer answers, or leave it out"
            )
        return names
    names = [] if engine_side else ["front_s"]
    names.append("memory_bound")
    if max(one.prefill_share for one in found) >= PREFILL_SHARE:
        names.append("compute_bound")
    return names


def of_description(run: MeasuredRun, server: Server, stated: bool) -> list[str]:
    """Return sentences on what the run's files state and the description does not say."""
    said = []
    if run.config is not None and stated:
        said.append(
            "the run's own files state the engine's settings"
            + (f" and its {run.kv_blocks:,} KV blocks" if run.kv_blocks is not None else "")
            + ", which are used (stated=false keeps engine= and budget=)"
        )
    for what, theirs, ours, key in (
        ("model", run.model.rpartition("/")[2], server.spec.model.name, "model="),
        ("device", run.device, server.spec.gpu.name.split("_")[0], "gpu="),
    ):
        if theirs and letters(ours) not in letters(theirs):
            said.append(f"the run is of {what} {theirs!r}, but the description is of {ours!r}; set {key}")
    return said


def _judge(case: Case, fitted: Fitted | None, what: str, which: Ints, console: Console) -> dict[str, Any]:
    """Print and return the errors of a run on some of its requests, with nothing fitted and fitted."""
    ways = {"nothing fitted": case.server}
    if fitted is not None:
        ways["fitted"] = server_at(case.server, fitted.point)
    found = {name: errors(case.run, simulate(server, case.run), which) for name, server in ways.items()}
    print_errors(f"{case.run.name}: {what}", found, console)
    rates = {name: most_rate_rps(server, case.run)[0] for name, server in ways.items()}
    content: dict[str, Any] = {"run": case.run.source, "requests": what, "errors": found, "max_rate_rps": rates}
    if fitted is not None:
        rates_of = [most_rate_rps(server_at(case.server, point), case.run)[0] for point in fitted.samples]
        known = [rate for rate in rates_of if rate is not None]
        content["max_rate_range_rps"] = [min(known), max(known)] if known else None
        if known and rates["fitted"] is not None:
            low, high = min(known), max(known)
            console.print(
                f"maximum rate {rates['fitted']:.3g} req/s, {low:.3g} to {high:.3g} over samples of the fit",
                highlight=False,
            )
    return content


def _fit_content(fitted: Fitted, held_out: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {
        "values": dict(fitted.point.values),
        "ranges_p5_p95": {name: list(value) for name, value in fitted.ranges.items()},
        "held_out_loss": {"nothing_fitted": fitted.nothing, "fitted": fitted.fitted},
        "simulations": fitted.simulations,
        "sentences": [*far_values(fitted.point), *[said for one in held_out for said in still_off(one)]],
    }


def still_off(judged: Mapping[str, Any], way: str = "fitted", most_off: Mapping[str, float] = MOST_OFF) -> list[str]:
    """Return a sentence for each latency of which a fit (or another way) still misses the median by much."""
    found = []
    for name, most in most_off.items():
        error = judged["errors"][way][name]["p50"]["error"]
        if error is not None and max(1.0 + error, 1.0 / max(1.0 + error, 1e-9)) > 1.0 + most:
            found.append(
                f"{name.removesuffix('_s').upper()} P50 of {judged['run']} is still off by {100 * error:+.0f} % where "
                "it was held out: the description misses something (see above), so trust no prediction of it"
            )
    return found


def check_written(folder: Path, report: Path, name: str) -> None:
    """Check that a fit of this name can be written and replaces nothing but an earlier fit.

    Raises:
        ConfigError: if not.
    """
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"out is {folder}, which is a file; name a folder, or leave out= away")
    front_end = CONF_DIR / "frontend" / f"{name}.yaml"
    if folder == report and name == REPORT.removesuffix(".json"):
        raise ConfigError(f"name is {name!r}, the name of the report in the same folder; set name= to another name")
    for path, ours in ((folder / f"{name}.json", _is_fit), (front_end, _is_fitted_front_end)):
        if (path != front_end or folder == WRITTEN) and path.exists() and not ours(path):
            raise ConfigError(f"{path} was not written by hw.fit and is not replaced; set name= to another name")


def _is_fit(path: Path) -> bool:
    try:
        return "fit" in read_json_object(path, CalibrationError, "set name=")
    except (CalibrationError, OSError):
        return False


def _is_fitted_front_end(path: Path) -> bool:
    return path.is_file() and path.read_text(errors="replace").startswith(FRONT_END_HEAD)


def _write(content: dict[str, Any], front: FrontEnd, folder: Path, side: str, console: Console) -> None:
    """Write the calibration and, if clients measured, its front end; print how to use them."""
    name = content["name"]
    path = folder / f"{name}.json"
    write_calibration(content, path)
    by_name = folder == WRITTEN
    use = f"latency={name if by_name else path}"
    if side == "client" and by_name:
        write_front_end(CONF_DIR / "frontend" / f"{name}.yaml", front, name)
        use += f" frontend={name}"
    elif side == "client":
        use += f" frontend.front_s={front.front_s:.6g} frontend.front_token_s={front.front_token_s:.6g}"
    console.print(f"calibration: {path}; use it: python -m sim.replay {use}", highlight=False, soft_wrap=True)
