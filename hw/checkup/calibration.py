"""Step: ``hw.calibrate source=device`` here, and the error of its prices on iterations that were not fitted."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

from hw.checkup.findings import Findings
from hw.checkup.setup import Setup
from sim.errors import CalibrationError
from sim.json_file import read_json_object

MOST_ERROR = {"gpu": 0.05, "cpu": 0.10, "short": 1.0}
"""Median relative error of an iteration's price, in a run that was not fitted; a shared CPU changes its speed."""
MOST_S = {"gpu": 150.0, "cpu": 150.0, "short": 10.0}
"""Seconds of measurements, at most."""
MEASURED_SHARE, LOADING_S = 0.6, 15.0
"""What measurements get of the step's limit, and what loading takes. The rest is for the run that is held out, for plan
changes and the figure, which a busy machine slows down as well."""
LEAST_S = 10.0


def run(setup: Setup, findings: Findings) -> None:
    """Calibrate, and read the errors from the file."""
    seconds = max(min(setup.limit_s * MEASURED_SHARE - LOADING_S, MOST_S[setup.size]), LEAST_S)
    passed_on = [text for text in setup.overrides if not text.startswith("hw.")]
    passed_on += [
        text.removeprefix("hw.") for text in setup.overrides if text.startswith(("hw.attention", "hw.threads"))
    ]
    command = [sys.executable, "-m", "hw.calibrate", "source=device", *passed_on, f"out={setup.out}"]
    command += [f"seconds={seconds:.0f}", f"seed={setup.seed}", *setup.amounts.calibration]
    if setup.checkpoint:
        command.append(f"checkpoint={setup.checkpoint}")
    print(" ".join(command), flush=True)
    done = subprocess.run(command, check=False)
    findings.check("exit status of hw.calibrate", done.returncode == 0, done.returncode, "0")
    if not setup.calibration.is_file():
        return
    content = read_json_object(setup.calibration, CalibrationError, "measure again")
    errors: dict[str, Any] = content["errors"]
    findings.figure("errors", {name: {k: e[k] for k in ("median", "p95", "points")} for name, e in errors.items()})
    findings.figure("fixed_us", content["fixed_us"])
    findings.figure("device_run", content["device_run"])
    off, most = errors["iteration"]["median"], MOST_ERROR[setup.size]
    findings.check("median error of an iteration", off < most, off, f"below {most:.0%}")
