"""The plain engine: one SimPy event an iteration, Python objects, no shortcut. ``sim.engine.sim_engine.SimEngine`` equals it.

Slow and obvious on purpose. It follows the rules that the docstring of sim/engine/sim_engine.py lists; where the two differ, one
of them is wrong.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import simpy
from numpy.typing import NDArray

from sim.cost.latency import LatencyModel, chunk_context_sum
from sim.cost.memory import fixed_weight_bytes, kv_block_layer_bytes, kv_blocks, weight_bytes
from sim.cost.model_spec import ModelSpec
from sim.cost.plan import KV_KEEP_ALL, WEIGHT_BITS, KVKeep, Plan, check_plan, dense_plan, describe
from sim.engine.budget import Budget, constant_budget
from sim.engine.kv_pool import NOBODY, KVPool
from sim.engine.protocol import EngineConfig, EngineState, Request
from sim.engine.scheduler import Batch, form_batch
from sim.engine.sim_engine import exact_delay
from sim.engine.transition import (
    LayerCopy,
    copies_between,
    joined,
    plan_for_holder,
    resident_of,
    running_plan,
    without_dropped,
)
from sim.errors import BudgetError, ConfigError
from sim.results.records import Iterations, Records, Status, TokenGaps, Transitions
from sim.types import GIB


@dataclass(slots=True, eq=False)
class _Unit:
    """The KV of one hash id: held by ``holders`` requests, of the layers ``mha``; ``known`` while others find it."""

    owner: int  # its number in the pool
    hash_id: int
    mha: frozenset[int]
    holders: int = 1
    known: bool = True


@dataclass(slots=True, eq=False)
class _Live:
    """A request inside the engine. ``mha``: the layers whose MHA block it runs, and whose KV it holds."""

    request: Request
    output_limit: int
    computed_tokens: int = 0
    produced_tokens: int = 0
    prefill_tokens: int = 0  # tokens to compute before it decodes: prompt, and what a preemption made it lose
    own_layer_blocks: int = 0  # that it holds, without those of its units
    units: dict[int, _Unit] = field(default_factory=dict)  # by their place in the prompt
    unit_layer_blocks: int = 0  # of one unit, of one layer
    next_unit: int = 0  # the first whose end its prefill has not passed
    fills: bool = False  # whether it puts units in the cache
    left_tokens: int = 0  # whose KV is still there of what it left behind when it was preempted, its units included
    cached_tokens: int = -1  # -1 before it was admitted
    mha: frozenset[int] = frozenset()
    kv_keep: tuple[KVKeep, ...] | None = None  # None while every token is kept
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
    def decoding(self) -> bool:
        return self.computed_tokens >= self.prefill_tokens

    @property
    def held_layer_blocks(self) -> int:
        return self.own_layer_blocks + sum(len(u.mha) * self.unit_layer_blocks for u in self.units.values())


@dataclass(slots=True, eq=False)
class _Transition:
    """One plan change, as it goes on."""

    time_s: float
    from_plan: str
    to_plan: str
    kv_blocks_before: int
    bytes_in: int = 0
    bytes_freed: int = 0
    ready_s: float = math.nan
    preempted: int = 0
    recomputed_tokens: int = 0
    kv_blocks_after: int = 0


class PlainEngine:
    """The reference engine: one replica, one SimPy event an iteration."""

    def __init__(
        self,
        *,
        model: ModelSpec,
        latency: LatencyModel,
        config: EngineConfig,
        plan: Plan,
        budget_bytes: int | Budget,
        workspace_bytes: int = 0,
        host_to_device_bytes_per_s: float = 25e9,
        copy_slowdown: float = 0.0,
        quality_nll: Callable[[Plan], float] | None = None,
        env: simpy.Environment | None = None,
    ) -> None:
        """Build an idle engine.

        Args:
            model: what is served. latency: its price on one device. config: how it serves.
            plan: what runs first; its weights are there already.
            budget_bytes: what weights, workspace and KV cache may hold together, constant or over time.
            workspace_bytes: activations and the like, part of the budget that neither weights nor KV can use.
            host_to_device_bytes_per_s: how fast weights are copied in.
            copy_slowdown: by what share an iteration takes longer that starts while weights are copied in.
            env: the SimPy environment to live in; a new one by default.
        Raises:
            PlanError: for a plan that is not legal for the model.
            BudgetError: when the budget cannot hold the weights and one request at the start.
        """
        self.expects_more = False  # whether requests will come that are not known yet: its memory follows meanwhile
        check_plan(model, plan)
        if not host_to_device_bytes_per_s > 0 or not copy_slowdown >= 0:
            raise ConfigError(
                f"host_to_device_bytes_per_s is {host_to_device_bytes_per_s} and copy_slowdown {copy_slowdown}; "
                "the first must be above 0, the second at least 0"
            )
        self.env = env or simpy.Environment()
        latency.check_bits(plan)
        self._quality_nll = quality_nll
        self._model, self._latency, self.config = model, latency, config
        self.budget = budget_bytes if isinstance(budget_bytes, Budget) else constant_budget(budget_bytes)
        self._budget_step = bisect_right(self.budget.change_s, self.env.now) - 1
        self._workspace_bytes = workspace_bytes
        self._host_to_device_bytes_per_s, self._copy_slowdown = host_to_device_bytes_per_s, copy_slowdown
        self._params = (model.fixed_params, model.mha_params, model.ffn_params)
        self._fixed_weight_bytes = fixed_weight_bytes(model)
        self._dense_weight_bytes = weight_bytes(model, dense_plan(model))
        self._kept_share: list[tuple[float, float]] = []
        self._block_bytes = kv_block_layer_bytes(model, config.kv_block_tokens)
        self._unit_layer_blocks = config.hash_block_tokens // config.kv_block_tokens
        self._cache: dict[int, _Unit] = {}  # what requests find, by hash id
        self._units_made = 0
        self._caching = False  # whether the present plan lets them

        self._arrivals: deque[Request] = deque()
        self._waiting: deque[_Live] = deque()
        self._running: list[_Live] = []
        self._all: list[_Live] = []
        self._in_iteration = False
        self._wake: simpy.Event | None = None
        self._resume: simpy.Event | None = None
        self._hold_at_s = math.nan

        self._target = plan
        self._resident = resident_of(plan)
        self._decided: tuple[float, Plan] | None = None
        self._schedule: deque[tuple[float, Plan]] = deque()
        self._copies: deque[LayerCopy] = deque()
        self._copy: LayerCopy | None = None
        self._copy_end_s = math.inf
        self._transition: _Transition | None = None
        self._transitions: list[_Transition] = []

        self._arrived_prompt_tokens = self._first_tokens = self._produced_tokens = 0
        self._finished = self._rejected = self._preemptions = 0
        self._ttft_sum_s = self._busy_s = self._violation_s = 0.0
        self._violation_since_s = float(self.env.now)
        self._gaps_s: list[float] = []
        self._iterations: list[tuple[float, float, int, int, int, int, float, int, bool]] = []

        self._pool = KVPool(0)
        self._run_what_is_resident()
        self._resize_pool()
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
        self._wake_up()

    def apply(self, plan: Plan) -> None:
        """Make ``plan`` what shall run; it takes effect between two iterations.

        Raises:
            PlanError: for a plan that is not legal for the model; what runs goes on.
        """
        check_plan(self._model, plan)
        self._latency.check_bits(plan)
        self._take_decisions()
        wanted = self._decided[1] if self._decided is not None else self._target
        if plan == wanted:
            return
        self._decided = (self.env.now, plan)
        if not self._in_iteration:
            self._wake_up()

    def apply_at(self, time_s: Sequence[float], plans: Sequence[Plan]) -> None:
        """Make each plan what shall run from its moment on."""
        self._schedule.extend(zip(time_s, plans, strict=True))
        self._wake_up()

    def _take_decisions(self) -> bool:
        """Want what the schedule has for the present; return whether that is another plan than before."""
        another = False
        while self._schedule and self._schedule[0][0] <= self.env.now:
            time_s, plan = self._schedule.popleft()
            if plan != (self._decided[1] if self._decided is not None else self._target):
                self._decided = (time_s, plan)
                another = True
        return another

    def run_until(self, time_s: float) -> EngineState:
        """Serve until ``time_s`` (``inf``: until nothing is left to do) and say what can be seen then."""
        if self._resume is not None:
            self._resume.succeed()
            self._resume = None
        self._hold_at_s = time_s
        while True:
            if self.env.now < time_s < math.inf:
                self.env.timeout(exact_delay(self.env.now, time_s))  # so that the clock stands at time_s afterwards
            while self.env.peek() <= time_s and not math.isinf(self.env.peek()):
                self.env.step()
            if self.env.now >= time_s or math.isinf(time_s):
                break
        now_s = self.env.now if math.isinf(time_s) else time_s
        self._follow_budget(now_s)
        self._take_arrivals(now_s)
        if self._take_decisions() and not self._in_iteration:
            self._wake_up()
        return self._state(now_s)

    @property
    def drained(self) -> bool:
        """Whether no submitted request can make any more progress by itself."""
        return (
            self._resume is None
            and not self._arrivals
            and not self._running
            and (not self._waiting or math.isinf(self.env.peek()))
        )

    def records(self) -> Records:
        """Return one row a request, in order of arrival; requests yet to arrive have none."""
        live = self._all

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
            cached_tokens=ints([max(r.cached_tokens, 0) for r in live]),
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

    def transitions(self) -> Transitions:
        """Return one row a plan change."""
        rows = self._transitions

        def ints(name: str) -> NDArray[np.int64]:
            return np.array([getattr(t, name) for t in rows], dtype=np.int64)

        return Transitions(
            time_s=np.array([t.time_s for t in rows], dtype=np.float64),
            from_plan=tuple(t.from_plan for t in rows),
            to_plan=tuple(t.to_plan for t in rows),
            bytes_in=ints("bytes_in"),
            bytes_freed=ints("bytes_freed"),
            ready_s=np.array([t.ready_s for t in rows], dtype=np.float64),
            preempted=ints("preempted"),
            recomputed_tokens=ints("recomputed_tokens"),
            kv_blocks_before=ints("kv_blocks_before"),
            kv_blocks_after=ints("kv_blocks_after"),
        )

    def kept_share(self) -> tuple[tuple[float, float], ...]:
        """Return (time_s, share of the dense weights' bytes that is resident), one entry a change."""
        return tuple(self._kept_share)

    @property
    def budget_violation_s(self) -> float:
        """Seconds so far in which more was held than the budget allows."""
        return self._violation_s

    # -- serving -------------------------------------------------------------------------------------------------

    def _serve(self) -> Generator[simpy.Event, Any, None]:
        while True:
            self._follow_budget(self.env.now)
            self._take_arrivals(self.env.now)
            if self.env.now == self._hold_at_s:  # a policy decides now, before the next iteration starts
                self._resume = self.env.event()
                yield self._resume
                continue
            preempted = self._change_plan()
            batch = self._form_batch()
            self._carry_out(batch)
            preempted += len(batch.preempted)
            if not batch.scheduled:
                if not batch.preempted:
                    yield self._next_event()
                continue
            start_s, waiting, running = self.env.now, len(self._waiting), len(self._running)
            duration_s, extrapolated = self._price(batch)
            prefill_tokens = sum(tokens for r, tokens in batch.scheduled if not r.decoding)
            decodes = sum(r.decoding for r, _ in batch.scheduled)
            self._in_iteration = True
            yield self.env.timeout(duration_s)
            self._in_iteration = False
            self._busy_s += duration_s
            # What is held changes now; until now it was compared with the budget as it was.
            self._follow_budget(self.env.now)
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
                    preempted,
                    extrapolated,
                )
            )

    def _next_event(self) -> simpy.Event:
        """Return what an idle engine waits for: an arrival, the end of a copy, a budget, or a call from outside."""
        times_s = [self._copy_end_s]
        if self._arrivals:
            times_s.append(self._arrivals[0].arrival_s)
        busy = self._waiting or self._arrivals or self.expects_more
        if busy and self._budget_step + 1 < len(self.budget.change_s):
            times_s.append(self.budget.change_s[self._budget_step + 1])
        if (self._waiting or self._arrivals) and self._schedule:
            times_s.append(self._schedule[0][0])
        self._wake = self.env.event()
        time_s = min(times_s)
        if math.isinf(time_s):
            return self._wake
        return self._wake | self.env.timeout(exact_delay(self.env.now, time_s))

    def _wake_up(self) -> None:
        if self._wake is not None and not self._wake.triggered:
            self._wake.succeed()
        self._wake = None

    def _take_arrivals(self, now_s: float) -> None:
        while self._arrivals and self._arrivals[0].arrival_s <= now_s:
            request = self._arrivals.popleft()
            limit = min(request.output_tokens, self._context_limit - request.prompt_tokens)
            live = _Live(request, output_limit=limit, unit_layer_blocks=self._unit_layer_blocks)
            self._all.append(live)
            self._arrived_prompt_tokens += request.prompt_tokens
            full = self._plan.admit is not None and len(self._waiting) >= self._plan.admit
            if full or live.output_limit < 1:
                live.status = Status.REJECTED
                self._rejected += 1
            else:
                self._waiting.append(live)

    def _form_batch(self) -> Batch[_Live]:
        for live in self._waiting:
            live.computed_tokens = max(live.left_tokens, len(self._found_units(live)) * self.config.hash_block_tokens)
        return form_batch(
            self.config.scheduler,
            self._waiting,
            self._running,
            self._pool.free_layer_blocks,
            self._layer_blocks,
            self._limits,
            self._shared,
        )

    def _carry_out(self, batch: Batch[_Live]) -> None:
        """Preempt, admit and take KV blocks, as the batch says."""
        for live in batch.preempted:
            self._preempt(live)
        for live in batch.admitted:
            assert self._waiting.popleft() is live
            live.mha, live.kv_keep = self._prefill_mha, None
            live.units = dict(enumerate(self._found_units(live)))
            live.next_unit, live.fills = len(live.units), self._caching
            for unit in live.units.values():
                self._hold_unit(unit)
            live.prefill_tokens = live.target_tokens
            live.status = Status.RUNNING
            live.own_layer_blocks = self._own_blocks(live, live.computed_tokens)
            self._pool.claim(live.request.request_id, live.own_layer_blocks)
            if math.isnan(live.admitted_s):
                live.admitted_s = self.env.now
            if live.cached_tokens < 0:
                live.cached_tokens = live.computed_tokens
            self._running.append(live)
        for live, tokens in batch.scheduled:
            self._hold(live, self._own_blocks(live, live.computed_tokens + tokens))

    def _price(self, batch: Batch[_Live]) -> tuple[float, bool]:
        """Return the seconds of an iteration, and whether they are extrapolated."""
        chunks = [(tokens, live.computed_tokens) for live, tokens in batch.scheduled if not live.decoding]
        decodes = [live for live, _ in batch.scheduled if live.decoding]
        contexts = sum(live.computed_tokens for live in decodes)
        sequences = sum(live.computed_tokens + tokens == live.target_tokens for live, tokens in batch.scheduled)
        shape = (chunks, len(decodes), contexts, sequences)
        if all(live.mha == self._mha_of(live) and live.kv_keep is None for live, _ in batch.scheduled):
            seconds = self._latency.iteration_s(self._plan, *shape)
        else:
            tokens = sum(chunk for chunk, _ in chunks) + len(decodes)
            seconds = self._latency.layered_iteration_s(self._layers_seen(batch), tokens, sequences)
        if self._copy is not None:
            seconds *= 1.0 + self._copy_slowdown
        return seconds, not self._latency.in_range(*shape)

    def _layers_seen(self, batch: Batch[_Live]) -> NDArray[np.int64]:
        """Return what each layer sees of a batch, equal layers together, in the order of the first of each."""
        rows: dict[tuple[int, ...], int] = {}
        prefills = [(live, tokens) for live, tokens in batch.scheduled if not live.decoding]
        decodes = [live for live, _ in batch.scheduled if live.decoding]
        prefill_tokens = sum(tokens for _, tokens in prefills)
        for layer in range(self._model.num_layers):
            chunks = [(tokens, live.computed_tokens) for live, tokens in prefills if layer in live.mha]
            contexts = [
                live.kv_keep[layer].tokens(live.computed_tokens) if live.kv_keep else live.computed_tokens
                for live in decodes
                if layer in live.mha
            ]
            ffn_tokens = prefill_tokens * self._plan.prefill.ffn[layer] + len(decodes) * self._plan.decode.ffn[layer]
            seen = (
                WEIGHT_BITS.index(self._plan.weight_bits[layer]),
                sum(tokens for tokens, _ in chunks),
                sum(chunk_context_sum(tokens, prefix) for tokens, prefix in chunks),
                len(contexts),
                sum(contexts),
                ffn_tokens,
            )
            rows[seen] = rows.get(seen, 0) + 1
        return np.array([(count, *seen) for seen, count in rows.items()], dtype=np.int64)

    def _finish(self, batch: Batch[_Live]) -> None:
        """Give every request that caught up its next token, and let go of those that have their last."""
        now_s = self.env.now
        done = False
        for live, tokens in batch.scheduled:
            prefilled = not live.decoding
            live.computed_tokens += tokens
            self._fill_cache(live)
            if live.computed_tokens < live.target_tokens:
                continue
            live.kept_params += self._params_run(live, self._plan.prefill.ffn if prefilled else self._plan.decode.ffn)
            if self._quality_nll is not None:
                live.nll_sum += self._quality_nll(plan_for_holder(self._plan, live.mha, decoding=not prefilled))
            if prefilled:
                self._end_prefill(live)
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
                self._let_go(live)
                done = True
        if done:
            self._running = [live for live in self._running if live.status is Status.RUNNING]

    def _end_prefill(self, live: _Live) -> None:
        """Leave the KV that decode will not read: layers it does not run, tokens that the plan does not keep."""
        live.mha = live.mha & self._decode_mha
        if any(keep != KV_KEEP_ALL for keep in self._plan.kv_keep) and not live.units:
            live.kv_keep = self._plan.kv_keep
        self._hold(live, self._own_blocks(live, live.computed_tokens))

    def _params_run(self, live: _Live, ffn: tuple[bool, ...]) -> int:
        """Return how many parameters run for one token of a request."""
        fixed, mha, ffn_params = self._params
        return fixed + len(live.mha) * mha + sum(ffn) * ffn_params

    # -- plans ---------------------------------------------------------------------------------------------------

    def _change_plan(self) -> int:
        """Do what is due of plan changes between two iterations; return how many requests were preempted for it."""
        before = self._preemptions
        if self._copy is not None and self._copy_end_s <= self.env.now:
            self._join()
        self._take_decisions()
        if self._decided is not None:
            self._begin_transition(*self._decided)
            self._decided = None
        if self._copy is None and self._copies:
            self._copy = self._copies.popleft()
            self._copy_end_s = self.env.now + self._copy.copied_bytes / self._host_to_device_bytes_per_s
        if self._transition is not None and self._copy is None:
            self._transition.ready_s = self.env.now
        self._resize_pool()
        self._preempt_for_the_pool()
        if self._transition is not None:
            self._transition.kv_blocks_after = self._pool.layer_blocks
            if self._copy is None:
                self._transition = None
        return self._preemptions - before

    def _begin_transition(self, time_s: float, plan: Plan) -> None:
        """Drop what the new plan does not run, and line up the copies of what it needs."""
        self._transition = _Transition(time_s, describe(self._plan), describe(plan), self._pool.layer_blocks)
        self._transitions.append(self._transition)
        self._target = plan
        resident = without_dropped(self._resident, plan)
        self._set_resident(resident)
        copies = copies_between(self._model, resident, plan)
        self._copies = deque(copies)
        if self._copy is not None:
            if self._copy in copies:
                self._copies.remove(self._copy)  # the copy under way goes on, for the new plan
            else:
                self._copy, self._copy_end_s = None, math.inf

    def _join(self) -> None:
        """Let the layer whose copy is whole run from now on, in the place of what it replaces."""
        assert self._copy is not None
        if self._transition is not None:
            self._transition.bytes_in += self._copy.copied_bytes
        old_mha = self._resident.mha_bits[self._copy.layer]
        self._set_resident(joined(self._resident, self._copy), copied_bytes=self._copy.copied_bytes)
        restored = self._copy.mha_bits and not old_mha and self._copy.layer in self._prefill_mha
        layer = self._copy.layer
        self._copy, self._copy_end_s = None, math.inf
        if restored and self.config.restore == "recompute":
            for live in [live for live in reversed(self._running) if layer not in live.mha]:
                if layer in self._mha_of(live):
                    self._preempt_for_transition(live)

    def _set_resident(self, resident: Any, copied_bytes: int = 0) -> None:
        freed = self._resident.weight_bytes(self._model) + copied_bytes - resident.weight_bytes(self._model)
        if self._transition is not None:
            self._transition.bytes_freed += freed
        self._resident = resident
        self._run_what_is_resident()
        for live in self._running:  # KV of blocks that no longer run is of no use
            kept = live.mha & self._mha_of(live)
            if kept != live.mha:
                live.mha = kept
                self._hold(live, self._own_blocks(live, live.computed_tokens))
        for unit in {id(unit): unit for live in self._running for unit in live.units.values()}.values():
            dropped = unit.mha - self._prefill_mha
            unit.mha -= dropped
            self._pool.release(len(dropped) * self._unit_layer_blocks)

    def _run_what_is_resident(self) -> None:
        """Run the blocks of the target that are on the device."""
        self._plan = running_plan(self._resident, self._target)
        prefill_mha = frozenset(layer for layer, keep in enumerate(self._plan.prefill.mha) if keep)
        everything = all(keep == KV_KEEP_ALL for keep in self._plan.kv_keep)
        one_set = bool(prefill_mha) and self._plan.prefill.mha == self._plan.decode.mha
        caching = self.config.prefix_caching and everything and one_set
        if prefill_mha != getattr(self, "_prefill_mha", prefill_mha) or caching != self._caching:
            self._forget_kept_kv()  # it lacks a layer, or has one too many
            self._forget_units()
        self._prefill_mha, self._caching = prefill_mha, caching
        self._decode_mha = frozenset(layer for layer, keep in enumerate(self._plan.decode.mha) if keep)
        self._weight_bytes = self._fixed_weight_bytes + self._resident.weight_bytes(self._model)
        share = self._weight_bytes / self._dense_weight_bytes
        if not self._kept_share or self._kept_share[-1][1] != share:
            self._kept_share.append((self.env.now, share))

    def _mha_of(self, live: _Live) -> frozenset[int]:
        """Return the MHA blocks that run for a request at its stage, were it to hold the KV of all."""
        return self._decode_mha if live.decoding else self._prefill_mha

    # -- memory --------------------------------------------------------------------------------------------------

    def _resize_pool(self) -> None:
        """Give the KV pool what the budget leaves."""
        incoming = self._copy.copied_bytes if self._copy is not None else 0
        left = self.budget.budget_bytes[self._budget_step] - self._weight_bytes - incoming - self._workspace_bytes
        layer_blocks = max(0, left // self._block_bytes)
        if layer_blocks != self._pool.layer_blocks:
            self._overwritten(self._pool.resize(layer_blocks))
        limits = self.config.limits
        self._limits = replace(
            limits,
            max_running=min(limits.max_running, self._plan.max_running or limits.max_running),
            watermark_layer_blocks=limits.watermark_layer_blocks
            + math.ceil(self.config.kv_watermark_share * layer_blocks),
        )

    def _preempt_for_the_pool(self) -> None:
        """Preempt the newest requests until what is held fits the pool."""
        while self._pool.free_layer_blocks < 0 and self._running:
            self._preempt_for_transition(self._running[-1])

    def _preempt_for_transition(self, live: _Live) -> None:
        if self._transition is not None:
            self._transition.preempted += 1
            self._transition.recomputed_tokens += live.computed_tokens
        self._preempt(live)

    def _preempt(self, live: _Live) -> None:
        """Take a running request's KV and put it back at the head of the queue."""
        self._running.remove(live)
        whole = live.kv_keep is None and live.mha == self._prefill_mha  # else nobody could go on from it
        whole = whole and len(live.units) == self._units_in(live, live.computed_tokens)
        whole = whole and all(unit.known for unit in live.units.values())
        self._let_go(live, live.request.request_id if self.config.reuse_preempted_kv and whole else NOBODY)
        live.left_tokens = live.computed_tokens
        live.left_tokens = live.computed_tokens = self._found_again(live)
        live.preemptions += 1
        live.status = Status.WAITING
        self._preemptions += 1
        self._waiting.appendleft(live)

    def _hold(self, live: _Live, layer_blocks: int) -> None:
        """Take or free KV blocks so that a request holds so many beside its units."""
        change = layer_blocks - live.own_layer_blocks
        live.own_layer_blocks = layer_blocks
        if change > 0:
            self._overwritten(self._pool.take(change))
        else:
            self._pool.release(-change)

    def _let_go(self, live: _Live, owner: int = NOBODY) -> None:
        """Free what a request holds: first its own blocks, then its units from the last to the first."""
        self._pool.release(live.own_layer_blocks, owner)
        live.own_layer_blocks = 0
        for place in sorted(live.units, reverse=True):
            unit = live.units.pop(place)
            unit.holders -= 1
            if unit.holders:
                continue
            if unit.known and self._pool.free_layer_blocks < 0:  # the shrunk pool takes some of its blocks
                unit.known = False
                del self._cache[unit.hash_id]
            self._pool.release(len(unit.mha) * self._unit_layer_blocks, unit.owner if unit.known else NOBODY)

    def _overwritten(self, owners: list[int]) -> None:
        for owner in owners:
            if owner > NOBODY:
                self._all[owner].left_tokens = self._found_again(self._all[owner])
                continue
            (unit,) = [unit for unit in self._cache.values() if unit.owner == owner]
            del self._cache[unit.hash_id]
            self._pool.claim(owner, 0)

    def _forget_kept_kv(self) -> None:
        self._pool.forget()
        for live in self._waiting:
            live.left_tokens = 0

    def _found_again(self, live: _Live) -> int:
        """Return the tokens of a preempted request whose KV nobody has overwritten: whole KV blocks from the first on.

        At least one token is computed again, as in vLLM, to have something to sample from.
        """
        kept = self._pool.kept_layer_blocks(live.request.request_id)
        if not kept:
            return 0
        block_tokens = self.config.kv_block_tokens
        # Its units were freed after its own blocks, so they are all there while one of these is.
        cached = self._units_in(live, live.left_tokens) * self._unit_layer_blocks
        # The run's last block may be partly filled; such a block is never found again.
        whole = min(cached + kept // len(self._prefill_mha), live.left_tokens // block_tokens)
        return min(whole, (live.target_tokens - 1) // block_tokens) * block_tokens

    def _layer_blocks(self, live: _Live, tokens: int) -> int:
        """Return the KV blocks, over all layers, that a request needs for so many computed tokens."""
        if live.status is not Status.RUNNING:
            return len(self._prefill_mha) * kv_blocks(tokens, self.config.kv_block_tokens)
        return self._own_blocks(live, tokens) + live.held_layer_blocks - live.own_layer_blocks

    def _own_blocks(self, live: _Live, tokens: int) -> int:
        """Return those that it needs beside its units."""
        block_tokens = self.config.kv_block_tokens
        if live.kv_keep is None:
            return len(live.mha) * (kv_blocks(tokens, block_tokens) - len(live.units) * self._unit_layer_blocks)
        return sum(kv_blocks(live.kv_keep[layer].tokens(tokens), block_tokens) for layer in live.mha)

    # -- the prefix cache ----------------------------------------------------------------------------------------

    def _units_in(self, live: _Live, tokens: int) -> int:
        """Return how many units of a prompt lie within its first tokens; none while nothing is cached."""
        if not self._caching:
            return 0
        tokens = min(tokens, live.request.prompt_tokens)
        return min(tokens // self.config.hash_block_tokens, len(live.request.hash_ids))

    def _found_units(self, live: _Live) -> list[_Unit]:
        """Return the units that a waiting request finds: leading ones, and never all that it has to compute."""
        found = []
        for hash_id in live.request.hash_ids[: self._units_in(live, live.target_tokens - 1)]:
            if hash_id not in self._cache:
                break
            found.append(self._cache[hash_id])
        return found

    def _shared(self, live: _Live, others: Sequence[_Live]) -> int:
        """Return the blocks of units that a request holds or finds and that others hold or find too."""

        def units(one: _Live) -> list[_Unit]:
            return list(one.units.values()) if one.status is Status.RUNNING else self._found_units(one)

        if not self.config.prefix_caching:
            return 0
        theirs = {id(unit) for other in others for unit in units(other)}
        return sum(len(unit.mha) * self._unit_layer_blocks for unit in units(live) if id(unit) in theirs)

    def _hold_unit(self, unit: _Unit) -> None:
        if not unit.holders:
            self._pool.claim(unit.owner, len(unit.mha) * self._unit_layer_blocks)
        unit.holders += 1

    def _fill_cache(self, live: _Live) -> None:
        """Let others find the units that a request's prefill has passed; those that they find already stay its own."""
        if not live.fills:
            return
        while live.next_unit < self._units_in(live, live.computed_tokens):
            hash_id = live.request.hash_ids[live.next_unit]
            if hash_id not in self._cache:
                self._units_made += 1
                unit = _Unit(owner=NOBODY - self._units_made, hash_id=hash_id, mha=self._prefill_mha)
                self._cache[hash_id] = live.units[live.next_unit] = unit
                live.own_layer_blocks -= len(unit.mha) * self._unit_layer_blocks
            live.next_unit += 1

    def _forget_units(self) -> None:
        """Let nobody find a unit again; those that run hold theirs on."""
        for unit in self._cache.values():
            unit.known = False
            if not unit.holders:
                self._pool.claim(unit.owner, 0)
        self._cache.clear()
        for live in self._running:
            live.fills = False

    def _find_context_limit(self) -> int:
        """Return the longest context one request may reach, so that it fits the first pool alone, as vLLM demands."""
        limit = self.config.max_context_tokens or self._model.max_context_tokens
        if self._prefill_mha:
            blocks = (self._pool.layer_blocks - self._limits.watermark_layer_blocks) // len(self._prefill_mha)
            limit = min(limit, blocks * self.config.kv_block_tokens)
        budget_bytes = self.budget.budget_bytes[self._budget_step]
        if limit < 2 or self._weight_bytes + self._workspace_bytes > budget_bytes:
            raise BudgetError(
                f"weights {self._weight_bytes / GIB:.2f} GiB and workspace {self._workspace_bytes / GIB:.2f} GiB leave "
                f"no room for the KV cache of one request in a budget of {budget_bytes / GIB:.2f} GiB; prune or "
                "quantise more blocks, or raise the budget (budget=, gpu=)"
            )
        return limit

    def _held_bytes(self) -> int:
        incoming = self._copy.copied_bytes if self._copy is not None else 0
        kv_bytes = self._pool.used_layer_blocks * self._block_bytes
        return self._weight_bytes + incoming + self._workspace_bytes + kv_bytes

    def _follow_budget(self, now_s: float) -> None:
        """Bring the budget up to ``now_s`` and count the seconds in which more was held than it allowed."""
        held_bytes = self._held_bytes()
        change_s, budget_bytes = self.budget.change_s, self.budget.budget_bytes
        while True:
            more = self._budget_step + 1 < len(change_s) and change_s[self._budget_step + 1] <= now_s
            until_s = change_s[self._budget_step + 1] if more else now_s
            if held_bytes > budget_bytes[self._budget_step]:
                self._violation_s += until_s - self._violation_since_s
            self._violation_since_s = until_s
            if not more:
                return
            self._budget_step += 1

    # -- what can be seen ----------------------------------------------------------------------------------------

    def _state(self, now_s: float) -> EngineState:
        step, budget = self._budget_step, self.budget
        announced = step + 1 < len(budget.change_s) and budget.change_s[step + 1] - budget.notice_s <= now_s
        return EngineState(
            time_s=now_s,
            waiting=len(self._waiting),
            waiting_tokens=sum(live.target_tokens for live in self._waiting),
            oldest_wait_s=now_s - self._waiting[0].request.arrival_s if self._waiting else 0.0,
            running=len(self._running),
            running_tokens=sum(live.computed_tokens for live in self._running),
            kv_layer_blocks=self._pool.layer_blocks,
            kv_used_layer_blocks=self._pool.used_layer_blocks,
            budget_bytes=budget.budget_bytes[step],
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
            next_budget_bytes=budget.budget_bytes[step + 1] if announced else budget.budget_bytes[step],
            next_budget_s=budget.change_s[step + 1] if announced else math.inf,
            budget_violation_s=self._violation_s,
            incoming_bytes=self._copy.copied_bytes if self._copy is not None else 0,
            plan=self._plan,
            target=self._decided[1] if self._decided is not None else self._target,
        )
