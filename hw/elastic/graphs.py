"""CUDA graphs of decode passes: an iteration that recurs is started by one call instead of some ten for each layer.

    graphs = DecodeGraphs(device, most_bytes)
    rows = graphs.rows_of(len(decodes))             # a batch is filled up to a size that recurs
    logits = graphs.run(key, state, step)           # records ``step`` when it recurs, and replays it from then on

A graph holds addresses: of weights, of the KV pool, and of the arrays of an iteration. It is valid as long as ``state``
stays the same, which changes with all of them. What a graph takes for intermediate results counts as workspace.
"""

from __future__ import annotations

import sys
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable

from torch import Tensor

from hw.elastic.device import Accelerator, Graph
from hw.elastic.device_memory import attempt

OPERATIONS, RECORDED, REPLAYED = "operations", "recorded", "replayed"
"""How a pass was started: operation by operation (also after a recording that failed); recorded and then replayed,
which takes longest; replayed from a graph."""
SIZES = (1, 2, 4, *range(8, 64, 8), *range(64, 257, 32))
"""Rows of a batch that has a graph."""
RECURS = 4
"""A pass is recorded when it was needed this often: recording takes as long as several passes."""
MOST_GRAPHS = 32
MOST_FAILURES = 3
"""Recording stops after this many failures. A single failure may be a short lack of memory."""


class DecodeGraphs:
    """Graphs by what determines the operations of a pass: the layout of the batch and the masks of the plan.

    started: how the last pass was started: ``OPERATIONS``, ``RECORDED`` or ``REPLAYED``.
    """

    def __init__(self, hardware: Accelerator, most_bytes: int) -> None:
        """Hold no graph yet; together they may take ``most_bytes``."""
        self._hardware, self._most_bytes = hardware, most_bytes
        self._graphs: OrderedDict[Hashable, Graph] = OrderedDict()
        self._needed: Counter[Hashable] = Counter()
        self._state: Hashable = None
        self._failures = 0
        self.started = OPERATIONS

    @property
    def nbytes(self) -> int:
        """Bytes that all graphs take."""
        return sum(graph.nbytes for graph in self._graphs.values())

    @property
    def count(self) -> int:
        """Number of graphs."""
        return len(self._graphs)

    def rows_of(self, decodes: int) -> int | None:
        """Return the batch size of the graph for a number of decodes; None if there is no such graph."""
        return next((size for size in SIZES if size >= decodes), None) if decodes else None

    def run(self, key: Hashable, state: Hashable, step: Callable[[], Tensor]) -> Tensor:
        """Return what ``step`` returns, valid until the next call.

        Args:
            key: what determines the operations of ``step``. state: what determines the addresses that it uses.
        """
        if state != self._state:
            self.clear()
            self._state = state
        graph = self._graphs.get(key)
        self.started = REPLAYED
        if graph is None:
            self.started = OPERATIONS
            self._needed[key] += 1
            if self._failures == MOST_FAILURES or self._needed[key] < RECURS:
                return step()
            graph = self._record(key, step)
            if graph is None:
                return step()
            self.started = RECORDED
        self._graphs.move_to_end(key)
        graph.replay()
        return graph.output

    def clear(self) -> None:
        """Forget all graphs and free their memory."""
        held = bool(self._graphs)
        self._graphs.clear()
        self._needed.clear()
        if held:
            self._hardware.give_back()

    def _record(self, key: Hashable, step: Callable[[], Tensor]) -> Graph | None:
        """Record a pass; return None if that is not possible."""
        if len(self._graphs) == MOST_GRAPHS:
            self._graphs.popitem(last=False)
        try:
            graph = attempt(self._hardware, lambda: self._hardware.record(step))
        except MemoryError as error:
            return self._give_up(f"there is no memory for it ({error})")
        except RuntimeError as error:
            return self._give_up(str(error).partition("\n")[0])
        self._graphs[key] = graph
        while self.nbytes > self._most_bytes:
            self._graphs.popitem(last=False)
        if key not in self._graphs:
            return self._give_up(f"it takes {graph.nbytes:,} bytes; all may take {self._most_bytes:,} of the workspace")
        return graph

    def _give_up(self, reason: str) -> Graph | None:
        self.clear()
        self._failures += 1
        if self._failures == MOST_FAILURES:
            print(f"no CUDA graphs of decode passes, which is slower: {reason}", file=sys.stderr)
        return None
