"""Which numbers a setting may have: whole ones where it counts, and none that would make a run endless.

Decisions every picosecond would never end, and a hundred million replicas would fill the memory. Such settings are
refused before the run starts, wherever they come from: a command line, a file of conf/, or Python.
"""

from __future__ import annotations

from numbers import Integral

from sim.errors import ConfigError, RapLabError

MOST_REQUESTS = 50_000_000
MOST_DECISIONS = 10_000_000
"""Of a policy or an autoscaler while requests arrive: a run of many minutes."""
MOST_ROLE_DECISIONS = 1_000_000
"""On the roles of replicas, in one run: about ten seconds of decisions."""
MOST_CHANGES = 1_000_000
"""Of a budget, and outages of one replica."""
MOST_REPLICAS = 10_000
MOST_CELLS = 20_000
"""Of a cluster; a number that no machine could serve is a slip."""
MOST_RUNNING = 1_000_000
"""Requests that hold KV at the same time; the engine reserves room for as many."""
MOST_HOST_BLOCKS = 1_000_000_000
"""KV blocks of a host, over all layers."""
MOST_PROCESSES = 1_024
LEAST_TICK_S = 1e-4
"""Seconds between two decisions; an iteration of any model takes longer."""


def is_whole(value: object) -> bool:
    """Return whether a value is a whole number. True, 2.0 and "2" are not."""
    return type(value) is int or (isinstance(value, Integral) and not isinstance(value, bool))


def check_whole(value: object, key: str, least: int) -> None:
    """Check that a setting is a whole number from ``least`` on.

    Raises:
        ConfigError: if it is not, with its key.
    """
    if not is_whole(value) or value < least:  # type: ignore[operator]
        raise ConfigError(f"{key} is {value!r}; it must be a whole number from {least}")


def check_count(count: float, what: str, most: int, advice: str, error: type[RapLabError] = ConfigError) -> None:
    """Check that there are at most ``most`` of something.

    Args:
        count: how many there would be. what: names them, such as "requests". advice: what to change.
        error: what to raise.
    """
    if not count <= most:
        raise error(f"that is {count:,.4g} {what}, more than the limit of {most:,}; {advice}")


def check_slowdown(slowdown: float) -> None:
    """Check the factor on the time of iterations.

    Raises:
        ConfigError: unless it lies from 0.01 to 100.
    """
    if not 0.01 <= slowdown <= 100.0:
        raise ConfigError(
            f"slowdown is {slowdown}; it must be from 0.01 to 100: 1 is the speed of the calibration, 2 half of it"
        )


def check_ticks(tick_s: float, last_arrival_s: float, key: str = "tick_s") -> None:
    """Check the seconds between two decisions; ``key`` states them.

    Raises:
        ConfigError: if decisions follow each other too fast, or there are too many until the last arrival.
    """
    if not tick_s >= LEAST_TICK_S:
        raise ConfigError(f"{key} is {tick_s}; it must be at least {LEAST_TICK_S:g} seconds")
    advice = f"raise {key}, or cut the trace, e.g. workload=first_10min (trace.rebase=true counts times from the first)"
    check_count(last_arrival_s / tick_s, f"decisions until the last arrival, one per {key}", MOST_DECISIONS, advice)
