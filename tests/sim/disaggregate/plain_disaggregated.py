"""Disaggregated prefill and decode on plain engines, advanced event by event; ``sim.disaggregate`` must equal it.

Slow and obvious on purpose, without overlap. Links share their bandwidth step by step, from one change to the next, in
exact fractions; the rule of sim/disaggregate/links.py says when a transfer ends.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from fractions import Fraction

import numpy as np
import simpy

from sim.cost.plan import Plan
from sim.engine.live_request import LiveRequest
from sim.engine.protocol import Request
from sim.results.records import Status
from sim.traces.trace import Trace
from tests.sim.engine.plain_engine import PlainEngine


@dataclass(kw_only=True, eq=False)
class Moving:
    """A request between the two sides."""

    number: int
    request: Request
    prefill: int
    live: LiveRequest
    send_s: float = math.nan
    flows_s: float = math.nan
    left_bytes: Fraction = Fraction(0)
    sent_s: float = math.nan
    to: int = -1


@dataclass(kw_only=True)
class PlainDisaggregated:
    """Prefill replicas, decode replicas, links; ``build`` makes an engine from its side."""

    trace: Trace
    plan: Plan
    prefill: list[PlainEngine]
    decode: list[PlainEngine]
    bytes_per_s: float
    latency_s: float
    one_link: bool
    token_layer_bytes: int
    ready: list[Moving] = field(default_factory=list)
    under_way: list[Moving] = field(default_factory=list)
    here: list[Moving] = field(default_factory=list)
    all: dict[int, Moving] = field(default_factory=dict)

    def run(self) -> dict[str, np.ndarray]:
        """Serve the full trace; return columns of ``sim.disaggregate.disaggregate.StagedRecords``."""
        self.homes: list[tuple[int, LiveRequest]] = []
        self.rate = Fraction(self.bytes_per_s)
        handled: set[int] = set()
        coming = list(zip(*(a.tolist() for a in (
            self.trace.arrival_s, self.trace.prompt_tokens, self.trace.output_tokens)), strict=True))  # fmt: skip
        self.limit = min(engine.context_limit for engine in self.decode)
        for engine in self.prefill:
            engine._holds = lambda request_id, engine=engine: self._goes_on(engine.queues.all[request_id].request)
        now_s = 0.0
        while True:
            engines = (*self.prefill, *self.decode)
            times = [engine.next_s() for engine in engines]
            if any(engine.held for engine in engines):  # woken at the moment at which it is held
                times.append(math.nextafter(now_s, math.inf))
            times += [coming[0][0]] if coming else []
            times.append(self._next_change_s(now_s))
            if math.isinf(next_s := min(times)):
                break
            self._carry(Fraction(now_s), Fraction(next_s))
            now_s = next_s
            for engine in (*self.prefill, *self.decode):
                engine.run_until(now_s)
            self._end_transfers(now_s)
            for i, (k, live) in sorted(enumerate(self.homes), key=lambda item: (item[1][0], item[0])):
                if i not in handled and live.status is Status.FINISHED:
                    handled.add(i)
                    self._prefilled(i, k, live)
            while coming and coming[0][0] <= now_s:
                arrival_s, prompt, output = coming.pop(0)
                self._arrive(Request(request_id=0, arrival_s=arrival_s, prompt_tokens=prompt, output_tokens=output))
            self._join()
            self._send_those_ready(now_s)
            self._end_transfers(now_s)
            self._join()
            for engine in (*self.prefill, *self.decode):
                if not engine.in_iteration:  # one that ends at the next float is not to end now
                    engine.run_until(math.nextafter(now_s, math.inf))  # iterations start
            self._send_those_ready(now_s)  # an iteration that starts may admit a request, which makes room
        return self._columns()

    def _send_those_ready(self, now_s: float) -> None:
        while self.ready and (to := self._where(self.ready[0])) is not None:
            moving = self.ready.pop(0)
            moving.to, moving.send_s, moving.flows_s = to, now_s, now_s + self.latency_s
            table = self.decode[to].reserve(moving.number, moving.request.prompt_tokens)
            assert table is not None
            assert table.own_layer_blocks == self._blocks(moving)
            self.under_way.append(moving)

    def _end_transfers(self, now_s: float) -> None:
        for moving in [m for m in self.under_way if m.flows_s <= now_s and m.left_bytes == 0]:
            self.under_way.remove(moving)
            moving.sent_s = now_s
            self.prefill[moving.prefill].release(moving.live.request_id)
            self.here.append(moving)

    def _arrive(self, request: Request) -> None:
        queues = [engine.queues for engine in self.prefill]
        k = min(range(len(queues)), key=lambda k: len(queues[k].waiting) + len(queues[k].running))
        engine = self.prefill[k]
        fits = request.prompt_tokens < min(self.limit, engine.context_limit)
        row = replace(request, request_id=len(engine.queues.all))
        live = LiveRequest(row, output_limit=1 if fits else 0, status=Status.WAITING if fits else Status.REJECTED)
        engine.queues.all[row.request_id] = live
        if fits:
            engine.queues.waiting.append(live)
            engine._wake_up()
        self.homes.append((k, live))

    def _goes_on(self, request: Request) -> bool:
        return min(request.output_tokens, self.limit - request.prompt_tokens) > 1

    def _prefilled(self, i: int, k: int, live: LiveRequest) -> None:
        if self._goes_on(live.request):
            moving = Moving(number=i, request=live.request, prefill=k, live=live)
            moving.left_bytes = Fraction(self._sent_bytes(live.request.prompt_tokens))
            self.ready.append(moving)
            self.all[i] = moving

    def _kept(self, prompt: int) -> list[tuple[int, int]]:
        """Return how many tokens each layer of decode keeps of a prompt, and the bytes of each."""
        head = self.decode[0].model.head_dim
        full, size = self.token_layer_bytes, {8: head + 4, 4: head // 2 + 4}
        heads = self.decode[0].model.num_kv_heads
        return [
            (keep.tokens(prompt), full if bits == 16 else 2 * heads * size[bits])
            for keep, bits, kept in zip(self.plan.kv_keep, self.plan.kv_bits, self.plan.decode.mha, strict=True)
            if kept
        ]

    def _sent_bytes(self, prompt: int) -> int:
        return sum(tokens * size for tokens, size in self._kept(prompt))

    def _blocks(self, moving: Moving) -> int:
        block_bytes = self.decode[0].config.kv_block_tokens * self.token_layer_bytes
        return sum(-(-tokens // (block_bytes // size)) for tokens, size in self._kept(moving.request.prompt_tokens))

    def _where(self, moving: Moving) -> int | None:
        best, most = None, -1.0
        for k, engine in enumerate(self.decode):
            free = engine.pool.free_layer_blocks
            coming = sum(m.to == k for m in (*self.under_way, *self.here))
            room = free - self._blocks(moving) >= engine._limits.watermark_layer_blocks
            places = len(engine.queues.running) + coming < engine._limits.max_running
            share = free / max(engine.pool.layer_blocks, 1)
            if room and places and not engine.queues.waiting and share > most:
                best, most = k, share
        return best

    def _join(self) -> None:
        for moving in list(self.here):
            engine, prompt = self.decode[moving.to], moving.request.prompt_tokens
            if engine.in_iteration:
                continue
            self.here.remove(moving)
            moving.live = replace(
                moving.live,
                request=replace(moving.request, request_id=moving.number),
                output_limit=min(moving.request.output_tokens, self.limit - prompt),
                computed_tokens=prompt,
                prefill_tokens=prompt,
                finish_s=math.nan,
            )
            engine.join(moving.live)

    # -- links: each active transfer gets the bandwidth divided by their number -----------------------------------

    def _active(self, now_s: float | Fraction) -> dict[int, list[Moving]]:
        """Return the transfers that share each link now."""
        links: dict[int, list[Moving]] = {}
        for moving in self.under_way:
            if moving.flows_s <= now_s and moving.left_bytes > 0:
                links.setdefault(0 if self.one_link else moving.prefill, []).append(moving)
        return links

    def _seconds_left(self, active: list[Moving]) -> Fraction:
        """Return when the first of the transfers that share a link ends, counted from now."""
        return min(moving.left_bytes for moving in active) * len(active) / self.rate

    def _next_change_s(self, now_s: float) -> float:
        """Return the first time of the clock at which a transfer has ended or begins to share its link."""
        times = [moving.flows_s for moving in self.under_way if moving.flows_s > now_s]
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
                for moving in active:
                    moving.left_bytes -= step_s * self.rate / len(active)
                active = [moving for moving in active if moving.left_bytes > 0]
                now_s += step_s

    def _columns(self) -> dict[str, np.ndarray]:
        found: dict[str, list[float]] = {}
        for i, (k, first) in enumerate(self.homes):
            moving = self.all.get(i)
            live = moving.live if moving is not None else first
            row = {
                "prefill_replica": k,
                "decode_replica": moving.to if moving is not None else -1,
                "first_token_s": live.first_token_s,
                "finish_s": live.finish_s,
                "send_s": moving.send_s if moving is not None else math.nan,
                "sent_s": moving.sent_s if moving is not None else math.nan,
                "produced_tokens": live.produced_tokens,
                "preemptions": live.preemptions,
                "status": int(live.status),
            }
            for name, value in row.items():
                found.setdefault(name, []).append(value)
        return {name: np.array(values, dtype=np.float64) for name, values in found.items()}


def build(kind: type[PlainEngine], env: simpy.Environment, **overrides: object) -> PlainEngine:
    """Return an engine that expects further requests."""
    engine = kind(env=env, **overrides)  # type: ignore[arg-type]
    engine.expects_more = True
    return engine
