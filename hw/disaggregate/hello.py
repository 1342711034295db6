"""Who may use a link: the first frame of each side proves that it knows the secret of the run.

The prefill process connects and sends ``hello`` with its key; the decode process answers ``welcome`` with its own. Both
keys come from one secret that only the parent and its two processes know, so no other process of the machine is taken
for one of them. A stranger can neither end the decode process nor keep it from accepting the prefill process.
"""

from __future__ import annotations

import hmac
import logging
import selectors
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from hw.disaggregate.kv_link import LENGTH, Channel, Header, LinkError, read_header

HELLO_S = 10.0
"""Seconds from a new connection to the end of its first frame."""
MOST_HELLO_BYTES = 1000
"""Of the header of a first frame."""
MOST_GREETINGS = 32
"""How many connections may be about to send their first frame; the oldest gives way to a newer one."""
LOOK_S = 0.1
"""How often the wait for a connection looks whether it should end."""
RETRY_S = 0.1
"""Pause after an accept that failed, as it does without a free file descriptor."""

log = logging.getLogger(__name__)


def key_of(secret: str, stage: str) -> str:
    """Return the key with which a stage proves itself; the other stage's key cannot be found from it."""
    return hmac.new(secret.encode(), stage.encode(), "sha256").hexdigest()


def proves(header: Header, kind: str, key: str) -> bool:
    """Return whether a first frame is of this kind and has this key."""
    shown = header.get("key")
    if header.get("kind") != kind or not isinstance(shown, str):
        return False
    return hmac.compare_digest(shown.encode(errors="replace"), key.encode())


@dataclass(slots=True, eq=False)
class _Greeting:
    """A connection that has not sent its first frame completely. deadline_s: when it is dropped, by time.monotonic."""

    connection: socket.socket
    deadline_s: float
    content: bytearray = field(default_factory=bytearray)

    def read(self) -> Header | None:
        """Read what has come; return the header once it is complete.

        Raises:
            LinkError: for a first frame that is not one, is too long, or ends early.
        """
        wanted = LENGTH.size
        if len(self.content) >= LENGTH.size:
            wanted += self._length()
        part = self.connection.recv(wanted - len(self.content))
        if not part:
            raise LinkError("it closed the connection")
        self.content += part
        if len(self.content) < LENGTH.size or len(self.content) < LENGTH.size + self._length():
            return None
        header = read_header(bytes(self.content[LENGTH.size :]), "it")
        if header["bytes"]:
            raise LinkError("its first frame has a payload")
        return header

    def _length(self) -> int:
        length: int = LENGTH.unpack(self.content[: LENGTH.size])[0]
        if not 0 < length <= MOST_HELLO_BYTES:
            raise LinkError(f"its first frame has {length} bytes; at most {MOST_HELLO_BYTES} are allowed")
        return length


def accept_with_key(server: socket.socket, key: str, other: str, stopped: Callable[[], bool]) -> Channel | None:
    """Wait for a connection whose first frame has the key; refuse all others.

    Args:
        server: a listening socket.
        other: names the other side in errors.
        stopped: called from time to time; returns whether to give up.
    Returns:
        The connection, or None if stopped.
    """
    with selectors.DefaultSelector() as selector:
        server.setblocking(False)
        selector.register(server, selectors.EVENT_READ)
        greetings: dict[int, _Greeting] = {}

        def drop(greeting: _Greeting, reason: object) -> None:
            log.warning("refused a connection to the KV link: %s", reason)
            forget(greeting).close()

        def forget(greeting: _Greeting) -> socket.socket:
            selector.unregister(greeting.connection)
            return greetings.pop(greeting.connection.fileno()).connection

        try:
            while not stopped():
                for ready, _ in selector.select(LOOK_S):
                    if ready.fileobj is server:
                        if len(greetings) >= MOST_GREETINGS:
                            drop(next(iter(greetings.values())), "others came before it sent its first frame")
                        _accept(server, selector, greetings)
                        continue
                    greeting = greetings.get(ready.fd)
                    if greeting is None:  # dropped in this round
                        continue
                    try:
                        header = greeting.read()
                        if header is not None and not proves(header, "hello", key):
                            raise LinkError("it does not have the key")
                    except (OSError, LinkError) as error:
                        drop(greeting, error)
                        continue
                    if header is not None:
                        connection = forget(greeting)
                        connection.setblocking(True)
                        return Channel(connection, other)
                for greeting in [g for g in greetings.values() if g.deadline_s < time.monotonic()]:
                    drop(greeting, f"it did not send its first frame within {HELLO_S:g} s")
        finally:
            for greeting in greetings.values():
                greeting.connection.close()
    return None


def _accept(server: socket.socket, selector: selectors.BaseSelector, greetings: dict[int, _Greeting]) -> None:
    """Accept a connection and wait for its first frame."""
    try:
        connection, _ = server.accept()
    except BlockingIOError:  # it has gone again
        return
    except OSError as error:
        log.warning("could not accept a connection to the KV link: %s", error)
        time.sleep(RETRY_S)
        return
    connection.setblocking(False)
    selector.register(connection, selectors.EVENT_READ)
    greetings[connection.fileno()] = _Greeting(connection, time.monotonic() + HELLO_S)


def connect_with_key(address: tuple[str, int], secret: str, other: str) -> Channel:
    """Connect to the decode process, prove who this is, and check that it is the decode process.

    Raises:
        LinkError: if nothing listens there, or the other side does not prove itself within ``HELLO_S``.
    """
    try:
        connection = socket.create_connection(address, timeout=HELLO_S)
    except OSError as error:
        raise LinkError(f"no connection to {other}: {error}") from error
    channel = Channel(connection, other)
    try:
        channel.send({"kind": "hello", "key": key_of(secret, "prefill")})
        header = channel.receive(most_bytes=MOST_HELLO_BYTES, within_s=HELLO_S)
        if not proves(header, "welcome", key_of(secret, "decode")):
            raise LinkError(f"what listens at port {address[1]} is not {other}: it does not have the key")
    except BaseException:
        channel.close()
        raise
    return channel


def welcome(channel: Channel, secret: str) -> None:
    """Prove to an accepted prefill process that this is the decode process."""
    channel.send({"kind": "welcome", "key": key_of(secret, "decode")})
