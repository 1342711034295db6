"""The plain engine of the tests: ``sim.engine.priced_replica``, built as ``SimEngine`` is.

It is slow and obvious on purpose: Python objects, real block tables, no shortcuts. ``SimEngine`` must leave the same
records; where the two differ, one of them is wrong.
"""

from __future__ import annotations

import math
from typing import Any

import simpy

from sim.engine.priced_replica import PricedReplica


class PlainEngine(PricedReplica):
    """The reference engine, built as ``SimEngine`` is."""

    def __init__(self, *, env: simpy.Environment | None = None, **more: Any) -> None:
        """Build an idle engine; it starts at the present time of ``env`` and then keeps its own clock."""
        super().__init__(start_s=float(env.now) if env is not None else 0.0, **more)

    @property
    def held(self) -> bool:
        """Whether it is held between two iterations, so that a policy can decide before the next."""
        return self._held

    @property
    def in_iteration(self) -> bool:
        """Whether an iteration is under way."""
        return self._under_way is not None

    def next_s(self) -> float:
        """Return when it next acts without another call; ``inf`` for never, or while it is held."""
        return math.inf if self._held and not self._idle else self.next_event_s
