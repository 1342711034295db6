"""Hostile frames on the link between prefill and decode: the first message of a stranger, and messages of a peer."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import random
import socket
import struct
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from hw.disaggregate.kv_link import Channel
from hw.disaggregate.processes import STOP, accept_peer
from hw.disaggregate.sides import handover_from
from hw.engine.hw_engine import Handover
from sim.cost.model_spec import ModelSpec
from sim.engine.protocol import Request
from tests.soak.kinds import Case, FaultError
from tests.soak.mutate import JSON_VALUES, mutate_bytes, mutate_json, to_json
from tests.soak.tiny_checkpoint import SPEC

MOST_FILLED = 1 << 16
KEY = "5" * 32


def frame(header: bytes, payload: bytes = b"") -> bytes:
    """Return one frame."""
    return struct.pack("!I", len(header)) + header + payload


def offer(prompt_tokens: int = 3) -> dict[str, Any]:
    """Return a valid offer of a request."""
    request = Request(request_id=4, arrival_s=0.5, prompt_tokens=prompt_tokens, output_tokens=1)
    known = {
        "request": dataclasses.asdict(request),
        "tokens": list(range(prompt_tokens + 1)),
        "output_limit": 9,
        "admitted_s": 0.7,
        "first_token_s": 1.0,
        "kept_params": 100,
        "nll_sum": 0.5,
    }
    fields = {field.name: known.get(field.name, 0) for field in dataclasses.fields(Handover)}
    return {"kind": "offer", "handover": fields, "bytes": 0}


HEADERS: tuple[dict[str, Any], ...] = (
    {"kind": "hello", "key": "0" * 32, "bytes": 0},
    {"kind": "hello", "context_limit": 512, "bytes": 0},
    {"kind": "take", "request": 4, "bytes": 0},
    {"kind": "kv", "request": 4, "bytes": 6},
    {"kind": "arrived", "request": 4, "bytes": 0},
    {"kind": "over", "bytes": 0},
)


class Links:
    """Bytes that arrive over a socket."""

    name = "link frames"

    def __init__(self, folder: Path) -> None:
        self._model: ModelSpec = SPEC

    def make(self, rng: random.Random) -> Case:
        """Return the bytes of one or two frames."""
        header = json.loads(json.dumps(offer() if rng.random() < 0.5 else rng.choice(HEADERS)))
        target = "offer" if header["kind"] == "offer" else rng.choice(("frame", "hello"))
        payload = bytes(6) if header["kind"] == "kv" else b""
        raw = frame(to_json(mutate_json(header, rng) if rng.random() < 0.8 else header, rng), payload)
        how = rng.random()
        if how < 0.2:
            raw = mutate_bytes(raw, rng)
        elif how < 0.25:
            raw = struct.pack("!I", rng.choice((0, 1, 2**16, 2**20, 2**31, 2**32 - 1))) + raw[4:]
        elif how < 0.3:
            raw += frame(json.dumps(header).encode())
        return Case(target, raw)

    def strategy(self) -> st.SearchStrategy[Case]:
        """Return hypothesis' strategy of frames: an offer with changed fields, or any header."""
        fields = sorted(offer()["handover"])
        changed = st.dictionaries(st.sampled_from(fields), JSON_VALUES, max_size=3)
        offers = changed.map(lambda other: {**offer(), "handover": {**offer()["handover"], **other}})
        headers = st.dictionaries(st.sampled_from(["kind", "request", "bytes", "key", "handover"]), JSON_VALUES)
        cases = offers.map(lambda header: ("offer", header)) | headers.map(lambda header: ("frame", header))
        return cases.map(lambda pair: Case(pair[0], frame(json.dumps(pair[1]).encode())))

    def feed(self, case: Case) -> str:
        """Receive until the connection ends; read offers as the decode side does."""
        if case.target == "hello":
            return self._greet(case.content)
        theirs, ours = socket.socketpair()
        channel = Channel(ours, "the other side")
        try:
            theirs.setblocking(False)
            sent = 0
            with contextlib.suppress(BlockingIOError):
                sent = theirs.send(case.content)
            theirs.shutdown(socket.SHUT_WR)
            if sent < len(case.content):
                return "refused"  # more than the socket holds; the size of headers is judged by their length
            header = channel.receive()
            count = header["bytes"]
            if isinstance(count, bool) or count < 0:
                raise FaultError("accepted a header whose bytes are no count", repr(count))
            if count and count <= MOST_FILLED:
                channel.fill(memoryview(bytearray(count)))
            if header.get("kind") == "offer":
                handover = handover_from(header, self._model)
                _check(handover)
            return "accepted"
        finally:
            channel.close()
            theirs.close()

    def _greet(self, content: bytes) -> str:
        """Connect as a stranger who does not know the key."""
        with (
            socket.create_server(("127.0.0.1", 0)) as server,
            socket.create_connection(server.getsockname()) as stranger,
        ):
            try:
                stranger.settimeout(1.0)
                stranger.sendall(content[: 1 << 20])
                stranger.shutdown(socket.SHUT_WR)
            except OSError:
                return "refused"
            channel = accept_peer(server, KEY, _OnePeer())  # type: ignore[arg-type]
            if channel is not None:
                channel.close()
                raise FaultError("accepted a stranger")
        return "refused"

    def close(self) -> None:
        """Nothing runs."""


class _OnePeer:
    """A pipe whose parent ends the process after the first look."""

    def __init__(self) -> None:
        self._looks = 0

    def poll(self) -> bool:
        """Return whether a message has come."""
        self._looks += 1
        return self._looks > 1

    def recv(self) -> Any:
        """Return the message."""
        return STOP


def _check(handover: Handover) -> None:
    """Check that an accepted offer holds what the engine computes with."""
    request = handover.request
    for name in ("request_id", "prompt_tokens", "output_tokens"):
        value = getattr(request, name)
        if isinstance(value, bool) or not isinstance(value, int):
            raise FaultError(f"accepted an offer whose {name} is no whole number", repr(value))
    if any(isinstance(token, bool) or not isinstance(token, int) for token in handover.tokens):
        raise FaultError("accepted an offer whose tokens are no whole numbers", repr(handover.tokens)[:200])
    for name in ("output_limit", "kept_params", "preemptions"):
        if isinstance(getattr(handover, name), bool) or not isinstance(getattr(handover, name), int):
            raise FaultError(f"accepted an offer whose {name} is no whole number", repr(getattr(handover, name)))
    for name in ("admitted_s", "first_token_s", "nll_sum"):
        value = getattr(handover, name)
        unknown = name == "nll_sum" and value != value
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not (abs(value) < float("inf") or unknown):
            raise FaultError(f"accepted an offer whose {name} is no finite number", repr(value)[:200])
    if isinstance(request.arrival_s, (bool, str)) or not 0 <= request.arrival_s < float("inf"):
        raise FaultError("accepted an offer whose arrival is no time", repr(request.arrival_s))
