"""Who may use a link: a stranger neither ends the wait for the right process nor holds it up."""

from __future__ import annotations

import contextlib
import json
import logging
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from hw.disaggregate import hello
from hw.disaggregate.hello import MOST_GREETINGS, MOST_HELLO_BYTES, accept_with_key, connect_with_key, key_of, welcome
from hw.disaggregate.kv_link import Channel, LinkError

SECRET = "secret"
KEY = key_of(SECRET, "prefill")
Address = tuple[str, int]


class Decode:
    """Waits for its peer in a thread of its own."""

    def __init__(self, server: socket.socket) -> None:
        self.address: Address = server.getsockname()
        self.stopped = threading.Event()
        self.channel: Channel | None = None
        self.thread = threading.Thread(target=self._run, args=(server,), daemon=True)
        self.thread.start()

    def _run(self, server: socket.socket) -> None:
        self.channel = accept_with_key(server, KEY, "the prefill process", self.stopped.is_set)
        if self.channel is not None:
            welcome(self.channel, SECRET)


@contextmanager
def waiting() -> Iterator[Decode]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        decode = Decode(server)
        yield decode
        decode.stopped.set()
        decode.thread.join(10)
        assert not decode.thread.is_alive()
        if decode.channel is not None:
            decode.channel.close()


def frame(header: Any) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("!I", len(text)) + text


def connected(address: Address, content: bytes) -> socket.socket:
    stranger = socket.create_connection(address)
    stranger.sendall(content)
    return stranger


def closed_by_the_other_side(stranger: socket.socket) -> bool:
    stranger.settimeout(10)
    try:
        return stranger.recv(1) == b""
    except ConnectionResetError:
        return True


def peer_gets_in(decode: Decode) -> None:
    channel = connect_with_key(decode.address, SECRET, "the decode process")
    decode.thread.join(10)
    assert decode.channel is not None
    decode.channel.send({"kind": "ready"})
    assert channel.receive()["kind"] == "ready"
    channel.close()


STRANGERS = {
    "deep": frame(b"[" * MOST_HELLO_BYTES),
    "deep and long": frame(b"[" * 100_000),
    "http": b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "no bytes": frame({"kind": "hello", "key": KEY}),
    "payload": frame({"kind": "hello", "key": KEY, "bytes": 4}) + b"abcd",
    "too long": frame({"kind": "hello", "key": KEY, "bytes": 0, "more": "x" * MOST_HELLO_BYTES}),
    "empty": frame(b""),
    "huge": b"\xff\xff\xff\xff",
    "nan": frame(b'{"kind": "hello", "bytes": NaN}'),
    "no utf-8": frame(b"\xff\xfe\xfd"),
    "no object": frame([1, 2]),
    "wrong key": frame({"kind": "hello", "key": key_of("other", "prefill"), "bytes": 0}),
    "the other stage's key": frame({"kind": "hello", "key": key_of(SECRET, "decode"), "bytes": 0}),
    "no key": frame({"kind": "hello", "bytes": 0}),
    "another kind": frame({"kind": "welcome", "key": KEY, "bytes": 0}),
    "key of another type": frame({"kind": "hello", "key": [KEY], "bytes": 0}),
    "key outside ASCII": frame({"kind": "hello", "key": "schl\u00fcssel", "bytes": 0}),
    "lone surrogate": frame({"kind": "hello", "key": "\ud83d", "bytes": 0}),
}


@pytest.mark.parametrize("content", STRANGERS.values(), ids=STRANGERS)
def test_a_stranger_is_refused_and_the_peer_still_gets_in(content: bytes, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING), waiting() as decode:
        stranger = connected(decode.address, content)
        assert closed_by_the_other_side(stranger)
        peer_gets_in(decode)
        stranger.close()
    assert "refused a connection to the KV link: " in caplog.text
    assert KEY not in caplog.text


def test_strangers_that_send_nothing_slowly_or_half_do_not_hold_up_the_peer() -> None:
    contents = [b"", b"\x00", struct.pack("!I", 500), frame({"kind": "hello"})[:-1]] * 3
    with waiting() as decode:
        strangers = [connected(decode.address, content) for content in contents]
        strangers[0].shutdown(socket.SHUT_WR)
        dripping = threading.Event()

        def drip() -> None:
            for byte in frame({"kind": "hello", "key": "x" * 400, "bytes": 0}):
                if dripping.wait(0.01):
                    return
                strangers[1].sendall(bytes([byte]))

        thread = threading.Thread(target=drip)
        thread.start()
        peer_gets_in(decode)
        dripping.set()
        thread.join()
        for stranger in strangers:
            stranger.close()


def test_a_first_frame_has_one_deadline_however_it_drips(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hello, "HELLO_S", 0.3)
    with waiting() as decode:
        stranger = connected(decode.address, b"")
        sent = 0
        with contextlib.suppress(OSError):
            for byte in frame({"kind": "hello", "key": "x" * 900, "bytes": 0}):
                stranger.sendall(bytes([byte]))
                sent += 1
                time.sleep(0.05)
        assert sent < 800  # the other side has closed the connection
        stranger.close()


def test_more_strangers_than_places_do_not_keep_the_peer_out() -> None:
    with waiting() as decode:
        strangers = [connected(decode.address, b"") for _ in range(2 * MOST_GREETINGS)]
        peer_gets_in(decode)
        for stranger in strangers:
            stranger.close()


def test_a_failed_accept_is_logged_and_the_wait_goes_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fails = iter([True, True])
    accept = socket.socket.accept

    def failing(server: socket.socket) -> Any:
        if next(fails, False):
            raise OSError(24, "Too many open files")
        return accept(server)

    monkeypatch.setattr(socket.socket, "accept", failing)
    with caplog.at_level(logging.WARNING), waiting() as decode:
        peer_gets_in(decode)
    assert caplog.text.count("Too many open files") == 2


def test_a_wait_that_is_stopped_returns_nothing() -> None:
    with waiting() as decode:
        stranger = connected(decode.address, b"")
    assert decode.channel is None
    assert closed_by_the_other_side(stranger)


Answer = Callable[[socket.socket], None]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda s: s.sendall(frame({"kind": "welcome", "key": KEY, "bytes": 0})), "does not have the key"),
        (lambda s: s.sendall(frame({"kind": "ready", "context_limit": 9, "bytes": 0})), "does not have the key"),
        (lambda s: s.sendall(frame(b"[" * 900)), "not JSON"),
        (lambda s: s.sendall(struct.pack("!I", 10**6)), "at most 1000"),
        (lambda s: s.close(), "has gone"),
        (lambda s: None, "in time"),
    ],
)
def test_a_stranger_that_listens_in_place_of_decode_is_noticed(
    monkeypatch: pytest.MonkeyPatch, answer: Answer, message: str
) -> None:
    monkeypatch.setattr(hello, "HELLO_S", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as server:
        accepted: list[socket.socket] = []

        def fake() -> None:
            accepted.append(server.accept()[0])
            accepted[0].recv(2000)  # otherwise closing would reset the connection
            answer(accepted[0])

        thread = threading.Thread(target=fake)
        thread.start()
        with pytest.raises(LinkError, match=message):
            connect_with_key(server.getsockname(), SECRET, "the decode process")
        thread.join()
        accepted[0].close()


def test_a_port_where_nothing_listens_is_an_error_of_the_link() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = server.getsockname()
    with pytest.raises(LinkError, match="no connection to the decode process"):
        connect_with_key(address, SECRET, "the decode process")
