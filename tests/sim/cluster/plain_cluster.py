"""The plain cluster: plain engines, advanced event by event; ``sim.cluster`` must equal it.

Slow and obvious on purpose. It follows the rules in the docstring of sim/cluster/cluster.py; if the two differ, one of
them is wrong.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from sim.cluster.outages import Outage
from sim.engine.block_table import BlockTable
from sim.engine.live_request import LiveRequest
from sim.engine.protocol import EngineState, Request, sessions_of
from sim.errors import BudgetError
from sim.results.records import Status
from sim.traces.trace import Trace
from tests.sim.engine.plain_engine import PlainEngine

Decider = Callable[[EngineState], object]


@dataclass(kw_only=True)
class PlainReplica:
    """One replica; ``build`` makes its engine in an environment, and its policy."""

    build: Callable[[float], tuple[PlainEngine, Decider]]
    decisions_s: tuple[float, ...] = ()
    outages: tuple[Outage, ...] = ()
    engine: PlainEngine | None = None
    loading: PlainEngine | None = None
    decide: Decider | None = None
    accepts: bool = False
    notified: bool = False


@dataclass(kw_only=True)
class Row:
    """A request: its replica, and its progress, which survives a move.

    params: of the model of the replica that had it last; replicas may hold different shares of it.
    """

    request: Request
    live: LiveRequest | None = None
    replica: int = -1
    moves: int = 0
    params: int = 0


@dataclass(kw_only=True, eq=False)
class Sending:
    """A request whose KV is sent to another replica, or has arrived and waits for the end of an iteration there."""

    row: Row
    to: int
    engine: PlainEngine
    mha: frozenset[int]
    blocks: int


@dataclass(kw_only=True, eq=False)
class Happening:
    """A scheduled event; events at the same time run in the order of ``number``."""

    time_s: float
    number: int
    what: Callable[[float], None]
    decides: bool


@dataclass(kw_only=True)
class PlainCluster:
    """Replicas behind the router of that name."""

    trace: Trace
    replicas: list[PlainReplica]
    router: str
    draws: np.ndarray
    load_bytes_per_s: float
    start_s: float
    most_apart: int = 32
    most_times: int = 2
    migrate_bytes_per_s: float | None = None
    cursor: int = 0
    owner: dict[int, int] = field(default_factory=dict)
    held: list[Row] = field(default_factory=list)
    sending: list[Sending] = field(default_factory=list)
    now_s: float = 0.0
    sent_bytes: int = 0
    reused: int = 0
    events: list[Happening] = field(default_factory=list)
    scheduled: int = 0
    arrived: list[int] = field(default_factory=list)
    session_home: dict[int, int] = field(default_factory=dict)

    def _at(self, time_s: float, what: Callable[[float], None], decides: bool = False) -> None:
        self.scheduled += 1
        self.events.append(Happening(time_s=time_s, number=self.scheduled, what=what, decides=decides))

    def run(self) -> list[Row]:
        """Serve the full trace; return one row per request."""
        ids = self.trace.hash_ids
        self.rows = [
            Row(
                request=Request(
                    request_id=i,
                    arrival_s=float(a),
                    prompt_tokens=int(p),
                    output_tokens=int(o),
                    hash_ids=tuple(ids[i].tolist()) if ids is not None else (),
                )
            )
            for i, (a, p, o) in enumerate(
                zip(self.trace.arrival_s, self.trace.prompt_tokens, self.trace.output_tokens, strict=True)
            )
        ]
        for replica in self.replicas:
            replica.engine, replica.decide = replica.build(0.0)
            replica.engine.expects_more = True
            replica.accepts = True
        # At one instant SimPy runs events in the order of scheduling; the first are scheduled replica by replica.
        events = self.events
        for k, replica in enumerate(self.replicas):
            self._schedule_outage(k, 0)
            if replica.decisions_s:
                self._at(replica.decisions_s[0], lambda now_s, k=k: self._decide(k, 0, now_s), decides=True)
        if self.trace.session is not None:
            return self._run_sessions()
        waiting = list(self.rows)
        while events or waiting:
            now_s = min([waiting[0].request.arrival_s] if waiting else [math.inf])
            now_s = min([now_s, *(event.time_s for event in events)])
            self._advance(now_s)
            while waiting and waiting[0].request.arrival_s == now_s:
                self._place(waiting.pop(0), now_s)
            if not waiting and self._drained():
                break
            while due := [event for event in events if event.time_s <= now_s]:
                events.remove(first := min(due, key=lambda event: event.number))
                first.what(now_s)
        self._advance(math.inf)
        return self.rows

    def _run_sessions(self) -> list[Row]:
        """Serve turns that follow others, from one end of an iteration, longest wait, arrival or event to the next."""
        sessions = sessions_of(self.trace)
        assert sessions is not None
        think_s, starts = sessions.think_s, deque(sessions.starts.tolist())
        due = [(float(self.trace.arrival_s[i]), i) for i in np.flatnonzero(np.isnan(think_s)).tolist()]
        running: set[int] = set()

        def note_ended(ended_s: float) -> None:
            for i in sorted(running):
                live = self.rows[i].live
                if live is not None and live.status in (Status.FINISHED, Status.REJECTED):
                    running.remove(i)
                    after = int(sessions.after[i])
                    if after < 0 and starts:
                        after = starts.popleft()
                    if after >= 0:
                        due.append((ended_s + float(think_s[after]), after))

        now_s = -math.inf
        while True:
            engines = [replica.engine for replica in self.replicas if replica.engine is not None]
            for engine in engines:
                engine.queues.caches_answers = True
            waits_s = [e._wait_ends_s(first) for e in engines if (first := e._first_that_never_ran()) is not None]
            times_s = [event.time_s for event in self.events] + [at_s for at_s, _ in due] + waits_s
            # One that is held has something to start: what it waited for came in the moment in which the others began.
            times_s += [engine.now_s if engine.held and not engine._idle else engine.next_s() for engine in engines]
            if not due and self._drained():
                break
            now_s = max(now_s, min(times_s, default=math.inf))
            if math.isinf(now_s):
                break
            self._advance(now_s)
            note_ended(now_s)
            while due and min(due)[0] <= now_s:
                due.remove(first_due := min(due))
                row = self.rows[first_due[1]]
                row.request = replace(row.request, arrival_s=first_due[0])
                self.arrived.append(first_due[1])
                self._place(row, now_s)
                running.add(first_due[1])
                note_ended(now_s)
            if not due and self._drained():
                break
            while happening := [event for event in self.events if event.time_s <= now_s]:
                self.events.remove(first := min(happening, key=lambda event: event.number))
                first.what(now_s)
                note_ended(now_s)
            if due and min(due)[0] <= now_s:
                continue  # they arrive before the next iterations start
            self._advance(math.nextafter(now_s, math.inf))
            note_ended(math.nextafter(now_s, math.inf))
        self._advance(math.inf)
        return [self.rows[i] for i in self.arrived]

    def _drained(self) -> bool:
        """Whether all requests have ended, or the remaining ones cannot make further progress."""
        engines = [replica.engine for replica in self.replicas if replica.engine is not None]
        if (
            not self.held
            and not self.sending
            and not any(engine.queues.waiting or engine.queues.running for engine in engines)
        ):
            return True
        if any(not event.decides for event in self.events):
            return False
        return all(not engine.held and math.isinf(engine.next_s()) for engine in engines)

    def _advance(self, time_s: float) -> None:
        for replica in self.replicas:
            if replica.engine is not None:
                replica.engine.run_until(time_s)

    # -- routing -------------------------------------------------------------------------------------------------

    def _place(self, row: Row, now_s: float) -> None:
        produced = row.live.produced_tokens if row.live is not None else 0
        for replica in self.replicas:
            if replica.accepts and replica.engine is not None:
                replica.engine._reject_late(now_s)  # a moved request may have waited too long already
        k = self._choose(row, row.request.prompt_tokens + produced)
        if k is None:
            self.held.append(row)
            return
        engine = self.replicas[k].engine
        assert engine is not None
        row.replica, before, row.params = k, row.params, engine.model.total_params
        request = replace(row.request, request_id=len(engine.queues.all))
        if row.live is None:
            late = request.arrival_s < now_s  # it waited at the router
            engine.submit([replace(request, arrival_s=now_s)])
            engine.run_until(now_s)
            row.live = engine.queues.all[request.request_id]
            if late:
                row.live.request = request
            return
        limit = min(request.output_tokens, engine.context_limit - request.prompt_tokens)
        row.live = replace(
            row.live,
            request=request,
            kept_params=row.live.kept_params * row.params // before,  # the same share of another number
            output_limit=limit,
            table=BlockTable(),
            computed_tokens=0,
            prefill_tokens=0,
            left_tokens=0,
            host_layer_blocks=0,
            at_head=False,
            cached_tokens=-1,
        )
        engine.queues.all[request.request_id] = row.live
        engine._arrived_prompt_tokens += request.prompt_tokens
        if limit <= produced:
            row.live.status = Status.REJECTED
        else:
            row.live.status = Status.WAITING
            engine.queues.waiting.append(row.live)
            engine._wake_up()

    def _choose(self, row: Row, tokens: int) -> int | None:
        accepting = [k for k, replica in enumerate(self.replicas) if replica.accepts]
        fit = [k for k in accepting if tokens < self.replicas[k].engine.context_limit]  # type: ignore[union-attr]
        if not fit:
            return accepting[0] if accepting else None
        count = {k: len(e.queues.waiting) + len(e.queues.running) for k in accepting if (e := self.replicas[k].engine)}
        if self.router == "round_robin":
            size = len(self.replicas)
            k = next(k for step in range(size) if (k := (self.cursor + step) % size) in fit)
            self.cursor = (k + 1) % size
            return k
        if self.router == "least_outstanding":
            return min(fit, key=lambda k: count[k])
        if self.router == "power_of_two":
            if len(fit) == 1:
                return fit[0]
            first, second = self.draws[row.request.request_id]
            i = int(first * len(fit))
            j = int(second * (len(fit) - 1))
            pair = sorted([fit[i], fit[j if j < i else j + 1]])
            return min(pair, key=lambda k: count[k])
        if self.router == "prefix_affinity":
            k = self._by_prefix(row, fit, count)
            self.owner.update(dict.fromkeys(row.request.hash_ids, k))
            return k
        if self.router == "session_affinity":
            assert self.trace.session is not None
            session, shortest = int(self.trace.session[row.request.request_id]), min(fit, key=lambda k: count[k])
            home = self.session_home.get(session)
            k = shortest if home not in fit or self._loads_differ(shortest, count) else home
            self.session_home[session] = k
            return k
        return min(fit, key=lambda k: self._load(k, tokens))

    def _loads_differ(self, shortest: int, count: dict[int, int]) -> bool:
        most, least = max(count.values()), count[shortest]
        return most - least > self.most_apart and most > self.most_times * least

    def _by_prefix(self, row: Row, fit: Sequence[int], count: dict[int, int]) -> int:
        shortest = min(fit, key=lambda k: count[k])
        if self._loads_differ(shortest, count):
            return shortest
        known = [self.owner[i] for i in row.request.hash_ids if self.owner.get(i) in fit]
        return known[-1] if known else shortest

    def _load(self, k: int, tokens: int) -> float:
        engine = self.replicas[k].engine
        assert engine is not None
        waiting = sum(live.target_tokens for live in engine.queues.waiting)
        if self.router == "least_kv":
            layers = len(engine._kv.prefill_mha)
            will = engine.pool.used_layer_blocks + waiting * layers / engine.config.kv_block_tokens
            return float(will / max(engine.pool.layer_blocks, 1))
        batch = engine.config.limits.max_batch_tokens
        plan, share = engine._changes.plan, engine.model.qkv_share
        return (waiting + tokens) * (engine.latency.iteration_s(plan, [(batch, 0)], 0, 0, 1, qkv_share=share) / batch)

    def _route_again(self, k: int, now_s: float, running_too: bool) -> None:
        replica = self.replicas[k]
        engine = replica.engine
        assert engine is not None
        engine._reject_late(now_s)  # those that had waited too long before they could move
        gone = [*(engine.queues.running if running_too else []), *engine.queues.waiting]
        if running_too:
            replica.engine = None
        else:
            engine._kv.forget_left_behind()
            for live in engine.queues.waiting:
                engine._kv.drop_host_kv(live)
            engine.queues.waiting.clear()
        rows = {id(row.live): row for row in self.rows if row.live is not None}
        for live in gone:
            row = rows[id(live)]
            row.replica, row.moves = -1, row.moves + 1
            self._place(row, now_s)

    # -- outages, loading, decisions ------------------------------------------------------------------------------

    def _schedule_outage(self, k: int, number: int) -> None:
        outages = self.replicas[k].outages
        if number < len(outages):
            first_s = max(outages[number].from_s - outages[number].notice_s, 0.0)
            self._at(first_s, lambda now_s: self._outage(k, number, now_s))

    def _outage(self, k: int, number: int, now_s: float) -> None:
        replica, outage = self.replicas[k], self.replicas[k].outages[number]
        if now_s < outage.from_s:
            replica.notified = True
            if self.migrate_bytes_per_s is not None:
                self._follow(self._migrate(k, number), now_s)
                return
            if replica.accepts:
                replica.accepts = False
                self._route_again(k, now_s, running_too=False)
            self._at(outage.from_s, lambda now_s: self._outage(k, number, now_s))
            return
        replica.accepts, replica.loading = False, None
        if replica.engine is not None:
            self._route_again(k, now_s, running_too=True)
        if outage.until_s < math.inf:
            self._at(outage.until_s, lambda now_s: self._start(k, number, now_s))

    # -- KV that goes with its requests -----------------------------------------------------------------------------

    def _follow(self, steps: Iterator[float], now_s: float) -> None:
        """Go on with a process that yields the time of its next step."""
        self.now_s = now_s
        for time_s in steps:
            if time_s > self.now_s:
                self._at(time_s, lambda now_s: self._follow(steps, now_s))
                return

    def _migrate(self, k: int, number: int) -> Iterator[float]:
        replica, begun_s, sends = self.replicas[k], self.now_s, False
        until_s = replica.outages[number].from_s
        step_s = (until_s - begun_s) / 64
        for look in range(64):
            yield begun_s + look * step_s
            if replica.engine is None:
                continue
            if not sends:
                size = sum(len(live.mha) * live.computed_tokens for live in self._sendable(replica.engine))
                size *= replica.engine.model.kv_bytes_per_token_layer
                sends = self.now_s + 2.0 * step_s + size / self.migrate_bytes_per_s >= until_s  # type: ignore[operator]
                if sends and replica.accepts:
                    replica.accepts = False
                    self._route_again(k, self.now_s, running_too=False)
            if sends:
                yield from self._send(replica.engine, k, until_s)
        yield until_s
        self._outage(k, number, self.now_s)

    def _sendable(self, engine: PlainEngine) -> list[LiveRequest]:
        """Return the running requests that decode and hold KV of all tokens, at 16 bits."""
        return [live for live in engine.queues.running if live.decoding and live.table.formats is None]

    def _send(self, engine: PlainEngine, k: int, until_s: float) -> Iterator[float]:
        while self.replicas[k].engine is engine:
            if engine.in_iteration:
                if engine.next_s() >= until_s:
                    return
                yield engine.next_s()
                continue
            rows = {id(row.live): row for row in self.rows if row.live is not None}
            sendable = sorted(self._sendable(engine), key=lambda live: -len(live.mha) * live.computed_tokens)
            found = ((live, to) for live in sendable if (to := self._target(engine, live, until_s)) is not None)
            live, to = next(found, (None, None))
            if live is None or to is None:
                return
            receiver = self.replicas[to].engine
            assert receiver is not None
            mha, row = receiver._kv.decode_mha, rows[id(live)]
            size = self._size(engine, live, mha)
            self.sent_bytes += size
            engine.queues.running.remove(live)
            engine._kv.outside[live.request_id] = live.table
            engine._wake_up()
            row.replica, row.moves = -1, row.moves + 1
            sending = Sending(row=row, to=to, engine=receiver, mha=mha, blocks=self._blocks(receiver, live, mha))
            self.sending.append(sending)
            yield self.now_s + size / self.migrate_bytes_per_s  # type: ignore[operator]
            if self.replicas[k].engine is engine:
                engine.release(live.request_id)
            self._at(self.now_s, lambda now_s, sending=sending: self._follow(self._receive(sending), now_s))

    def _size(self, engine: PlainEngine, live: LiveRequest, mha: frozenset[int]) -> int:
        return len(mha) * live.computed_tokens * engine.model.kv_bytes_per_token_layer

    def _blocks(self, engine: PlainEngine, live: LiveRequest, mha: frozenset[int]) -> int:
        return len(mha) * -(-live.computed_tokens // engine.config.kv_block_tokens)

    def _target(self, engine: PlainEngine, live: LiveRequest, until_s: float) -> int | None:
        """Return the replica that reuses most of a request's KV, and of these the one with the largest free share."""
        best, most = None, (-1, -1.0)
        for to, replica in enumerate(self.replicas):
            other = replica.engine
            if other is None or not replica.accepts or replica.notified or other.model != engine.model:
                continue
            mha = other._kv.decode_mha
            in_time = self.now_s + self._size(engine, live, mha) / self.migrate_bytes_per_s <= until_s  # type: ignore[operator]
            if not mha <= live.mha or not in_time or live.target_tokens >= other.context_limit:
                continue
            coming = [one for one in self.sending if one.engine is other]
            free = other.pool.free_layer_blocks - sum(one.blocks for one in coming)
            share = (len(mha), free / max(other.pool.layer_blocks, 1))
            if self._has_room(other, self._blocks(other, live, mha), free, len(coming)) and share > most:
                best, most = to, share
        return best

    def _has_room(self, engine: PlainEngine, blocks: int, free: int, coming: int) -> bool:
        places = engine._limits.max_running - len(engine.queues.running) - coming
        return free - blocks >= engine._limits.watermark_layer_blocks and places > 0

    def _receive(self, sending: Sending) -> Iterator[float]:
        replica, engine, row = self.replicas[sending.to], sending.engine, sending.row
        while replica.engine is engine and engine.in_iteration:
            yield engine.next_s()
        self.sending.remove(sending)
        live = row.live
        assert live is not None
        if replica.engine is engine and replica.accepts:
            mha = engine._kv.decode_mha
            room = self._has_room(engine, self._blocks(engine, live, mha), engine.pool.free_layer_blocks, 0)
            if mha <= sending.mha and room and live.target_tokens < engine.context_limit:
                self.reused += 1
                before, row.replica, row.params = row.params, sending.to, engine.model.total_params
                row.live = replace(
                    live,
                    request=replace(row.request, request_id=len(engine.queues.all)),
                    kept_params=live.kept_params * row.params // before,
                    output_limit=min(row.request.output_tokens, engine.context_limit - row.request.prompt_tokens),
                )
                table = engine._kv.new_table(mha)
                engine._kv.hold_outside(row.live.request_id, table, live.computed_tokens)
                engine.join(row.live)
                return
        self._place(row, self.now_s)

    def _start(self, k: int, number: int, now_s: float) -> None:
        replica = self.replicas[k]
        replica.notified = False
        self._schedule_outage(k, number + 1)
        try:
            engine, decide = replica.build(now_s)
        except BudgetError:
            return
        engine.expects_more = True
        replica.loading = engine
        self._at(
            now_s + self.start_s + engine._changes.weight_bytes / self.load_bytes_per_s,
            lambda now_s: self._accept(k, engine, decide, now_s),
        )

    def _accept(self, k: int, engine: PlainEngine, decide: Decider, now_s: float) -> None:
        replica = self.replicas[k]
        if replica.loading is not engine:
            return
        engine.run_until(now_s)
        replica.engine, replica.loading, replica.decide = engine, None, decide
        if not replica.notified:
            replica.accepts = True
            held, self.held = self.held, []
            for row in held:
                self._place(row, now_s)

    def _decide(self, k: int, number: int, now_s: float) -> None:
        replica = self.replicas[k]
        if replica.engine is not None and replica.decide is not None:
            replica.engine.apply(replica.decide(replica.engine.run_until(now_s)))  # type: ignore[arg-type]
        if number + 1 < len(replica.decisions_s):
            moment_s = replica.decisions_s[number + 1]
            self._at(moment_s, lambda now_s: self._decide(k, number + 1, now_s), decides=True)
