"""Serves the engine over HTTP like OpenAI: ``python -m hw.serve``, then ``curl 127.0.0.1:8000/v1/models``.

    POST /v1/completions        prompt (text or token ids), max_tokens, stream, ignore_eos; greedy, one answer each
    POST /v1/chat/completions   the same for messages (role, content), formatted by the tokenizer's chat template;
                                without one, a line "role: content" for each message, then "assistant:"
    GET  /health                200 while the engine serves, 503 with the reason once it has stopped
    GET  /v1/models             the served model, and how a chat is formatted
    GET  /metrics               Prometheus metrics: queue, KV blocks, tokens, bytes
    GET  /plan, PUT /plan       read the plan, or set it with the options of policy=fixed; this ends the policy

The configuration is that of ``hw.replay``, plus ``serve.*``: where to listen and what to refuse. The server listens on
loopback by default, has no authentication, and keeps a record of every request: do not expose it to the public.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from hw.engine.clock import RealClock
from hw.engine.hw_engine import HwEngine
from hw.replay.run import HwReplayConfig, load_elastic
from hw.serve.answers import CHAT, COMPLETION, END_OF_STREAM, AnswerFormat, choice, event, usage
from hw.serve.disconnect import EventStream, unless_disconnected
from hw.serve.engine_thread import EngineStoppedError, EngineThread, QueueFullError, ServedRequest
from hw.serve.metrics import EngineMetrics
from hw.serve.requests import (
    ApiError,
    ChatBody,
    CompletionBody,
    Limits,
    RequestBody,
    chat_tokens,
    has_chat_template,
    parse,
    parse_object,
    prompt_tokens,
)
from sim.config import name_of, one_thread, run_command
from sim.cost.model_spec import ModelSpec
from sim.cost.plan import describe
from sim.errors import ConfigError
from sim.policies.fixed import plan_of
from sim.replay.run import build_parts

COMPLETION_TOKENS = 16
"""Length of a completion without max_tokens, as at OpenAI; a chat takes what fits."""


@dataclass(kw_only=True)
class ServerConfig:
    """Where to listen, and what to refuse.

    host, port: 127.0.0.1 serves this machine alone. max_body_bytes: of one request. max_tokens: of one answer.
    max_waiting: requests that may be submitted and not ended, waiting and running; more are refused (HTTP 429).
    """

    host: str = "127.0.0.1"
    port: int = 8000
    max_body_bytes: int = 1 << 20
    max_tokens: int = 1024
    max_waiting: int = 256


@dataclass(kw_only=True)
class ServeConfig(HwReplayConfig):
    """The configuration of ``python -m hw.serve``."""

    serve: ServerConfig = field(default_factory=ServerConfig)


ConfigStore.instance().store(name="serve_schema", node=ServeConfig)

Tokens = asyncio.Queue[tuple[int | None, bool]]
"""The tokens of one answer as they come: (token, whether it is the last); the token is None for a refused request."""


class Api:
    """The HTTP side: reads requests, passes them to the engine thread, and writes answers."""

    def __init__(self, thread: EngineThread, model: ModelSpec, tokenizer: Any, config: ServerConfig) -> None:
        """Serve the engine of a thread."""
        self._thread, self._model, self._tokenizer, self._config = thread, model, tokenizer, config
        self._limits = Limits(model.name, model.vocab_size, config.max_tokens)
        self._metrics = EngineMetrics(thread)
        self._started = int(time.time())
        self.app = Starlette(
            routes=[
                Route("/v1/completions", self._guarded(self.completions), methods=["POST"]),
                Route("/v1/chat/completions", self._guarded(self.chat), methods=["POST"]),
                Route("/health", self._guarded(self.health)),
                Route("/v1/models", self._guarded(self.models)),
                Route("/metrics", self._guarded(self.metrics)),
                Route("/plan", self._guarded(self.plan), methods=["GET", "PUT"]),
            ]
        )

    def _guarded(self, handler: Callable[[HttpRequest], Any]) -> Callable[[HttpRequest], Any]:
        """Return the handler with ApiErrors turned into answers; after an engine failure, every answer reports it."""

        async def guarded(request: HttpRequest) -> Response:
            try:
                if self._thread.failure is not None:
                    raise self._stopped()
                response: Response = await handler(request)
                return response
            except ApiError as error:
                return JSONResponse(error.body(), status_code=error.status)
            except EngineStoppedError:
                return JSONResponse(self._stopped().body(), status_code=503)
            except ClientDisconnect:  # in the middle of its own request; no one reads this
                return Response(status_code=400)

        return guarded

    async def _raw_body(self, request: HttpRequest) -> bytes:
        raw = bytearray()
        async for chunk in request.stream():
            raw += chunk
            if len(raw) > self._config.max_body_bytes:
                raise ApiError(
                    413,
                    f"the body is larger than {self._config.max_body_bytes} bytes; send less, or raise "
                    "serve.max_body_bytes",
                )
        return bytes(raw)

    async def completions(self, request: HttpRequest) -> Response:
        """Answer POST /v1/completions."""
        body = parse(CompletionBody, await self._raw_body(request), self._limits)
        tokens = prompt_tokens(self._tokenizer, body.prompt)
        return await self._answer(request, body, self._served(body, "prompt", tokens, COMPLETION_TOKENS), COMPLETION)

    async def chat(self, request: HttpRequest) -> Response:
        """Answer POST /v1/chat/completions."""
        body = parse(ChatBody, await self._raw_body(request), self._limits)
        tokens = chat_tokens(self._tokenizer, body.messages)
        return await self._answer(request, body, self._served(body, "messages", tokens, None), CHAT)

    def _served(self, body: RequestBody, param: str, tokens: list[int], default: int | None) -> ServedRequest:
        """Return a checked request for the engine.

        Args:
            body: the request.
            param: the field with the prompt, for errors.
            tokens: of the prompt.
            default: length of an answer without max_tokens; None takes what fits.
        Raises:
            ApiError: if prompt and answer are longer than the engine allows.
        """
        max_tokens, limit = body.max_tokens, self._thread.engine.context_limit
        if max_tokens is None:
            max_tokens = default or max(1, min(self._config.max_tokens, limit - len(tokens)))
        if len(tokens) + max_tokens > limit:
            raise ApiError(
                400,
                f"{len(tokens)} prompt tokens and max_tokens {max_tokens} exceed the {limit} tokens that one request "
                "may have; shorten the prompt or lower max_tokens",
                param,
            )
        return ServedRequest(tokens, max_tokens, bool(body.ignore_eos), lambda _token, _last: None)

    async def _answer(
        self, request: HttpRequest, body: RequestBody, served: ServedRequest, form: AnswerFormat
    ) -> Response:
        """Run a checked request and return its output as the answer; end it if its client leaves."""
        tokens, loop = Tokens(), asyncio.get_running_loop()

        def pass_on(token: int | None, last: bool) -> None:
            loop.call_soon_threadsafe(tokens.put_nowait, (token, last))

        served.on_token = pass_on
        try:
            self._thread.submit([served], self._config.max_waiting)
        except QueueFullError as error:
            raise ApiError(
                429, f"{error}, and serve.max_waiting allows no more; try again later", kind="rate_limit_error"
            ) from None
        identity = {
            "id": f"{form.id_prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": self._model.name,
        }
        if body.stream:
            stream = self._stream(served, tokens, identity, form, body.wants_usage)
            return EventStream(stream, lambda: self._thread.cancel(served))
        try:
            produced = await unless_disconnected(request, self._collect(served, tokens))
        finally:
            self._thread.cancel(served)  # changes nothing once it has ended
        return JSONResponse(
            {
                **identity,
                "object": form.complete_object,
                "choices": [choice(form.complete(self._text(produced)), _finish_reason(served, produced))],
                "usage": usage(len(served.tokens), len(produced)),
            }
        )

    async def _collect(self, served: ServedRequest, tokens: Tokens) -> list[int]:
        """Return all tokens of a request."""
        produced: list[int] = []
        last = False
        while not last:
            token, last = await tokens.get()
            if token is None:
                raise self._refusal(served)
            produced.append(token)
        return produced

    async def _stream(
        self,
        served: ServedRequest,
        tokens: Tokens,
        identity: Mapping[str, Any],
        form: AnswerFormat,
        wants_usage: bool,
    ) -> AsyncIterator[str]:
        """Yield one event per token, the token counts if requested, and the end."""
        produced: list[int] = []
        sent, last = "", False
        while not last:
            token, last = await tokens.get()
            if token is None:
                yield event(self._refusal(served).body())
                return
            produced.append(token)
            text = self._text(produced)
            # U+FFFD stands for an incomplete character; send it when the tokens that complete it have come.
            new = text[len(sent) :] if last or not text.endswith("\ufffd") else ""
            sent += new
            piece = choice(form.chunk(new, len(produced) == 1), _finish_reason(served, produced) if last else None)
            yield event({**identity, "object": form.chunk_object, "choices": [piece]})
        if wants_usage:
            counts = usage(len(served.tokens), len(produced))
            yield event({**identity, "object": form.chunk_object, "choices": [], "usage": counts})
        yield END_OF_STREAM

    def _refusal(self, served: ServedRequest) -> ApiError:
        """Return the error for a request that ended without its last token."""
        if self._thread.failure is not None:
            return self._stopped()
        if served.error is not None:
            return ApiError(503, f"the engine could not serve this request: {served.error}", kind="server_error")
        return ApiError(429, "the current plan admits no more requests; try again later", kind="rate_limit_error")

    def _stopped(self) -> ApiError:
        """Return the error for everything once the engine has stopped."""
        reason = self._thread.failure or "the server is stopping"
        return ApiError(503, f"the engine has stopped: {reason}; restart the server", kind="server_error")

    async def health(self, request: HttpRequest) -> Response:
        """Say that the engine serves."""
        return JSONResponse({"status": "ok"})

    def _text(self, produced: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(produced, skip_special_tokens=True)
        return text

    async def models(self, request: HttpRequest) -> Response:
        """List the served model."""
        model = {"id": self._model.name, "object": "model", "created": self._started, "owned_by": "rap-lab"}
        model["chat"] = "template of the tokenizer" if has_chat_template(self._tokenizer) else "plain join of roles"
        return JSONResponse({"object": "list", "data": [model]})

    async def plan(self, request: HttpRequest) -> Response:
        """Read the plan, or set it."""
        if request.method == "PUT":
            options = parse_object(await self._raw_body(request), "plan options")
            try:
                plan = plan_of(self._model, options)
                await asyncio.wrap_future(self._thread.set_plan(plan))
            except (ValueError, TypeError) as error:
                raise ApiError(400, str(error)) from None
            return JSONResponse({"accepted": describe(plan)}, status_code=202)
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
        """Return the metrics of the engine in Prometheus' text format."""
        return Response(generate_latest(self._metrics.registry), media_type=CONTENT_TYPE_PLAIN_0_0_4)


def _finish_reason(served: ServedRequest, produced: Sequence[int]) -> str:
    return "length" if len(produced) == served.max_tokens else "stop"


def build_api(cfg: DictConfig) -> tuple[Api, EngineThread]:
    """Build model, engine and HTTP side of a configuration."""
    parts = build_parts(cfg)
    elastic, tokenizer = load_elastic(parts.model, cfg.hw, cfg.model)
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
    return Api(thread, parts.model, tokenizer, config), thread


def run_server(cfg: DictConfig) -> None:
    """Serve until interrupted.

    Raises:
        ConfigError: for another clock than the wall's.
    """
    if cfg.hw.clock != "wall":
        raise ConfigError(f"hw.clock is {cfg.hw.clock!r}; a server answers in real time, so set hw.clock=wall")
    api, thread = build_api(cfg)
    print(f"serving {name_of(cfg.model)} at http://{cfg.serve.host}:{cfg.serve.port}", flush=True)
    try:
        uvicorn.run(api.app, host=cfg.serve.host, port=int(cfg.serve.port), log_level="warning")
    finally:
        thread.stop()


def main() -> None:
    """Run ``python -m hw.serve``."""
    one_thread()
    run_command(run_server, "serve")
