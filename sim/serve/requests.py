"""Checks OpenAI requests: the allowed values of each field, and a clear error for anything else.

``null`` means that a key was not given, for every key. A field that the server does not support is refused, unless its
value requests nothing (``NEUTRAL``). Only fields that cannot change an answer are ignored (``WITHOUT_EFFECT``).
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError, from_json

from sim.errors import nearest, one_line
from sim.serve.sampling import LEAST_TEMPERATURE, Sampling

MESSAGE_VALUE = 80
"""Most characters of a wrong value that a message repeats."""
MOST_STOPS = 16
"""Stop strings of one request."""
LONGEST_STOP = 1000
"""Characters of a stop string."""

NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "prompt_logprobs": (0,),
    "suffix": ("",),
    "logit_bias": ({},),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "length_penalty": (1,),
    "top_k": (-1, 0),
    "min_p": (0,),
    "min_tokens": (0,),
    "use_beam_search": (False,),
    "early_stopping": (False,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "stop_token_ids": ([],),
    "bad_words": ([],),
    "include_stop_str_in_output": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "chat_template_kwargs": ({},),
    "priority": (0,),
}
"""Fields of OpenAI and vLLM that the server does not support, and the values that request nothing."""
WITHOUT_EFFECT = frozenset(
    (
        *("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "request_id"),
        *("parallel_tool_calls", "prediction", "cache_salt"),
    )
)
"""Fields that any server may accept without a change of its answer."""


class ApiError(Exception):
    """An error to answer a request with, in OpenAI's format."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        kind: str = "invalid_request_error",
        code: str | None = None,
    ) -> None:
        """Take the HTTP status, one sentence, the field that is wrong, and OpenAI's type and code of the error."""
        message = one_line(message)
        super().__init__(message)
        self.status, self.message, self.param, self.kind, self.code = status, message, param, kind, code

    def body(self) -> dict[str, Any]:
        """Return the body of the answer."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}


@dataclass(frozen=True, slots=True)
class Limits:
    """What the server allows. model: the name that it serves. vocabulary: number of token ids.

    max_tokens: of one answer. max_choices: answers of one request, over its prompts and ``n``.
    """

    model: str
    vocabulary: int
    max_tokens: int
    max_choices: int


OWN_ERRORS = ("range", "prompt", "empty", "stop", "content", "tools")
"""Types of the errors that this file raises with a sentence of its own."""


def _range_error(name: str | None, value: Any, least: int, most: int) -> PydanticCustomError:
    return PydanticCustomError(
        "range", "{name} is {value}; set it to {least} to {most}",
        {"name": name, "value": short(value), "least": least, "most": most},
    )  # fmt: skip


class StreamOptions(BaseModel):
    """OpenAI's ``stream_options``, and vLLM's ``continuous_usage_stats``: token counts with every piece."""

    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool | None = None
    include_obfuscation: bool | None = None
    continuous_usage_stats: bool | None = None


def _stops(value: Any) -> Any:
    """Return stop strings as a list."""
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(s, str) and 0 < len(s) <= LONGEST_STOP for s in stops):
        raise PydanticCustomError(
            "stop",
            "stop is {value}; set it to a text or a list of texts, each of 1 to {most} characters",
            {"value": short(value), "most": LONGEST_STOP},
        )
    if len(stops) > MOST_STOPS:
        raise PydanticCustomError(
            "stop", "stop has {count} texts; give at most {most}", {"count": len(stops), "most": MOST_STOPS}
        )
    return stops


class RequestBody(BaseModel):
    """The fields that completions and chat completions share, after ``parse`` has removed those without a value."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    n: int = 1
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] = 1.0
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Annotated[list[str], BeforeValidator(_stops)] = []
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    ignore_eos: bool = False

    @field_validator("max_tokens", "max_completion_tokens")
    @classmethod
    def _in_range(cls, value: int, info: ValidationInfo) -> int:
        limits: Limits = info.context  # type: ignore[assignment]
        if not 1 <= value <= limits.max_tokens:
            raise _range_error(info.field_name, value, 1, limits.max_tokens)
        return value

    @field_validator("n")
    @classmethod
    def _few(cls, value: int, info: ValidationInfo) -> int:
        limits: Limits = info.context  # type: ignore[assignment]
        if not 1 <= value <= limits.max_choices:
            raise _range_error(info.field_name, value, 1, limits.max_choices)
        return value

    @property
    def most_tokens(self) -> int | None:
        """The longest answer allowed; None if the request does not say."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with the token counts."""
        return bool(self.stream_options.include_usage)

    @property
    def wants_continuous_usage(self) -> bool:
        """Whether every piece of a stream has the token counts so far."""
        return self.wants_usage and bool(self.stream_options.continuous_usage_stats)

    def samplings(self) -> list[Sampling | None]:
        """Return how each of the ``n`` answers is sampled; None for greedy.

        Without a temperature, an answer is greedy, unless there is a ``top_p`` below 1: then the temperature is 1.
        """
        temperature = self.temperature
        if temperature is None:
            temperature = 1.0 if self.top_p < 1 else 0.0
        if temperature < LEAST_TEMPERATURE:
            return [None] * self.n
        seed = secrets.randbits(64) if self.seed is None else self.seed
        return [Sampling(temperature=temperature, top_p=self.top_p, seed=(seed, i)) for i in range(self.n)]


