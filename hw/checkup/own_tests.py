"""Step: the tests that need this device, in a process of pytest."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

from hw.checkup.findings import Findings, Skip
from hw.checkup.setup import Setup
from sim.paths import REPOSITORY

MOST_FAILURES = 20
MESSAGE_CHARACTERS = 1_500
STACKS_AFTER_S = 40
"""A test that takes longer shows where it is."""


def run(setup: Setup, findings: Findings) -> None:
    """Run the tests; every one has to pass."""
    if not (REPOSITORY / "tests" / "hw").is_dir():
        raise Skip("the tests are not there: this is an installed package, not a checkout")
    report = setup.folder("own_tests.xml")
    command = [
        sys.executable,
        *("-m", "pytest", "-p", "no:cacheprovider", "-v", "--tb=short", "--durations=5"),
        *("-o", f"faulthandler_timeout={STACKS_AFTER_S}", f"--junitxml={report}"),
        *setup.amounts.tests,
    ]
    print(" ".join(command), flush=True)
    done = subprocess.run(command, cwd=REPOSITORY, check=False)
    counts, failures = read_report(report)
    findings.figure("tests", counts)
    findings.figure("failures", failures[:MOST_FAILURES])
    ran = counts["passed"] + counts["failed"]
    findings.check("tests that ran", ran > 0, ran, "one at least")
    findings.check("tests that failed", not counts["failed"], counts["failed"], "none")
    findings.check("exit status of pytest", done.returncode == 0, done.returncode, "0")


def read_report(path: Path) -> tuple[dict[str, int], list[dict[str, str]]]:
    """Return how many tests passed, failed and were skipped, and of each that failed its name and message."""
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    failures: list[dict[str, str]] = []
    if not path.is_file():
        return counts, failures
    for case in ElementTree.parse(path).getroot().iter("testcase"):
        wrong = next((child for child in case if child.tag in ("failure", "error")), None)
        if wrong is not None:
            counts["failed"] += 1
            name = f"{case.get('classname')}.{case.get('name')}"
            failures.append({"test": name, "message": (wrong.text or wrong.get("message") or "")[-MESSAGE_CHARACTERS:]})
        else:
            counts["skipped" if any(child.tag == "skipped" for child in case) else "passed"] += 1
    return counts, failures
