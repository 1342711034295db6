"""The Engine protocol, what a policy may see of an engine, and the simulated engine.

``SimEngine`` lives on SimPy's clock and serves with the compiled kernel (sim/engine/kernel), which changes plans and memory
too; what follows from a plan that it meets for the first time is worked out in sim/engine/plan_graph.py.
``tests/sim/engine/plain_engine.py`` takes one iteration a SimPy event, with Python objects and no shortcut; the records of
both are equal.

Order of what happens at one instant: the budget changes, requests arrive, an iteration ends, the policy decides, plans
and memory follow, the next iteration starts. Requests that arrive together keep the order of the trace.

Rules for changing plans (sim/engine/transition.py says what is copied when):

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

Rules of the prefix cache (``prefix_caching``), as vLLM V1's but by the trace's hash ids. One stands for a **unit**:
``hash_block_tokens`` tokens of a prompt, and that all before them are the same.

1. A unit is found by requests that are admitted once a prefill has passed its end. They hold the longest run of their
   prompt's leading units together with all who do; it is in the pool once. What is found is not computed; at least one
   token is, so a unit that ends a prompt is computed again. A unit that lies partly in a prompt does not count.
2. What two compute at once stays with the second as its own; the units after it are found if they are new.
3. A request that ends or is preempted frees its own KV blocks first, then its units from the last to the first. Those
   that nobody holds any more are free and still found; the longest free are taken first, and a unit is gone with the
   first of its KV blocks. With ``reuse_preempted_kv`` a preempted request finds more: its own after all its units.
4. When the MHA blocks that prefill runs change, nothing from before is found again: it is other KV. Those that run hold
   their units on, without the layers that prefill drops, and put nothing more into the cache. Other precisions or FFN
   blocks leave it, as they leave the KV of those that run.
5. While prefill and decode run different MHA blocks, or a plan keeps not all tokens (``kv_keep``), nothing is cached or
   found; as such a plan comes and as it goes, all is forgotten. Who holds units keeps all tokens, and the layers of its
   units that prefill runs.
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
from sim.cost.memory import kv_block_layer_bytes, weight_bytes
from sim.cost.model_spec import ModelSpec
from sim.cost.plan import WEIGHT_BITS, Plan, check_plan, dense_plan, describe
from sim.engine import kernel
from sim.engine.budget import Budget, constant_budget
from sim.engine.plan_graph import PlanBook, layers_of
from sim.engine.protocol import GIB, EngineConfig, EngineState, Holder, Request
from sim.errors import BudgetError, ConfigError
from sim.results.records import Iterations, Records, TokenGaps, Transitions
from sim.types import Floats, Ints

MEMORY_OF_PLANS = 16384
"""Plans, and steps between them, that an engine remembers."""


_SAVED = (
    "ints",
    "floats",
    "slots",
    "cohort_s",
    "phases",
    "runs",
    "prompts",
    "held_units",
    "unit_of",
    "units",
    "sets",
    "set_nll",
    "block_counts",
    "layer_rows",
    "schedule",
)
"""Arrays that a snapshot copies whole."""


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
    open_change: Floats
    submits: int
    book: PlanBook
    described: int


class SimEngine:
    """One replica on SimPy's clock, served by the compiled kernel.

    ``tests/sim/engine/plain_engine.py`` is the same engine, one SimPy event an iteration; the records of both are equal.
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
        book: PlanBook | None = None,
        env: simpy.Environment | None = None,
        driven: bool = False,
    ) -> None:
        """Build an idle engine.

        Args:
            model: what is served. latency: its price on one device. config: how it serves.
            plan: what runs first; its weights are there already.
            budget_bytes: what weights, workspace and KV cache may hold together, constant or over time.
            workspace_bytes: activations and the like, part of the budget that neither weights nor KV can use.
            host_to_device_bytes_per_s: how fast weights are copied in.
            copy_slowdown: by what share an iteration takes longer that starts while weights are copied in.
            quality_nll: nats a token that a plan costs (``sim.cost.quality``), charged to requests; None charges nothing.
            keep_iterations: whether ``iterations()`` has a row for each; without, it stays empty and memory is saved.
            book: what is known of plans of this model at this ``quality_nll``, shared with other engines; a new one by
                default.
            env: the SimPy environment to live in; a new one by default. It begins to serve at that clock's present.
            driven: whether its owner calls the kernel on its ``table`` (sim/engine/batch_step.py, sim/cluster/cluster.py).
        Raises:
            PlanError: for a plan that is not legal for the model.
            CalibrationError: for a plan with a precision that was not measured.
            BudgetError: when the budget cannot hold the weights and one request at the start.
        """
        if book is not None and (book.model != model or book.quality_nll != quality_nll):
            raise ConfigError("the plan book given is of another model or quality; give the one it was made with")
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
        self._quality_nll = quality_nll
        self._dense_weight_bytes = weight_bytes(model, dense_plan(model))
        self._book = PlanBook(model, quality_nll) if book is None else book
        self._book_version = self._book.version
        self._state = _empty_state(model, latency, config, self.budget, self._book, keep_iterations)
        self._table = kernel.table_of(self._state)
        n, f = self._state.ints, self._state.floats
        n[kernel.WORKSPACE_BYTES] = workspace_bytes
        n[kernel.PRICED] = quality_nll is not None
        f[kernel.COPY_SLOWDOWN], f[kernel.COPY_BYTES_PER_S] = copy_slowdown, host_to_device_bytes_per_s
        f[kernel.VIOLATION_SINCE] = f[kernel.NOW] = self.env.now
        n[kernel.BUDGET_STEP] = bisect_right(self.budget.change_s, self.env.now) - 1
        self._output_tokens: list[Ints] = []  # of each call of submit
        self._unit_numbers: dict[int, int] = {}  # what the kernel calls a hash id
        self._checked: dict[int, tuple[Plan, int]] = {}  # plans that are legal, by identity, and their numbers
        self._described: list[tuple[str, str]] = []  # plan changes that an earlier book knew

        self._wake: simpy.Event | None = None
        self._resume: simpy.Event | None = None
        self._hold_at_s = math.nan

        first = self._book.first(self.target_of(plan))
        while not kernel.run_step(self.table, first, float(self.env.now)):
            self._work_out()
        kernel.resize_to_budget(self._table)
        self._context_limit = self._find_context_limit()
        if not driven:
            self.env.process(self._serve())

    # -- the Engine protocol -------------------------------------------------------------------------------------

    def submit(self, requests: Sequence[Request]) -> None:
        """Hand over requests, sorted by arrival and not before the present."""
        self.submit_arrays(
            np.array([r.arrival_s for r in requests], dtype=np.float64),
            np.array([r.prompt_tokens for r in requests], dtype=np.int64),
            np.array([r.output_tokens for r in requests], dtype=np.int64),
            [np.array(r.hash_ids, dtype=np.int64) for r in requests] if self.config.prefix_caching else None,
        )

    def submit_arrays(
        self,
        arrival_s: Floats,
        prompt_tokens: Ints,
        output_tokens: Ints,
        hash_ids: Sequence[Ints] | None = None,
    ) -> None:
        """Hand over requests as ``submit`` does, one entry each in every array; numbered on from those before.

        Args:
            hash_ids: of each prompt, for the prefix cache; without one they do not count.
        Raises:
            ConfigError: for arrivals out of order or in the past, for ``prefix_caching`` without hash ids.
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
        self.reserve(total)
        rows = slice(first, total)
        if self.config.prefix_caching:
            hash_at, ids = self._keep_hash_ids(hash_ids)
            units = np.minimum(prompt_tokens // self.config.hash_block_tokens, ids)
            self._state.prompts[rows] = np.stack([hash_at, units, np.full_like(units, -1)], axis=1)
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
        target = self.target_of(plan)
        kernel.take_decisions(self._table, float(self.env.now))
        n = self._state.ints
        if target == (n[kernel.DECIDED] if n[kernel.DECIDED] >= 0 else n[kernel.TARGET]):
            return
        n[kernel.DECIDED], self._state.floats[kernel.DECIDED_S] = target, self.env.now
        self._wake_up()

    def apply_at(self, time_s: Sequence[float], plans: Sequence[Plan]) -> None:
        """Make each plan what shall run from its moment on, as ``apply`` does then; for decisions known beforehand.

        What is applied by ``apply`` meanwhile holds until the next of these moments. While no request is there or to
        come nothing is decided.

        Args:
            time_s: moments, ascending, none before the present or before those of an earlier call. plans: one each.
        Raises:
            ConfigError: for moments out of order. PlanError, CalibrationError: as ``apply``; then none is taken.
        """
        if len(time_s) != len(plans):
            raise ConfigError(f"{len(time_s)} moments for {len(plans)} plans; give one for each")
        state, n = self._state, self._state.ints
        first = int(n[kernel.N_DECISIONS])
        moments = np.asarray(time_s, dtype=np.float64)
        least_s = max(self.env.now, float(state.schedule_s[first - 1])) if first else self.env.now
        late = np.flatnonzero(~(moments >= np.concatenate([[least_s], moments[:-1]])))
        if len(late):
            raise ConfigError(
                f"decision {int(late[0])} is for {moments[late[0]]} s, before another one or the present; "
                "give the moments in ascending order"
            )
        targets = [self.target_of(plan) for plan in plans]
        total = first + len(targets)
        if total > len(state.schedule):
            room = max(total, 2 * len(state.schedule))
            self._replace(
                schedule_s=kernel.longer(state.schedule_s, room), schedule=kernel.longer(state.schedule, room)
            )
        self._state.schedule_s[first:total], self._state.schedule[first:total] = moments, targets
        n[kernel.N_DECISIONS] = total
        at = int(n[kernel.NEXT_DECISION])
        self._state.floats[kernel.NEXT_DECISION_S] = self._state.schedule_s[at] if at < total else math.inf
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
        now_s = float(env.now if math.isinf(time_s) else time_s)
        kernel.follow_budget(self._table, now_s)
        if self._state.floats[kernel.NEXT_ARRIVAL_S] <= now_s:
            kernel.take_arrivals(self._table, now_s)
        if kernel.take_decisions(self._table, now_s):
            self._wake_up()
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
        arrived = int(self._state.ints[kernel.NEXT_ARRIVAL])
        outputs = np.concatenate(self._output_tokens) if self._output_tokens else np.zeros(0, dtype=np.int64)
        return self.records_of(slice(0, arrived), outputs[:arrived])

    def records_of(self, which: slice | Ints, output_tokens: Ints) -> Records:
        """Return the rows of some requests, by their places in the order in which they were handed over.

        Args:
            which: int64[n]. output_tokens: int64[n], what the trace asked for.
        """
        kernel.settle(self._table)
        ints, floats = self._state.request_i[which], self._state.request_f[which]
        produced = ints[:, kernel.PRODUCED].copy()
        tokens = np.where(produced > 0, produced, np.nan)
        nll_sum = floats[:, kernel.NLL_SUM] if self._quality_nll is not None else np.full(len(ints), np.nan)
        return Records(
            arrival_s=floats[:, kernel.ARRIVAL_S].copy(),
            prompt_tokens=ints[:, kernel.PROMPT].copy(),
            output_tokens=output_tokens,
            produced_tokens=produced,
            admitted_s=floats[:, kernel.ADMITTED_S].copy(),
            first_token_s=floats[:, kernel.FIRST_S].copy(),
            finish_s=floats[:, kernel.FINISH_S].copy(),
            preemptions=ints[:, kernel.PREEMPTED].copy(),
            status=ints[:, kernel.STATUS].copy(),
            kept_params_share=ints[:, kernel.KEPT_PARAMS] / (tokens * self._model.total_params),
            quality_nll=nll_sum / tokens,
            cached_tokens=np.maximum(self._state.prompts[which, kernel.CACHED], 0)
            if self.config.prefix_caching
            else np.zeros(len(ints), dtype=np.int64),
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
        rows = self._state.changes[: self._state.ints[kernel.N_CHANGES]]
        described = [*self._described, *self._describe(len(self._described))]

        def ints(column: int) -> Ints:
            return rows[:, column].astype(np.int64)

        return Transitions(
            time_s=rows[:, kernel.CHANGE_S].copy(),
            from_plan=tuple(before for before, _ in described),
            to_plan=tuple(after for _, after in described),
            bytes_in=ints(kernel.CHANGE_BYTES_IN),
            bytes_freed=ints(kernel.CHANGE_BYTES_FREED),
            ready_s=rows[:, kernel.CHANGE_READY_S].copy(),
            preempted=ints(kernel.CHANGE_VICTIMS),
            recomputed_tokens=ints(kernel.CHANGE_RECOMPUTED),
            kv_blocks_before=ints(kernel.CHANGE_BLOCKS_BEFORE),
            kv_blocks_after=ints(kernel.CHANGE_BLOCKS_AFTER),
        )

    def _describe(self, first: int) -> list[tuple[str, str]]:
        """Return what ran before and what was wanted, from a plan change on that the present book knows."""
        columns = [kernel.CHANGE_FROM, kernel.CHANGE_TO]
        pairs = self._state.changes[first : self._state.ints[kernel.N_CHANGES], columns].astype(np.int64).tolist()
        book, words = self._book, dict.fromkeys(map(tuple, pairs), ("", ""))
        for before, after in words:
            words[before, after] = describe(book.plan(before)), describe(book.target_plan(after))
        return [words[before, after] for before, after in pairs]

    @property
    def requests(self) -> int:
        """Requests handed over so far."""
        return int(self._state.ints[kernel.N_REQUESTS])

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
                    mha=layers_of(self._state.sets[slots[kernel.SET, i], kernel.SET_COLUMNS :]),
                    tokens=tokens,
                    layer_blocks=kernel.blocks_of(self._table, i, tokens + under_way.get(i, int(decodes_now))),
                    decoding=bool(row[kernel.COMPUTED] >= row[kernel.PREFILL]),
                )
            )
            i = int(slots[kernel.NEXT, i])
        return found

    @property
    def shared_layer_blocks(self) -> int:
        """KV blocks of the prefix cache's units that requests hold, each counted once however many hold it."""
        units = self._state.units[1 : self._state.ints[kernel.N_UNITS] + 1]
        held = units[units[:, kernel.UNIT_HOLDERS] > 0]
        layers = self._state.sets[held[:, kernel.UNIT_SET], kernel.LAYERS]
        return int(layers.sum()) * int(self._state.ints[kernel.UNIT_BLOCKS])

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
            arrays=tuple(getattr(state, name).copy() for name in _SAVED),
            live=live,
            live_i=state.request_i[live],
            live_f=state.request_f[live],
            open_change=state.changes[n[kernel.OPEN_CHANGE]].copy(),
            submits=len(self._output_tokens),
            book=self._book,
            described=len(self._described),
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
        for name, saved in zip(_SAVED, snapshot.arrays, strict=True):
            array = getattr(state, name)
            if name in ("held_units", "unit_of", "units"):
                array[len(saved) :] = 0  # ids that came later
            array[tuple(slice(length) for length in saved.shape)] = saved
        state.request_i[snapshot.live], state.request_f[snapshot.live] = snapshot.live_i, snapshot.live_f
        state.changes[state.ints[kernel.OPEN_CHANGE]] = snapshot.open_change
        del self._output_tokens[snapshot.submits :]
        if self._book is not snapshot.book:
            self._checked.clear()
            self._book, self._book_version = snapshot.book, -1
        del self._described[snapshot.described :]
        self.env = simpy.Environment(initial_time=snapshot.time_s)
        self._wake = self._resume = None
        self._hold_at_s = math.nan
        self.env.process(self._serve())

    def kept_share(self) -> tuple[tuple[float, float], ...]:
        """Return (time_s, share of the dense weights' bytes that is resident), one entry a change."""
        rows = self._state.shares[: self._state.ints[kernel.N_SHARES]].tolist()
        return tuple((time_s, held_bytes / self._dense_weight_bytes) for time_s, held_bytes in rows)

    @property
    def budget_violation_s(self) -> float:
        """Seconds so far in which more was held than the budget allows."""
        return float(self._state.floats[kernel.VIOLATION])

    # -- for a driver of many: sim/cluster/cluster.py ------------------------------------------------------------------------

    @property
    def context_limit(self) -> int:
        """Tokens of prompt and output together that one request may reach here."""
        return self._context_limit

    @property
    def model(self) -> ModelSpec:
        """What is served."""
        return self._model

    @property
    def now_s(self) -> float:
        """When its last iteration ended, or it was given something to do."""
        return float(self._state.floats[kernel.NOW])

    def rows(self, which: Ints) -> tuple[Ints, Floats]:
        """Return copies of the kernel's rows of some requests, up to date (``request_i`` and ``request_f``)."""
        kernel.settle(self._table)
        return self._state.request_i[which], self._state.request_f[which]

    def use_hash_ids(self, numbers: Ints) -> None:
        """Let the prefix cache know all hash ids that there will be, as ``unit_numbers`` returns them."""
        state = self._state
        held = max(len(numbers), len(state.held_units))
        ids = max(int(numbers.max(initial=-1)) + 1, len(state.unit_of))
        self._replace(
            hash_ids=numbers,
            held_units=kernel.longer(state.held_units, held),
            unit_of=kernel.longer(state.unit_of, ids),
            units=kernel.longer(state.units, 1 + ids + held),  # each is found by an id or held in a place
        )

    def _keep_hash_ids(self, hash_ids: Sequence[Ints] | None) -> tuple[Ints, Ints]:
        """Put the hash ids of further requests behind those before; return where each one's begin, and how many."""
        n, known = self._state.ints, int(self._state.ints[kernel.N_HASH_IDS])
        numbers = unit_numbers(hash_ids, self._unit_numbers)
        counts = np.array([len(ids) for ids in hash_ids or ()], dtype=np.int64)
        self.use_hash_ids(np.concatenate([self._state.hash_ids[:known], numbers]))
        n[kernel.N_HASH_IDS] = known + len(numbers)
        return known + np.cumsum(counts) - counts, counts

    def reserve(self, requests: int) -> None:
        """Make room for so many requests in all."""
        room = len(self._state.request_i)
        if requests > room:
            room = max(requests, 2 * room)
            self._replace(
                request_i=kernel.longer(self._state.request_i, room),
                request_f=kernel.longer(self._state.request_f, room),
                prompts=kernel.longer(self._state.prompts, room if self.config.prefix_caching else 0),
                queue=kernel.longer(self._state.queue, room),
            )

    def observe(self, now_s: float) -> EngineState:
        """Return what can be seen at a moment to which it has been brought; its budget is followed to there."""
        kernel.follow_budget(self._table, now_s)
        return self._observe(now_s)

    # -- serving -------------------------------------------------------------------------------------------------

    def _serve(self) -> Generator[simpy.Event, Any, None]:
        env, f = self.env, self._state.floats
        while True:
            while env.now == self._hold_at_s:  # a policy decides now, before the next iteration starts
                self._resume = env.event()
                yield self._resume
            now_s = env.now
            f[kernel.NOW] = now_s
            horizon_s = env.peek()  # nothing else can touch this replica before then
            if now_s < self._hold_at_s < horizon_s:
                horizon_s = self._hold_at_s
            while True:
                why = kernel.advance(self.table, horizon_s)
                if why not in (kernel.GROW, kernel.NEEDS):
                    break
                self.unblock(why)
            now_s = float(f[kernel.NOW])
            if now_s == env.now and why == kernel.HORIZON:
                yield env.timeout(0.0)  # others' turn at this moment
            while now_s > env.now:
                yield env.timeout(exact_delay(env.now, now_s))
            if why == kernel.DONE and env.now != self._hold_at_s:
                yield self._next_event()

    def _next_event(self) -> simpy.Event:
        """Return what an engine waits for that nothing will happen to by itself: a copy's end, a call from outside."""
        self._wake = self.env.event()
        copy_end_s = float(self._state.floats[kernel.COPY_END])
        if math.isinf(copy_end_s):
            return self._wake
        return self._wake | self.env.timeout(exact_delay(self.env.now, copy_end_s))

    def _wake_up(self) -> None:
        if self._wake is not None and not self._wake.triggered:
            self._wake.succeed()
        self._wake = None

    def _waiting(self) -> int:
        n = self._state.ints
        return int(n[kernel.STACKED] + n[kernel.QUEUE_TAIL] - n[kernel.QUEUE_HEAD])

    def _make_room(self) -> None:
        """Let the logs grow."""
        state, n = self._state, self._state.ints
        if n[kernel.N_LOG] == len(state.log):
            self._replace(log=kernel.longer(state.log, 2 * len(state.log)))
        elif n[kernel.N_CHANGES] == len(state.changes) or n[kernel.N_SHARES] + 2 > len(state.shares):
            self._replace(
                changes=kernel.longer(state.changes, 2 * len(state.changes)),
                shares=kernel.longer(state.shares, 2 * len(state.shares)),
            )
        else:
            self._replace(gaps=kernel.longer(state.gaps, 2 * len(state.gaps)))

    def _replace(self, **arrays: NDArray[Any]) -> None:
        """Give the state other arrays, longer ones."""
        self._state = self._state._replace(**arrays)
        self._table = kernel.table_of(self._state)

    # -- plans ---------------------------------------------------------------------------------------------------

    def target_of(self, plan: Plan) -> int:
        """Return the number of a plan in the present ``book``; it is checked when it is met for the first time.

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
        number = self._book.target(plan)
        self._checked[id(plan)] = plan, number
        return number

    @property
    def book(self) -> PlanBook:
        """What is known of plans; another one when it had grown too long."""
        return self._book

    @property
    def table(self) -> kernel.Table:
        """Where the kernel finds everything; ask again after ``unblock``, ``submit`` and whenever the book grew."""
        book = self._book
        if self._book_version != book.version:
            self._book_version = book.version
            self._replace(
                steps=book.steps,
                copies=book.copies,
                decisions=book.decisions,
                prices=book.prices,
                price_nll=book.price_nll,
                keeps=book.keeps,
            )
        return self._table

    def unblock(self, why: int) -> None:
        """Do what the kernel cannot: let the logs grow (``GROW``), or work out what it never met before (``NEEDS``)."""
        if why == kernel.GROW:
            self._make_room()
            return
        if len(self._book) > MEMORY_OF_PLANS:
            self._begin_new_book()
        else:
            self._work_out()

    def _work_out(self) -> None:
        """Let the book say what the kernel has not met before."""
        n = self._state.ints
        step, at = int(n[kernel.NEEDED_STEP]), int(n[kernel.NEEDED_AT])
        if n[kernel.NEEDED] == kernel.DECISION:
            self._book.decide(step, at)
        elif n[kernel.NEEDED] == kernel.JOIN:
            self._book.join(step, at)
        else:
            self._book.price(step, self._state.drafts[at].tolist())

    def _begin_new_book(self) -> None:
        """Forget all plans but those that are under way: a policy may think of new ones for ever."""
        n, old = self._state.ints, self._book
        new = PlanBook(self._model, self._quality_nll)
        self._described += self._describe(len(self._described))
        decided = int(n[kernel.DECIDED])
        ahead = slice(int(n[kernel.NEXT_DECISION]), int(n[kernel.N_DECISIONS]))
        schedule = [new.target(old.target_plan(target)) for target in self._state.schedule[ahead].tolist()]
        self._state.schedule[ahead] = schedule
        if decided >= 0:
            n[kernel.DECIDED] = new.target(old.target_plan(decided))
        copy = int(n[kernel.COPY])
        same = copy - int(old.steps[n[kernel.STEP], kernel.STEP_COPIES_AT])
        n[kernel.STEP] = new.taken_from(old, int(n[kernel.STEP]))
        n[kernel.TARGET] = new.steps[n[kernel.STEP], kernel.STEP_TARGET]
        n[kernel.PLAN_KEEP] = new.steps[n[kernel.STEP], kernel.STEP_KEEP]
        if copy >= 0:
            n[kernel.COPY] = int(new.steps[n[kernel.STEP], kernel.STEP_COPIES_AT]) + same
        self._checked.clear()
        self._book, self._book_version = new, -1

    # -- memory --------------------------------------------------------------------------------------------------

    def _find_context_limit(self) -> int:
        """Return the longest context one request may reach, so that it fits the first pool alone, as vLLM demands."""
        n = self._state.ints
        limit = self.config.max_context_tokens or self._model.max_context_tokens
        layers = int(self._state.sets[0, kernel.LAYERS])  # those that prefill runs
        if layers:
            blocks = int(n[kernel.POOL] - n[kernel.WATERMARK]) // layers
            limit = min(limit, blocks * self.config.kv_block_tokens)
        budget_bytes = self.budget.budget_bytes[n[kernel.BUDGET_STEP]]
        held_bytes, workspace_bytes = int(n[kernel.WEIGHT_BYTES]), int(n[kernel.WORKSPACE_BYTES])
        if limit < 2 or held_bytes + workspace_bytes > budget_bytes:
            raise BudgetError(
                f"weights {held_bytes / GIB:.2f} GiB and workspace {workspace_bytes / GIB:.2f} GiB leave "
                f"no room for the KV cache of one request in a budget of {budget_bytes / GIB:.2f} GiB; prune or "
                "quantise more blocks, or raise the budget (budget=, gpu=)"
            )
        return limit

    # -- what can be seen ----------------------------------------------------------------------------------------

    def _observe(self, now_s: float) -> EngineState:
        n, f = self._state.ints.tolist(), self._state.floats.tolist()
        waiting = n[kernel.STACKED] + n[kernel.QUEUE_TAIL] - n[kernel.QUEUE_HEAD]
        oldest_wait_s = 0.0
        if waiting:
            oldest_wait_s = now_s - float(self._state.request_f[kernel.head(self._table), kernel.ARRIVAL_S])
        step, budget = n[kernel.BUDGET_STEP], self.budget
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
            weight_bytes=n[kernel.WEIGHT_BYTES],
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
            budget_violation_s=f[kernel.VIOLATION],
            incoming_bytes=n[kernel.INCOMING_BYTES],
            plan=self._book.plan(n[kernel.STEP]),
            target=self._book.target_plan(n[kernel.DECIDED] if n[kernel.DECIDED] >= 0 else n[kernel.TARGET]),
        )


def _empty_state(
    model: ModelSpec,
    latency: LatencyModel,
    config: EngineConfig,
    budget: Budget,
    book: PlanBook,
    keep_iterations: bool,
) -> kernel.State:
    """Return the kernel's state of a replica without requests, plan or memory."""
    limits, layers, slots = config.limits, model.num_layers, config.limits.max_running
    block_bytes, unit_blocks = (
        kv_block_layer_bytes(model, config.kv_block_tokens),
        config.hash_block_tokens // config.kv_block_tokens,
    )
    sets = 2 * slots + 4  # of the plan, and of each running request, now and after its prefill
    owners = slots  # of free KV blocks: requests that were preempted, units that nobody holds
    if config.prefix_caching:
        sets += slots  # of its units
        owners += max(budget.budget_bytes) // block_bytes // unit_blocks
    state = kernel.State(
        ints=np.zeros(kernel.N_INTS, dtype=np.int64),
        floats=np.zeros(kernel.N_FLOATS),
        request_i=np.zeros((0, kernel.REQUEST_INTS), dtype=np.int64),
        request_f=np.zeros((0, kernel.REQUEST_FLOATS)),
        queue=np.zeros(0, dtype=np.int64),
        slots=np.zeros((kernel.SLOT_ROWS, slots + 1), dtype=np.int64),
        cohort_s=np.zeros(slots + 2),
        phases=np.zeros(config.kv_block_tokens, dtype=np.int64),
        runs=np.zeros((2, 4 * owners + 16), dtype=np.int64),
        prompts=np.zeros((0, kernel.PROMPT_COLUMNS), dtype=np.int64),
        hash_ids=np.zeros(0, dtype=np.int64),
        held_units=np.zeros(0, dtype=np.int64),
        unit_of=np.zeros(0, dtype=np.int64),
        units=np.zeros((1, kernel.UNIT_COLUMNS), dtype=np.int64),
        sets=np.zeros((sets, kernel.SET_COLUMNS + book.words), dtype=np.int64),
        set_nll=np.zeros((sets, 2)),
        drafts=np.zeros((sets + 1, book.words), dtype=np.int64),
        narrowed=np.zeros((sets + 1, 4), dtype=np.int64),
        log=np.zeros((1024 if keep_iterations else 1, kernel.LOG_COLUMNS)),
        gaps=np.zeros((1024 + 4 * slots, 2)),
        block_counts=np.zeros((len(WEIGHT_BITS), 4), dtype=np.int64),
        layer_rows=np.zeros((layers, 3), dtype=np.int64),
        rows=np.zeros((layers, 7), dtype=np.int64),
        budget_s=np.array(budget.change_s),
        budget_bytes=np.array(budget.budget_bytes, dtype=np.int64),
        schedule_s=np.zeros(1),
        schedule=np.zeros(1, dtype=np.int64),
        changes=np.zeros((4, kernel.CHANGE_COLUMNS)),
        shares=np.zeros((16, 2)),
        steps=book.steps,
        copies=book.copies,
        decisions=book.decisions,
        prices=book.prices,
        price_nll=book.price_nll,
        keeps=book.keeps,
        data=latency.tables.data,
        layout=latency.tables.layout,
    )
    n, f = state.ints, state.floats
    n[kernel.CHUNKED] = config.scheduler == "chunked"
    n[kernel.MAX_BATCH_TOKENS], n[kernel.LONG_PREFILL_TOKENS] = limits.max_batch_tokens, limits.long_prefill_tokens
    n[kernel.RESERVE_FULL_PROMPT], n[kernel.BLOCK_TOKENS] = limits.reserve_full_prompt, config.kv_block_tokens
    n[kernel.REUSE], n[kernel.KEEP_LOG] = config.reuse_preempted_kv, keep_iterations
    n[kernel.RECOMPUTE], n[kernel.RUNNING_LIMIT] = config.restore == "recompute", slots
    n[kernel.WATERMARK_LIMIT], f[kernel.WATERMARK_SHARE] = limits.watermark_layer_blocks, config.kv_watermark_share
    n[kernel.BLOCK_BYTES] = block_bytes
    n[kernel.PREFIX_CACHING], n[kernel.KEEP_RUNS] = config.prefix_caching, n[kernel.REUSE] or config.prefix_caching
    n[kernel.UNIT_TOKENS], n[kernel.UNIT_BLOCKS] = config.hash_block_tokens, unit_blocks
    n[kernel.STEP] = n[kernel.DECIDED] = n[kernel.COPY] = n[kernel.OPEN_CHANGE] = -1
    n[kernel.NEXT_DUE], n[kernel.COHORTS] = kernel.NEVER, 1
    f[kernel.NOTICE] = budget.notice_s
    f[kernel.NEXT_ARRIVAL_S] = f[kernel.NEXT_DECISION_S] = f[kernel.COPY_END] = math.inf
    f[kernel.END] = f[kernel.START] = math.nan
    state.slots[kernel.NEXT, slots] = state.slots[kernel.PREVIOUS, slots] = slots
    state.slots[kernel.FREE_SLOT, :slots] = np.arange(slots)
    state.slots[kernel.DUE] = kernel.NEVER
    return state


