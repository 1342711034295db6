"""Serves the engine over HTTP, as OpenAI's completions: ``python -m hw.serve``, then ``curl 127.0.0.1:8000/v1/models``.

    POST /v1/completions        prompt (text or token ids), max_tokens, stream, ignore_eos; greedy, one answer a request
    POST /v1/chat/completions   the same for messages (role, content), by the tokenizer's chat template; where it has
                                none, one "role: content" a line, and "assistant:" at the end
    GET  /v1/models             the model that is served, and by what a chat is put
    GET  /metrics               Prometheus text: queue, KV blocks, tokens, bytes
    GET  /plan, PUT /plan       read the plan, or set it in the words of policy=fixed; a policy then decides no more

It takes the words of ``hw.replay``; ``serve.*`` says where it listens and what it refuses. It binds to loopback unless
told otherwise, knows no users, and remembers every request for its records: a laboratory's server, not a public one.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import uvicorn
from hydra.core.config_store import ConfigStore
from jinja2 import TemplateError
from omegaconf import DictConfig
from starlette.applications import Starlette
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from hw.engine.clock import Clock, RealClock
from hw.engine.hw_engine import HwEngine
from hw.replay.run import HwReplayConfig, load_elastic
from sim.config import one_thread, run_command
from sim.cost.model_spec import ModelSpec
from sim.cost.plan import Plan, describe
from sim.engine.protocol import EngineState, Request
from sim.errors import PlanError, RapLabError
from sim.policies import Fixed, Policy
from sim.policies.fixed import plan_of
from sim.replay.run import build_parts

LOOK_S = 0.02
"""How often the engine looks for new requests while it serves others."""
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "n": (1, None),
    "best_of": (1, None),
    "temperature": (0, None),
    "top_p": (1, None),
    "echo": (False, None),
    "logprobs": (None, False),
    "top_logprobs": (None, 0),
    "suffix": (None, ""),
    "stop": (None, []),
    "logit_bias": (None, {}),
    "presence_penalty": (0, None),
    "frequency_penalty": (0, None),
    "tools": (None, []),
    "functions": (None, []),
    "response_format": (None, {"type": "text"}),
}
"""Fields of OpenAI's request that ask for what the engine cannot do, and the values that ask for nothing."""


@dataclass(kw_only=True)
class ServerConfig:
    """Where to listen, and what to refuse.

    host, port: 127.0.0.1 serves this machine alone. max_body_bytes: of one request. max_tokens: of one answer.
    max_waiting: requests in the queue before a new one is told to come again (HTTP 429).
    """

    host: str = "127.0.0.1"
    port: int = 8000
    max_body_bytes: int = 1 << 20
    max_tokens: int = 1024
    max_waiting: int = 256


@dataclass(kw_only=True)
class ServeConfig(HwReplayConfig):
    """A served model."""

    serve: ServerConfig = field(default_factory=ServerConfig)


ConfigStore.instance().store(name="serve_schema", node=ServeConfig)


class ApiError(Exception):
    """An answer in OpenAI's error shape."""

    def __init__(
        self, status: int, message: str, param: str | None = None, kind: str = "invalid_request_error"
    ) -> None:
        """Say what was wrong, and which field."""
        super().__init__(message)
        self.status, self.message, self.param, self.kind = status, message, param, kind

    def response(self) -> JSONResponse:
        """Return it as HTTP."""
        told = {"message": self.message, "type": self.kind, "param": self.param, "code": None}
        return JSONResponse({"error": told}, status_code=self.status)


ROLES = ("system", "user", "assistant")


@dataclass(frozen=True, slots=True)
class _Words:
    """How an endpoint of OpenAI's puts an answer: its names, a whole text, and a piece of it (the first or a later)."""

    prefix: str
    whole_object: str
    piece_object: str
    whole: Callable[[str], dict[str, Any]]
    piece: Callable[[str, bool], dict[str, Any]]


COMPLETION = _Words(
    "cmpl", "text_completion", "text_completion", lambda text: {"text": text}, lambda text, _: {"text": text}
)
CHAT = _Words(
    "chatcmpl",
    "chat.completion",
    "chat.completion.chunk",
    lambda text: {"message": {"role": "assistant", "content": text}},
    lambda text, first: {"delta": ({"role": "assistant"} if first else {}) | {"content": text}},
)


