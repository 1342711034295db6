"""Prefill and decode of a real model in two processes: KV is gathered, sent, and put into the pool of the other side.

The rules are those of ``sim.disaggregate``, which lists the states of a request, with one replica on each side and
without ``overlap``. One connection (hw/disaggregate/kv_link.py) carries these messages:

    prefill -> decode   offer     a request whose prompt is computed: its tokens and its record, no KV yet
    decode -> prefill   take      room is reserved for it: KV blocks, and a place among the running requests
    prefill -> decode   kv        chunks of its keys, then of its values, layer by layer as decode keeps them
    decode -> prefill   arrived   its KV is in the pool; only now does prefill free its own
    prefill -> decode   over      no other request will come

Each side has three threads. One runs the engine and releases its lock while the model computes. One receives from the
other side, and may reserve room under that lock in the middle of an iteration. One sends. All times are on Linux's
CLOCK_MONOTONIC, which both processes read.
"""

from __future__ import annotations

import dataclasses
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from hw.disaggregate.kv_link import Channel, Header, LinkError, Sender
from hw.elastic.device_memory import attempt
from hw.elastic.model import ElasticModel
from hw.elastic.paged_kv import KVArena
from hw.elastic.quantized_kv import QuantizedKV
from hw.engine.clock import RealClock
from hw.engine.hw_engine import Handover, HwEngine
from sim.cost.kv_format import stored_kv_bytes
from sim.cost.model_spec import ModelSpec
from sim.cost.plan import KV_BITS, Plan
from sim.engine.block_table import BlockTable
from sim.engine.protocol import Request
from sim.traces.trace import MAX_ARRIVAL_S, Trace

LOOK_S = 0.02
"""How long an idle side sleeps at most, if nothing wakes it."""
STEP_S = 1e-3
"""How far ahead the engine serves in one call: one iteration takes longer, and the next call comes after it."""

SENT_BLOCKS = 256
"""KV blocks of one layer that are copied between device and host at a time."""
PATIENCE_S = 30.0
"""How long a copy waits for memory of the device, which a pass or a copy of weights may hold."""

T = TypeVar("T")
Report = Callable[[str, Any], None]
"""Receives what a side reports during a run: ("records", (ids, Records)) of requests that end there,
("transfer", {...}) of KV that has joined, and ("released", (request_id, time_s)) of KV that prefill has freed."""


class GuardedEngine(HwEngine):
    """An engine whose lock is free while the model computes, so that other threads can use its pool meanwhile."""

    def __init__(self, guard: threading.Condition, **settings: Any) -> None:
        """Build an idle engine; ``settings`` are those of ``HwEngine``. Callers hold the lock from now on."""
        super().__init__(**settings, during_forward=partial(_released, guard))


@contextmanager
def _released(guard: threading.Condition) -> Iterator[None]:
    guard.release()
    try:
        yield
    finally:
        guard.acquire()


Build = Callable[..., GuardedEngine]
"""Makes a side's engine from the settings that only the side knows: guard, prompts, holds, on_token."""


# --- KV as bytes -----------------------------------------------------------------------------------------------------


def gather(arena: KVArena, table: BlockTable, tokens: int) -> memoryview:
    """Return the KV that a request holds for ``tokens`` computed tokens, as bytes.

    Layers at 16 bits come first, all keys and then all values, layer by layer; then the packed tokens of layers at 8
    bits, and of those at 4.
    """
    assert not table.stores_hidden
    assert table.packed is None
    halves = [_read(arena, table.kept_slots(tokens, bits), bits) for bits in KV_BITS]
    parts = [part for part in halves if part.numel()]
    content: memoryview = (parts[0] if len(parts) == 1 else torch.cat(halves)).numpy().data
    return content


def _read(arena: KVArena, listed: Sequence[int], bits: int) -> Tensor:
    """Return what slots hold as bytes, uint8 [bytes], on the host."""
    slots = torch.tensor(listed, dtype=torch.long)
    packed = None if bits == 16 else QuantizedKV(arena, bits)

    def read(part: slice) -> Tensor:
        at = slots[part].to(arena.device)
        return (torch.stack(arena.read_slots(at)) if packed is None else packed.read_bytes(at)[None]).cpu()

    parts = [_patiently(arena, partial(read, part)) for part in _parts(arena, len(slots))]
    return torch.cat(parts, dim=1).view(torch.uint8).flatten() if parts else torch.empty(0, dtype=torch.uint8)


def scatter(arena: KVArena, table: BlockTable, tokens: int, content: bytearray, elastic: ElasticModel) -> None:
    """Write what ``gather`` returned to the slots of another table that holds the same tokens of the same layers."""
    sent, start = memoryview(content), 0
    for bits in KV_BITS:
        slots = torch.tensor(table.kept_slots(tokens, bits), dtype=torch.long)
        size = len(slots) * elastic.spec.kv_bytes_per_token_layer_at(bits)
        if size:
            _write(arena, slots, sent[start : start + size], bits, elastic)
        start += size


