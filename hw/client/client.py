"""Replays a trace against any OpenAI-compatible server: ``python -m hw.client client.url=http://127.0.0.1:8000``.

It writes the same records and summary as sim.replay and hw.replay, so that ``hw.compare`` can compare a simulated run
with a real server. In an open loop each request is sent at its arrival time, whatever the server does. In a closed loop
a fixed number of users each send their next request when the last one is answered. What only a server knows
(iterations, KV use, plans) stays empty. This needs no torch and no tokenizer: prompts are random token ids, or text of
about the right length.
"""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from httpx_sse import aconnect_sse
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from hw.engine.prompts import RandomPrompts
from sim.config import ReplayConfig, build, run_command
from sim.engine.protocol import Request
from sim.errors import ConfigError
from sim.paths import find_data
from sim.replay.loop import requests_of
from sim.replay.run import build_trace
from sim.results.metrics import Slo, records_frame, summarise, transitions_frame
from sim.results.records import Iterations, Records, Status, TokenGaps, Transitions
from sim.results.report import print_summary
from sim.results.run_folder import provenance, write_json, write_parquet, write_text

CHARACTERS_A_TOKEN = 4
"""Roughly, in English text."""
TEXT_CHARACTERS = 400_000
"""How much of a text prompts are cut from."""
LOOPS = ("open", "closed")


@dataclass(kw_only=True)
class ClientSettings:
    """How requests are sent.

    url: where the server listens, without /v1. served_model: the model's name there; null takes the name of model=.
    loop: open or closed. users: of a closed loop.
    max_connections: most requests under way, also in an open loop; a request that has to wait for one is late, and its
        wait counts in its TTFT.
    timeout_s: of one request. retries: how often to send a request again that failed.
    chat: send text to /v1/chat/completions, as one user message, instead of /v1/completions; the server adds the tokens
        of its template, and its ``usage`` says how many tokens a prompt really had.
    text: cut prompts from this file, about four characters per token; null sends random token ids.
    ignore_eos: request exactly the trace's output length, as vLLM and hw.serve support it.
    """

    url: str = "http://127.0.0.1:8000"
    served_model: str | None = None
    loop: str = "open"
    users: int = 4
    max_connections: int = 256
    timeout_s: float = 600.0
    retries: int = 0
    chat: bool = False
    text: str | None = None
    ignore_eos: bool = True


@dataclass(kw_only=True)
class ClientConfig(ReplayConfig):
    """The configuration of ``python -m hw.client``."""

    client: ClientSettings = field(default_factory=ClientSettings)


ConfigStore.instance().store(name="client_schema", node=ClientConfig)


@dataclass(slots=True)
class Answer:
    """One request and what came back.

    arrival_s, sent_s, token_s, finish_s: seconds since the start. prompt_tokens, completion_tokens: the server's
    ``usage``; None if it sent none. error: why it failed; None if it did not.
    """

    request: Request
    arrival_s: float
    sent_s: float = math.nan
    token_s: list[float] = field(default_factory=list)
    finish_s: float = math.nan
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    error: str | None = None
    retries: int = 0


