"""Hostile requests to the server, in this process: the routes of ``hw.serve`` over a tiny random model."""

from __future__ import annotations

import asyncio
import json
import random
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from hw.elastic.model import ElasticModel
from hw.engine.clock import RealClock
from hw.engine.hw_engine import HwEngine
from hw.serve.server import Api, ServerConfig
from sim.cost.memory import budget_for_kv_blocks
from sim.cost.plan import dense_plan
from sim.policies import Fixed
from sim.serve.engine_thread import EngineThread
from tests.hw.serving import engine_config
from tests.soak.kinds import Case, FaultError
from tests.soak.mutate import JSON_VALUES, edge_value, mutate_json, mutate_text, to_json
from tests.soak.plan_inputs import Plans
from tests.soak.tiny_checkpoint import SPEC, random_model, tokenizer

KV_BLOCKS = 40
MOST_BODY_BYTES = 150_000
MOST_TOKENS = 6
ANSWER_S = 60.0
COMMON: dict[str, Any] = {
    "model": "tiny",
    "max_tokens": 3,
    "stream": True,
    "stream_options": {"include_usage": True},
    "ignore_eos": True,
    "n": 1,
    "best_of": 1,
    "temperature": 0.7,
    "top_p": 0.9,
    "top_k": 5,
    "seed": 3,
    "stop": ["a", "b"],
    "echo": False,
    "logprobs": None,
    "suffix": None,
    "logit_bias": {},
    "presence_penalty": 0,
    "frequency_penalty": 0.0,
    "user": "someone",
    "tools": [],
    "response_format": {"type": "text"},
    "max_completion_tokens": 3,
    "top_logprobs": 0,
    "min_tokens": 1,
}
PROMPTS: tuple[Any, ...] = ("two words", [1, 2, 3], [[4, 5]], ["one", "two"], [[1], [2, 3]], "é☃\ud83d\ude00")
MESSAGES: tuple[Any, ...] = (
    [{"role": "user", "content": "hello"}],
    [{"role": "system", "content": "be brief"}, {"role": "user", "content": [{"type": "text", "text": "hi"}]}],
    [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}],
)
PATHS = {"completions": "/v1/completions", "chat": "/v1/chat/completions", "plan": "/plan"}
OTHERS = (
    *(("GET", "/v1/models"), ("GET", "/metrics"), ("GET", "/health"), ("GET", "/plan"), ("DELETE", "/plan")),
    *(("GET", "/v1/completions"), ("POST", "/v1/models"), ("GET", "/"), ("GET", "/%00"), ("POST", "/v1//completions")),
    *(("GET", "/docs"), ("GET", "/openapi.json"), ("PATCH", "/plan"), ("HEAD", "/metrics"), ("OPTIONS", "/v1/models")),
)


def body(target: str, rng: random.Random) -> dict[str, Any]:
    """Return a body that is mostly valid."""
    found = {name: json.loads(json.dumps(COMMON[name])) for name in rng.sample(list(COMMON), rng.randrange(6))}
    found.setdefault("max_tokens", rng.randrange(1, MOST_TOKENS))
    choices = PROMPTS if target == "completions" else MESSAGES
    found["prompt" if target == "completions" else "messages"] = json.loads(json.dumps(rng.choice(choices)))
    return found


def hostile_body(target: str, rng: random.Random) -> bytes:
    """Return a body that was changed."""
    content: Any = body(target, rng)
    how = rng.random()
    if how < 0.25:
        content[rng.choice(list(COMMON))] = edge_value(rng)
    elif how < 0.8:
        content = mutate_json(content, rng)
    elif how < 0.9:
        return mutate_text(to_json(content, rng), rng)
    elif how < 0.91:
        return rng.choice((b"", b"null", b"[]", b"{", b"\xff\xfe", b"[" * 100_000, b" " * (MOST_BODY_BYTES + 1)))
    return to_json(content, rng)


