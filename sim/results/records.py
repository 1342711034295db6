"""What a replay leaves behind: one row a request, one row an iteration, the gaps between tokens."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from sim.types import Floats, Ints


class Status(IntEnum):
    """How a request ended, or where it stood when the replay stopped."""

    WAITING = 0
    RUNNING = 1
    FINISHED = 2
    REJECTED = 3


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Moments:
    """When requests arrived and were answered: one entry a request in every array, in order of arrival.

    arrival_s, first_token_s, finish_s: float64[n], seconds since the start of the trace; NaN where a moment never came.
    prompt_tokens: int64[n], what the trace asked for. produced_tokens: int64[n], what was produced.
    """

    arrival_s: Floats
    first_token_s: Floats
    finish_s: Floats
    prompt_tokens: Ints
    produced_tokens: Ints

    def __len__(self) -> int:
        return len(self.arrival_s)

    @property
    def ttft_s(self) -> Floats:
        """First token minus arrival, queueing included; NaN before the first token."""
        return self.first_token_s - self.arrival_s

    @property
    def e2e_s(self) -> Floats:
        """Last token minus arrival; NaN for a request that did not finish."""
        return self.finish_s - self.arrival_s

    @property
    def tpot_s(self) -> Floats:
        """(Last token - first token) / (produced tokens - 1); NaN for one token or an unfinished request."""
        gaps = np.where(self.produced_tokens > 1, self.produced_tokens - 1, np.nan)
        return (self.finish_s - self.first_token_s) / gaps


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Records(Moments):
    """What an engine knows of its requests, beside their ``Moments``.

    admitted_s: float64[n], the first admission; a preemption does not move it.
    output_tokens: int64[n], what the trace asked for; fewer are produced for a request that did not finish or met the
        context limit.
    preemptions: int64[n]. status: int64[n], values of ``Status``.
    kept_params_share: float64[n], the share of the model's parameters that made its tokens, on average over them; NaN
        before the first token.
    quality_nll: float64[n], nats a token that the plans it ran under cost, on average over its tokens, the KV blocks
        it lacked included; NaN before the first token, or where no quality model was given.
    cached_tokens: int64[n], tokens of its prompt that the prefix cache had when it was first admitted (where it was
        served last); 0 before.
    """

    output_tokens: Ints
    admitted_s: Floats
    preemptions: Ints
    status: Ints
    kept_params_share: Floats
    quality_nll: Floats
    cached_tokens: Ints


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Iterations:
    """One entry an iteration in every array.

    start_s, end_s: float64[m]. prefill_tokens: tokens of prompts (or of recomputed requests) it computed.
    decode_requests: requests it gave one more token after their first. running, waiting: requests as it started.
    kv_used_share: float64[m], layer blocks held over the pool. preemptions: requests preempted as it was formed.
    extrapolated: bool[m], whether its price lies outside the calibrated range.
    """

    start_s: Floats
    end_s: Floats
    prefill_tokens: Ints
    decode_requests: Ints
    running: Ints
    waiting: Ints
    kv_used_share: Floats
    preemptions: Ints
    extrapolated: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.start_s)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TokenGaps:
    """Inter-token latencies: ``count[i]`` gaps of ``itl_s[i]`` seconds, gaps across a preemption included."""

    itl_s: Floats
    count: Ints


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Transitions:
    """One entry a plan change in every array.

    time_s: when it was decided. from_plan, to_plan: what ran then and what was wanted (``sim.cost.plan.describe``).
    bytes_in: copied from host memory for it. bytes_freed: weights that left, dropped or replaced.
    ready_s: when all of it ran; NaN when a later decision superseded it or the replay stopped before.
    preempted: requests that lost their KV to it, because the pool shrank or they had to be computed again.
    recomputed_tokens: tokens whose KV those had held. kv_blocks_before, kv_blocks_after: the pool in KV blocks of one
    layer as it was decided, and when it was ready (or superseded).
    """

    time_s: Floats
    from_plan: tuple[str, ...]
    to_plan: tuple[str, ...]
    bytes_in: Ints
    bytes_freed: Ints
    ready_s: Floats
    preempted: Ints
    recomputed_tokens: Ints
    kv_blocks_before: Ints
    kv_blocks_after: Ints

    def __len__(self) -> int:
        return len(self.time_s)
