"""Step: the speed of each kernel, by its benchmark, next to the least that its bytes or its arithmetic need."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterable
from typing import Any

from hw.checkup.findings import Findings, Skip
from hw.checkup.setup import Setup
from sim.cost.model_spec import load_model
from sim.errors import RapLabError
from sim.paths import REPOSITORY

BENCHMARK = REPOSITORY / "tests" / "bench" / "bench_kernels.py"
ROW = re.compile(
    r"(?P<kernel>\S.*?)\s+(?P<us>[\d.]+)\s+(?P<speed>[\d,]+)\s+(?P<of_bound>[\d.]+)%\s+(?P<pytorch_us>[\d.]+)\s*$"
)
"""A row of the benchmark's table."""
NOTHING = "nothing measured"


def run(setup: Setup, findings: Findings) -> None:
    """Run the benchmark for the shape of the model; its figures are the result."""
    if not BENCHMARK.is_file():
        raise Skip("there is no benchmark of kernels: this is an installed package, not a checkout")
    try:
        name = load_model(setup.model.name).name
    except RapLabError:  # of a folder of the user
        name = "llama2_7b"
    command = [sys.executable, str(BENCHMARK), name]
    with subprocess.Popen(
        command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as bench:
        assert bench.stdout is not None
        rows = follow(bench.stdout, findings)
    findings.check("exit status of the benchmark", bench.returncode == 0, bench.returncode, "0")
    findings.check("kernels that were timed", bool(rows), len(rows), "one at least")


def follow(lines: Iterable[str], findings: Findings) -> list[dict[str, Any]]:
    """Print the output of the benchmark and record each row as it comes; return them.

    Raises:
        Skip: if the benchmark says that it measures nothing here.
    """
    rows: list[dict[str, Any]] = []
    for line in lines:
        print(line, end="", flush=True)
        if line.startswith(NOTHING):
            raise Skip(line.strip().removeprefix(f"{NOTHING}: "))
        if (found := ROW.match(line)) is not None:
            numbers = {
                key: float(value.replace(",", "")) for key, value in found.groupdict().items() if key != "kernel"
            }
            rows.append({"kernel": found["kernel"], **numbers})
            findings.content["figures"]["kernels"] = rows
            findings.save()
    return rows
