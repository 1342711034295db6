"""A link that carries KV between replicas: bandwidth, latency, and sharing among transfers.

The bytes that each transfer has received are exact fractions, not floats, so the order in which transfers end does not
depend on how their seconds are summed. A transfer ends at the first time of the clock (a float) at which nothing of it
is left; transfers that end at the same time of the clock end together.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Generator
from fractions import Fraction
from typing import Any

import simpy

from sim.engine.sim_engine import exact_delay
from sim.errors import ConfigError


class Link:
    """A link on SimPy's clock; active transfers share its bandwidth equally (processor sharing).

    The state is one number, ``_served_bytes``: the bytes that a transfer active since the link was last idle would have
    received. A transfer of B bytes that begins at value v ends at value v + B.
    """

    def __init__(self, env: simpy.Environment, bytes_per_s: float, latency_s: float = 0.0) -> None:
        """Build an idle link.

        sent_bytes counts transfers that have begun, arrived_bytes those that have ended, lost_bytes those cut off.

        Raises:
            ConfigError: for a bandwidth below 1 byte per second, or a latency below 0; both must be finite.
        """
        if not 1 <= bytes_per_s < math.inf or not 0 <= latency_s < math.inf:
            raise ConfigError(
                f"link_bytes_per_s is {bytes_per_s} and link_latency_s {latency_s}; link_bytes_per_s must be at least "
                "1, link_latency_s at least 0, and both finite; set e.g. link_bytes_per_s=1.25e10 link_latency_s=1e-4"
            )
        self.env, self.bytes_per_s, self.latency_s = env, bytes_per_s, latency_s
        self.sent_bytes = self.arrived_bytes = self.lost_bytes = 0
        self._under_way: list[tuple[Fraction, int, simpy.Event]] = []
        self._rate = Fraction(bytes_per_s)
        self._served_bytes, self._since_s, self._busy_s = Fraction(0), Fraction(env.now), Fraction(0)
        self._begun = 0
        self._changed = env.event()
        env.process(self._run())

    @property
    def under_way(self) -> int:
        """Number of transfers that share the link now."""
        return len(self._under_way)

    @property
    def busy_s(self) -> float:
        """Seconds in which the link carried bytes, up to its last change."""
        return float(self._busy_s)

    def send(self, size_bytes: int) -> Generator[simpy.Event, Any, None]:
        """Carry ``size_bytes`` bytes; the calling SimPy process continues when the last byte has arrived.

        A process that is interrupted ends its transfer; what was left of it no longer shares the link.
        """
        self.sent_bytes += size_bytes
        try:
            if self.latency_s > 0:
                yield self.env.timeout(self.latency_s)
            if size_bytes > 0:
                yield from self._carry(size_bytes)
        except simpy.Interrupt:
            self.lost_bytes += size_bytes
            raise
        self.arrived_bytes += size_bytes

    def _carry(self, size_bytes: int) -> Generator[simpy.Event, Any, None]:
        self._follow()
        done = self.env.event()
        self._begun += 1
        mine = (self._served_bytes + size_bytes, self._begun, done)
        heapq.heappush(self._under_way, mine)
        self._tell_change()
        try:
            yield done
        except simpy.Interrupt:
            self._follow()
            self._under_way.remove(mine)
            heapq.heapify(self._under_way)
            self._tell_change()
            raise

    def _tell_change(self) -> None:
        """Let the link find out again which transfer ends next."""
        self._changed.succeed()
        self._changed = self.env.event()

    def _next_end_s(self) -> Fraction:
        """Return when the first transfer ends if none begins before."""
        left_bytes = self._under_way[0][0] - self._served_bytes
        return self._since_s + left_bytes * len(self._under_way) / self._rate

    def _follow(self) -> None:
        """Carry bytes until the present; transfers with nothing left end."""
        now_s = Fraction(self.env.now)
        while self._under_way and (end_s := self._next_end_s()) <= now_s:
            self._busy_s += end_s - self._since_s
            self._served_bytes, _, done = heapq.heappop(self._under_way)
            self._since_s = end_s
            done.succeed()
        if self._under_way:
            self._served_bytes += (now_s - self._since_s) * self._rate / len(self._under_way)
            self._busy_s += now_s - self._since_s
        else:
            self._served_bytes = Fraction(0)  # the numbers stay short
        self._since_s = now_s

    def _run(self) -> Generator[simpy.Event, Any, None]:
        while True:
            changed = self._changed
            if not self._under_way:
                yield changed
                continue
            end_s = first_float_from(self._next_end_s())
            while self.env.now < end_s and not changed.triggered:
                yield changed | self.env.timeout(exact_delay(self.env.now, end_s))
            if not changed.triggered:
                self._follow()


def first_float_from(exact: Fraction) -> float:
    """Return the smallest float that is not below an exact number."""
    nearest = float(exact)
    return nearest if nearest >= exact else math.nextafter(nearest, math.inf)