def _write(arena: KVArena, slots: Tensor, content: memoryview, bits: int, elastic: ElasticModel) -> None:
    packed = None if bits == 16 else QuantizedKV(arena, bits)
    if packed is None:
        shape = (2, len(slots), elastic.spec.num_kv_heads, elastic.spec.head_dim)
        received = torch.frombuffer(content, dtype=elastic.dtype).view(shape)
        blocks = {slot // arena.block_tokens for slot in slots.tolist()}
        _patiently(arena, lambda: arena.begin(blocks))
    else:
        received = torch.frombuffer(content, dtype=torch.uint8).view(1, len(slots), -1)
        packed.note_written(slots.tolist())

    def write(part: slice) -> None:
        at, values = slots[part].to(arena.device), received[:, part].to(arena.device)
        if packed is None:
            arena.write(at, *values)
        else:
            packed.write_bytes(at, values[0])

    for part in _parts(arena, len(slots)):
        _patiently(arena, partial(write, part))


def _parts(arena: KVArena, slots: int) -> list[slice]:
    """Return parts of some slots: what is sent exists twice on the device for a moment."""
    step = SENT_BLOCKS * arena.block_tokens
    return [slice(start, start + step) for start in range(0, slots, step)]


def _patiently(arena: KVArena, step: Callable[[], T]) -> T:
    """Run a step that needs a little memory of the device; if there is none, wait until a pass has ended.

    Raises:
        MemoryError: if there was none for ``PATIENCE_S`` seconds.
    """
    until_s = time.monotonic() + PATIENCE_S
    while True:
        try:
            return attempt(arena.hardware, step)
        except MemoryError:
            if time.monotonic() > until_s:
                raise
        time.sleep(LOOK_S)


# --- What both sides share -------------------------------------------------------------------------------------------


class Connection:
    """A channel with its two threads, and the lock that the engine of this side runs under.

    failure: why the link can no longer be used; None while it works.
    """

    def __init__(self, channel: Channel, *, bytes_per_s: float | None = None, latency_s: float = 0.0) -> None:
        """Take over a channel; nothing is received before ``listen``. The limits apply to what this side sends."""
        self.guard = threading.Condition(threading.Lock())
        self.failure: BaseException | None = None
        self._channel = channel
        self._sender = Sender(channel, self._fail, bytes_per_s=bytes_per_s, latency_s=latency_s)
        self.send, self.carry = self._sender.send, self._sender.carry

    def listen(self, heard: Callable[[Header, Channel], bool]) -> None:
        """Start a thread that passes every header it receives to ``heard``, until that returns True."""

        def run() -> None:
            try:
                while not heard(_checked(self._channel.receive()), self._channel):
                    pass
            except BaseException as error:
                self._fail(error)

        threading.Thread(target=run, name="listener", daemon=True).start()

    def close(self, *, complete: bool) -> None:
        """Close the channel; with ``complete``, after sending what is left."""
        if not complete:
            self._channel.close()  # first, for a send that is stuck
        self._sender.close(complete=complete)
        self._channel.close()

    def _fail(self, error: BaseException) -> None:
        with self.guard:
            self.failure = self.failure or error
            self.guard.notify()


def _checked(header: Header) -> Header:
    """Return a header whose parts have the types that both sides rely on.

    Raises:
        LinkError: if they have not.
    """
    kind, request = header.get("kind"), header.get("request")
    if not isinstance(kind, str) or (request is not None and type(request) is not int):
        raise LinkError("the other process sent a frame whose kind is not a text, or whose request is not a number")
    if header["bytes"] and kind != "kv":
        raise LinkError(f"the other process sent a frame of kind {kind[:20]!r} with {header['bytes']} bytes of payload")
    return header


def _name_of(header: Header) -> str:
    return f"{header.get('kind')!r:.20} of request {header.get('request')}"


class Side(Protocol):
    """One of the two sides."""

    engine: GuardedEngine
    connection: Connection

    def exchange(self, now_s: float) -> bool:
        """Process what has arrived and send what is ready, between two iterations; return whether this side is done."""
        ...


def serve(side: Side, clock: RealClock, stopped: Callable[[], bool]) -> None:
    """Serve until a side is done.

    Args:
        stopped: called between iterations; returns whether to end early.
    Raises:
        LinkError: if the other side is gone or broke the protocol.
        KeyboardInterrupt: when stopped.
    """
    engine, connection = side.engine, side.connection
    with connection.guard:
        while True:
            now_s = clock.now_s()
            engine.run_until(now_s)  # apply what has ended
            if connection.failure is not None:
                raise connection.failure
            if stopped():
                raise KeyboardInterrupt
            if side.exchange(now_s):
                return
            if not engine.run_until(clock.now_s() + STEP_S).running:
                connection.guard.wait(LOOK_S)


# --- Prefill ---------------------------------------------------------------------------------------------------------


class PrefillSide:
    """Computes prompts and first tokens, and holds their KV until it has arrived at the decode side."""

    def __init__(
        self, *, build: Build, trace: Trace, decode_limit: int, connection: Connection, clock: RealClock, report: Report
    ) -> None:
        """Build the engine.

        Args:
            decode_limit: tokens that prompt and output may have together at the decode side.
        """
        self.connection, self._clock, self._report = connection, clock, report
        self._trace, self._decode_limit = trace, decode_limit
        self._next = 0
        self.engine = build(guard=connection.guard, holds=self._goes_on, on_token=self._on_token)
        connection.listen(self._heard)

    def exchange(self, now_s: float) -> bool:
        """Submit the requests that are due."""
        trace = self._trace
        due: list[Request] = []
        while self._next < len(trace) and trace.arrival_s[self._next] <= now_s:
            due.append(self._request(self._next))
            self._next += 1
        self.engine.submit(due)
        over = self._next == len(trace) and self.engine.drained and not self.engine.outside
        if over:
            self.connection.send({"kind": "over"})
        return over

    def _request(self, number: int) -> Request:
        """Return a request of the trace as this side serves it: up to its first token."""
        arrival_s, prompt_tokens = float(self._trace.arrival_s[number]), int(self._trace.prompt_tokens[number])
        return Request(request_id=number, arrival_s=arrival_s, prompt_tokens=prompt_tokens, output_tokens=1)

    def _output_limit(self, number: int) -> int:
        limit = self._decode_limit - int(self._trace.prompt_tokens[number])
        return min(int(self._trace.output_tokens[number]), limit)

    def _goes_on(self, request_id: int) -> bool:
        return self._output_limit(request_id) > 1

    def _on_token(self, request_id: int, token: int | None, _last: bool) -> None:
        self._report("records", ([request_id], self.engine.records([request_id])))
        if token is None or not self._goes_on(request_id):
            return
        outputs = int(self._trace.output_tokens[request_id])
        handover = self.engine.handover(request_id, outputs, self._output_limit(request_id))
        self.connection.send({"kind": "offer", "handover": dataclasses.asdict(handover)})

    def _heard(self, header: Header, _channel: Channel) -> bool:
        request_id = header.get("request")
        if header.get("kind") not in ("take", "arrived") or request_id not in self.engine.outside:
            raise LinkError(f"the decode process sent {_name_of(header)}, which this process did not expect")
        if header["kind"] == "take":
            table = self.engine.outside[request_id]
            tokens = int(self._trace.prompt_tokens[request_id])
            arena = self.engine.arena
            self.connection.carry({"kind": "kv", "request": request_id}, lambda: gather(arena, table, tokens))
            return False
        with self.connection.guard:
            self.engine.release(request_id)
            self._report("released", (request_id, self._clock.now_s()))
            self.connection.guard.notify()
        return False


# --- Decode ----------------------------------------------------------------------------------------------------------


@dataclass(slots=True, eq=False)
class _Coming:
    """A request whose KV is being sent here; room is reserved for it."""

    handover: Handover
    table: BlockTable
    content: bytearray
    send_s: float
    arrived_bytes: int = 0
    sent_s: float = float("nan")


class DecodeSide:
    """Takes requests with a computed prompt when it has room for their KV, and produces the rest of their tokens."""

    def __init__(
        self,
        *,
        build: Build,
        elastic: ElasticModel,
        plan: Plan,
        connection: Connection,
        clock: RealClock,
        report: Report,
    ) -> None:
        """Build the engine; ``plan`` is that of both sides."""
        self.connection, self._clock, self._report = connection, clock, report
        self._elastic, self._plan = elastic, plan
        self._offers: deque[Handover] = deque()
        self._offered: set[int] = set()
        self._coming: dict[int, _Coming] = {}
        self._arrived: deque[_Coming] = deque()
        self._over = False
        self.engine = build(guard=connection.guard, on_token=self._on_token)

    def listen(self) -> None:
        """Receive from the other side from now on."""
        self.connection.listen(self._heard)

    def exchange(self, now_s: float) -> bool:
        """Add the requests whose KV has arrived, and take more of the offered ones."""
        while self._arrived:
            come = self._arrived.popleft()
            self.engine.take_over(come.handover)
            self._report(
                "transfer",
                {
                    "request_id": come.handover.request.request_id,
                    "sent_bytes": len(come.content),
                    "send_s": come.send_s,
                    "sent_s": come.sent_s,
                    "joined_s": now_s,
                },
            )
        self._take_those_offered()
        return self._over and not self._offers and not self.engine.outside and self.engine.drained

    def _take_those_offered(self) -> None:
        """Reserve room for offered requests, in the order in which their prompts ended, and request their KV."""
        while self._offers:
            request = self._offers[0].request
            table = self.engine.reserve(request.request_id, request.prompt_tokens)
            if table is None:
                return
            content = bytearray(stored_kv_bytes(self._elastic.spec, self._plan, request.prompt_tokens))
            come = _Coming(self._offers.popleft(), table, content, self._clock.now_s())
            self._coming[request.request_id] = come
            self.connection.send({"kind": "take", "request": request.request_id})

    def _on_token(self, request_id: int, _token: int | None, last: bool) -> None:
        if last:
            self._report("records", ([request_id], self.engine.records([request_id])))

    def _heard(self, header: Header, channel: Channel) -> bool:
        kind = header.get("kind")
        if kind == "kv" and header.get("request") in self._coming:
            self._receive(self._coming[header["request"]], header["bytes"], channel)
        elif kind == "offer":
            handover = handover_from(header, self._elastic.spec)
            if handover.request.request_id in self._offered:
                raise LinkError(f"the prefill process offered request {handover.request.request_id} twice")
            self._offered.add(handover.request.request_id)
            with self.connection.guard:
                self._offers.append(handover)
                self._take_those_offered()
        elif kind == "over":
            with self.connection.guard:
                self._over = True
                self.connection.guard.notify()
        else:
            raise LinkError(f"the prefill process sent {_name_of(header)}, which this process did not expect")
        return bool(kind == "over")

    def _receive(self, come: _Coming, count: int, channel: Channel) -> None:
        """Receive a chunk of a request's KV; the last chunk puts it into the pool."""
        request, size = come.handover.request, len(come.content)
        if not 0 <= count <= size - come.arrived_bytes:
            raise LinkError(
                f"the prefill process sends more KV of request {request.request_id} than the plan says: "
                f"{come.arrived_bytes + count} bytes of {size}"
            )
        place = memoryview(come.content)[come.arrived_bytes :][:count]
        channel.fill(place)
        come.arrived_bytes += count
        if come.arrived_bytes < size:
            return
        scatter(self.engine.arena, come.table, request.prompt_tokens, come.content, self._elastic)
        with self.connection.guard:
            come.sent_s = self._clock.now_s()
            del self._coming[request.request_id]
            self._arrived.append(come)
            self.connection.guard.notify()
        self.connection.send({"kind": "arrived", "request": request.request_id})


def handover_from(header: Header, model: ModelSpec) -> Handover:
    """Read an offer.

    Raises:
        LinkError: for an offer that lacks something or has a wrong number, or whose tokens do not fit the model or the
            prompt's length.
    """
    try:
        fields = dict(header["handover"])
        request, tokens = Request(**fields.pop("request")), tuple(fields.pop("tokens"))
        handover = Handover(request=request, tokens=tokens, **fields)
        _check_numbers(handover)
        fits = len(handover.tokens) == handover.request.prompt_tokens + 1
        fits = fits and all(0 <= token < model.vocab_size for token in handover.tokens)
    except (KeyError, TypeError, ValueError) as error:
        raise LinkError(f"the prefill process sent an offer that cannot be read: {error!r}") from error
    if not fits:
        raise LinkError(f"the tokens of request {handover.request.request_id} are not a prompt of {model.name}")
    return handover


def _check_numbers(handover: Handover) -> None:
    """Check the numbers of an offer: JSON allows NaN, and texts in their place.

    Raises:
        ValueError: for a count that is not a whole number from 0, or a time or loss that is not finite.
    """
    request = handover.request
    lengths = (request.prompt_tokens, request.output_tokens, handover.output_limit)
    counts = (request.request_id, *lengths, handover.kept_params, handover.preemptions, *handover.tokens)
    if not all(type(count) is int and count >= 0 for count in counts):
        raise ValueError("a count is not a whole number from 0")
    times_s = (request.arrival_s, handover.admitted_s, handover.first_token_s)
    # Compared, not converted: JSON allows whole numbers beyond any float.
    if not all(type(time_s) in (int, float) and abs(time_s) <= MAX_ARRIVAL_S for time_s in times_s):
        raise ValueError("a time is not a finite number")
    if request.arrival_s < 0:
        raise ValueError("an arrival is before 0")
    loss = handover.nll_sum  # NaN where it is unknown
    if type(loss) not in (int, float) or not (abs(loss) <= sys.float_info.max or loss != loss):
        raise ValueError("the loss is not a number")
