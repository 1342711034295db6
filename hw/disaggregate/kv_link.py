"""Sends KV between two processes: frames over a socket, and transfers that share a bandwidth.

A frame is the length of its header (four bytes), the header (a JSON object), and as many raw bytes as the header's
``bytes`` says. Nothing that arrives is ever unpickled, and both lengths are limited before anything is allocated.
hw/disaggregate/hello.py says who may send frames. ``sim.disaggregate.links`` simulates the same sharing.
"""

from __future__ import annotations

import contextlib
import json
import math
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sim.errors import ConfigError, RapLabError

CHUNK_BYTES = 32 * 1024
"""How much one transfer sends before the next one has its turn."""
BURST_S = 0.05
"""Depth of the sender's token bucket, in seconds of bandwidth: how much it may catch up after a delay."""
MOST_HEADER_BYTES = 16 * 2**20
"""Of a header: that of an offer lists the tokens of a prompt."""
MOST_PAYLOAD_BYTES = CHUNK_BYTES
"""Of the raw bytes of a frame."""
SEND_S = 60.0
"""How long a send may wait for the other side to read."""
LENGTH = struct.Struct("!I")
"""The length of a header, as it is sent."""

Header = dict[str, Any]


class LinkError(RapLabError):
    """The other side of a link has closed it, or sent something that is not a frame."""


class Channel:
    """One end of a connection. At any time, one thread may send and one thread may receive.

    sent_bytes: raw bytes sent so far. header_bytes: bytes of headers and their lengths sent so far.
    """

    def __init__(self, connection: socket.socket, other: str) -> None:
        """Take over a connected socket; ``other`` names the other side in errors."""
        if connection.family in (socket.AF_INET, socket.AF_INET6):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        limit = struct.pack("@ll", int(SEND_S), int(SEND_S % 1 * 1e6))  # seconds and microseconds
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
        self._socket, self.other = connection, other
        self.sent_bytes = self.header_bytes = 0
        self._deadline_s: float | None = None

    def send(self, header: Header, payload: memoryview | None = None) -> None:
        """Send a frame.

        Raises:
            LinkError: if the other side has closed the connection, or does not read.
        """
        count = len(payload) if payload is not None else 0
        text = json.dumps({**header, "bytes": count}).encode()
        assert count <= MOST_PAYLOAD_BYTES
        try:
            self._socket.sendall(LENGTH.pack(len(text)) + text)
            if payload is not None:
                self._socket.sendall(payload)
        except (BlockingIOError, TimeoutError) as error:
            raise LinkError(f"{self.other} has read nothing for {SEND_S:g} s") from error
        except OSError as error:
            raise self._gone() from error
        self.header_bytes += 4 + len(text)
        self.sent_bytes += count

    def receive(self, *, most_bytes: int = MOST_HEADER_BYTES, within_s: float | None = None) -> Header:
        """Return the header of the next frame; receive its bytes with ``fill``.

        Args:
            most_bytes: how long the header may be.
            within_s: seconds that the header may take altogether; None for no limit.
        Raises:
            LinkError: if the other side has closed the connection, or sent something that is not a header, or too late.
        """
        self._deadline_s = None if within_s is None else time.monotonic() + within_s
        (length,) = LENGTH.unpack(self._exactly(LENGTH.size))
        if length > most_bytes:
            raise LinkError(f"{self.other} sent a header of {length} bytes; at most {most_bytes} are allowed")
        header = read_header(self._exactly(length), self.other)
        self._deadline_s = None
        self._socket.settimeout(None)
        return header

    def fill(self, place: memoryview) -> None:
        """Receive raw bytes until ``place`` is full."""
        try:
            while place:
                if self._deadline_s is not None:
                    # A timeout of 0 would be a non-blocking socket.
                    self._socket.settimeout(max(self._deadline_s - time.monotonic(), 1e-3))
                count = self._socket.recv_into(place)
                if not count:
                    raise self._gone()
                place = place[count:]
        except TimeoutError as error:
            raise LinkError(f"{self.other} did not send its header in time") from error
        except OSError as error:
            raise self._gone() from error

    def close(self) -> None:
        """Close the connection; a thread that waits for a frame gets a LinkError."""
        with contextlib.suppress(OSError):  # the other side has closed it already
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _exactly(self, count: int) -> bytes:
        found = bytearray(count)
        self.fill(memoryview(found))
        return bytes(found)

    def _gone(self) -> LinkError:
        return LinkError(f"{self.other} has gone: it closed the connection")


def read_header(raw: bytes, other: str) -> Header:
    """Read the header of a frame.

    Raises:
        LinkError: for anything but a JSON object with the length of a payload; ``other`` is who sent it.
    """
    try:
        header = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise LinkError(f"{other} sent a header that is not JSON: {error}") from error
    count = header.get("bytes") if isinstance(header, dict) else None
    if not isinstance(count, int) or isinstance(count, bool):
        raise LinkError(f"{other} sent a header that is not an object with an integer ``bytes``")
    if not 0 <= count <= MOST_PAYLOAD_BYTES:
        raise LinkError(
            f"{other} sent a frame with a payload of {count} bytes; from 0 to {MOST_PAYLOAD_BYTES} are allowed"
        )
    assert isinstance(header, dict)
    return header


