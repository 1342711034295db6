"""Checks OpenAI requests: the allowed values of each field, and a clear error for anything else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from jinja2 import TemplateError
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError, from_json


class ApiError(Exception):
    """An error to answer a request with, in OpenAI's format."""

    def __init__(
        self, status: int, message: str, param: str | None = None, kind: str = "invalid_request_error"
    ) -> None:
        """Take the HTTP status, one sentence, and the field that is wrong."""
        super().__init__(message)
        self.status, self.message, self.param, self.kind = status, message, param, kind

    def body(self) -> dict[str, Any]:
        """Return the body of the answer."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": None}}


@dataclass(frozen=True, slots=True)
class Limits:
    """What the server allows. model: the name that it serves. vocabulary: number of token ids."""

    model: str
    vocabulary: int
    max_tokens: int


MESSAGE_VALUE = 80
"""Most characters of a wrong value that a message repeats."""

OWN_ERRORS = ("unsupported", "not_found", "range", "prompt", "empty")
"""Types of the errors that this file raises with a sentence of its own."""


def _only(*harmless: Any) -> AfterValidator:
    """Return the check of a field that the engine does not support: only values that request nothing are allowed."""

    def check(value: Any, info: ValidationInfo) -> Any:
        if value not in harmless:
            raise PydanticCustomError(
                "unsupported",
                "{name}={value} is not supported; this engine decodes greedily, so leave it out",
                {"name": info.field_name, "value": short(value)},
            )
        return value

    return AfterValidator(check)


class StreamOptions(BaseModel):
    """OpenAI's ``stream_options``."""

    model_config = ConfigDict(extra="ignore", strict=True)

    include_usage: bool | None = None


class RequestBody(BaseModel):
    """The fields that completions and chat completions share. Unknown fields are ignored."""

    model_config = ConfigDict(extra="ignore", strict=True)

    n: Annotated[Any, _only(1, None)] = None
    best_of: Annotated[Any, _only(1, None)] = None
    temperature: Annotated[Any, _only(0, None)] = None
    top_p: Annotated[Any, _only(1, None)] = None
    echo: Annotated[Any, _only(False, None)] = None
    logprobs: Annotated[Any, _only(None, False)] = None
    top_logprobs: Annotated[Any, _only(None, 0)] = None
    suffix: Annotated[Any, _only(None, "")] = None
    stop: Annotated[Any, _only(None, [])] = None
    logit_bias: Annotated[Any, _only(None, {})] = None
    presence_penalty: Annotated[Any, _only(0, None)] = None
    frequency_penalty: Annotated[Any, _only(0, None)] = None
    tools: Annotated[Any, _only(None, [])] = None
    functions: Annotated[Any, _only(None, [])] = None
    response_format: Annotated[Any, _only(None, {"type": "text"})] = None
    model: Any = None
    max_tokens: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool | None = None

    @field_validator("model")
    @classmethod
    def _is_served(cls, value: Any, info: ValidationInfo) -> Any:
        limits: Limits = info.context  # type: ignore[assignment]
        if value not in (None, limits.model):
            raise PydanticCustomError(
                "not_found",
                "model {value} is not served; set model to {served}, or leave it out",
                {"value": short(value), "served": repr(limits.model)},
            )
        return value

    @field_validator("max_tokens")
    @classmethod
    def _in_range(cls, value: int | None, info: ValidationInfo) -> int | None:
        limits: Limits = info.context  # type: ignore[assignment]
        if value is not None and not 1 <= value <= limits.max_tokens:
            raise PydanticCustomError(
                "range",
                "max_tokens is {value}; set it to 1 to {most}",
                {"value": short(value), "most": limits.max_tokens},
            )
        return value

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with the token counts."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)


