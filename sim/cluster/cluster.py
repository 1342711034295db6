"""Many replicas behind a router on one SimPy clock: mixed devices, models, plans and policies; failures and scaling.

SimPy handles outages, weight loading, and the decisions of policies and of the autoscaler. Between two such events the
compiled loop (sim/cluster/kernel.py) routes arrivals one by one and serves all replicas.

Order of events at one instant: iterations end; requests arrive and are routed; SimPy's events run in the order in which
they were scheduled; iterations start. A replica that comes back after an outage gets a new `SimEngine`, under the first
plan of its policy.

What happens to requests:

1. A replica that fails loses its KV. Its requests are routed again at once, running ones before waiting ones. They keep
   the tokens that they have produced; another replica recomputes the KV of those tokens and of the prompt. A request
   whose longest wait has ended by then is rejected and not routed again, also when a replica leaves.
2. A replica with notice of an outage accepts no new requests. Its waiting requests are routed again at once; its
   running requests continue until the outage and are then routed again. The same happens if the autoscaler removes a
   replica, except that it stops only once its running requests have finished.
3. While no replica accepts, requests wait at the router, in order.
4. A replica that comes back starts a process and loads its weights before it accepts: ``start_s`` + bytes / bandwidth.
5. A turn of a session arrives its think time after the one before it has ended, on whichever replica that was. A turn
   that is rejected because of a change of plan ends the smallest moment after it.
6. With ``migrate_bytes_per_s``, a replica with notice goes on accepting requests and sends the KV of its running ones
   to other replicas just in time (sim/cluster/migration.py has the rules). Those go on decoding there.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, fields
from enum import IntEnum
from typing import Any, Protocol

import numpy as np
import simpy
from numpy.typing import NDArray

from sim.cluster import kernel as ck
from sim.cluster import migration
from sim.cluster.migration import Migration, Target, Transfer
from sim.cluster.outages import Outage
from sim.cluster.routers import Candidate, KernelRouter, Router, RoutingRequest
from sim.cost.plan import Plan
from sim.engine import kernel
from sim.engine.batch_step import observe_all
from sim.engine.kernel.state import DUE_TURN, TURN
from sim.engine.protocol import EngineState, check_hash_blocks, sessions_of
from sim.engine.sim_engine import SimEngine, exact_delay, prefix_block_ids
from sim.errors import BudgetError, ConfigError
from sim.policies.base import ClusterPolicy, Policy
from sim.results.records import Records, Status
from sim.traces.trace import Trace
from sim.types import Floats, Ints


@dataclass(frozen=True, slots=True, kw_only=True)
class Replica:
    """The description of one replica.

    build: makes its engine, with an external clock, in an environment, and its policy; called at the start and after
        each outage.
    decisions_s: returns the times of its policy's decisions, ascending; None keeps the first plan.
    outages: in order of time.
    """

    name: str
    build: Callable[[simpy.Environment], tuple[SimEngine, Policy]]
    decisions_s: Callable[[], Iterator[float]] | None = None
    outages: tuple[Outage, ...] = ()

    def __post_init__(self) -> None:
        for before, after in zip(self.outages, self.outages[1:], strict=False):
            if after.from_s < before.until_s:
                raise ConfigError(
                    f"replica {self.name!r}: an outage begins at {after.from_s} s, before the previous one ends at "
                    f"{before.until_s} s; list outages in order of time, without overlap"
                )


class Phase(IntEnum):
    """The phase of a replica: serving; leaving (accepts no new requests); down; loading weights; off (not wanted)."""

    SERVING = 0
    LEAVING = 1
    DOWN = 2
    LOADING = 3
    OFF = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterState:
    """What an autoscaler observes of a cluster.

    serving: states of the replicas that accept requests. loading: number of replicas that load weights.
    held: requests that wait at the router because no replica accepts.
    """

    time_s: float
    serving: tuple[EngineState, ...]
    loading: int
    held: int


class Autoscaler(Protocol):
    """Decides how many replicas serve."""

    @property
    def period_s(self) -> float:
        """Seconds between two decisions."""
        ...

    @property
    def first(self) -> int:
        """Number of replicas at the start, with their weights loaded."""
        ...

    def __call__(self, state: ClusterState) -> int:
        """Return how many replicas should serve: the first ones of the cluster's list."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ClusterRecords(Records):
    """Records of a cluster, one entry per request.

    replica: int64[n], the replica that served the request last; -1 if none did.
    moves: int64[n], how often it was routed again because a replica failed or was leaving.
    """

    replica: Ints
    moves: Ints