@dataclass(slots=True, eq=False)
class _Transfer:
    """One transfer. load: returns its bytes, called when the first one may leave. from_s: the earliest moment for that.

    left: bytes not sent yet; None before ``load``.
    """

    header: Header
    load: Callable[[], memoryview]
    from_s: float
    left: memoryview | None = None


class Sender:
    """A thread that sends over a channel: messages at once, and the bytes of transfers at a limited bandwidth.

    Transfers take turns of one chunk, so that they share the bandwidth equally, as in ``sim.disaggregate.links``.
    """

    def __init__(
        self,
        channel: Channel,
        failed: Callable[[BaseException], None],
        *,
        bytes_per_s: float | None = None,
        latency_s: float = 0.0,
    ) -> None:
        """Start the thread with nothing to send.

        Args:
            channel: where to send; nothing else may send over it.
            failed: called by the thread with the error that ends it.
            bytes_per_s: bandwidth of all transfers together; None for no limit.
            latency_s: seconds between ``carry`` and the first byte of a transfer.
        """
        self._channel, self._failed = channel, failed
        self._bytes_per_s = bytes_per_s if bytes_per_s is not None else math.inf
        self._latency_s = latency_s
        self._changed = threading.Condition()
        self._messages: deque[Header] = deque()
        self._coming: deque[_Transfer] = deque()
        self._closing = self._abandoned = False
        # Only the thread uses these.
        self._under_way: deque[_Transfer] = deque()
        self._free_s = -math.inf  # when the link has carried everything sent so far
        self._thread = threading.Thread(target=self._run, name="sender", daemon=True)
        self._thread.start()

    def send(self, header: Header) -> None:
        """Send a message, before all bytes of transfers that have not left yet."""
        with self._changed:
            self._messages.append(header)
            self._changed.notify()

    def carry(self, header: Header, load: Callable[[], memoryview]) -> None:
        """Send the bytes that ``load`` returns, in frames with this header; the thread of the sender calls ``load``."""
        with self._changed:
            self._coming.append(_Transfer(header, load, time.monotonic() + self._latency_s))
            self._changed.notify()

    def close(self, *, complete: bool = True) -> None:
        """End the thread; with ``complete``, send everything that is left first."""
        with self._changed:
            self._closing = True
            if not complete:
                self._messages.clear()
                self._coming.clear()
                self._abandoned = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        try:
            while (turn := self._next()) is not None:
                if not isinstance(turn, _Transfer):
                    self._channel.send(turn)
                elif turn.left is None:
                    self._begin(turn)
                else:
                    self._channel.send(turn.header, turn.left[:CHUNK_BYTES])
                    turn.left = turn.left[CHUNK_BYTES:]
                    if turn.left:
                        self._under_way.append(turn)
        except BaseException as error:
            self._failed(error)

    def _begin(self, transfer: _Transfer) -> None:
        """Load a transfer and let it take turns; an empty one is sent at once."""
        transfer.left = transfer.load()
        if not transfer.left:
            self._channel.send(transfer.header)
            return
        if not self._under_way:
            # Bandwidth that was not used while the link was idle is lost.
            self._free_s = max(self._free_s, transfer.from_s)
        self._under_way.append(transfer)

    def _next(self) -> Header | _Transfer | None:
        """Wait for and return the next message or transfer to send; None when the thread should end."""
        with self._changed:
            while True:
                now_s = time.monotonic()
                if self._abandoned:
                    return None
                if self._messages:
                    return self._messages.popleft()
                next_s = self._coming[0].from_s if self._coming else math.inf
                if next_s <= now_s:
                    return self._coming.popleft()
                if self._under_way:
                    left = self._under_way[0].left
                    assert left
                    due_s = self._free_s + min(len(left), CHUNK_BYTES) / self._bytes_per_s
                    if due_s <= now_s:
                        # After a delay the sender may catch up, but only by BURST_S.
                        self._free_s = max(due_s, now_s - BURST_S)
                        return self._under_way.popleft()
                    next_s = min(next_s, due_s)
                elif self._closing and math.isinf(next_s):
                    return None
                self._changed.wait(next_s - now_s if math.isfinite(next_s) else None)


def check_link(bytes_per_s: float | None, latency_s: float) -> None:
    """Check the settings of a link.

    Raises:
        ConfigError: for a bandwidth that is not above 0, or a latency below 0.
    """
    if (bytes_per_s is not None and not bytes_per_s > 0) or not latency_s >= 0:
        raise ConfigError(
            f"link_bytes_per_s is {bytes_per_s} and link_latency_s {latency_s}; link_bytes_per_s must be above 0, or "
            "null for as fast as the socket allows, and link_latency_s at least 0"
        )
