"""Brings the blocks of a layer from host memory while iterations go on: a side stream on CUDA, a thread on CPU."""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for

from hw.model import ABSENT, Block, ElasticModel
from sim.transition import LayerCopy

POLL_S = 0.0005


class LayerCopier:
    """Copies one layer at a time; what it brings joins when the engine says so."""

    def __init__(self, elastic: ElasticModel) -> None:
        """Copy into this model."""
        self._elastic = elastic
        self._blocks: list[tuple[Block, int]] = []
        self._future: Future[None] | None = None
        # CUDA copies run beside the model by themselves; on a CPU a thread reads the file of stored weights.
        self._thread = ThreadPoolExecutor(1, "layer-copy") if elastic.device.type == "cpu" else None

    def start(self, copy: LayerCopy) -> None:
        """Begin a copy; the last one has joined or was abandoned."""
        assert not self._blocks
        pairs = ((self._elastic.blocks["mha"], copy.mha_bits), (self._elastic.blocks["ffn"], copy.ffn_bits))
        self._blocks = [(blocks[copy.layer], bits) for blocks, bits in pairs if bits != ABSENT]
        if self._thread is None:
            _want(self._blocks)
        else:
            self._future = self._thread.submit(_want, self._blocks)

    def whole(self) -> bool:
        """Return whether the copy has arrived."""
        if self._future is not None:
            return self._future.done()
        return all(block.pending is None or block.pending.whole() for block, _ in self._blocks)

    def wait(self, timeout_s: float) -> None:
        """Wait until the copy is whole, at most so long."""
        if self._future is not None:
            wait_for([self._future], timeout=max(timeout_s, 0.0))
            return
        end_s = time.perf_counter() + timeout_s
        while not self.whole() and time.perf_counter() < end_s:
            time.sleep(POLL_S)

    def join(self) -> None:
        """Put what arrived in the place of what it replaces."""
        self._finish()
        for block, _ in self._blocks:
            block.join(wait=True)
        self._blocks = []

    def abandon(self) -> None:
        """Give a copy up; what replaces nothing is freed."""
        if self._future is not None:
            self._future.exception()  # waits: the thread must not hand over a copy that nobody wants
            self._future = None
        for block, _ in self._blocks:
            block.pending = None
        self._blocks = []

    def close(self) -> None:
        """End the thread."""
        self.abandon()
        if self._thread is not None:
            self._thread.shutdown()

    def _finish(self) -> None:
        if self._future is not None:
            self._future.result()
            self._future = None


def _want(blocks: list[tuple[Block, int]]) -> None:
    for block, bits in blocks:
        block.want(bits)
