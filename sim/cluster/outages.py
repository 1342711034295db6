"""Outages of replicas: failures, and machines that are reclaimed with notice."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from sim.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Outage:
    """A period in which a replica is down.

    from_s, until_s: when it stops, and when it may start again (``inf``: never).
    notice_s: how long before from_s it is announced.
    """

    from_s: float
    until_s: float
    notice_s: float = 0.0

    def __post_init__(self) -> None:
        if not (0.0 <= self.from_s < self.until_s and self.notice_s >= 0.0 and math.isfinite(self.from_s)):
            raise ConfigError(
                f"an outage from {self.from_s} s until {self.until_s} s with a notice of {self.notice_s} s; it must "
                "begin at 0 s or later and end after that, and the notice must be at least 0 s"
            )


Outages = Callable[[int], tuple[Outage, ...]]
"""Returns the outages of a replica for its number."""


def none() -> Outages:
    """Return no outages."""
    return lambda replica: ()


def schedule(*, rows: Sequence[Sequence[float]], notice_s: float = 0.0) -> Outages:
    """Return outages from rows of ``[replica, from_s, until_s]``; ``until_s`` is null if the replica stays down.

    Raises:
        ConfigError: for a row of another length, a replica below 0, or an outage that ends before it begins.
    """
    of: dict[int, list[Outage]] = {}
    for row in rows:
        if len(row) != 3 or row[0] < 0 or int(row[0]) != row[0]:
            raise ConfigError(f"outages.rows: {list(row)} is not [replica, from_s, until_s] with a replica from 0 on")
        until_s = math.inf if row[2] is None else float(row[2])
        of.setdefault(int(row[0]), []).append(Outage(from_s=float(row[1]), until_s=until_s, notice_s=notice_s))
    return lambda replica: tuple(sorted(of.get(replica, ()), key=lambda outage: outage.from_s))


def markov(*, mean_up_s: float, mean_away_s: float, horizon_s: float, seed: int, notice_s: float = 0.0) -> Outages:
    """Return random outages: exponential times up and down, independent for each replica.

    A spot machine is one with notice: SpotServe (arXiv 2311.15566) uses the 30 s that cloud providers give.

    Raises:
        ConfigError: for times that are not above 0 s.
    """
    if min(mean_up_s, mean_away_s, horizon_s) <= 0:
        raise ConfigError(
            f"outages.mean_up_s is {mean_up_s}, mean_away_s {mean_away_s}, horizon_s {horizon_s}; all must be above 0 s"
        )

    def of(replica: int) -> tuple[Outage, ...]:
        rng, time_s = np.random.default_rng([seed, replica]), 0.0
        found = []
        while (time_s := time_s + float(rng.exponential(mean_up_s))) < horizon_s:
            until_s = time_s + float(rng.exponential(mean_away_s))
            found.append(Outage(from_s=time_s, until_s=until_s, notice_s=notice_s))
            time_s = until_s
        return tuple(found)

    return of
