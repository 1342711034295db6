"""Step: throughput and time per token next to Transformers, with the same weights, prompts and machine."""

from __future__ import annotations

from hw.checkup.findings import Findings, Skip
from hw.checkup.setup import Setup


def run(setup: Setup, findings: Findings) -> None:
    """Compare with ``generate`` and continuous batching."""
    raise Skip("the comparison is not there yet")
