"""Step: the tests that need this device, in a process of pytest, of which every line counts as it comes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from xml.etree import ElementTree

from hw.checkup.findings import Findings, Skip
from hw.checkup.setup import Setup
from sim.paths import REPOSITORY

MOST_FAILURES = 20
MESSAGE_CHARACTERS = 1_500
STACKS_AFTER_S = 30
"""A test that takes longer shows where it is."""
WORKERS = 6
"""On a GPU, where most of the time goes into compiling kernels on the host."""
SAVED_EVERY = 10


def run(setup: Setup, findings: Findings) -> None:
    """Run the tests; every one has to pass."""
    if not (REPOSITORY / "tests" / "hw").is_dir():
        raise Skip("the tests are not there: this is an installed package, not a checkout")
    report = setup.folder("own_tests.xml")
    parallel = ["-n", str(WORKERS)] if setup.on_gpu and find_spec("xdist") is not None else []
    command = [
        sys.executable,
        *("-m", "pytest", "-p", "no:cacheprovider", "-v", "--tb=short", "--durations=5", *parallel),
        *("-o", f"faulthandler_timeout={STACKS_AFTER_S}", f"--junitxml={report}"),
        *setup.amounts.tests,
    ]
    print(" ".join(command), flush=True)
    with subprocess.Popen(
        command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as tests:
        assert tests.stdout is not None
        follow(tests.stdout, findings)
    counts, failures = read_report(report)
    findings.figure("tests", counts)
    findings.figure("failures", failures[:MOST_FAILURES])
    ran = counts["passed"] + counts["failed"]
    findings.check("tests that ran", ran > 0, ran, "one at least")
    findings.check("tests that failed", not counts["failed"], counts["failed"], "none")
    findings.check("exit status of pytest", tests.returncode == 0, tests.returncode, "0")


def follow(lines: Iterable[str], findings: Findings) -> None:
    """Print the output of pytest, and keep how many tests have passed so far, and which have failed."""
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    failed: list[str] = []
    for line in lines:
        print(line, end="", flush=True)
        if (outcome := outcome_of(line)) is None:
            continue
        test, result = outcome
        counts[result] += 1
        if result == "failed":
            failed.append(test)
        if result == "failed" or sum(counts.values()) % SAVED_EVERY == 0:
            findings.content["figures"] |= {"tests": dict(counts), "failed so far": failed[:MOST_FAILURES]}
            findings.save()


def outcome_of(line: str) -> tuple[str, str] | None:
    """Return the test of a line of pytest -v, with or without xdist, and passed, failed or skipped; None for others."""
    words = line.split()
    for word, name in (("PASSED", "passed"), ("FAILED", "failed"), ("ERROR", "failed"), ("SKIPPED", "skipped")):
        if word not in words or line.startswith(word):  # the summary at the end begins with the word
            continue
        test = next((text for text in words if text.startswith("tests/") and "::" in text), None)
        return None if test is None else (test, name)
    return None


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
