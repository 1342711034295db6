"""The steps of a check-up in their order, and how long each may take.

The most valuable steps come first. Every step is sure of its share of the time: one that needs longer takes only what
earlier steps have left, so one that hangs takes nothing from those after it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Step:
    """One step. share_s: of ``TOTAL_S`` seconds. about: one line. module: has its function, ``run``."""

    name: str
    share_s: float
    about: str
    module: str = "hw.checkup"

    @property
    def run(self) -> str:
        """Where the function of the step is."""
        return f"{self.module}.{self.name}:run"


STEPS = (
    Step("environment", 20, "device, driver, versions; copies and bandwidth; attention kernels"),
    Step("own_tests", 75, "the tests that need this device: tokens equal to generate, drops, restores, 8 and 4 bits"),
    Step("weights", 45, "random weights made on the device; copies at 16, 8 and 4 bits have the predicted bytes"),
    Step("budgets", 30, "the budget shrinks to 60 %, an allocation beyond it fails, no request is lost"),
    Step("calibration", 110, "prices of this device, and their error on iterations that were not fitted"),
    Step("policies", 90, "a replay under each policy while memory comes and goes; memory and time per token"),
    Step("simulation", 45, "the same replays in simulation at the measured prices, compared"),
    Step("peers", 50, "throughput next to Transformers' generate and continuous batching"),
    Step("kernels", 30, "the speed of each kernel"),
    Step("serving", 45, "streamed requests over HTTP, some aborted, then SIGTERM"),
)
TOTAL_S = sum(step.share_s for step in STEPS)


def limit_s(step: Step, later: Sequence[Step], left_s: float, total_s: float) -> float:
    """Return the seconds that a step may take.

    Args:
        later: the steps after it. left_s: until the check-up must end. total_s: of the check-up, from its start.
    """
    steps_s = total_s / TOTAL_S  # a second of a share
    sure_s = sum(one.share_s for one in later) * steps_s
    return max(left_s - sure_s, 0.0)
