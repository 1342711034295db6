"""A request inside a replica: its progress, its KV blocks and its record; and the queues of all requests.

Used by the Python replica only; the compiled kernel has its own form (``REQUEST`` in sim/engine/kernel/state.py).
"""

from __future__ import annotations

import math
from bisect import insort
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from sim.cost.model_spec import ModelSpec
from sim.engine.block_table import BlockTable
from sim.engine.protocol import (
    SUBMITTED,
    Request,
    Sessions,
    check_hash_ids,
    check_submitted,
    late_request,
    repeated_hash_id,
)
from sim.errors import ConfigError
from sim.results.records import Records, Status
from sim.types import Floats, Ints


@dataclass(slots=True, eq=False)
class LiveRequest:
    """One request from its arrival on.

    output_limit: tokens it may produce: those of its trace, cut at the context limit.
    table: the KV blocks it holds; ``table.mha`` are the layers whose MHA block it runs.
    computed_tokens: tokens whose KV exists. While it waits: the tokens it would find if it were admitted now.
    prefill_tokens: tokens to compute before it decodes: its prompt, and after a preemption also those it had produced.
    left_tokens: tokens, including cached prefix blocks, whose KV a preempted request would still find.
    host_layer_blocks: KV blocks of one layer, over all layers, that it holds in host memory; 0 unless it is swapped.
    cached_tokens: prompt tokens found in the prefix cache at its first admission; -1 before that.
    next_prefix_block: index of the first prefix block of its prompt whose end its prefill has not passed.
    fills_cache: whether it adds prefix blocks to the cache.
    at_head: whether it waits before all others, since it was preempted here.
    kept_params: parameters that ran, summed over its tokens. nll_sum: nats charged, summed over its tokens.
    """

    request: Request
    output_limit: int
    table: BlockTable = field(default_factory=BlockTable)
    computed_tokens: int = 0
    produced_tokens: int = 0
    prefill_tokens: int = 0
    left_tokens: int = 0
    host_layer_blocks: int = 0
    cached_tokens: int = -1
    next_prefix_block: int = 0
    fills_cache: bool = False
    at_head: bool = False
    kept_params: int = 0
    nll_sum: float = 0.0
    admitted_s: float = math.nan
    first_token_s: float = math.nan
    last_token_s: float = math.nan
    finish_s: float = math.nan
    preemptions: int = 0
    status: Status = Status.WAITING

    @property
    def request_id(self) -> int:
        """The id of its request."""
        return self.request.request_id

    @property
    def target_tokens(self) -> int:
        """Tokens whose KV must exist before the next token can be produced: prompt and produced tokens."""
        return self.request.prompt_tokens + self.produced_tokens

    @property
    def decoding(self) -> bool:
        """Whether its prefill has ended."""
        return self.computed_tokens >= self.prefill_tokens

    @property
    def swapped(self) -> bool:
        """Whether its KV is in host memory."""
        return self.host_layer_blocks > 0

    @property
    def mha(self) -> frozenset[int]:
        """Layers whose MHA block it runs, and whose KV it holds."""
        return self.table.mha

    @property
    def held_layer_blocks(self) -> int:
        """KV blocks of one layer that it holds, over all layers, prefix blocks included."""
        return self.table.held_layer_blocks