class Replayer:
    """Sends requests and records when their tokens come."""

    def __init__(
        self,
        settings: ClientSettings,
        model: str,
        vocabulary: int,
        *,
        seed: int = 0,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        """Send to one server; ``transport`` is for tests.

        Raises:
            ConfigError: for an unknown loop, numbers out of range, or a missing text.
        """
        if settings.loop not in LOOPS:
            raise ConfigError(f"unknown client.loop {settings.loop!r}; allowed: {', '.join(LOOPS)}")
        if min(settings.users, settings.max_connections) < 1 or settings.retries < 0 or not settings.timeout_s > 0:
            raise ConfigError(
                f"client.users is {settings.users}, max_connections {settings.max_connections}, retries "
                f"{settings.retries} and timeout_s {settings.timeout_s}; users and max_connections must be at least 1, "
                "retries at least 0 and timeout_s above 0"
            )
        self._settings, self._model = settings, settings.served_model or model
        self._ids = RandomPrompts(vocabulary, seed)
        self._text = ""
        if settings.text is not None:
            file = find_data(settings.text)
            if not file.is_file():
                raise ConfigError(f"no text at {file}; set client.text= to a file, or to null for random token ids")
            self._text = file.read_text(encoding="utf-8", errors="ignore")[:TEXT_CHARACTERS]
        elif settings.chat:
            raise ConfigError("client.chat=true sends text, but client.text is null; set it to a file")
        self._seed, self._transport = seed, transport
        self.answers: list[Answer] = []

    async def run(self, requests: Sequence[Request]) -> list[Answer]:
        """Send all requests; return the answers in order of arrival."""
        limits = httpx.Limits(max_connections=self._settings.max_connections)
        timeout = httpx.Timeout(self._settings.timeout_s, pool=None)
        async with httpx.AsyncClient(
            base_url=self._settings.url, limits=limits, timeout=timeout, transport=self._transport
        ) as http:
            self._start_s = time.perf_counter()
            if self._settings.loop == "open":
                await asyncio.gather(*(self._at_arrival(http, request) for request in requests))
            else:
                waiting = iter(requests)
                await asyncio.gather(*(self._user(http, waiting) for _ in range(self._settings.users)))
        self.answers.sort(key=lambda answer: (answer.arrival_s, answer.request.request_id))
        return self.answers

    def _now_s(self) -> float:
        return time.perf_counter() - self._start_s

    async def _at_arrival(self, http: httpx.AsyncClient, request: Request) -> None:
        await asyncio.sleep(request.arrival_s - self._now_s())
        await self._send(http, Answer(request, request.arrival_s))

    async def _user(self, http: httpx.AsyncClient, waiting: Any) -> None:
        for request in waiting:
            await self._send(http, Answer(request, self._now_s()))

    async def _send(self, http: httpx.AsyncClient, answer: Answer) -> None:
        """Send a request until it is answered or retries are used up; record the outcome in ``answer``."""
        self.answers.append(answer)
        for attempt in range(self._settings.retries + 1):
            answer.retries, answer.error = attempt, None
            answer.token_s.clear()
            try:
                await self._stream(http, answer)
            # The last three: an answer that is JSON, but not what OpenAI's servers send.
            except (httpx.HTTPError, ValueError, KeyError, TypeError, AttributeError) as error:
                answer.error = f"{type(error).__name__}: {error}"
            if answer.error is None:
                return

    async def _stream(self, http: httpx.AsyncClient, answer: Answer) -> None:
        """Send a request once and record when each token comes.

        Raises:
            ValueError: for an error of the server, or an answer without tokens.
        """
        answer.sent_s = self._now_s()
        path = "/v1/chat/completions" if self._settings.chat else "/v1/completions"
        async with aconnect_sse(http, "POST", path, json=self._body(answer.request)) as source:
            if source.response.status_code != 200:
                raw = (await source.response.aread()).decode("utf-8", errors="replace")
                raise ValueError(f"HTTP {source.response.status_code}: {raw[:300]}")
            async for sent in source.aiter_sse():
                if sent.data == "[DONE]":
                    break
                event = json.loads(sent.data)
                if "error" in event:
                    raise ValueError(str(event["error"]))
                if event.get("usage"):
                    answer.prompt_tokens = event["usage"]["prompt_tokens"]
                    answer.completion_tokens = event["usage"]["completion_tokens"]
                if any(_brings_token(choice, first=not answer.token_s) for choice in event["choices"]):
                    answer.token_s.append(self._now_s())
        if not answer.token_s:
            raise ValueError("the answer had no token")
        answer.finish_s = answer.token_s[-1]

    def _body(self, request: Request) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self._model,
            "max_tokens": request.output_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self._settings.ignore_eos:
            body["ignore_eos"] = True
        if not self._text:
            return body | {"prompt": list(self._ids(request.request_id, request.prompt_tokens))}
        length = CHARACTERS_A_TOKEN * request.prompt_tokens
        start = int(np.random.default_rng((self._seed, request.request_id)).integers(max(1, len(self._text) - length)))
        piece = self._text[start : start + length]
        if self._settings.chat:
            return body | {"messages": [{"role": "user", "content": piece}]}
        return body | {"prompt": piece}


def _brings_token(choice: Mapping[str, Any], *, first: bool) -> bool:
    """Return whether a piece of a stream has a token; a piece of a chat with only a role or an end has none.

    If the text of an answer stays empty (special tokens, an incomplete character), its end counts as the first token.
    """
    if "text" in choice:
        return True
    return bool((choice.get("delta") or {}).get("content")) or (first and choice.get("finish_reason") is not None)


def records_of(answers: Sequence[Answer]) -> Records:
    """Return one row per request, with the server's token counts, or the number of pieces if it sent no counts."""
    counted = [0 if a.error else (a.completion_tokens or len(a.token_s)) for a in answers]

    def floats(values: Sequence[float]) -> Any:
        return np.array(values, dtype=np.float64)

    def ints(values: Sequence[int]) -> Any:
        return np.array(values, dtype=np.int64)

    unknown = np.full(len(answers), np.nan)
    return Records(
        arrival_s=floats([a.arrival_s for a in answers]),
        prompt_tokens=ints([a.request.prompt_tokens for a in answers]),
        output_tokens=ints([a.request.output_tokens for a in answers]),
        produced_tokens=ints(counted),
        admitted_s=floats([a.sent_s for a in answers]),
        first_token_s=floats([math.nan if a.error else a.token_s[0] for a in answers]),
        finish_s=floats([math.nan if a.error else a.finish_s for a in answers]),
        preemptions=ints([0] * len(answers)),
        status=ints([int(Status.REJECTED if a.error else Status.FINISHED) for a in answers]),
        kept_params_share=unknown,
        quality_nll=unknown,
        cached_tokens=ints([0] * len(answers)),
    )


def gaps_of(answers: Sequence[Answer]) -> TokenGaps:
    """Return the gaps between two pieces of one answer, over all answers."""
    gaps = [
        later - earlier
        for a in answers
        if not a.error
        for earlier, later in zip(a.token_s, a.token_s[1:], strict=False)
    ]
    itl_s, count = np.unique(np.array(gaps, dtype=np.float64), return_counts=True)
    return TokenGaps(itl_s=itl_s, count=count.astype(np.int64))


def summary_of(answers: Sequence[Answer], slo: Slo) -> dict[str, Any]:
    """Return the summary of a replay; figures that only a server knows are 0 or None."""
    records = records_of(answers)
    ends = records.finish_s[np.isfinite(records.finish_s)]
    # A client sees no iterations. One row that spans the run gives the summary its makespan.
    span = np.array([ends.max()]) if len(ends) else np.array([])
    zeros = np.zeros(len(span), dtype=np.int64)
    spanning = Iterations(
        start_s=np.zeros(len(span)),
        end_s=span,
        prefill_tokens=zeros,
        decode_requests=zeros,
        running=zeros,
        waiting=zeros,
        kv_used_share=np.zeros(len(span)),
        preemptions=zeros,
        extrapolated=np.zeros(len(span), dtype=np.bool_),
    )
    summary = summarise(records, spanning, gaps_of(answers), slo)
    return summary | {"iterations": 0, "interrupted": False}


def no_transitions() -> Transitions:
    """Return an empty table: a client sees no plan changes."""
    empty_int, empty_float = np.array([], dtype=np.int64), np.array([], dtype=np.float64)
    return Transitions(
        time_s=empty_float,
        from_plan=(),
        to_plan=(),
        bytes_in=empty_int,
        bytes_freed=empty_int,
        ready_s=empty_float,
        preempted=empty_int,
        recomputed_tokens=empty_int,
        kv_blocks_before=empty_int,
        kv_blocks_after=empty_int,
    )


def run_client(cfg: DictConfig) -> None:
    """Replay against the server, write the run folder, print the table."""
    folder, console = Path(HydraConfig.get().runtime.output_dir), Console()
    trace, slo, model = build_trace(cfg), build(cfg.slo), build(cfg.model)
    settings = ClientSettings(**{str(key): value for key, value in cfg.client.items()})
    replayer = Replayer(settings, model.name, model.vocab_size, seed=cfg.seed)
    write_text(folder / "config.yaml", OmegaConf.to_yaml(cfg, resolve=True))
    write_json(
        folder / "provenance.json",
        {
            **provenance(cfg.seed),
            "trace": {"source": trace.source, "sha256": trace.content_hash(), "history": trace.history},
        },
    )
    answers = asyncio.run(replayer.run(requests_of(trace)))
    summary = summary_of(answers, slo)
    errors = sorted({a.error for a in answers if a.error})
    sent = [a.prompt_tokens for a in answers if a.prompt_tokens is not None]
    write_parquet(folder / "records.parquet", records_frame(records_of(answers), slo))
    write_parquet(folder / "transitions.parquet", transitions_frame(no_transitions()))
    write_json(
        folder / "client.json",
        {
            "url": settings.url,
            "loop": settings.loop,
            "failed": sum(a.error is not None for a in answers),
            "errors": errors[:20],
            "retried": sum(a.retries for a in answers),
            "late_p99_s": float(np.quantile([a.sent_s - a.arrival_s for a in answers], 0.99)),
            "prompt_tokens_of_usage": sum(sent),
            "prompt_tokens_of_trace": int(trace.prompt_tokens.sum()),
        },
    )
    write_json(folder / "summary.json", summary)  # last: a folder with a summary is complete
    print_summary(summary, f"{len(trace):,} requests to {settings.url}", console)
    for error in errors[:3]:
        console.print(f"failed: {error}", markup=False, highlight=False, soft_wrap=True)
    console.print(f"files: {folder}", highlight=False, soft_wrap=True)


def main() -> None:
    """Run ``python -m hw.client``."""
    run_command(run_client, "client")
