"""Step: the speed of each kernel, by its benchmark."""

from __future__ import annotations

import json
import subprocess
import sys

from hw.checkup.findings import Findings, Skip
from hw.checkup.setup import Setup
from sim.paths import REPOSITORY

BENCHMARK = REPOSITORY / "tests" / "bench" / "bench_kernels.py"


def run(setup: Setup, findings: Findings) -> None:
    """Run the benchmark; its figures are the result."""
    if not BENCHMARK.is_file():
        raise Skip("there is no benchmark of kernels: this is an installed package, not a checkout")
    out = setup.folder("kernels_bench.json")
    command = [sys.executable, str(BENCHMARK), f"--out={out}"]
    done = subprocess.run(command, cwd=REPOSITORY, check=False)
    if out.is_file():
        findings.figure("kernels", json.loads(out.read_text(encoding="utf-8")))
    findings.check("exit status of the benchmark", done.returncode == 0, done.returncode, "0")
