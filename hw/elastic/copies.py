"""Copies the blocks of a layer from host memory while iterations run: a side stream on CUDA, a thread on a CPU."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for

from hw.elastic.blocks import ABSENT, Block
from hw.elastic.device import Accelerator, Event
from hw.elastic.model import ElasticModel
from sim.cost.ffn_width import FULL_WIDTH
from sim.engine.transition import LayerCopy

POLL_S = 0.0005


class LayerCopier:
    """Copies one layer at a time; the layer joins when the engine says so.

    copied_s: how long the copy that joined last took.
    """

    def __init__(self, elastic: ElasticModel, clock: Callable[[], float] = time.perf_counter) -> None:
        """Copy into this model; ``clock`` times the copying thread of a CPU."""
        self._elastic, self._clock = elastic, clock
        self._blocks: list[tuple[Block, int, int]] = []  # with bits and width
        self._future: Future[float] | None = None
        self._events: tuple[Event, Event] | None = None
        self.copied_s = 0.0
        # CUDA copies run by themselves while the model computes; on a CPU a thread reads the file of stored weights.
        by_itself = isinstance(elastic.hardware, Accelerator)
        self._thread = None if by_itself else ThreadPoolExecutor(1, "layer-copy")

    def start(self, copy: LayerCopy) -> None:
        """Start a copy; the last one has joined or was abandoned. If it raises, abandon what it has started."""
        assert not self._blocks
        wanted = (
            (self._elastic.blocks["mha"], copy.mha_bits, FULL_WIDTH),
            (self._elastic.blocks["ffn"], copy.ffn_bits, copy.ffn_width),
        )
        self._blocks = [(blocks[copy.layer], bits, width) for blocks, bits, width in wanted if bits != ABSENT]
        if self._thread is not None:
            self._future = self._thread.submit(_want, self._blocks, self._clock)
            return
        assert isinstance(self._elastic.hardware, Accelerator)
        begin = self._elastic.hardware.mark()
        _want(self._blocks, self._clock)
        self._events = (begin, self._elastic.hardware.mark())

    def copies(self, block: Block) -> bool:
        """Return whether a block is part of the copy under way."""
        return any(block is one for one, *_ in self._blocks)

    def complete(self) -> bool:
        """Return whether the copy is complete."""
        if self._future is not None:
            return self._future.done()
        return all(block.pending is None or block.pending.complete() for block, *_ in self._blocks)

    def wait(self, timeout_s: float) -> float:
        """Wait for the copy, at most ``timeout_s``; return the seconds waited, at most those that the copy took."""
        start_s = time.perf_counter()
        if self._future is not None:
            wait_for([self._future], timeout=max(timeout_s, 0.0))
            waited_s = time.perf_counter() - start_s
            succeeded = self._future.done() and self._future.exception() is None
            return min(waited_s, self._future.result()) if succeeded else waited_s
        while not self.complete() and time.perf_counter() < start_s + timeout_s:
            time.sleep(POLL_S)
        return time.perf_counter() - start_s

    def join(self) -> None:
        """Replace the old blocks with those that arrived."""
        self._finish()
        for block, *_ in self._blocks:
            block.join(wait=True)
        self._blocks = []

    def abandon(self) -> None:
        """Abandon a copy and free its tensors."""
        if self._future is not None:
            self._future.exception()  # waits: else the thread would hand over a copy that was abandoned
            self._future = None
        for block, *_ in self._blocks:
            block.pending = None
        self._blocks, self._events = [], None

    def close(self) -> None:
        """End the thread."""
        self.abandon()
        if self._thread is not None:
            self._thread.shutdown()

    def _finish(self) -> None:
        if self._future is not None:
            self.copied_s = self._future.result()
            self._future = None
        if self._events is not None:
            begin, end = self._events
            end.synchronize()
            self.copied_s = begin.elapsed_time(end) / 1e3
            self._events = None


def _want(blocks: list[tuple[Block, int, int]], clock: Callable[[], float]) -> float:
    """Start to bring blocks to their bits and widths; return the seconds it took, on a CPU those of the copy itself."""
    start_s = clock()
    for block, bits, width in blocks:
        block.want(bits, width)
    return clock() - start_s