@dataclass(frozen=True, slots=True)
class Event:
    """A phase change of a replica: its phase from ``time_s`` on, and the number of requests routed again."""

    time_s: float
    replica: int
    phase: Phase
    moved: int


@dataclass(slots=True, eq=False)
class ReplicaRun:
    """One engine of a replica, from the start of loading (``begun_s``) to its end (``ended_s``, ``inf`` if it runs)."""

    replica: int
    engine: SimEngine
    policy: Policy
    begun_s: float
    ended_s: float = math.inf


@dataclass(frozen=True, slots=True, eq=False)
class _Moved:
    """A request that a replica has left: that replica's record of it, one row, and its model's parameters."""

    record: NDArray[Any]
    params: int

    @property
    def produced_tokens(self) -> int:
        return int(self.record["produced_tokens"][0])

    def words(self, params: int) -> Ints:
        """Return the record for a replica whose model has ``params`` parameters: the kept share stays the same."""
        record = self.record.copy()
        record["kept_params"] = int(record["kept_params"][0]) * params // self.params
        return record.view(np.int64)


def _cluster_state(trace: Trace, replicas: int, router: Router, seed: int) -> kernel.State:
    """Return the state of the compiled loop: nothing has arrived, no replica accepts."""
    ids = trace.hash_ids if trace.hash_ids is not None else ()
    hash_at = np.zeros(len(trace) + 1, dtype=np.int64)
    hash_at[1 : len(ids) + 1] = np.cumsum([len(i) for i in ids], dtype=np.int64)
    # Numbered from 0, because a hash can be as large as 2**63 and the router keeps an array by id.
    hash_ids = np.unique(np.concatenate([*ids, np.zeros(0, dtype=np.int64)]), return_inverse=True)[1].astype(np.int64)
    described = np.zeros(replicas, dtype=ck.REPLICA_FIELDS)
    described["engine"] = -1
    state = kernel.State(
        ck.CLUSTER,
        None,
        replicas=described,
        next_s=np.full(replicas, math.inf),
        arrival_s=trace.arrival_s.copy(),
        prompt_tokens=trace.prompt_tokens.copy(),
        output_tokens=trace.output_tokens.copy(),
        random_pairs=router.draws(len(trace), seed) if isinstance(router, KernelRouter) else np.zeros((1, 2)),
        homes=np.full((len(trace), 2), -1, dtype=np.int64).view(ck.HOME)[:, 0],
        hash_at=hash_at,
        hash_ids=hash_ids,
        block_owners=np.full(int(hash_ids.max(initial=-1)) + 1, -1, dtype=np.int64),
        **_session_arrays(trace),
    )
    fields_ = kernel.fields_of(state.cluster)
    fields_.due_count = 0 if trace.think_s is None else int(np.isnan(trace.think_s).sum())
    fields_.reached_s = -math.inf
    fields_.router = router.rule if isinstance(router, KernelRouter) else ck.ASK
    if isinstance(router, KernelRouter):
        fields_.most_apart, fields_.most_times = router.most_apart, router.most_times
    return state


def _session_arrays(trace: Trace) -> dict[str, NDArray[Any]]:
    """Return the arrays of the compiled loop that a trace with sessions has in addition."""
    sessions = sessions_of(trace)
    if sessions is None or trace.session is None:
        return {}
    turns, due = np.zeros(len(trace), dtype=TURN), np.zeros(len(trace), dtype=DUE_TURN)
    turns["after"], turns["think_s"] = sessions.after, sessions.think_s
    own = np.flatnonzero(np.isnan(sessions.think_s))
    due["at_s"][: len(own)], due["request"][: len(own)] = trace.arrival_s[own], own  # sorted, so it is a heap
    numbers, session = np.unique(trace.session, return_inverse=True)
    return {
        "turns": turns,
        "due_turns": due,
        "session_starts": sessions.starts,
        "arrival_order": np.zeros(len(trace), dtype=np.int64),
        "session": session.astype(np.int64),
        "session_homes": np.full(len(numbers), -1, dtype=np.int64),
    }


