"""A step for tests."""

import os
import signal

from hw.checkup.findings import Findings
from hw.checkup.setup import Setup


def run(setup: Setup, findings: Findings) -> None:
    os.kill(os.getpid(), signal.SIGKILL)
