"""Many engines stepped by one compiled call, without SimPy between: for training, where a step has to cost little.

Each engine leaves the very records that it leaves on SimPy's clock (tests/sim/engine/test_batch_step.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from sim.compiled import compiled
from sim.cost.plan import Plan
from sim.engine import kernel
from sim.engine.kernel import Table
from sim.engine.plan_graph import PlanBook
from sim.engine.sim_engine import SimEngine
from sim.errors import ConfigError
from sim.types import Floats, Ints

# Columns of what can be seen of an engine: the fields of sim.engine.protocol.EngineState with these names.
(
    TIME_S, WAITING, WAITING_TOKENS, OLDEST_WAIT_S, RUNNING, RUNNING_TOKENS, KV_LAYER_BLOCKS, KV_USED_LAYER_BLOCKS,
    BUDGET_BYTES, WEIGHT_BYTES, NEXT_BUDGET_BYTES, NEXT_BUDGET_S, INCOMING_BYTES,
    ARRIVED, ARRIVED_PROMPT_TOKENS, FIRST_TOKENS, TTFT_SUM_S, PRODUCED_TOKENS, BUSY_S, PREEMPTIONS, REJECTED, FINISHED,
    SEEN_COLUMNS,
) = range(23)  # fmt: skip


class Fleet:
    """Engines that are stepped together.

    Plans are named by their place in ``plans``. Engines are built with ``driven=True``, of one model and latency; those
    that share a plan book learn from each other what follows from a plan.
    """

    def __init__(self, size: int, plans: Sequence[Plan]) -> None:
        """Begin without engines; ``place`` puts them in."""
        self.plans = tuple(plans)
        self._engines: list[SimEngine | None] = [None] * size
        self._tables = np.zeros((size, len(kernel.State._fields), 3), dtype=np.int64)
        self._versions: list[int] = [-1] * size
        self._books: list[PlanBook | None] = [None] * size
        self._targets = np.zeros((size, len(self.plans)), dtype=np.int64)
        self._known: tuple[PlanBook, Ints] | None = None
        self._seen = np.zeros((size, SEEN_COLUMNS))

    def place(self, at: int, engine: SimEngine) -> None:
        """Put an engine in a place, whose former one is let go."""
        self._engines[at] = engine
        self._books[at] = None
        self._look_up(at)

    def engine(self, at: int) -> SimEngine:
        """Return the engine of a place.

        Raises:
            ConfigError: for a place that is empty.
        """
        engine = self._engines[at]
        if engine is None:
            raise ConfigError(f"place {at} of the fleet is empty; put an engine there with place({at}, engine)")
        return engine

    @property
    def tables(self) -> NDArray[np.int64]:
        """Where compiled code finds each engine: int64[n, arrays of a State, 3]."""
        return self._tables

    def step(self, wanted: Ints, until_s: Floats) -> Floats:
        """Let each engine run another plan from now on, and serve until a moment.

        Args:
            wanted: int64[n], places in ``plans``; -1 leaves the plan as it is.
            until_s: float64[n]; ``inf`` serves until nothing is left to do.
        Returns:
            float64[n, SEEN_COLUMNS], what can be seen then; the same array each time.
        """
        for at, book in enumerate(self._books):
            if book is not None and book.version != self._versions[at]:
                self._look_up(at)
        targets = np.where(wanted >= 0, self._targets[np.arange(len(wanted)), wanted], -1)
        at, resumed, moments = 0, False, np.asarray(until_s, dtype=np.float64)
        while (at := serve_all(self._tables, at, resumed, targets, moments, self._seen)) < len(targets):
            resumed = True
            engine = self.engine(at)
            engine.unblock(int(self._seen[at, 0]))
            self._look_up(at)
            for other, book in enumerate(self._books):
                if book is engine.book and book.version != self._versions[other]:
                    self._look_up(other)
        return self._seen

    def _look_up(self, at: int) -> None:
        """Bring up to date what is known of an engine: where its arrays are, and how its book numbers the plans."""
        engine = self.engine(at)
        self._tables[at] = engine.table
        if self._books[at] is not engine.book:
            self._books[at] = engine.book
            if self._known is None or self._known[0] is not engine.book:
                self._known = engine.book, np.array([engine.target_of(plan) for plan in self.plans])
            self._targets[at] = self._known[1]
        self._versions[at] = engine.book.version


@compiled()
def serve_all(
    tables: NDArray[np.int64], first: int, resumed: bool, targets: Ints, until_s: Floats, seen: Floats
) -> int:
    """Serve every engine from ``first`` on until its moment and say what can be seen of it.

    Args:
        tables: int64[n, arrays, 3]. resumed: whether the first of them was stopped in the middle, and unblocked since.
        targets: int64[n], plans wanted from now on, or -1; -1 once that is settled.
        until_s: float64[n]. seen: float64[n, SEEN_COLUMNS], written.
    Returns:
        n when all is done; else which engine has to be unblocked first: its ``seen`` begins with why.
    """
    for at in range(first, len(tables)):
        s = tables[at]
        n, f = kernel.ints_of(s), kernel.floats_of(s)
        if targets[at] >= 0:
            wanted = n[kernel.DECIDED] if n[kernel.DECIDED] >= 0 else n[kernel.TARGET]
            if targets[at] != wanted:
                n[kernel.DECIDED], f[kernel.DECIDED_S] = targets[at], f[kernel.NOW]
            targets[at] = -1
        why = kernel.DONE
        if (resumed and at == first) or not _idle(n):
            why = kernel.advance(s, until_s[at])
        while why == kernel.DONE and f[kernel.COPY_END] <= until_s[at] and f[kernel.COPY_END] < np.inf:
            f[kernel.NOW] = max(f[kernel.NOW], f[kernel.COPY_END])
            why = kernel.advance(s, until_s[at])
        if why == kernel.GROW or why == kernel.NEEDS:
            seen[at, 0] = why
            return at
        if why == kernel.DONE and until_s[at] < np.inf:
            f[kernel.NOW] = until_s[at]
        _look(s, f[kernel.NOW], seen[at])
    return len(tables)


@compiled()
def look_at(tables: NDArray[np.int64], now_s: float, seen: Floats) -> None:
    """Say what can be seen of engines that have been brought to a moment.

    Args:
        tables: int64[n, arrays, 3]. now_s: the moment. seen: float64[n, SEEN_COLUMNS], written.
    """
    for at in range(len(tables)):
        _look(tables[at], now_s, seen[at])


@compiled(inline=True)
def _idle(n: Ints) -> bool:
    """Return whether an engine sleeps: nothing runs, waits or is to come, and no other plan is wanted."""
    here = n[kernel.N_RUNNING] + n[kernel.STACKED] + n[kernel.QUEUE_TAIL] - n[kernel.QUEUE_HEAD]
    return bool(here == 0 and n[kernel.NEXT_ARRIVAL] == n[kernel.N_REQUESTS] and n[kernel.DECIDED] < 0)


@compiled()
def _look(s: Table, now_s: float, seen: Floats) -> None:
    """Say what can be seen of an engine, as ``SimEngine.run_until`` does."""
    n, f = kernel.ints_of(s), kernel.floats_of(s)
    kernel.follow_budget(s, now_s)
    if f[kernel.NEXT_ARRIVAL_S] <= now_s:
        kernel.take_arrivals(s, now_s)
    kernel.take_decisions(s, now_s)
    waiting = n[kernel.STACKED] + n[kernel.QUEUE_TAIL] - n[kernel.QUEUE_HEAD]
    seen[TIME_S], seen[WAITING], seen[WAITING_TOKENS] = now_s, waiting, n[kernel.WAITING_TOKENS]
    seen[OLDEST_WAIT_S] = 0.0
    if waiting > 0:
        seen[OLDEST_WAIT_S] = now_s - kernel.request_f_of(s)[kernel.head(s), kernel.ARRIVAL_S]
    seen[RUNNING], seen[RUNNING_TOKENS] = n[kernel.N_RUNNING], n[kernel.RUNNING_TOKENS]
    seen[KV_LAYER_BLOCKS], seen[KV_USED_LAYER_BLOCKS] = n[kernel.POOL], n[kernel.POOL] - n[kernel.FREE]
    budget_s, budget_bytes, step = kernel.budget_s_of(s), kernel.budget_bytes_of(s), n[kernel.BUDGET_STEP]
    seen[BUDGET_BYTES], seen[WEIGHT_BYTES] = budget_bytes[step], n[kernel.WEIGHT_BYTES]
    seen[NEXT_BUDGET_BYTES], seen[NEXT_BUDGET_S] = budget_bytes[step], np.inf
    if step + 1 < len(budget_s) and budget_s[step + 1] - f[kernel.NOTICE] <= now_s:
        seen[NEXT_BUDGET_BYTES], seen[NEXT_BUDGET_S] = budget_bytes[step + 1], budget_s[step + 1]
    seen[INCOMING_BYTES], seen[ARRIVED] = n[kernel.INCOMING_BYTES], n[kernel.NEXT_ARRIVAL]
    seen[ARRIVED_PROMPT_TOKENS], seen[FIRST_TOKENS] = n[kernel.ARRIVED_PROMPT_TOKENS], n[kernel.FIRST_TOKENS]
    seen[TTFT_SUM_S], seen[PRODUCED_TOKENS] = f[kernel.TTFT_SUM], n[kernel.PRODUCED_TOKENS]
    seen[BUSY_S], seen[PREEMPTIONS] = f[kernel.BUSY], n[kernel.PREEMPTIONS]
    seen[REJECTED], seen[FINISHED] = n[kernel.N_REJECTED], n[kernel.N_FINISHED]
