"""The Engine protocol, what a policy may see of an engine, and the simulated engine.

``SimEngine`` lives on SimPy's clock and serves with the compiled kernel (sim/kernel.py); between two iterations, where
memory or the plan change, it is plain Python. ``tests/sim/plain_engine.py`` takes one iteration a SimPy event, with
Python objects and no shortcut; the records of both are equal.

Order of what happens at one instant: the budget changes, requests arrive, an iteration ends, the policy decides, plans
and memory follow, the next iteration starts. Requests that arrive together keep the order of the trace.

Rules for changing plans (sim/transition.py says what is copied when):

1. Everything takes effect between two iterations; an idle engine is always between two.
2. A dropped block leaves at once, an MHA block with the KV that requests hold of it.
3. Each request carries the set of MHA blocks whose KV it holds: those that prefill runs when it is admitted. The set
   only shrinks: by drops, and at the end of its prefill to what decode runs.
4. A block that is restored runs for requests admitted later; with ``restore=recompute`` those that lack it give up
   their KV and are prefilled again.
5. ``kv_keep`` is a request's own from the end of its prefill on: later plans change it for later requests.
6. The KV pool is what the budget leaves beside resident weights, the layer that is being copied in, and the
   workspace. When it shrinks below its use, the newest requests are preempted until it fits. When not even the weights
   fit, nothing that needs KV runs; the seconds beyond the budget are counted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol, TypeVar

import numpy as np
import simpy
from numpy.typing import NDArray

from sim import kernel
from sim.budget import Budget, constant_budget
from sim.errors import BudgetError, ConfigError, nearest
from sim.latency import LatencyModel, plan_layers
from sim.memory import fixed_weight_bytes, kv_block_layer_bytes, weight_bytes
from sim.model import ModelSpec
from sim.plan import KV_KEEP_ALL, WEIGHT_BITS, KVKeep, Plan, check_plan, dense_plan, describe
from sim.records import Floats, Ints, Iterations, Records, TokenGaps, Transitions
from sim.scheduler import SCHEDULERS, Limits, SchedulerName
from sim.transition import (
    LayerCopy,
    Resident,
    copies_between,
    joined,
    plan_for_holder,
    resident_of,
    running_plan,
    without_dropped,
)

GIB = 1 << 30
MEMORY_OF_PLANS = 4096
"""Plans whose consequences an engine remembers."""
RESTORE_MODES = ("new_requests", "recompute")
Restore = Literal["new_requests", "recompute"]


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
    restore: what a restored MHA block does to requests that run: ``new_requests`` or ``recompute`` (rule 4 above).
    """

    scheduler: SchedulerName = "chunked"
    limits: Limits = field(default_factory=Limits)
    kv_block_tokens: int = 16
    kv_watermark_share: float = 0.0
    reuse_preempted_kv: bool = False
    max_context_tokens: int | None = None
    restore: Restore = "new_requests"

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
    under way included. decoding: whether its prefill has ended.
    """

    request_id: int
    mha: frozenset[int]
    tokens: int
    layer_blocks: int
    decoding: bool


@dataclass(slots=True, eq=False)
class _Transition:
    """One plan change, as it goes on."""

    time_s: float
    from_plan: Plan
    to_plan: Plan
    kv_blocks_before: int
    bytes_in: int = 0
    bytes_freed: int = 0
    ready_s: float = math.nan
    preempted: int = 0
    recomputed_tokens: int = 0
    kv_blocks_after: int = 0


_SAVED_ARRAYS = (
    "ints",
    "floats",
    "slots",
    "cohort_s",
    "phases",
    "runs",
    "sets",
    "set_nll",
    "block_counts",
    "layer_rows",
)
_SAVED = (
    "_budget_step",
    "_budget_moved",
    "_violation_s",
    "_violation_since_s",
    "_target",
    "_resident",
    "_decided",
    "_copies",
    "_copy",
    "_copy_end_s",
    "_plan",
    "_weight_bytes",
    "_prefill_mha",
    "_decode_mha",
)


@dataclass(frozen=True, slots=True, eq=False)
class Snapshot:
    """A SimEngine at one moment, for ``SimEngine.restore``: what is under way and what waits; not what is done.

    Rows of requests that have ended and rows of the logs never change, so they are not in it: a snapshot takes memory
    and time for the running and waiting requests only.
    """

    engine: SimEngine
    time_s: float
    arrays: tuple[NDArray[Any], ...]
    live: Ints
    live_i: Ints
    live_f: Floats
    values: tuple[Any, ...]
    sets: tuple[frozenset[int], ...]
    submits: int
    kept_shares: int
    transitions: int
    open_transition: _Transition | None


@dataclass(frozen=True, slots=True, eq=False)
class _Step:
    """What follows from what is resident and what is wanted; worked out once, for plans come back.

    ``without_dropped`` and ``copies`` lead on; the rest is what runs meanwhile, as the kernel takes it.
    """

    resident: Resident
    target: Plan
    without_dropped: Resident
    copies: tuple[LayerCopy, ...]
    plan: Plan
    prefill_mha: frozenset[int]
    decode_mha: frozenset[int]
    weight_bytes: int
    block_counts: Ints
    layer_rows: Ints
    keep: int
    params: tuple[
        int, int, int
    ]  # parameters that run for a token of prefill and of decode, and more for each MHA block
    nll: dict[tuple[frozenset[int], bool], float]  # by the KV that is held, and whether its holder decodes


class SimEngine:
    """One replica on SimPy's clock: the compiled kernel serves, this class changes plans and memory between.

    ``tests/sim/plain_engine.py`` is the same engine, one SimPy event an iteration; the records of both are equal.
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
        copy_slowdown: float = 0.0,
        quality_nll: Callable[[Plan], float] | None = None,
        keep_iterations: bool = True,
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
            quality_nll: nats a token that a plan costs (``sim.quality``), charged to requests; None charges nothing.
            keep_iterations: whether ``iterations()`` has a row for each; without, it stays empty and memory is saved.
            env: the SimPy environment to live in; a new one by default.
        Raises:
            PlanError: for a plan that is not legal for the model.
            CalibrationError: for a plan with a precision that was not measured.
            BudgetError: when the budget cannot hold the weights and one request at the start.
        """
        check_plan(model, plan)
        latency.check_bits(plan)
        if not host_to_device_bytes_per_s > 0 or not copy_slowdown >= 0:
            raise ConfigError(
                f"host_to_device_bytes_per_s is {host_to_device_bytes_per_s} and copy_slowdown {copy_slowdown}; "
                "the first must be above 0, the second at least 0"
            )
        self._own_env = env is None
        self.env = env or simpy.Environment()
        self._model, self._latency, self.config = model, latency, config
        self.budget = budget_bytes if isinstance(budget_bytes, Budget) else constant_budget(budget_bytes)
        self._workspace_bytes = workspace_bytes
        self._host_to_device_bytes_per_s = host_to_device_bytes_per_s
        self._quality_nll = quality_nll
        self._params = (model.fixed_params, model.mha_params, model.ffn_params)
        self._fixed_weight_bytes = fixed_weight_bytes(model)
        self._dense_weight_bytes = weight_bytes(model, dense_plan(model))
        self._block_bytes = kv_block_layer_bytes(model, config.kv_block_tokens)
        self._state = _empty_state(model, latency, config, keep_iterations)
        self._table = kernel.table_of(self._state)
        self._state.floats[kernel.COPY_SLOWDOWN] = copy_slowdown
        self._output_tokens: list[Ints] = []  # of each call of submit

        self._wake: simpy.Event | None = None
        self._resume: simpy.Event | None = None
        self._hold_at_s = math.nan

        self._budget_step = 0
        self._budget_moved = False
        self._violation_s = self._violation_since_s = 0.0
        self._target = plan
        self._resident = resident_of(plan)
        self._decided: tuple[float, Plan] | None = None
        self._copies: tuple[LayerCopy, ...] = ()
        self._copy: LayerCopy | None = None
        self._copy_end_s = math.inf
        self._transition: _Transition | None = None
        self._transitions: list[_Transition] = []
        self._kept_share: list[tuple[float, float]] = []
        self._sets: tuple[frozenset[int], ...] = ()
        self._prefill_mha: frozenset[int] = frozenset()
        self._decode_mha: frozenset[int] = frozenset()
        self._keep_ids: dict[tuple[KVKeep, ...], int] = {}
        self._checked: dict[int, Plan] = {id(plan): plan}
        self._known: dict[tuple[int, int], _Step] = {}
        self._residents: dict[Resident, Resident] = {self._resident: self._resident}
        self._joins: dict[tuple[int, int], tuple[Resident, LayerCopy, Resident]] = {}
        self._narrowings: dict[tuple[Any, ...], tuple[Ints, Ints, tuple[frozenset[int], ...]]] = {}

        self._run_what_is_resident(self.env.now)
        self._resize_pool()
        self._context_limit = self._find_context_limit()
        self.env.process(self._serve())

    # -- the Engine protocol -------------------------------------------------------------------------------------

    def submit(self, requests: Sequence[Request]) -> None:
        """Hand over requests, sorted by arrival and not before the present."""
        self.submit_arrays(
            np.array([r.arrival_s for r in requests], dtype=np.float64),
            np.array([r.prompt_tokens for r in requests], dtype=np.int64),
            np.array([r.output_tokens for r in requests], dtype=np.int64),
        )

    def submit_arrays(self, arrival_s: Floats, prompt_tokens: Ints, output_tokens: Ints) -> None:
        """Hand over requests as ``submit`` does, one entry each in every array; numbered on from those before.

        Raises:
            ConfigError: for arrivals out of order or in the past.
        """
        n, f = self._state.ints, self._state.floats
        first = int(n[kernel.N_REQUESTS])
        pending = n[kernel.NEXT_ARRIVAL] < first
        last_s = float(self._state.request_f[first - 1, kernel.ARRIVAL_S]) if pending else self.env.now
        before_s = np.concatenate([[last_s], arrival_s[:-1]])
        late = np.flatnonzero(~(arrival_s >= before_s))
        if len(late):
            raise ConfigError(
                f"request {first + int(late[0])} arrives at {arrival_s[late[0]]} s, before {before_s[late[0]]} s; "
                "submit requests in order of arrival and not in the past"
            )
        total = first + len(arrival_s)
        room = len(self._state.request_i)
        if total > room:
            room = total if not first else max(total, 2 * room)
            self._replace(
                request_i=_longer(self._state.request_i, room),
                request_f=_longer(self._state.request_f, room),
                queue=_longer(self._state.queue, room),
            )
        rows = slice(first, total)
        self._state.request_f[rows, kernel.ARRIVAL_S] = arrival_s
        self._state.request_i[rows, kernel.PROMPT] = prompt_tokens
        self._state.request_i[rows, kernel.LIMIT] = np.minimum(output_tokens, self._context_limit - prompt_tokens)
        self._output_tokens.append(output_tokens)
        n[kernel.N_REQUESTS] = total
        if not pending and len(arrival_s):
            f[kernel.NEXT_ARRIVAL_S] = arrival_s[0]
        self._wake_up()

    def apply(self, plan: Plan) -> None:
        """Make ``plan`` what shall run; it takes effect between two iterations.

        Raises:
            PlanError: for a plan that is not legal for the model; what runs goes on.
            CalibrationError: for a plan with a precision that was not measured; what runs goes on.
        """
        wanted = self._decided[1] if self._decided is not None else self._target
        if plan is wanted:
            return
        if self._checked.get(id(plan)) is not plan:
            check_plan(self._model, plan)
            self._latency.check_bits(plan)
            if len(self._checked) >= MEMORY_OF_PLANS:
                self._checked.clear()
            self._checked[id(plan)] = plan
        if plan == wanted:
            return
        self._decided = (self.env.now, plan)
        self._wake_up()

    def run_until(self, time_s: float) -> EngineState:
        """Serve until ``time_s`` (``inf``: until nothing is left to do) and say what can be seen then."""
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
        now_s = env.now if math.isinf(time_s) else time_s
        self._follow_budget(now_s)
        if self._state.floats[kernel.NEXT_ARRIVAL_S] <= now_s:
            kernel.take_arrivals(self._table, now_s)
        return self._observe(now_s)

    @property
    def drained(self) -> bool:
        """Whether no submitted request can make any more progress by itself."""
        n = self._state.ints
        return (
            self._resume is None
            and n[kernel.NEXT_ARRIVAL] == n[kernel.N_REQUESTS]
            and n[kernel.N_RUNNING] == 0
            and (self._waiting() == 0 or math.isinf(self.env.peek()))
        )

    def records(self) -> Records:
        """Return one row a request, in order of arrival; requests yet to arrive have none."""
        kernel.settle(self._table)
        arrived = int(self._state.ints[kernel.NEXT_ARRIVAL])
        ints, floats = self._state.request_i[:arrived], self._state.request_f[:arrived]
        produced = ints[:, kernel.PRODUCED].copy()
        tokens = np.where(produced > 0, produced, np.nan)
        outputs = np.concatenate(self._output_tokens) if self._output_tokens else np.zeros(0, dtype=np.int64)
        nll_sum = floats[:, kernel.NLL_SUM] if self._quality_nll is not None else np.full(arrived, np.nan)
        return Records(
            arrival_s=floats[:, kernel.ARRIVAL_S].copy(),
            prompt_tokens=ints[:, kernel.PROMPT].copy(),
            output_tokens=outputs[:arrived],
            produced_tokens=produced,
            admitted_s=floats[:, kernel.ADMITTED_S].copy(),
            first_token_s=floats[:, kernel.FIRST_S].copy(),
            finish_s=floats[:, kernel.FINISH_S].copy(),
            preemptions=ints[:, kernel.PREEMPTED].copy(),
            status=ints[:, kernel.STATUS].copy(),
            kept_params_share=ints[:, kernel.KEPT_PARAMS] / (tokens * self._model.total_params),
            quality_nll=nll_sum / tokens,
        )

    def iterations(self) -> Iterations:
        """Return one row an iteration; none when the engine was built with ``keep_iterations=False``."""
        log = self._state.log[: self._state.ints[kernel.N_LOG]]

        def ints(column: int) -> Ints:
            return log[:, column].astype(np.int64)

        return Iterations(
            start_s=log[:, kernel.LOG_START].copy(),
            end_s=log[:, kernel.LOG_END].copy(),
            prefill_tokens=ints(kernel.LOG_PREFILL),
            decode_requests=ints(kernel.LOG_DECODES),
            running=ints(kernel.LOG_RUNNING),
            waiting=ints(kernel.LOG_WAITING),
            kv_used_share=log[:, kernel.LOG_USED_SHARE].copy(),
            preemptions=ints(kernel.LOG_PREEMPTED),
            extrapolated=log[:, kernel.LOG_EXTRAPOLATED] != 0.0,
        )

    def token_gaps(self) -> TokenGaps:
        """Return every gap between two tokens of one request."""
        gaps = self._state.gaps[: self._state.ints[kernel.N_GAPS]]
        order = np.argsort(gaps[:, 0], kind="stable")
        itl_s, counts = gaps[order, 0], gaps[order, 1]
        first = np.flatnonzero(np.diff(itl_s, prepend=-1.0))
        count = np.add.reduceat(counts, first) if len(first) else np.zeros(0)
        return TokenGaps(itl_s=itl_s[first], count=count.astype(np.int64))

    def transitions(self) -> Transitions:
        """Return one row a plan change."""
        rows = self._transitions

        def ints(name: str) -> Ints:
            return np.array([getattr(t, name) for t in rows], dtype=np.int64)

        return Transitions(
            time_s=np.array([t.time_s for t in rows], dtype=np.float64),
            from_plan=tuple(describe(t.from_plan) for t in rows),
            to_plan=tuple(describe(t.to_plan) for t in rows),
            bytes_in=ints("bytes_in"),
            bytes_freed=ints("bytes_freed"),
            ready_s=np.array([t.ready_s for t in rows], dtype=np.float64),
            preempted=ints("preempted"),
            recomputed_tokens=ints("recomputed_tokens"),
            kv_blocks_before=ints("kv_blocks_before"),
            kv_blocks_after=ints("kv_blocks_after"),
        )

    def holders(self) -> list[Holder]:
        """Return who runs, in order of admission, and what each holds."""
        n, slots, ints = self._state.ints, self._state.slots, self._state.request_i
        kernel.settle(self._table)
        under_way = {}
        if n[kernel.IN_ITERATION]:
            batch = range(int(n[kernel.N_BATCH]))
            under_way = {int(slots[kernel.BATCH, j]): int(slots[kernel.TOKENS, j]) for j in batch}
        found, end = [], slots.shape[1] - 1
        i = int(slots[kernel.NEXT, end])
        while i != end:
            row = ints[slots[kernel.REQUEST, i]]
            decodes_now = n[kernel.IN_ITERATION] and n[kernel.DECODING] and slots[kernel.DUE, i] != kernel.NEVER
            tokens = int(row[kernel.COMPUTED])
            found.append(
                Holder(
                    request_id=int(slots[kernel.REQUEST, i]),
                    mha=self._sets[slots[kernel.SET, i]],
                    tokens=tokens,
                    layer_blocks=kernel.blocks_of(self._table, i, tokens + under_way.get(i, int(decodes_now))),
                    decoding=bool(row[kernel.COMPUTED] >= row[kernel.PREFILL]),
                )
            )
            i = int(slots[kernel.NEXT, i])
        return found

    def snapshot(self) -> Snapshot:
        """Return the engine as it stands, to come back to with ``restore``; the engine goes on unchanged."""
        state = self._state
        n, end = state.ints, state.slots.shape[1] - 1
        running = []
        i = int(state.slots[kernel.NEXT, end])
        while i != end:
            running.append(int(state.slots[kernel.REQUEST, i]))
            i = int(state.slots[kernel.NEXT, i])
        stack = state.slots[kernel.STACK, : n[kernel.STACKED]]
        queue = state.queue[n[kernel.QUEUE_HEAD] : n[kernel.QUEUE_TAIL]]
        live = np.concatenate([np.array(running, dtype=np.int64), stack, queue])
        return Snapshot(
            engine=self,
            time_s=self.env.now,
            arrays=tuple(getattr(state, name).copy() for name in _SAVED_ARRAYS),
            live=live,
            live_i=state.request_i[live],
            live_f=state.request_f[live],
            values=tuple(getattr(self, name) for name in _SAVED),
            sets=self._sets,
            submits=len(self._output_tokens),
            kept_shares=len(self._kept_share),
            transitions=len(self._transitions),
            open_transition=replace(self._transition) if self._transition is not None else None,
        )

    def restore(self, snapshot: Snapshot) -> None:
        """Go back to a moment of this engine; everything after it is undone, and can go otherwise.

        The same calls as then lead to the same records, to the bit.

        Raises:
            ConfigError: for a snapshot of another engine, or an engine in a SimPy environment that others share: their
                clocks cannot be turned back.
        """
        if snapshot.engine is not self:
            raise ConfigError("this snapshot is of another engine; restore the engine that made it")
        if not self._own_env:
            raise ConfigError(
                "this engine shares its SimPy environment, whose clock cannot be turned back; "
                "build it without env= to restore snapshots"
            )
        state = self._state
        for name, saved in zip(_SAVED_ARRAYS, snapshot.arrays, strict=True):
            array = getattr(state, name)
            array[tuple(slice(length) for length in saved.shape)] = saved
        state.request_i[snapshot.live], state.request_f[snapshot.live] = snapshot.live_i, snapshot.live_f
        for name, value in zip(_SAVED, snapshot.values, strict=True):
            setattr(self, name, value)
        self._sets = snapshot.sets
        del self._output_tokens[snapshot.submits :]
        del self._kept_share[snapshot.kept_shares :]
        del self._transitions[snapshot.transitions :]
        self._transition = replace(snapshot.open_transition) if snapshot.open_transition is not None else None
        if self._transition is not None:
            self._transitions[-1] = self._transition
        self.env = simpy.Environment(initial_time=snapshot.time_s)
        self._wake = self._resume = None
        self._hold_at_s = math.nan
        self.env.process(self._serve())

    def kept_share(self) -> tuple[tuple[float, float], ...]:
        """Return (time_s, share of the dense weights' bytes that is resident), one entry a change."""
        return tuple(self._kept_share)

    @property
    def budget_violation_s(self) -> float:
        """Seconds so far in which more was held than the budget allows."""
        return self._violation_s

    # -- serving -------------------------------------------------------------------------------------------------

    def _serve(self) -> Generator[simpy.Event, Any, None]:
        env, n, f = self.env, self._state.ints, self._state.floats
        while True:
            if env.now == self._hold_at_s:  # a policy decides now, before the next iteration starts
                self._resume = env.event()
                yield self._resume
            now_s = env.now
            f[kernel.NOW] = now_s
            horizon_s = env.peek()  # nothing else can touch this replica before then
            if now_s < self._hold_at_s < horizon_s:
                horizon_s = self._hold_at_s
            while True:
                change_s = self._change_from_s()
                if now_s >= change_s and not n[kernel.IN_ITERATION]:
                    if f[kernel.NEXT_ARRIVAL_S] <= now_s:
                        kernel.take_arrivals(self._table, now_s)
                    self._change_plan(now_s)
                    change_s = self._change_from_s()
                why = kernel.advance(self._table, horizon_s, change_s)
                now_s = float(f[kernel.NOW])
                if why == kernel.GROW:
                    self._make_room()
                elif why != kernel.CHANGE or now_s >= horizon_s:
                    break
            if now_s == env.now and why == kernel.HORIZON:
                yield env.timeout(0.0)  # others' turn at this moment
            while now_s > env.now:
                yield env.timeout(exact_delay(env.now, now_s))
            if why == kernel.DONE and env.now != self._hold_at_s:
                yield self._next_event()

    def _change_from_s(self) -> float:
        """Return from when on memory or the plan have to change before the next iteration."""
        if self._decided is not None or self._budget_moved:
            return -math.inf
        step, change_s = self._budget_step + 1, self.budget.change_s
        return min(self._copy_end_s, change_s[step] if step < len(change_s) else math.inf)

    def _next_event(self) -> simpy.Event:
        """Return what an engine waits for that nothing will happen to by itself: a copy's end, a call from outside."""
        self._wake = self.env.event()
        if math.isinf(self._copy_end_s):
            return self._wake
        return self._wake | self.env.timeout(exact_delay(self.env.now, self._copy_end_s))

    def _wake_up(self) -> None:
        if self._wake is not None and not self._wake.triggered:
            self._wake.succeed()
        self._wake = None

    def _waiting(self) -> int:
        n = self._state.ints
        return int(n[kernel.STACKED] + n[kernel.QUEUE_TAIL] - n[kernel.QUEUE_HEAD])

    def _make_room(self) -> None:
        """Let the logs grow."""
        state = self._state
        if state.ints[kernel.N_LOG] == len(state.log):
            self._replace(log=_longer(state.log, 2 * len(state.log)))
        else:
            self._replace(gaps=_longer(state.gaps, 2 * len(state.gaps)))

    def _replace(self, **arrays: NDArray[Any]) -> None:
        """Give the state other arrays, longer ones."""
        self._state = self._state._replace(**arrays)
        self._table = kernel.table_of(self._state)

    # -- plans ---------------------------------------------------------------------------------------------------

    def _change_plan(self, now_s: float) -> None:
        """Do what is due of plan and memory changes between two iterations."""
        self._follow_budget(now_s)
        self._budget_moved = False
        n = self._state.ints
        before = int(n[kernel.PREEMPTIONS])
        if self._copy is not None and self._copy_end_s <= now_s:
            self._join(now_s)
        if self._decided is not None:
            self._begin_transition(*self._decided, now_s)
            self._decided = None
        if self._copy is None and self._copies:
            self._copy, self._copies = self._copies[0], self._copies[1:]
            self._copy_end_s = now_s + self._copy.copied_bytes / self._host_to_device_bytes_per_s
        n[kernel.COPYING] = self._copy is not None
        if self._transition is not None and self._copy is None:
            self._transition.ready_s = now_s
        self._resize_pool()
        if n[kernel.FREE] < 0:
            self._charge(kernel.preempt_to_fit(self._table))
        if self._transition is not None:
            self._transition.kv_blocks_after = int(n[kernel.POOL])
            if self._copy is None:
                self._transition = None
        n[kernel.CHANGE_PREEMPTED] += n[kernel.PREEMPTIONS] - before

    def _charge(self, preempted: tuple[int, int]) -> None:
        """Charge the transition with requests that lost their KV, and the tokens they had computed."""
        if self._transition is not None:
            self._transition.preempted += preempted[0]
            self._transition.recomputed_tokens += preempted[1]

    def _begin_transition(self, time_s: float, plan: Plan, now_s: float) -> None:
        """Drop what the new plan does not run, and line up the copies of what it needs."""
        pool = int(self._state.ints[kernel.POOL])
        self._transition = _Transition(time_s, self._plan, plan, pool)
        self._transitions.append(self._transition)
        self._target = plan
        self._set_resident(self._step(self._resident, plan).without_dropped, now_s)
        copies = self._step(self._resident, plan).copies
        if self._copy is not None:
            if self._copy in copies:  # the copy under way goes on, for the new plan
                copies = tuple(copy for copy in copies if copy != self._copy)
            else:
                self._copy, self._copy_end_s = None, math.inf
        self._copies = copies

    def _join(self, now_s: float) -> None:
        """Let the layer whose copy is whole run from now on, in the place of what it replaces."""
        copy = self._copy
        assert copy is not None
        if self._transition is not None:
            self._transition.bytes_in += copy.copied_bytes
        restored = copy.mha_bits and not self._resident.mha_bits[copy.layer]
        known = self._joins.get((id(self._resident), id(copy)))
        if known is None or known[0] is not self._resident or known[1] is not copy:
            known = (self._resident, copy, self._same(joined(self._resident, copy)))
            self._joins[id(self._resident), id(copy)] = known
        self._set_resident(known[2], now_s, copied_bytes=copy.copied_bytes)
        self._copy, self._copy_end_s = None, math.inf
        if restored and copy.layer in self._prefill_mha and self.config.restore == "recompute":
            self._charge(kernel.preempt_lacking(self._table, copy.layer, True, copy.layer in self._decode_mha))

    def _set_resident(self, resident: Resident, now_s: float, copied_bytes: int = 0) -> None:
        before_bytes = self._weight_bytes
        self._resident = resident
        self._run_what_is_resident(now_s)
        if self._transition is not None:
            self._transition.bytes_freed += before_bytes + copied_bytes - self._weight_bytes

    def _same(self, resident: Resident) -> Resident:
        """Return the one object that stands for all that are equal to ``resident``."""
        return self._residents.setdefault(resident, resident)

    def _step(self, resident: Resident, target: Plan) -> _Step:
        """Return what follows from what is resident and what is wanted."""
        key = (id(resident), id(target))
        known = self._known.get(key)
        if known is not None and known.resident is resident and known.target is target:
            return known
        plan = running_plan(resident, target)
        keep = -1
        if any(layer != KV_KEEP_ALL for layer in plan.kv_keep):
            keep = self._keep_ids.setdefault(plan.kv_keep, len(self._keep_ids))
            if keep == len(self._state.keeps):
                self._replace(keeps=_longer(self._state.keeps, 2 * keep))
            self._state.keeps[keep] = [layer.tokens(kernel.NEVER) for layer in plan.kv_keep]
        rows = [
            (WEIGHT_BITS.index(bits), prefill, decode)
            for bits, prefill, decode in zip(plan.weight_bits, plan.prefill.ffn, plan.decode.ffn, strict=True)
        ]
        fixed, mha, ffn = self._params
        step = _Step(
            resident=resident,
            target=target,
            without_dropped=self._same(without_dropped(resident, target)),
            copies=tuple(copies_between(self._model, resident, target)),
            plan=plan,
            prefill_mha=frozenset(layer for layer, keeps in enumerate(plan.prefill.mha) if keeps),
            decode_mha=frozenset(layer for layer, keeps in enumerate(plan.decode.mha) if keeps),
            weight_bytes=self._fixed_weight_bytes + resident.weight_bytes(self._model),
            block_counts=plan_layers(plan),
            layer_rows=np.array(rows, dtype=np.int64),
            keep=keep,
            params=(fixed + ffn * sum(plan.prefill.ffn), fixed + ffn * sum(plan.decode.ffn), mha),
            nll={},
        )
        if len(self._known) >= MEMORY_OF_PLANS:
            for memory in (self._known, self._residents, self._joins, self._narrowings):
                memory.clear()
        self._known[key] = step
        return step

    def _run_what_is_resident(self, now_s: float) -> None:
        """Run the blocks of the target that are on the device."""
        step = self._step(self._resident, self._target)
        state = self._state
        n = state.ints
        kernel.settle(self._table)
        if step.prefill_mha != self._prefill_mha:
            kernel.forget_kept_kv(self._table)  # it lacks a layer, or has one too many
        new_sets = not self._sets or step.prefill_mha != self._prefill_mha or step.decode_mha != self._decode_mha
        self._plan, self._weight_bytes = step.plan, step.weight_bytes
        self._prefill_mha, self._decode_mha = step.prefill_mha, step.decode_mha
        state.block_counts[:] = step.block_counts
        state.layer_rows[:] = step.layer_rows
        n[kernel.PLAN_KEEP] = step.keep
        n[kernel.ADMIT] = -1 if step.plan.admit is None else step.plan.admit
        limit = self.config.limits.max_running
        n[kernel.MAX_RUNNING] = min(limit, step.plan.max_running or limit)
        if new_sets:
            self._renew_sets(step)
        self._price_sets(step)
        share = step.weight_bytes / self._dense_weight_bytes
        if not self._kept_share or self._kept_share[-1][1] != share:
            self._kept_share.append((now_s, share))

    def _renew_sets(self, step: _Step) -> None:
        """Let every running request hold the KV of what still runs of what it held."""
        used = np.zeros((len(self._sets), 2), dtype=np.int64)
        kernel.sets_in_use(self._table, used)
        key = (self._sets, used.tobytes(), step.prefill_mha, step.decode_mha)
        if key not in self._narrowings:
            self._narrowings[key] = self._narrowing(used, step)
        narrowed, rows, self._sets = self._narrowings[key]
        if len(rows) > len(self._state.sets):
            room = 2 * len(rows)
            self._replace(sets=_longer(self._state.sets, room), set_nll=_longer(self._state.set_nll, room))
        kernel.change_sets(self._table, narrowed, rows)
        # The first two are those of the plan itself; they are one where prefill runs no more than decode.
        self._state.ints[kernel.PREFILL_SET] = 0
        self._state.ints[kernel.DECODE_SET] = int(step.prefill_mha != step.decode_mha)

    def _narrowing(self, used: Ints, step: _Step) -> tuple[Ints, Ints, tuple[frozenset[int], ...]]:
        """Return the new set of each old one (by stage), the rows of the new sets for the kernel, and the new sets."""
        numbers: dict[frozenset[int], int] = {}

        def number(held: frozenset[int]) -> int:
            return numbers.setdefault(held, len(numbers))

        number(step.prefill_mha)
        number(step.decode_mha)
        narrowed = np.zeros_like(used)
        for old, held in enumerate(self._sets):
            if used[old, 0]:
                narrowed[old, 0] = number(held & step.prefill_mha)
                number(held & step.decode_mha)
            if used[old, 1]:
                narrowed[old, 1] = number(held & step.decode_mha)
        columns = kernel.SET_COLUMNS
        rows = np.zeros((len(numbers), columns + self._model.num_layers), dtype=np.int64)
        for at, held in enumerate(numbers):
            rows[at, kernel.LAYERS] = len(held)
            rows[at, kernel.AFTER] = numbers[held & step.decode_mha]
            rows[at, [columns + layer for layer in held]] = 1
        return narrowed, rows, tuple(numbers)

    def _price_sets(self, step: _Step) -> None:
        """State what a token costs in parameters and in quality, by the KV that its request holds."""
        prefill, decode, mha = step.params
        for at, held in enumerate(self._sets):
            self._state.sets[at, kernel.PREFILL_PARAMS] = prefill + len(held) * mha
            self._state.sets[at, kernel.DECODE_PARAMS] = decode + len(held) * mha
            if self._quality_nll is not None:
                for decoding in (False, True):
                    if (nll := step.nll.get((held, decoding))) is None:
                        nll = self._quality_nll(plan_for_holder(step.plan, held, decoding=decoding))
                        step.nll[held, decoding] = nll
                    self._state.set_nll[at, int(decoding)] = nll

    # -- memory --------------------------------------------------------------------------------------------------

    def _incoming_bytes(self) -> int:
        return self._copy.copied_bytes if self._copy is not None else 0

    def _resize_pool(self) -> None:
        """Give the KV pool what the budget leaves."""
        n = self._state.ints
        budget_bytes = self.budget.budget_bytes[self._budget_step]
        left = budget_bytes - self._weight_bytes - self._incoming_bytes() - self._workspace_bytes
        layer_blocks = max(0, left // self._block_bytes)
        if layer_blocks != n[kernel.POOL]:
            kernel.resize_pool(self._table, layer_blocks)
        share = math.ceil(self.config.kv_watermark_share * layer_blocks)
        n[kernel.WATERMARK] = self.config.limits.watermark_layer_blocks + share

    def _find_context_limit(self) -> int:
        """Return the longest context one request may reach, so that it fits the first pool alone, as vLLM demands."""
        n = self._state.ints
        limit = self.config.max_context_tokens or self._model.max_context_tokens
        if self._prefill_mha:
            blocks = int(n[kernel.POOL] - n[kernel.WATERMARK]) // len(self._prefill_mha)
            limit = min(limit, blocks * self.config.kv_block_tokens)
        budget_bytes = self.budget.budget_bytes[0]
        if limit < 2 or self._weight_bytes + self._workspace_bytes > budget_bytes:
            raise BudgetError(
                f"weights {self._weight_bytes / GIB:.2f} GiB and workspace {self._workspace_bytes / GIB:.2f} GiB leave "
                f"no room for the KV cache of one request in a budget of {budget_bytes / GIB:.2f} GiB; prune or "
                "quantise more blocks, or raise the budget (budget=, gpu=)"
            )
        return limit

    def _follow_budget(self, now_s: float) -> None:
        """Bring the budget up to ``now_s`` and count the seconds in which more was held than it allowed."""
        n, f = self._state.ints, self._state.floats
        if not n[kernel.IN_ITERATION] and f[kernel.END] == now_s:
            used = int(n[kernel.USED_BEFORE])  # what was held until this moment, at which an iteration ended
        else:
            used = int(n[kernel.POOL] - n[kernel.FREE])
        held_bytes = self._weight_bytes + self._incoming_bytes() + self._workspace_bytes + used * self._block_bytes
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
            self._budget_moved = True

    # -- what can be seen ----------------------------------------------------------------------------------------

    def _observe(self, now_s: float) -> EngineState:
        n, f = self._state.ints.tolist(), self._state.floats.tolist()
        waiting = n[kernel.STACKED] + n[kernel.QUEUE_TAIL] - n[kernel.QUEUE_HEAD]
        oldest_wait_s = 0.0
        if waiting:
            oldest_wait_s = now_s - float(self._state.request_f[kernel.head(self._table), kernel.ARRIVAL_S])
        step, budget = self._budget_step, self.budget
        announced = step + 1 < len(budget.change_s) and budget.change_s[step + 1] - budget.notice_s <= now_s
        return EngineState(
            time_s=now_s,
            waiting=waiting,
            waiting_tokens=n[kernel.WAITING_TOKENS],
            oldest_wait_s=oldest_wait_s,
            running=n[kernel.N_RUNNING],
            running_tokens=n[kernel.RUNNING_TOKENS],
            kv_layer_blocks=n[kernel.POOL],
            kv_used_layer_blocks=n[kernel.POOL] - n[kernel.FREE],
            budget_bytes=budget.budget_bytes[step],
            weight_bytes=self._weight_bytes,
            arrived=n[kernel.NEXT_ARRIVAL],
            arrived_prompt_tokens=n[kernel.ARRIVED_PROMPT_TOKENS],
            first_tokens=n[kernel.FIRST_TOKENS],
            ttft_sum_s=f[kernel.TTFT_SUM],
            produced_tokens=n[kernel.PRODUCED_TOKENS],
            finished=n[kernel.N_FINISHED],
            rejected=n[kernel.N_REJECTED],
            preemptions=n[kernel.PREEMPTIONS],
            iterations=n[kernel.N_ITERATIONS],
            busy_s=f[kernel.BUSY],
            next_budget_bytes=budget.budget_bytes[step + 1] if announced else budget.budget_bytes[step],
            next_budget_s=budget.change_s[step + 1] if announced else math.inf,
            budget_violation_s=self._violation_s,
            incoming_bytes=self._incoming_bytes(),
            plan=self._plan,
            target=self._decided[1] if self._decided is not None else self._target,
        )


def _empty_state(model: ModelSpec, latency: LatencyModel, config: EngineConfig, keep_iterations: bool) -> kernel.State:
    """Return the kernel's state of a replica without requests, plan or memory."""
    limits, layers, slots = config.limits, model.num_layers, config.limits.max_running
    state = kernel.State(
        ints=np.zeros(kernel.N_INTS, dtype=np.int64),
        floats=np.zeros(kernel.N_FLOATS),
        request_i=np.zeros((0, kernel.REQUEST_INTS), dtype=np.int64),
        request_f=np.zeros((0, kernel.REQUEST_FLOATS)),
        queue=np.zeros(0, dtype=np.int64),
        slots=np.zeros((kernel.SLOT_ROWS, slots + 1), dtype=np.int64),
        cohort_s=np.zeros(slots + 2),
        phases=np.zeros(config.kv_block_tokens, dtype=np.int64),
        runs=np.zeros((2, 4 * slots + 16), dtype=np.int64),
        sets=np.zeros((4, kernel.SET_COLUMNS + layers), dtype=np.int64),
        set_nll=np.zeros((4, 2)),
        log=np.zeros((1024, kernel.LOG_COLUMNS)),
        gaps=np.zeros((1024 + 4 * slots, 2)),
        block_counts=np.zeros((len(WEIGHT_BITS), 4), dtype=np.int64),
        layer_rows=np.zeros((layers, 3), dtype=np.int64),
        rows=np.zeros((layers, 7), dtype=np.int64),
        keeps=np.zeros((1, layers), dtype=np.int64),
        data=latency.tables.data,
        layout=latency.tables.layout,
    )
    n, f = state.ints, state.floats
    n[kernel.CHUNKED] = config.scheduler == "chunked"
    n[kernel.MAX_BATCH_TOKENS], n[kernel.LONG_PREFILL_TOKENS] = limits.max_batch_tokens, limits.long_prefill_tokens
    n[kernel.RESERVE_FULL_PROMPT], n[kernel.BLOCK_TOKENS] = limits.reserve_full_prompt, config.kv_block_tokens
    n[kernel.REUSE], n[kernel.KEEP_LOG] = config.reuse_preempted_kv, keep_iterations
    n[kernel.MAX_RUNNING], n[kernel.ADMIT], n[kernel.PLAN_KEEP] = slots, -1, -1
    n[kernel.NEXT_DUE], n[kernel.COHORTS] = kernel.NEVER, 1
    f[kernel.NEXT_ARRIVAL_S], f[kernel.END], f[kernel.START] = math.inf, math.nan, math.nan
    state.slots[kernel.NEXT, slots] = state.slots[kernel.PREVIOUS, slots] = slots
    state.slots[kernel.FREE_SLOT, :slots] = np.arange(slots)
    state.slots[kernel.DUE] = kernel.NEVER
    return state


_A = TypeVar("_A", bound=np.generic)


def _longer(array: NDArray[_A], rows: int) -> NDArray[_A]:
    """Return a copy with so many rows, zero in the new ones."""
    longer = np.zeros((rows, *array.shape[1:]), dtype=array.dtype)
    longer[: len(array)] = array
    return longer


def exact_delay(now_s: float, time_s: float) -> float:
    """Return the longest delay that takes SimPy's clock from ``now_s`` not beyond ``time_s``.

    ``now + (time - now)`` can miss ``time`` by a rounding step either way. Where no delay leads there at once, a second
    one from where the first led does: ask again until the clock stands there.
    """
    delay_s = time_s - now_s
    while now_s + delay_s < time_s:
        delay_s = math.nextafter(delay_s, math.inf)
    while now_s + delay_s > time_s:
        delay_s = math.nextafter(delay_s, 0.0)
    return delay_s
