"""The Engine protocol, what a policy may see of an engine, and the plain SimPy engine.

``SimEngine`` is the reference: one SimPy event an iteration, Python objects, no shortcut. A faster engine is right
when its records equal these.

Order of what happens at one instant: arrivals, then the end of an iteration, then the policy's decision, then the
start of the next iteration. Requests that arrive together keep the order of the trace.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import simpy

from sim.errors import BudgetError, ConfigError, PlanError, nearest
from sim.kv_pool import KVPool
from sim.memory import kv_blocks, kv_pool_layer_blocks, weight_bytes
from sim.model import ModelSpec
from sim.plan import KV_KEEP_ALL, Plan, check_plan
from sim.records import Iterations, Records, Status, TokenGaps
from sim.scheduler import SCHEDULERS, Batch, Limits, SchedulerName, form_batch

GIB = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One request of a trace. ``output_tokens`` is the trace's secret: engines use it, policies never see it."""

    request_id: int
    arrival_s: float
    prompt_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """How an engine serves: the settings a real engine's command line has.

    scheduler: ``chunked`` or ``prefill_first`` (sim/scheduler.py says which engine each follows).
    limits: token budget, requests at once, chunking and admission rules.
    kv_block_tokens: tokens of one KV block.
    kv_watermark_share: share of the KV pool that an admission must leave free (vLLM V0: 0.01).
    reuse_preempted_kv: whether a preempted request finds again what others have not overwritten of its KV, as with
        vLLM's prefix caching; without it everything is computed again.
    max_context_tokens: prompt and output of one request together; None takes the model's own limit.
    """

    scheduler: SchedulerName = "chunked"
    limits: Limits = field(default_factory=Limits)
    kv_block_tokens: int = 16
    kv_watermark_share: float = 0.0
    reuse_preempted_kv: bool = False
    max_context_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.scheduler not in SCHEDULERS:
            raise ConfigError(f"unknown engine.scheduler {self.scheduler!r}; {nearest(self.scheduler, SCHEDULERS)}")
        if self.kv_block_tokens < 1:
            raise ConfigError(f"engine.kv_block_tokens is {self.kv_block_tokens}; it must be at least 1")
        if not 0.0 <= self.kv_watermark_share < 1.0:
            raise ConfigError(f"engine.kv_watermark_share is {self.kv_watermark_share}; it must be in [0, 1)")
        if self.max_context_tokens is not None and self.max_context_tokens < 2:
            raise ConfigError(f"engine.max_context_tokens is {self.max_context_tokens}; it must be at least 2, or null")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineState:
    """What a server can observe of itself at one moment; no output length is in it.

    Counters (arrived, finished, ...) run from the start, so that the difference of two states is a rate.

    waiting, running: requests. waiting_tokens: prompt and already produced tokens of the waiting ones.
    oldest_wait_s: how long the head of the queue has waited, 0 for an empty queue.
    running_tokens: tokens whose KV is held. kv_layer_blocks, kv_used_layer_blocks: the pool, in KV blocks of one layer.
    ttft_sum_s: sum of TTFT over the first tokens so far. decode_s: time spent in iterations that decoded.
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
    plan: Plan


class Price(Protocol):
    """What an iteration costs; ``sim.latency.LatencyModel`` is one, a constant another.

    chunks: (tokens, KV tokens that are there before) of each prompt in the batch. decode_batch, decode_context_sum:
    decoding requests and the KV tokens they hold. sequences: requests that get a next token.
    """

    def iteration_s(
        self,
        plan: Plan,
        chunks: Sequence[tuple[int, int]],
        decode_batch: int,
        decode_context_sum: int,
        sequences: int,
    ) -> float:
        """Return the seconds of one iteration."""
        ...

    def in_range(
        self, chunks: Sequence[tuple[int, int]], decode_batch: int, decode_context_sum: int, sequences: int
    ) -> bool:
        """Return whether that price needed no extrapolation."""
        ...


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


@dataclass(slots=True, eq=False)
class _Live:
    """A request inside the engine."""

    request: Request
    output_limit: int
    computed_tokens: int = 0
    produced_tokens: int = 0
    prefill_tokens: int = 0  # tokens to compute before it decodes: prompt, and what a preemption made it lose
    held_layer_blocks: int = 0
    admitted_s: float = math.nan
    first_token_s: float = math.nan
    last_token_s: float = math.nan
    finish_s: float = math.nan
    preemptions: int = 0
    status: Status = Status.WAITING

    @property
    def target_tokens(self) -> int:
        return self.request.prompt_tokens + self.produced_tokens

    @property
    def decoding(self) -> bool:
        return self.computed_tokens >= self.prefill_tokens


class SimEngine:
    """The reference engine: one replica, one SimPy event an iteration."""

    def __init__(
        self,
        *,
        model: ModelSpec,
        latency: Price,
        config: EngineConfig,
        plan: Plan,
        budget_bytes: int,
        workspace_bytes: int = 0,
        env: simpy.Environment | None = None,
    ) -> None:
        """Build an idle engine.

        Args:
            model: what is served. latency: its price on one device. config: how it serves.
            plan: what runs. budget_bytes: what weights, workspace and KV cache may hold together.
            workspace_bytes: activations and the like, part of the budget that neither weights nor KV can use.
            env: the SimPy environment to live in; a new one by default.
        Raises:
            PlanError: for a plan that is not legal for the model.
            BudgetError: when the budget cannot hold the weights and one request.
        """
        check_plan(model, plan)
        self.env = env or simpy.Environment()
        self._model, self._latency, self.config = model, latency, config
        self._budget_bytes, self._workspace_bytes = budget_bytes, workspace_bytes
        self._arrivals: deque[Request] = deque()
        self._waiting: deque[_Live] = deque()
        self._running: list[_Live] = []
        self._all: list[_Live] = []
        self._resume: simpy.Event | None = None
        self._hold_at_s = math.nan
        self._wake: simpy.Event | None = None
        self._arrived_prompt_tokens = self._first_tokens = self._produced_tokens = 0
        self._finished = self._rejected = self._preemptions = 0
        self._ttft_sum_s = self._busy_s = 0.0
        self._gaps_s: list[float] = []
        self._iterations: list[tuple[float, float, int, int, int, int, float, int, bool]] = []
        self._set_plan(plan)
        self._context_limit = self._find_context_limit()
        self.env.process(self._serve())

    # -- the Engine protocol -------------------------------------------------------------------------------------

    def submit(self, requests: Sequence[Request]) -> None:
        """Hand over requests, sorted by arrival and not before the present."""
        last_s = self._arrivals[-1].arrival_s if self._arrivals else self.env.now
        for request in requests:
            if request.arrival_s < last_s:
                raise ConfigError(
                    f"request {request.request_id} arrives at {request.arrival_s} s, before {last_s} s; "
                    "submit requests in order of arrival and not in the past"
                )
            last_s = request.arrival_s
            self._arrivals.append(request)
        self._notify()

    def apply(self, plan: Plan) -> None:
        """Make ``plan`` what runs, from the next iteration on."""
        if plan != self._plan:
            raise PlanError("this engine runs one plan from beginning to end; start it with the plan you want")

    def run_until(self, time_s: float) -> EngineState:
        """Serve until ``time_s`` (``inf``: until nothing is left to do) and say what can be seen then."""
        if self._resume is not None:
            self._resume.succeed()
            self._resume = None
        self._hold_at_s = time_s
        while self.env.peek() <= time_s and not math.isinf(self.env.peek()):
            self.env.step()
        now_s = self.env.now if math.isinf(time_s) else time_s
        self._take_arrivals(now_s)
        return self._state(now_s)

    @property
    def drained(self) -> bool:
        """Whether no submitted request can make any more progress."""
        return self._resume is None and math.isinf(self.env.peek())

    def records(self) -> Records:
        """Return one row a request, in order of arrival; requests yet to arrive have none."""
        live = self._all

        def floats(name: str) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
            return np.array([getattr(r, name) for r in live], dtype=np.float64)

        def ints(values: list[int]) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
            return np.array(values, dtype=np.int64)

        return Records(
            arrival_s=np.array([r.request.arrival_s for r in live], dtype=np.float64),
            prompt_tokens=ints([r.request.prompt_tokens for r in live]),
            output_tokens=ints([r.request.output_tokens for r in live]),
            produced_tokens=ints([r.produced_tokens for r in live]),
            admitted_s=floats("admitted_s"),
            first_token_s=floats("first_token_s"),
            finish_s=floats("finish_s"),
            preemptions=ints([r.preemptions for r in live]),
            status=ints([int(r.status) for r in live]),
        )

    def iterations(self) -> Iterations:
        """Return one row an iteration."""
        columns = list(zip(*self._iterations, strict=True)) or [()] * 9
        float_, int_ = np.float64, np.int64
        return Iterations(
            start_s=np.array(columns[0], dtype=float_),
            end_s=np.array(columns[1], dtype=float_),
            prefill_tokens=np.array(columns[2], dtype=int_),
            decode_requests=np.array(columns[3], dtype=int_),
            running=np.array(columns[4], dtype=int_),
            waiting=np.array(columns[5], dtype=int_),
            kv_used_share=np.array(columns[6], dtype=float_),
            preemptions=np.array(columns[7], dtype=int_),
            extrapolated=np.array(columns[8], dtype=np.bool_),
        )

    def token_gaps(self) -> TokenGaps:
        """Return every gap between two tokens of one request."""
        gaps_s, count = np.unique(np.array(self._gaps_s, dtype=np.float64), return_counts=True)
        return TokenGaps(itl_s=gaps_s, count=count.astype(np.int64))

    # -- serving -------------------------------------------------------------------------------------------------

    def _serve(self) -> Generator[simpy.Event, Any, None]:
        while True:
            self._take_arrivals(self.env.now)
            if self.env.now == self._hold_at_s:  # a policy decides now, before the next iteration starts
                self._resume = self.env.event()
                yield self._resume
                continue
            batch = self._form_batch()
            self._carry_out(batch)
            if not batch.scheduled:
                if not batch.preempted:
                    yield self._next_arrival()
                continue
            start_s, waiting, running = self.env.now, len(self._waiting), len(self._running)
            duration_s, extrapolated = self._price(batch)
            prefill_tokens = sum(tokens for r, tokens in batch.scheduled if not r.decoding)
            decodes = sum(r.decoding for r, _ in batch.scheduled)
            yield self.env.timeout(duration_s)
            self._busy_s += duration_s
            # A request that arrives at the very end of an iteration arrives before it ends.
            self._take_arrivals(self.env.now)
            used_share = self._pool.used_layer_blocks / max(self._pool.layer_blocks, 1)
            self._finish(batch)
            self._iterations.append(
                (
                    start_s,
                    self.env.now,
                    prefill_tokens,
                    decodes,
                    running,
                    waiting,
                    used_share,
                    len(batch.preempted),
                    extrapolated,
                )
            )

    def _next_arrival(self) -> simpy.Event:
        """Return an event at the next arrival, or one that ``submit`` will trigger."""
        if self._arrivals:
            return self.env.timeout(_exact_delay(self.env.now, self._arrivals[0].arrival_s))
        self._wake = self.env.event()
        return self._wake

    def _notify(self) -> None:
        if self._wake is not None and self._arrivals:
            self._wake.succeed()
            self._wake = None

    def _take_arrivals(self, now_s: float) -> None:
        while self._arrivals and self._arrivals[0].arrival_s <= now_s:
            request = self._arrivals.popleft()
            live = _Live(request, output_limit=min(request.output_tokens, self._context_limit - request.prompt_tokens))
            self._all.append(live)
            self._arrived_prompt_tokens += request.prompt_tokens
            full = self._plan.admit is not None and len(self._waiting) >= self._plan.admit
            if full or live.output_limit < 1:
                live.status = Status.REJECTED
                self._rejected += 1
            else:
                self._waiting.append(live)

    def _form_batch(self) -> Batch[_Live]:
        return form_batch(
            self.config.scheduler,
            self._waiting,
            self._running,
            self._pool.free_layer_blocks,
            self._layer_blocks,
            self._limits,
        )

    def _carry_out(self, batch: Batch[_Live]) -> None:
        """Preempt, admit and take KV blocks, as the batch says."""
        for live in batch.preempted:
            assert self._running.pop() is live
            self._let_go(live)
            live.preemptions += 1
            live.status = Status.WAITING
            self._preemptions += 1
            self._waiting.appendleft(live)
        for live in batch.admitted:
            assert self._waiting.popleft() is live
            live.held_layer_blocks = self._layer_blocks(live, live.computed_tokens)
            self._pool.claim(live.request.request_id, live.held_layer_blocks)
            live.prefill_tokens = live.target_tokens
            live.status = Status.RUNNING
            if math.isnan(live.admitted_s):
                live.admitted_s = self.env.now
            self._running.append(live)
        for live, tokens in batch.scheduled:
            need = self._layer_blocks(live, live.computed_tokens + tokens)
            overwritten = self._pool.take(need - live.held_layer_blocks)
            live.held_layer_blocks = need
            for request_id in overwritten:
                self._all[request_id].computed_tokens = self._found_again(self._all[request_id])

    def _let_go(self, live: _Live) -> None:
        """Take a running request's KV blocks; note what it will find again if it comes back at once."""
        owner = live.request.request_id if self.config.reuse_preempted_kv else -1
        self._pool.release(live.held_layer_blocks, owner)
        live.held_layer_blocks = 0
        live.computed_tokens = self._found_again(live)

    def _found_again(self, live: _Live) -> int:
        """Return the tokens of a preempted request whose KV nobody has overwritten: whole KV blocks from the first on.

        At least one token is computed again, as in vLLM, to have something to sample from.
        """
        kept = self._pool.kept_layer_blocks(live.request.request_id)
        if not kept:
            return 0
        block_tokens = self.config.kv_block_tokens
        # The run's last block may be partly filled; such a block is never found again.
        whole = min(kept // self._kv_layers, live.computed_tokens // block_tokens)
        return min(whole, (live.target_tokens - 1) // block_tokens) * block_tokens

    def _price(self, batch: Batch[_Live]) -> tuple[float, bool]:
        """Return the seconds of an iteration, and whether they are extrapolated."""
        chunks = [(tokens, live.computed_tokens) for live, tokens in batch.scheduled if not live.decoding]
        contexts = [live.computed_tokens for live, _ in batch.scheduled if live.decoding]
        sequences = sum(live.computed_tokens + tokens == live.target_tokens for live, tokens in batch.scheduled)
        shape = (chunks, len(contexts), sum(contexts), sequences)
        return self._latency.iteration_s(self._plan, *shape), not self._latency.in_range(*shape)

    def _finish(self, batch: Batch[_Live]) -> None:
        """Give every request that caught up its next token, and let go of those that have their last."""
        now_s = self.env.now
        done = False
        for live, tokens in batch.scheduled:
            live.computed_tokens += tokens
            if live.computed_tokens < live.target_tokens:
                continue
            live.produced_tokens += 1
            self._produced_tokens += 1
            if live.produced_tokens == 1:
                live.first_token_s = now_s
                self._first_tokens += 1
                self._ttft_sum_s += now_s - live.request.arrival_s
            else:
                self._gaps_s.append(now_s - live.last_token_s)
            live.last_token_s = now_s
            if live.produced_tokens == live.output_limit:
                live.finish_s = now_s
                live.status = Status.FINISHED
                self._finished += 1
                self._pool.release(live.held_layer_blocks)
                live.held_layer_blocks = 0
                done = True
        if done:
            self._running = [live for live in self._running if live.status is Status.RUNNING]

    # -- memory --------------------------------------------------------------------------------------------------

    def _set_plan(self, plan: Plan) -> None:
        if any(keep != KV_KEEP_ALL for keep in plan.kv_keep):
            raise PlanError("plan.kv_keep: the simulator keeps all KV tokens; leave every layer at null, null")
        self._plan = plan
        self._weight_bytes = weight_bytes(self._model, plan)
        self._kv_layers = sum(plan.prefill.mha)
        pool_layer_blocks = kv_pool_layer_blocks(
            self._model, plan, self._budget_bytes, self._workspace_bytes, self.config.kv_block_tokens
        )
        self._pool = KVPool(pool_layer_blocks)
        limits = self.config.limits
        self._limits = replace(
            limits,
            max_running=min(limits.max_running, plan.max_running or limits.max_running),
            watermark_layer_blocks=limits.watermark_layer_blocks
            + math.ceil(self.config.kv_watermark_share * pool_layer_blocks),
        )

    def _layer_blocks(self, live: _Live, tokens: int) -> int:
        return self._kv_layers * kv_blocks(tokens, self.config.kv_block_tokens)

    def _find_context_limit(self) -> int:
        """Return the longest context one request may reach, so that it fits the pool alone, as vLLM demands."""
        limit = self.config.max_context_tokens or self._model.max_context_tokens
        if self._kv_layers:
            blocks = (self._pool.layer_blocks - self._limits.watermark_layer_blocks) // self._kv_layers
            limit = min(limit, blocks * self.config.kv_block_tokens)
        if limit < 2 or self._weight_bytes + self._workspace_bytes > self._budget_bytes:
            raise BudgetError(
                f"weights {self._weight_bytes / GIB:.2f} GiB and workspace {self._workspace_bytes / GIB:.2f} GiB leave "
                f"no room for the KV cache of one request in a budget of {self._budget_bytes / GIB:.2f} GiB; prune or "
                "quantise more blocks, or raise the budget (budget.bytes, gpu=)"
            )
        return limit

    # -- what can be seen ----------------------------------------------------------------------------------------

    def _state(self, now_s: float) -> EngineState:
        return EngineState(
            time_s=now_s,
            waiting=len(self._waiting),
            waiting_tokens=sum(live.target_tokens for live in self._waiting),
            oldest_wait_s=now_s - self._waiting[0].request.arrival_s if self._waiting else 0.0,
            running=len(self._running),
            running_tokens=sum(live.computed_tokens for live in self._running),
            kv_layer_blocks=self._pool.layer_blocks,
            kv_used_layer_blocks=self._pool.used_layer_blocks,
            budget_bytes=self._budget_bytes,
            weight_bytes=self._weight_bytes,
            arrived=len(self._all),
            arrived_prompt_tokens=self._arrived_prompt_tokens,
            first_tokens=self._first_tokens,
            ttft_sum_s=self._ttft_sum_s,
            produced_tokens=self._produced_tokens,
            finished=self._finished,
            rejected=self._rejected,
            preemptions=self._preemptions,
            iterations=len(self._iterations),
            busy_s=self._busy_s,
            plan=self._plan,
        )


def _exact_delay(now_s: float, time_s: float) -> float:
    """Return the delay that takes SimPy's clock from ``now_s`` to exactly ``time_s``.

    ``now + (time - now)`` can miss ``time`` by a rounding step, and a request would then be seen too late.
    """
    delay_s = time_s - now_s
    while now_s + delay_s < time_s:
        delay_s = math.nextafter(delay_s, math.inf)
    while now_s + delay_s > time_s:
        delay_s = math.nextafter(delay_s, 0.0)
    return delay_s