def _one_prompt(value: Any, info: ValidationInfo) -> str | list[int]:
    """Check a prompt: one text or one list of token ids, or a list with one of these."""
    limits: Limits = info.context  # type: ignore[assignment]
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], (str, list)):
        value = value[0]
    ids = isinstance(value, list) and all(
        isinstance(token, int) and not isinstance(token, bool) and 0 <= token < limits.vocabulary for token in value
    )
    if not value or not (isinstance(value, str) or ids):
        raise PydanticCustomError(
            "prompt",
            "prompt must be one text, or one list of token ids from 0 to {most}, and not be empty",
            {"most": limits.vocabulary - 1},
        )
    checked: str | list[int] = value
    return checked


class CompletionBody(RequestBody):
    """The body of ``POST /v1/completions``."""

    prompt: Annotated[str | list[int], BeforeValidator(_one_prompt)]


def _joined_text(value: Any) -> Any:
    """Return content as one text; OpenAI also allows a list of text parts."""
    if isinstance(value, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in value):
        return "".join(str(part.get("text", "")) for part in value)
    return value


class ChatMessage(BaseModel):
    """One message of a chat."""

    role: Literal["system", "user", "assistant"]
    content: Annotated[str, BeforeValidator(_joined_text)]


class ChatBody(RequestBody):
    """The body of ``POST /v1/chat/completions``."""

    messages: list[ChatMessage]

    @model_validator(mode="before")
    @classmethod
    def _newer_name(cls, value: Any) -> Any:
        if isinstance(value, dict) and value.get("max_completion_tokens") is not None:
            return {**value, "max_tokens": value["max_completion_tokens"]}
        return value

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
    try:
        return kind.model_validate_json(raw, context=limits)
    except ValidationError as error:
        raise _api_error(error) from None


def _api_error(error: ValidationError) -> ApiError:
    """Return pydantic's first error as an ApiError."""
    first = error.errors(include_url=False)[0]
    where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"]).removeprefix(".")
    param = str(first["loc"][0]) if first["loc"] else None
    if param is None:
        return ApiError(400, f"the body must be a JSON object with OpenAI's fields: {first['msg']}")
    if first["type"] == "missing":
        return ApiError(400, f"{where} is missing; add it", param)
    if first["type"] in OWN_ERRORS:
        return ApiError(404 if first["type"] == "not_found" else 400, first["msg"], param)
    expected = first["msg"].removeprefix("Input should ")
    return ApiError(400, f"{where} is {short(first['input'])}; it should {expected}; change it or leave it out", param)


def short(value: Any) -> str:
    """Return a value as text for a message, cut to a length that fits one line."""
    try:
        text = repr(value)
    except ValueError:  # Python writes no integer of more than 4,300 digits
        return "a number with too many digits"
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
        raise ApiError(400, f"the body is a JSON {type(value).__name__}; send an object of {what}")
    return value


# --- Prompts as tokens -----------------------------------------------------------------------------------------------


def has_chat_template(tokenizer: Any) -> bool:
    """Return whether a tokenizer has a chat template."""
    return bool(getattr(tokenizer, "chat_template", None))


def prompt_tokens(tokenizer: Any, prompt: str | list[int]) -> list[int]:
    """Return the token ids of a prompt.

    Raises:
        ApiError: if a text has no tokens.
    """
    tokens = list(tokenizer(prompt, verbose=False).input_ids) if isinstance(prompt, str) else prompt
    if not tokens:
        raise ApiError(400, "prompt has no tokens; send a text with at least one", "prompt")
    return tokens


def chat_tokens(tokenizer: Any, messages: list[ChatMessage]) -> list[int]:
    """Return the token ids of a chat, by the tokenizer's template.

    Without a template, each message is a line ``role: content``, and ``assistant:`` follows.

    Raises:
        ApiError: if the template refuses the messages.
    """
    plain = [message.model_dump() for message in messages]
    if not has_chat_template(tokenizer):
        text = "".join(f"{message['role']}: {message['content']}\n" for message in plain) + "assistant:"
        return prompt_tokens(tokenizer, text)
    try:
        text = str(tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=True))
    except TemplateError as error:
        raise ApiError(400, f"the model's chat template refuses these messages: {error}", "messages") from error
    # The template has written the special tokens itself.
    return list(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
