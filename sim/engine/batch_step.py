"""Many engines stepped by one compiled call, without SimPy: for training, where a step has to be cheap.

`VectorEngines` holds n engines and returns what is observed of them as float64[n, SEEN_COLUMNS]. Each engine leaves the
same records as on SimPy's clock (tests/sim/engine/test_batch_step.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from sim.compiled import compiled
from sim.cost.plan import Plan
from sim.engine import kernel
from sim.engine.kernel import Table
from sim.engine.plan_graph import PlanGraph
from sim.engine.sim_engine import SimEngine
from sim.errors import ConfigError
from sim.types import Floats, Ints

# Columns of the observed state of an engine: the fields of sim.engine.protocol.EngineState with these names.
(
    TIME_S, WAITING, WAITING_TOKENS, OLDEST_WAIT_S, RUNNING, RUNNING_TOKENS, KV_LAYER_BLOCKS, KV_USED_LAYER_BLOCKS,
    BUDGET_BYTES, WEIGHT_BYTES, NEXT_BUDGET_BYTES, NEXT_BUDGET_S, INCOMING_BYTES,
    ARRIVED, ARRIVED_PROMPT_TOKENS, FIRST_TOKENS, TTFT_SUM_S, PRODUCED_TOKENS, BUSY_S, PREEMPTIONS, REJECTED, FINISHED,
    PRICED_S, ITERATIONS,
    SEEN_COLUMNS,
) = range(25)  # fmt: skip


class VectorEngines:
    """Engines that are stepped together.

    A plan is named by its index in ``plans``. All engines have the same model and latency and are built with
    ``external_clock=True``. Engines that share a plan graph compute the effect of each plan once.
    """

    def __init__(self, size: int, plans: Sequence[Plan]) -> None:
        """Begin with ``size`` empty places; ``place`` fills them."""
        self.plans = tuple(plans)
        self._engines: list[SimEngine | None] = [None] * size
        self._tables = np.zeros((size, len(kernel.REPLICA.arrays), 3), dtype=np.int64)
        self._versions: list[int] = [-1] * size
        self._graphs: list[PlanGraph | None] = [None] * size
        self._targets = np.zeros((size, len(self.plans)), dtype=np.int64)
        self._known: dict[int, tuple[PlanGraph, Ints]] = {}
        self._seen = np.zeros((size, SEEN_COLUMNS))

    def place(self, at: int, engine: SimEngine) -> None:
        """Put an engine in a place; it replaces the one there."""
        self._engines[at] = engine
        self._graphs[at] = None
        self._refresh(at)

    def engine(self, at: int) -> SimEngine:
        """Return the engine of a place.

        Raises:
            ConfigError: for a place that is empty.
        """
        engine = self._engines[at]
        if engine is None:
            raise ConfigError(f"place {at} has no engine; put one there with place({at}, engine)")
        return engine

    @property
    def tables(self) -> NDArray[np.int64]:
        """The addresses of each engine's arrays, for compiled code: int64[n, arrays of a replica, 3]."""
        return self._tables

    def step(self, wanted: Ints, until_s: Floats) -> Floats:
        """Apply a plan to each engine and serve until a time.

        Args:
            wanted: int64[n], indices in ``plans``; -1 keeps the plan.
            until_s: float64[n]; ``inf`` serves until nothing is left to do.
        Returns:
            float64[n, SEEN_COLUMNS], the states observed then; the same array each time.
        """
        for at, graph in enumerate(self._graphs):
            if graph is not None and graph.version != self._versions[at]:
                self._refresh(at)
        targets = np.where(wanted >= 0, self._targets[np.arange(len(wanted)), wanted], -1)
        at, resumed, moments = 0, False, np.asarray(until_s, dtype=np.float64)
        while (at := serve_all(self._tables, at, resumed, targets, moments, self._seen)) < len(targets):
            resumed = True
            engine = self.engine(at)
            engine.unblock(int(self._seen[at, 0]))
            self._refresh(at)
            for other, graph in enumerate(self._graphs):
                if graph is engine.graph and graph.version != self._versions[other]:
                    self._refresh(other)
        return self._seen

    def _refresh(self, at: int) -> None:
        """Read an engine's addresses again and, if its graph is another one, the numbers of the plans in it."""
        engine = self.engine(at)
        self._tables[at] = engine.table
        if self._graphs[at] is not engine.graph:
            self._graphs[at] = engine.graph
            known = self._known.get(id(engine.graph))
            if known is None:
                known = engine.graph, np.array([engine.target_of(plan) for plan in self.plans])
                in_use = {id(graph) for graph in self._graphs}
                self._known = {key: value for key, value in self._known.items() if key in in_use}
                self._known[id(engine.graph)] = known
            self._targets[at] = known[1]
        self._versions[at] = engine.graph.version


