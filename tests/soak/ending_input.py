"""A kind of input of which one ends the process, to test the watcher."""

from __future__ import annotations

import os
import random
from pathlib import Path

from tests.soak.kinds import Case

DEADLY = 3


class Ends:
    """Input number DEADLY ends the process with status 9."""

    name = "ends"

    def __init__(self, folder: Path) -> None:
        self._deadly = self.make(random.Random(f"{self.name}:{DEADLY}")).content

    def make(self, rng: random.Random) -> Case:
        """Return a number as text."""
        return Case("it", str(rng.random()).encode())

    def feed(self, case: Case) -> str:
        """Accept everything else."""
        if case.content == self._deadly:
            os._exit(9)
        return "accepted"

    def close(self) -> None:
        """Nothing runs."""
