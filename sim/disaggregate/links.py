"""A link that carries KV between replicas: bandwidth, latency, and sharing among transfers."""

from __future__ import annotations

import heapq
from collections.abc import Generator
from typing import Any

import simpy

from sim.errors import ConfigError


class Link:
    """A link on SimPy's clock; active transfers share its bandwidth equally (processor sharing).

    The state is one number, ``_served_bytes``: the bytes that a transfer active since the start would have received. A
    transfer of B bytes that begins at value v ends at value v + B.
    """

    def __init__(self, env: simpy.Environment, bytes_per_s: float, latency_s: float = 0.0) -> None:
        """Build an idle link.

        Raises:
            ConfigError: for a bandwidth that is not above 0, or a latency below 0.
        """
        if not bytes_per_s > 0 or not latency_s >= 0:
            raise ConfigError(
                f"link_bytes_per_s is {bytes_per_s} and link_latency_s {latency_s}; the first must be above 0, the "
                "second at least 0"
            )
        self.env, self.bytes_per_s, self.latency_s = env, bytes_per_s, latency_s
        self.sent_bytes = self.arrived_bytes = 0
        self.busy_s = 0.0
        self._under_way: list[tuple[float, int, simpy.Event]] = []
        self._served_bytes, self._since_s = 0.0, float(env.now)
        self._begun = 0
        self._changed = env.event()
        env.process(self._run())

    @property
    def under_way(self) -> int:
        """Number of transfers that share the link now."""
        return len(self._under_way)

    def send(self, size_bytes: int) -> Generator[simpy.Event, Any, None]:
        """Carry ``size_bytes`` bytes; the calling SimPy process continues when the last byte has arrived."""
        self.sent_bytes += size_bytes
        if self.latency_s > 0:
            yield self.env.timeout(self.latency_s)
        if size_bytes > 0:
            self._follow()
            done = self.env.event()
            self._begun += 1
            heapq.heappush(self._under_way, (self._served_bytes + size_bytes, self._begun, done))
            self._changed.succeed()
            self._changed = self.env.event()
            yield done
        self.arrived_bytes += size_bytes

    def _follow(self) -> None:
        """Update the carried bytes to the current time."""
        now_s = float(self.env.now)
        if self._under_way:
            self._served_bytes += (now_s - self._since_s) * self.bytes_per_s / len(self._under_way)
            self.busy_s += now_s - self._since_s
        self._since_s = now_s

    def _run(self) -> Generator[simpy.Event, Any, None]:
        while True:
            changed = self._changed
            if not self._under_way:
                yield changed
                continue
            end_bytes = self._under_way[0][0]
            left_s = max(end_bytes - self._served_bytes, 0.0) * len(self._under_way) / self.bytes_per_s
            end = self.env.timeout(left_s)
            yield end | changed
            if end.processed:
                self._follow()
                self._served_bytes = max(
                    self._served_bytes, end_bytes
                )  # exact, whatever rounding left of the first transfer
                heapq.heappop(self._under_way)[2].succeed()
