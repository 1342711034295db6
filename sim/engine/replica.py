"""One replica: the rules of serving in plain Python, separate from whatever carries them out.

    replica = Replica(model=model, config=config, plan=plan, budget=budget, executor=..., weights=..., clock=...)
    replica.submit(requests)
    state = replica.run_until(10.0)

The replica decides which requests are admitted and preempted, which KV blocks each holds, and what a plan change does.
sim/engine/protocol.py states the rules. Four seams carry the decisions out:

* ``Executor`` runs one iteration: at the price of a latency model (sim/engine/pricing_executor.py) or on a device
  (hw/engine/torch_executor.py);
* ``Weights`` copies layers in and frees dropped blocks;
* ``Clock`` is simulated or real time (all three: sim/engine/executor.py);
* ``KVStorage`` is the memory behind the KV blocks (sim/engine/kv_pool.py); a simulated replica has none.

The compiled kernel (sim/engine/kernel) implements the same rules independently; tests compare the two on random cases.

An iteration is computed when it starts, but takes effect only at its end: if ``run_until`` returns in the middle of
one, the state is that before its end.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from sim.cost.ffn_width import ffn_params
from sim.cost.model_spec import ModelSpec
from sim.cost.plan import Plan, check_plan
from sim.engine.block_table import BlockTable
from sim.engine.budget import Budget, constant_budget, no_room_for_kv
from sim.engine.executor import Clock, Executor, Iteration, Ran, Weights
from sim.engine.iteration_log import IterationRow
from sim.engine.kv_pool import KVStorage
from sim.engine.live_request import LiveRequest
from sim.engine.protocol import (
    EngineConfig,
    EngineState,
    Request,
    Sessions,
    check_decisions,
    missing_hash_ids,
    requests_from_arrays,
    requests_next_to_sessions,
)
from sim.engine.replica_state import ReplicaState
from sim.engine.scheduler import Batch, by_value, form_batch
from sim.engine.transition import ABSENT, plan_for_holder
from sim.errors import BudgetError
from sim.results.records import Status
from sim.types import GIB, Floats, Ints

RETRY_S = 0.05
"""How long an idle replica waits before it tries a step again for which the device had no memory."""
MOST_REFUSALS = 200
"""How often in a row it tries until it gives up on the requests that wait for that memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _UnderWay:
    """An iteration that has been computed and takes effect at its end.

    running, waiting: requests at its start. preempted: requests preempted since the iteration before.
    known: requests that are here at its start, if the engine schedules ahead; otherwise none.
    """

    iteration: Iteration
    ran: Ran
    running: int
    waiting: int
    preempted: int
    known: frozenset[LiveRequest]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Late:
    """What comes too late for the next batch, which was formed when the iteration that has just ended began.

    known: requests that were here then; others came too late. layer_blocks: KV blocks freed since. ended: requests that
    have ended since.
    """

    known: frozenset[LiveRequest]
    layer_blocks: int
    ended: int


