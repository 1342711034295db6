"""Sockets, connections and signals of the server: uvicorn, with a deadline for slow clients and an orderly exit."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import resource
import signal
import socket
from collections.abc import Iterator
from types import FrameType
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from sim.errors import ConfigError
from sim.serve.settings import ServerConfig

BACKLOG = 2048
OWN_FILES = 64
"""Files and sockets that the server needs besides its connections."""

log = logging.getLogger(__name__)


def bind(config: ServerConfig) -> socket.socket:
    """Return a socket that is bound to the server's address and does not listen yet.

    Raises:
        ConfigError: if the address is unknown, or the port is in use.
    """
    try:
        found = socket.getaddrinfo(config.host or None, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        listener = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"serve.host is {config.host!r}, which has no address ({error}); try 127.0.0.1") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise _not_free(config, error) from error
    return listener


def listen(listener: socket.socket, config: ServerConfig) -> None:
    """Listen on a bound socket.

    Raises:
        ConfigError: if another server has begun to listen on the port meanwhile.
    """
    try:
        listener.listen(BACKLOG)
    except OSError as error:
        raise _not_free(config, error) from error


def _not_free(config: ServerConfig, error: OSError) -> ConfigError:
    return ConfigError(
        f"cannot listen on port {config.port} of {config.host} ({error.strerror}); set serve.port to another one, or "
        "to 0 for any free port"
    )


def url_of(listener: socket.socket) -> str:
    """Return the address of a socket as a URL."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def most_connections(wanted: int) -> int:
    """Return how many connections to allow, after raising the process's limit of open files as far as it goes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard == resource.RLIM_INFINITY or soft < hard:
        target = wanted + OWN_FILES if hard == resource.RLIM_INFINITY else min(hard, wanted + OWN_FILES)
        if target > soft:
            with contextlib.suppress(OSError, ValueError):
                resource.setrlimit(resource.RLIMIT_NOFILE, (target, hard))
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return wanted if soft == resource.RLIM_INFINITY else max(1, min(wanted, soft - OWN_FILES))


def protocol_with_deadline(header_timeout_s: float) -> type[H11Protocol]:
    """Return uvicorn's protocol that closes a connection whose request head is not complete in time.

    uvicorn itself has a deadline only between the end of an answer and the first byte of the next request.
    """

    class DeadlineProtocol(H11Protocol):
        _deadline: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(_QuietTransport(transport))  # type: ignore[arg-type]
            self._watch()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._watch()

        def connection_lost(self, exc: Exception | None) -> None:
            self._unwatch()
            super().connection_lost(exc)

        def _watch(self) -> None:
            """Start the deadline where the client has to send something, unless it runs already; else stop it."""
            if not self._is_due():
                self._unwatch()
            elif self._deadline is None:
                self._deadline = self.loop.call_later(header_timeout_s, self._close)

        def _unwatch(self) -> None:
            if self._deadline is not None:
                self._deadline.cancel()
                self._deadline = None

        def _close(self) -> None:
            self._deadline = None
            if self._is_due():
                self.transport.close()

        def _is_due(self) -> bool:
            """Return whether a request head is due, or the rest of a body whose answer has been sent."""
            ours, theirs = self.conn.our_state, self.conn.their_state
            due = theirs is h11.IDLE or (theirs is h11.SEND_BODY and ours is h11.DONE)
            return due and not self.transport.is_closing()

    return DeadlineProtocol


class _QuietTransport:
    """A transport that drops what is written after its connection broke.

    uvicorn hears of it one turn of the event loop later, and asyncio logs a warning for each event of a stream that is
    written until then.
    """

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        if not self._transport.is_closing():
            self._transport.write(data)


class OrderlyServer(uvicorn.Server):
    """A server that answers what is under way after SIGTERM or SIGINT, and ends at once after a second one."""

    def __init__(self, app: Any, listener: socket.socket, config: ServerConfig, greeting: str) -> None:
        """Serve an app on a socket that listens; print the greeting once it does."""
        super().__init__(
            uvicorn.Config(
                app,
                http=protocol_with_deadline(config.header_timeout_s),
                ws="none",
                lifespan="off",
                log_level="warning",
                backlog=BACKLOG,
                limit_concurrency=most_connections(config.max_connections),
                timeout_graceful_shutdown=max(1, round(config.drain_s)),
                server_header=False,
            )
        )
        self._listener, self._greeting = listener, greeting

    def serve_until_stopped(self) -> None:
        """Serve until a signal comes, then until all answers are complete."""
        self.run(sockets=[self._listener])

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start, and say so."""
        await super().startup(sockets)
        print(self._greeting, flush=True)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop; the second time at once."""
        if self.should_exit:
            _say("ended at once, without the answers under way")
            os._exit(128 + sig)
        self.should_exit = True
        _say("stopping when the answers under way are complete; a second signal ends at once")


def _say(message: str) -> None:
    """Write a line to stderr from a signal handler, which may interrupt a write of ``print``."""
    with contextlib.suppress(OSError):
        os.write(2, f"{message}\n".encode())


class Stopped(SystemExit):
    """A signal ended the process while nothing was under way."""


@contextlib.contextmanager
def exit_on_signal() -> Iterator[None]:
    """Let SIGTERM or SIGINT end the process with status 0 before and after the server serves: nothing is under way."""

    def leave(_number: int, _frame: FrameType | None) -> None:
        raise Stopped(0)

    before = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
