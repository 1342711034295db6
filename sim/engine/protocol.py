"""The Engine protocol: what every engine takes, and what a policy may see of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from sim.cost.plan import Plan
from sim.engine.scheduler import SCHEDULERS, Limits, SchedulerName
from sim.errors import ConfigError, nearest
from sim.results.records import Records
from sim.traces.trace import HASH_BLOCK_TOKENS

RESTORE_MODES = ("new_requests", "recompute")


Restore = Literal["new_requests", "recompute"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One request of a trace. ``output_tokens`` is the trace's secret: engines use it, policies never see it.

    hash_ids: of its prompt, as ``sim.traces.trace.Trace`` has them; none where the trace has none.
    """

    request_id: int
    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    hash_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """How an engine serves: the settings a real engine's command line has.

    scheduler: ``chunked`` or ``prefill_first`` (sim/engine/scheduler.py says which engine each follows).
    limits: token budget, requests at once, chunking and admission rules.
    kv_block_tokens: tokens of one KV block.
    kv_watermark_share: share of the KV pool that an admission must leave free (vLLM V0: 0.01).
    reuse_preempted_kv: whether a preempted request finds again what others have not overwritten of its KV, as with
        vLLM's prefix caching; without it everything is computed again.
    max_context_tokens: prompt and output of one request together; None takes the model's own limit.
    restore: what a restored MHA block does to requests that run: ``new_requests`` or ``recompute`` (rule 4 above).
    prefix_caching: whether requests find the KV that others computed of the same beginning of a prompt (rules above).
    hash_block_tokens: tokens of a prompt that one hash id of the trace stands for (Mooncake: 512).
    """

    scheduler: SchedulerName = "chunked"
    limits: Limits = field(default_factory=Limits)
    kv_block_tokens: int = 16
    kv_watermark_share: float = 0.0
    reuse_preempted_kv: bool = False
    max_context_tokens: int | None = None
    restore: Restore = "new_requests"
    prefix_caching: bool = False
    hash_block_tokens: int = HASH_BLOCK_TOKENS

    def __post_init__(self) -> None:
        if self.scheduler not in SCHEDULERS:
            raise ConfigError(f"unknown engine.scheduler {self.scheduler!r}; {nearest(self.scheduler, SCHEDULERS)}")
        if self.restore not in RESTORE_MODES:
            raise ConfigError(f"unknown engine.restore {self.restore!r}; {nearest(self.restore, RESTORE_MODES)}")
        if self.kv_block_tokens < 1:
            raise ConfigError(f"engine.kv_block_tokens is {self.kv_block_tokens}; it must be at least 1")
        if not 0.0 <= self.kv_watermark_share < 1.0:
            raise ConfigError(f"engine.kv_watermark_share is {self.kv_watermark_share}; it must be in [0, 1)")
        if self.max_context_tokens is not None and self.max_context_tokens < 2:
            raise ConfigError(f"engine.max_context_tokens is {self.max_context_tokens}; it must be at least 2, or null")
        if self.hash_block_tokens < 1:
            raise ConfigError(f"engine.hash_block_tokens is {self.hash_block_tokens}; it must be at least 1")
        if self.prefix_caching and self.hash_block_tokens % self.kv_block_tokens:
            raise ConfigError(
                f"engine.prefix_caching shares whole KV blocks: engine.kv_block_tokens, {self.kv_block_tokens}, must "
                f"divide engine.hash_block_tokens, {self.hash_block_tokens}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineState:
    """What a server can observe of itself at one moment; no output length is in it.

    Counters (arrived, finished, ...) run from the start, so that the difference of two states is a rate.

    waiting, running: requests. waiting_tokens: prompt and already produced tokens of the waiting ones.
    oldest_wait_s: how long the head of the queue has waited, 0 for an empty queue.
    running_tokens: tokens whose KV is held. kv_layer_blocks, kv_used_layer_blocks: the pool, in KV blocks of one layer.
    ttft_sum_s: sum of TTFT over the first tokens so far. busy_s: time spent in iterations that have ended.
    budget_bytes, weight_bytes: what there is, and what the resident weights take of it.
    next_budget_bytes, next_budget_s: the next step of the budget when it has been announced, else as it is and ``inf``.
    budget_violation_s: seconds in which more was held than the budget allows.
    plan: what runs. target: what the last decision wants. incoming_bytes: the layer that is being copied in.
    """

    time_s: float
    waiting: int
    waiting_tokens: int
    oldest_wait_s: float
    running: int
    running_tokens: int
    kv_layer_blocks: int
    kv_used_layer_blocks: int
    budget_bytes: int
    weight_bytes: int
    arrived: int
    arrived_prompt_tokens: int
    first_tokens: int
    ttft_sum_s: float
    produced_tokens: int
    finished: int
    rejected: int
    preemptions: int
    iterations: int
    busy_s: float
    next_budget_bytes: int
    next_budget_s: float
    budget_violation_s: float
    incoming_bytes: int
    plan: Plan
    target: Plan


class Engine(Protocol):
    """Serves requests. SimEngine lives on SimPy's clock; a real engine lives on the wall clock."""

    def submit(self, requests: Sequence[Request]) -> None:
        """Hand over requests, sorted by arrival; each is served from its own ``arrival_s`` on."""
        ...

    def apply(self, plan: Plan) -> None:
        """Make ``plan`` what runs."""
        ...

    def run_until(self, time_s: float) -> EngineState:
        """Serve until ``time_s`` (``inf``: until nothing is left to do) and say what can be seen then."""
        ...

    @property
    def drained(self) -> bool:
        """Whether no submitted request can make any more progress."""
        ...

    def records(self) -> Records:
        """Return one row a request."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """A request that runs and what it holds: for debugging and tests, policies do not see it.

    mha: layers whose KV it holds. tokens: whose KV exists. layer_blocks: KV blocks over all layers, those of the tokens
    under way included, those of its units in the prefix cache not: ``SimEngine.shared_layer_blocks`` counts these.
    decoding: whether its prefill has ended.
    """

    request_id: int
    mha: frozenset[int]
    tokens: int
    layer_blocks: int
    decoding: bool
