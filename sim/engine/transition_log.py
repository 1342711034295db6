"""The log of a replica's plan changes: one row each, open until the new plan runs in full.

``sim.engine.plan_changes`` and ``Replica`` add to it; the table is ``sim.results.records.Transitions``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from sim.cost.plan import Plan, describe
from sim.results.records import Transitions
from sim.types import Ints


@dataclass(slots=True)
class _Row:
    time_s: float
    from_plan: str
    to_plan: str
    kv_blocks_before: int
    bytes_in: int = 0
    bytes_freed: int = 0
    ready_s: float = math.nan
    preempted: int = 0
    recomputed_tokens: int = 0
    kv_blocks_after: int = 0


class TransitionLog:
    """Plan changes; the last one may still be under way. Events while none is under way are charged to none."""

    def __init__(self) -> None:
        """Begin with an empty log."""
        self._rows: list[_Row] = []
        self._open: _Row | None = None

    def __len__(self) -> int:
        return len(self._rows)

    def forget(self) -> None:
        """Drop all rows but the one of a change that is under way."""
        self._rows = [row for row in self._rows if row is self._open]

    def begin(self, time_s: float, runs: Plan, wanted: Plan, kv_blocks: int) -> None:
        """Open a row for a decision made at ``time_s``; a row that is still open is superseded and stays unchanged."""
        self._open = _Row(time_s, describe(runs), describe(wanted), kv_blocks)
        self._rows.append(self._open)

    def charge(
        self, *, bytes_in: int = 0, bytes_freed: int = 0, preempted: int = 0, recomputed_tokens: int = 0
    ) -> None:
        """Add to the open row the bytes copied in and freed, and the requests and tokens that the change cost."""
        if self._open is not None:
            self._open.bytes_in += bytes_in
            self._open.bytes_freed += bytes_freed
            self._open.preempted += preempted
            self._open.recomputed_tokens += recomputed_tokens

    def look(self, now_s: float, kv_blocks: int, *, ready: bool) -> None:
        """Record the pool's size between two iterations. ``ready``: the plan runs in full now, which closes the row."""
        if self._open is not None:
            self._open.kv_blocks_after = kv_blocks
            if ready:
                self._open.ready_s = now_s
                self._open = None

    def table(self) -> Transitions:
        """Return one row per plan change."""
        rows = self._rows

        def ints(name: str) -> Ints:
            return np.array([getattr(row, name) for row in rows], dtype=np.int64)

        return Transitions(
            time_s=np.array([row.time_s for row in rows], dtype=np.float64),
            from_plan=tuple(row.from_plan for row in rows),
            to_plan=tuple(row.to_plan for row in rows),
            bytes_in=ints("bytes_in"),
            bytes_freed=ints("bytes_freed"),
            ready_s=np.array([row.ready_s for row in rows], dtype=np.float64),
            preempted=ints("preempted"),
            recomputed_tokens=ints("recomputed_tokens"),
            kv_blocks_before=ints("kv_blocks_before"),
            kv_blocks_after=ints("kv_blocks_after"),
        )
