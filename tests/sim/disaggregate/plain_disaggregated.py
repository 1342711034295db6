"""Disaggregated prefill and decode on plain engines, advanced event by event; ``sim.disaggregate`` must equal it.

Slow and obvious on purpose, without overlap. Links share their bandwidth step by step, from one change to the next, in
exact fractions; the rule of sim/disaggregate/links.py says when a transfer ends.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction

import numpy as np
import simpy

from sim.cluster.outages import Outage
from sim.cost.plan import Plan
from sim.engine.block_table import BlockTable
from sim.engine.live_request import LiveRequest
from sim.engine.protocol import Request
from sim.results.records import Status
from sim.traces.trace import Trace
from tests.sim.engine.plain_engine import PlainEngine

PREFILL, DECODE = 0, 1


@dataclass(kw_only=True, eq=False)
class Member:
    """One replica: the role that it has or gets, and its engine with the role of that, if it has one."""

    number: int
    first: int
    role: int
    outages: tuple[Outage, ...]
    engine: PlainEngine | None = None
    engine_role: int = -1
    accepts: bool = False
    notified: bool = False
    loads: int = 0

    @property
    def turning(self) -> bool:
        """Whether its role changes once it is empty."""
        return self.engine is not None and self.engine_role != self.role


@dataclass(kw_only=True, eq=False)
class Row:
    """A request: its stage, who has it, and the transfer of its KV.

    stage: held (waits for a prefill replica), prefill, ready (its KV waits), sending, here (at decode, not yet in it),
        decode, or ended at prefill.
    """

    number: int
    request: Request
    stage: str = "held"
    live: LiveRequest | None = None
    home: Member | None = None  # that prefills, or prefilled
    home_engine: PlainEngine | None = None
    tokens: int = 0
    to: Member | None = None
    send_s: float = math.nan
    flows_s: float = math.nan
    left_bytes: Fraction = Fraction(0)
    sent_s: float = math.nan
    order: int = -1
    moves: int = 0
    prefill_column: int = -1
    decode_column: int = -1


@dataclass(kw_only=True)
class PlainDisaggregated:
    """Prefill replicas, decode replicas, links; ``build`` makes the engine of a role at a time.

    outages: of each replica, those that begin with prefill first. turns: seconds, and the number of replicas that are
        to prefill from then on.
    """

    trace: Trace
    plan: Plan
    build: Callable[[int, float], PlainEngine]
    counts: tuple[int, int]
    outages: Sequence[tuple[Outage, ...]]
    turns: Sequence[tuple[float, int]]
    bytes_per_s: float
    latency_s: float
    one_link: bool
    token_layer_bytes: int
    load_bytes_per_s: float
    start_s: float
    turn_s: float
    ready: list[Row] = field(default_factory=list)
    held: list[Row] = field(default_factory=list)
    events: list[tuple[float, int, Callable[[float], None]]] = field(default_factory=list)
    scheduled: int = 0
    shipped: int = 0

    def run(self) -> dict[str, np.ndarray]:
        """Serve the full trace; return columns of ``sim.disaggregate.disaggregate.StagedRecords``."""
        self.rate = Fraction(self.bytes_per_s)
        roles = [PREFILL] * self.counts[0] + [DECODE] * self.counts[1]
        self.members = [Member(number=k, first=r, role=r, outages=self.outages[k]) for k, r in enumerate(roles)]
        for member in self.members:
            self._engine(member, self._built(member, 0.0))
            member.accepts = True
        for member in self.members:
            self._schedule_outage(member, 0)
        self.model = self._of(DECODE)[0].engine.model  # type: ignore[union-attr]
        self.limit = min(member.engine.context_limit for member in self._of(DECODE) if member.engine is not None)
        if self.turns:
            self.limit = min(self.limit, *(self.build(role, 0.0).context_limit for role in (PREFILL, DECODE)))
        self.rows = [
            Row(number=i, request=Request(request_id=i, arrival_s=float(a), prompt_tokens=int(p), output_tokens=int(o)))
            for i, (a, p, o) in enumerate(
                zip(self.trace.arrival_s, self.trace.prompt_tokens, self.trace.output_tokens, strict=True)
            )
        ]
        coming, turns, now_s = list(self.rows), list(self.turns), 0.0
        while coming or any(not self._ended(row) for row in self.rows) or turns:
            engines = [m.engine for m in self.members if m.engine is not None]
            times = [engine.next_s() for engine in engines]
            if any(engine.held for engine in engines):  # woken at the moment at which it is held
                times.append(math.nextafter(now_s, math.inf))
            times += [coming[0].request.arrival_s] if coming else []
            times += [turns[0][0]] if turns else []
            times += [max(time_s, now_s) for time_s, _, _ in self.events]
            times.append(self._next_change_s(now_s))
            if math.isinf(next_s := min(times)):
                break
            self._carry(Fraction(now_s), Fraction(next_s))
            now_s = next_s
            self._happen(now_s, coming)
            while turns and turns[0][0] <= now_s:
                self._set_prefill(turns.pop(0)[1], now_s)
                self._happen(now_s, coming)
            for member in self.members:
                if member.engine is not None and not member.engine.in_iteration:
                    # one that ends at the next float is not to end now
                    member.engine.run_until(math.nextafter(now_s, math.inf))  # iterations start
            self._send_those_ready(now_s)  # an iteration that starts may admit a request, which makes room
        return self._columns()

    def _ended(self, row: Row) -> bool:
        return row.live is not None and row.live.status in (Status.FINISHED, Status.REJECTED) and not self._goes_on(row)

    def _goes_on(self, row: Row) -> bool:
        """Whether a request whose prompt has ended has more tokens to produce."""
        prefilled = row.stage in ("prefill", "ready", "sending", "here") and row.live is not None
        return prefilled and row.live.status is Status.FINISHED and row.live.produced_tokens < self._most(row)  # type: ignore[union-attr]

    def _order_of_end(self, row: Row) -> tuple[int, int]:
        """Return a prompt's place among those that end at one moment: by replica, then as in its batch."""
        assert row.home_engine is not None
        assert row.live is not None
        return self._column(row.home), list(row.home_engine.outside).index(row.live.request_id)

    def _most(self, row: Row) -> int:
        return min(row.request.output_tokens, self.limit - row.request.prompt_tokens)

    def _of(self, role: int) -> list[Member]:
        """Return the replicas with an engine of a role, in the order of the columns."""
        found = [m for m in self.members if m.engine is not None and m.engine_role == role]
        return sorted(found, key=lambda m: self._column(m, role))

    def _column(self, member: Member | None, role: int = PREFILL) -> int:
        assert member is not None
        own = [m.number for m in self.members if m.first == role] + [m.number for m in self.members if m.first != role]
        return own.index(member.number)

    def _happen(self, now_s: float, coming: list[Row]) -> None:
        """Do all that is due now except for starting iterations."""
        for member in self.members:
            if member.engine is not None:
                member.engine.run_until(now_s)
        self._end_transfers(now_s)
        prefilled = [row for row in self.rows if row.stage == "prefill" and self._goes_on(row)]
        for row in sorted(prefilled, key=self._order_of_end):
            row.stage, row.left_bytes = "ready", Fraction(self._sent_bytes(row.tokens))
            self.ready.append(row)
        while coming and coming[0].request.arrival_s <= now_s:
            self._place(coming.pop(0), now_s)
        self._follow_calendar(now_s)
        self._join()
        self._send_those_ready(now_s)
        self._end_transfers(now_s)
        self._join()

    # -- prefill -------------------------------------------------------------------------------------------------

    def _place(self, row: Row, now_s: float) -> None:
        """Hand a request to the prefill replica with the fewest requests."""
        prefill = self._of(PREFILL)
        for member in prefill:
            member.engine._reject_late(now_s)  # type: ignore[union-attr]
        accepting = [member for member in prefill if member.accepts]
        if not accepting:
            row.stage = "held"
            self.held.append(row)
            return
        member = min(accepting, key=lambda m: self._requests(m))
        engine = member.engine
        assert engine is not None
        produced = 0 if row.live is None else row.live.produced_tokens
        tokens = row.request.prompt_tokens + produced
        fits = tokens < min(self.limit, engine.context_limit)
        request = replace(row.request, request_id=len(engine.queues.all))
        status = Status.WAITING if fits else Status.REJECTED
        limit = produced + 1 if fits else 0
        if row.live is None:
            row.live = LiveRequest(request, output_limit=limit, status=status)
        else:
            row.live = replace(
                row.live,
                request=request,
                output_limit=limit,
                status=status,
                table=BlockTable(),
                computed_tokens=0,
                prefill_tokens=0,
                left_tokens=0,
                host_layer_blocks=0,
                at_head=False,
                finish_s=math.nan,
            )
        engine.queues.all[request.request_id] = row.live
        if fits:
            engine.queues.waiting.append(row.live)
            engine._wake_up()
        row.stage, row.home, row.home_engine, row.tokens = "prefill", member, engine, tokens
        row.prefill_column, row.decode_column, row.to = self._column(member), -1, None

    def _requests(self, member: Member) -> int:
        assert member.engine is not None
        return len(member.engine.queues.waiting) + len(member.engine.queues.running)

    def _kept(self, prompt: int) -> list[tuple[int, int]]:
        """Return how many tokens each layer of decode keeps of a prompt, and the bytes of each."""
        head = self.model.head_dim
        full, size = self.token_layer_bytes, {8: head + 4, 4: head // 2 + 4}
        heads = self.model.num_kv_heads
        if self.plan.kv_compression is not None:
            prompt = -(-prompt * self.plan.kv_compression.percent // 100)
        if self.plan.kv_hidden:
            full = self.model.hidden_size * self.model.weight_dtype_bytes
        return [
            (keep.tokens(prompt), full if bits == 16 else 2 * heads * size[bits])
            for keep, bits, kept in zip(self.plan.kv_keep, self.plan.kv_bits, self.plan.decode.mha, strict=True)
            if kept
        ]

    def _sent_bytes(self, prompt: int) -> int:
        return sum(tokens * size for tokens, size in self._kept(prompt))

    def _blocks(self, row: Row) -> int:
        block_bytes = self._block_tokens() * self.token_layer_bytes  # of one at 16 bits, whatever it holds
        return sum(-(-tokens // (block_bytes // size)) for tokens, size in self._kept(row.tokens))

    def _block_tokens(self) -> int:
        return next(m.engine for m in self.members if m.engine is not None).config.kv_block_tokens

    # -- transfers -----------------------------------------------------------------------------------------------

    def _sending(self) -> list[Row]:
        """Return the requests whose KV is being sent, in the order in which it was started."""
        return sorted((row for row in self.rows if row.stage == "sending"), key=lambda row: row.order)

    def _send_those_ready(self, now_s: float) -> None:
        while self.ready and (to := self._where(self.ready[0])) is not None:
            row = self.ready.pop(0)
            row.stage, row.to, row.order = "sending", to, self.shipped
            row.send_s, row.flows_s, row.sent_s = now_s, now_s + self.latency_s, math.nan
            row.left_bytes = Fraction(self._sent_bytes(row.tokens))
            self.shipped += 1
            assert to.engine is not None
            table = to.engine.reserve(row.number, row.tokens)
            assert table is not None
            assert table.own_layer_blocks == self._blocks(row)

    def _end_transfers(self, now_s: float) -> None:
        for row in [r for r in self._sending() if r.flows_s <= now_s and r.left_bytes == 0]:
            row.stage, row.sent_s = "here", now_s
            assert row.home_engine is not None
            assert row.live is not None
            row.home_engine.release(row.live.request_id)

    def _where(self, row: Row) -> Member | None:
        best, most = None, -1.0
        for member in self._of(DECODE):
            engine = member.engine
            assert engine is not None
            free = engine.pool.free_layer_blocks
            coming = sum(r.to is member for r in self.rows if r.stage in ("sending", "here"))
            room = free - self._blocks(row) >= engine._limits.watermark_layer_blocks
            places = len(engine.queues.running) + coming < engine._limits.max_running
            share = free / max(engine.pool.layer_blocks, 1)
            if member.accepts and room and places and not engine.queues.waiting and share > most:
                best, most = member, share
        return best

    def _here(self, member: Member) -> list[Row]:
        here = [row for row in self.rows if row.stage == "here" and row.to is member]
        return sorted(here, key=lambda row: (row.sent_s, row.order))

    def _join(self) -> None:
        for member in self._of(DECODE):
            engine = member.engine
            assert engine is not None
            if engine.in_iteration:
                continue
            for row in self._here(member):
                assert row.live is not None
                row.live = replace(
                    row.live,
                    request=replace(row.request, request_id=row.number),
                    output_limit=self._most(row),
                    computed_tokens=row.tokens,
                    prefill_tokens=row.tokens,
                    finish_s=math.nan,
                )
                row.stage, row.decode_column = "decode", self._column(member, DECODE)
                engine.join(row.live)

    # -- replicas that fail, leave, come back and change their roles -----------------------------------------------

    def _at(self, time_s: float, what: Callable[[float], None]) -> None:
        self.scheduled += 1
        self.events.append((time_s, self.scheduled, what))

    def _follow_calendar(self, now_s: float) -> None:
        while True:
            while due := [event for event in self.events if event[0] <= now_s]:
                self.events.remove(first := min(due, key=lambda event: event[:2]))
                first[2](now_s)
            empty = [member for member in self.members if member.turning and self._empty(member)]
            if not empty:
                return
            member = empty[0]
            assert member.engine is not None
            held_bytes = member.engine._changes.weight_bytes
            member.engine, member.accepts = None, False
            engine = self._built(member, now_s)
            self._load(member, engine, max(engine._changes.weight_bytes - held_bytes, 0), self.turn_s, now_s)

    def _empty(self, member: Member) -> bool:
        stages = ("ready", "sending") if member.engine_role == PREFILL else ("sending", "here")
        of = [row.home if member.engine_role == PREFILL else row.to for row in self.rows if row.stage in stages]
        return not self._requests(member) and member not in of

    def _built(self, member: Member, now_s: float) -> PlainEngine:
        engine = self.build(member.role, now_s)
        engine.expects_more = True
        if member.role == PREFILL:
            engine._holds = lambda request_id: self._stays(engine, request_id)
        return engine

    def _stays(self, engine: PlainEngine, request_id: int) -> bool:
        live = engine.queues.all[request_id]
        row = next(row for row in self.rows if row.live is live)
        return live.produced_tokens < self._most(row)

    def _engine(self, member: Member, engine: PlainEngine, role: int | None = None) -> None:
        member.engine, member.engine_role = engine, member.role if role is None else role

    def _load(self, member: Member, engine: PlainEngine, size_bytes: int, more_s: float, now_s: float) -> None:
        member.loads += 1
        load, role = member.loads, member.role

        def loaded(now_s: float) -> None:
            if member.loads == load:
                engine.run_until(now_s)
                self._engine(member, engine, role)
                member.accepts = not (member.notified or member.turning)
                if member.accepts:
                    self._place_held(member, now_s)

        self._at(now_s + (more_s + size_bytes / self.load_bytes_per_s), loaded)

    def _place_held(self, member: Member, now_s: float) -> None:
        if member.engine_role == PREFILL:
            held, self.held = self.held, []
            for row in held:
                self._place(row, now_s)

    def _schedule_outage(self, member: Member, k: int) -> None:
        if k < len(member.outages):
            outage = member.outages[k]
            if outage.notice_s > 0:
                self._at(max(outage.from_s - outage.notice_s, 0.0), lambda now_s: self._notify(member, now_s))
            self._at(outage.from_s, lambda now_s: self._fail(member, k, now_s))

    def _notify(self, member: Member, now_s: float) -> None:
        member.notified = True
        self._leave(member, now_s)

    def _leave(self, member: Member, now_s: float) -> None:
        engine = member.engine
        if engine is None or not member.accepts:
            return
        member.accepts = False
        if member.engine_role == PREFILL:
            engine._reject_late(now_s)
            engine._kv.forget_left_behind()
            for live in engine.queues.waiting:
                engine._kv.drop_host_kv(live)
            waiting = self._rows_of(engine.queues.waiting)
            engine.queues.waiting.clear()
            for row in waiting:
                self._again(row, now_s)

    def _rows_of(self, live: Sequence[LiveRequest]) -> list[Row]:
        return [next(row for row in self.rows if row.live is one) for one in live]

    def _again(self, row: Row, now_s: float) -> None:
        row.moves += 1
        row.send_s = row.sent_s = math.nan
        row.prefill_column = row.decode_column = -1
        row.to = None
        assert row.live is not None
        row.live.status, row.live.finish_s = Status.WAITING, math.nan
        self._place(row, now_s)

    def _fail(self, member: Member, k: int, now_s: float) -> None:
        member.loads += 1
        engine, role = member.engine, member.engine_role
        member.engine, member.accepts = None, False
        if engine is not None:
            engine._reject_late(now_s)
            gone = self._rows_of([*engine.queues.running, *engine.queues.waiting])
            if role == PREFILL:
                sending = [row for row in self._sending() if row.home is member]
                for row in sending:
                    assert row.to is not None
                    assert row.to.engine is not None
                    self._release(row.to.engine, row.number)
                ready = [row for row in self.ready if row.home is member]
                self.ready = [row for row in self.ready if row.home is not member]
                gone = [*sending, *ready, *gone]
            else:
                sending = [row for row in self._sending() if row.to is member]
                for row in sending:
                    row.stage, row.to, row.send_s = "ready", None, math.nan
                self.ready = [*sending, *self.ready]
                gone = [*gone, *self._here(member)]
            for row in gone:
                row.stage = "held"
            for row in gone:
                self._again(row, now_s)
        outage = member.outages[k]
        if outage.until_s < math.inf:
            self._at(outage.until_s, lambda now_s: self._return(member, k, now_s))

    def _release(self, engine: PlainEngine, number: int) -> None:
        engine.release(number)

    def _return(self, member: Member, k: int, now_s: float) -> None:
        member.notified = False
        engine = self._built(member, now_s)
        self._load(member, engine, engine._changes.weight_bytes, self.start_s, now_s)
        self._schedule_outage(member, k + 1)

    def _set_prefill(self, count: int, now_s: float) -> None:
        for member in self._of(PREFILL):
            member.engine._reject_late(now_s)  # type: ignore[union-attr]
        now = sum(member.role == PREFILL for member in self.members)
        role = PREFILL if count > now else DECODE

        def ease(member: Member) -> tuple[int, ...]:
            if member.turning:
                return 0, 0, 0, -member.number
            if member.engine is None or not member.accepts:
                return 2, 0, 0, -member.number
            if role == DECODE:
                mine = [row for row in self.rows if row.home is member and row.stage in ("ready", "sending")]
                return 1, self._requests(member), sum(self._blocks(row) for row in mine), -member.number
            coming = [row for row in self.rows if row.to is member and row.stage in ("sending", "here")]
            blocks = sum(self._blocks(row) for row in coming)
            return 1, self._requests(member) + len(coming), blocks, -member.number

        others = sorted((member for member in self.members if member.role != role), key=ease)
        for member in others[: abs(count - now)]:
            member.role = role
            if member.turning:
                self._leave(member, now_s)
            elif member.engine is not None and not member.notified:
                member.accepts = True
                self._place_held(member, now_s)

    # -- links: each active transfer gets the bandwidth divided by their number -----------------------------------

    def _active(self, now_s: float | Fraction) -> dict[int, list[Row]]:
        """Return the transfers that share each link now."""
        links: dict[int, list[Row]] = {}
        for row in self._sending():
            if row.flows_s <= now_s and row.left_bytes > 0:
                links.setdefault(0 if self.one_link else self._column(row.home), []).append(row)
        return links

    def _seconds_left(self, active: list[Row]) -> Fraction:
        """Return when the first of the transfers that share a link ends, counted from now."""
        return min(row.left_bytes for row in active) * len(active) / self.rate

    def _next_change_s(self, now_s: float) -> float:
        """Return the first time of the clock at which a transfer has ended or begins to share its link."""
        times = [row.flows_s for row in self._sending() if row.flows_s > now_s]
        for active in self._active(now_s).values():
            end_s = Fraction(now_s) + self._seconds_left(active)
            time_s = float(end_s)
            times.append(time_s if Fraction(time_s) >= end_s else math.nextafter(time_s, math.inf))
        return min(times, default=math.inf)

    def _carry(self, from_s: Fraction, until_s: Fraction) -> None:
        """Carry bytes; none begins to share a link in between, but those that have ended no longer share it."""
        for active in self._active(from_s).values():
            now_s = from_s
            while active and now_s < until_s:
                step_s = min(self._seconds_left(active), until_s - now_s)
                for row in active:
                    row.left_bytes -= step_s * self.rate / len(active)
                active = [row for row in active if row.left_bytes > 0]
                now_s += step_s

    def _columns(self) -> dict[str, np.ndarray]:
        found: dict[str, list[float]] = {}
        for row in self.rows:
            live = LiveRequest(row.request, output_limit=0) if row.live is None else row.live
            goes_on = self._goes_on(row)
            values = {
                "prefill_replica": row.prefill_column,
                "decode_replica": row.decode_column,
                "first_token_s": live.first_token_s,
                "finish_s": math.nan if goes_on else live.finish_s,
                "send_s": row.send_s,
                "sent_s": row.sent_s,
                "produced_tokens": live.produced_tokens,
                "preemptions": live.preemptions,
                "moves": row.moves,
                "status": int(Status.RUNNING if goes_on else live.status),
            }
            for name, value in values.items():
                found.setdefault(name, []).append(value)
        return {name: np.array(values, dtype=np.float64) for name, values in found.items()}


def build(kind: type[PlainEngine], now_s: float, **overrides: object) -> PlainEngine:
    """Return an engine that expects further requests, and whose clock begins at a time."""
    engine = kind(env=simpy.Environment(initial_time=now_s), **overrides)  # type: ignore[arg-type]
    engine.expects_more = True
    return engine
