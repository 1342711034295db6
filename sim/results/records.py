"""What a replay records: requests, iterations, gaps between tokens, plan changes."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from sim.types import Floats, Ints


class Status(IntEnum):
    """How a request ended, or its state when the replay stopped."""

    WAITING = 0
    RUNNING = 1
    FINISHED = 2
    REJECTED = 3


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Moments:
    """When requests arrived and were answered: one entry per request in every array, in order of arrival.

    arrival_s, first_token_s, finish_s: float64[n], seconds since the start of the trace; NaN if it never happened.
    prompt_tokens: int64[n], of the trace. produced_tokens: int64[n], tokens that were generated.
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
    """What an engine records of its requests, in addition to their ``Moments``.

    admitted_s: float64[n], the first admission; a preemption does not change it.
    output_tokens: int64[n], of the trace; a request that did not finish or met the context limit produced fewer.
    preemptions: int64[n]. status: int64[n], values of ``Status``.
    kept_params_share: float64[n], the share of the model's parameters that computed its tokens, averaged over them; NaN
        before the first token.
    quality_nll: float64[n], nats per token lost to the plans it ran under and the KV they dropped, averaged over its
        tokens; NaN before the first token, or without a quality model.
    cached_tokens: int64[n], tokens of its prompt that the prefix cache held at its first admission (on the replica that
        served it last); 0 before.
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
    """One entry per iteration in every array.

    start_s, end_s: float64[m]. prefill_tokens: tokens of prompts (or of recomputed requests) in the batch.
    decode_requests: requests that got a token after their first. running, waiting: requests at its start.
    kv_used_share: float64[m], KV blocks held over KV blocks in the pool, both counted per layer.
    preemptions: requests preempted while the batch was formed.
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
    """Inter-token latencies: ``count[i]`` gaps of ``itl_s[i]`` seconds, including gaps across a preemption."""

    itl_s: Floats
    count: Ints


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Transitions:
    """One entry per plan change in every array.

    time_s: when it was decided. from_plan, to_plan: the running plan and the wanted one (``sim.cost.plan.describe``).
    bytes_in: weights copied from host memory. bytes_freed: weights that left, dropped, replaced or streamed from then
        on; less what the room for streamed layers takes, so it can be negative.
    ready_s: when all of the plan ran; NaN if a later decision superseded it or the replay stopped before.
    preempted: requests that lost their KV, because the pool shrank or because they had to be computed again.
    recomputed_tokens: tokens whose KV those requests held.
    kv_blocks_before, kv_blocks_after: the pool in KV blocks of one layer, at the decision and when the plan was ready
        (or superseded).
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