@dataclass(slots=True)
class _Asked:
    """One request on its way through the engine thread."""

    tokens: Sequence[int]
    max_tokens: int
    ignore_eos: bool
    tell: Callable[[int | None, bool], None]  # (token, whether it is the last); None when it was refused
    request_id: int = -1


class EngineThread:
    """The engine, in a thread of its own; everything reaches it through a queue, between two iterations."""

    def __init__(
        self, build: Callable[[EngineThread], HwEngine], policy: Policy, clock: Clock, *, eos: int | None, tick_s: float
    ) -> None:
        """Build the engine around this thread's prompts and callbacks, and start."""
        self._clock, self._eos, self._tick_s = clock, eos, tick_s
        self._policy: Policy | None = None if isinstance(policy, Fixed) else policy
        self._asked: dict[int, _Asked] = {}
        self._commands: queue.Queue[Callable[[], None]] = queue.Queue()
        self._next_id = 0
        self._stopping = False
        self.failure: BaseException | None = None
        self.engine = build(self)
        self.state: EngineState = self.engine.run_until(0.0)
        self._thread = threading.Thread(target=self._serve, name="engine", daemon=True)
        self._thread.start()

    # What the engine asks.

    def prompt(self, request_id: int, tokens: int) -> Sequence[int]:
        """Return the prompt of a request."""
        return self._asked[request_id].tokens

    def on_token(self, request_id: int, token: int | None, last: bool) -> None:
        """Pass a token on to whoever waits for it."""
        self._asked[request_id].tell(token, last)
        if last:
            del self._asked[request_id]

    def ends(self, request_id: int, token: int) -> bool:
        """Return whether a token ends its request."""
        return token == self._eos and not self._asked[request_id].ignore_eos

    # What a server asks, from any thread.

    def submit(self, asked: _Asked) -> None:
        """Let a request arrive now."""

        def arrive() -> None:
            asked.request_id = self._next_id
            self._next_id += 1
            self._asked[asked.request_id] = asked
            request = Request(
                request_id=asked.request_id,
                arrival_s=self._clock.now_s(),
                prompt_tokens=len(asked.tokens),
                output_tokens=asked.max_tokens,
            )
            self.engine.submit([request])

        self._commands.put(arrive)

    def cancel(self, asked: _Asked) -> None:
        """Let go of a request whose client has gone."""
        self._commands.put(lambda: self.engine.cancel(asked.request_id))

    def set_plan(self, plan: Plan) -> None:
        """Run a plan from now on, whatever the policy says."""

        def change() -> None:
            self._policy = None
            self.engine.apply(plan)

        self._commands.put(change)

    def stop(self) -> None:
        """End the thread after the iteration that runs."""
        self._stopping = True
        self._commands.put(lambda: None)
        self._thread.join(timeout=30.0)

    def _serve(self) -> None:
        next_tick_s = self._tick_s
        try:
            while not self._stopping:
                idle = self.engine.drained
                with contextlib.suppress(queue.Empty):
                    self._commands.get(timeout=LOOK_S if idle else 0.0001)()
                    while True:
                        self._commands.get_nowait()()
                self.state = self.engine.run_until(self._clock.now_s() + (0.0 if self.engine.drained else LOOK_S))
                if self._policy is not None and self.state.time_s >= next_tick_s:
                    next_tick_s = self.state.time_s + self._tick_s
                    self.engine.apply(self._policy(self.state))
        except BaseException as failure:
            self.failure = failure
            for asked in self._asked.values():
                asked.tell(None, True)
            raise
        finally:
            self.engine.close()


