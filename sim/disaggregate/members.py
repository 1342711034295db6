"""The replicas of a disaggregated system: their roles, outages and changes of role, and what each holds for transfers.

A replica serves in one role at a time, with an engine of its own (a `Side`). It gets a new engine when it returns after
an outage and when its role changes. `Members` knows when; what happens to requests, its `Owner` decides
(sim/disaggregate/disaggregate.py).
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Protocol

import numpy as np
import simpy

from sim.cluster.cluster import Phase
from sim.cluster.outages import Outage
from sim.engine.protocol import EngineState
from sim.engine.sim_engine import SimEngine
from sim.errors import ConfigError
from sim.types import Floats, Ints

Build = Callable[[simpy.Environment], SimEngine]


class Role(IntEnum):
    """What a replica does: compute prompts, or produce all further tokens."""

    PREFILL = 0
    DECODE = 1


@dataclass(slots=True, eq=False)
class Side:
    """One engine of one replica in one role.

    index: its number among all engines that have had this role. table: the addresses of the engine's arrays.
    next_s: float64[1], from when on something happens there. accepts: whether it may get further requests.
    held_blocks: KV blocks beyond those of its own requests; prefill: of KV that waits or is being sent; decode:
        reserved for KV that comes.
    coming: decode: requests whose KV is being sent here, or has arrived and not joined yet.
    arrived: decode: requests whose KV is here and that have not joined yet.
    request_of: the request of each row.
    """

    replica: int
    role: Role
    index: int
    engine: SimEngine
    table: Ints
    begun_s: float
    next_s: Floats = field(default_factory=lambda: np.full(1, math.inf))
    ended_s: float = math.inf
    accepts: bool = False
    held_blocks: int = 0
    coming: int = 0
    arrived: list[int] = field(default_factory=list)
    request_of: dict[int, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class RoleEvent:
    """A phase change of a replica: its role and phase from ``time_s`` on, and the number of requests routed again."""

    time_s: float
    replica: int
    role: Role
    phase: Phase
    moved: int


@dataclass(slots=True, eq=False)
class Member:
    """One replica.

    number: among all replicas; those that begin with prefill come first. role: the one that it has, or gets as soon as
        what it has begun in the other one has ended. builds: make its engine in each role; None for one that it never
        has. in_turn: whether its role is changing, until it serves in the new one. away: whether it is in an outage,
        from the notice until it serves again.
    """

    number: int
    role: Role
    builds: tuple[Build | None, Build | None]
    outages: tuple[Outage, ...] = ()
    phase: Phase = Phase.OFF
    side: Side | None = None
    notified: bool = False
    loads: int = 0
    in_turn: bool = False
    away: bool = False

    @property
    def turning(self) -> bool:
        """Whether it ends what it has begun before its role changes."""
        return self.side is not None and self.side.role is not self.role


class Owner(Protocol):
    """Decides what happens to the requests of a replica."""

    def opened(self, side: Side) -> None:
        """Use a replica that accepts requests from now on."""
        ...

    def left(self, side: Side) -> int:
        """Route the waiting requests of a replica again, which accepts no more; return their number."""
        ...

    def lost(self, side: Side) -> int:
        """Route all requests of a replica again, which has failed; return their number."""
        ...

    def empty(self, side: Side) -> bool:
        """Return whether a replica holds no request and no KV."""
        ...


class Members:
    """All replicas of a system, and the calendar of what happens to them."""

    def __init__(
        self,
        env: simpy.Environment,
        members: Sequence[Member],
        owner: Owner,
        *,
        load_bytes_per_s: float,
        start_s: float,
        turn_s: float,
    ) -> None:
        """Build the engines of all replicas; they accept requests from the start.

        Args:
            load_bytes_per_s, start_s: as in ``sim.cluster.cluster.Cluster``. turn_s: how long a replica without
                requests takes to change its role, besides the time to load the weights that it lacks.
        """
        check_times(load_bytes_per_s, start_s, turn_s)
        self.env, self.all, self._owner = env, tuple(members), owner
        self._load_bytes_per_s, self._start_s, self._turn_s = load_bytes_per_s, start_s, turn_s
        self._calendar: list[tuple[float, int, Callable[[], None]]] = []
        self._scheduled = 0
        self._turners = [member for member in self.all if None not in member.builds]
        self.events: list[RoleEvent] = []
        self.sides: tuple[list[Side], list[Side]] = [], []  # every engine that has served, by role
        self.last_states: tuple[list[EngineState], list[EngineState]] = [], []  # of those that serve no more
        # A role's column of the records counts the replicas that began with it first, then the others.
        self.columns = tuple(_numbered(members, role) for role in Role)
        for member in self.all:
            member.phase, member.side = Phase.SERVING, self._side(member, member.role, self._built(member))
            member.side.accepts = True
        self._regroup()
        for member in self.all:
            self._schedule_outage(member, 0)

    def _regroup(self) -> None:
        """Update the lists of the engines that serve now, by role."""
        serving = [member.side for member in self.all if member.side is not None]
        self.prefill, self.decode = (
            sorted((s for s in serving if s.role is role), key=lambda s: self.columns[s.role][s.replica])
            for role in Role
        )

    def _built(self, member: Member) -> SimEngine:
        build = member.builds[member.role]
        assert build is not None
        return build(self.env)

    def _side(self, member: Member, role: Role, engine: SimEngine) -> Side:
        known = self.sides[role]
        known.append(Side(member.number, role, len(known), engine, engine.table, float(self.env.now)))
        return known[-1]

    def _note(self, member: Member, phase: Phase, moved: int = 0) -> None:
        member.phase = phase
        role = member.role if member.side is None else member.side.role
        self.events.append(RoleEvent(float(self.env.now), member.number, role, phase, moved))

    # -- the calendar --------------------------------------------------------------------------------------------

    @property
    def next_s(self) -> float:
        """When something happens next; ``inf`` for never."""
        return self._calendar[0][0] if self._calendar else math.inf

    def at(self, time_s: float, what: Callable[[], None]) -> None:
        """Do something at a time; what is due at one time happens in the order in which it was scheduled."""
        self._scheduled += 1
        heapq.heappush(self._calendar, (time_s, self._scheduled, what))

    def happen(self) -> bool:
        """Do what is due now, and let replicas change their roles that have ended what they had begun.

        Returns:
            Whether anything happened.
        """
        happened = False
        while True:
            while self._calendar and self._calendar[0][0] <= self.env.now:
                heapq.heappop(self._calendar)[2]()
                happened = True
            done = [m for m in self._turners if m.turning and m.side is not None and self._owner.empty(m.side)]
            if not done:
                return happened
            self._turn_now(done[0])
            happened = True

    # -- outages and loading -------------------------------------------------------------------------------------

    def _schedule_outage(self, member: Member, k: int) -> None:
        if k == len(member.outages):
            return
        outage = member.outages[k]
        if outage.notice_s > 0:
            self.at(max(outage.from_s - outage.notice_s, 0.0), lambda: self._notify(member))
        self.at(outage.from_s, lambda: self._fail(member, k))

    def _notify(self, member: Member) -> None:
        member.notified = member.away = True
        self._leave(member)

    def _leave(self, member: Member) -> None:
        """Let a replica accept no more requests, if it does."""
        if member.side is not None and member.side.accepts:
            member.side.accepts = False
            self._note(member, Phase.LEAVING, self._owner.left(member.side))

    def _fail(self, member: Member, k: int) -> None:
        member.loads += 1  # what it was loading is lost
        member.in_turn, member.away = False, True
        moved = 0
        if (side := self._end(member)) is not None:
            moved = self._owner.lost(side)
        self._note(member, Phase.DOWN, moved)
        if member.outages[k].until_s < math.inf:
            self.at(member.outages[k].until_s, lambda: self._return(member, k))

    def _end(self, member: Member) -> Side | None:
        """End the engine of a replica, if it has one."""
        side, member.side = member.side, None
        if side is not None:
            side.accepts, side.ended_s = False, float(self.env.now)
            # This also updates its seconds over budget, which end now.
            self.last_states[side.role].append(side.engine.observe(side.ended_s))
            self._regroup()
        return side

    def _return(self, member: Member, k: int) -> None:
        member.notified = False
        engine = self._built(member)
        self._load(member, engine, engine.observe(self.env.now).weight_bytes, self._start_s)
        self._schedule_outage(member, k + 1)

    def _load(self, member: Member, engine: SimEngine, size_bytes: int, more_s: float) -> None:
        """Let a replica accept requests in its role once weights are loaded."""
        member.loads += 1
        load, role = member.loads, member.role
        self._note(member, Phase.LOADING)

        def loaded() -> None:
            if member.loads == load:
                self._open(member, role, engine)

        self.at(float(self.env.now) + (more_s + size_bytes / self._load_bytes_per_s), loaded)

    def _open(self, member: Member, role: Role, engine: SimEngine) -> None:
        side = member.side = self._side(member, role, engine)
        self._regroup()
        self._note(member, Phase.SERVING)
        member.in_turn, member.away = member.turning, member.notified
        if member.notified or member.turning:
            self._note(member, Phase.LEAVING)
        else:
            side.accepts = True
            self._owner.opened(side)

    # -- changes of role -----------------------------------------------------------------------------------------

    def turn(self, member: Member, role: Role) -> None:
        """Let a replica have a role as soon as what it has begun in another one has ended.

        One that is loading first loads for the role that it had.

        Raises:
            ConfigError: for a role that it cannot have.
        """
        if role is member.role:
            return
        if member.builds[role] is None:
            raise ConfigError(f"replica {member.number} cannot change its role; give the system both builds of each")
        member.role = role
        member.in_turn = member.turning
        if member.turning:
            self._leave(member)
        elif member.side is not None and not member.notified:  # back in the role that it has not left yet
            member.side.accepts = True
            self._note(member, Phase.SERVING)
            self._owner.opened(member.side)

    def _turn_now(self, member: Member) -> None:
        """Give a replica that has ended what it had begun the engine of its new role."""
        side = self._end(member)
        assert side is not None
        member.in_turn = True
        engine = self._built(member)
        # Prefill holds every block of decode, so the larger side's surplus is what the other one lacks.
        held_bytes, needed_bytes = (one.observe(self.env.now).weight_bytes for one in (side.engine, engine))
        self._load(member, engine, max(needed_bytes - held_bytes, 0), self._turn_s)


def check_times(load_bytes_per_s: float, start_s: float, turn_s: float) -> None:
    """Check how long replicas take to come back and to change roles; see ``Members``.

    Raises:
        ConfigError: for a bandwidth that is not above 0, or seconds that are below 0 or not finite.
    """
    if not load_bytes_per_s > 0:
        raise ConfigError(
            f"load_bytes_per_s is {load_bytes_per_s}; it must be above 0 bytes per second: set e.g. "
            "load_bytes_per_s=2e9"
        )
    for name, value in (("start_s", start_s), ("turn_s", turn_s)):
        if not 0 <= value < math.inf:
            raise ConfigError(f"{name} is {value}; it must be at least 0 seconds and finite: set e.g. {name}=1.0")


def role_changes(events: Sequence[object]) -> int:
    """Return how often a replica began to serve in another role than before; other events do not count."""
    roles: dict[int, Role] = {}
    changes = 0
    for event in events:
        if isinstance(event, RoleEvent) and event.phase in (Phase.SERVING, Phase.LEAVING):
            changes += roles.get(event.replica, event.role) is not event.role
            roles[event.replica] = event.role
    return changes


def _numbered(members: Sequence[Member], role: Role) -> dict[int, int]:
    """Return each replica's number in the records of a role."""
    first = sorted(members, key=lambda member: (member.role is not role, member.number))
    return {member.number: place for place, member in enumerate(first)}
