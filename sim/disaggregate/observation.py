"""What a learned policy observes of a disaggregated system, and which numbers of prefill replicas it may choose.

``RolesObserver`` turns the history of ``SystemState`` into numbers. They come from the states of the replicas and from
counters of requests, tokens and links; they contain no output length and nothing of the future.
"""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass, field

import numpy as np

from sim.disaggregate.roles import SystemState, Totals, kv_share
from sim.policies.observation.prune import Entry, ObservationSpec
from sim.policies.observation.serve import log_scaled
from sim.types import Bools, Floats, Floats32

SMOOTHING_S = (10.0, 60.0)
"""Time scales of smoothed rates, in seconds."""
LEAST_RPS = 1e-6
"""Requests per second below which nothing is known of their lengths."""

ROLE_ENTRIES = (
    Entry("to_prefill", "share", 0.0, 1.0, "of the replicas, those that have the role of prefill or will have it"),
    Entry("prefill", "share", 0.0, 1.0, "of the replicas, those that accept prompts"),
    Entry("decode", "share", 0.0, 1.0, "of the replicas, those that accept KV"),
    Entry("turning", "share", 0.0, 1.0, "of the replicas, those whose role is changing"),
    Entry("away", "share", 0.0, 1.0, "of the replicas, those in an outage, from its notice until they serve again"),
    Entry("ending", "log2(1 + requests) / 10", 0.0, 1.0, "requests of replicas that accept no more"),
    Entry("waiting", "log2(1 + requests) / 10", 0.0, 1.0, "prompts that wait"),
    Entry("waiting_tokens", "log2(1 + tokens) / 20", 0.0, 1.0, "tokens of the prompts that wait"),
    Entry("oldest_wait", "s / 2", 0.0, 2.0, "the longest wait of a prompt at a prefill replica"),
    Entry("prefill_running", "log2(1 + requests) / 10", 0.0, 1.0, "prompts that are computed"),
    Entry("prefill_kv", "share", 0.0, 1.0, "of the KV pools of prefill replicas, what is held"),
    Entry("ready", "log2(1 + requests) / 10", 0.0, 1.0, "requests whose KV waits for room at decode"),
    Entry("in_flight", "log2(1 + requests) / 10", 0.0, 1.0, "requests whose KV is being sent"),
    Entry("decode_running", "log2(1 + requests) / 10", 0.0, 1.0, "requests that produce tokens"),
    Entry("decode_waiting", "log2(1 + requests) / 10", 0.0, 1.0, "preempted requests at decode replicas"),
    Entry("decode_kv", "share", 0.0, 1.0, "of the KV pools of decode replicas, what is held"),
    Entry("decode_kv_most", "share", 0.0, 1.0, "of the fullest KV pool of a decode replica, what is held"),
    Entry("arrivals_10s", "log2(1 + requests/s) / 8", 0.0, 1.0, "arrival rate, smoothed over ten seconds"),
    Entry("arrivals_60s", "log2(1 + requests/s) / 8", 0.0, 1.0, "over sixty"),
    Entry("prompts_10s", "log2(1 + tokens/s) / 18", 0.0, 1.0, "prompt tokens that arrive, over ten seconds"),
    Entry("prompts_60s", "log2(1 + tokens/s) / 18", 0.0, 1.0, "over sixty"),
    Entry("prompt_tokens_10s", "log2(1 + tokens) / 14", 0.0, 1.0, "mean prompt of these, over ten seconds"),
    Entry("produced_10s", "log2(1 + tokens/s) / 16", 0.0, 1.0, "tokens that decode produces, over ten seconds"),
    Entry("produced_60s", "log2(1 + tokens/s) / 16", 0.0, 1.0, "over sixty"),
    Entry("answer_tokens_60s", "log2(1 + tokens) / 12", 0.0, 1.0, "tokens per request that finished, over sixty"),
    Entry("first_tokens_10s", "log2(1 + requests/s) / 8", 0.0, 1.0, "prompts that were computed, over ten seconds"),
    Entry("ttft_10s", "s / 2", 0.0, 2.0, "mean TTFT of those"),
    Entry("prefill_busy_10s", "share", 0.0, 1.0, "of the replicas' time, in iterations of prefill, over ten seconds"),
    Entry("decode_busy_10s", "share", 0.0, 1.0, "of the replicas' time, in iterations of decode, over ten seconds"),
    Entry("decode_iteration_10s", "s / 0.1", 0.0, 2.0, "mean iteration of decode, over ten seconds"),
    Entry("link_busy_10s", "share", 0.0, 1.0, "of the time of the links, carrying KV, over ten seconds"),
)


