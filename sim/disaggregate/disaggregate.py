"""Disaggregated prefill and decode: different replicas, and KV sent between them (DistServe, Splitwise, PDTrim).

SimPy handles the transfers; the kernel serves. One fixed plan covers both sides: prefill replicas run and hold its
prefill mask, decode replicas its decode mask. A prompt sends the KV of the MHA blocks that decode keeps, and in each
layer the tokens that ``kv_keep`` keeps, at the bits of ``kv_bits``; or the hidden states from which decode computes it
(``kv_hidden``).

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

Replicas that fail, leave and come back, as in sim/cluster/cluster.py (sim/disaggregate/members.py says when):

5. KV that is lost is computed again by a prefill replica, for the prompt and the tokens that the request has produced;
   it ends there with its next token, and all of that KV is sent. This holds for requests of a decode replica that has
   failed, and for those that a failed prefill replica had computed but not yet sent completely.
6. If a decode replica fails while KV is being sent there, that KV is sent again, because prefill still has it; it is
   the next to be sent.
7. After a notice, a prefill replica goes on with the prompts that run and sends their KV; its waiting requests are
   routed again. A decode replica gets no further KV and goes on with its requests.
8. While no prefill replica accepts requests, they wait, in order.
9. A replica whose role changes leaves its role as after a notice. When it holds no request and no KV, it loads the
   weights that it lacks and begins in the other role.

Order at one instant: transfers end, iterations end, requests arrive, replicas fail, leave, come back and change roles,
requests join, KV is sent, iterations start. Transfers that end at the same instant, on one link or several, join in the
order in which they were sent (sim/disaggregate/links.py says when a transfer ends).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from numbers import Real
from typing import Any

import numpy as np
import simpy
from numpy.typing import NDArray

from sim.cluster import kernel as ck
from sim.cluster.outages import Outages, check_replicas, none
from sim.cost.kv_format import kv_formats, saved_tokens, stored_kv_bytes
from sim.cost.memory import kv_blocks
from sim.cost.model_spec import ModelSpec
from sim.cost.plan import KeepMask, Plan, check_plan
from sim.disaggregate.links import Link
from sim.disaggregate.members import Build, Member, Members, Role, RoleEvent, Side
from sim.disaggregate.roles import Roles, SystemState, Totals
from sim.engine import kernel
from sim.engine.protocol import EngineState, refuse_sessions
from sim.engine.sim_engine import SimEngine, exact_delay
from sim.errors import ConfigError
from sim.limits import MOST_ROLE_DECISIONS, is_whole
from sim.results.records import Records, Status
from sim.traces.trace import Trace
from sim.types import Floats, Ints

NO_OUTAGES = none()


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

    prefilled_s: float64[n], when its prompt was last computed completely.
    prefill_replica, decode_replica: int64[n], those that had it last. Each counts the replicas that began with this
        role first, then the others.
    sent_bytes: int64[n], of its KV, over all transfers that were completed.
    send_s, sent_s: float64[n], start and end of the last transfer of its KV.
    moves: int64[n], how often its KV was lost, or it was routed again because a replica was leaving.
    """

    prefilled_s: Floats
    prefill_replica: Ints
    decode_replica: Ints
    sent_bytes: Ints
    send_s: Floats
    sent_s: Floats
    moves: Ints


