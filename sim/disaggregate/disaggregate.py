"""Disaggregated prefill and decode: different replicas, and KV sent between them (DistServe, Splitwise, PDTrim).

SimPy handles the transfers; the kernel serves. One fixed plan covers both sides: prefill replicas run and hold its
prefill mask, decode replicas its decode mask. A prompt sends the KV of the MHA blocks that decode keeps, and in each
layer the tokens that ``kv_keep`` keeps, at the bits of ``kv_bits``.

A request passes four stages; in each, exactly one side counts its KV:

1. A prefill replica computes its prompt and its first token, which counts for TTFT.
2. Its KV waits there until a decode replica has room: free KV blocks, a free place among its running requests, and no
   preempted request that waits for the same room. Requests are sent in the order in which their prefill ended. Until
   then they hold their KV blocks, so that a full decode pool eventually stops prefill (back-pressure).
3. During the transfer, the prefill replica counts the KV until the last byte has arrived. The decode replica reserves
   the room, but does not count it as held.
4. At the decode replica, it joins between two iterations. If it is preempted there, that replica recomputes its KV with
   the decode mask, because it has no other weights.

With ``engine.schedules_ahead``, a request whose KV has arrived still joins the next iteration.

With ``overlap``, KV is sent during the iteration that ends the prompt, if a decode replica has room at its start: all
layers but the last during the iteration, the last layer after it. (Layers are not modeled one by one: on a fast link,
bytes may leave before their layer is computed, but never those of the last layer.)

Order at one instant: transfers end, iterations end, requests arrive, requests join, KV is sent, iterations start.
Transfers that end at the same instant, on one link or several, join in the order in which they were sent
(sim/disaggregate/links.py says when a transfer ends).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import simpy

from sim.cluster import kernel as ck
from sim.cost.kv_format import kv_formats, stored_kv_bytes
from sim.cost.memory import kv_blocks
from sim.cost.model_spec import ModelSpec
from sim.cost.plan import KeepMask, Plan, check_plan
from sim.disaggregate.links import Link
from sim.engine import kernel
from sim.engine.protocol import refuse_sessions
from sim.engine.sim_engine import SimEngine, exact_delay
from sim.errors import ConfigError
from sim.results.records import Records, Status
from sim.traces.trace import Trace
from sim.types import Floats, Ints

Build = Callable[[simpy.Environment], SimEngine]


def transfer_reduction(model: ModelSpec, plan: Plan, prompt_tokens: int) -> float:
    """Return the dense model's KV bytes of a prompt over those that a plan sends; ``inf`` if it sends nothing.

    With L layers, m removed and s of the rest sent at fraction r: L / (L - m - s + s r). KV at 8 or 4 bits is sent as
    it is stored, with its scales.

    Source:
        Derived from PDTrim's mechanism (arXiv 2509.04467).
    """
    sent = stored_kv_bytes(model, plan, prompt_tokens)
    return model.num_layers * prompt_tokens * model.kv_bytes_per_token_layer / sent if sent else math.inf


def decode_side(plan: Plan) -> Plan:
    """Return the plan of a decode replica, which holds and runs only the decode mask."""
    return replace(plan, prefill=plan.decode)


def with_prefill(quality_nll: Callable[[Plan], float] | None, prefill: KeepMask) -> Callable[[Plan], float] | None:
    """Return the loss function of decode replicas, whose KV was computed with this prefill mask."""
    if quality_nll is None:
        return None
    return lambda plan: quality_nll(replace(plan, prefill=prefill.union(plan.decode)))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StagedRecords(Records):
    """Records of disaggregated serving, one entry per request; -1 and NaN for stages that it did not reach.

    prefill_replica, decode_replica: int64[n]. sent_bytes: int64[n], of its KV.
    send_s, sent_s: float64[n], start and end of the transfer of its KV.
    """

    prefill_replica: Ints
    decode_replica: Ints
    sent_bytes: Ints
    send_s: Floats
    sent_s: Floats


@dataclass(slots=True, eq=False)
class _Side:
    """One replica: its engine, the addresses of its arrays, and the KV that is held or reserved for transfers."""

    engine: SimEngine
    table: Ints
    next_s: Floats  # float64[1], from when on something happens there
    held_blocks: int = 0  # prefill: of KV that waits or is being sent; decode: reserved for KV that comes
    coming: int = 0  # requests whose KV is being sent here, or has arrived and not joined yet
    arrived: list[int] = field(default_factory=list)  # requests whose KV is here and that have not joined yet


def _check_engines(engines: Sequence[SimEngine]) -> None:
    """Check that engines can serve together, as ``Disaggregated`` requires."""
    block_tokens = {engine.config.kv_block_tokens for engine in engines}
    if any(engine.model != engines[0].model for engine in engines) or len(block_tokens) > 1:
        models = ", ".join(sorted({engine.model.name for engine in engines}))
        raise ConfigError(
            f"prefill and decode replicas have models {models} and kv_block_tokens {sorted(block_tokens)}; they must "
            "have one model and one KV block size"
        )
    if any(engine.config.prefix_caching for engine in engines):
        raise ConfigError("engine.prefix_caching is true; disaggregated serving does not simulate it: set it to false")
    if any(len(engine.budget.change_s) > 1 for engine in engines):
        raise ConfigError("disaggregated serving does not support budgets that change; set e.g. budget=constant")


class Disaggregated:
    """Prefill replicas, decode replicas, and one link per prefill replica or one for all."""

    def __init__(
        self,
        trace: Trace,
        *,
        plan: Plan,
        prefill: Sequence[Build],
        decode: Sequence[Build],
        link_bytes_per_s: float,
        link_latency_s: float = 0.0,
        one_link: bool = False,
        overlap: bool = False,
    ) -> None:
        """Build an idle system.

        Args:
            trace: the requests.
            plan: the plan of both sides; prefill keeps at least what decode keeps.
            prefill: build the engines of the prefill replicas, with an external clock, under ``plan``.
            decode: build those of the decode replicas, under ``decode_side(plan)``.
            link_bytes_per_s, link_latency_s: of each link. one_link: whether all prefill replicas share one.
            overlap: whether KV is sent while its prompt is computed.
        Raises:
            ConfigError: for an empty side, different models or KV block sizes, a link out of range, or
                ``prefix_caching``.
            PlanError: if prefill drops what decode keeps.
        """
        if not prefill or not decode:
            raise ConfigError(f"{len(prefill)} prefill and {len(decode)} decode replicas; each side needs at least one")
        refuse_sessions(trace, "a system with separate prefill and decode")
        self.env = simpy.Environment()
        self.trace, self.plan, self._overlap = trace, plan, overlap
        self.prefill = [self._side(build) for build in prefill]
        self.decode = [self._side(build) for build in decode]
        engines = [side.engine for side in (*self.prefill, *self.decode)]
        self.model = engines[0].model
        check_plan(self.model, plan)
        _check_engines(engines)
        self._block_tokens = engines[0].config.kv_block_tokens
        self._blocks_of: dict[int, int] = {}  # prompt tokens -> layer blocks of the KV that is sent
        made = [Link(self.env, link_bytes_per_s, link_latency_s) for _ in range(1 if one_link else len(prefill))]
        self.links = tuple(made)
        n = len(trace)
        self._limit = min(side.engine.context_limit for side in self.decode)
        self._next = 0
        self._home = np.full((n, 4), -1, dtype=np.int64)  # prefill replica, row there, decode replica, row there
        self._request_of: list[dict[int, int]] = [{} for _ in prefill]
        self._sent = np.zeros((n, 2)) * math.nan
        self._bytes = np.zeros(n, dtype=np.int64)
        self._ready: deque[int] = deque()  # prefilled, their KV still to be sent
        self._order = np.zeros(n, dtype=np.int64)  # how many transfers were started before that of a request
        self._shipped = 0
        # Requests sent while they are computed: the event of the iteration's end, and the decode replica.
        self._early: dict[int, tuple[simpy.Event, int]] = {}
        self.in_flight = 0  # requests whose KV is being sent

    def _side(self, build: Build) -> _Side:
        engine = build(self.env)
        return _Side(engine, engine.table, np.full(1, math.inf))

    # -- serving -------------------------------------------------------------------------------------------------

    def run(self, on_progress: Callable[[int], None] | None = None) -> None:
        """Serve the full trace.

        Args:
            on_progress: called with the number of requests that have arrived.
        """
        env, arrival_s = self.env, self.trace.arrival_s.tolist()
        while True:
            watched = self.prefill + [s for s in self.decode if s.arrived or self._ready]
            now_s = min([env.peek(), *(float(side.next_s[0]) for side in watched)])
            if self._next < len(arrival_s):
                now_s = min(now_s, arrival_s[self._next])
            if math.isinf(now_s):
                # Only decoding is left, or nothing.
                for side in self.decode:
                    self._bring(side, math.inf)
                if self.drained or all(math.isinf(side.next_s[0]) for side in self.decode):
                    return
                continue
            self._step_to(now_s)
            for number, side in enumerate(self.prefill):
                self._end_prefills(number, side, now_s)
            for side in self.decode:
                self._bring(side, now_s)
            while self._next < len(arrival_s) and arrival_s[self._next] <= now_s:
                self._arrive(self._next, arrival_s[self._next])
                self._next += 1
                if on_progress is not None:
                    on_progress(self._next)
            self._join_those_here(now_s)
            self._send_those_ready()
            self._step_to(now_s)
            self._join_those_here(now_s)  # transfers that took no time
            for number, side in enumerate(self.prefill):
                self._begin(number, side, now_s)
            for side in self.decode:
                if not ck.in_iteration(side.table) and side.next_s[0] <= now_s:
                    self._bring(side, now_s, start=True)
            # An iteration that starts may admit a waiting request, and only then is there room for another prompt.
            self._send_those_ready()
            self._step_to(now_s)

    def _step_to(self, now_s: float) -> None:
        """Run all SimPy events that are due by ``now_s``, and advance its clock to that time."""
        while True:
            if self.env.now < now_s:
                self.env.timeout(exact_delay(self.env.now, now_s))
            while self.env.peek() <= now_s:
                self.env.step()
            if self.env.now >= now_s:
                return

    @property
    def drained(self) -> bool:
        """Whether every request of the trace has ended."""
        sides = (*self.prefill, *self.decode)
        left = self.in_flight + len(self._ready) + sum(ck.outstanding(side.table) + len(side.arrived) for side in sides)
        return self._next == len(self.trace) and left == 0

    def _bring(self, side: _Side, until_s: float, *, start: bool = False) -> None:
        """Serve at a replica until a time; with ``start``, also start an iteration that is due at that time."""
        while True:
            now_s = float(self.env.now)
            if start:
                why = ck.begin(side.table, side.next_s, 0, until_s)
            else:
                due_s = side.next_s[0]
                if not (due_s < until_s or (due_s == until_s < math.inf and ck.in_iteration(side.table))):
                    return
                why = ck.bring(side.table, side.next_s, 0, now_s, until_s)
            if why not in (kernel.NEEDS, kernel.GROW):
                return
            side.engine.unblock(why)
            side.table = side.engine.table

    # -- prefill -------------------------------------------------------------------------------------------------

    def _arrive(self, request: int, now_s: float) -> None:
        """Send a request to the prefill replica with the fewest requests."""
        for side in self.prefill:
            kernel.reject_late(side.table, now_s)  # those that have waited too long no longer count
        number = min(range(len(self.prefill)), key=lambda k: ck.outstanding(self.prefill[k].table))
        side, prompt = self.prefill[number], int(self.trace.prompt_tokens[request])
        self._room(side)
        fits = prompt < min(self._limit, side.engine.context_limit)
        row = ck.give(side.table, side.next_s, 0, now_s, now_s, prompt, 1 if fits else 0, 0, 0)
        self._home[request, :2] = number, row
        self._request_of[number][row] = request

    def _room(self, side: _Side) -> None:
        if side.engine.request_room == side.engine.requests:
            side.engine.reserve(max(64, 2 * side.engine.requests))
            side.table = side.engine.table

    def _output_limit(self, request: int) -> int:
        prompt = int(self.trace.prompt_tokens[request])
        return min(int(self.trace.output_tokens[request]), self._limit - prompt)

    def _end_prefills(self, number: int, side: _Side, now_s: float) -> None:
        """Serve at a prefill replica until now; hold the KV of the prompts that it has finished."""
        rows = self._rows_under_way(side)
        self._bring(side, now_s)
        status = side.engine.rows(rows)["status"] if len(rows) else rows
        for row in rows[status == Status.FINISHED].tolist():
            request = self._request_of[number][row]
            if self._output_limit(request) == 1:
                continue  # its first token was its last
            blocks = self._blocks(request)
            ck.keep(side.table, blocks)
            side.held_blocks += blocks
            self._bytes[request] = stored_kv_bytes(self.model, self.plan, int(self.trace.prompt_tokens[request]))
            if request in self._early:
                ended, to = self._early.pop(request)
                ended.succeed()
                self._home[request, 2] = to
            else:
                self._ready.append(request)

    def _rows_under_way(self, side: _Side) -> Ints:
        rows = np.zeros(side.engine.config.limits.max_running, dtype=np.int64)
        return rows[: ck.chunks_under_way(side.table, rows)]

    def _begin(self, number: int, side: _Side, now_s: float) -> None:
        """Start the iteration that is due at a prefill replica; send KV during it if ``overlap`` allows."""
        if ck.in_iteration(side.table) or side.next_s[0] > now_s:
            return
        self._bring(side, now_s, start=True)
        if not self._overlap or self._ready:
            return  # KV that is ready goes first
        for row in self._rows_under_way(side).tolist():
            request = self._request_of[number][row]
            if self._output_limit(request) > 1 and (to := self._where(request)) >= 0:
                self._reserve(request, to)
                ended = self.env.event()
                self._early[request] = ended, to
                self.env.process(self._ship(request, number, to, ended))

    def _blocks(self, request: int) -> int:
        """Return the layer blocks of a prompt's KV that decode keeps, over all layers."""
        prompt, plan = int(self.trace.prompt_tokens[request]), self.plan
        if prompt not in self._blocks_of:
            formats = kv_formats(self.model, plan, self._block_tokens)
            self._blocks_of[prompt] = sum(
                kv_blocks(prompt, self._block_tokens) if formats is None else formats[layer].blocks(prompt)
                for layer, runs in enumerate(plan.decode.mha)
                if runs
            )
        return self._blocks_of[prompt]

    # -- transfers -----------------------------------------------------------------------------------------------

    def _where(self, request: int) -> int:
        """Return the decode replica with room for a prompt's KV and the largest free share; -1 if there is none."""
        blocks = self._blocks(request)
        free = [ck.free_share(side.table, blocks, side.coming) for side in self.decode]
        best = max(range(len(free)), key=free.__getitem__)
        return best if free[best] >= 0 else -1

    def _reserve(self, request: int, to: int) -> None:
        side, blocks = self.decode[to], self._blocks(request)
        ck.hold(side.table, blocks)
        side.held_blocks += blocks
        side.coming += 1
        self.in_flight += 1

    def _send_those_ready(self) -> None:
        """Start transfers to decode replicas with room, in the order in which prompts were computed."""
        while self._ready and (to := self._where(self._ready[0])) >= 0:
            request = self._ready.popleft()
            self._home[request, 2] = to
            self._reserve(request, to)
            self.env.process(self._ship(request, int(self._home[request, 0]), to, None))

    def _ship(self, request: int, number: int, to: int, ended: simpy.Event | None) -> Generator[simpy.Event, Any, None]:
        """Transfer a prompt's KV; with ``ended``, its last layer only after the iteration that computes it."""
        link = self.links[number % len(self.links)]
        self._sent[request, 0] = self.env.now
        self._order[request] = self._shipped
        self._shipped += 1
        size = stored_kv_bytes(self.model, self.plan, int(self.trace.prompt_tokens[request]))
        if ended is None:
            yield from link.send(size)
        else:
            last = size // max(sum(self.plan.decode.mha), 1)
            yield from link.send(size - last)
            yield ended
            yield from link.send(last)
        self._sent[request, 1] = self.env.now
        side, blocks = self.prefill[number], self._blocks(request)
        ck.let_go(side.table, blocks)
        side.held_blocks -= blocks
        if not ck.in_iteration(side.table):
            side.next_s[0] = self.env.now  # a waiting request may have room now
        self.in_flight -= 1
        self.decode[to].arrived.append(request)

    def _join_those_here(self, now_s: float) -> None:
        """Let requests whose KV has arrived join decode replicas between iterations."""
        for side in self.decode:
            if ck.in_iteration(side.table):
                continue
            here = sorted(side.arrived, key=lambda request: (self._sent[request, 1], self._order[request]))
            side.arrived.clear()
            for request in here:
                number, row = self._home[request, :2]
                words = self.prefill[number].engine.rows(np.array([row])).view(np.int64)
                self._room(side)
                limit = self._output_limit(request)
                self._home[request, 3] = ck.join(side.table, side.next_s, 0, now_s, words, limit)
                side.held_blocks -= self._blocks(request)
                side.coming -= 1

    # -- results -------------------------------------------------------------------------------------------------

    def records(self) -> StagedRecords:
        """Return one row per request that has arrived, in order of arrival."""
        arrived = self._next
        home, outputs = self._home[:arrived], self.trace.output_tokens[:arrived].copy()
        columns: dict[str, Any] = {
            "prefill_replica": home[:, 0].copy(),
            "decode_replica": np.where(home[:, 3] >= 0, home[:, 2], -1),
            "sent_bytes": np.where(np.isfinite(self._sent[:arrived, 1]), self._bytes[:arrived], 0),
            "send_s": self._sent[:arrived, 0].copy(),
            "sent_s": self._sent[:arrived, 1].copy(),
        }
        for column, sides in ((0, self.prefill), (2, self.decode)):
            for number, side in enumerate(sides):
                mine = np.flatnonzero((home[:, column] == number) & (home[:, column + 1] >= 0))
                part = side.engine.records_of(home[mine, column + 1], outputs[mine])
                for f in fields(Records):
                    values = getattr(part, f.name)
                    columns.setdefault(f.name, np.zeros(arrived, dtype=values.dtype))[mine] = values
        # A request that ended at prefill but has more tokens to produce is still running.
        limits = np.minimum(outputs, self._limit - self.trace.prompt_tokens[:arrived])
        under_way = (home[:, 3] < 0) & (columns["status"] == Status.FINISHED) & (limits > 1)
        columns["status"][under_way] = Status.RUNNING
        columns["finish_s"][under_way] = math.nan
        return StagedRecords(**columns)
