"""The Engine protocol over a real model: the simulator's scheduler and its rules, on a clock that is real.

    engine = HwEngine(elastic=ElasticModel(model), config=config, plan=plan, budget_bytes=budget, prompts=prompts)
    replay(trace, engine, policy, tick_s=1.0)       # as with SimEngine; nothing else changes

``sim.engine.sim_engine`` states the rules for changing plans and the order of what happens at one instant; both engines follow
them, so that for equal decisions they admit the same requests in the same order. What differs is what happens then:

* an iteration is one forward pass over decodes and prompt chunks, their keys and values in a paged pool of real memory
  (hw/elastic/paged_kv.py, hw/elastic/paged_attention.py); its duration is what the clock shows afterwards,
* a dropped block's weights are freed, a restored one's are read from where they are stored, beside the iterations,
* tokens are real: greedy, each request up to the length that the trace states, or to the model's own end of text.

An observation in the middle of an iteration, as the simulator gives it, needs no second thread: the pass has ended when
the caller asks, but what it brought is put in force only with the first look behind its end.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hw.elastic.blocks import ABSENT, KINDS
from hw.elastic.copies import LayerCopier
from hw.elastic.device_memory import DeviceMemory, out_of_memory
from hw.elastic.model import ElasticModel
from hw.elastic.paged_attention import ATTENTION, NotANumberError, Packed, PagedBatch, forward
from hw.elastic.paged_kv import Arena, MappedArena, PagedKV, RequestPages, SlabArena
from hw.engine.clock import Clock, RealClock
from hw.engine.iteration_log import IterationLog, MemoryRow, Shape
from hw.engine.prompts import Prompts, RandomPrompts
from sim.cost.memory import fixed_weight_bytes, kv_block_layer_bytes, kv_blocks, weight_bytes
from sim.cost.plan import KV_KEEP_ALL, WEIGHT_BITS, Plan, check_plan, dense_plan, describe
from sim.engine.budget import Budget, BudgetMeter, constant_budget
from sim.engine.protocol import EngineConfig, EngineState, Request
from sim.engine.scheduler import Batch, form_batch
from sim.engine.transition import (
    LayerCopy,
    Resident,
    copies_between,
    joined,
    plan_for_holder,
    resident_of,
    running_plan,
    without_dropped,
)
from sim.engine.transition_log import TransitionLog
from sim.errors import BudgetError, ConfigError, RapLabError
from sim.results.records import Iterations, Records, Status, TokenGaps, Transitions
from sim.types import GIB

SLABS = 16
"""Slabs of the first pool on CUDA: a resize copies at most one, which the workspace has to hold for that moment."""
LONGEST_WAIT_S = 60.0


class NumericsError(RapLabError):
    """The model gave a value that is no number; the message names block and plan."""


@dataclass(slots=True, eq=False)
class _Live:
    """A request inside the engine. ``tokens``: its prompt and what was produced so far."""

    request: Request
    tokens: list[int]
    output_limit: int
    pages: RequestPages = field(default_factory=RequestPages)
    computed_tokens: int = 0
    produced_tokens: int = 0
    prefill_tokens: int = 0  # tokens to compute before it decodes: prompt, and what a preemption made it lose
    kept_params: int = 0  # parameters that ran for its tokens, summed over them
    nll_sum: float = 0.0
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
    def held_layer_blocks(self) -> int:
        return self.pages.held_layer_blocks

    @property
    def decoding(self) -> bool:
        return self.computed_tokens >= self.prefill_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Handover:
    """A request whose prompt was computed by another engine, as it goes on here.

    tokens: its prompt and the first token. output_limit: tokens that it may produce in all. kept_params, nll_sum: of
    its first token. preemptions: before that.
    """

    request: Request
    tokens: tuple[int, ...]
    output_limit: int
    admitted_s: float
    first_token_s: float
    kept_params: int
    nll_sum: float
    preemptions: int


@dataclass(frozen=True, slots=True)
class _Ran:
    """An iteration that the device has done, to be put in force at its end."""

    batch: Batch[_Live]
    shape: Shape
    next_tokens: dict[int, int]  # request_id -> token
    start_s: float
    end_s: float
    running: int
    waiting: int
    preempted: int


class HwEngine:
    """One replica that really computes."""

    def __init__(
        self,
        *,
        elastic: ElasticModel,
        config: EngineConfig,
        plan: Plan,
        budget_bytes: int | Budget,
        workspace_bytes: int = 0,
        prompts: Prompts | None = None,
        clock: Clock | None = None,
        copier: LayerCopier | None = None,
        arena: Arena | None = None,
        ends: Callable[[int, int], bool] | None = None,
        on_token: Callable[[int, int | None, bool], None] | None = None,
        holds: Callable[[int], bool] | None = None,
        quality_nll: Callable[[Plan], float] | None = None,
    ) -> None:
        """Build an idle engine over a dense model, and bring it to its first plan.

        Args:
            elastic: the model; it belongs to the engine from now on. Copies of all its blocks at 16, 8 and 4 bits are
                stored now, so that no plan change has to make one.
            config: how it serves.
            plan: what runs first.
            budget_bytes: what weights, workspace and KV cache may hold together, constant or over time.
            workspace_bytes: activations and the like, part of the budget that neither weights nor KV can use.
            prompts: the token ids of every request; drawn at random by default.
            clock: what time it is; the wall's by default.
            copier: brings weights from the host; arena: where KV blocks lie. Both by default as the device wants them.
            ends: called with (request_id, token), whether that token ends its request before its length; None never.
            on_token: called with (request_id, token, whether it is the last) as each token comes; the token is None
                where a request was rejected.
            holds: called with a request_id as it ends, whether its KV stays held until ``release``; None never.
            quality_nll: nats a token that a plan costs (``sim.cost.quality``), charged to requests; None charges nothing.
        Raises:
            ConfigError: for ``prefix_caching``, which only the simulated engine has.
            PlanError: for a plan that is not legal for the model.
            BudgetError: when the budget cannot hold the weights and one request at the start.
        """
        if config.prefix_caching:
            raise ConfigError("engine.prefix_caching is true; the real engine has no prefix cache: set it to false")
        self._elastic, self._model, self.config = elastic, elastic.spec, config
        model = self._model
        check_plan(model, plan)
        self.budget = budget_bytes if isinstance(budget_bytes, Budget) else constant_budget(budget_bytes)
        self._meter = BudgetMeter(self.budget)
        self._workspace_bytes = workspace_bytes
        self._prompts: Prompts = prompts or RandomPrompts(model.vocab_size)
        self._clock: Clock = clock or RealClock()
        self._ends = ends
        self._on_token = on_token
        self._holds = holds
        self.outside: dict[int, RequestPages] = {}
        # Plans come back, and a fit may take longer than a token's share of an iteration.
        self._quality_nll = lru_cache(maxsize=4096)(quality_nll) if quality_nll is not None else None
        self._params = (model.fixed_params, model.mha_params, model.ffn_params)
        self._fixed_weight_bytes = fixed_weight_bytes(model)
        self._dense_weight_bytes = weight_bytes(model, dense_plan(model))
        self._kept_share: list[tuple[float, float]] = []
        self._block_bytes = kv_block_layer_bytes(model, config.kv_block_tokens)

        self._arrivals: deque[Request] = deque()
        self._waiting: deque[_Live] = deque()
        self._running: list[_Live] = []
        self._all: dict[int, _Live] = {}
        self._ran: _Ran | None = None
        self._time_s = 0.0
        self._stuck = False  # the last look found nothing to do
        self._interrupted = False
        self._most_running = math.inf  # fewer after memory ran out, until a request has finished

        self._target = plan
        self._resident = resident_of(plan)
        self._decided: tuple[float, Plan] | None = None
        self._copies: deque[LayerCopy] = deque()
        self._copy: LayerCopy | None = None
        self._copy_started = False
        self._transitions = TransitionLog()

        self._arrived_prompt_tokens = self._first_tokens = self._produced_tokens = 0
        self._finished = self._rejected = self._preemptions = self.out_of_memory = 0
        self._ttft_sum_s = self._busy_s = 0.0
        self._log = IterationLog()

        elastic.use_attention(ATTENTION)
        elastic.prepare(WEIGHT_BITS)
        elastic.apply(plan)
        self._copier = copier or LayerCopier(elastic, self._clock.source)
        largest_bytes = max(self.budget.budget_bytes)
        self._memory = DeviceMemory(elastic.device, largest_bytes)
        self._pool = PagedKV(arena or self._default_arena(largest_bytes))
        self._run_what_is_resident()
        self._resize_pool()
        self._settle()
        self._weights_allocated_bytes = elastic.bytes()
        self._memory.follow(self.budget.budget_bytes[0])
        self._context_limit = self._find_context_limit()

    def _default_arena(self, largest_bytes: int) -> Arena:
        model, block_tokens, dtype = self._model, self.config.kv_block_tokens, self._elastic.dtype
        capacity = max(1, (largest_bytes - self._workspace_bytes - self._fixed_weight_bytes) // self._block_bytes)
        if self._elastic.device.type == "cpu":
            return MappedArena(
                capacity=capacity,
                block_tokens=block_tokens,
                heads=model.num_kv_heads,
                head_dim=model.head_dim,
                dtype=dtype,
            )
        first = (self.budget.budget_bytes[0] - self._elastic.bytes() - self._workspace_bytes) // self._block_bytes
        return SlabArena(
            slab_blocks=-(-max(first, SLABS) // SLABS),
            block_tokens=block_tokens,
            heads=model.num_kv_heads,
            head_dim=model.head_dim,
            dtype=dtype,
            device=self._elastic.device,
        )

    # -- the Engine protocol -------------------------------------------------------------------------------------

    def submit(self, requests: Sequence[Request]) -> None:
        """Hand over requests, sorted by arrival and not before the last that was handed over."""
        last_s = self._arrivals[-1].arrival_s if self._arrivals else -math.inf
        for request in requests:
            if request.arrival_s < last_s:
                raise ConfigError(
                    f"request {request.request_id} arrives at {request.arrival_s} s, before {last_s} s; "
                    "submit requests in order of arrival"
                )
            last_s = request.arrival_s
            self._arrivals.append(request)
        self._stuck = False

    def apply(self, plan: Plan) -> None:
        """Make ``plan`` what shall run; it takes effect between two iterations.

        Raises:
            PlanError: for a plan that is not legal for the model; what runs goes on.
        """
        check_plan(self._model, plan)
        wanted = self._decided[1] if self._decided is not None else self._target
        if plan != wanted:
            self._decided = (self._time_s, plan)
            self._stuck = False

    def run_until(self, time_s: float) -> EngineState:
        """Serve until ``time_s`` (``inf``: until nothing is left to do) and say what can be seen then.

        Raises:
            NumericsError: when the model gives a value that is no number.
            BudgetError: when one request alone runs out of memory.
            KeyboardInterrupt: after ``interrupt``, between two iterations.
        """
        while True:
            if self._ran is not None:
                if self._ran.end_s > time_s:
                    return self._observe(time_s)
                ran, self._ran = self._ran, None
                self._put_in_force(ran)
            if self._interrupted:
                self._interrupted = False
                raise KeyboardInterrupt
            now_s = max(self._clock.now_s(), self._time_s)
            self._follow_budget(now_s)
            self._take_arrivals(now_s)
            if now_s >= time_s:
                return self._observe(time_s)
            self._time_s = now_s
            if not self._iterate(now_s) and not self._wait(now_s, time_s):
                return self._observe(now_s)

    def cancel(self, request_id: int) -> None:
        """End a request that nobody waits for: at once where it waits, with its next token where it runs."""
        live = self._all.get(request_id)
        if live is None:
            self._arrivals = deque(request for request in self._arrivals if request.request_id != request_id)
        elif live.status is Status.RUNNING:
            live.output_limit = min(live.output_limit, live.produced_tokens + 1)
        elif live.status is Status.WAITING:
            self._waiting.remove(live)
            self._reject(live)

    # -- prefill and decode apart (hw/disaggregate/sides.py); ``outside`` has the KV that nobody who runs holds -------------

    def reserve(self, request_id: int, prompt_tokens: int) -> RequestPages | None:
        """Hold room for the KV of a prompt that was computed elsewhere; None where there is none now.

        As in sim.disaggregate: KV blocks beside the watermark, a place among those that run, nobody preempted waiting.
        """
        keeps_all = all(keep == KV_KEEP_ALL for keep in self._plan.kv_keep)
        pages = RequestPages(mha=self._decode_mha, kv_keep=None if keeps_all else self._plan.kv_keep)
        block_tokens = self.config.kv_block_tokens
        needed = sum(pages.layer_blocks(layer, prompt_tokens, block_tokens) for layer in pages.mha)
        left = self._pool.free_layer_blocks - needed
        if left < self._limits.watermark_layer_blocks or self._waiting:
            return None
        if len(self._running) + len(self.outside) >= self._limits.max_running:
            return None
        self._overwritten(pages.hold(self._pool, prompt_tokens))
        self.outside[request_id] = pages
        return pages

    def handover(self, request_id: int, output_tokens: int, output_limit: int) -> Handover:
        """Return what the replica has to know where a request goes on whose prompt was computed here.

        Args:
            output_tokens: what its trace asks for. output_limit: what it may have there, the first token included.
        """
        live = self._all[request_id]
        return Handover(
            request=replace(live.request, output_tokens=output_tokens),
            tokens=tuple(live.tokens),
            output_limit=output_limit,
            admitted_s=live.admitted_s,
            first_token_s=live.first_token_s,
            kept_params=live.kept_params,
            nll_sum=live.nll_sum,
            preemptions=live.preemptions,
        )

    def join(self, given: Handover) -> None:
        """Let a request decode here from now on whose KV has arrived where ``reserve`` held room for it."""
        request = given.request
        self._all[request.request_id] = live = _Live(
            request,
            list(given.tokens),
            output_limit=given.output_limit,
            pages=self.outside.pop(request.request_id),
            computed_tokens=request.prompt_tokens,
            produced_tokens=1,
            prefill_tokens=request.prompt_tokens,
            kept_params=given.kept_params,
            nll_sum=given.nll_sum,
            admitted_s=given.admitted_s,
            first_token_s=given.first_token_s,
            last_token_s=given.first_token_s,
            preemptions=given.preemptions,
            status=Status.RUNNING,
        )
        self._arrived_prompt_tokens += request.prompt_tokens
        self._running.append(live)

    def release(self, request_id: int) -> None:
        """Free the KV that was held for a request that has ended here."""
        self._pool.release(self.outside.pop(request_id).all_blocks())

    @property
    def pool(self) -> PagedKV:
        """The KV blocks, and who holds how many."""
        return self._pool

    @property
    def request_ids(self) -> list[int]:
        """The requests that have arrived, in the order of ``records``."""
        return list(self._all)

    @property
    def context_limit(self) -> int:
        """Tokens that prompt and output of one request may have together."""
        return self._context_limit

    def interrupt(self) -> None:
        """Let ``run_until`` raise KeyboardInterrupt once no iteration is half done; callable from a signal handler."""
        self._interrupted = True

    @property
    def drained(self) -> bool:
        """Whether no submitted request can make any more progress by itself."""
        idle = self._ran is None and not self._arrivals and not self._running
        return idle and (not self._waiting or (self._stuck and math.isinf(self._next_event_s())))

    def records(self, request_ids: Sequence[int] | None = None) -> Records:
        """Return one row a request, in order of arrival, or those of some; requests yet to arrive have none."""
        live = list(self._all.values()) if request_ids is None else [self._all[i] for i in request_ids]

        def floats(name: str) -> NDArray[np.float64]:
            return np.array([getattr(r, name) for r in live], dtype=np.float64)

        def ints(values: list[int]) -> NDArray[np.int64]:
            return np.array(values, dtype=np.int64)

        produced = ints([r.produced_tokens for r in live])
        kept_params = np.array([r.kept_params for r in live], dtype=np.float64)
        return Records(
            arrival_s=np.array([r.request.arrival_s for r in live], dtype=np.float64),
            prompt_tokens=ints([r.request.prompt_tokens for r in live]),
            output_tokens=ints([r.request.output_tokens for r in live]),
            produced_tokens=produced,
            admitted_s=floats("admitted_s"),
            first_token_s=floats("first_token_s"),
            finish_s=floats("finish_s"),
            preemptions=ints([r.preemptions for r in live]),
            status=ints([int(r.status) for r in live]),
            kept_params_share=kept_params / np.where(produced > 0, produced * self._model.total_params, np.nan),
            quality_nll=floats("nll_sum") / np.where(produced > 0, produced, np.nan)
            if self._quality_nll is not None
            else np.full(len(live), np.nan),
            cached_tokens=ints([0] * len(live)),
        )

    # -- what else a replay writes -------------------------------------------------------------------------------

    def tokens(self, request_id: int) -> list[int]:
        """Return the tokens that a request has produced so far."""
        live = self._all[request_id]
        return live.tokens[live.request.prompt_tokens :]

    def iterations(self) -> Iterations:
        """Return one row an iteration."""
        return self._log.table()

    def token_gaps(self) -> TokenGaps:
        """Return every gap between two tokens of one request."""
        return self._log.token_gaps()

    def transitions(self) -> Transitions:
        """Return one row a plan change."""
        return self._transitions.table()

    def kept_share(self) -> tuple[tuple[float, float], ...]:
        """Return (time_s, share of the dense weights' bytes that is resident), one entry a change."""
        return tuple(self._kept_share)

    @property
    def budget_violation_s(self) -> float:
        """Seconds so far in which more was held than the budget allows."""
        return self._meter.violation_s

    def memory_rows(self) -> tuple[MemoryRow, ...]:
        """Return one row an iteration: predicted, allocated and used bytes."""
        return tuple(self._log.memory)

    def shapes(self) -> tuple[Shape, ...]:
        """Return what each iteration computed."""
        return tuple(self._log.shapes)

    @property
    def memory(self) -> DeviceMemory:
        """What the run takes of the device."""
        return self._memory

    def check(self) -> None:
        """Check that what is allocated is what is counted: KV block by KV block, and the bytes of the weights."""
        pages = [*(live.pages for live in self._running), *self.outside.values()]
        held = [block for one in pages for ids in one.blocks.values() for block in ids]
        self._pool.check(held)
        assert len(held) == self._pool.used_layer_blocks
        incoming = self._copy is not None
        assert incoming or self._elastic.bytes() == self._weight_bytes
        for live in self._waiting:
            assert not live.pages.blocks

    def close(self) -> None:
        """Let go of the copy that is under way and of its thread."""
        self._copier.close()

    # -- serving -------------------------------------------------------------------------------------------------

    def _iterate(self, now_s: float) -> bool:
        """Change the plan, form a batch and run it; return whether there was anything to do."""
        preempted = self._change_plan(now_s)
        batch = form_batch(
            self.config.scheduler,
            self._waiting,
            self._running,
            self._pool.free_layer_blocks,
            self._layer_blocks,
            self._limits,
        )
        self._carry_out(batch, now_s)
        if not batch.scheduled:
            return bool(batch.preempted)
        self._ran = self._run(batch, now_s, preempted + len(batch.preempted))
        return True

    def _wait(self, now_s: float, time_s: float) -> bool:
        """Let time pass until something happens; return False when nothing will."""
        until_s = min(self._next_event_s(), time_s)
        if self._copy is not None:
            waited_s = self._copier.wait(min(until_s - now_s, LONGEST_WAIT_S))
            self._clock.wait_until(now_s + waited_s)  # of a clock that counts this thread's work alone
            return True
        if math.isinf(until_s):
            self._stuck = True
            return False
        self._clock.wait_until(until_s)
        return True

    def _next_event_s(self) -> float:
        """Return when an idle engine has something to do again, a copy's end left out."""
        times_s = [math.inf]
        if self._arrivals:
            times_s.append(self._arrivals[0].arrival_s)
        if self._waiting:
            times_s.append(self._meter.next_s)
        return min(times_s)

    def _take_arrivals(self, now_s: float) -> None:
        while self._arrivals and self._arrivals[0].arrival_s <= now_s:
            request = self._arrivals.popleft()
            limit = min(request.output_tokens, self._context_limit - request.prompt_tokens)
            live = _Live(request, [], output_limit=limit)
            self._all[request.request_id] = live
            self._arrived_prompt_tokens += request.prompt_tokens
            full = self._plan.admit is not None and len(self._waiting) >= self._plan.admit
            if full or limit < 1:
                self._reject(live)
            else:
                live.tokens = list(self._prompts(request.request_id, request.prompt_tokens))
                assert len(live.tokens) == request.prompt_tokens
                self._waiting.append(live)

    def _reject(self, live: _Live) -> None:
        live.status = Status.REJECTED
        self._rejected += 1
        if self._on_token is not None:
            self._on_token(live.request.request_id, None, True)

    def _carry_out(self, batch: Batch[_Live], now_s: float) -> None:
        """Preempt, admit and take KV blocks, as the batch says."""
        for live in batch.preempted:
            self._preempt(live)
        for live in batch.admitted:
            assert self._waiting.popleft() is live
            found = self._layer_blocks(live, live.computed_tokens)
            live.pages = RequestPages(mha=self._prefill_mha)
            live.pages.found(self._pool.claim(live.request.request_id, found))
            live.prefill_tokens = live.target_tokens
            live.status = Status.RUNNING
            if math.isnan(live.admitted_s):
                live.admitted_s = now_s
            self._running.append(live)
        for live, tokens in batch.scheduled:
            self._hold(live, live.computed_tokens + tokens)

    def _run(self, batch: Batch[_Live], start_s: float, preempted: int) -> _Ran | None:
        """Run one iteration on the device; None when memory ran out, and requests were preempted for it."""
        decodes = [live for live, _ in batch.scheduled if live.decoding]
        prefills = [(live, tokens) for live, tokens in batch.scheduled if not live.decoding]
        running, waiting = len(self._running), len(self._waiting)
        forward_start_s = self._clock.now_s()
        try:
            next_tokens = self._forward(decodes, prefills)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            self._relieve(batch)
            return None
        forward_s = self._clock.now_s() - forward_start_s
        contexts = sum(live.computed_tokens for live in decodes)
        shape = Shape(
            plan=self._plan,
            chunks=tuple((tokens, live.computed_tokens) for live, tokens in prefills),
            decode_batch=len(decodes),
            decode_context_sum=contexts,
            sequences=len(next_tokens),
            forward_s=forward_s,
        )
        self._clock.ran(shape.prefill_tokens, len(decodes), contexts)
        self._log.memory.append(
            MemoryRow(
                time_s=(end_s := self._clock.now_s()),
                predicted_bytes=self._weight_bytes + self._pool.layer_blocks * self._block_bytes,
                allocated_bytes=self._weights_allocated_bytes + self._pool.allocated_bytes,
                in_use_bytes=self._memory.sample(),
            )
        )
        return _Ran(
            batch=batch,
            shape=shape,
            next_tokens=next_tokens,
            start_s=start_s,
            end_s=end_s,
            running=running,
            waiting=waiting,
            preempted=preempted,
        )

    def _forward(self, decodes: Sequence[_Live], prefills: Sequence[tuple[_Live, int]]) -> dict[int, int]:
        """Return the next token of every request that has caught up with this iteration."""
        single = [Packed(live.pages, live.tokens[live.computed_tokens :], live.computed_tokens) for live in decodes]
        chunks = [
            Packed(live.pages, live.tokens[live.computed_tokens : live.computed_tokens + tokens], live.computed_tokens)
            for live, tokens in prefills
        ]
        asking, rows, row = list(decodes), list(range(len(decodes))), len(decodes)
        for live, tokens in prefills:
            row += tokens
            if live.computed_tokens + tokens == live.target_tokens:
                asking.append(live)
                rows.append(row - 1)

        def run(check: bool) -> Tensor:
            batch = PagedBatch(self._pool.arena, single, chunks, self._elastic.windows)
            plan = self._plan
            return forward(
                self._elastic, batch, single, chunks, rows, prefill=plan.prefill, decode=plan.decode, check=check
            )

        logits = run(False)
        if not bool(torch.isfinite(logits).all()):
            where = "the head"
            try:
                run(True)
            except NotANumberError as error:
                where = str(error)
            raise NumericsError(
                f"{where} of {self._model.name} gave a value that is no finite number in iteration "
                f"{len(self._log)}, under the plan {describe(self._plan)!r}; take float32 or bfloat16 instead "
                "of float16, or leave that block at 16 bits"
            )
        chosen: list[int] = logits.argmax(-1).tolist()
        return {live.request.request_id: token for live, token in zip(asking, chosen, strict=True)}

    def _relieve(self, batch: Batch[_Live]) -> None:
        """Preempt the newer half of what runs, for the device had less memory than the budget says."""
        self.out_of_memory += 1
        self._memory.give_back()
        if len(self._running) == 1:
            tokens = sum(tokens for _, tokens in batch.scheduled)
            raise BudgetError(
                f"an iteration of {tokens} tokens of one request ran out of memory beside "
                f"{self._weight_bytes / GIB:.2f} GiB of weights; raise workspace_bytes "
                f"({self._workspace_bytes / GIB:.2f} GiB now), or lower engine.limits.max_batch_tokens"
            )
        for live in self._running[: len(self._running) // 2 - 1 : -1]:
            self._preempt(live)
        self._most_running = len(self._running)  # else the same batch would come again

    def _put_in_force(self, ran: _Ran) -> None:
        """Give every request that caught up its next token, and let go of those that have their last."""
        now_s = self._time_s = ran.end_s
        self._busy_s += now_s - ran.start_s
        # What is held changes now; until now it was compared with the budget as it was.
        self._follow_budget(now_s)
        # A request that arrives at the very end of an iteration arrives before it ends.
        self._take_arrivals(now_s)
        used_share = self._pool.used_layer_blocks / max(self._pool.layer_blocks, 1)
        for live, tokens in ran.batch.scheduled:
            prefilled = not live.decoding
            live.computed_tokens += tokens
            if live.computed_tokens < live.target_tokens:
                continue
            live.kept_params += self._params_run(live, self._plan.prefill.ffn if prefilled else self._plan.decode.ffn)
            if self._quality_nll is not None:
                own = plan_for_holder(self._plan, live.pages.mha, decoding=not prefilled)
                live.nll_sum += self._quality_nll(own)
            if prefilled:
                self._end_prefill(live)
            self._add_token(live, ran.next_tokens[live.request.request_id], now_s)
        self._running = [live for live in self._running if live.status is Status.RUNNING]
        self._log.add(
            ran.shape,
            start_s=ran.start_s,
            end_s=now_s,
            running=ran.running,
            waiting=ran.waiting,
            kv_used_share=used_share,
            preemptions=ran.preempted,
        )

    def _add_token(self, live: _Live, token: int, now_s: float) -> None:
        live.tokens.append(token)
        live.produced_tokens += 1
        self._produced_tokens += 1
        if live.produced_tokens == 1:
            live.first_token_s = now_s
            self._first_tokens += 1
            self._ttft_sum_s += now_s - live.request.arrival_s
        else:
            self._log.add_gap(now_s - live.last_token_s)
        live.last_token_s = now_s
        last = live.produced_tokens >= live.output_limit
        if not last and self._ends is not None:
            last = self._ends(live.request.request_id, token)
        if last:
            live.finish_s = now_s
            live.status = Status.FINISHED
            self._finished += 1
            self._most_running = math.inf
            if self._holds is not None and self._holds(live.request.request_id):
                self.outside[live.request.request_id], live.pages = live.pages, RequestPages()
            else:
                self._let_go(live)
        if self._on_token is not None:
            self._on_token(live.request.request_id, token, last)

    def _end_prefill(self, live: _Live) -> None:
        """Leave the KV that decode will not read: layers it does not run, tokens that the plan does not keep."""
        pages = live.pages
        pages.mha = pages.mha & self._decode_mha
        keeps_all = all(keep == KV_KEEP_ALL for keep in self._plan.kv_keep)
        pages.end_prefill(self._pool, live.computed_tokens, None if keeps_all else self._plan.kv_keep)

    def _params_run(self, live: _Live, ffn: tuple[bool, ...]) -> int:
        """Return how many parameters run for one token of a request."""
        fixed, mha, ffn_params = self._params
        return fixed + len(live.pages.mha) * mha + sum(ffn) * ffn_params

    # -- plans ---------------------------------------------------------------------------------------------------

    def _change_plan(self, now_s: float) -> int:
        """Do what is due of plan changes between two iterations; return how many requests were preempted for it."""
        before = self._preemptions
        if self._copy is not None and self._copier.whole():
            self._join(now_s)
        if self._decided is not None:
            self._begin_transition(*self._decided, now_s)
            self._decided = None
        if self._copy is None and self._copies:
            self._copy, self._copy_started = self._copies.popleft(), False
        resized = self._resize_pool()
        while self._pool.free_layer_blocks < 0 and self._running:
            self._preempt_for_transition(self._running[-1])
        if resized:
            self._settle()
            self._memory.follow(self._meter.now_bytes)
        if self._copy is not None and not self._copy_started:
            # Only now is its memory free: the pool has made room for it.
            self._copier.start(self._copy)
            self._copy_started = True
        self._transitions.look(now_s, self._pool.layer_blocks, ready=self._copy is None)
        return self._preemptions - before

    def _begin_transition(self, time_s: float, plan: Plan, now_s: float) -> None:
        """Drop what the new plan does not run, and line up the copies of what it needs."""
        self._transitions.begin(time_s, self._plan, plan, self._pool.layer_blocks)
        self._target = plan
        resident = without_dropped(self._resident, plan)
        copies = copies_between(self._model, resident, plan)
        if self._copy is not None and self._copy not in copies:
            self._copier.abandon()
            self._copy = None
        self._set_resident(resident, now_s)
        self._copies = deque(copies)
        if self._copy is not None:
            self._copies.remove(self._copy)  # the copy under way goes on, for the new plan

    def _join(self, now_s: float) -> None:
        """Let the layer whose copy is whole run from now on, in the place of what it replaces."""
        assert self._copy is not None
        self._copier.join()
        self._transitions.charge(bytes_in=self._copy.copied_bytes)
        old_mha = self._resident.mha_bits[self._copy.layer]
        self._set_resident(joined(self._resident, self._copy), now_s, copied_bytes=self._copy.copied_bytes)
        restored = self._copy.mha_bits and not old_mha and self._copy.layer in self._prefill_mha
        layer = self._copy.layer
        self._copy = None
        if restored and self.config.restore == "recompute":
            for live in [live for live in reversed(self._running) if layer not in live.pages.mha]:
                if layer in self._mha_of(live):
                    self._preempt_for_transition(live)

    def _set_resident(self, resident: Resident, now_s: float, copied_bytes: int = 0) -> None:
        freed = self._resident.weight_bytes(self._model) + copied_bytes - resident.weight_bytes(self._model)
        self._transitions.charge(bytes_freed=freed)
        for kind in KINDS:
            bits = resident.mha_bits if kind == "mha" else resident.ffn_bits
            for block, wanted in zip(self._elastic.blocks[kind], bits, strict=True):
                if wanted == ABSENT:
                    block.want(ABSENT)
        self._resident = resident
        self._run_what_is_resident(now_s)
        for live in self._running:  # KV of blocks that no longer run is of no use
            kept = live.pages.mha & self._mha_of(live)
            if kept != live.pages.mha:
                live.pages.mha = kept
                self._hold(live, live.computed_tokens)
        if freed:
            self._memory.give_back()
        self._weights_allocated_bytes = self._elastic.bytes()

    def _run_what_is_resident(self, now_s: float = 0.0) -> None:
        """Run the blocks of the target that are on the device."""
        self._plan = running_plan(self._resident, self._target)
        prefill_mha = frozenset(layer for layer, keep in enumerate(self._plan.prefill.mha) if keep)
        if prefill_mha != getattr(self, "_prefill_mha", prefill_mha):
            self._forget_kept_kv()  # it lacks a layer, or has one too many
        self._prefill_mha = prefill_mha
        self._decode_mha = frozenset(layer for layer, keep in enumerate(self._plan.decode.mha) if keep)
        self._weight_bytes = self._fixed_weight_bytes + self._resident.weight_bytes(self._model)
        share = self._weight_bytes / self._dense_weight_bytes
        if not self._kept_share or self._kept_share[-1][1] != share:
            self._kept_share.append((now_s, share))

    def _mha_of(self, live: _Live) -> frozenset[int]:
        """Return the MHA blocks that run for a request at its stage, were it to hold the KV of all."""
        return self._decode_mha if live.decoding else self._prefill_mha

    # -- memory --------------------------------------------------------------------------------------------------

    def _resize_pool(self) -> bool:
        """Give the KV pool what the budget leaves; return whether that is another number of blocks than before."""
        incoming = self._copy.copied_bytes if self._copy is not None else 0
        left = self._meter.now_bytes - self._weight_bytes - incoming - self._workspace_bytes
        layer_blocks = max(0, left // self._block_bytes)
        resized = layer_blocks != self._pool.layer_blocks
        if resized:
            self._overwritten(self._pool.resize(layer_blocks))
        limits = self.config.limits
        self._limits = replace(
            limits,
            max_running=int(min(limits.max_running, self._plan.max_running or limits.max_running, self._most_running)),
            watermark_layer_blocks=limits.watermark_layer_blocks
            + math.ceil(self.config.kv_watermark_share * layer_blocks),
        )
        return resized

    def _settle(self) -> None:
        """Give the memory back that the pool has lost, and follow the blocks that moved for it."""
        moved = self._pool.settle()
        if moved:
            for pages in (*(live.pages for live in self._running), *self.outside.values()):
                pages.rename(moved)

    def _preempt_for_transition(self, live: _Live) -> None:
        self._transitions.charge(preempted=1, recomputed_tokens=live.computed_tokens)
        self._preempt(live)

    def _preempt(self, live: _Live) -> None:
        """Take a running request's KV and put it back at the head of the queue."""
        self._running.remove(live)
        whole = live.pages.kv_keep is None and live.pages.mha == self._prefill_mha  # else nobody could go on from it
        self._let_go(live, live.request.request_id if self.config.reuse_preempted_kv and whole else -1)
        live.status = Status.WAITING
        live.computed_tokens = self._found_again(live)
        live.preemptions += 1
        self._preemptions += 1
        self._waiting.appendleft(live)

    def _let_go(self, live: _Live, owner: int = -1) -> None:
        self._pool.release(live.pages.all_blocks(), owner)
        live.pages = RequestPages()

    def _hold(self, live: _Live, tokens: int) -> None:
        """Take or free KV blocks so that a request holds what so many computed tokens need."""
        self._overwritten(live.pages.hold(self._pool, tokens))

    def _overwritten(self, request_ids: Sequence[int]) -> None:
        for request_id in request_ids:
            self._all[request_id].computed_tokens = self._found_again(self._all[request_id])

    def _forget_kept_kv(self) -> None:
        self._pool.forget()
        for live in self._waiting:
            live.computed_tokens = 0

    def _found_again(self, live: _Live) -> int:
        """Return the tokens of a preempted request whose KV nobody has overwritten: whole KV blocks from the first on.

        At least one token is computed again, as in vLLM, to have something to sample from.
        """
        kept = self._pool.kept_layer_blocks(live.request.request_id)
        if not kept:
            return 0
        block_tokens = self.config.kv_block_tokens
        # The run's last block may be partly filled; such a block is never found again.
        whole = min(kept // len(self._prefill_mha), live.computed_tokens // block_tokens)
        return min(whole, (live.target_tokens - 1) // block_tokens) * block_tokens

    def _layer_blocks(self, live: _Live, tokens: int) -> int:
        """Return the KV blocks, over all layers, that a request needs for so many computed tokens."""
        block_tokens = self.config.kv_block_tokens
        if live.status is not Status.RUNNING:
            return len(self._prefill_mha) * kv_blocks(tokens, block_tokens)
        if live.pages.kv_keep is None:
            return len(live.pages.mha) * kv_blocks(tokens, block_tokens)
        return sum(live.pages.layer_blocks(layer, tokens, block_tokens) for layer in live.pages.mha)

    def _find_context_limit(self) -> int:
        """Return the longest context one request may reach, so that it fits the first pool alone, as vLLM demands."""
        limit = self.config.max_context_tokens or self._model.max_context_tokens
        if self._prefill_mha:
            blocks = (self._pool.layer_blocks - self._limits.watermark_layer_blocks) // len(self._prefill_mha)
            limit = min(limit, blocks * self.config.kv_block_tokens)
        budget_bytes = self.budget.budget_bytes[0]
        if limit < 2 or self._weight_bytes + self._workspace_bytes > budget_bytes:
            raise BudgetError(
                f"weights {self._weight_bytes / GIB:.2f} GiB and workspace {self._workspace_bytes / GIB:.2f} GiB leave "
                f"no room for the KV cache of one request in a budget of {budget_bytes / GIB:.2f} GiB; prune or "
                "quantise more blocks, or raise the budget (budget=, gpu=), or lower workspace_bytes"
            )
        return limit

    def _held_bytes(self) -> int:
        incoming = self._copy.copied_bytes if self._copy is not None else 0
        kv_bytes = self._pool.used_layer_blocks * self._block_bytes
        return self._weight_bytes + incoming + self._workspace_bytes + kv_bytes

    def _follow_budget(self, now_s: float) -> None:
        """Bring the budget up to ``now_s`` and count the seconds in which more was held than it allowed."""
        if self._meter.follow(now_s, self._held_bytes()):
            self._stuck = False

    # -- what can be seen ----------------------------------------------------------------------------------------

    def _observe(self, time_s: float) -> EngineState:
        self._time_s = time_s = max(time_s, self._time_s)
        self._follow_budget(time_s)
        self._take_arrivals(time_s)
        next_bytes, next_s = self._meter.announced(time_s)
        return EngineState(
            time_s=time_s,
            waiting=len(self._waiting),
            waiting_tokens=sum(live.target_tokens for live in self._waiting),
            oldest_wait_s=time_s - self._waiting[0].request.arrival_s if self._waiting else 0.0,
            running=len(self._running),
            running_tokens=sum(live.computed_tokens for live in self._running),
            kv_layer_blocks=self._pool.layer_blocks,
            kv_used_layer_blocks=self._pool.used_layer_blocks,
            budget_bytes=self._meter.now_bytes,
            weight_bytes=self._weight_bytes,
            arrived=len(self._all),
            arrived_prompt_tokens=self._arrived_prompt_tokens,
            first_tokens=self._first_tokens,
            ttft_sum_s=self._ttft_sum_s,
            produced_tokens=self._produced_tokens,
            finished=self._finished,
            rejected=self._rejected,
            preemptions=self._preemptions,
            iterations=len(self._log),
            busy_s=self._busy_s,
            next_budget_bytes=next_bytes,
            next_budget_s=next_s,
            budget_violation_s=self._meter.violation_s,
            incoming_bytes=self._copy.copied_bytes if self._copy is not None else 0,
            plan=self._plan,
            target=self._decided[1] if self._decided is not None else self._target,
        )
