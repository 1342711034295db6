"""The clock of a real engine: wall-clock seconds, or processor seconds on a shared machine."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Protocol

from sim.errors import ConfigError, nearest

CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.thread_time}


def check_clock(kind: str, place: str) -> None:
    """Check that a clock can time a device.

    Args:
        kind: of the clock. place: type of the device, as torch names it.
    Raises:
        ConfigError: for processor seconds on a GPU: while it computes, the processor only waits.
    """
    if kind == "cpu" and place != "cpu":
        raise ConfigError(
            f"clock is cpu on {place}: processor seconds say nothing about a GPU, for which the processor only waits; "
            "set the clock to wall"
        )


class Clock(Protocol):
    """The engine's time: seconds since the start of the trace.

    source: times the thread that copies for the engine.
    """

    source: Callable[[], float]

    def now_s(self) -> float:
        """Return the current time."""
        ...

    def wait_until(self, time_s: float) -> None:
        """Wait until this time; return at once if it has passed."""
        ...

    def ran(self, prefill_tokens: int, decodes: int, contexts: int) -> None:
        """Called with what an iteration computed, before its end time is read; a simulated clock advances here."""
        ...


class RealClock:
    """The machine's own clock.

    ``wall`` counts real seconds. ``cpu`` counts the processor seconds of this thread, so that other programs on the
    machine do not matter; on an idle machine with one thread both are the same. Waiting takes no processor time, so
    ``cpu`` always skips idle time; ``wall`` sleeps through it unless ``skip_idle`` is set. Waiting for weights counts
    on both, on ``cpu`` by the processor seconds of the thread that copies them.
    """

    def __init__(self, kind: str = "wall", *, skip_idle: bool = False) -> None:
        """Start at 0 with the first call of ``now_s``."""
        if kind not in CLOCKS:
            raise ConfigError(f"unknown clock {kind!r}; {nearest(kind, CLOCKS)}")
        self.kind = kind
        self.source = CLOCKS[kind]
        self._skips = skip_idle or kind == "cpu"
        self._zero_s = math.nan

    def start_at(self, zero_s: float) -> None:
        """Count from this time of ``source``; all processes of a machine share the wall clock's source."""
        self._zero_s = zero_s

    def now_s(self) -> float:
        """Return the seconds since the first call, or since ``start_at``."""
        if math.isnan(self._zero_s):
            self._zero_s = self.source()
        return self.source() - self._zero_s

    def wait_until(self, time_s: float) -> None:
        """Sleep, or advance the clock."""
        missing_s = time_s - self.now_s()
        if missing_s <= 0:
            return
        if self._skips:
            self._zero_s -= missing_s
            return
        time.sleep(missing_s)

    def ran(self, prefill_tokens: int, decodes: int, contexts: int) -> None:
        """Do nothing: real time has passed."""
