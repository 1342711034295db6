"""A real browser without a window, driven over Chromium's own protocol: nothing to install besides Chromium."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "microsoft-edge")
ANSWER_S = 60.0
"""Longest wait for an answer, on a machine that is busy."""


def find_browser() -> str | None:
    """Return the path of a Chromium-like browser; None if none is installed."""
    return next((found for name in NAMES if (found := shutil.which(name))), None)


class Page:
    """One page, and what it did: errors, messages of the console, and the addresses that it asked for."""

    def __init__(self, write: int, read: int) -> None:
        self.write, self.read, self.number, self.rest = write, read, 0, b""
        self.session: str | None = None
        self.events: list[dict[str, Any]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Send a command and return its result; events that come before it are kept."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        if self.session is not None:
            message["sessionId"] = self.session
        os.write(self.write, json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != self.number:
            self.events.append(answer)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        result: dict[str, Any] = answer["result"]
        return result

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self.rest:
            if not select.select([self.read], [], [], ANSWER_S)[0]:
                raise TimeoutError("the browser does not answer")
            if not (more := os.read(self.read, 1 << 20)):
                raise RuntimeError("the browser has ended")
            self.rest += more
        line, _, self.rest = self.rest.partition(b"\0")
        message: dict[str, Any] = json.loads(line)
        return message

    def open(self, url: str, ready: str) -> None:
        """Open an address and wait until an expression of JavaScript is true."""
        self.call("Page.navigate", url="about:blank")  # an address that differs in #... alone would not load again
        self.events.clear()
        self.call("Page.navigate", url=url)
        self.wait(ready)

    def wait(self, ready: str) -> None:
        """Wait until an expression of JavaScript is true."""
        until = time.monotonic() + ANSWER_S
        while not self.value(f"Boolean({ready})"):
            if time.monotonic() > until:
                raise TimeoutError(f"not true after {ANSWER_S} s: {ready}; {self.problems()}")
            time.sleep(0.05)

    def value(self, expression: str) -> Any:
        """Return the value of an expression of JavaScript in the page."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in found:
            raise RuntimeError(f"{expression}: {found['exceptionDetails']}")
        return found["result"].get("value")

    def drag(self, start: tuple[float, float], end: tuple[float, float]) -> None:
        """Press the mouse at one point of the window and release it at another."""
        for kind, (x, y) in (
            ("mouseMoved", start),
            ("mousePressed", start),
            ("mouseMoved", ((start[0] + end[0]) / 2, end[1])),
            ("mouseMoved", end),
            ("mouseReleased", end),
        ):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", buttons=1, clickCount=1)

    def screenshot(self) -> bytes:
        """Return the window as PNG."""
        return base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])

    def requests(self) -> list[str]:
        """Return the addresses that the page asked for, other than data that it made itself."""
        urls = [e["params"]["request"]["url"] for e in self.events if e.get("method") == "Network.requestWillBeSent"]
        return [url for url in urls if not url.startswith(("data:", "blob:"))]

    def problems(self) -> list[str]:
        """Return errors of scripts, and what the console and the security policy complained about."""
        kinds = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
        return [json.dumps(e["params"])[:500] for e in self.events if e.get("method") in kinds]


@contextmanager
def open_browser(profile: Path) -> Iterator[Page]:
    """Start a browser without a window; end it afterwards. ``profile`` is an empty folder."""
    browser = find_browser()
    assert browser is not None
    options = (
        "--headless --no-sandbox --disable-gpu --disable-dev-shm-usage --no-first-run --window-size=1300,1200 "
        "--remote-debugging-pipe"
    )
    to_browser, from_browser = os.pipe(), os.pipe()
    # The browser reads 3 and writes 4. Far numbers first, so that neither overwrites the other.
    reads, writes = (fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 50) for end in (to_browser[0], from_browser[1]))

    def give_pipes() -> None:
        os.dup2(reads, 3)
        os.dup2(writes, 4)

    process = subprocess.Popen(
        [browser, *options.split(), f"--user-data-dir={profile}", "about:blank"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        close_fds=False,  # Python's own files do not reach another program
        preexec_fn=give_pipes,
    )
    for end in (reads, writes, to_browser[0], from_browser[1]):
        os.close(end)
    try:
        yield Page(to_browser[1], from_browser[0])
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        for end in (to_browser[1], from_browser[0]):
            os.close(end)