class Replica(ReplicaState):
    """One engine that serves requests by the rules of sim/engine/protocol.py.

    expects_more: whether further requests may be submitted later; an idle replica then still follows the budget.

    Args:
        model: what is served. config: how it serves.
        plan: what runs first; its weights are already on the device.
        budget: bytes that weights, workspace and KV cache may hold together, constant or over time.
        executor, weights, clock, storage: what carries the decisions out (see above).
        workspace_bytes: memory for activations and the like, which neither weights nor KV can use.
        quality_nll: nats per token that a plan costs (``sim.cost.quality``), charged to requests; None charges nothing.
        check_bits: raises CalibrationError for a plan with a precision that was not measured; None checks nothing.
        start_s: time at which it starts, on its clock.
        late_arrivals: whether a request may be submitted after its arrival, as on a real clock.
        on_token: called with (request_id, token, whether it is the last) for every new token; the token is None if the
            request was rejected, or if tokens are simulated.
        holds: called with a request_id when it ends; True keeps its KV until ``release``. None frees it at once.
    Raises:
        PlanError: for a plan that is not legal for the model.
        CalibrationError: for a plan with a precision that was not measured.
        BudgetError: if the budget at the start cannot hold the weights and one request.
    """

    def __init__(
        self,
        *,
        model: ModelSpec,
        config: EngineConfig,
        plan: Plan,
        budget: int | Budget,
        executor: Executor,
        weights: Weights,
        clock: Clock,
        storage: KVStorage | None = None,
        workspace_bytes: int = 0,
        quality_nll: Callable[[Plan], float] | None = None,
        check_bits: Callable[[Plan], None] | None = None,
        start_s: float = 0.0,
        late_arrivals: bool = False,
        on_token: Callable[[int, int | None, bool], None] | None = None,
        holds: Callable[[int], bool] | None = None,
    ) -> None:
        """Build an idle replica."""
        self._check_bits = check_bits
        check_plan(model, plan)
        if check_bits is not None:
            check_bits(plan)
        super().__init__(
            model=model,
            config=config,
            plan=plan,
            budget=budget if isinstance(budget, Budget) else constant_budget(budget),
            weights=weights,
            storage=storage,
            workspace_bytes=workspace_bytes,
            priced=quality_nll is not None,
            start_s=start_s,
        )
        self.expects_more = False
        self._executor, self._weights, self._clock = executor, weights, clock
        self._quality_nll, self._late_arrivals = quality_nll, late_arrivals
        self._on_token, self._holds = on_token, holds

        self._time_s = start_s
        self._under_way: _UnderWay | None = None
        self._late: _Late | None = None
        self._idle = False  # the last look found nothing to do: wait for the next event
        self._held = False  # the last ``run_until`` ended between two iterations: a policy decides before the next
        self._interrupted = False
        self._most_running = math.inf  # fewer after memory ran out, until a request has finished
        self._prepared = True  # whether the executor has the memory that the plan needs
        self._alone_failed = False  # the last iteration was of one request and ran out of memory
        self._preempted_for_change = 0  # since the last iteration, while a blocking copy holds the next one up
        self._max_wait_s, self._max_wait_since_s = plan.max_wait_s, start_s  # how long a request may wait, since when
        self._refusals = 0  # looks in a row in which the device had no memory for a step between two iterations
        self._retry_s = math.inf

        self._follow_running_plan(self._time_s)
        self._follow_memory()
        self._resize_pool(self._time_s)
        if self._refusals:
            raise self._no_memory("the KV blocks of the first budget")
        self._context_limit = self._find_context_limit()

    # -- the Engine protocol -------------------------------------------------------------------------------------

    def submit(self, requests: Sequence[Request]) -> None:
        """Hand over requests, sorted by arrival, none before the last one submitted.

        Arrivals before the present are refused unless the replica was built with ``late_arrivals``.

        Raises:
            ConfigError: for requests out of order or in the past, or a repeated id; then none is accepted.
        """
        if self.queues.in_sessions:
            raise requests_next_to_sessions()
        least_s = -math.inf if self._late_arrivals else self._time_s
        self.queues.submit(requests, least_s, with_hash_ids=self.config.prefix_caching)
        self._wake_up()

    def submit_arrays(
        self,
        arrival_s: Floats,
        prompt_tokens: Ints,
        output_tokens: Ints,
        hash_ids: Sequence[Ints] | None = None,
        *,
        sessions: Sessions | None = None,
    ) -> None:
        """Hand over n requests as arrays of length n; ids continue from the last request submitted.

        sessions: which requests follow which; the replica must have no others, before or after.
        """
        if self.config.prefix_caching and hash_ids is None:
            raise missing_hash_ids()
        first = len(self.queues.all) + len(self.queues.arrivals)
        if sessions is not None and first:
            raise requests_next_to_sessions()
        self.submit(requests_from_arrays(arrival_s, prompt_tokens, output_tokens, hash_ids, first_id=first))
        if sessions is not None:
            self.queues.begin_sessions(sessions)

    def apply(self, plan: Plan) -> None:
        """Switch to ``plan``; the change begins between two iterations.

        Raises:
            PlanError: for a plan that is not legal for the model; the running plan stays.
            CalibrationError: for a plan with a precision that was not measured; the running plan stays.
        """
        self._check_plan(plan)
        self._changes.take_due(self._time_s)
        if self._changes.decide(self._time_s, plan):
            self._wake_up()

    def apply_at(self, time_s: Sequence[float], plans: Sequence[Plan]) -> None:
        """Schedule plans: each is applied at its time, as a call of ``apply`` would do then.

        A plan passed to ``apply`` in between holds until the next scheduled time. If no request is queued or scheduled
        to arrive, scheduled decisions are skipped.

        Args:
            time_s: ascending times, none before the present or an earlier scheduled one. plans: one per time.
        Raises:
            ConfigError: for times out of order. PlanError, CalibrationError: as ``apply``; then none is scheduled.
        """
        check_decisions(time_s, plans, max(self._time_s, self._changes.last_scheduled_s))
        for plan in plans:
            self._check_plan(plan)
        self._changes.schedule(zip(time_s, plans, strict=True))
        self._wake_up()

    def run_until(self, time_s: float) -> EngineState:
        """Serve until ``time_s`` (``inf``: until nothing is left to do) and return the state observed then.

        Raises:
            BudgetError: if a single request runs out of memory.
            KeyboardInterrupt: after ``interrupt``, between two iterations.
        """
        while True:
            if self._under_way is not None:
                if self._under_way.ran.end_s > time_s:
                    return self._observe(time_s)
                under_way, self._under_way = self._under_way, None
                self._end(under_way)
            if self._interrupted:
                self._interrupted = False
                raise KeyboardInterrupt
            if self._idle and not self._wait(time_s):
                return self._observe(min(time_s, self._now_s()))
            now_s = self._now_s()
            self._follow_budget(now_s)
            self._take_arrivals(now_s)
            if now_s >= time_s:  # a policy decides now, before the next iteration starts
                self._held = True
                return self._observe(time_s)
            self._time_s, self._held = now_s, False
            self._idle = not self._iterate(now_s)

    @property
    def drained(self) -> bool:
        """Whether no submitted request can make progress without another call."""
        if self._held or self.queues.arrivals or self.queues.running:
            return False
        return not self.queues.waiting or self._stuck

    @property
    def _stuck(self) -> bool:
        """Whether nothing can happen without another call: no event is due and no copy is under way."""
        nothing_due = math.isinf(self._next_event_s()) and self._changes.copy is None
        return self._idle and not self._held and self._under_way is None and nothing_due

    @property
    def now_s(self) -> float:
        """The time to which the replica has advanced."""
        return self._time_s

    def close(self) -> None:
        """Release what the executor holds; a simulated replica holds nothing."""

    # -- requests that leave early, or run on two replicas -------------------------------------------------------

    def interrupt(self) -> None:
        """Let ``run_until`` raise KeyboardInterrupt between two iterations; callable from a signal handler."""
        self._interrupted = True

    def cancel(self, request_id: int) -> None:
        """End a request whose client has left and free its KV, at once; it counts as rejected.

        What an iteration under way computes for it is dropped.
        """
        live = self.queues.all.get(request_id)
        if live is None:
            self.queues.arrivals = deque(r for r in self.queues.arrivals if r.request_id != request_id)
        elif live.status is Status.RUNNING:
            self.queues.running.remove(live)
            if self.queues.caches_answers:
                self._kv.prefix_cache.fill(live, answer=True)
            self._kv.let_go(live)
            self._reject(live, self._time_s)
        elif live.status is Status.WAITING:
            self.queues.waiting.remove(live)
            self.pool.claim(request_id, 0)  # KV that it left when it was preempted is no one's now
            self._kv.drop_host_kv(live)
            self._reject(live, self._time_s)
        self._wake_up()

    def reserve(self, request_id: int, prompt_tokens: int) -> BlockTable | None:
        """Reserve KV blocks for a prompt that was computed on another replica; return None if there is no room now.

        As in sim.disaggregate, there must be enough KV blocks above the watermark and a free place among the running
        requests, and no preempted request may be waiting.
        """
        table = self._kv.table_after_prefill(self._changes.plan, prompt_tokens)
        left = self.pool.free_layer_blocks - table.own_blocks_needed(prompt_tokens)
        if left < self._limits.watermark_layer_blocks or self.queues.waiting:
            return None
        if len(self.queues.running) + len(self.outside) >= self._limits.max_running:
            return None
        self._kv.hold_outside(request_id, table, prompt_tokens)
        return table

    def join(self, live: LiveRequest) -> None:
        """Start decoding a request whose KV has arrived in the blocks that ``reserve`` held for it."""
        live.table, live.status = self._kv.outside.pop(live.request_id), Status.RUNNING
        self.queues.all[live.request_id] = live
        self._arrived_prompt_tokens += live.request.prompt_tokens
        self.queues.running.append(live)
        self._wake_up()

    def release(self, request_id: int) -> None:
        """Free the KV that was kept for a request after it ended here."""
        self.pool.release(self._kv.outside.pop(request_id).own_blocks())
        self._wake_up()

    # -- time ----------------------------------------------------------------------------------------------------

    def _now_s(self) -> float:
        return max(self._clock.now_s(), self._time_s)

    def _wake_up(self) -> None:
        """Let the next ``run_until`` look for work: a call from outside changed something."""
        self._idle = False

    def _wait(self, time_s: float) -> bool:
        """Wait, idle, until ``time_s`` or the next event; return whether ``run_until`` has to look for work again."""
        now_s = self._now_s()
        event_s = self._next_event_s()
        until_s = min(event_s, time_s)
        copying = self._changes.copying
        if copying:
            self._weights.wait(now_s, until_s)
        elif math.isinf(until_s):
            return False
        else:
            self._clock.wait_until(until_s)
        now_s = self._now_s()
        happened = event_s <= now_s or (copying and self._weights.arrived(now_s))
        self._idle = not happened
        return happened or now_s < time_s

    def _next_event_s(self) -> float:
        """Return the time of the next arrival, budget step, scheduled decision or retry; copies do not count."""
        # A replica with running requests is idle only while a blocking copy holds it up.
        coming = self.queues.waiting or self.queues.arrivals or self.queues.running
        times_s = [self._retry_s]
        if self.queues.arrivals:
            times_s.append(self.queues.arrivals[0].arrival_s)
        if coming or self.expects_more:
            times_s.append(self._meter.next_s)
        if coming:
            times_s.append(self._changes.next_scheduled_s)
        if (first := self._first_that_never_ran()) is not None:
            times_s.append(self._wait_ends_s(first))
        return min(times_s)

    # -- serving -------------------------------------------------------------------------------------------------

    def _take_arrivals(self, now_s: float) -> None:
        """Queue the requests that have arrived by now, or reject them; reject those that have waited too long.

        In order of time: a rejected turn of a session lets another one arrive, perhaps before the next rejection.
        """
        queues, plan = self.queues, self._changes.plan
        while True:
            self._reject_late(min(queues.arrivals[0].arrival_s, now_s) if queues.arrivals else now_s)
            if not queues.arrivals or queues.arrivals[0].arrival_s > now_s:
                return
            request = queues.arrivals.popleft()
            limit = min(request.output_tokens, self._context_limit - request.prompt_tokens)
            queues.all[request.request_id] = live = LiveRequest(request, output_limit=limit)
            self._arrived_prompt_tokens += request.prompt_tokens
            full = plan.max_waiting is not None and len(queues.waiting) >= plan.max_waiting
            if full or limit < 1:
                self._reject(live, request.arrival_s)
            else:
                queues.waiting.append(live)

    def _reject_late(self, now_s: float) -> None:
        """Reject the requests that have waited for their first admission as long as the plan lets them.

        Ends at the next arrival, if a rejection brings one before ``now_s``.
        """
        while (first := self._first_that_never_ran()) is not None and self._wait_ends_s(first) <= now_s:
            self.queues.waiting.remove(first)
            self._reject(first, max(self._wait_ends_s(first), self._max_wait_since_s))
            if self.queues.in_sessions and self.queues.arrivals:
                now_s = min(now_s, self.queues.arrivals[0].arrival_s)

    def _first_that_never_ran(self) -> LiveRequest | None:
        """Return the waiting request that came first among those that were never admitted; preempted ones may wait."""
        return next((live for live in self.queues.waiting if math.isnan(live.admitted_s)), None)

    def _wait_ends_s(self, live: LiveRequest) -> float:
        most_s = self._changes.plan.max_wait_s
        return math.inf if most_s is None else live.request.arrival_s + most_s

    def _reject(self, live: LiveRequest, ended_s: float) -> None:
        live.status = Status.REJECTED
        self._rejected += 1
        if self.queues.in_sessions:
            self.queues.end_turn(live.request_id, ended_s)
        if self._on_token is not None:
            self._on_token(live.request_id, None, True)

    def _iterate(self, now_s: float) -> bool:
        """Change the plan if due, form a batch and start it; return whether there was anything to do."""
        preempted = self._change_plan(now_s)
        if self._changes.plan.max_wait_s != self._max_wait_s:
            self._max_wait_s, self._max_wait_since_s = self._changes.plan.max_wait_s, now_s
        self._take_arrivals(now_s)
        self._preempted_for_change += preempted
        if not self._prepared:
            if self._refusals >= MOST_REFUSALS:
                raise self._no_memory("streamed layers")
            return False
        if self._changes.copying and self.config.copying == "blocking":
            return False
        preempted, self._preempted_for_change = self._preempted_for_change, 0
        self._kv.look_up_waiting()
        late, self._late = self._late, None
        batch = self._form_batch(late, now_s)
        self._carry_out(batch, now_s)
        if not batch.scheduled:
            if self._refusals >= MOST_REFUSALS and self.queues.waiting and not self.queues.running:
                raise self._no_memory("KV blocks or weights")
            return bool(batch.preempted) or late is not None
        self._start(batch, now_s, preempted + len(batch.preempted))
        return True

    def _form_batch(self, late: _Late | None, now_s: float) -> Batch[LiveRequest]:
        """Form the next batch, without what comes too late for it."""
        waiting: Sequence[LiveRequest] = self.queues.waiting
        free, limits = self.pool.free_layer_blocks, self._limits
        if late is not None:
            # Preempted requests were known; those that came since wait at the end of the queue.
            waiting = [live for live in waiting if live in late.known]
            free -= min(late.layer_blocks, max(free, 0))
            if limits.max_running <= late.ended:
                waiting = []
            elif late.ended:
                limits = replace(limits, max_running=limits.max_running - late.ended)
        if self.config.admission_order == "value":
            waiting = self._most_valuable_first(waiting, free - limits.watermark_layer_blocks, now_s)
        return form_batch(
            self.config.scheduler,
            waiting,
            self.queues.running,
            free,
            self._kv.layer_blocks,
            limits,
            self._kv.prefix_cache.shared_layer_blocks,
        )

    def _most_valuable_first(
        self, waiting: Sequence[LiveRequest], most_layer_blocks: int, now_s: float
    ) -> list[LiveRequest]:
        """Return the preempted requests, then the others by their value.

        While nothing runs, one that does not fit is left out: nothing would make room for it, and others would wait.
        """
        others = [live for live in waiting if not live.at_head]
        if not self.queues.running:
            needs = self._kv.layer_blocks
            others = [live for live in others if needs(live, live.target_tokens) <= most_layer_blocks]
        waits_s = [now_s - live.request.arrival_s for live in others]
        preempted = [live for live in waiting if live.at_head]
        return [*preempted, *by_value(others, waits_s, self.config.kv_block_tokens)]

    def _carry_out(self, batch: Batch[LiveRequest], now_s: float) -> None:
        """Preempt and admit requests and take KV blocks, in the order that ``Batch`` states."""
        for live in batch.preempted:
            self._preempt(live)
        for live in batch.admitted:
            self.queues.waiting.remove(live)
            live.at_head = False
            swapped = live.swapped
            self._kv.admit(live)
            if not swapped:  # a swapped request goes on where it stopped
                live.prefill_tokens = live.target_tokens
            live.status = Status.RUNNING
            if math.isnan(live.admitted_s):
                live.admitted_s = now_s
            if live.cached_tokens < 0:
                # Counted at its first admission only: after a preemption it may find KV of its own.
                live.cached_tokens = live.computed_tokens
            self.queues.running.append(live)
        for live, tokens in batch.scheduled:
            self._kv.hold(live, live.computed_tokens + tokens)

    def _start(self, batch: Batch[LiveRequest], now_s: float, preempted: int) -> None:
        """Let the executor run a batch; its tokens take effect at its end."""
        running, waiting = len(self.queues.running), len(self.queues.waiting)
        iteration = Iteration(
            number=len(self._log),
            start_s=now_s,
            batch=batch,
            plan=self._changes.plan,
            copying=self._changes.copying,
            memory_bytes=self._changes.weight_bytes + self.pool.layer_blocks * self._block_bytes,
            moved_bytes=self._kv.moved_layer_blocks * self._block_bytes,
        )
        self._kv.moved_layer_blocks = 0
        ran = self._executor.run(iteration)
        if ran is None:
            self._run_out_of_memory(batch)
        else:
            self._alone_failed = False
            here = (*self.queues.waiting, *self.queues.running) if self.config.schedules_ahead else ()
            self._under_way = _UnderWay(
                iteration=iteration,
                ran=ran,
                running=running,
                waiting=waiting,
                preempted=preempted,
                known=frozenset(here),
            )

    def _run_out_of_memory(self, batch: Batch[LiveRequest]) -> None:
        """Preempt the newer half of the running requests: the device had less memory than the budget promised.

        A request that runs alone is tried once more, with the memory that the failed iteration has returned.
        """
        self.out_of_memory += 1
        running = self.queues.running
        if len(running) == 1:
            if not self._alone_failed:
                self._alone_failed = True
                return
            raise BudgetError(
                f"an iteration of {sum(tokens for _, tokens in batch.scheduled)} tokens of one request ran out of "
                f"memory next to {self._changes.weight_bytes / GIB:.2f} GiB of weights; raise workspace_bytes "
                f"({self._workspace_bytes / GIB:.2f} GiB now), or lower engine.limits.max_batch_tokens"
            )
        for live in running[: len(running) // 2 - 1 : -1]:
            self._preempt(live)
        self._most_running = len(running)  # otherwise the same batch would be formed again

    @property
    def busy_s(self) -> float:
        """Seconds in iterations that have ended."""
        return self._busy_s

    @property
    def priced_s(self) -> float:
        """Seconds that the calibration says these iterations take, without a slowdown."""
        return self._priced_s

    def _end(self, under_way: _UnderWay) -> None:
        """Let an iteration take effect: count its tokens, and add the next token of each request that caught up."""
        iteration, ran = under_way.iteration, under_way.ran
        now_s = self._time_s = ran.end_s
        prefill_tokens = sum(tokens for _, tokens in iteration.prefills)
        decode_requests = len(iteration.decodes)
        self._busy_s += now_s - iteration.start_s
        self._priced_s += now_s - iteration.start_s if ran.priced_s is None else ran.priced_s
        # Requests finish and free KV below; the time until now is compared with what was held until now.
        self._follow_budget(now_s)
        # A request that arrives at the very end of an iteration arrives before it ends.
        self._take_arrivals(now_s)
        used_share = self.pool.used_layer_blocks / max(self.pool.layer_blocks, 1)
        free, finished = self.pool.free_layer_blocks, self._finished
        for live, tokens in iteration.batch.scheduled:
            if live.status is Status.RUNNING:  # not one that was canceled meanwhile
                self._advance(live, tokens, ran, now_s)
        if self.config.schedules_ahead:
            freed, ended = self.pool.free_layer_blocks - free, self._finished - finished
            self._late = _Late(known=under_way.known, layer_blocks=freed, ended=ended)
        self.queues.running = [live for live in self.queues.running if live.status is Status.RUNNING]
        self._log.add(
            IterationRow(
                start_s=iteration.start_s,
                end_s=now_s,
                prefill_tokens=prefill_tokens,
                decode_requests=decode_requests,
                running=under_way.running,
                waiting=under_way.waiting,
                kv_used_share=used_share,
                preemptions=under_way.preempted,
                extrapolated=ran.extrapolated,
            )
        )

    def _advance(self, live: LiveRequest, tokens: int, ran: Ran, now_s: float) -> None:
        """Count the tokens that a request computed; if all its tokens are computed, it gets its next token."""
        prefilled = not live.decoding
        live.computed_tokens += tokens
        self._kv.prefix_cache.fill(live)
        if live.computed_tokens < live.target_tokens:
            return
        plan, usable = self._changes.plan, True
        # A request runs only the MHA blocks whose KV it holds, so both the parameters and the loss depend on them.
        ffn = plan.prefill.ffn if prefilled else plan.decode.ffn
        model = self.model
        ffn_params_run = ffn_params(model, plan.ffn_width, ffn) if plan.cuts_ffn else sum(ffn) * model.ffn_params
        live.kept_params += model.fixed_params + len(live.mha) * model.mha_params + ffn_params_run
        if self._quality_nll is not None:
            live.nll_sum += self._quality_nll(plan_for_holder(plan, live.mha, decoding=not prefilled))
        if prefilled:
            usable = self._attempt(lambda: self._kv.end_prefill(live, plan), now_s)
        self._add_token(live, ran, now_s)
        if not usable:
            self._compute_again(live)

    def _compute_again(self, live: LiveRequest) -> None:
        """Preempt a request whose KV is of no use any more, unless it has ended.

        Raises:
            BudgetError: if its KV is needed although it has ended here.
        """
        if live.status is Status.RUNNING:
            self._preempt(live, usable=False)
        elif live.request_id in self.outside:
            raise self._no_memory("the KV that a request keeps after its prefill")

    def _add_token(self, live: LiveRequest, ran: Ran, now_s: float) -> None:
        """Give a request its next token; with the last one it ends and frees its KV."""
        live.produced_tokens += 1
        self._produced_tokens += 1
        if live.produced_tokens == 1:
            live.first_token_s = now_s
            self._first_tokens += 1
            self._ttft_sum_s += now_s - live.request.arrival_s
        else:
            self._log.add_gap(now_s - live.last_token_s)
        live.last_token_s = now_s
        last = live.produced_tokens >= live.output_limit or live.request_id in ran.stopped
        if last:
            self._finish(live, now_s)
        if self._on_token is not None:
            self._on_token(live.request_id, ran.next_tokens.get(live.request_id), last)

    def _finish(self, live: LiveRequest, now_s: float) -> None:
        live.finish_s, live.status = now_s, Status.FINISHED
        self._finished += 1
        self._most_running = math.inf
        if self.queues.caches_answers:
            self._kv.prefix_cache.fill(live, answer=True)
        if self.queues.in_sessions:
            self.queues.end_turn(live.request_id, now_s)
        if self._holds is not None and self._holds(live.request_id):
            self._kv.outside[live.request_id] = live.table
            live.table = self._kv.new_table(frozenset())
        else:
            self._kv.let_go(live)

    def _preempt(self, live: LiveRequest, *, usable: bool = True) -> bool:
        """Free or swap out a running request's KV, usable for it later or not; put the request back at the head.

        Return whether it was swapped out.
        """
        self.queues.running.remove(live)
        swapped = self._kv.preempt(live, usable=usable)
        live.preemptions += 1
        live.status, live.at_head = Status.WAITING, True
        self._preemptions += 1
        self.queues.waiting.appendleft(live)
        return swapped

    # -- plans and memory ----------------------------------------------------------------------------------------

    def _check_plan(self, plan: Plan) -> None:
        check_plan(self.model, plan)
        if self._check_bits is not None:
            self._check_bits(plan)

    def _change_plan(self, now_s: float) -> int:
        """Carry out due plan and memory changes between two iterations; return how many requests they preempted.

        The order matters: a complete copy joins first, then the newest decision drops blocks, then the pool takes the
        memory that is free, and only then may the next copy start. A step for which the device has no memory leaves
        everything as it was, and is tried again before the next iteration.
        """
        before, changes = self._preemptions, self._changes
        was_resident, refused = changes.resident, self.out_of_memory
        self._retry_s = math.inf
        copy = changes.copy
        if self._attempt(lambda: changes.join(now_s), now_s) and copy is not None and changes.copy is None:
            self._follow_running_plan(now_s)
            restored = copy.mha_bits != ABSENT and was_resident.mha_bits[copy.layer] == ABSENT
            if restored and self.config.restore == "recompute":
                self._recompute_without(copy.layer)
        changes.take_due(now_s)
        ran = changes.plan.prefill.mha
        if changes.begin(self.pool.layer_blocks):
            self._follow_running_plan(now_s)
            if self.config.restore == "recompute":  # a block that is streamed runs at once, however it was lost before
                for layer, runs in enumerate(changes.plan.prefill.mha):
                    if runs and not ran[layer]:
                        self._recompute_without(layer)
        changes.line_up_copy()
        self._follow_memory()
        self._resize_pool(now_s)
        # Victims go from the newest: an early request has more KV to compute again.
        while self.pool.free_layer_blocks < 0 and self.queues.running:
            self._preempt_for_change(self.queues.running[-1])
        self._attempt(self._kv.settle, now_s)
        self._follow_memory()
        self._prepared = self._attempt(self._executor.prepare, now_s)
        self._attempt(lambda: changes.start_copy(now_s), now_s)
        if self.out_of_memory == refused:
            self._refusals = 0
        changes.log.look(now_s, self.pool.layer_blocks, ready=changes.copy is None)
        return self._preemptions - before

    def _follow_running_plan(self, now_s: float) -> None:
        """Adapt the KV cache and the log of resident weights to the plan that runs from now on."""
        self._kv.follow_plan(self._changes.plan)
        self._executor.stream(self._changes.resident, now_s)
        share = self._changes.weight_bytes / self._dense_weight_bytes
        if not self._kept_share or self._kept_share[-1][1] != share:
            self._kept_share.append((now_s, share))

    def _recompute_without(self, layer: int) -> None:
        """Preempt the running requests that lack the KV of a restored MHA block that now runs for them."""
        lacking = [live for live in reversed(self.queues.running) if layer not in live.mha]
        for live in lacking:
            if layer in self._kv.mha_of(live):
                self._preempt_for_change(live)

    def _preempt_for_change(self, live: LiveRequest) -> None:
        computed_tokens = live.computed_tokens
        swapped = self._preempt(live)
        self._changes.log.charge(preempted=1, recomputed_tokens=0 if swapped else computed_tokens)

    def _resize_pool(self, now_s: float) -> None:
        """Give the KV pool the memory that the budget leaves."""
        changes = self._changes
        left = self._meter.now_bytes - changes.weight_bytes - changes.incoming_bytes - self._workspace_bytes
        layer_blocks = max(0, left // self._block_bytes)
        if not self._attempt(lambda: self._kv.resize(layer_blocks), now_s):
            layer_blocks = self.pool.layer_blocks
        limits = self.config.limits
        most = min(limits.max_running, changes.plan.max_running or limits.max_running, self._most_running)
        watermark = math.ceil(self.config.kv_watermark_share * layer_blocks)
        self._limits = replace(
            limits,
            max_running=int(most),
            watermark_layer_blocks=limits.watermark_layer_blocks + watermark,
        )

    def _attempt(self, step: Callable[[], object], now_s: float) -> bool:
        """Run a step that needs memory; if the device has none, count that and return False: it is tried again."""
        try:
            step()
        except MemoryError:
            self.out_of_memory += 1
            self._refusals += 1
            self._retry_s = now_s + RETRY_S if self._refusals < MOST_REFUSALS else math.inf
            return False
        return True

    def _follow_memory(self) -> None:
        """Let the executor take what the budget allows. Weights alone may exceed it; their change must still work."""
        self._executor.follow_budget(max(self._meter.now_bytes, self.counted_bytes))

    def _no_memory(self, what: str) -> BudgetError:
        return BudgetError(
            f"the device has no memory for {what} next to {self._changes.weight_bytes / GIB:.2f} GiB of weights, "
            f"though the budget is {self._meter.now_bytes / GIB:.2f} GiB; lower the budget, or end other programs that "
            "use the device"
        )

    def _find_context_limit(self) -> int:
        """Return the longest context that fits the first pool alone, as vLLM requires.

        It is at most the configured limit, and the positions that the model has.
        """
        limit = min(self.config.max_context_tokens or self.model.max_context_tokens, self.model.max_context_tokens)
        if self._kv.prefill_mha:
            blocks = (self.pool.layer_blocks - self._limits.watermark_layer_blocks) // len(self._kv.prefill_mha)
            limit = min(limit, blocks * self.config.kv_block_tokens)
        budget_bytes, held_bytes = self._meter.now_bytes, self._changes.weight_bytes
        if limit < 2 or held_bytes + self._workspace_bytes > budget_bytes:
            raise no_room_for_kv(held_bytes, self._workspace_bytes, budget_bytes)
        return limit

    def _follow_budget(self, now_s: float) -> None:
        """Advance the budget to ``now_s`` and count the seconds in which the held bytes exceeded it."""
        self._meter.follow(now_s, self.held_bytes)

    def _observe(self, time_s: float) -> EngineState:
        """Return the state at ``time_s``; the budget, arrivals and scheduled decisions are advanced to it first."""
        self._time_s = time_s = max(time_s, self._time_s)
        self._follow_budget(time_s)
        self._take_arrivals(time_s)
        serving = self.queues.waiting or self.queues.running or self.queues.arrivals
        if self._changes.take_due(time_s) and serving:
            self._wake_up()
        return self._state(time_s)
