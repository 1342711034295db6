"""The simulated engine: one replica on SimPy's clock, run by the compiled kernel (sim/engine/kernel).

`SimEngine` owns the arrays that the kernel reads and writes (``kernel.State``; sim/engine/kernel/state.py lists them
with their shapes), makes them longer, and turns them into records. The kernel also changes plans and memory; when it
meets a plan for the first time, sim/engine/plan_graph.py computes what follows from it. sim/engine/protocol.py states
the rules; ``sim.engine.replica.Replica`` follows them in plain Python, and the records of both are equal.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import simpy
from numpy.typing import NDArray

from sim.cost.latency import LatencyModel
from sim.cost.memory import weight_bytes
from sim.cost.model_spec import ModelSpec
from sim.cost.plan import Plan, check_plan, dense_plan, describe
from sim.engine import kernel
from sim.engine.budget import Budget, constant_budget, no_room_for_kv
from sim.engine.empty_state import empty_state
from sim.engine.kernel.first_start import prepare
from sim.engine.kernel.state import DUE_TURN, OWN_SESSIONS, REPORTED, TURN
from sim.engine.plan_graph import PlanGraph, layers_of
from sim.engine.protocol import (
    SUBMITTED,
    EngineConfig,
    EngineState,
    Holder,
    Request,
    Sessions,
    check_decisions,
    check_hash_blocks,
    check_hash_ids,
    check_submitted,
    late_request,
    missing_hash_ids,
    repeated_hash_id,
    requests_next_to_sessions,
    sessions_of,
)
from sim.errors import ConfigError
from sim.limits import check_slowdown
from sim.results.records import Iterations, Records, TokenGaps, Transitions
from sim.traces.trace import Trace
from sim.types import Floats, Ints

MEMORY_OF_PLANS = 131072
"""Residencies (sim/engine/plan_graph.py) that a plan graph may hold before the engine starts a new one."""

NO_IDS: Ints = np.zeros(0, dtype=np.int64)


@dataclass(frozen=True, slots=True, eq=False)
class Snapshot:
    """A SimEngine at one moment, for ``SimEngine.restore``.

    Rows of requests that have ended and rows of the logs never change, so they are not saved: a snapshot takes memory
    and time only for running and waiting requests.

    arrays: copies of the saved arrays of the kernel's state, by name. live: int64[n], the running and waiting requests.
    live_requests: their n rows. open_change: the row of the plan change under way. submits: calls of submit so far.
    graph: the plan graph then in use. described: plan changes described by earlier graphs. asleep: whether it waited,
    with nothing to serve; it then goes on to wait.
    """

    engine: SimEngine
    time_s: float
    arrays: dict[str, NDArray[Any]]
    live: Ints
    live_requests: NDArray[Any]
    open_change: NDArray[Any]
    submits: int
    graph: PlanGraph
    described: int
    asleep: bool


class SimEngine:
    """One replica on SimPy's clock, run by the compiled kernel.

    Args:
        model: what is served. latency: its durations on one device. config: how it serves.
        plan: what runs first; its weights are already on the device.
        budget_bytes: bytes that weights, workspace and KV cache may hold together, constant or over time.
        workspace_bytes: memory for activations and the like, which neither weights nor KV can use.
        host_to_device_bytes_per_s: how fast weights are copied in.
        slowdown: an iteration takes this times as long as ``latency`` says, as on a machine that is slower than the
            one that was measured (above 1) or faster (below 1). Copies of weights keep their time.
        copy_slowdown: an iteration that starts while weights are copied in takes 1 + copy_slowdown times as long.
        copy_layer_s: seconds that the copy of each layer takes in addition to its bytes.
        quality_nll: nats per token that a plan costs (``sim.cost.quality``), charged to requests; None charges nothing.
        keep_iterations: whether to log iterations; if False, ``iterations()`` stays empty and memory is saved.
        graph: the plan graph of this model and ``quality_nll``, shared with other engines; None makes a new one.
        env: the SimPy environment to run in, from its present time on; None makes a new one.
        external_clock: whether the owner calls the kernel on ``table`` itself (sim/engine/batch_step.py,
            sim/cluster/cluster.py) instead of SimPy.
    Raises:
        PlanError: for a plan that is not legal for the model.
        CalibrationError: for a plan with a precision that was not measured.
        BudgetError: if the budget at the start cannot hold the weights and one request.
    """

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
        slowdown: float = 1.0,
        copy_slowdown: float = 0.0,
        copy_layer_s: float = 0.0,
        quality_nll: Callable[[Plan], float] | None = None,
        keep_iterations: bool = True,
        graph: PlanGraph | None = None,
        env: simpy.Environment | None = None,
        external_clock: bool = False,
    ) -> None:
        """Build an idle engine."""
        if graph is not None and (graph.model != model or graph.quality_nll != quality_nll):
            raise ConfigError("the plan graph was made for another model or quality_nll; pass one made with the same")
        check_plan(model, plan)
        latency.check_bits(plan)
        _check_copying(host_to_device_bytes_per_s, copy_slowdown, copy_layer_s)
        check_slowdown(slowdown)
        self._own_env = env is None
        self.env = env or simpy.Environment()
        self._model, self._latency, self.config = model, latency, config
        self.budget = budget_bytes if isinstance(budget_bytes, Budget) else constant_budget(budget_bytes)
        self._quality_nll = quality_nll
        self._dense_weight_bytes = weight_bytes(model, dense_plan(model))
        self._graph = PlanGraph(model, quality_nll) if graph is None else graph
        self._graph_version = self._graph.version
        self._state = empty_state(model, latency, config, self.budget, self._graph, keep_iterations)
        self._table = self._state.table
        self._counters = n = kernel.fields_of(self._state.counters)
        n.workspace_bytes, n.quality_charged = int(workspace_bytes), quality_nll is not None
        n.slowdown = slowdown
        n.copy_slowdown, n.copy_bytes_per_s = copy_slowdown, host_to_device_bytes_per_s
        n.copy_layer_s = copy_layer_s
        n.host_blocks = n.host_free_blocks = model.num_layers * config.host_kv_blocks
        n.stream_id = n.streams_at = -1
        n.followed_s = n.now_s = self.env.now
        n.budget_step = bisect_right(self.budget.change_s, self.env.now) - 1
        self._output_tokens: list[Ints] = []  # of each call of submit
        self._hash_id_counts: Ints = NO_IDS  # of each request of the last call of submit, with a prefix cache
        self._known_ids: dict[int, int] = {}  # hash id -> its number in the kernel
        self._checked: dict[int, tuple[Plan, int]] = {}  # id(plan) -> a legal plan and its number in the graph
        self._described: list[tuple[str, str]] = []  # plan changes that an earlier graph knew

        self._wake: simpy.Event | None = None
        self._resume: simpy.Event | None = None
        self._hold_at_s = math.nan

        self._enter_first_plan(plan)
        self._context_limit = self._find_context_limit()
        if not external_clock:
            self.env.process(self._serve())

    def _enter_first_plan(self, plan: Plan) -> None:
        """Start with a plan whose weights are already on the device."""
        prepare()
        first = self._graph.first(self.target_of(plan))
        while not kernel.enter_residency(self.table, first, float(self.env.now)):
            self._work_out()
        kernel.resize_to_budget(self._table)

    # -- the Engine protocol -------------------------------------------------------------------------------------

    def submit(self, requests: Sequence[Request]) -> None:
        """Hand over requests, sorted by arrival and not before the present."""
        columns = [np.array([getattr(r, name) for r in requests]) for name in SUBMITTED]
        check_submitted(
            range(self._counters.request_count, self._counters.request_count + len(requests)), *columns
        )  # before a fraction becomes a whole number
        arrival_s, prompt_tokens, output_tokens = columns
        self.submit_arrays(
            arrival_s.astype(np.float64),
            prompt_tokens.astype(np.int64),
            output_tokens.astype(np.int64),
            [np.array(r.hash_ids) if r.hash_ids else NO_IDS for r in requests] if self.config.prefix_caching else None,
        )

    def submit_trace(self, trace: Trace) -> None:
        """Hand over every request of a trace as arrays, without a ``Request`` object for each."""
        check_hash_blocks(self.config, trace)
        self.submit_arrays(
            trace.arrival_s, trace.prompt_tokens, trace.output_tokens, trace.hash_ids, sessions=sessions_of(trace)
        )

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

        Args:
            hash_ids: the hash ids of each prompt; used only with ``prefix_caching``.
            sessions: which requests follow which; the engine must have no others, before or after.
        Raises:
            ConfigError: for arrivals out of order, in the past or not finite, for prompts or outputs below one token,
                for ``prefix_caching`` without hash ids, or for sessions next to other requests; then none is accepted.
        """
        n = self._counters
        first = n.request_count
        if n.in_sessions or (sessions is not None and first):
            raise requests_next_to_sessions()
        check_submitted(range(first, first + len(arrival_s)), arrival_s, prompt_tokens, output_tokens)
        pending = n.arrived < first
        last_s = float(self._state.requests["arrival_s"][first - 1]) if pending else self.env.now
        before_s = np.concatenate([[last_s], arrival_s[:-1]])
        late = np.flatnonzero(~(arrival_s >= before_s))
        if len(late):
            raise late_request(first + int(late[0]), arrival_s[late[0]], before_s[late[0]])
        total = first + len(arrival_s)
        self.reserve(total)
        rows = slice(first, total)
        if self.config.prefix_caching:
            hash_at, ids = self._keep_hash_ids(hash_ids)
            self._hash_id_counts = ids
            prompts = self._state.prompts[rows]
            prompts["hash_at"], prompts["cached_tokens"] = hash_at, -1
            prompts["prefix_blocks"] = np.minimum(prompt_tokens // self.config.hash_block_tokens, ids)
            prompts["answer_blocks"] = prompts["prefix_blocks"]
        requests = self._state.requests[rows]
        requests["arrival_s"], requests["prompt_tokens"] = arrival_s, prompt_tokens
        requests["output_limit_tokens"] = np.minimum(output_tokens, self._context_limit - prompt_tokens)
        self._output_tokens.append(output_tokens)
        n.request_count = total
        if sessions is not None:
            self._begin_sessions(sessions)
        elif not pending and len(arrival_s):
            n.next_arrival_s = arrival_s[0]
        self._wake_up()

    def _begin_sessions(self, sessions: Sessions) -> None:
        """Let the requests that have no other before them arrive at their times, and the others after those."""
        n, requests = self._counters, self._state.requests[: self._counters.request_count]
        turns = np.zeros(len(requests), dtype=TURN)
        turns["after"], turns["think_s"] = sessions.after, sessions.think_s
        own = np.flatnonzero(np.isnan(sessions.think_s))
        due = np.zeros(len(requests), dtype=DUE_TURN)  # sorted by arrival and request, so it is a heap
        due["at_s"][: len(own)], due["request"][: len(own)] = requests["arrival_s"][own], own
        self._state.replace(
            turns=turns, session_starts=sessions.starts, due_turns=due, arrival_order=np.zeros(len(requests), np.int64)
        )
        n.in_sessions, n.due_count, n.next_arrival_s = OWN_SESSIONS, len(own), requests["arrival_s"][own[0]]
        if self.config.prefix_caching:
            prompts = self._state.prompts[: len(requests)]
            tokens = requests["prompt_tokens"] + np.maximum(requests["output_limit_tokens"], 0)
            # Ids beyond the prompt are those of the answer.
            prompts["answer_blocks"] = np.minimum(tokens // self.config.hash_block_tokens, self._hash_id_counts)

    def apply(self, plan: Plan) -> None:
        """Switch to ``plan``; the change begins between two iterations.

        Raises:
            PlanError: for a plan that is not legal for the model; the running plan stays.
            CalibrationError: for a plan with a precision that was not measured; the running plan stays.
        """
        target = self.target_of(plan)
        kernel.take_decisions(self._table, float(self.env.now))
        if target != self._wanted_target():
            self._counters.decided_target, self._counters.decided_s = target, self.env.now
            self._wake_up()

    def apply_at(self, time_s: Sequence[float], plans: Sequence[Plan]) -> None:
        """Schedule plans: each is applied at its time, as a call of ``apply`` would do then.

        A plan passed to ``apply`` in between holds until the next scheduled time. If no request is queued, running or
        scheduled to arrive, scheduled decisions wait.

        Args:
            time_s: ascending times, none before the present or an earlier scheduled one. plans: one per time.
        Raises:
            ConfigError: for times out of order. PlanError, CalibrationError: as ``apply``; then none is scheduled.
        """
        n, first = self._counters, self._counters.decision_count
        least_s = max(self.env.now, float(self._state.schedule["at_s"][first - 1])) if first else self.env.now
        check_decisions(time_s, plans, least_s)
        targets = [self.target_of(plan) for plan in plans]
        total = first + len(targets)
        schedule = self._state.schedule
        if total > len(schedule):
            self._state.replace(schedule=kernel.longer(schedule, max(total, 2 * len(schedule))))
        added = self._state.schedule[first:total]
        added["at_s"], added["target"] = time_s, targets
        n.decision_count = total
        n.next_decision_s = self._state.schedule["at_s"][n.next_decision] if n.next_decision < total else math.inf
        self._wake_up()

    def run_until(self, time_s: float) -> EngineState:
        """Serve until ``time_s`` (``inf``: until nothing is left to do) and return the state observed then."""
        env = self.env
        if self._resume is not None:
            self._resume.succeed()
            self._resume = None
        self._hold_at_s = time_s
        while True:
            if env.now < time_s < math.inf:
                env.timeout(exact_delay(env.now, time_s))  # so that the clock stands at time_s afterwards
            while (next_s := env.peek()) <= time_s and next_s < math.inf:
                env.step()
            if env.now >= time_s or math.isinf(time_s):
                break
        now_s = float(env.now if math.isinf(time_s) else time_s)
        kernel.follow_budget(self._table, now_s)
        if kernel.queue_due_s(self._table) <= now_s:
            kernel.take_arrivals(self._table, now_s)
        kernel.take_decisions(self._table, now_s)  # an engine with work left does this itself
        return self._observe(now_s)

    @property
    def drained(self) -> bool:
        """Whether no submitted request can make progress without another call."""
        n = self._counters
        if self._resume is not None or n.running or n.next_arrival_s < math.inf:
            return False
        # Either no request waits, or no event is due that could let the waiting requests fit.
        return self._waiting() == 0 or math.isinf(self.env.peek())

    def records(self) -> Records:
        """Return one row per request that has arrived, in order of arrival."""
        which = self.arrival_order() if self._in_own_sessions else slice(0, self._counters.arrived)
        outputs = np.concatenate(self._output_tokens) if self._output_tokens else np.zeros(0, dtype=np.int64)
        return self.records_of(which, outputs[which])

    def arrival_order(self) -> Ints:
        """Return the place in the order of submission of each row of ``records``: int64[arrived]."""
        arrived = self._counters.arrived
        return self._state.arrival_order[:arrived].copy() if self._in_own_sessions else np.arange(arrived)

    @property
    def _in_own_sessions(self) -> bool:
        return bool(self._counters.in_sessions == OWN_SESSIONS)

    def report_turns(self) -> None:
        """Report which requests have ended (``ended_turns``), for a cluster in which others follow them."""
        self._counters.in_sessions = REPORTED
        self.reserve(1)

    def records_of(self, which: slice | Ints, output_tokens: Ints) -> Records:
        """Return the rows of some requests.

        Args:
            which: int64[n] or a slice, places in the order of submission. output_tokens: int64[n], those of the trace.
        """
        kernel.settle(self._table)
        rows = self._state.requests[which]
        produced = rows["produced_tokens"].copy()
        tokens = np.where(produced > 0, produced, np.nan)
        cached = np.zeros(len(rows), dtype=np.int64)
        if self.config.prefix_caching:
            cached = np.maximum(self._state.prompts["cached_tokens"][which], 0)
        return Records(
            output_tokens=output_tokens,
            produced_tokens=produced,
            kept_params_share=rows["kept_params"] / (tokens * self._model.total_params),
            quality_nll=(rows["nll_sum"] if self._quality_nll is not None else np.full(len(rows), np.nan)) / tokens,
            cached_tokens=cached,
            **{name: rows[name].copy() for name in _RECORDED},
        )

    def iterations(self) -> Iterations:
        """Return one row per iteration; none if the engine was built with ``keep_iterations=False``."""
        log = self._state.iteration_log[: self._counters.log_count]
        columns = {name: log[name].copy() for name in log.dtype.names or ()}
        columns["extrapolated"] = columns["extrapolated"] != 0
        return Iterations(**columns)

    def token_gaps(self) -> TokenGaps:
        """Return the distinct gaps between two tokens of one request, ascending, and how often each occurred."""
        # The kernel adds a row per group of requests and iteration; equal gaps are summed only here.
        rows = self._state.itl_counts[: self._counters.itl_count]
        order = np.argsort(rows["itl_s"], kind="stable")
        itl_s, counts = rows["itl_s"][order], rows["count"][order]
        first = np.flatnonzero(np.diff(itl_s, prepend=-1.0))
        count = np.add.reduceat(counts, first) if len(first) else np.zeros(0, dtype=np.int64)
        return TokenGaps(itl_s=itl_s[first], count=count)

    def transitions(self) -> Transitions:
        """Return one row per plan change."""
        rows = self._state.plan_changes[: self._counters.change_count]
        described = [*self._described, *self._describe(len(self._described))]
        return Transitions(
            time_s=rows["decided_s"].copy(),
            from_plan=tuple(before for before, _ in described),
            to_plan=tuple(after for _, after in described),
            bytes_in=rows["bytes_in"].copy(),
            bytes_freed=rows["bytes_freed"].copy(),
            ready_s=rows["ready_s"].copy(),
            preempted=rows["preempted"].copy(),
            recomputed_tokens=rows["recomputed_tokens"].copy(),
            kv_blocks_before=rows["blocks_before"].copy(),
            kv_blocks_after=rows["blocks_after"].copy(),
        )

    def _describe(self, first: int) -> list[tuple[str, str]]:
        """Return (running plan before, wanted plan) as text, for plan changes from row ``first`` on."""
        rows, graph = self._state.plan_changes[first : self._counters.change_count], self._graph
        pairs = list(zip(rows["from_residency"].tolist(), rows["target"].tolist(), strict=True))
        texts = dict.fromkeys(pairs, ("", ""))
        for before, after in texts:
            texts[before, after] = describe(graph.plan(before)), describe(graph.target_plan(after))
        return [texts[pair] for pair in pairs]

    @property
    def requests(self) -> int:
        """Requests submitted so far."""
        return int(self._counters.request_count)

    @property
    def request_room(self) -> int:
        """Requests that the arrays can hold before ``reserve`` has to make them longer."""
        return len(self._state.requests)

    @property
    def host_layer_blocks(self) -> tuple[int, int]:
        """KV blocks of one layer in host memory: those that swapped requests hold, and the free ones."""
        n = self._counters
        held = self._state.requests["host_blocks"][self._state.preempted_stack[: n.preempted_waiting]]
        return int(held.sum()), int(n.host_free_blocks)

    def holders(self) -> list[Holder]:
        """Return the running requests, in order of admission, and the KV that each holds."""
        n, requests = self._counters, self._state.requests
        kernel.settle(self._table)
        under_way = {}
        if n.in_iteration:
            under_way = dict(self._state.batch[: n.batch_chunks].tolist())
        found = []
        for i in self._running_slots():
            slot, row = self._state.slots[i], requests[self._state.slots["request"][i]]
            decodes_now = n.in_iteration and n.decodes_in_batch and self._state.due_clocks[i] != kernel.NEVER
            tokens = int(row["computed_tokens"])
            found.append(
                Holder(
                    request_id=int(slot["request"]),
                    mha=layers_of(self._state.kv_set_words[slot["kv_set"]]),
                    tokens=tokens,
                    layer_blocks=kernel.blocks_of(self._table, i, tokens + under_way.get(i, int(decodes_now))),
                    decoding=bool(row["computed_tokens"] >= row["prefill_tokens"]),
                )
            )
        return found

    def _running_slots(self) -> list[int]:
        """Return the slots of the running requests, in order of admission."""
        after = self._state.slots["next"].tolist()
        end = len(after) - 1
        found, i = [], after[end]
        while i != end:
            found.append(i)
            i = after[i]
        return found

    @property
    def shared_layer_blocks(self) -> int:
        """KV blocks in the prefix blocks that requests hold, each counted once however many requests hold it."""
        blocks = self._state.prefix_blocks[1 : self._counters.prefix_block_count + 1]
        held = blocks[blocks["holders"] > 0]
        layers = self._state.kv_sets["layers"][held["kv_set"]]
        return int(layers.sum()) * int(self._counters.prefix_block_kv_blocks)

    def snapshot(self) -> Snapshot:
        """Return the engine's present state, for ``restore``; the engine itself does not change."""
        state, n = self._state, self._counters
        running = state.slots["request"][self._running_slots()]
        preempted = state.preempted_stack[: n.preempted_waiting]
        live = np.concatenate([running, preempted, state.queue[n.queue_head : n.queue_tail]])
        return Snapshot(
            engine=self,
            time_s=self.env.now,
            arrays=state.saved(),
            live=live,
            live_requests=state.requests[live],
            open_change=state.plan_changes[[n.open_change]],
            submits=len(self._output_tokens),
            graph=self._graph,
            described=len(self._described),
            asleep=self._wake is not None,
        )

    def restore(self, snapshot: Snapshot) -> None:
        """Return to an earlier moment of this engine; everything after it is undone.

        The same calls from then on lead to bit-identical records.

        Raises:
            ConfigError: for a snapshot of another engine, or if the engine shares its SimPy environment, whose clock
                cannot be turned back.
        """
        if snapshot.engine is not self:
            raise ConfigError("this snapshot is of another engine; restore the engine that made it")
        if not self._own_env:
            raise ConfigError(
                "this engine shares its SimPy environment, whose clock cannot be turned back; "
                "build it without env= to restore snapshots"
            )
        state = self._state
        for name, saved in snapshot.arrays.items():
            array = getattr(state, name)
            array[len(saved) :] = 0  # what came later
            array[: len(saved)] = saved
        state.requests[snapshot.live] = snapshot.live_requests
        state.plan_changes[[self._counters.open_change]] = snapshot.open_change
        del self._output_tokens[snapshot.submits :]
        if self._graph is not snapshot.graph:
            self._checked.clear()
            self._graph, self._graph_version = snapshot.graph, -1
        del self._described[snapshot.described :]
        self.env = simpy.Environment(initial_time=snapshot.time_s)
        self._wake = self.env.event() if snapshot.asleep else None
        self._resume = None
        self._hold_at_s = math.nan
        self.env.process(self._serve(self._wake))

    def kept_share(self) -> tuple[tuple[float, float], ...]:
        """Return (time_s, resident bytes as a share of the dense weights' bytes), one entry per change."""
        rows = self._state.resident_bytes_log[: self._counters.resident_bytes_count].tolist()
        return tuple((time_s, held_bytes / self._dense_weight_bytes) for time_s, held_bytes in rows)

    @property
    def budget_violation_s(self) -> float:
        """Seconds so far in which the held bytes exceeded the budget."""
        return float(self._counters.violation_s)

    # -- for drivers of several engines: sim/cluster/cluster.py, sim/disaggregate/disaggregate.py ----------------

    @property
    def context_limit(self) -> int:
        """Largest sum of prompt and output tokens of one request."""
        return self._context_limit

    @property
    def model(self) -> ModelSpec:
        """What is served."""
        return self._model

    @property
    def now_s(self) -> float:
        """The time to which the kernel has advanced."""
        return float(self._counters.now_s)

    @property
    def last_iteration_end_s(self) -> float:
        """The end of the last iteration that has started; 0 before the first."""
        end_s = float(self._counters.end_s)
        return 0.0 if math.isnan(end_s) else end_s

    def rows(self, which: Ints) -> NDArray[Any]:
        """Return copies of the kernel's up-to-date records of some requests (``kernel.state.REQUEST``)."""
        kernel.settle(self._table)
        return self._state.requests[which]

    def use_hash_ids(self, numbers: Ints) -> None:
        """Set all hash ids of all prompts, numbered as ``prefix_block_ids`` returns them, and make room for them."""
        state = self._state
        held = max(len(numbers), len(state.held_prefix_blocks))
        ids = max(int(numbers.max(initial=-1)) + 1, len(state.prefix_block_of_id))
        state.replace(
            hash_ids=numbers,
            held_prefix_blocks=kernel.longer(state.held_prefix_blocks, held),
            prefix_block_of_id=kernel.longer(state.prefix_block_of_id, ids),
            # Each prefix block is either found by an id or held at a place; row 0 stands for none.
            prefix_blocks=kernel.longer(state.prefix_blocks, 1 + ids + held),
        )

    def _keep_hash_ids(self, hash_ids: Sequence[Ints] | None) -> tuple[Ints, Ints]:
        """Append the hash ids of n further requests; return int64[n] where each request's ids begin, and how many."""
        known = self._counters.hash_id_count
        numbers = prefix_block_ids(hash_ids, self._known_ids)
        counts = np.array([len(ids) for ids in hash_ids or ()], dtype=np.int64)
        self.use_hash_ids(np.concatenate([self._state.hash_ids[:known], numbers]))
        self._counters.hash_id_count = known + len(numbers)
        return known + np.cumsum(counts) - counts, counts

    def reserve(self, requests: int) -> None:
        """Make the arrays long enough for this many requests in total."""
        room, state = len(self._state.requests), self._state
        if requests > room:
            room = max(requests, 2 * room)
            state.replace(
                requests=kernel.longer(state.requests, room),
                prompts=kernel.longer(state.prompts, room if self.config.prefix_caching else 0),
                queue=kernel.longer(state.queue, room),
            )
        if self._counters.in_sessions == REPORTED and len(state.turns) < len(state.requests):
            room = len(state.requests)
            state.replace(turns=kernel.longer(state.turns, room), ended_turns=kernel.longer(state.ended_turns, room))

    def observe(self, now_s: float) -> EngineState:
        """Return the state at ``now_s``, to which the kernel has advanced; the budget is advanced to it here."""
        kernel.follow_budget(self._table, now_s)
        kernel.reject_late(self._table, now_s)
        return self._observe(now_s)

    # -- serving -------------------------------------------------------------------------------------------------

    def _serve(self, wake: simpy.Event | None = None) -> Generator[simpy.Event, Any, None]:
        """Serve; with ``wake``, an event that ends a wait, wait for it first."""
        env, n = self.env, self._counters
        if wake is not None:
            yield from self._wait(wake)
            self._wake = None
        while True:
            while env.now == self._hold_at_s:  # a policy decides now, before the next iteration starts
                self._resume = env.event()
                yield self._resume
            now_s = env.now
            n.now_s = now_s
            horizon_s = env.peek()  # no other process can act on this replica before its next event
            if now_s < self._hold_at_s < horizon_s:
                horizon_s = self._hold_at_s
            while True:
                why = kernel.advance(self.table, horizon_s)
                if why not in (kernel.GROW, kernel.NEEDS):
                    break
                self.unblock(why)
            now_s = n.now_s
            if now_s == env.now and why == kernel.HORIZON:
                yield env.timeout(0.0)  # let the other events of this moment happen
            while now_s > env.now:
                yield env.timeout(exact_delay(env.now, now_s))
            if why == kernel.STALLED and env.now != self._hold_at_s:
                self._wake = self.env.event()
                yield from self._wait(self._wake)
                self._wake = None

    def _wait(self, wake: simpy.Event) -> Generator[simpy.Event, Any, None]:
        """Wait, with nothing to serve, for a call from outside (``wake``) or the end of a copy."""
        copy_end_s = self._counters.copy_end_s
        if math.isinf(copy_end_s):
            yield wake
            return
        while True:
            yield wake | self.env.timeout(exact_delay(self.env.now, copy_end_s))
            # The clock may need two steps to get there; acting in between would take a decision before the copy joins.
            if wake.triggered or self.env.now >= copy_end_s:
                return

    def _wake_up(self) -> None:
        if self._wake is not None and not self._wake.triggered:
            self._wake.succeed()
        self._wake = None

    def _waiting(self) -> int:
        n = self._counters
        return int(n.preempted_waiting + n.queue_tail - n.queue_head)

    def _wanted_target(self) -> int:
        n = self._counters
        return int(n.decided_target if n.decided_target >= 0 else n.target)

    def _make_room(self) -> None:
        """Make the log that is full twice as long."""
        state, n = self._state, self._counters
        if n.log_count == len(state.iteration_log):
            full = ["iteration_log"]
        elif n.change_count == len(state.plan_changes) or n.resident_bytes_count + 2 > len(state.resident_bytes_log):
            full = ["plan_changes", "resident_bytes_log"]
        else:
            full = ["itl_counts"]
        arrays = {name: getattr(state, name) for name in full}
        state.replace(**{name: kernel.longer(array, 2 * len(array), log=True) for name, array in arrays.items()})

    # -- plans ---------------------------------------------------------------------------------------------------

    def target_of(self, plan: Plan) -> int:
        """Return the number of a plan in the present ``graph``; a new plan is checked first.

        Raises:
            PlanError: for a plan that is not legal for the model.
            CalibrationError: for a plan with a precision that was not measured.
        """
        known = self._checked.get(id(plan))
        if known is not None and known[0] is plan:
            return known[1]
        check_plan(self._model, plan)
        self._latency.check_bits(plan)
        if len(self._checked) >= MEMORY_OF_PLANS:
            self._checked.clear()
        number = self._graph.target(plan)
        self._checked[id(plan)] = plan, number
        return number

    @property
    def graph(self) -> PlanGraph:
        """The plan graph in use; a full one is replaced by a new one."""
        return self._graph

    @property
    def table(self) -> kernel.Table:
        """The addresses of all arrays, for the kernel; read it again after ``unblock``, ``submit`` or graph growth."""
        graph = self._graph
        if self._graph_version != graph.version:
            self._graph_version = graph.version
            self._state.replace(**graph.arrays())
        return self._table

    def unblock(self, why: int) -> None:
        """Do what the kernel cannot: make a log longer (``GROW``), or add to the plan graph (``NEEDS``)."""
        if why == kernel.GROW:
            self._make_room()
        elif len(self._graph) > MEMORY_OF_PLANS:
            self._begin_new_graph()
        else:
            self._work_out()

    def _work_out(self) -> None:
        """Add to the plan graph what the kernel needs: an edge or a price."""
        n = self._counters
        if n.needed == kernel.NEED_DECISION:
            self._graph.decide(n.needed_residency, n.needed_index)
        elif n.needed == kernel.NEED_COPY_END:
            self._graph.end_copy(n.needed_residency, n.needed_index)
        else:
            self._graph.price(n.needed_residency, self._state.candidate_sets[n.needed_index].tolist())

    def _begin_new_graph(self) -> None:
        """Start a new graph with only the plans still in use: a policy may invent new plans without end."""
        n, old = self._counters, self._graph
        new = PlanGraph(self._model, self._quality_nll)
        self._described += self._describe(len(self._described))
        ahead = self._state.schedule["target"][n.next_decision : n.decision_count]
        ahead[:] = [new.target(old.target_plan(target)) for target in ahead.tolist()]
        if n.decided_target >= 0:
            n.decided_target = new.target(old.target_plan(n.decided_target))
        copy_index = n.copy - int(old.residencies["copies_at"][n.residency])
        n.residency = new.take_from(old, n.residency)
        here = new.residencies[n.residency]
        n.target, n.kv_format_id = int(here["target"]), int(here["kv_format_id"])
        n.stream_id, n.streams_at = int(here["stream_id"]), int(here["streams_at"])
        if n.copy >= 0:
            n.copy = int(here["copies_at"]) + copy_index
        self._checked.clear()
        self._graph, self._graph_version = new, -1

    # -- memory --------------------------------------------------------------------------------------------------

    def _find_context_limit(self) -> int:
        """Return the longest context that fits the first pool alone, as vLLM requires.

        It is at most the configured limit, and the positions that the model has.
        """
        n = self._counters
        limit = min(self.config.max_context_tokens or self._model.max_context_tokens, self._model.max_context_tokens)
        layers = int(self._state.kv_sets["layers"][0])  # those that prefill runs
        if layers:
            blocks = (n.pool_blocks - n.watermark_blocks) // layers
            limit = min(limit, blocks * self.config.kv_block_tokens)
        budget_bytes = self.budget.budget_bytes[n.budget_step]
        held_bytes, workspace_bytes = n.weight_bytes, n.workspace_bytes
        if limit < 2 or held_bytes + workspace_bytes > budget_bytes:
            raise no_room_for_kv(held_bytes, workspace_bytes, budget_bytes)
        return limit

    # -- the observed state --------------------------------------------------------------------------------------

    def _observe(self, now_s: float) -> EngineState:
        n, waiting = self._counters, self._waiting()
        oldest_wait_s = 0.0
        if waiting:
            oldest_wait_s = now_s - float(self._state.requests["arrival_s"][kernel.head(self._table)])
        step, budget = n.budget_step, self.budget
        announced = step + 1 < len(budget.change_s) and budget.change_s[step + 1] - budget.notice_s <= now_s
        return EngineState(
            time_s=now_s,
            waiting=waiting,
            waiting_tokens=n.waiting_tokens,
            oldest_wait_s=oldest_wait_s,
            running=n.running,
            running_tokens=n.running_tokens,
            kv_layer_blocks=n.pool_blocks,
            kv_used_layer_blocks=n.pool_blocks - n.free_blocks,
            budget_bytes=budget.budget_bytes[step],
            weight_bytes=n.weight_bytes,
            arrived=n.arrived,
            arrived_prompt_tokens=n.arrived_prompt_tokens,
            first_tokens=n.first_tokens,
            ttft_sum_s=n.ttft_sum_s,
            produced_tokens=n.produced_tokens,
            finished=n.finished,
            rejected=n.rejected,
            preemptions=n.preemptions,
            iterations=n.iterations,
            busy_s=n.busy_s,
            priced_s=n.priced_s,
            next_budget_bytes=budget.budget_bytes[step + 1] if announced else budget.budget_bytes[step],
            next_budget_s=budget.change_s[step + 1] if announced else math.inf,
            budget_violation_s=n.violation_s,
            incoming_bytes=n.incoming_bytes,
            plan=self._graph.plan(n.residency),
            target=self._graph.target_plan(self._wanted_target()),
        )


_RECORDED = ("arrival_s", "prompt_tokens", "admitted_s", "first_token_s", "finish_s", "preemptions", "status")
"""Fields of the kernel's record of a request that have the same name in ``Records``."""


def _check_copying(host_to_device_bytes_per_s: float, copy_slowdown: float, copy_layer_s: float) -> None:
    if not host_to_device_bytes_per_s > 0 or not copy_slowdown >= 0 or not 0 <= copy_layer_s < math.inf:
        raise ConfigError(
            f"host_to_device_bytes_per_s is {host_to_device_bytes_per_s}, copy_slowdown {copy_slowdown} and "
            f"copy_layer_s {copy_layer_s}; the first must be above 0, the others at least 0"
        )


def prefix_block_ids(hash_ids: Sequence[Ints] | None, known: dict[int, int] | None = None) -> Ints:
    """Return the hash ids of all requests, concatenated and renumbered from 0: int64[total ids].

    Args:
        hash_ids: one int64 array per request. known: id -> number for ids met before; new ids are added.
    Raises:
        ConfigError: if hash_ids is None, or a prompt contains an id twice.
    """
    if hash_ids is None:
        raise missing_hash_ids()
    flat = np.concatenate([*hash_ids, NO_IDS])
    check_hash_ids(flat)
    flat = flat.astype(np.int64)
    ids, numbers = np.unique(flat, return_inverse=True)
    whose = np.repeat(np.arange(len(hash_ids)), [len(row) for row in hash_ids])
    # (request, id) as one integer: one that occurs twice is an id repeated within a prompt.
    places, counts = np.unique(whose * (len(ids) + 1) + numbers, return_counts=True)
    if (counts > 1).any():
        request, number = divmod(int(places[np.argmax(counts)]), len(ids) + 1)
        raise repeated_hash_id(request, int(ids[number]))
    if known is None:
        return numbers.astype(np.int64)
    renumbered = np.array([known.setdefault(i, len(known)) for i in ids.tolist()], dtype=np.int64)
    return renumbered[numbers]


def exact_delay(now_s: float, time_s: float) -> float:
    """Return the longest delay that moves SimPy's clock from ``now_s`` to at most ``time_s``.

    ``now + (time - now)`` can miss ``time`` by a rounding step either way. If no single delay leads to ``time_s``
    exactly, a second one does from where the first ends: call this again until the clock reaches ``time_s``.
    """
    delay_s = time_s - now_s
    while now_s + delay_s < time_s:
        delay_s = math.nextafter(delay_s, math.inf)
    while now_s + delay_s > time_s:
        delay_s = math.nextafter(delay_s, 0.0)
    return delay_s