@compiled()
def serve_all(
    tables: NDArray[np.int64], first: int, resumed: bool, targets: Ints, until_s: Floats, seen: Floats
) -> int:
    """Serve the engines ``first`` to n - 1, each until its time, and write what is observed of them.

    Args:
        tables: int64[n, arrays, 3]. resumed: whether engine ``first`` stopped during an earlier call and was unblocked.
        targets: int64[n], numbers of the plans to apply, or -1; set to -1 once applied.
        until_s: float64[n]. seen: float64[n, SEEN_COLUMNS], written.
    Returns:
        n if all engines are done; otherwise the engine to unblock, with the reason in ``seen[engine, 0]``.
    """
    for at in range(first, len(tables)):
        s = tables[at]
        n = kernel.counters_of(s)
        if targets[at] >= 0:
            if targets[at] != kernel.wanted_target(s):
                n.decided_target, n.decided_s = targets[at], n.now_s
            targets[at] = -1
        why = kernel.STALLED
        # On SimPy's clock an idle engine sleeps until it is woken, and budget steps wait until then: do the same here.
        asleep = kernel.idle(s) and n.decided_target < 0
        if (resumed and at == first) or not asleep:
            why = kernel.advance(s, until_s[at])
        while why == kernel.STALLED and n.copy_end_s <= until_s[at] and n.copy_end_s < np.inf:
            n.now_s = max(n.now_s, n.copy_end_s)
            why = kernel.advance(s, until_s[at])
        if why == kernel.GROW or why == kernel.NEEDS:
            seen[at, 0] = why
            return at
        if why == kernel.STALLED and until_s[at] < np.inf:
            n.now_s = until_s[at]
        _observe(s, n.now_s, seen[at])
    return len(tables)


@compiled()
def observe_all(tables: NDArray[np.int64], now_s: float, seen: Floats) -> None:
    """Write what is observed of engines that have all advanced to ``now_s``.

    Args:
        tables: int64[n, arrays, 3]. seen: float64[n, SEEN_COLUMNS], written.
    """
    for at in range(len(tables)):
        _observe(tables[at], now_s, seen[at])


@compiled()
def _observe(s: Table, now_s: float, seen: Floats) -> None:
    """Write the observed state of one engine to ``seen`` (float64[SEEN_COLUMNS]), as ``SimEngine.run_until`` does."""
    n, budget = kernel.counters_of(s), kernel.budget_of(s)
    kernel.follow_budget(s, now_s)
    if kernel.queue_due_s(s) <= now_s:
        kernel.take_arrivals(s, now_s)
    kernel.take_decisions(s, now_s)
    waiting, here = kernel.waiting(s), budget[n.budget_step]
    seen[TIME_S], seen[WAITING], seen[WAITING_TOKENS] = now_s, waiting, n.waiting_tokens
    seen[OLDEST_WAIT_S] = now_s - kernel.requests_of(s)[kernel.head(s)].arrival_s if waiting > 0 else 0.0
    seen[RUNNING], seen[RUNNING_TOKENS] = n.running, n.running_tokens
    seen[KV_LAYER_BLOCKS], seen[KV_USED_LAYER_BLOCKS] = n.pool_blocks, n.pool_blocks - n.free_blocks
    seen[BUDGET_BYTES], seen[WEIGHT_BYTES] = here.budget_bytes, n.weight_bytes
    seen[NEXT_BUDGET_BYTES], seen[NEXT_BUDGET_S] = here.budget_bytes, np.inf
    step = n.budget_step + 1
    if step < len(budget) and budget[step].from_s - n.notice_s <= now_s:  # it has been announced
        seen[NEXT_BUDGET_BYTES], seen[NEXT_BUDGET_S] = budget[step].budget_bytes, budget[step].from_s
    seen[INCOMING_BYTES], seen[ARRIVED] = n.incoming_bytes, n.arrived
    seen[ARRIVED_PROMPT_TOKENS], seen[FIRST_TOKENS] = n.arrived_prompt_tokens, n.first_tokens
    seen[TTFT_SUM_S], seen[PRODUCED_TOKENS] = n.ttft_sum_s, n.produced_tokens
    seen[BUSY_S], seen[PREEMPTIONS] = n.busy_s, n.preemptions
    seen[REJECTED], seen[FINISHED] = n.rejected, n.finished
    seen[PRICED_S], seen[ITERATIONS] = n.priced_s, n.iterations
