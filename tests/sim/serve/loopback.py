"""The simulated server on loopback, for tests."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import uvicorn
from omegaconf import DictConfig, OmegaConf

from sim.config import compose_config
from sim.serve.server import SimulatedServerConfig, build_api
from sim.serve.simulated_api import SimulatedApi
from sim.serve.simulated_thread import SimulatedThread

RECORDED = ("serve.records=true", "serve.speed=20")


@dataclass
class Server:
    """A running server: its configuration, its engine and its HTTP side, and a client."""

    cfg: DictConfig
    thread: SimulatedThread
    api: SimulatedApi
    http: httpx.Client

    def ask(self, path: str = "completions", **body: Any) -> httpx.Response:
        return self.http.post(f"/v1/{path}", json=body)

    def metrics(self) -> dict[str, float]:
        """Return the metrics by name; the reason of an end is appended to its name."""
        found = {}
        for line in self.http.get("/metrics").text.splitlines():
            name, _, value = line.rpartition(" ")
            if not line.startswith("#") and "_bucket" not in name:
                reason = name.partition('finished_reason="')[2].partition('"')[0]
                found[name.partition("{")[0] + reason] = float(value)
        return found

    def drained(self) -> None:
        """Wait until all requests have ended."""
        eventually(lambda: self.thread.in_flight == 0, "not every request has ended")


def built(*overrides: str) -> tuple[DictConfig, SimulatedApi, SimulatedThread]:
    """Return a configuration of ``python -m sim.serve``, and a started engine with its HTTP side."""
    cfg = compose_config("sim_serve", overrides)
    config = SimulatedServerConfig.of(OmegaConf.to_container(cfg.serve, resolve=True))
    return cfg, *build_api(cfg, config)


@contextmanager
def serving(*overrides: str) -> Iterator[Server]:
    """Serve a configuration on a free port until the block ends."""
    cfg, api, thread = built(*overrides)
    running = uvicorn.Server(uvicorn.Config(api.app, host="127.0.0.1", port=0, log_level="error"))
    listener = threading.Thread(target=running.run, daemon=True)
    listener.start()
    eventually(lambda: running.started, "the server did not start")
    port = running.servers[0].sockets[0].getsockname()[1]
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            yield Server(cfg, thread, api, client)
    finally:
        running.should_exit = True
        listener.join(timeout=10)
        thread.stop()


def eventually(holds: Callable[[], bool], what: str, within_s: float = 60.0) -> None:
    """Wait until something holds."""
    end_s = time.monotonic() + within_s
    while not holds():
        assert time.monotonic() < end_s, what
        time.sleep(0.005)