def _prompts(value: Any, info: ValidationInfo) -> list[str | list[int]]:
    """Return a prompt as a list: one text or list of token ids, or a list of these."""
    limits: Limits = info.context  # type: ignore[assignment]

    def is_prompt(one: Any) -> bool:
        if isinstance(one, str):
            return bool(one)
        return isinstance(one, list) and bool(one) and all(
            type(token) is int and 0 <= token < limits.vocabulary for token in one
        )  # fmt: skip

    prompts = [value] if is_prompt(value) else value
    if not (isinstance(prompts, list) and prompts and all(is_prompt(one) for one in prompts)):
        raise PydanticCustomError(
            "prompt",
            "prompt must be a text or a list of token ids from 0 to {most}, or a list of these, and not be empty",
            {"most": limits.vocabulary - 1},
        )
    if len(prompts) > limits.max_choices:
        raise PydanticCustomError(
            "prompt",
            "prompt has {count} prompts; send at most {most} in one request",
            {"count": len(prompts), "most": limits.max_choices},
        )
    return prompts


class CompletionBody(RequestBody):
    """The body of ``POST /v1/completions``."""

    prompt: Annotated[list[str | list[int]], BeforeValidator(_prompts)]


def _joined_text(value: Any) -> Any:
    """Return content as one text; OpenAI also allows a list of text parts."""
    if not isinstance(value, list):
        return value
    parts = [part for part in value if isinstance(part, dict) and part.get("type") == "text"]
    texts = [text for part in parts if isinstance(text := part.get("text"), str)]
    if len(texts) < len(value):
        raise PydanticCustomError(
            "content", 'content is {value}; set it to a text, or to a list of {"type": "text", "text": ...}',
            {"value": short(value)},
        )  # fmt: skip
    return "".join(texts)


class ChatMessage(BaseModel):
    """One message of a chat. Fields such as ``name`` are ignored, because a chat template does not use them."""

    model_config = ConfigDict(extra="ignore", strict=True)

    role: Annotated[
        Literal["system", "user", "assistant"],
        BeforeValidator(lambda role: "system" if role == "developer" else role),
    ]
    content: Annotated[str, BeforeValidator(_joined_text)]
    tool_calls: Any = None

    @field_validator("tool_calls")
    @classmethod
    def _none(cls, value: Any) -> Any:
        if value:
            raise PydanticCustomError("tools", "tool calls are not supported; leave tool_calls out")
        return None


