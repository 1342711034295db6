"""Hostile HTTP over loopback: broken requests, bodies that do not fit their length, and clients that leave."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

from tests.soak.kinds import Case, FaultError
from tests.soak.loopback import Child, exchange, head, raw_exchange, serve
from tests.soak.mutate import mutate_bytes
from tests.soak.request_inputs import MOST_BODY_BYTES, MOST_TOKENS, OTHERS, PATHS, check_answer, hostile_body

LEAVE_SHARE = 0.1
CHECK_EVERY = 50
ANSWER_S = 60.0
HEADERS = (
    *(b"transfer-encoding: chunked\r\n", b"content-length: -1\r\n", b"content-length: 99999999999999999999\r\n"),
    *(b"content-length: 5\r\ncontent-length: 6\r\n", b"expect: 100-continue\r\n", b"upgrade: websocket\r\n"),
    *(b"host: example.org\r\n", b"host: \r\n", b"x: " + b"a" * 70_000 + b"\r\n", b"x\r\n", b"\x00: \x00\r\n"),
    *(b"x: 1\r\n" * 500, b"content-encoding: gzip\r\n", b"connection: upgrade\r\n", b" folded\r\n"),
)
STARTS = (
    *(b"GET / HTTP/9.9\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"\r\n\r\n\r\n"),
    *(
        b"GET http://[::1 HTTP/1.1\r\n\r\n",
        b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\n\r\n",
        b"HELLO\r\n",
        b"\x00" * 500,
    ),
)


class Http:
    """Bytes sent to a server process."""

    name = "HTTP over loopback"

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._child: Child | None = None
        self._fed = 0

    def make(self, rng: random.Random) -> Case:
        """Return the bytes of a request; option ``leave`` closes the connection without waiting for the answer."""
        options = {"leave": rng.random() < LEAVE_SHARE}
        how = rng.random()
        if how < 0.04:
            return Case("start", rng.choice(STARTS), options=options)
        if how < 0.1:
            method, path = rng.choice(OTHERS)
            return Case("other", head(method, path, b""), options=options)
        target = rng.choice(("completions", "completions", "chat", "chat", "plan"))
        body = hostile_body(target if target != "plan" else "chat", rng)
        raw = head("PUT" if target == "plan" else "POST", PATHS[target], body) + body
        if how < 0.4:
            return Case(target, raw, options=options)
        before, _, after = raw.partition(b"content-type")
        if how < 0.65:
            return Case("headers", before + rng.choice(HEADERS) + b"content-type" + after, options=options)
        if how < 0.75:
            return Case("chunks", _chunked(raw, body, rng), options=options)
        return Case("bytes", mutate_bytes(raw[: len(raw) - rng.randrange(20)], rng), options=options)

    def feed(self, case: Case) -> str:
        """Send the bytes; look after some of them whether the server still answers."""
        if self._child is None:
            limits = [f"serve.max_tokens={MOST_TOKENS}", f"serve.max_body_bytes={MOST_BODY_BYTES}", "budget.blocks=96"]
            self._server = serve(self._folder, *limits)
            self._child = self._server.__enter__()
        self._fed += 1
        wait_s = 0.01 if case.options["leave"] else ANSWER_S
        complete = case.target in PATHS or case.target == "other"
        exchanged = raw_exchange(self._child.port, case.content, wait_s=wait_s, ends=not complete)
        status, answer = asyncio.run(exchanged)
        if not self._child.alive():
            printed, self._child = self._child.printed()[-300:], None
            raise FaultError("the server has ended", printed)
        if self._fed % CHECK_EVERY == 0:
            healthy, _ = asyncio.run(exchange(self._child.port, "GET", "/v1/models"))
            if healthy != 200:
                raise FaultError("the server no longer answers", f"status {healthy}")
            if "Traceback" in self._child.printed():
                printed = self._child.printed()
                self._child.log.write_text("")
                raise FaultError("the server printed a traceback", printed[printed.index("Traceback") :][-400:])
        if status == -1 and not case.options["leave"]:
            raise FaultError("no answer", f"in {ANSWER_S:g} s")
        if status >= 500:
            raise FaultError(f"status {status}", answer[:300].decode("utf-8", "replace"))
        # A body above the limit is refused before all of it is read, and the answer may be lost with the connection.
        complete = complete and len(case.content) < MOST_BODY_BYTES
        if complete and status == 0 and not case.options["leave"]:
            raise FaultError("the connection was closed without an answer")
        if case.target in PATHS and status > 0:
            return check_answer(case, status, answer)
        return "accepted" if 200 <= status < 300 else "refused"

    def close(self) -> None:
        """End the server."""
        if self._child is not None:
            self._server.__exit__(None, None, None)


def _chunked(raw: bytes, body: bytes, rng: random.Random) -> bytes:
    """Return a request whose body comes in chunks, of which one may be broken."""
    start = raw[: raw.index(b"content-length")] + b"transfer-encoding: chunked\r\n\r\n"
    pieces = [body[at : at + 50] for at in range(0, min(len(body), 500), 50)]
    chunks = [b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces] + [b"0\r\n\r\n"]
    if rng.random() < 0.7:
        chunks[rng.randrange(len(chunks))] = rng.choice(
            (b"", b"zz\r\n", b"-1\r\n", b"fffffffffffffffff\r\na\r\n", b"5\r\na")
        )
    return start + b"".join(chunks)
