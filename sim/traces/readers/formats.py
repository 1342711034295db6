"""The columns that identify each published format, so that an error of the wrong reader can name the right one."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Format:
    """One format. option: the file of conf/trace that reads it. columns: those that only this format has together."""

    option: str
    title: str
    columns: frozenset[str]


def _format(option: str, title: str, *columns: str) -> Format:
    return Format(option, title, frozenset(column.casefold() for column in columns))


FORMATS = (  # the first that fits counts, so those with more columns come first
    _format("file", "this project's own format", "arrival_s", "prompt_tokens", "output_tokens"),
    _format("azure_multimodal", "Azure multimodal CSV", "TIMESTAMP", "NumImages", "ContextTokens", "GeneratedTokens"),
    _format("azure_conv", "Azure 2023 CSV", "TIMESTAMP", "ContextTokens", "GeneratedTokens"),
    _format("burstgpt", "BurstGPT CSV", "Timestamp", "Request tokens", "Response tokens"),
    _format("vidur", "Vidur CSV", "arrived_at", "num_prefill_tokens", "num_decode_tokens"),
    _format("arxiv_lengths", "lengths without arrivals", "num_prefill_tokens", "num_decode_tokens"),
    _format("splitwise", "Splitwise CSV", "arrival_timestamp", "prompt_size", "token_size"),
    _format("inference_sim", "inference-sim TraceV2", "arrival_time_us", "input_tokens", "output_tokens"),
    _format("llmservingsim", "LLMServingSim JSONL", "arrival_time_ns", "input_toks", "output_toks"),
    _format("qwen_bailian", "Qwen-Bailian JSONL", "chat_id", "parent_chat_id", "timestamp", "input_length"),
    _format("vllm_bench", "a result of vllm bench serve", "input_lens", "output_lens"),
    _format("guidellm", "a result of guidellm", "benchmarks"),
    _format("aiperf", "a result of aiperf", "metadata", "metrics"),
    _format("aiperf", "aiperf JSONL", "text_input", "output_length"),
    _format("mooncake", "Mooncake JSONL", "input_length", "output_length"),
)


def format_of(names: Collection[str]) -> Format | None:
    """Return the format whose columns are all among ``names``, in any case."""
    have = {name.strip().casefold() for name in names}
    return next((known for known in FORMATS if known.columns <= have), None)