class ChatBody(RequestBody):
    """The body of ``POST /v1/chat/completions``."""

    messages: list[ChatMessage]

    @field_validator("messages")
    @classmethod
    def _not_empty(cls, value: list[ChatMessage]) -> list[ChatMessage]:
        if not value:
            raise PydanticCustomError("empty", "messages is empty; send at least one message with role and content")
        return value


Body = TypeVar("Body", bound=RequestBody)


def parse(kind: type[Body], raw: bytes, limits: Limits) -> Body:
    """Read and check the body of a request.

    Raises:
        ApiError: for the first field that is wrong, with its value, what is allowed, and what to do.
    """
    value = parse_object(raw, "OpenAI's fields")
    try:
        return kind.model_validate(_supported(kind, value, limits), context=limits)
    except ValidationError as error:
        raise _api_error(error) from None


def _supported(kind: type[RequestBody], value: Mapping[str, Any], limits: Limits) -> dict[str, Any]:
    """Return the fields that have a value and an effect.

    Raises:
        ApiError: for a field that is unknown or not supported, or a model that is not served.
    """
    given = {name: field for name, field in value.items() if field is not None and name not in WITHOUT_EFFECT}
    for name, field in list(given.items()):
        if name in NEUTRAL and name not in kind.model_fields:
            if not any(_same(field, neutral) for neutral in NEUTRAL[name]):
                raise ApiError(400, f"{short_name(name)}={short(field)} is not supported; leave it out", name)
            del given[name]
        elif name not in kind.model_fields:
            known = [*kind.model_fields, *NEUTRAL, *WITHOUT_EFFECT]
            hint = nearest(name, known).partition("allowed: ")[0].replace("? ", "? Otherwise ") or ""
            raise ApiError(400, f"there is no field {short(name)}; {hint}leave it out", short_name(name))
    if given.get("model", limits.model) != limits.model:
        raise ApiError(
            404,
            f"model {short(given['model'])} is not served; set model to {limits.model!r}, or leave it out",
            "model",
            code="model_not_found",
        )
    return given


def _same(value: Any, neutral: Any) -> bool:
    """Return whether two JSON values are equal; true is not 1."""
    return isinstance(value, bool) == isinstance(neutral, bool) and value == neutral


def _api_error(error: ValidationError) -> ApiError:
    """Return pydantic's first error as an ApiError."""
    first = error.errors(include_url=False)[0]
    where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"]).removeprefix(".")
    param = str(first["loc"][0])
    if first["type"] == "missing":
        return ApiError(400, f"{where} is missing; add it", param)
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"there is no field {short_name(where)}; leave it out", param)
    if first["type"] in OWN_ERRORS:
        return ApiError(400, first["msg"], param)
    expected = first["msg"].removeprefix("Input should ")
    return ApiError(400, f"{where} is {short(first['input'])}; it should {expected}; change it or leave it out", param)


def short(value: Any) -> str:
    """Return a value as text for a message, cut to a length that fits one line."""
    try:
        text = repr(value)
    except ValueError:  # Python writes no integer of more than 4,300 digits
        return "a number with too many digits"
    return short_name(text)


def short_name(text: str) -> str:
    """Return a text cut to a length that fits one line."""
    return text if len(text) <= MESSAGE_VALUE else f"{text[: MESSAGE_VALUE - 3]}..."


def parse_object(raw: bytes, what: str) -> dict[str, Any]:
    """Read a body that is a JSON object of ``what``; it may be nested 200 levels deep.

    Raises:
        ApiError: for anything else.
    """
    try:
        value = from_json(raw, allow_inf_nan=False)
    except ValueError as error:
        raise ApiError(400, f"the body is not JSON: {error}; send an object of {what}") from None
    if not isinstance(value, dict):
        raise ApiError(400, f"the body is JSON, but not an object; send an object of {what}")
    return value
