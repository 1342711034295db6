"""A server over the tiny model, on loopback, for tests; and a tokenizer whose tokens are letters."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import httpx
import uvicorn

from hw.engine.clock import RealClock
from hw.engine.hw_engine import HwEngine
from hw.serve.server import Api, ServerConfig
from sim.cost.plan import dense_plan
from sim.policies import Fixed, Policy
from sim.serve.engine_thread import EngineThread
from tests.hw.serving import VOCABULARY, hw_engine, requests, tiny_spec

EOS = 3


class Letters:
    """A tokenizer of letters."""

    eos_token_id = EOS

    def __call__(self, text: str, verbose: bool = True) -> SimpleNamespace:
        return SimpleNamespace(input_ids=[ord(letter) % VOCABULARY for letter in text])

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return "".join(chr(192 + i) for i in ids)


@dataclass
class Server:
    """A running server: where it listens, its engine, its HTTP side, and a client."""

    url: str
    thread: EngineThread
    api: Api
    http: httpx.Client

    def ask(self, path: str = "completions", **body: Any) -> Any:
        return self.http.post(f"/v1/{path}", json=body)


def engine_thread(policy: Policy | None = None, tick_s: float = 1.0, **more: Any) -> EngineThread:
    """Return a started thread over the tiny model; ``more`` goes to ``hw_engine``."""
    clock = RealClock("wall")

    def build(thread: EngineThread) -> HwEngine:
        arguments = {"kv_blocks": 40, **more}
        return hw_engine(
            timed=False,
            clock=clock,
            ends=thread.ends,
            sampling=thread.sampling,
            on_token=thread.on_token,
            own_prompts=thread.prompt,
            **arguments,
        )

    return EngineThread(build, policy or Fixed(dense_plan(tiny_spec())), clock, eos=EOS, tick_s=tick_s)


@contextmanager
def serving(tokenizer: Any = None, config: ServerConfig | None = None, **more: Any) -> Iterator[Server]:
    """Serve on a free port until the block ends; ``more`` goes to ``engine_thread``."""
    thread = engine_thread(**more)
    api = Api(thread, tiny_spec(), tokenizer or Letters(), config or ServerConfig(max_tokens=60))
    running = uvicorn.Server(uvicorn.Config(api.app, host="127.0.0.1", port=0, log_level="error"))
    listener = threading.Thread(target=running.run, daemon=True)
    listener.start()
    while not running.started:
        time.sleep(0.01)
    port = running.servers[0].sockets[0].getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    try:
        with httpx.Client(base_url=url, timeout=60) as client:
            yield Server(url, thread, api, client)
    finally:
        running.should_exit = True
        listener.join(timeout=10)
        thread.stop()


def alone(prompt: list[int], output: int) -> list[int]:
    """Return the tokens that the engine produces for one prompt without other requests."""
    engine = hw_engine(own_prompts=lambda *_: prompt)
    engine.submit(requests([(0.0, len(prompt), output)]))
    engine.run_until(float("inf"))
    return engine.tokens(0)


def eventually(holds: Callable[[], bool], what: str, within_s: float = 60.0) -> None:
    """Wait until something holds."""
    end_s = time.monotonic() + within_s
    while not holds():
        assert time.monotonic() < end_s, what
        time.sleep(0.005)
