"""Streamed layers of a real model: two slots on the device, which the layers share in the order in which they run.

    streams.set({3: (16, 16), 7: (16, 16), 11: (16, 16)})     # layer -> bits of its MHA and FFN block
    streams.enter(3)                                          # waits for the copy; the layer's weights are in a slot
    ...                                                       # run the layer
    streams.leave(3)                                          # the copy of layer 11 into this slot begins

sim/cost/streaming.py has the rule, and what it costs. On CUDA the copies come from pinned memory on a stream of their
own, and wait for the work of the layer that had the slot before. On a CPU a thread reads the file of stored weights.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from hw.elastic.blocks import ABSENT, ALIGNMENT, Block, Store
from hw.elastic.device import Accelerator, Device, Event
from sim.cost.streaming import SLOTS, held_bytes


class WaitingClock(Protocol):
    """The clock of an engine, on which waiting for a layer counts (hw/engine/clock.py)."""

    def now_s(self) -> float:
        """Return the current time."""
        ...

    def wait_until(self, time_s: float) -> None:
        """Wait until this time; return at once if it has passed."""
        ...

    def source(self) -> float:
        """Return the seconds of this thread."""
        ...


@dataclass(slots=True)
class _Load:
    """A layer that is in a slot, or is being copied into it.

    parts: of each block that runs its bits, its weights, and its norms and biases. events (CUDA), future (CPU): show
    when the copy is complete.
    """

    layer: int
    slot: int
    parts: list[tuple[Block, int, list[Tensor], list[Tensor]]]  # block, bits, weights, rest
    events: list[Event]
    future: Future[float] | None = None


class WeightStreams:
    """The streamed layers of one model.

    layers: bits of the MHA and the FFN block of each streamed layer, ascending; ABSENT for a block that does not run.
    clock: on which waiting for a layer counts; None counts nothing.
    """

    def __init__(
        self,
        mha: Sequence[Block],
        ffn: Sequence[Block],
        store: Store,
        device: Device,
        layer_bytes: Callable[[int, int], int],
    ) -> None:
        """Stream nothing yet.

        Args:
            mha, ffn: the blocks of every layer, whose stored weights are in ``store``. device: that runs them.
            layer_bytes: called with the bits of an MHA and an FFN block; returns their bytes together.
        """
        self.layers: dict[int, tuple[int, int]] = {}
        self.clock: WaitingClock | None = None
        self._mha, self._ffn, self._store, self._device = mha, ffn, store, device
        self._layer_bytes = layer_bytes
        self._slots: list[Tensor] = []
        self._loads: deque[_Load] = deque()
        self._thread: ThreadPoolExecutor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the slots, as ``sim.cost.streaming.held_bytes`` counts them; ``reserve`` allocates them."""
        return held_bytes([self._layer_bytes(*bits) for bits in self.layers.values()], [True] * len(self.layers))

    @property
    def missing_bytes(self) -> int:
        """Bytes of the slots that are not allocated yet."""
        return 0 if self._slots else self.nbytes

    def set(self, layers: Mapping[int, tuple[int, int]]) -> None:
        """Stream these layers from the next pass on; nothing changes if they are the present ones.

        Layers without a block that runs are left out. The blocks must not be resident. Nothing is allocated.
        """
        wanted = {layer: bits for layer, bits in sorted(layers.items()) if bits != (ABSENT, ABSENT)}
        if wanted == self.layers:
            return
        self.restart()
        self._slots = []
        self.layers = wanted

    def reserve(self) -> None:
        """Allocate the slots, and store the layers at their bits; the next pass would do it otherwise."""
        if self._slots or not self.layers:
            return
        with torch.inference_mode(False):
            for layer, bits in self.layers.items():
                for block, count in zip((self._mha[layer], self._ffn[layer]), bits, strict=True):
                    if count != ABSENT:
                        block.prepare(count)
            size = max(self._room(layer) for layer in self.layers)
            count = min(SLOTS, len(self.layers))
            # Both or none: one that stays alone would not be counted.
            slots = [torch.empty(size, dtype=torch.uint8, device=self._device.place) for _ in range(count)]
            self._slots = slots

    def close(self) -> None:
        """Free the slots and end the thread; a later pass begins again."""
        self.restart()
        self._slots, self.clock = [], None
        if self._thread is not None:
            self._thread.shutdown()
            self._thread = None

    def enter(self, layer: int) -> None:
        """Let a layer run next: if it is streamed, wait for its weights."""
        if layer not in self.layers:
            return
        with torch.inference_mode(False):
            if not self._loads or self._loads[0].layer != layer:  # the first pass, or the last one was not completed
                self._begin_at(layer)
            load = self._loads[0]
            self._wait(load)
            for block, bits, weights, rest in load.parts:
                block.lend(bits, weights, rest)

    def leave(self, layer: int) -> None:
        """Say that the work of a layer has been started: the next one may come into its slot."""
        if layer not in self.layers:
            return
        with torch.inference_mode(False):
            load = self._loads.popleft()
            for block, *_ in load.parts:
                block.take_back()
            self._load(self._after(self._loads[-1].layer if self._loads else layer), load.slot)

    # -- slots -----------------------------------------------------------------------------------------------------

    def _after(self, layer: int) -> int:
        """Return the streamed layer that runs after this one."""
        order = list(self.layers)
        return order[(order.index(layer) + 1) % len(order)]

    def _begin_at(self, layer: int) -> None:
        """Fill the slots, from this layer on."""
        self.restart()
        self.reserve()
        for slot in range(len(self._slots)):
            self._load(layer, slot)
            layer = self._after(layer)

    def _room(self, layer: int) -> int:
        """Return the bytes of a layer in a slot, with every tensor aligned."""
        return sum(
            -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
            for block, bits in zip((self._mha[layer], self._ffn[layer]), self.layers[layer], strict=True)
            if bits != ABSENT
            for key in block.keys(bits)
            for tensor in self._store.shapes(key)
        )

    def restart(self) -> None:
        """Forget what is in the slots; copies that are under way are completed first."""
        for load in self._loads:
            if load.future is not None:
                load.future.exception()  # waits; what failed is read again
            for event in load.events:
                event.synchronize()
            for block, *_ in load.parts:
                block.take_back()
        self._loads.clear()

    # -- copies ----------------------------------------------------------------------------------------------------

    def _load(self, layer: int, slot: int) -> None:
        """Start to copy a layer into a slot, after the work that has been started."""
        at = 0
        parts, copies = [], []
        for block, bits in zip((self._mha[layer], self._ffn[layer]), self.layers[layer], strict=True):
            if bits == ABSENT:
                continue
            views: list[list[Tensor]] = []
            for key in block.keys(bits):
                views.append([])
                for shape in self._store.shapes(key):
                    view = self._slots[slot][at : at + shape.nbytes].view(shape.dtype).view(shape.shape)
                    views[-1].append(view)
                    at += -(-shape.nbytes // ALIGNMENT) * ALIGNMENT
                copies.append((key, views[-1]))
            parts.append((block, bits, views[0], views[1]))
        load = _Load(layer, slot, parts, [])
        self._loads.append(load)
        if isinstance(self._device, Accelerator):
            for key, targets in copies:
                load.events += self._store.load(key, targets)
            return
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "weight-stream")
        source = time.perf_counter if self.clock is None else self.clock.source

        def read() -> float:
            start_s = source()
            for key, targets in copies:
                self._store.load(key, targets)
            return source() - start_s

        load.future = self._thread.submit(read)

    def _wait(self, load: _Load) -> None:
        """Let what is computed from now on wait for a copy."""
        if load.future is None:
            self._store.join(load.events, [])
            return
        if load.future.done() or self.clock is None:
            load.future.result()
            return
        now_s, start_s = self.clock.now_s(), time.perf_counter()
        copied_s = load.future.result()
        self.clock.wait_until(now_s + min(copied_s, time.perf_counter() - start_s))