@dataclass(slots=True, eq=False)
class _Transfer:
    """The transfer of a request's KV; ``ended``, while its prompt is still computed, is the event of that end."""

    side: Side
    to: Side
    ended: simpy.Event | None
    process: simpy.Process | None = None


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
        turned: Sequence[Build] | None = None,
        outages: Outages = NO_OUTAGES,
        load_bytes_per_s: float = 1e9,
        start_s: float = 0.0,
        turn_s: float = 0.0,
        roles: Roles | None = None,
    ) -> None:
        """Build an idle system.

        Args:
            trace: the requests.
            plan: the plan of both sides; prefill keeps at least what decode keeps.
            prefill: build the engines of the prefill replicas, with an external clock, under ``plan``.
            decode: build those of the decode replicas, under ``decode_side(plan)``.
            link_bytes_per_s, link_latency_s: of each link. one_link: whether all prefill replicas share one.
            overlap: whether KV is sent while its prompt is computed.
            turned: build the engine of each replica, the prefill ones first, in the role that it does not begin with;
                None if no replica changes its role.
            outages: when each replica is down, the prefill ones counted first.
            load_bytes_per_s, start_s, turn_s: as in ``sim.disaggregate.members.Members``.
            roles: decides how many replicas prefill, from its first period on; needs ``turned``.
        Raises:
            ConfigError: for an empty side, different models or KV block sizes, a link out of range, outages of a
                replica that is not there, or ``prefix_caching``.
            PlanError: if prefill drops what decode keeps.
        """
        if not prefill or not decode:
            raise ConfigError(f"{len(prefill)} prefill and {len(decode)} decode replicas; each side needs at least one")
        count = len(prefill) + len(decode)
        if turned is not None and len(turned) != count:
            raise ConfigError(f"turned has {len(turned)} builds for {count} replicas; give one for each")
        check_replicas(outages, count, "prefill_replicas=4")
        refuse_sessions(trace, "a system with separate prefill and decode")
        self.env = simpy.Environment()
        self.trace, self.plan, self._overlap = trace, plan, overlap
        others: Sequence[Build | None] = [None] * count if turned is None else turned
        members = [
            Member(k, Role.PREFILL, (build, others[k]), outages(k)) if k < len(prefill)
            else Member(k, Role.DECODE, (others[k], build), outages(k))
            for k, build in enumerate([*prefill, *decode])
        ]  # fmt: skip
        self._members = Members(
            self.env, members, self, load_bytes_per_s=load_bytes_per_s, start_s=start_s, turn_s=turn_s
        )
        spare = [build(self.env) for build in dict.fromkeys(turned or ())]  # what they need is checked now
        engines = [side.engine for side in (*self.prefill, *self.decode)]
        self.model = engines[0].model
        check_plan(self.model, plan)
        _check_engines([*engines, *spare])
        self._block_tokens = engines[0].config.kv_block_tokens
        self._blocks_of: dict[int, int] = {}  # tokens -> layer blocks of their KV that is sent
        made = [Link(self.env, link_bytes_per_s, link_latency_s) for _ in range(1 if one_link else len(prefill))]
        if turned is not None and not one_link:
            made += [Link(self.env, link_bytes_per_s, link_latency_s) for _ in decode]
        self.links = tuple(made)
        n = len(trace)
        self._limit = min(engine.context_limit for engine in [*(side.engine for side in self.decode), *spare])
        self._next = 0
        # Number of the engine among those of prefill, row there; the same of decode.
        self._home = np.full((n, 4), -1, dtype=np.int64)
        self._sent = np.zeros((n, 2)) * math.nan
        self._tokens = trace.prompt_tokens.copy()  # whose KV prefill computes and sends
        self._arrived_tokens = np.concatenate(([0], np.cumsum(trace.prompt_tokens)))  # of the prompts of the first k
        self._prefilled_s = np.full(n, math.nan)
        self._bytes = np.zeros(n, dtype=np.int64)
        self._moves = np.zeros(n, dtype=np.int64)
        self._ready: deque[int] = deque()  # prefilled, their KV still to be sent
        self._order = np.zeros(n, dtype=np.int64)  # how many transfers were started before that of a request
        self._shipped = 0
        self._transfers: dict[int, _Transfer] = {}  # under way, in the order in which they were started
        self._held: dict[int, NDArray[Any] | None] = {}  # wait for a prefill replica; with the record of the last one
        if roles is not None:
            if not 0 < roles.period_s < math.inf:
                raise ConfigError(f"roles.period_s is {roles.period_s}; it must be above 0 seconds and finite")
            self._decide_at(roles, 1)

    @property
    def prefill(self) -> list[Side]:
        """The prefill replicas that serve now; some of them may accept no further requests."""
        return self._members.prefill

    @property
    def decode(self) -> list[Side]:
        """The decode replicas that serve now; some of them may accept no further requests."""
        return self._members.decode

    @property
    def in_flight(self) -> int:
        """Number of requests whose KV is being sent."""
        return len(self._transfers)

    # -- serving -------------------------------------------------------------------------------------------------

    def run(self, on_progress: Callable[[int], None] | None = None) -> None:
        """Serve the full trace.

        Args:
            on_progress: called with the number of requests that have arrived.
        """
        self._serve(math.inf, on_progress)

    def run_until(self, time_s: float) -> None:
        """Serve until a time: all that ends, arrives or fails by then is done; iterations due then have not started.

        Replicas fail and come back also after the last request; a time that has passed changes nothing.

        Raises:
            ConfigError: for a time that is no number of seconds.
        """
        given: object = time_s
        if not isinstance(given, Real) or math.isnan(given):
            raise ConfigError(f"run_until: the time is {time_s!r}; it must be a number of seconds")
        if time_s >= self.env.now:
            self._serve(float(time_s), None)

    def _serve(self, horizon_s: float, on_progress: Callable[[int], None] | None) -> None:
        while True:
            now_s = self._next_s()
            if now_s >= horizon_s:
                # Until then, only decoding is left, or nothing.
                for side in self.decode:
                    self._bring(side, horizon_s)
                if math.isfinite(horizon_s):
                    self._happen(horizon_s, on_progress)
                    return
                if self.drained or all(math.isinf(side.next_s[0]) for side in self.decode):
                    return
                continue
            if math.isinf(horizon_s) and self._members.next_s <= now_s and self._drained_by(now_s):
                return  # what happens to replicas after the last request is not served
            self._happen(now_s, on_progress)
            for side in self.prefill:
                self._begin(side, now_s)
            for side in self.decode:
                if not ck.in_iteration(side.table) and side.next_s[0] <= now_s:
                    self._bring(side, now_s, start=True)
            # An iteration that starts may admit a waiting request, and only then is there room for another prompt.
            self._send_those_ready()
            self._step_to(now_s)

    def _next_s(self) -> float:
        """Return when something happens next, iterations of decode replicas aside for which nothing waits.

        Those are not left out that are to start now, as after ``run_until``.
        """
        watched = self.prefill + [s for s in self.decode if s.arrived or self._ready or not s.accepts or self._due(s)]
        now_s = min([self.env.peek(), self._members.next_s, *(float(side.next_s[0]) for side in watched)])
        return min(now_s, float(self.trace.arrival_s[self._next])) if self._next < len(self.trace) else now_s

    def _due(self, side: Side) -> bool:
        """Return whether an iteration is to start now, or should have started."""
        return bool(side.next_s[0] <= self.env.now) and not ck.in_iteration(side.table)

    def _happen(self, now_s: float, on_progress: Callable[[int], None] | None) -> None:
        """Do all that is due at a time except for starting iterations."""
        self._step_to(now_s)
        for side in self.prefill:
            self._end_prefills(side, now_s)
        for side in self.decode:
            self._bring(side, now_s)
        while self._next < len(self.trace) and self.trace.arrival_s[self._next] <= now_s:
            self._place(self._next, None, now_s)
            self._next += 1
            if on_progress is not None:
                on_progress(self._next)
        if self._members.happen():
            self._step_to(now_s)  # transfers that were cut off leave their links
        self._join_those_here(now_s)
        self._send_those_ready()
        self._step_to(now_s)
        self._join_those_here(now_s)  # transfers that took no time

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
        left = len(self._transfers) + len(self._ready) + len(self._held)
        left += sum(ck.outstanding(side.table) + len(side.arrived) for side in sides)
        return self._next == len(self.trace) and left == 0

    def _drained_by(self, now_s: float) -> bool:
        """Return whether every request has ended before a time until which nothing but decoding happens."""
        for side in self.decode:
            self._bring(side, now_s)
        return self.drained

    def _bring(self, side: Side, until_s: float, *, start: bool = False) -> None:
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

    def _place(self, request: int, record: NDArray[Any] | None, now_s: float) -> None:
        """Hand a request to the prefill replica with the fewest requests.

        Args:
            record: one row, of the replica that had the request before; None for a new one.
        """
        for side in self.prefill:
            kernel.reject_late(side.table, now_s)  # those that have waited too long no longer count
        accepting = [side for side in self.prefill if side.accepts]
        if not accepting:
            self._held[request] = record
            return
        side, prompt = min(accepting, key=lambda side: ck.outstanding(side.table)), self._prompt(request)
        produced = 0 if record is None else int(record["produced_tokens"][0])
        self._room(side)
        # It ends here with its next token; a limit that it has reached rejects it.
        limit = produced + 1 if prompt + produced < min(self._limit, side.engine.context_limit) else 0
        if record is None:
            arrival_s = float(self.trace.arrival_s[request])
            row = ck.give(side.table, side.next_s, 0, arrival_s, now_s, prompt, limit, 0, 0)
        else:
            row = ck.give_moved(side.table, side.next_s, 0, now_s, record.view(np.int64), limit, 0, 0)
        self._home[request, :2] = side.index, row
        self._tokens[request] = prompt + produced
        side.request_of[row] = request

    def _prompt(self, request: int) -> int:
        return int(self.trace.prompt_tokens[request])

    def _room(self, side: Side) -> None:
        if side.engine.request_room == side.engine.requests:
            side.engine.reserve(max(64, 2 * side.engine.requests))
            side.table = side.engine.table

    def _output_limit(self, request: int) -> int:
        return min(int(self.trace.output_tokens[request]), self._limit - self._prompt(request))

    def _prefill_record(self, request: int) -> NDArray[Any]:
        """Return the record, one row, that the prefill replica has of a request."""
        index, row = self._home[request, :2]
        found: NDArray[Any] = self._members.sides[Role.PREFILL][index].engine.rows(np.array([row]))
        return found

    def _end_prefills(self, side: Side, now_s: float) -> None:
        """Serve at a prefill replica until now; hold the KV of the prompts that it has finished."""
        rows = self._rows_under_way(side)
        self._bring(side, now_s)
        found = side.engine.rows(rows) if len(rows) else None
        for k, row in enumerate(rows.tolist()):
            assert found is not None
            request, produced = side.request_of[row], int(found["produced_tokens"][k])
            if found["status"][k] == Status.FINISHED:
                self._prefilled_s[request] = now_s
            if found["status"][k] != Status.FINISHED or self._output_limit(request) == produced:
                continue  # it goes on here, or its last token was the only one left
            blocks = self._blocks(request)
            ck.keep(side.table, blocks)
            side.held_blocks += blocks
            transfer = self._transfers.get(request)
            if transfer is not None and transfer.ended is not None:
                transfer.ended.succeed()
                transfer.ended = None
                self._home[request, 2] = transfer.to.index
            else:
                self._ready.append(request)

    def _rows_under_way(self, side: Side) -> Ints:
        rows = np.zeros(side.engine.config.limits.max_running, dtype=np.int64)
        return rows[: ck.chunks_under_way(side.table, rows)]

    def _begin(self, side: Side, now_s: float) -> None:
        """Start the iteration that is due at a prefill replica; send KV during it if ``overlap`` allows."""
        if ck.in_iteration(side.table) or side.next_s[0] > now_s:
            return
        self._bring(side, now_s, start=True)
        if not self._overlap or self._ready:
            return  # KV that is ready goes first
        for row in self._rows_under_way(side).tolist():
            request = side.request_of[row]
            goes_on = self._output_limit(request) > self._tokens[request] - self._prompt(request) + 1
            if goes_on and (to := self._where(request)) is not None:
                self._send(request, side, to, self.env.event())

    def _blocks(self, request: int) -> int:
        """Return the layer blocks of the KV of a request that decode keeps, over all layers."""
        tokens, plan = int(self._tokens[request]), self.plan
        if tokens not in self._blocks_of:
            formats, stored = kv_formats(self.model, plan, self._block_tokens), tokens - saved_tokens(plan, tokens)
            self._blocks_of[tokens] = sum(
                kv_blocks(tokens, self._block_tokens) if formats is None else formats[layer].blocks(stored)
                for layer, runs in enumerate(plan.decode.mha)
                if runs
            )
        return self._blocks_of[tokens]

    # -- transfers -----------------------------------------------------------------------------------------------

    def _where(self, request: int) -> Side | None:
        """Return the decode replica with room for a request's KV and the largest free share."""
        blocks = self._blocks(request)
        found, most = None, -1.0
        for side in self.decode:
            if side.accepts and (share := ck.free_share(side.table, blocks, side.coming)) > most:
                found, most = side, share
        return found

    def _send_those_ready(self) -> None:
        """Start transfers to decode replicas with room, in the order in which prompts were computed."""
        while self._ready and (to := self._where(self._ready[0])) is not None:
            request = self._ready.popleft()
            self._home[request, 2] = to.index
            self._send(request, self._members.sides[Role.PREFILL][self._home[request, 0]], to, None)

    def _send(self, request: int, side: Side, to: Side, ended: simpy.Event | None) -> None:
        """Reserve room for a request's KV and start its transfer; with ``ended``, before its prompt has ended."""
        blocks = self._blocks(request)
        ck.hold(to.table, blocks)
        to.held_blocks += blocks
        to.coming += 1
        self._sent[request, 0] = self.env.now
        self._order[request] = self._shipped
        self._shipped += 1
        transfer = self._transfers[request] = _Transfer(side, to, ended)
        transfer.process = self.env.process(self._ship(request, transfer))

    def _ship(self, request: int, transfer: _Transfer) -> Generator[simpy.Event, Any, None]:
        """Transfer a request's KV; with ``ended``, its last layer only after the iteration that computes it."""
        link = self.links[self._members.columns[Role.PREFILL][transfer.side.replica] % len(self.links)]
        size = stored_kv_bytes(self.model, self.plan, int(self._tokens[request]))
        try:
            if (ended := transfer.ended) is None:
                yield from link.send(size)
            else:
                last = size // max(sum(self.plan.decode.mha), 1)
                yield from link.send(size - last)
                yield ended
                yield from link.send(last)
        except simpy.Interrupt:
            return
        del self._transfers[request]
        self._sent[request, 1] = self.env.now
        self._bytes[request] += size
        self._let_go(transfer.side, self._blocks(request))
        transfer.to.arrived.append(request)

    def _let_go(self, side: Side, blocks: int) -> None:
        """Free KV blocks that were held for a transfer."""
        ck.let_go(side.table, blocks)
        side.held_blocks -= blocks
        if not ck.in_iteration(side.table):
            side.next_s[0] = self.env.now  # a waiting request may have room now

    def _cut_off(self, requests: Sequence[int]) -> None:
        """End transfers before their time."""
        for request in requests:
            transfer = self._transfers.pop(request)
            assert transfer.process is not None
            transfer.process.interrupt()
            self._sent[request] = math.nan
            self._home[request, 2] = -1
            transfer.to.coming -= 1
            self._let_go(transfer.to, self._blocks(request))

    def _join_those_here(self, now_s: float) -> None:
        """Let requests whose KV has arrived join decode replicas between iterations."""
        for side in self.decode:
            if not side.arrived or ck.in_iteration(side.table):
                continue
            here = self._arrived_at(side)
            side.arrived.clear()
            for request in here:
                words = self._prefill_record(request).view(np.int64)
                self._room(side)
                limit, tokens = self._output_limit(request), int(self._tokens[request])
                row = ck.join(side.table, side.next_s, 0, now_s, words, limit, tokens)
                self._home[request, 3] = row
                side.request_of[row] = request
                side.held_blocks -= self._blocks(request)
                side.coming -= 1

    def _arrived_at(self, side: Side) -> list[int]:
        """Return the requests whose KV has arrived and that have not joined yet, in the order in which they join."""
        return sorted(side.arrived, key=lambda request: (self._sent[request, 1], self._order[request]))

    # -- replicas that come, leave and fail (`sim.disaggregate.members.Owner`) ------------------------------------

    def opened(self, side: Side) -> None:
        """Hand over the requests that wait for a prefill replica."""
        if side.role is Role.PREFILL:
            held, self._held = self._held, {}
            for request, record in held.items():
                self._place(request, record, float(self.env.now))

    def left(self, side: Side) -> int:
        """Route the waiting requests of a prefill replica again, which accepts no more; return their number."""
        if side.role is Role.DECODE:
            return 0  # preempted requests wait where their KV was
        kernel.reject_late(side.table, float(self.env.now))
        waiting = self._rows_of(side, running_too=False)
        ck.let_waiting_go(side.table)
        return self._route_again(side.request_of, waiting, side.engine)

    def lost(self, side: Side) -> int:
        """Route all requests of a replica again, which has failed; return their number.

        KV that was being sent to a decode replica is sent again, because the prefill replica still has it.
        """
        kernel.reject_late(side.table, float(self.env.now))
        rows = self._rows_of(side, running_too=True)
        ck.stop(side.table)
        if side.role is Role.PREFILL:
            cut = [request for request, transfer in self._transfers.items() if transfer.side is side]
            # While its prompt is computed, a request is among the running ones.
            gone = [request for request in cut if self._transfers[request].ended is None]
            self._cut_off(cut)
            gone += [request for request in self._ready if self._home[request, 0] == side.index]
            self._ready = deque(request for request in self._ready if self._home[request, 0] != side.index)
            return self._compute_again(gone) + self._route_again(side.request_of, rows, side.engine)
        cut = [request for request, transfer in self._transfers.items() if transfer.to is side]
        self._ready.extendleft(request for request in reversed(cut) if self._transfers[request].ended is None)
        self._cut_off(cut)
        return self._route_again(side.request_of, rows, side.engine) + self._compute_again(self._arrived_at(side))

    def empty(self, side: Side) -> bool:
        """Return whether a replica holds no request and no KV."""
        if ck.outstanding(side.table) or side.held_blocks or side.coming:
            return False
        # A plan without any MHA block leaves requests whose KV has no blocks.
        waits = any(self._home[request, 0] == side.index for request in self._ready)
        return side.role is Role.DECODE or (not waits and all(t.side is not side for t in self._transfers.values()))

    def _rows_of(self, side: Side, *, running_too: bool) -> Ints:
        rows = np.zeros(ck.outstanding(side.table), dtype=np.int64)
        return rows[: ck.held_rows(side.table, rows, running_too)]

    def _route_again(self, request_of: Mapping[int, int], rows: Ints, engine: SimEngine) -> int:
        """Compute requests again on another prefill replica, with the tokens they have; return their number."""
        records = engine.rows(rows)
        for k, row in enumerate(rows.tolist()):
            self._move(request_of[row], records[k : k + 1])
        return len(rows)

    def _compute_again(self, requests: Sequence[int]) -> int:
        """Compute requests again that prefill had finished and whose KV is lost; return their number."""
        for request in requests:
            self._move(request, self._prefill_record(request))
        return len(requests)

    def _move(self, request: int, record: NDArray[Any]) -> None:
        record = record.copy()
        record["finish_s"] = math.nan
        self._home[request], self._sent[request], self._prefilled_s[request] = -1, math.nan, math.nan
        self._moves[request] += 1
        self._place(request, record, float(self.env.now))

    def set_prefill(self, count: int) -> None:
        """Let this many replicas have the role of prefill and the others that of decode.

        A replica whose role changes accepts no more requests and ends what it has begun: a prefill replica computes the
        prompts that run and sends their KV, a decode replica produces all tokens of its requests. Those change that
        hold the fewest requests, among equals the last one; those that do not accept requests only if no other is left.

        Raises:
            ConfigError: for a count that leaves a role without a replica, or replicas that have one role only.
        """
        self._set_prefill(count)
        self._happen(float(self.env.now), None)

    def _set_prefill(self, count: int) -> None:
        members = self._members.all
        if not is_whole(count) or not 1 <= count < len(members):
            raise ConfigError(
                f"{count!r} of {len(members)} replicas are to prefill; each role needs at least one, so it must be a "
                f"whole number from 1 to {len(members) - 1}"
            )
        for side in self.prefill:
            kernel.reject_late(side.table, float(self.env.now))
        role = Role.PREFILL if count > self._to_prefill() else Role.DECODE
        for member in self._by_ease(role)[: abs(count - self._to_prefill())]:
            self._members.turn(member, role)

    def _to_prefill(self) -> int:
        return sum(member.role is Role.PREFILL for member in self._members.all)

    def _by_ease(self, role: Role) -> list[Member]:
        """Return the replicas that could turn to a role, those first that turn first."""
        return sorted((m for m in self._members.all if m.role is not role), key=self._ease_of_turning)

    def possible(self) -> tuple[int, ...]:
        """Return the numbers of prefill replicas that leave each role a replica that is not away, ascending.

        The present number is always among them; without two replicas that could be chosen from, it is the only one.
        ``set_prefill`` also takes other numbers, and then one side waits for a replica that is away.
        """
        members, now = self._members.all, self._to_prefill()
        found = {now}
        for role, step in ((Role.PREFILL, 1), (Role.DECODE, -1)):
            here = [member for member in members if member.role is role]
            order = self._by_ease(role)
            for count in range(1, len(order)):
                stay, come = order[count:], here + order[:count]
                if not all(m.away for m in stay) and not all(m.away for m in come):
                    found.add(now + step * count)
        return tuple(sorted(found))

    def _decide_at(self, roles: Roles, step: int) -> None:
        def decide() -> None:
            if step > MOST_ROLE_DECISIONS:
                raise ConfigError(
                    f"roles.period_s is {roles.period_s:g}, and {MOST_ROLE_DECISIONS:,} decisions have not been enough "
                    "to serve the trace; raise roles.period_s, or link_bytes_per_s if transfers take this long"
                )
            before = [member.role for member in self._members.all]
            self._set_prefill(roles(self.observe()))
            idle = math.isinf(self._next_s()) and all(math.isinf(side.next_s[0]) for side in self.decode)
            if not idle or [member.role for member in self._members.all] != before:
                self._decide_at(roles, step + 1)  # otherwise nothing can happen any more

        self._members.at(step * roles.period_s, decide)

    def observe(self) -> SystemState:
        """Return the state now; ``run_until`` has served until this time."""
        now_s = float(self.env.now)
        prefill, decode = (
            tuple(side.engine.observe(now_s) for side in sides if side.accepts) for sides in (self.prefill, self.decode)
        )
        members = self._members.all
        sides = [member.side for member in members if member.side is not None and not member.side.accepts]
        return SystemState(
            time_s=now_s,
            prefill=prefill,
            decode=decode,
            to_prefill=self._to_prefill(),
            replicas=len(members),
            turning=sum(member.in_turn for member in members),
            held=len(self._held),
            ready=len(self._ready),
            in_flight=len(self._transfers),
            away=sum(member.away for member in members),
            held_tokens=int(self._tokens[list(self._held)].sum()),
            ending=sum(ck.outstanding(side.table) + side.coming for side in sides),
            possible=self.possible(),
            totals=self._totals(
                now_s,
                (*prefill, *(s.engine.observe(now_s) for s in sides if s.role is Role.PREFILL)),
                (*decode, *(s.engine.observe(now_s) for s in sides if s.role is Role.DECODE)),
            ),
        )

    def _totals(self, now_s: float, prefill: Sequence[EngineState], decode: Sequence[EngineState]) -> Totals:
        """Return the counters of the system; prefill, decode: states of all engines that serve now."""
        computed, produced = (
            [*now, *self._members.last_states[role]] for now, role in zip((prefill, decode), Role, strict=True)
        )
        return Totals(
            arrived=self._next,
            arrived_prompt_tokens=int(self._arrived_tokens[self._next]),
            first_tokens=sum(one.first_tokens for one in computed),
            ttft_sum_s=sum(one.ttft_sum_s for one in computed),
            produced_tokens=sum(one.produced_tokens for one in produced),
            finished=sum(one.finished for one in produced),
            prefill_busy_s=sum(one.busy_s for one in computed),
            decode_busy_s=sum(one.busy_s for one in produced),
            decode_iterations=sum(one.iterations for one in produced),
            link_busy_s=sum(link.busy_s for link in self.links),
            link_s=self.link_seconds(now_s),
        )

    def _ease_of_turning(self, member: Member) -> tuple[int, ...]:
        """Return what sorts replicas by how soon one more can serve in the other role.

        Those come first that have not left it yet; those last that fail soon, load weights or are down.
        """
        side = member.side
        if member.turning:
            return 0, 0, 0, -member.number
        if side is None or not side.accepts:
            return 2, 0, 0, -member.number
        return 1, ck.outstanding(side.table) + side.coming, side.held_blocks, -member.number

    # -- results -------------------------------------------------------------------------------------------------

    def link_seconds(self, end_s: float) -> float:
        """Return for how long links were there to be used until a time: each while its replica prefills."""
        if len(self.links) == 1:
            return end_s
        sides = self._members.sides[Role.PREFILL]
        return sum(max(min(side.ended_s, end_s) - side.begun_s, 0.0) for side in sides)

    def engines(self) -> dict[str, SimEngine]:
        """Return every engine that has served, by a name for its role and replica, and a letter from its second on."""
        found: dict[str, SimEngine] = {}
        for role in Role:
            for side in self._members.sides[role]:
                name = f"{role.name.lower()} {self._members.columns[role][side.replica]}"
                again = sum(other == name or other.startswith(f"{name} (") for other in found)
                found[f"{name} ({again + 1})" if again else name] = side.engine
        return found

    def events(self) -> tuple[RoleEvent, ...]:
        """Return the phase changes of all replicas, in order of time."""
        return tuple(self._members.events)

    def records(self) -> StagedRecords:
        """Return one row per request that has arrived, in order of arrival."""
        arrived = self._next
        home, outputs = self._home[:arrived], self.trace.output_tokens[:arrived].copy()
        columns: dict[str, Any] = {
            "arrival_s": self.trace.arrival_s[:arrived].copy(),
            "prompt_tokens": self.trace.prompt_tokens[:arrived].copy(),
            "output_tokens": outputs,
            "status": np.full(arrived, int(Status.WAITING), dtype=np.int64),
            "prefill_replica": np.full(arrived, -1, dtype=np.int64),
            "decode_replica": np.full(arrived, -1, dtype=np.int64),
            "sent_bytes": self._bytes[:arrived].copy(),
            "prefilled_s": self._prefilled_s[:arrived].copy(),
            "send_s": self._sent[:arrived, 0].copy(),
            "sent_s": self._sent[:arrived, 1].copy(),
            "moves": self._moves[:arrived].copy(),
        }
        for name in ("produced_tokens", "preemptions", "cached_tokens"):
            columns[name] = np.zeros(arrived, dtype=np.int64)
        for name in ("admitted_s", "first_token_s", "finish_s", "kept_params_share", "quality_nll"):
            columns[name] = np.full(arrived, math.nan)
        for role, replica in ((Role.PREFILL, "prefill_replica"), (Role.DECODE, "decode_replica")):
            for side in self._members.sides[role]:
                mine = np.flatnonzero((home[:, 2 * role] == side.index) & (home[:, 2 * role + 1] >= 0))
                part = side.engine.records_of(home[mine, 2 * role + 1], outputs[mine])
                columns[replica][mine] = self._members.columns[role][side.replica]
                for f in fields(Records):
                    columns[f.name][mine] = getattr(part, f.name)
        for request, record in self._held.items():
            if record is not None:
                for name in ("produced_tokens", "preemptions", "admitted_s", "first_token_s"):
                    columns[name][request] = record[name][0]
        # A request that ended at prefill but has more tokens to produce is still running.
        limits = np.minimum(outputs, self._limit - self.trace.prompt_tokens[:arrived])
        under_way = (home[:, 3] < 0) & (columns["status"] == Status.FINISHED) & (limits > columns["produced_tokens"])
        columns["status"][under_way] = Status.RUNNING
        columns["finish_s"][under_way] = math.nan
        return StagedRecords(**columns)
