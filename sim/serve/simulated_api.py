"""The HTTP side of the simulated server: how long answers are, and what they say."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from prometheus_client.metrics_core import Metric
from pydantic import BaseModel

from sim.cost.model_spec import ModelSpec
from sim.serve.api import Api
from sim.serve.engine_thread import ServedRequest
from sim.serve.filler import FillerTokenizer, answer_key, filler_answer, hash_ids
from sim.serve.metrics import EngineMetrics
from sim.serve.requests import ApiError, ChatBody, CompletionBody, RequestBody
from sim.serve.settings import ServerConfig
from sim.serve.simulated_thread import SimulatedRequest, SimulatedThread
from sim.types import Ints

NOTE = "simulated: answers are filler words, times are those of the simulator"


class _Shortest(BaseModel):
    """vLLM's ``min_tokens``: tokens before which neither the end of the text nor a stop string ends an answer."""

    min_tokens: int = 0


class SimulatedCompletionBody(_Shortest, CompletionBody):
    """The body of ``POST /v1/completions``."""


class SimulatedChatBody(_Shortest, ChatBody):
    """The body of ``POST /v1/chat/completions``."""


class SimulatedMetrics(EngineMetrics):
    """The metrics of the engine, and how late the simulation is."""

    def __init__(self, thread: SimulatedThread, model: str) -> None:
        """Measure the engine of a thread."""
        self._simulated = thread
        super().__init__(thread, model)

    def collect(self) -> Iterator[Metric]:
        """Yield what one state shows."""
        yield from super().collect()
        thread = self._simulated
        yield self._gauge("rap:simulated_seconds", "Simulated seconds since the start.", thread.state.time_s)
        yield self._gauge("rap:largest_lag_seconds", "Most real seconds by which tokens left late.", thread.lag_s)


class SimulatedApi(Api):
    """The HTTP side over the simulated engine.

    An answer has ``max_tokens`` tokens. If the request does not say how many, it ends like one of the answers of a
    trace, drawn by the seed and the prompt; ``ignore_eos`` lets it go on to the longest answer allowed.
    """

    completion_body = SimulatedCompletionBody
    chat_body = SimulatedChatBody

    def __init__(
        self, thread: SimulatedThread, model: ModelSpec, config: ServerConfig, lengths: Ints, *, seed: int = 0
    ) -> None:
        """Serve the engine of a thread.

        Args:
            lengths: int64[n], tokens of answers to draw from. seed: of lengths and words.
        """
        self._lengths, self._seed = lengths, seed
        self._hash_block_tokens = thread.replica.config.hash_block_tokens
        self._prefix_caching = thread.replica.config.prefix_caching
        super().__init__(
            thread,
            model,
            FillerTokenizer(model.vocab_size),
            config,
            note=NOTE,
            metrics=SimulatedMetrics(thread, model.name),
        )

    def requests_of(self, body: RequestBody, tokens: Sequence[int], most: int) -> Sequence[ServedRequest]:
        """Return the ``n`` requests of one prompt, each with the length of its answer.

        Raises:
            ApiError: for an answer that must be longer than it may be.
        """
        assert isinstance(body, _Shortest)
        if not 0 <= body.min_tokens <= most:
            raise ApiError(
                400, f"min_tokens is {body.min_tokens}; set it to 0 to {most}, the longest answer", "min_tokens"
            )
        found = []
        for sampling in body.samplings():
            seed = () if sampling is None else tuple(number % 2**64 for number in sampling.seed)
            key = answer_key(tokens, (self._seed, *seed))
            length, ends = most, False
            if body.most_tokens is None and not body.ignore_eos:
                drawn = max(int(self._lengths[key % len(self._lengths)]), body.min_tokens)
                length, ends = min(drawn, most), drawn <= most
            ids: tuple[int, ...] = ()
            if self._prefix_caching:  # of the answer too, so that a prompt that begins with both finds both
                ids = hash_ids([*tokens, *filler_answer(key, length)], self._hash_block_tokens)
            found.append(
                SimulatedRequest(
                    tokens,
                    length,
                    body.ignore_eos,
                    sampling=sampling,
                    min_tokens=body.min_tokens,
                    hash_ids=ids,
                    key=key,
                    ends=ends,
                )
            )
        return found
