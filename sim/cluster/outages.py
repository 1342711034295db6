"""Outages of replicas: failures, and machines that are reclaimed with notice."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sim.errors import ConfigError
from sim.limits import MOST_CHANGES, check_count


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
        if not (0.0 <= self.from_s < self.until_s and 0.0 <= self.notice_s < math.inf and math.isfinite(self.from_s)):
            raise ConfigError(
                f"an outage from {self.from_s} s until {self.until_s} s with a notice of {self.notice_s} s; it must "
                "begin at 0 s or later and end after that, and the notice must be at least 0 s"
            )


Outages = Callable[[int], tuple[Outage, ...]]
"""Returns the outages of a replica for its number."""


@dataclass(frozen=True, slots=True)
class Scheduled:
    """The outages of a schedule, by the number of their replica."""

    of: dict[int, tuple[Outage, ...]]

    def __call__(self, replica: int) -> tuple[Outage, ...]:
        """Return the outages of a replica."""
        return self.of.get(replica, ())


def check_replicas(outages: Outages, count: int, more: str = "replicas.main.count=8") -> None:
    """Check that a schedule names only replicas that a cluster has.

    Args:
        more: how to get more of them, for the message.
    Raises:
        ConfigError: if it names another.
    """
    unknown = sorted(set(outages.of) - set(range(count))) if isinstance(outages, Scheduled) else []
    if unknown:
        have = "only replica 0" if count == 1 else f"{count} replicas, 0 to {count - 1}"
        if count == 2:
            have = "2 replicas, 0 and 1"
        raise ConfigError(
            f"outages.rows names replica {', '.join(map(str, unknown))}; the cluster has {have}: correct the row, or "
            f"add replicas, e.g. {more}"
        )


def none() -> Outages:
    """Return no outages."""
    return lambda replica: ()


def schedule(*, rows: Sequence[Any], notice_s: float = 0.0) -> Outages:
    """Return outages from rows of ``[replica, from_s, until_s]``; ``until_s`` is null if the replica stays down.

    Raises:
        ConfigError: for a row of another length, a replica that is not a whole number from 0, an outage that ends
            before it begins, or two outages of one replica that overlap.
    """
    of: dict[int, list[Outage]] = {}
    for row in rows:
        if not isinstance(row, Sequence) or isinstance(row, str) or len(row) != 3:
            raise ConfigError(f"outages.rows: {row} is not [replica, from_s, until_s]; e.g. [0, 120.0, 180.0]")
        replica, from_s, until_s = row
        if not _is_number(replica) or replica < 0 or not math.isfinite(replica) or int(replica) != replica:
            raise ConfigError(f"outages.rows: {list(row)}: replica is {replica}; it must be a whole number from 0")
        if not _is_number(from_s) or not (until_s is None or _is_number(until_s)):
            raise ConfigError(
                f"outages.rows: {list(row)}: from_s is {from_s} and until_s {until_s}; both must be seconds, and "
                "until_s may be null for a replica that stays down"
            )
        until_s = math.inf if until_s is None else float(until_s)
        of.setdefault(int(replica), []).append(Outage(from_s=float(from_s), until_s=until_s, notice_s=notice_s))
    ordered = {replica: tuple(sorted(found, key=lambda outage: outage.from_s)) for replica, found in of.items()}
    for replica, found in ordered.items():
        for before, after in itertools.pairwise(found):
            if after.from_s < before.until_s:
                raise ConfigError(
                    f"outages.rows: replica {replica} is down from {before.from_s} s until {before.until_s} s and "
                    f"again from {after.from_s} s; the outages of one replica must not overlap: merge the two rows"
                )
    return Scheduled(ordered)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def markov(*, mean_up_s: float, mean_away_s: float, horizon_s: float, seed: int, notice_s: float = 0.0) -> Outages:
    """Return random outages: exponential times up and down, independent for each replica.

    A spot machine is one with notice: SpotServe (arXiv 2311.15566) uses the 30 s that cloud providers give.

    Raises:
        ConfigError: for times that are not above 0 s, or too many outages.
    """
    if not all(0 < value < math.inf for value in (mean_up_s, mean_away_s, horizon_s)):
        raise ConfigError(
            f"outages.mean_up_s is {mean_up_s}, mean_away_s {mean_away_s}, horizon_s {horizon_s}; all must be "
            "finite and above 0 s"
        )
    advice = "lower outages.horizon_s, or raise outages.mean_up_s or mean_away_s"
    check_count(horizon_s / (mean_up_s + mean_away_s), "outages of each replica", MOST_CHANGES, advice)

    def of(replica: int) -> tuple[Outage, ...]:
        rng, time_s = np.random.default_rng([seed, replica]), 0.0
        found = []
        while (time_s := time_s + float(rng.exponential(mean_up_s))) < horizon_s:
            until_s = time_s + float(rng.exponential(mean_away_s))
            found.append(Outage(from_s=time_s, until_s=until_s, notice_s=notice_s))
            time_s = until_s
        return tuple(found)

    return of
