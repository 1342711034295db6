"""A step for tests."""

from hw.checkup.findings import Findings
from hw.checkup.setup import Setup


def run(setup: Setup, findings: Findings) -> None:
    print("printed before")
    findings.figure("before", 1)
    raise ValueError("the seventh thing went wrong\nand more")
