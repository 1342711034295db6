"""KV between two processes: frames over a socket, and a sender whose transfers share a bandwidth, as in ``sim.disaggregate.links``.

A frame is four bytes with the length of a header, the header (a JSON object; its ``bytes`` says how many follow), and
so many raw bytes. Nothing that arrives is ever unpickled.
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
"""What one transfer sends before the next one has its turn."""
BURST_S = 0.05
"""How much of the bandwidth a sender that was late may catch up with: the depth of its token bucket, in seconds."""
MOST_HEADER_BYTES = 16 * 2**20

Header = dict[str, Any]


class LinkError(RapLabError):
    """The other side of a link has gone, or sent what is no frame."""


class Channel:
    """One end of a connection. One thread may send and one may receive at a time.

    sent_bytes, header_bytes: raw bytes sent so far, and those of headers and their lengths.
    """

    def __init__(self, connection: socket.socket, other: str) -> None:
        """Take over a connected socket; ``other`` is what errors call the other side."""
        if connection.family in (socket.AF_INET, socket.AF_INET6):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket, self.other = connection, other
        self.sent_bytes = self.header_bytes = 0

    def send(self, header: Header, payload: memoryview | None = None) -> None:
        """Send a frame.

        Raises:
            LinkError: when the other side has gone.
        """
        count = len(payload) if payload is not None else 0
        text = json.dumps({**header, "bytes": count}).encode()
        try:
            self._socket.sendall(struct.pack("!I", len(text)) + text)
            if payload is not None:
                self._socket.sendall(payload)
        except OSError as error:
            raise self._gone() from error
        self.header_bytes += 4 + len(text)
        self.sent_bytes += count

    def receive(self) -> Header:
        """Return the header of the next frame; ``fill`` then takes its bytes.

        Raises:
            LinkError: when the other side has gone, or sent what is no header.
        """
        (length,) = struct.unpack("!I", self._exactly(4))
        if length > MOST_HEADER_BYTES:
            raise LinkError(f"{self.other} sent a header of {length} bytes; at most {MOST_HEADER_BYTES} are allowed")
        try:
            header = json.loads(self._exactly(length))
        except ValueError as error:
            raise LinkError(f"{self.other} sent a header that is no JSON: {error}") from error
        if not isinstance(header, dict) or not isinstance(header.get("bytes"), int):
            raise LinkError(f"{self.other} sent a header that is no object with a number of bytes")
        return header

    def fill(self, place: memoryview) -> None:
        """Receive raw bytes into a place until it is full."""
        try:
            while place:
                count = self._socket.recv_into(place)
                if not count:
                    raise self._gone()
                place = place[count:]
        except OSError as error:
            raise self._gone() from error

    def close(self) -> None:
        """Close the connection; who waits for a frame hears of it."""
        with contextlib.suppress(OSError):  # where the other side was faster
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _exactly(self, count: int) -> bytes:
        found = bytearray(count)
        self.fill(memoryview(found))
        return bytes(found)

    def _gone(self) -> LinkError:
        return LinkError(f"{self.other} has gone: the connection to it is closed")


@dataclass(slots=True, eq=False)
class _Transfer:
    """Bytes on their way: asked for once its first one may leave, then sent in turns."""

    header: Header
    load: Callable[[], memoryview]
    from_s: float
    left: memoryview | None = None


class Sender:
    """A thread that sends over a channel: messages at once, and the bytes of transfers at a bandwidth.

    Transfers under way have turns of one chunk, so that they share the bandwidth equally, as in ``sim.disaggregate.links``.
    """

    def __init__(
        self,
        channel: Channel,
        failed: Callable[[BaseException], None],
        *,
        bytes_per_s: float | None = None,
        latency_s: float = 0.0,
    ) -> None:
        """Begin with nothing to send.

        Args:
            channel: nobody else sends over it.
            failed: called by the thread when it cannot go on.
            bytes_per_s: of all transfers together; None for as fast as they go.
            latency_s: how long after ``carry`` the first byte of a transfer leaves.
        """
        self._channel, self._failed = channel, failed
        self._bytes_per_s = bytes_per_s if bytes_per_s is not None else math.inf
        self._latency_s = latency_s
        self._changed = threading.Condition()
        self._messages: deque[Header] = deque()
        self._coming: deque[_Transfer] = deque()
        self._closing = self._abandoned = False
        # The thread's own.
        self._under_way: deque[_Transfer] = deque()
        self._free_s = -math.inf  # when all that was sent so far is carried
        self._thread = threading.Thread(target=self._run, name="sender", daemon=True)
        self._thread.start()

    def tell(self, header: Header) -> None:
        """Send a message, before any byte of a transfer that has not left."""
        with self._changed:
            self._messages.append(header)
            self._changed.notify()

    def carry(self, header: Header, load: Callable[[], memoryview]) -> None:
        """Send the bytes that ``load`` returns, in frames with this header; the sender's thread calls it."""
        with self._changed:
            self._coming.append(_Transfer(header, load, time.monotonic() + self._latency_s))
            self._changed.notify()

    def close(self, *, whole: bool = True) -> None:
        """End; with ``whole`` what is left is sent before."""
        with self._changed:
            self._closing = True
            if not whole:
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
        transfer.left = transfer.load()
        if not transfer.left:
            self._channel.send(transfer.header)
            return
        if not self._under_way:
            self._free_s = max(self._free_s, transfer.from_s)
        self._under_way.append(transfer)

    def _next(self) -> Header | _Transfer | None:
        """Return the message or the transfer whose turn it is, as soon as that is due; None when all is over."""
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
                        # One that was late may catch up, but not with all that it could have sent in that time.
                        self._free_s = max(due_s, now_s - BURST_S)
                        return self._under_way.popleft()
                    next_s = min(next_s, due_s)
                elif self._closing and math.isinf(next_s):
                    return None
                self._changed.wait(next_s - now_s if math.isfinite(next_s) else None)


def check_link(bytes_per_s: float | None, latency_s: float) -> None:
    """Check what a link is asked to be.

    Raises:
        ConfigError: for a bandwidth that is not above 0, or a latency below 0.
    """
    if (bytes_per_s is not None and not bytes_per_s > 0) or not latency_s >= 0:
        raise ConfigError(
            f"link_bytes_per_s is {bytes_per_s} and link_latency_s {latency_s}; the first must be above 0, or null for "
            "as fast as the socket goes, the second at least 0"
        )