def roles_table(replicas: int) -> ObservationSpec:
    """Return the table for a number of replicas: an action for each number of prefill replicas from 1."""
    return ObservationSpec(ROLE_ENTRIES, tuple(f"{count} prefill" for count in range(1, replicas)))


def possible_flags(state: SystemState) -> Bools:
    """Return which actions are legal, bool[replicas - 1]: action i is i + 1 prefill replicas."""
    flags = np.zeros(state.replicas - 1, dtype=np.bool_)
    flags[np.array(state.possible, dtype=np.int64) - 1] = True
    return flags


@dataclass(slots=True)
class RolesObserver:
    """Turns successive states into observations; each replay needs a new one.

    totals: the counters of the last state. rates: their smoothed rates per second, a row for each of ``SMOOTHING_S``.
    """

    time_s: float = 0.0
    totals: Floats = field(default_factory=lambda: np.array(astuple(Totals()), dtype=np.float64))
    rates: Floats = field(default_factory=lambda: np.zeros((len(SMOOTHING_S), len(astuple(Totals())))))

    def __call__(self, state: SystemState) -> Floats32:
        """Return the features at this state, float32[entries]."""
        self._smooth(state)
        ten, sixty = (Totals(*row) for row in self.rates.tolist())
        prefill, decode, count = state.prefill, state.decode, state.replicas
        values = (
            state.to_prefill / count,
            len(prefill) / count,
            len(decode) / count,
            state.turning / count,
            state.away / count,
            log_scaled(state.ending, 10.0),
            log_scaled(state.held + sum(one.waiting for one in prefill), 10.0),
            log_scaled(state.held_tokens + sum(one.waiting_tokens for one in prefill), 20.0),
            min(max((one.oldest_wait_s for one in prefill), default=0.0) / 2.0, 2.0),
            log_scaled(sum(one.running for one in prefill), 10.0),
            min(kv_share(prefill), 1.0),
            log_scaled(state.ready, 10.0),
            log_scaled(state.in_flight, 10.0),
            log_scaled(sum(one.running for one in decode), 10.0),
            log_scaled(sum(one.waiting for one in decode), 10.0),
            min(kv_share(decode), 1.0),
            min(max((kv_share([one]) for one in decode), default=1.0), 1.0),
            log_scaled(ten.arrived, 8.0),
            log_scaled(sixty.arrived, 8.0),
            log_scaled(ten.arrived_prompt_tokens, 18.0),
            log_scaled(sixty.arrived_prompt_tokens, 18.0),
            log_scaled(_ratio(ten.arrived_prompt_tokens, ten.arrived), 14.0),
            log_scaled(ten.produced_tokens, 16.0),
            log_scaled(sixty.produced_tokens, 16.0),
            log_scaled(_ratio(sixty.produced_tokens, sixty.finished), 12.0),
            log_scaled(ten.first_tokens, 8.0),
            min(_ratio(ten.ttft_sum_s, ten.first_tokens) / 2.0, 2.0),
            min(ten.prefill_busy_s / count, 1.0),
            min(ten.decode_busy_s / count, 1.0),
            min(_ratio(ten.decode_busy_s, ten.decode_iterations) / 0.1, 2.0),
            min(_ratio(ten.link_busy_s, ten.link_s), 1.0),
        )
        return np.array(values, dtype=np.float32)

    def _smooth(self, state: SystemState) -> None:
        """Update the smoothed rates to a state."""
        passed_s, totals = state.time_s - self.time_s, np.array(astuple(state.totals), dtype=np.float64)
        if passed_s > 0.0:
            now = (totals - self.totals) / passed_s
            weights = np.array([1.0 - math.exp(-passed_s / scale_s) for scale_s in SMOOTHING_S])
            self.rates += weights[:, None] * (now - self.rates)
            self.time_s, self.totals = state.time_s, totals


def _ratio(above: float, below: float) -> float:
    return above / below if below > LEAST_RPS else 0.0
