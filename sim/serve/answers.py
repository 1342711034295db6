"""The bodies of OpenAI answers, complete and streamed, for completions and chat completions."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class AnswerFormat:
    """How an endpoint of OpenAI names an answer.

    id_prefix: of the answer's id. complete_object, chunk_object: its ``object``, complete or as a piece of a stream.
    complete: fields of a choice with the full text.
    chunk: fields of a choice with a piece of text; the flag says whether it is the first.
    """

    id_prefix: str
    complete_object: str
    chunk_object: str
    complete: Callable[[str], dict[str, Any]]
    chunk: Callable[[str, bool], dict[str, Any]]


COMPLETION = AnswerFormat(
    id_prefix="cmpl",
    complete_object="text_completion",
    chunk_object="text_completion",
    complete=lambda text: {"text": text},
    chunk=lambda text, _first: {"text": text},
)
CHAT = AnswerFormat(
    id_prefix="chatcmpl",
    complete_object="chat.completion",
    chunk_object="chat.completion.chunk",
    complete=lambda text: {"message": {"role": "assistant", "content": text}},
    chunk=lambda text, first: {"delta": ({"role": "assistant"} if first else {}) | {"content": text}},
)


def choice(index: int, fields: Mapping[str, Any], finish_reason: str | None) -> dict[str, Any]:
    """Return one choice of an answer; finish_reason is None before its last piece."""
    return {"index": index, **fields, "logprobs": None, "finish_reason": finish_reason}


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """Return the token counts of an answer."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def event(content: Mapping[str, Any]) -> str:
    """Return one server-sent event."""
    return f"data: {json.dumps(content)}\n\n"


END_OF_STREAM = "data: [DONE]\n\n"