class Api:
    """The HTTP side: checks what is asked, and speaks OpenAI's words."""

    def __init__(self, thread: EngineThread, model: ModelSpec, tokenizer: Any, config: ServerConfig) -> None:
        """Serve this engine."""
        self._thread, self._model, self._tokenizer, self._config = thread, model, tokenizer, config
        self._started = int(time.time())
        self.app = Starlette(
            routes=[
                Route("/v1/completions", self._guarded(self.completions), methods=["POST"]),
                Route("/v1/chat/completions", self._guarded(self.chat), methods=["POST"]),
                Route("/v1/models", self._guarded(self.models)),
                Route("/metrics", self._guarded(self.metrics)),
                Route("/plan", self._guarded(self.plan), methods=["GET", "PUT"]),
            ]
        )

    def _guarded(self, handler: Callable[[HttpRequest], Any]) -> Callable[[HttpRequest], Any]:
        async def guarded(request: HttpRequest) -> Response:
            try:
                if self._thread.failure is not None:
                    raise ApiError(503, f"the engine has stopped: {self._thread.failure}", kind="server_error")
                response: Response = await handler(request)
                return response
            except ApiError as error:
                return error.response()

        return guarded

    async def _body(self, request: HttpRequest) -> dict[str, Any]:
        raw = bytearray()
        async for chunk in request.stream():
            raw += chunk
            if len(raw) > self._config.max_body_bytes:
                raise ApiError(
                    413, f"the body is larger than {self._config.max_body_bytes} bytes (serve.max_body_bytes)"
                )
        try:
            body = json.loads(raw)
        except ValueError as error:
            raise ApiError(400, f"the body is not JSON: {error}") from None
        if not isinstance(body, dict):
            raise ApiError(400, f"the body is a JSON {type(body).__name__}; it must be an object")
        return body

    async def completions(self, request: HttpRequest) -> Response:
        """Answer one prompt."""
        body = await self._body(request)
        return await self._answer(body, self._asked(body, "prompt", self._tokens, 16), COMPLETION)

    async def chat(self, request: HttpRequest) -> Response:
        """Answer the last of some messages."""
        body = await self._body(request)
        if "max_completion_tokens" in body:  # its newer name
            body["max_tokens"] = body["max_completion_tokens"]
        return await self._answer(body, self._asked(body, "messages", self._chat_tokens, None), CHAT)

    async def _answer(self, body: Mapping[str, Any], asked: _Asked, words: _Words) -> Response:
        """Let a request that was checked run, and put what it produces."""
        tokens, loop = asyncio.Queue[tuple[int | None, bool]](), asyncio.get_running_loop()

        def tell(token: int | None, last: bool) -> None:
            loop.call_soon_threadsafe(tokens.put_nowait, (token, last))

        asked.tell = tell
        if self._thread.state.waiting >= self._config.max_waiting:
            raise ApiError(
                429, f"{self._config.max_waiting} requests wait already; come again", kind="rate_limit_error"
            )
        self._thread.submit(asked)
        identity = {"id": f"{words.prefix}-{id(asked):x}", "created": int(time.time()), "model": self._model.name}
        if body.get("stream"):
            usage_too = bool((body.get("stream_options") or {}).get("include_usage"))
            stream = self._stream(asked, tokens, identity, words, usage_too)
            return StreamingResponse(stream, media_type="text/event-stream")
        produced: list[int] = []
        try:
            while True:
                token, last = await tokens.get()
                if token is None:
                    raise self._refused()
                produced.append(token)
                if last:
                    break
        except asyncio.CancelledError:
            self._thread.cancel(asked)
            raise
        choice = _choice(words.whole(self._text(produced)), self._why(asked, produced))
        return JSONResponse(
            {**identity, "object": words.whole_object, "choices": [choice], "usage": _usage(asked, len(produced))}
        )

    async def _stream(
        self,
        asked: _Asked,
        tokens: asyncio.Queue[tuple[int | None, bool]],
        identity: Mapping[str, Any],
        words: _Words,
        usage_too: bool,
    ) -> AsyncIterator[str]:
        produced: list[int] = []
        told, last = "", False
        try:
            while not last:
                token, last = await tokens.get()
                if token is None:
                    refused = self._refused()
                    yield _event({"error": {"message": refused.message, "type": refused.kind}})
                    return
                produced.append(token)
                text = self._text(produced)
                # Half a character has come: it is told with its other half.
                new = text[len(told) :] if last or not text.endswith("\ufffd") else ""
                told += new
                piece = words.piece(new, len(produced) == 1)
                choice = _choice(piece, self._why(asked, produced) if last else None)
                yield _event({**identity, "object": words.piece_object, "choices": [choice]})
            if usage_too:
                usage = _usage(asked, len(produced))
                yield _event({**identity, "object": words.piece_object, "choices": [], "usage": usage})
            yield "data: [DONE]\n\n"
        finally:
            if not last:
                self._thread.cancel(asked)

    def _asked(
        self, body: Mapping[str, Any], field: str, tokens_of: Callable[[Any], list[int]], default: int | None
    ) -> _Asked:
        """Check a request whose prompt stands in a field; without max_tokens it may have ``default``, None: what fits.

        Raises:
            ApiError: naming the field that is wrong and what is allowed.
        """
        for name, harmless in UNSUPPORTED.items():
            if name in body and body[name] not in harmless:
                raise ApiError(
                    400, f"{name}={body[name]!r} is not supported; this engine is greedy, leave it out", name
                )
        if body.get("model") not in (None, self._model.name):
            raise ApiError(404, f"model {body['model']!r} is not served; {self._model.name!r} is", "model")
        max_tokens = body.get("max_tokens", default)
        if max_tokens is not None and (
            isinstance(max_tokens, bool) or not isinstance(max_tokens, int) or max_tokens < 1
        ):
            raise ApiError(400, f"max_tokens is {max_tokens!r}; it must be a whole number of at least 1", "max_tokens")
        if max_tokens is not None and max_tokens > self._config.max_tokens:
            raise ApiError(400, f"max_tokens is {max_tokens}; at most {self._config.max_tokens}", "max_tokens")
        tokens, limit = tokens_of(body.get(field)), self._thread.engine.context_limit
        if max_tokens is None:
            max_tokens = max(1, min(self._config.max_tokens, limit - len(tokens)))
        if len(tokens) + max_tokens > limit:
            raise ApiError(
                400,
                f"{len(tokens)} prompt tokens and max_tokens {max_tokens} exceed what one request may have: {limit}",
                field,
            )
        return _Asked(tokens, max_tokens, bool(body.get("ignore_eos", False)), lambda token, last: None)

    def _chat_tokens(self, messages: Any) -> list[int]:
        try:
            text = chat_text(self._tokenizer, messages)
        except ValueError as error:
            raise ApiError(400, str(error), "messages") from None
        if not chat_template(self._tokenizer):
            return self._tokens(text)
        # The template has written the special tokens itself.
        return list(self._tokenizer(text, add_special_tokens=False, verbose=False).input_ids)

    def _tokens(self, prompt: Any) -> list[int]:
        if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], (str, list)):
            prompt = prompt[0]
        if isinstance(prompt, str):
            prompt = self._tokenizer(prompt, verbose=False).input_ids
        whole = isinstance(prompt, list) and all(isinstance(t, int) and not isinstance(t, bool) for t in prompt)
        if not whole or not prompt or not all(0 <= t < self._model.vocab_size for t in prompt):
            raise ApiError(
                400,
                "prompt must be one text, or one list of token ids from 0 to "
                f"{self._model.vocab_size - 1}, and not be empty",
                "prompt",
            )
        return list(prompt)

    def _refused(self) -> ApiError:
        if self._thread.failure is not None:
            return ApiError(503, f"the engine has stopped: {self._thread.failure}", kind="server_error")
        return ApiError(429, "the plan admits no more requests now; come again", kind="rate_limit_error")

    def _text(self, produced: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(produced, skip_special_tokens=True)
        return text

    def _why(self, asked: _Asked, produced: Sequence[int]) -> str:
        return "length" if len(produced) == asked.max_tokens else "stop"

    async def models(self, request: HttpRequest) -> Response:
        """Name what is served."""
        model = {"id": self._model.name, "object": "model", "created": self._started, "owned_by": "rap-lab"}
        model["chat"] = "template of the tokenizer" if chat_template(self._tokenizer) else "plain join of roles"
        return JSONResponse({"object": "list", "data": [model]})

    async def plan(self, request: HttpRequest) -> Response:
        """Read the plan, or set it."""
        if request.method == "PUT":
            words = await self._body(request)
            try:
                self._thread.set_plan(plan_of(self._model, words))
            except (PlanError, TypeError) as error:
                raise ApiError(400, str(error)) from None
            return JSONResponse({"accepted": describe(plan_of(self._model, words))}, status_code=202)
        state = self._thread.state
        return JSONResponse(
            {
                "runs": describe(state.plan),
                "wanted": describe(state.target),
                "ready": state.plan == state.target and not state.incoming_bytes,
                "weight_bytes": state.weight_bytes,
                "kv_layer_blocks": state.kv_layer_blocks,
            }
        )

    async def metrics(self, request: HttpRequest) -> Response:
        """Tell what the engine sees of itself, in Prometheus' text format."""
        state = self._thread.state
        gauges = {
            "requests_waiting": state.waiting,
            "requests_running": state.running,
            "kv_layer_blocks": state.kv_layer_blocks,
            "kv_used_layer_blocks": state.kv_used_layer_blocks,
            "weight_bytes": state.weight_bytes,
            "budget_bytes": state.budget_bytes,
            "incoming_bytes": state.incoming_bytes,
        }
        counters = {
            "requests_arrived_total": state.arrived,
            "requests_finished_total": state.finished,
            "requests_rejected_total": state.rejected,
            "preemptions_total": state.preemptions,
            "prompt_tokens_total": state.arrived_prompt_tokens,
            "produced_tokens_total": state.produced_tokens,
            "ttft_seconds_sum": state.ttft_sum_s,
            "ttft_seconds_count": state.first_tokens,
            "iterations_total": state.iterations,
            "busy_seconds_total": state.busy_s,
            "budget_violation_seconds_total": state.budget_violation_s,
            "out_of_memory_total": self._thread.engine.out_of_memory,
        }
        lines = []
        for kind, figures in (("gauge", gauges), ("counter", counters)):
            for name, value in figures.items():
                lines += [f"# TYPE rap_lab_{name} {kind}", f"rap_lab_{name} {value}"]
        return PlainTextResponse("\n".join(lines) + "\n", media_type="text/plain; version=0.0.4")


def chat_template(tokenizer: Any) -> bool:
    """Return whether a tokenizer says how a chat is put."""
    return bool(getattr(tokenizer, "chat_template", None))


def chat_text(tokenizer: Any, messages: Any) -> str:
    """Return some messages as one prompt: by the tokenizer's chat template, or one ``role: content`` a line without.

    Raises:
        ValueError: for messages that are none, saying what is allowed, or that the template refuses.
    """
    if not isinstance(messages, list) or not messages:
        raise ValueError("messages must be a list of at least one {role, content}")
    plain = []
    for message in messages:
        role, content = (message.get(key) if isinstance(message, dict) else None for key in ("role", "content"))
        if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
            content = "".join(str(part.get("text", "")) for part in content)
        if role not in ROLES or not isinstance(content, str):
            raise ValueError(
                f"a message is {message!r}; it needs a role ({', '.join(ROLES)}) and a content that is text"
            )
        plain.append({"role": role, "content": content})
    if chat_template(tokenizer):
        try:
            return str(tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=True))
        except TemplateError as error:
            raise ValueError(f"the model's chat template refuses these messages: {error}") from error
    return "".join(f"{message['role']}: {message['content']}\n" for message in plain) + "assistant:"