class Requests:
    """HTTP requests, without a socket."""

    name = "server requests"

    def __init__(self, folder: Path) -> None:
        self._plans = Plans(folder)
        self._thread, api = small_server()
        self.app = api.app
        self._loop = asyncio.new_event_loop()

    def make(self, rng: random.Random) -> Case:
        """Return a request; its options are method, path and headers."""
        how = rng.random()
        if how < 0.03:
            method, path = rng.choice(OTHERS)
            return Case("other", b"", options={"method": method, "path": path, "headers": []})
        if how < 0.1:
            plan = self._plans.make(rng).content
            return Case("plan", plan, options={"method": "PUT", "path": PATHS["plan"], "headers": []})
        target = rng.choice(("completions", "chat"))
        headers = [] if rng.random() < 0.9 else [(b"content-type", rng.choice((b"text/plain", b"\xff", b"a" * 5000)))]
        options = {"method": "POST", "path": PATHS[target], "headers": headers}
        return Case(target, hostile_body(target, rng), options=options)

    def strategy(self) -> st.SearchStrategy[Case]:
        """Return hypothesis' strategy of bodies."""
        names = ["prompt", "messages", *COMMON]
        values = st.dictionaries(st.sampled_from(names), JSON_VALUES, max_size=5)
        options = {"method": "POST", "headers": []}
        return st.builds(
            lambda target, value: Case(target, json.dumps(value).encode(), options={**options, "path": PATHS[target]}),
            st.sampled_from(["completions", "chat"]),
            values,
        )

    def feed(self, case: Case) -> str:
        """Send the request and check the answer."""
        status, answer = self._loop.run_until_complete(
            asyncio.wait_for(call(self.app, case.content, **case.options), ANSWER_S)
        )
        if self._thread.failure is not None:
            failure = self._thread.failure
            self.close()
            self._thread, api = small_server()
            self.app = api.app
            raise FaultError("the engine has ended", repr(failure))
        return check_answer(case, status, answer)

    def close(self) -> None:
        """End the engine."""
        self._thread.stop()


def check_answer(case: Case, status: int, answer: bytes) -> str:
    """Return accepted or refused; an answer that is neither is a fault."""
    if 200 <= status < 300:
        return "accepted"
    if not 400 <= status < 500:
        raise FaultError(f"status {status}", answer[:300].decode("utf-8", "replace"))
    if case.target == "other":
        return "refused"
    try:
        error = json.loads(answer)["error"]
        message, kind = error["message"], error["type"]
    except (ValueError, KeyError, TypeError):
        raise FaultError(f"status {status} not in OpenAI's shape", answer[:300].decode("utf-8", "replace")) from None
    if not message or "\n" in message or not kind:
        raise FaultError(f"status {status} without one line that says why", repr(message)[:300])
    if len(message) > 2000:
        raise FaultError("a message without end", repr(message)[:200])
    return "refused"


def small_server() -> tuple[EngineThread, Api]:
    """Return the engine's thread and the HTTP side over a tiny random model."""
    clock = RealClock("wall")
    elastic = ElasticModel(random_model(), name=SPEC.name)
    config = engine_config(max_batch_tokens=64, max_context_tokens=400)
    plan = dense_plan(elastic.spec)

    def build(thread: EngineThread) -> HwEngine:
        return HwEngine(
            elastic=elastic,
            config=config,
            plan=plan,
            budget_bytes=budget_for_kv_blocks(elastic.spec, plan, KV_BLOCKS, 0, config.kv_block_tokens),
            prompts=thread.prompt,
            clock=clock,
            ends=thread.ends,
            on_token=thread.on_token,
        )

    text = tokenizer()
    thread = EngineThread(build, Fixed(plan), clock, eos=text.eos_token_id, tick_s=1.0)
    return thread, Api(thread, elastic.spec, text, ServerConfig(max_tokens=MOST_TOKENS, max_body_bytes=MOST_BODY_BYTES))


async def call(app: Any, content: bytes, *, method: str, path: str, headers: list[Any]) -> tuple[int, bytes]:
    """Call an ASGI application as a server would."""
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 8000),
        "headers": [(b"host", b"127.0.0.1:8000"), *headers],
    }
    incoming = [{"type": "http.request", "body": content, "more_body": False}]
    waits = asyncio.Event()
    status, parts = 0, []

    async def receive() -> dict[str, Any]:
        if incoming:
            return incoming.pop()
        await waits.wait()  # the client stays
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        nonlocal status
        if message["type"] == "http.response.start":
            status = message["status"]
        else:
            parts.append(message.get("body", b""))

    await app(scope, receive, send)
    return status, b"".join(parts)
