"""A step for tests."""

from hw.checkup.findings import Findings, Skip
from hw.checkup.setup import Setup


def run(setup: Setup, findings: Findings) -> None:
    raise Skip("it does not apply here")
