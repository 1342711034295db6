"""Prompts as tokens: texts, lists of token ids, and chats by the tokenizer's template."""

from __future__ import annotations

from typing import Any

from sim.serve.requests import ApiError, ChatMessage


def has_chat_template(tokenizer: Any) -> bool:
    """Return whether a tokenizer has a chat template."""
    return bool(getattr(tokenizer, "chat_template", None))


def prompt_tokens(tokenizer: Any, prompt: str | list[int], param: str = "prompt") -> list[int]:
    """Return the token ids of a prompt.

    Raises:
        ApiError: if a text has no tokens.
    """
    tokens = list(tokenizer(prompt, verbose=False).input_ids) if isinstance(prompt, str) else prompt
    if not tokens:
        raise ApiError(400, f"{param} has no tokens; send a text with at least one", param)
    return tokens


def chat_tokens(tokenizer: Any, messages: list[ChatMessage]) -> list[int]:
    """Return the token ids of a chat, by the tokenizer's template.

    Without a template, each message is a line ``role: content``, and ``assistant:`` follows. An answer that comes back
    and begins with white space gets no other space, so the prompt begins as the one before it and its answer did.

    Raises:
        ApiError: if the template refuses the messages.
    """
    plain = [{"role": message.role, "content": message.content} for message in messages]
    if not has_chat_template(tokenizer):
        text = "".join(map(_line, plain)) + "assistant:"
        return prompt_tokens(tokenizer, text, "messages")
    try:
        text = str(tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=True))
    except Exception as error:  # a template is a program of the checkpoint: any error is its refusal
        raise ApiError(400, f"the model's chat template refuses these messages: {error}", "messages") from error
    # The template has written the special tokens itself.
    tokens = list(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
    if not tokens:
        raise ApiError(400, "messages have no tokens; send a text with at least one", "messages")
    return tokens


def _line(message: dict[str, str]) -> str:
    """Return a message as a line of a chat."""
    role, content = message["role"], message["content"]
    between = "" if role == "assistant" and content[:1].isspace() else " "
    return f"{role}:{between}{content}\n"