def unit_numbers(hash_ids: Sequence[Ints] | None, known: dict[int, int] | None = None) -> Ints:
    """Return hash ids, one request's after the other's, as numbers from 0 on.

    Args:
        hash_ids: of each request. known: number of each id met before; those that are new are added.
    Raises:
        ConfigError: for None, and for a prompt in which an id comes twice.
    """
    if hash_ids is None:
        raise ConfigError(
            "engine.prefix_caching is true and the requests have no hash ids to find KV by; those of "
            "trace=mooncake_conversation and mooncake_synthetic have, and those of trace=file with a column hash_ids: "
            "take one of these, or set engine.prefix_caching=false"
        )
    flat = np.concatenate([*hash_ids, np.zeros(0, dtype=np.int64)]).astype(np.int64)
    ids, numbers = np.unique(flat, return_inverse=True)
    whose = np.repeat(np.arange(len(hash_ids)), [len(row) for row in hash_ids])
    places, counts = np.unique(whose * (len(ids) + 1) + numbers, return_counts=True)
    if (counts > 1).any():
        request, number = divmod(int(places[np.argmax(counts)]), len(ids) + 1)
        raise ConfigError(
            f"hash id {ids[number]} comes twice in the prompt of request {request}; with engine.prefix_caching each id "
            "stands for its tokens and all before them, so that it can come once"
        )
    if known is None:
        return numbers.astype(np.int64)
    renumbered = np.array([known.setdefault(i, len(known)) for i in ids.tolist()], dtype=np.int64)
    return renumbered[numbers]


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
