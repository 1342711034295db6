"""The plain cluster: plain engines, advanced event by event; ``sim.cluster`` must equal it.

Slow and obvious on purpose. It follows the rules in the docstring of sim/cluster/cluster.py; if the two differ, one of
them is wrong.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
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
    cursor: int = 0
    owner: dict[int, int] = field(default_factory=dict)
    held: list[Row] = field(default_factory=list)
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
        if not self.held and not any(engine.queues.waiting or engine.queues.running for engine in engines):
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