class Cluster:
    """Replicas behind a router; ``tests/sim/cluster/plain_cluster.py`` does the same without compiled code.

    A cluster of one replica gives the same records as its engine alone.
    """

    def __init__(
        self,
        trace: Trace,
        replicas: Sequence[Replica],
        router: Router,
        *,
        seed: int = 0,
        load_bytes_per_s: float = 1e9,
        start_s: float = 0.0,
        autoscaler: Autoscaler | None = None,
        migrate_bytes_per_s: float | None = None,
    ) -> None:
        """Build a cluster whose replicas (all, or the autoscaler's ``first``) serve from the start.

        Args:
            trace: the requests. replicas: what serves them. router: chooses the replica (sim/cluster/routers.py).
            seed: of the router's random numbers.
            load_bytes_per_s: bandwidth at which a returning replica loads its weights.
            start_s: its additional start time.
            autoscaler: decides how many replicas serve; None runs all.
            migrate_bytes_per_s: bandwidth at which a replica with notice sends KV; None sends none.
        Raises:
            ConfigError: for no replicas, a bandwidth that is not above 0, or ``prefix_caching`` without hash ids or
                with ``migrate_bytes_per_s``.
            BudgetError, PlanError, CalibrationError: as in ``SimEngine``.
        """
        if not replicas:
            raise ConfigError("a cluster needs at least one replica; set replicas.NAME.count=1")
        if not load_bytes_per_s > 0 or not start_s >= 0:
            raise ConfigError(
                f"load_bytes_per_s is {load_bytes_per_s} and start_s {start_s}; the first must be above 0 bytes per "
                "second, the second at least 0 seconds"
            )
        migration.check_migration(migrate_bytes_per_s)
        self._migrate_bytes_per_s = migrate_bytes_per_s
        self._transfers: list[tuple[int, _Moved, Transfer]] = []  # under way, or waiting for an iteration to end
        self._migrations: list[Migration] = []
        self._in_sessions = trace.session is not None
        self.env = simpy.Environment()
        self.trace, self.replicas, self._router = trace, tuple(replicas), router
        self._load_bytes_per_s, self._start_s, self._autoscaler = load_bytes_per_s, start_s, autoscaler
        k = len(replicas)
        self._phase = [Phase.OFF] * k
        self._wanted = [autoscaler is None or i < autoscaler.first for i in range(k)]
        self._current: list[int] = [-1] * k  # each replica's engine as an index of _engines; -1 for none
        self._engines: list[ReplicaRun] = []
        self._events: list[Event] = []
        self._loading: list[ReplicaRun | None] = [None] * k
        self._notified = [False] * k  # whether its next outage has been announced
        self._sent = [0] * k  # requests that have left a replica with their KV
        self._held: deque[tuple[int, _Moved | None]] = deque()
        self._lives = 0

        self._moves = np.zeros(len(trace), dtype=np.int64)
        self._tables = np.zeros((k, len(kernel.REPLICA.arrays), 3), dtype=np.int64)
        self._state = _cluster_state(trace, k, router, seed)
        self._fields = kernel.fields_of(self._state.cluster)
        self._accepts, self._context_limits = (self._state.replicas[name] for name in ("accepts", "context_limit"))
        self._next_s, self._homes = self._state.next_s, self._state.homes
        self._prefix_ids: Ints | None = None  # the hash ids, renumbered for replicas with a prefix cache
        self._bring_up()

    def _bring_up(self) -> None:
        """Let the first replicas accept requests, and begin what will happen to them."""
        for i, replica in enumerate(self.replicas):
            if self._wanted[i]:
                self._accept(ReplicaRun(i, *replica.build(self.env), 0.0))
            if replica.outages:
                self._lives += 1
                self.env.process(self._live(i))
            if replica.decisions_s is not None:
                self.env.process(self._decide(i, replica.decisions_s()))
        if self._autoscaler is not None:
            self.env.process(self._scale(self._autoscaler))

    # -- serving -------------------------------------------------------------------------------------------------

    def run(self, on_progress: Callable[[float, int], None] | None = None, progress_s: float = math.inf) -> None:
        """Serve the full trace.

        Args:
            on_progress: called every ``progress_s`` simulated seconds with the time and the requests routed so far.
        """
        shown_s = progress_s
        while True:
            horizon_s = min(self.env.peek(), shown_s)
            self._serve(horizon_s)
            if self.drained:
                self._end()
                return
            assert horizon_s < math.inf
            if on_progress is not None and horizon_s == shown_s:
                on_progress(horizon_s, self._fields.next_request)
                shown_s += progress_s
            while self.env.peek() == horizon_s:
                self.env.step()

    def _end(self) -> None:
        """End at the last iteration, whatever the next event of SimPy would have been.

        Copies under way are completed; seconds over budget of replicas that idled past the end are not counted.
        """
        self._serve(math.inf)
        for served in self._engines:
            served.engine.observe(min(served.ended_s, max(self.end_s, served.begun_s)))

    def run_until(self, time_s: float) -> None:
        """Serve until a time: all that ends or arrives by then is done; an iteration due then has not started."""
        while self.env.now < time_s:
            self.env.timeout(exact_delay(self.env.now, time_s))
            while (horizon_s := self.env.peek()) <= time_s:
                self._serve(horizon_s)
                while self.env.peek() == horizon_s:
                    self.env.step()

    def accepting(self) -> list[int]:
        """Return the numbers of the replicas that accept requests, ascending."""
        found: list[int] = np.flatnonzero(self._accepts).tolist()
        return found

    def observe(self, replica: int) -> EngineState:
        """Return the state of a replica now; it must have an engine, as every replica that accepts requests has."""
        return self._observed(replica, self.env.now)

    def observe_into(self, seen: Floats) -> None:
        """Write the state of every replica now into ``seen``, as ``observe`` returns it; each must have an engine.

        Args:
            seen: float64[k, batch_step.SEEN_COLUMNS].
        """
        observe_all(self.tables, float(self.env.now), seen)
        for i in range(len(self.replicas)):
            self._change_soon(i, self.env.now)

    def apply(self, replica: int, plan: Plan) -> None:
        """Apply a plan to a replica from now on, as ``SimEngine.apply`` does."""
        self._engine(replica).apply(plan)
        self._change_soon(replica, self.env.now)

    @property
    def tables(self) -> NDArray[np.int64]:
        """The addresses of each replica's arrays, int64[k, arrays, 3], for compiled code; valid until it serves."""
        self._refresh_tables()
        return self._tables

    @property
    def drained(self) -> bool:
        """Whether no request of the trace can make further progress."""
        if self._fields.due_count if self._in_sessions else self._fields.next_request < len(self.trace):
            return False
        left = len(self._held) + len(self._transfers)
        for i, number in enumerate(self._current):
            if number >= 0:
                left += ck.outstanding(self._tables[i])
        if not left:
            return True
        if self._lives or np.isfinite(self._next_s).any():
            return False
        return not (self._held and self._autoscaler is not None and Phase.OFF in self._phase)

    def _serve(self, horizon_s: float) -> None:
        """Serve and route until ``horizon_s``."""
        fields_, arrival_s = self._fields, self._state.arrival_s
        self._refresh_tables()
        while True:
            serve = ck.serve_sessions if self._in_sessions else ck.serve
            why = serve(self._tables, self._state.table, self.env.now, horizon_s)
            if why == ck.REACHED:
                return
            if why == ck.ATTEND:
                self._engine(fields_.replica).unblock(fields_.why)
                self._refresh_tables()
            elif why == ck.ROOM:
                self._make_room(fields_.replica)
            elif self._in_sessions:  # no replica accepts, or a router in Python chooses
                at = ck.take_due(self._state.table)
                self._place(at, None, float(arrival_s[at]))
            else:
                at = fields_.next_request
                self._place(at, None, min(arrival_s[at] if at < len(self.trace) else math.inf, horizon_s))
                fields_.next_request = at + 1

    def _refresh_tables(self) -> None:
        """Update the addresses of the engines' arrays: a plan graph that several engines share may have grown."""
        for i, number in enumerate(self._current):
            if number >= 0:
                self._tables[i] = self._engines[number].engine.table

    def _engine(self, i: int) -> SimEngine:
        return self._engines[self._current[i]].engine

    def _make_room(self, i: int) -> None:
        """Enlarge a replica's request arrays."""
        engine = self._engine(i)
        engine.reserve(max(64, 2 * engine.requests))
        self._tables[i] = engine.table

    # -- routing -------------------------------------------------------------------------------------------------

    def _place(self, request: int, moved: _Moved | None, now_s: float) -> None:
        """Route a request now: a new one, or one that another replica has left."""
        state = self._state
        prompt, produced = int(state.prompt_tokens[request]), 0 if moved is None else moved.produced_tokens
        i = self._choose(request, prompt, produced, now_s)
        if i < 0:
            self._held.append((request, moved))
            return
        engine = self._engine(i)
        if engine.request_room == engine.requests:
            self._make_room(i)
        table, limit = self._tables[i], min(state.output_tokens[request], engine.context_limit - prompt)
        hash_at, ids = state.hash_at[request], state.hash_at[request + 1] - state.hash_at[request]
        if moved is None:
            arrival_s = state.arrival_s[request]
            place = ck.give(table, self._next_s, i, arrival_s, now_s, prompt, limit, hash_at, ids)
        else:
            words = moved.words(engine.model.total_params)
            place = ck.give_moved(table, self._next_s, i, now_s, words, limit, hash_at, ids)
        if self._in_sessions:
            ck.note_turn(table, place, request)
        self._homes[request] = self._current[i], place

    def _choose(self, request: int, prompt: int, produced: int, now_s: float) -> int:
        """Return the replica for a request; -1 if none accepts."""
        if isinstance(self._router, KernelRouter):
            ck.reject_late(self._tables, self._state.table, now_s)
            return int(ck.choose(self._tables, self._state.table, request, prompt + produced))
        accepting = self.accepting()
        fit = [i for i in accepting if prompt + produced < self._context_limits[i]]
        if not fit:
            return accepting[0] if accepting else -1
        candidates = []
        for i in fit:
            token_s = float(ck.prefill_token_s(self._tables[i]))
            candidates.append(Candidate(replica=i, state=self._observed(i, now_s), prefill_token_s=token_s))
        hash_at = self._state.hash_at
        ids = self._state.hash_ids[hash_at[request] : hash_at[request + 1]]
        routing_request = RoutingRequest(
            request_id=request, prompt_tokens=prompt, produced_tokens=produced, hash_ids=tuple(ids.tolist())
        )
        chosen = self._router(candidates, routing_request)
        if chosen not in fit:
            raise ConfigError(f"the router chose replica {chosen}; it must choose one of its candidates, {fit}")
        return chosen

    def _route_again(self, i: int, running_too: bool) -> int:
        """Take the waiting (and running) requests of a replica and route them again now; return their number."""
        number, engine, table = self._current[i], self._engine(i), self._tables[i]
        kernel.reject_late(table, float(self.env.now))
        rows = np.zeros(ck.outstanding(table), dtype=np.int64)
        rows = rows[: ck.held_rows(table, rows, running_too)]
        if running_too:
            ck.stop(table)
        else:
            ck.let_waiting_go(table)
        mine = np.flatnonzero(self._homes["engine"] == number)
        request_of = np.full(engine.requests, -1, dtype=np.int64)
        request_of[self._homes["row"][mine]] = mine
        records = engine.rows(rows)
        for place, request in enumerate(request_of[rows].tolist()):
            self._homes[request] = -1, -1
            self._moves[request] += 1
            moved = _Moved(records[place : place + 1], engine.model.total_params)
            self._place(request, moved, self.env.now)
        return len(rows)

    # -- outages, loading, decisions, scaling --------------------------------------------------------------------

    def _live(self, i: int) -> Generator[simpy.Event, Any, None]:
        """Run the outages of a replica."""
        for outage in self.replicas[i].outages:
            if outage.notice_s > 0:
                yield from self._wait_until(outage.from_s - outage.notice_s)
                self._notified[i] = True
                if self._migrate_bytes_per_s is not None:
                    yield from self._migrate(i, outage.from_s, self._migrate_bytes_per_s)
                elif self._phase[i] is Phase.SERVING:
                    self._leave(i)
            yield from self._wait_until(outage.from_s)
            self._stop(i, Phase.DOWN)
            if math.isinf(outage.until_s):
                break
            yield from self._wait_until(outage.until_s)
            self._notified[i] = False
            if self._wanted[i]:
                self.env.process(self._start(i))
            else:
                self._note(i, Phase.OFF)
        self._lives -= 1

    def _migrate(self, i: int, until_s: float, bytes_per_s: float) -> Generator[simpy.Event, Any, None]:
        """Serve at a replica for as long as a notice allows, then send KV away until the notice ends."""
        begun_s, sends = self.env.now, False
        step_s = (until_s - begun_s) / migration.CHECKS
        for look in range(migration.CHECKS):
            yield from self._wait_until(begun_s + look * step_s)
            if self._current[i] < 0:
                continue
            if not sends:
                per_token = self._engine(i).model.kv_bytes_per_token_layer
                sends = migration.is_time(self._tables[i], per_token, bytes_per_s, self.env.now, step_s, until_s)
                if sends and self._phase[i] is Phase.SERVING:
                    self._leave(i)
            if sends:
                yield from self._send_kv(i, until_s, bytes_per_s)

    def _send_kv(self, i: int, until_s: float, bytes_per_s: float) -> Generator[simpy.Event, Any, None]:
        """Send the KV of one request after the other, between iterations, until none can be sent now."""
        number = self._current[i]
        while self._current[i] == number:
            if ck.in_iteration(self._tables[i]):
                if (end_s := float(ck.next_event_s(self._tables[i]))) >= until_s:
                    return
                yield from self._wait_until(end_s)
                continue
            engine, now_s = self._engine(i), float(self.env.now)
            per_token = engine.model.kv_bytes_per_token_layer
            transfer = migration.next_transfer(
                self._tables[i], self._targets(engine), per_token, bytes_per_s, now_s, until_s
            )
            if transfer is None:
                return
            blocks = migration.take_out(self._tables[i], self._next_s, i, now_s, transfer.slot)
            home = (self._homes["engine"] == number) & (self._homes["row"] == transfer.row)
            request = int(np.flatnonzero(home)[0])
            self._homes[request] = -1, -1
            self._moves[request] += 1
            self._sent[i] += 1
            moved = _Moved(engine.rows(np.array([transfer.row])), engine.model.total_params)
            self._transfers.append((request, moved, transfer))
            yield from self._wait_until(transfer.ends_s)
            if self._current[i] == number:
                migration.free_sent(self._tables[i], self._next_s, i, float(self.env.now), blocks)
            self.env.process(self._receive(i, request, moved, transfer))

    def _targets(self, engine: SimEngine) -> list[Target]:
        """Return the replicas that could get KV of an engine."""
        found = []
        for j in self.accepting():
            if not self._notified[j] and self._engine(j).model == engine.model:
                coming = [one for _, _, one in self._transfers if one.target.engine == self._current[j]]
                blocks = sum(one.blocks for one in coming)
                limit = self._engine(j).context_limit
                found.append(Target(j, self._current[j], self._tables[j], limit, len(coming), blocks))
        return found

    def _receive(self, i: int, request: int, moved: _Moved, transfer: Transfer) -> Generator[simpy.Event, Any, None]:
        """Let a request whose KV has come from replica ``i`` go on, between iterations; or route it again."""
        j, number = transfer.target.replica, transfer.target.engine
        while self._current[j] == number and ck.in_iteration(self._tables[j]):
            yield from self._wait_until(float(ck.next_event_s(self._tables[j])))
        self._transfers = [one for one in self._transfers if one[0] != request]
        reused = False
        if self._current[j] == number and self._accepts[j]:
            table, tokens = self._tables[j], int(moved.record["computed_tokens"][0])
            layers = migration.reusable_layers(table, transfer.words)
            blocks = migration.blocks_for(table, layers, tokens)
            fits = tokens + 1 < self._engine(j).context_limit
            reused = layers >= 0 and fits and migration.free_share(table, blocks, 0, 0) >= 0.0
        self._migrations.append(
            Migration(
                request=request,
                replica=i,
                to=j,
                size_bytes=transfer.size_bytes,
                begun_s=transfer.begun_s,
                ended_s=transfer.ends_s,
                reused=reused,
            )
        )
        if not reused:
            self._place(request, moved, float(self.env.now))
            return
        engine = self._engine(j)
        if engine.request_room == engine.requests:
            self._make_room(j)
        state = self._state
        limit = min(state.output_tokens[request], engine.context_limit - state.prompt_tokens[request])
        words = moved.words(engine.model.total_params)
        row = migration.go_on(self._tables[j], self._next_s, j, float(self.env.now), words, limit)
        if self._in_sessions:
            ck.note_turn(self._tables[j], row, request)
        self._homes[request] = number, row

    def _start(self, i: int) -> Generator[simpy.Event, Any, None]:
        """Load a replica's weights, then accept requests; it stays down if the budget cannot hold them."""
        try:
            engine, policy = self.replicas[i].build(self.env)
        except BudgetError:
            self._note(i, Phase.DOWN)
            return
        self._lives += 1
        served = ReplicaRun(i, engine, policy, self.env.now)
        self._loading[i] = served
        self._note(i, Phase.LOADING)
        weight_bytes = engine.observe(self.env.now).weight_bytes
        yield from self._wait_until(self.env.now + self._start_s + weight_bytes / self._load_bytes_per_s)
        if self._loading[i] is served:  # it was not stopped in the meantime
            self._accept(served)
        self._lives -= 1

    def _accept(self, served: ReplicaRun) -> None:
        """Let a loaded replica accept requests; those that wait at the router are routed first."""
        i, engine = served.replica, served.engine
        self._loading[i] = None
        if engine.config.prefix_caching:
            migration.check_no_prefix_cache(self._migrate_bytes_per_s)
            check_hash_blocks(engine.config, self.trace)
            if self._prefix_ids is None:
                self._prefix_ids = prefix_block_ids(self.trace.hash_ids)
            engine.use_hash_ids(self._prefix_ids)
        if self._in_sessions:
            engine.report_turns()
        self._current[i] = len(self._engines)
        self._engines.append(served)
        self._state.replicas[i] = 0, engine.context_limit, self._current[i], -1, math.inf
        self._change_soon(i, self.env.now)
        self._note(i, Phase.SERVING)
        if self._notified[i]:
            self._leave(i)
            return
        self._accepts[i] = 1
        held, self._held = self._held, deque()
        for request, moved in held:
            self._place(request, moved, self.env.now)

    def _leave(self, i: int) -> None:
        """Accept no more requests at a replica; route its waiting ones again, and let the running ones continue."""
        self._accepts[i] = 0
        self._note(i, Phase.LEAVING, self._route_again(i, running_too=False))

    def _stop(self, i: int, phase: Phase) -> None:
        """End a replica's engine and route its requests again."""
        self._accepts[i] = 0
        self._loading[i] = None
        moved = 0
        if self._current[i] >= 0:
            served = self._engines[self._current[i]]
            served.ended_s = self.env.now
            served.engine.observe(self.env.now)  # updates its seconds over budget, which end now
            moved = self._route_again(i, running_too=True)
            self._current[i] = -1
            self._state.replicas["engine"][i] = -1
            self._next_s[i] = math.inf
        self._note(i, phase, moved + self._sent[i])
        self._sent[i] = 0

    def _note(self, i: int, phase: Phase, moved: int = 0) -> None:
        self._phase[i] = phase
        self._events.append(Event(float(self.env.now), i, phase, moved))

    def _decide(self, i: int, moments_s: Iterator[float]) -> Generator[simpy.Event, Any, None]:
        """Run the decisions of a replica's policy at their times, while it has an engine."""
        for moment_s in moments_s:
            yield from self._wait_until(moment_s)
            if self._current[i] >= 0:
                policy, state = self._engines[self._current[i]].policy, self.observe(i)
                if isinstance(policy, ClusterPolicy):
                    plan = policy.among(state, [self.observe(j) for j in self.accepting() if j != i])
                else:
                    plan = policy(state)
                self.apply(i, plan)

    def _observed(self, i: int, now_s: float) -> EngineState:
        """Return the state of a replica now, after applying budget changes up to now."""
        state = self._engine(i).observe(now_s)
        self._change_soon(i, now_s)
        return state

    def _change_soon(self, i: int, now_s: float) -> None:
        """Set the time of the replica's next event for the compiled loop."""
        table = self._tables[i] = self._engine(i).table  # a plan that is new to the engine may have moved its arrays
        if (next_s := ck.next_event_s(table)) <= now_s or not math.isfinite(self._next_s[i]):
            self._next_s[i] = max(next_s, now_s)

    def _scale(self, autoscaler: Autoscaler) -> Generator[simpy.Event, Any, None]:
        """Run the autoscaler every period; start and stop replicas accordingly."""
        step = 1
        while True:
            yield from self._wait_until(step * autoscaler.period_s)
            step += 1
            state = ClusterState(
                time_s=float(self.env.now),
                serving=tuple(self.observe(i) for i in self.accepting()),
                loading=sum(served is not None for served in self._loading),
                held=len(self._held),
            )
            wanted = autoscaler(state)
            if not 1 <= wanted <= len(self.replicas):
                raise ConfigError(
                    f"the autoscaler wants {wanted} replicas; it must want 1 to {len(self.replicas)}, the number of "
                    "configured replicas"
                )
            self._wanted = self._chosen(wanted)
            for i, want in enumerate(self._wanted):
                phase, running = self._phase[i], self._current[i] >= 0 and ck.outstanding(self._tables[i]) > 0
                if want and phase is Phase.OFF:
                    self.env.process(self._start(i))
                elif want and phase is Phase.LEAVING and not self._notified[i]:
                    self._note(i, Phase.SERVING)
                    self._accepts[i] = 1
                elif not want and phase is Phase.SERVING and not self._notified[i]:
                    self._leave(i)
                elif not want and phase is Phase.LEAVING and not running:
                    self._stop(i, Phase.OFF)

    def _chosen(self, wanted: int) -> list[bool]:
        """Return which replicas are to serve if ``wanted`` are: those that serve or load first, then in their order.

        One that is down, or soon will be, is none of them as long as there are others: another one takes its place.
        """

        def rank(i: int) -> tuple[bool, bool, int]:
            gone = self._phase[i] is Phase.DOWN or self._notified[i]
            return gone, self._phase[i] not in (Phase.SERVING, Phase.LOADING), i

        chosen = set(sorted(range(len(self.replicas)), key=rank)[:wanted])
        return [i in chosen for i in range(len(self.replicas))]

    def _wait_until(self, time_s: float) -> Generator[simpy.Event, Any, None]:
        while self.env.now < time_s:
            yield self.env.timeout(exact_delay(self.env.now, time_s))

    # -- results -------------------------------------------------------------------------------------------------

    def records(self) -> ClusterRecords:
        """Return one row per request that has arrived, in order of arrival."""
        state, served_order = self._state, self.arrival_order()
        arrived, homes = len(served_order), self._homes[served_order]
        arrival_s, prompts, outputs = (
            column[served_order] for column in (state.arrival_s, state.prompt_tokens, state.output_tokens)
        )
        nothing = np.full(arrived, math.nan)
        columns: dict[str, NDArray[Any]] = {
            "arrival_s": arrival_s,
            "prompt_tokens": prompts,
            "output_tokens": outputs,
            "produced_tokens": np.zeros(arrived, dtype=np.int64),
            "preemptions": np.zeros(arrived, dtype=np.int64),
            "cached_tokens": np.zeros(arrived, dtype=np.int64),
            "status": np.full(arrived, int(Status.WAITING), dtype=np.int64),
            "replica": np.full(arrived, -1, dtype=np.int64),
            "moves": self._moves[served_order],
        }
        for name in ("admitted_s", "first_token_s", "finish_s", "kept_params_share", "quality_nll"):
            columns[name] = nothing.copy()
        order = np.argsort(homes["engine"], kind="stable")
        bounds = np.searchsorted(homes["engine"][order], np.arange(len(self._engines) + 1))
        for served, first, last in zip(self._engines, bounds, bounds[1:], strict=False):
            mine = order[first:last]
            part = served.engine.records_of(homes["row"][mine], outputs[mine])
            for field in fields(Records):
                columns[field.name][mine] = getattr(part, field.name)
            columns["replica"][mine] = served.replica
        row_of = np.full(len(self.trace), -1, dtype=np.int64)
        row_of[served_order] = np.arange(arrived)
        sent = [(request, moved) for request, moved, _ in self._transfers]
        for held, moved in (*self._held, *sent):
            if moved is not None:
                request = int(row_of[held])
                columns["produced_tokens"][request] = moved.produced_tokens
                columns["admitted_s"][request] = moved.record["admitted_s"][0]
                columns["first_token_s"][request] = moved.record["first_token_s"][0]
        return ClusterRecords(**columns)

    def arrival_order(self) -> Ints:
        """Return the request of the trace of each row of ``records``: int64[arrived]."""
        arrived = self._fields.next_request
        return self._state.arrival_order[:arrived].copy() if self._in_sessions else np.arange(arrived)

    @property
    def end_s(self) -> float:
        """The end of the last iteration, in seconds; an iteration that a failure cut off ends there."""
        return max((min(served.engine.last_iteration_end_s, served.ended_s) for served in self._engines), default=0.0)

    def engines(self) -> tuple[ReplicaRun, ...]:
        """Return the run of every engine that has served, in order of their starts."""
        return tuple(self._engines)

    def migrations(self) -> tuple[Migration, ...]:
        """Return the transfers of KV between replicas that have ended, in the order in which they were received."""
        return tuple(self._migrations)

    def events(self) -> tuple[Event, ...]:
        """Return the phase changes of all replicas, in order of time."""
        return tuple(self._events)
