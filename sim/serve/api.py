"""The HTTP side of the server: reads requests, passes them to the engine thread, and writes answers."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from sim.cost.model_spec import ModelSpec
from sim.cost.plan import describe
from sim.policies.fixed import plan_of
from sim.serve.answers import CHAT, COMPLETION, END_OF_STREAM, AnswerFormat, choice, event, usage
from sim.serve.choices import Choices, EndedEarlyError, Piece
from sim.serve.disconnect import EventStream, unless_disconnected
from sim.serve.engine_thread import EngineStoppedError, EngineThread, QueueFullError, ServedRequest
from sim.serve.guard import Guard
from sim.serve.metrics import EngineMetrics
from sim.serve.prompts import chat_tokens, has_chat_template, prompt_tokens
from sim.serve.requests import ApiError, ChatBody, CompletionBody, Limits, RequestBody, parse, parse_object
from sim.serve.settings import ServerConfig

COMPLETION_TOKENS = 16
"""Length of a completion without max_tokens, as at OpenAI; a chat takes what fits."""

READ_ON = 16
"""How many times the allowed size of a body is read, so that a client that still sends sees why it is refused."""


@dataclass(frozen=True, slots=True)
class _Answer:
    """One answer under way. prompt_tokens: of all its prompts."""

    identity: Mapping[str, Any]
    form: AnswerFormat
    body: RequestBody
    prompt_tokens: int
    choices: Choices

    def usage(self) -> dict[str, int]:
        """Return the token counts so far."""
        return usage(self.prompt_tokens, self.choices.produced)


class Api:
    """The HTTP side: reads requests, passes them to the engine thread, and writes answers.

    completion_body, chat_body: the fields of requests.
    """

    completion_body: type[CompletionBody] = CompletionBody
    chat_body: type[ChatBody] = ChatBody

    def __init__(
        self,
        thread: EngineThread,
        model: ModelSpec,
        tokenizer: Any,
        config: ServerConfig,
        *,
        note: str = "",
        metrics: EngineMetrics | None = None,
    ) -> None:
        """Serve the engine of a thread.

        Args:
            note: what clients have to know of the weights. metrics: of the engine; None for those of any engine.
        """
        self.note = note
        self._thread, self._model, self._tokenizer, self._config = thread, model, tokenizer, config
        self._limits = Limits(model.name, model.vocab_size, config.max_tokens, config.max_choices)
        self._metrics = metrics or EngineMetrics(thread, model.name)
        # One thread: tokenizing a long text takes a second, and a fast tokenizer is not safe in several.
        self._tokenizing = ThreadPoolExecutor(1, thread_name_prefix="tokenizer")
        self._started = int(time.time())
        self.app = Starlette(
            routes=[
                Route("/v1/completions", self._guarded(self.completions), methods=["POST"]),
                Route("/v1/chat/completions", self._guarded(self.chat), methods=["POST"]),
                Route("/health", self._guarded(self.health)),
                Route("/v1/models", self._guarded(self.models)),
                Route("/v1/models/{name:path}", self._guarded(self.one_model)),
                Route("/metrics", self.metrics),
                Route("/plan", self._guarded(self.plan), methods=["GET", "PUT"]),
            ],
            middleware=[Middleware(Guard, hosts=config.host_names(), token=config.secret())],
            exception_handlers={HTTPException: _http_error, Exception: _server_error},
        )

    def _guarded(self, handler: Callable[[HttpRequest], Any]) -> Callable[[HttpRequest], Any]:
        """Return the handler with errors turned into answers; after an engine failure, every answer reports it."""

        async def guarded(request: HttpRequest) -> Response:
            try:
                if self._thread.failure is not None:
                    raise self._stopped()
                response: Response = await handler(request)
                return response
            except ApiError as error:
                return _error(error)
            except EngineStoppedError:
                return _error(self._stopped())
            except ClientDisconnect:  # no one reads this
                return Response(status_code=400)

        return guarded

    async def _raw_body(self, request: HttpRequest) -> bytes:
        raw, size, most = bytearray(), 0, self._config.max_body_bytes
        try:
            async with asyncio.timeout(self._config.read_timeout_s):
                async for chunk in request.stream():
                    size += len(chunk)
                    if size <= most:
                        raw += chunk
                    elif size > READ_ON * most:
                        break
        except TimeoutError:
            raise ApiError(
                408, f"the body did not come within {self._config.read_timeout_s:g} s; send it faster"
            ) from None
        if size > most:
            raise ApiError(413, f"the body is larger than {most} bytes; send less, or raise serve.max_body_bytes")
        return bytes(raw)

    # --- Completions and chats

    async def completions(self, request: HttpRequest) -> Response:
        """Answer POST /v1/completions."""
        body = parse(self.completion_body, await self._raw_body(request), self._limits)
        if len(body.prompt) * body.n > self._config.max_choices:
            raise ApiError(
                400,
                f"{len(body.prompt)} prompts with n={body.n} are more than {self._config.max_choices} answers; send "
                "fewer in one request",
                "n",
            )
        prompts = [await self._tokens(prompt_tokens, prompt) for prompt in body.prompt]
        return await self._answer(request, body, "prompt", prompts, COMPLETION_TOKENS, COMPLETION)

    async def chat(self, request: HttpRequest) -> Response:
        """Answer POST /v1/chat/completions."""
        body = parse(self.chat_body, await self._raw_body(request), self._limits)
        prompts = [await self._tokens(chat_tokens, body.messages)]
        return await self._answer(request, body, "messages", prompts, None, CHAT)

    async def _tokens(self, tokenize: Callable[[Any, Any], list[int]], prompt: Any) -> list[int]:
        """Return the tokens of a prompt without a halt of all other answers."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._tokenizing, tokenize, self._tokenizer, prompt)

    def _most_tokens(self, body: RequestBody, param: str, tokens: Sequence[int], default: int | None) -> int:
        """Return how long an answer may be.

        Args:
            body: the request. param: the field with the prompt, for errors. tokens: of one prompt.
            default: length of an answer without max_tokens; None takes what fits.
        Raises:
            ApiError: if prompt and answer are longer than the engine allows.
        """
        limit, most_prompt = self._thread.engine.context_limit, self._config.max_prompt_tokens
        if most_prompt is not None and len(tokens) > most_prompt:
            raise ApiError(
                400, f"{param} has {len(tokens)} tokens; serve.max_prompt_tokens allows {most_prompt}", param
            )
        most = body.most_tokens
        if most is None:
            most = default or max(1, min(self._config.max_tokens, limit - len(tokens)))
        if len(tokens) + most > limit:
            raise ApiError(
                400,
                f"{len(tokens)} prompt tokens and max_tokens {most} exceed the {limit} tokens that one request may "
                "have; shorten the prompt or lower max_tokens",
                param,
                code="context_length_exceeded",
            )
        return most

    async def _answer(
        self,
        request: HttpRequest,
        body: RequestBody,
        param: str,
        prompts: Sequence[list[int]],
        default: int | None,
        form: AnswerFormat,
    ) -> Response:
        """Serve checked prompts and return the answer; end it if its client leaves. Arguments: as ``_most_tokens``."""
        served = [
            request
            for tokens in prompts
            for request in self.requests_of(body, tokens, self._most_tokens(body, param, tokens, default))
        ]
        choices = Choices(self._thread, self._tokenizer, served, body.stop)
        self._submit(served)
        identity = {
            "id": f"{form.id_prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": self._model.name,
        }
        answer = _Answer(identity, form, body, sum(map(len, prompts)), choices)
        pieces = choices.pieces()
        try:
            if not body.stream:
                return JSONResponse(await unless_disconnected(request, self._complete(answer, pieces)))
            # An error before the first token is an answer of its own.
            first = await unless_disconnected(request, _first(pieces))
        except EndedEarlyError as ended:
            choices.cancel()
            raise self._refusal(ended.served) from None
        except BaseException:
            choices.cancel()
            raise
        return EventStream(self._stream(answer, first, pieces), choices.cancel)

    def requests_of(self, body: RequestBody, tokens: Sequence[int], most: int) -> Sequence[ServedRequest]:
        """Return the ``n`` requests of one prompt with these tokens, whose answers have at most ``most`` tokens."""
        return [ServedRequest(tokens, most, body.ignore_eos, sampling=sampling) for sampling in body.samplings()]

    def _submit(self, served: Sequence[ServedRequest]) -> None:
        """Submit the requests of one answer.

        Raises:
            ApiError: if there would be too many.
        """
        most = self._config.max_waiting
        if len(served) > most:
            raise ApiError(400, f"the request has {len(served)} answers; serve.max_waiting allows {most} at once")
        try:
            self._thread.submit(served, most)
        except QueueFullError as error:
            raise ApiError(
                429,
                f"{error}, and serve.max_waiting allows {most}; try again later",
                kind="rate_limit_error",
                code="rate_limit_exceeded",
            ) from None

    async def _complete(self, answer: _Answer, pieces: AsyncIterator[Piece]) -> dict[str, Any]:
        """Return the body of a complete answer."""
        texts: dict[int, list[str]] = {}
        reasons: dict[int, str | None] = {}
        async for piece in pieces:
            texts.setdefault(piece.index, []).append(piece.text)
            reasons[piece.index] = piece.finish_reason
        return {
            **answer.identity,
            "object": answer.form.complete_object,
            "choices": [
                choice(index, answer.form.complete("".join(texts[index])), reasons[index]) for index in sorted(texts)
            ],
            "usage": answer.usage(),
        }

    async def _stream(self, answer: _Answer, first: Piece, pieces: AsyncIterator[Piece]) -> AsyncIterator[str]:
        """Yield one event per token, the token counts if requested, and the end."""
        body, form = answer.body, answer.form
        head = {**answer.identity, "object": form.chunk_object}

        def piece_event(piece: Piece) -> str:
            counts: dict[str, Any] = {}
            if body.wants_usage:  # as OpenAI: null until the end
                counts = {"usage": answer.usage() if body.wants_continuous_usage else None}
            fields = form.chunk(piece.text, piece.first)
            return event({**head, "choices": [choice(piece.index, fields, piece.finish_reason)], **counts})

        yield piece_event(first)
        try:
            async for piece in pieces:
                yield piece_event(piece)
        except EndedEarlyError as ended:
            yield event(self._refusal(ended.served).body())
        else:
            if body.wants_usage:
                yield event({**head, "choices": [], "usage": answer.usage()})
        yield END_OF_STREAM

    def _refusal(self, served: ServedRequest) -> ApiError:
        """Return the error for a request that ended without its last token."""
        if self._thread.failure is not None:
            return self._stopped()
        if served.error is not None:
            return ApiError(503, f"the engine could not serve this request: {served.error}", kind="server_error")
        return ApiError(
            429,
            "the current plan admits no more requests; try again later",
            kind="rate_limit_error",
            code="rate_limit_exceeded",
        )

    def _stopped(self) -> ApiError:
        """Return the error for everything once the engine has stopped."""
        reason = self._thread.failure or "the server is stopping"
        return ApiError(503, f"the engine has stopped: {reason}; restart the server", kind="server_error")

    # --- What is served, and how

    async def health(self, request: HttpRequest) -> Response:
        """Report that the engine serves; once it has stopped, ``_guarded`` reports that."""
        return JSONResponse({"status": "ok"})

    def _model_entry(self) -> dict[str, Any]:
        return {
            "id": self._model.name,
            "object": "model",
            "created": self._started,
            "owned_by": "rap-lab",
            "max_model_len": self._thread.engine.context_limit,
            "chat": "template of the tokenizer" if has_chat_template(self._tokenizer) else "plain join of roles",
            **({"note": self.note} if self.note else {}),
        }

    async def models(self, request: HttpRequest) -> Response:
        """List the served model."""
        return JSONResponse({"object": "list", "data": [self._model_entry()]})

    async def one_model(self, request: HttpRequest) -> Response:
        """Describe the served model."""
        name = request.path_params["name"]
        if name != self._model.name:
            raise ApiError(404, f"there is no model {name!r}; this server has {self._model.name!r}", "model")
        return JSONResponse(self._model_entry())

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


async def _first(pieces: AsyncIterator[Piece]) -> Piece:
    return await anext(pieces)


def _error(error: ApiError, headers: Mapping[str, str] | None = None) -> JSONResponse:
    return JSONResponse(error.body(), status_code=error.status, headers=headers)


async def _http_error(request: HttpRequest, error: Exception) -> Response:
    """Answer an unknown path or method in OpenAI's shape."""
    assert isinstance(error, HTTPException)
    if error.status_code == 404:
        message = f"there is no {request.url.path}; see GET /v1/models, POST /v1/completions, POST /v1/chat/completions"
    elif error.status_code == 405:
        allowed = Headers(error.headers).get("allow", "another method")
        message = f"{request.url.path} does not take {request.method}; use {allowed}"
    else:
        message = str(error.detail)
    return _error(ApiError(error.status_code, message), error.headers)


async def _server_error(request: HttpRequest, error: Exception) -> Response:
    """Answer an error of the server itself in OpenAI's shape."""
    return _error(ApiError(500, f"an error of the server: {type(error).__name__}", kind="server_error"))