@dataclass(slots=True)
class RequestQueues:
    """The requests of a replica.

    arrivals: submitted, not yet arrived, by arrival. all: those that have arrived, by id.
    waiting: the next to admit comes first. running: in the order of admission.
    in_sessions: whether requests follow others (sim/traces/sessions.py). following: those that have not been due yet,
        with their think times, by the request that they follow. starting: those that wait for a user, in order.
    caches_answers: whether answers enter the prefix cache, as in sessions, also where a cluster or the clients of a
        server say what follows.
    """

    arrivals: deque[Request] = field(default_factory=deque)
    all: dict[int, LiveRequest] = field(default_factory=dict)
    waiting: deque[LiveRequest] = field(default_factory=deque)
    running: list[LiveRequest] = field(default_factory=list)
    in_sessions: bool = False
    caches_answers: bool = False
    following: dict[int, tuple[Request, float]] = field(default_factory=dict)
    starting: deque[tuple[Request, float]] = field(default_factory=deque)

    def begin_sessions(self, sessions: Sessions) -> None:
        """Take the requests that follow others out of ``arrivals``, until those have ended."""
        requests = list(self.arrivals)
        self.in_sessions = self.caches_answers = True
        for i, after in enumerate(sessions.after.tolist()):
            if after >= 0:
                self.following[requests[i].request_id] = requests[after], float(sessions.think_s[after])
        self.starting.extend((requests[i], float(sessions.think_s[i])) for i in sessions.starts.tolist())
        self.arrivals = deque(requests[i] for i in np.flatnonzero(np.isnan(sessions.think_s)).tolist())

    def end_turn(self, request_id: int, ended_s: float) -> None:
        """Let the request that follows one arrive: the next turn of its session, or of one that waits for a user."""
        if request_id in self.following:
            request, think_s = self.following.pop(request_id)
        elif self.starting:
            request, think_s = self.starting.popleft()
        else:
            return
        due = replace(request, arrival_s=ended_s + think_s)
        insort(self.arrivals, due, key=lambda one: (one.arrival_s, one.request_id))

    def submit(self, requests: Sequence[Request], least_s: float, *, with_hash_ids: bool) -> None:
        """Add requests to ``arrivals``.

        Args:
            requests: sorted by arrival. least_s: the earliest arrival allowed while ``arrivals`` is empty.
            with_hash_ids: whether to refuse prompts that contain a hash id twice, or one that is no whole number.
        Raises:
            ConfigError: for requests out of order or too early, a repeated id, or a number that `check_submitted`
                refuses; then none is added.
        """
        columns = [np.array([getattr(r, name) for r in requests]) for name in SUBMITTED]
        check_submitted([request.request_id for request in requests], *columns)
        last_s = self.arrivals[-1].arrival_s if self.arrivals else least_s
        pending = {request.request_id for request in self.arrivals}
        for request in requests:
            if not request.arrival_s >= last_s:
                raise late_request(request.request_id, request.arrival_s, last_s)
            if request.request_id in self.all or request.request_id in pending:
                raise ConfigError(f"request {request.request_id} was submitted before; give each its own request_id")
            if with_hash_ids:
                check_hash_ids(request.hash_ids)
            if with_hash_ids and len(set(request.hash_ids)) < len(request.hash_ids):
                repeated = next(i for i in request.hash_ids if request.hash_ids.count(i) > 1)
                raise repeated_hash_id(request.request_id, repeated)
            last_s = request.arrival_s
            pending.add(request.request_id)
        self.arrivals.extend(requests)


def records_of(live: Sequence[LiveRequest], model: ModelSpec, *, priced: bool) -> Records:
    """Return one row per request.

    Args:
        live: the requests, in the order of the rows. model: what is served.
        priced: whether a quality loss was charged; if not, the column ``quality_nll`` is nan.
    """

    def floats(name: str) -> Floats:
        return np.array([getattr(request, name) for request in live], dtype=np.float64)

    def ints(values: list[int]) -> Ints:
        return np.array(values, dtype=np.int64)

    produced = ints([request.produced_tokens for request in live])
    tokens = np.where(produced > 0, produced, np.nan)
    return Records(
        arrival_s=np.array([request.request.arrival_s for request in live], dtype=np.float64),
        prompt_tokens=ints([request.request.prompt_tokens for request in live]),
        output_tokens=ints([request.request.output_tokens for request in live]),
        produced_tokens=produced,
        admitted_s=floats("admitted_s"),
        first_token_s=floats("first_token_s"),
        finish_s=floats("finish_s"),
        preemptions=ints([request.preemptions for request in live]),
        status=ints([int(request.status) for request in live]),
        kept_params_share=floats("kept_params") / (tokens * model.total_params),
        quality_nll=floats("nll_sum") / tokens if priced else np.full(len(live), np.nan),
        cached_tokens=ints([max(request.cached_tokens, 0) for request in live]),
    )
