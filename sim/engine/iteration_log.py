"""The iteration log of a replica: one row per iteration, and the gaps between tokens.

``sim.engine.replica.Replica`` adds to it; the tables are those of sim/results/records.py.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

from sim.results.records import Iterations, TokenGaps


@dataclass(frozen=True, slots=True, kw_only=True)
class IterationRow:
    """One iteration that has ended; its fields are the columns of ``sim.results.records.Iterations``."""

    start_s: float
    end_s: float
    prefill_tokens: int
    decode_requests: int
    running: int
    waiting: int
    kv_used_share: float
    preemptions: int
    extrapolated: bool


class IterationLog:
    """Iterations that have ended, in order, and every gap between two tokens of one request."""

    def __init__(self) -> None:
        """Begin with an empty log."""
        self._rows: list[IterationRow] = []
        self._gaps_s: list[float] = []
        self._forgotten = 0

    def __len__(self) -> int:
        """Return how many iterations have ended."""
        return self._forgotten + len(self._rows)

    @property
    def kept(self) -> int:
        """Iterations whose rows are still here."""
        return len(self._rows)

    def forget(self) -> None:
        """Drop all rows and gaps; the number of iterations stays."""
        self._forgotten += len(self._rows)
        self._rows.clear()
        self._gaps_s.clear()

    def add(self, row: IterationRow) -> None:
        """Add an iteration that has ended."""
        self._rows.append(row)

    def add_gap(self, seconds: float) -> None:
        """Add the time between two tokens of one request."""
        self._gaps_s.append(seconds)

    def table(self) -> Iterations:
        """Return one row per iteration."""
        types = {"float": np.float64, "int": np.int64, "bool": np.bool_}
        return Iterations(
            **{
                column.name: np.array([getattr(row, column.name) for row in self._rows], dtype=types[str(column.type)])
                for column in fields(IterationRow)
            }
        )

    def token_gaps(self) -> TokenGaps:
        """Return the distinct gaps between two tokens of one request, ascending, and how often each occurred."""
        gaps_s, count = np.unique(np.array(self._gaps_s, dtype=np.float64), return_counts=True)
        return TokenGaps(itl_s=gaps_s, count=count.astype(np.int64))