def _choice(text: Mapping[str, Any], why: str | None) -> dict[str, Any]:
    return {"index": 0, **text, "logprobs": None, "finish_reason": why}


def _usage(asked: _Asked, produced: int) -> dict[str, int]:
    prompt = len(asked.tokens)
    return {"prompt_tokens": prompt, "completion_tokens": produced, "total_tokens": prompt + produced}


def _event(content: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(content)}\n\n"


def build_api(cfg: DictConfig) -> tuple[Api, EngineThread]:
    """Build model, engine and HTTP side of a configuration."""
    parts = build_parts(cfg)
    elastic, tokenizer = load_elastic(parts.model, cfg.hw)
    clock = RealClock("wall")

    def build(thread: EngineThread) -> HwEngine:
        return HwEngine(
            elastic=elastic,
            config=parts.config,
            plan=parts.policy.first_plan,
            budget_bytes=parts.budget,
            workspace_bytes=int(cfg.workspace_bytes),
            prompts=thread.prompt,
            clock=clock,
            ends=thread.ends,
            on_token=thread.on_token,
        )

    thread = EngineThread(build, parts.policy, clock, eos=tokenizer.eos_token_id, tick_s=float(cfg.tick_s))
    config = ServerConfig(**{str(key): value for key, value in cfg.serve.items()})
    return Api(thread, replace(parts.model), tokenizer, config), thread


def run_server(cfg: DictConfig) -> None:
    """Serve until interrupted."""
    if cfg.hw.clock != "wall":
        raise RapLabError(f"hw.clock is {cfg.hw.clock!r}; a server answers people, whose clock is the wall's")
    api, thread = build_api(cfg)
    print(f"serving {cfg.model.name} at http://{cfg.serve.host}:{cfg.serve.port}", flush=True)
    try:
        uvicorn.run(api.app, host=cfg.serve.host, port=int(cfg.serve.port), log_level="warning")
    finally:
        thread.stop()


def main() -> None:
    """Run ``python -m hw.serve``."""
    one_thread()
    run_command(run_server, "serve")
