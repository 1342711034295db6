"""A step for tests."""

import subprocess
import sys
import time
from pathlib import Path

from hw.checkup.findings import Findings
from hw.checkup.setup import Setup


def run(setup: Setup, findings: Findings) -> None:
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    Path(setup.work, "grandchild").write_text(str(other.pid))
    findings.figure("before", 1)
    wait_for_ever(Path(setup.work, "hangs"))


def wait_for_ever(begun: Path) -> None:
    begun.touch()
    time.sleep(600)
