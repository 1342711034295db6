"""Frames over a socket, and transfers that share a bandwidth."""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Iterator

import pytest

from hw.disaggregate import kv_link
from hw.disaggregate.kv_link import (
    BURST_S,
    CHUNK_BYTES,
    MOST_HEADER_BYTES,
    MOST_PAYLOAD_BYTES,
    Channel,
    LinkError,
    Sender,
    check_link,
)
from sim.errors import ConfigError

Ends = tuple[Channel, Channel]


@pytest.fixture
def ends() -> Iterator[Ends]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        ours = socket.create_connection(server.getsockname())
        theirs, _ = server.accept()
    pair = Channel(ours, "theirs"), Channel(theirs, "ours")
    yield pair
    for channel in pair:
        channel.close()


def failed(error: BaseException) -> None:
    raise AssertionError(error)


def take(channel: Channel) -> tuple[str, bytes]:
    """Return the name and the bytes of the next frame."""
    header = channel.receive()
    content = bytearray(header["bytes"])
    channel.fill(memoryview(content))
    return header["name"], bytes(content)


def test_frames_arrive_as_they_were_sent_and_headers_are_counted_separately(ends: Ends) -> None:
    ours, theirs = ends
    ours.send({"name": "empty"})
    ours.send({"name": "full"}, memoryview(b"\x00\xff" * 1000))
    assert take(theirs) == ("empty", b"")
    assert take(theirs) == ("full", b"\x00\xff" * 1000)
    assert ours.sent_bytes == 2000
    assert 0 < ours.header_bytes < 100


def test_transfers_under_way_take_turns_and_a_message_goes_before_them(ends: Ends) -> None:
    ours, theirs = ends
    content = {name: bytes([i]) * (3 * CHUNK_BYTES + i) for i, name in enumerate("ab", start=1)}
    sender = Sender(ours, failed, latency_s=0.05)  # so that all is there before the first byte leaves
    for name in "ab":
        sender.carry({"name": name}, lambda name=name: memoryview(content[name]))  # type: ignore[misc]
    sender.send({"name": "message"})
    frames = [take(theirs) for _ in range(9)]
    sender.close()
    assert [name for name, _ in frames] == ["message", *"abababab"]
    for name in "ab":
        assert b"".join(part for other, part in frames if other == name) == content[name]


def test_a_transfer_is_never_faster_than_its_bandwidth(ends: Ends) -> None:
    ours, theirs = ends
    size, bytes_per_s = 5 * CHUNK_BYTES + 1, 4e6
    sender = Sender(ours, failed, bytes_per_s=bytes_per_s)
    for _ in range(2):  # an idle link saves nothing up
        time.sleep(2 * BURST_S)
        start_s = time.monotonic()
        sender.carry({"name": "a"}, lambda: memoryview(bytes(size)))
        assert sum(len(take(theirs)[1]) for _ in range(6)) == size
        assert time.monotonic() - start_s >= size / bytes_per_s
    sender.close()


def test_a_transfer_of_nothing_is_one_empty_frame(ends: Ends) -> None:
    ours, theirs = ends
    sender = Sender(ours, failed, bytes_per_s=1.0)
    sender.carry({"name": "none"}, lambda: memoryview(b""))
    assert take(theirs) == ("none", b"")
    sender.close()


def test_a_sender_that_closes_at_once_does_not_send_the_rest(ends: Ends) -> None:
    ours, theirs = ends
    sender = Sender(ours, failed, bytes_per_s=1e5)
    sender.carry({"name": "long"}, lambda: memoryview(bytes(10**9)))
    sender.close(complete=False)
    ours.close()
    with pytest.raises(LinkError, match="ours has gone"):
        [take(theirs) for _ in range(3)]


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (struct.pack("!I", MOST_HEADER_BYTES + 1), "at most"),
        (struct.pack("!I", 3) + b"{]}", "not JSON"),
        (struct.pack("!I", 2) + b"[]", "not an object"),
        (struct.pack("!I", 2) + b"{}", "not an object with an integer"),
        *[
            (struct.pack("!I", len(text)) + text, message)
            for text, message in (
                (b'{"bytes": true}', "an integer"),
                (b'{"bytes": NaN}', "an integer"),
                (b'{"bytes": Infinity}', "an integer"),
                (b'{"bytes": 1.0}', "an integer"),
                (b'{"bytes": "1"}', "an integer"),
                (b'{"bytes": null}', "an integer"),
                (b'{"bytes": -1}', "from 0 to"),
                (b'{"bytes": 99999999999999999999}', "from 0 to"),
                (b'{"bytes": ' + str(MOST_PAYLOAD_BYTES + 1).encode() + b"}", "from 0 to"),
                (b'{"bytes": ' + b"9" * 5000 + b"}", "not JSON"),
                (b"[" * 100_000, "not JSON"),
                (b'{"a":' * 50_000 + b"0" + b"}" * 50_000, "not JSON"),
                (b"\xff\xfe{}", "not JSON"),
            )
        ],
        (b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n", "at most"),
        (b"\xff\xff\xff\xff", "at most"),
        (b"\x00", "ours has gone"),
        (b"", "ours has gone"),
        (struct.pack("!I", 90) + b"{", "ours has gone"),
    ],
)
def test_bytes_that_are_not_a_frame_are_an_error(ends: Ends, raw: bytes, message: str) -> None:
    ours, theirs = ends
    ours._socket.sendall(raw)
    ours.close()
    with pytest.raises(LinkError, match=message):
        theirs.receive()


def test_sending_to_a_side_that_has_gone_is_an_error(ends: Ends) -> None:
    ours, theirs = ends
    theirs.close()
    with pytest.raises(LinkError, match="theirs has gone"):
        [ours.send({"name": "a"}, memoryview(bytes(CHUNK_BYTES))) for _ in range(100)]


def test_a_side_that_never_reads_is_an_error_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_link, "SEND_S", 0.1)
    ours, theirs = socket.socketpair()
    channel = Channel(ours, "theirs")
    with pytest.raises(LinkError, match="theirs has read nothing for"):
        [channel.send({"name": "a"}, memoryview(bytes(CHUNK_BYTES))) for _ in range(1000)]
    channel.close()
    theirs.close()


def test_a_half_closed_connection_still_carries_frames_the_other_way(ends: Ends) -> None:
    ours, theirs = ends
    ours.send({"name": "last"})
    ours._socket.shutdown(socket.SHUT_WR)
    assert take(theirs) == ("last", b"")
    with pytest.raises(LinkError, match="ours has gone"):
        theirs.receive()
    theirs.send({"name": "answer"})
    assert take(ours) == ("answer", b"")


def test_a_link_needs_a_bandwidth() -> None:
    check_link(None, 0.0)
    for bytes_per_s, latency_s in ((0.0, 0.0), (1e6, -1.0)):
        with pytest.raises(ConfigError, match="null for as fast"):
            check_link(bytes_per_s, latency_s)
