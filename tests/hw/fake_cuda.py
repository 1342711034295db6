"""CUDA on a CPU, for tests: what a GPU would silently get wrong fails loudly here.

    device = FakeCuda(polls=3)
    with device:                                    # every tensor made from now on is counted
        elastic = ElasticModel(tiny(), hardware=device)

* A copy holds NaN until the computing stream waits for it or ``query`` was called ``polls`` times. Whoever reads it
  earlier gets a NumericsError; whoever loses a copy gets an error about shapes.
* The allocator counts tensors, refuses those beyond its limit, and on request the one with a certain number.
* Addresses without memory behind them hold NaN, and so does new memory. Memory that is unmapped while a pass may still
  read it is an error.
* Pinned memory that changes before the device has read it is an error. What the device copies to it holds NaN until the
  host has waited, or until a later copy of the device reads it.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hw.elastic.device import Accelerator, Event
from hw.elastic.virtual_memory import AddressRange, CudaRange, Pieces

try:
    from hw.elastic.kernels.launch import WATCHERS
except ImportError:  # without triton there are no kernels
    WATCHERS = []


class _Counted(TorchDispatchMode):
    """Passes every new storage to the device."""

    def __init__(self, device: FakeCuda) -> None:
        super().__init__()
        self._device = device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        self._device.busy |= not known.isdisjoint(self._device.mapped)
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in known:
                self._device.allocated(tensor)
        return out


class FakeEvent:
    """The end of the copies that were started before it."""

    def __init__(self, device: FakeCuda, copies: list[tuple[Tensor, weakref.ref[Tensor]]]) -> None:
        self._device, self._copies, self._asked = device, copies, 0

    def query(self) -> bool:
        self._asked += 1
        if self._asked >= self._device.polls:
            self.synchronize()
        return not self._copies

    def synchronize(self) -> None:
        self._device.finish(self)

    def elapsed_time(self, end: Any, /) -> float:
        return 1.0

    def arrive(self) -> None:
        """Give the copies their content."""
        for source, target in self._copies:
            tensor = target()
            if tensor is not None:  # an abandoned copy has no tensor any more
                tensor.copy_(source)
        self._copies = []


class FakeDriver:
    """What ``hw.elastic.virtual_memory.CudaDriver`` does, for one range of a fake device."""

    def __init__(self, device: FakeCuda) -> None:
        self._device = device
        self.tensor = torch.empty(0, dtype=torch.uint8)
        self.mapped: set[tuple[int, int]] = set()  # (address, size)
        self.readable: set[int] = set()

    def granularity(self) -> int:
        return self._device.piece_bytes

    def reserve(self, size: int) -> int:
        self.tensor = self._device.uncounted(size)
        self._device.mapped.add(self.tensor.untyped_storage()._cdata)
        self._bytes = self.tensor.numpy()  # kept, because torch sees every call of numpy()
        self._bytes.fill(255)
        self._device.busy = False  # numpy() counts as use
        return 1 << 40

    def free(self, address: int, size: int) -> None:
        assert not self.mapped
        assert size == len(self.tensor)

    def map(self, address: int, size: int) -> None:
        assert (address, size) not in self.mapped
        self._device.count(size, "cuMemCreate")
        self.mapped.add((address, size))

    def allow(self, address: int, size: int) -> None:
        inside = {at: piece for at, piece in self.mapped if address <= at < address + size}
        assert sum(inside.values()) == size
        self.readable.update(inside)

    def unmap(self, address: int, size: int) -> None:
        used = self._device.busy and address in self.readable
        assert not used, "a pass may still read the memory that is unmapped"
        self.readable.discard(address)
        self.mapped.remove((address, size))
        self._device.in_use -= size
        start = address - (1 << 40)
        self._bytes[start : start + size].fill(255)


class _Recording(TorchDispatchMode):
    """Remembers the operations and kernels of a pass, and which memory they use that existed before it.

    calls: names, shapes and numbers, in order. outside: addresses of that memory, each with a reference to it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[object] = []
        self.outside: dict[int, weakref.ref[Any]] = {}
        self._inside: set[int] = set()
        self._kept: list[Tensor] = []  # so that no address is used twice

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        assert "_local_scalar_dense" not in name, "a recorded pass waits for the device"
        assert "lift_fresh" not in name, "a recorded pass uses memory of the host"
        self._note(name, (args, kwargs))
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in self.outside:
                self._inside.add(tensor.untyped_storage()._cdata)
                self._kept.append(tensor)
        return out

    def kernel(self, name: str, values: Sequence[Any]) -> None:
        """Remember a kernel of this package."""
        self._note(name, values)

    def _note(self, name: str, values: Any) -> None:
        leaves = tree_leaves(values)
        self.calls.append((name, *(tuple(v.shape) if isinstance(v, Tensor) else repr(v) for v in leaves)))
        for tensor in leaves:
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._inside:
                    self.outside.setdefault(storage._cdata, weakref.ref(storage))


class FakeGraph:
    """A recorded pass: its replay runs the pass again, and fails if a GPU would have used other memory or values."""

    def __init__(self, device: FakeCuda, step: Callable[[], Tensor]) -> None:
        before = device.in_use
        self._device, self._recorded = device, _Recording()
        self._step = step
        self.output = self._watched(self._recorded)
        self.nbytes = max(0, device.in_use - before)
        self.replays = 0

    def _watched(self, recording: _Recording) -> Tensor:
        WATCHERS.append(recording.kernel)
        try:
            with recording:
                return self._step()
        finally:
            WATCHERS.remove(recording.kernel)

    def replay(self) -> None:
        self.replays += 1
        self._device.replays += 1
        assert all(ref() is not None for ref in self._recorded.outside.values()), "a graph uses memory that was freed"
        now = _Recording()
        output = self._watched(now)
        assert now.outside.keys() == self._recorded.outside.keys(), "a graph uses other memory than this pass"
        assert now.calls == self._recorded.calls, "a graph runs other operations than this pass"
        with torch.inference_mode():
            self.output.copy_(output)


class FakeCuda(Accelerator):
    """A device with memory of its own, in the memory of the host.

    in_use, peak: bytes of tensors and mapped memory. pinned_bytes: as the allocator of pinned memory rounds them.
    limits: all that were set. allocations: tensors and mapped pieces so far. refuse: the numbers of those that fail.
    given_back: bytes in use at each call. piece_bytes: granularity of mapped memory. mapped: storages of it. busy:
    whether it was used since the host last waited. uploads, downloads: copies to the device, and back. reads: back,
    with a wait. timings: how long each timed piece of work was held back. replays: of graphs.
    """

    place = torch.device("cpu")
    piece_bytes = 4096

    def __init__(self, polls: int = 3) -> None:
        self.polls = polls
        self.in_use = self.peak = self.allocations = self.pinned_bytes = 0
        self.uploads = self.downloads = self.reads = self.replays = 0
        self.mapped: set[int] = set()
        self.busy = False
        self._uploading: list[tuple[Tensor, Tensor]] = []  # pinned memory, and its content when the copy began
        self._downloading: list[tuple[Tensor, Tensor]] = []  # pinned memory, and the content that it will have
        self.limits: list[int | None] = []
        self.refuse: frozenset[int] = frozenset()
        self.given_back: list[int] = []
        self.timings: list[float] = []
        self._live: dict[int, int] = {}
        self._pinned: set[int] = set()
        self._under_way: list[FakeEvent] = []
        self._mode: _Counted | None = None

    def __enter__(self) -> FakeCuda:
        self._mode = _Counted(self)
        self._mode.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        assert self._mode is not None
        self._mode.__exit__(kind, error, at)

    # --- the allocator

    def allocated(self, tensor: Tensor) -> None:
        """Count a new tensor, or refuse it."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if not size or key in self._live or key in self._pinned or key in self.mapped:
            return
        self.count(size, "the allocator")
        self._live[key] = size
        weakref.finalize(storage, self._freed, key)

    def count(self, size: int, by: str) -> None:
        """Count new memory, or refuse it."""
        number, self.allocations = self.allocations, self.allocations + 1
        limit = self.limits[-1] if self.limits else None
        if number in self.refuse or (limit is not None and self.in_use + size > limit):
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {size} bytes by {by}")
        self.in_use += size
        self.peak = max(self.peak, self.in_use)

    def _freed(self, key: int) -> None:
        self.in_use -= self._live.pop(key, 0)

    def limit(self, most_bytes: int | None) -> None:
        self.limits.append(most_bytes)

    def give_back(self) -> None:
        self.given_back.append(self.in_use)

    def in_use_bytes(self) -> int:
        return self.in_use

    def take_peak_bytes(self) -> int:
        peak, self.peak = self.peak, self.in_use
        return peak

    # --- copies

    @property
    def name(self) -> str:
        return "a fake GPU"

    def synchronize(self) -> None:
        for event in list(self._under_way):
            event.arrive()
        self._under_way = []
        self.computed()

    def computed(self) -> None:
        """The host has waited for all that was computed so far."""
        self.busy = False
        self._uploaded()
        self._downloaded()

    def _uploaded(self) -> None:
        for source, content in self._uploading:
            assert torch.equal(source, content), "pinned memory changed while the device copied from it"
        self._uploading = []

    def _downloaded(self) -> None:
        for target, content in self._downloading:
            target.copy_(content)
        self._downloading = []

    def reserve(self, size: int) -> AddressRange:
        driver = FakeDriver(self)
        pieces = Pieces(size, driver, wait=self.computed, resized=lambda added: None)  # type: ignore[arg-type]
        return CudaRange(pieces, lambda _: driver.tensor)

    def upload(self, source: Tensor, target: Tensor) -> None:
        assert source.untyped_storage()._cdata in self._pinned, "a copy from pageable memory stops the host"
        self.uploads += 1
        self._downloaded()
        self._uploading.append((source, source.clone()))
        target.copy_(source)

    def download(self, source: Tensor, target: Tensor) -> None:
        assert target.untyped_storage()._cdata in self._pinned, "a copy to pageable memory stops the host"
        self.downloads += 1
        self._uploaded()  # what it copied from this memory before, it has copied by then
        self._downloading.append((target, source.clone()))
        target.view(-1).view(torch.uint8).fill_(255)

    def read(self, tensor: Tensor) -> Tensor:
        self.reads += 1
        self.computed()
        return tensor.clone()

    def record(self, step: Callable[[], Tensor]) -> FakeGraph:
        step()
        return FakeGraph(self, step)

    def uncounted(self, size: int) -> Tensor:
        """Return memory that is not the device's."""
        storage = torch.UntypedStorage(size)  # no operation of torch, so not counted as memory of the device
        self._pinned.add(storage._cdata)
        return torch.empty(0, dtype=torch.uint8).set_(storage)

    def pinned(self, size: int) -> Tensor:
        self.pinned_bytes += 1 << (size - 1).bit_length()
        return self.uncounted(size)

    def copy_in(self, stored: Sequence[Tensor]) -> tuple[list[Tensor], Event]:
        tensors, copies = [], []
        for source in stored:
            assert source.untyped_storage()._cdata in self._pinned, "a copy from pageable memory stops the host"
            target = torch.empty_like(source)
            target.view(-1).view(torch.uint8).fill_(255)  # NaN in every floating type
            tensors.append(target)
            copies.append((source, weakref.ref(target)))
        event = FakeEvent(self, copies)
        self._under_way.append(event)
        return tensors, event

    def copy_over(self, stored: Sequence[Tensor], targets: Sequence[Tensor]) -> Event:
        copies = []
        for source, target in zip(stored, targets, strict=True):
            assert source.untyped_storage()._cdata in self._pinned, "a copy from pageable memory stops the host"
            target.view(-1).view(torch.uint8).fill_(255)
            copies.append((source, weakref.ref(target)))
        event = FakeEvent(self, copies)
        self._under_way.append(event)
        return event

    def finish(self, event: FakeEvent) -> None:
        """Complete the copies up to an event: they are done in order."""
        if event in self._under_way:
            at = self._under_way.index(event) + 1
            for earlier in self._under_way[:at]:
                earlier.arrive()
            del self._under_way[:at]

    def join(self, event: Event, tensors: Sequence[Tensor]) -> None:
        event.synchronize()

    def timed(self, work: Callable[[], object], ahead_s: float = 0.0) -> tuple[float, float]:
        self.timings.append(ahead_s)
        start_s = time.perf_counter()
        work()
        return time.perf_counter() - start_s, 0.001

    def mark(self) -> Event:
        event = FakeEvent(self, [])
        self._under_way.append(event)
        return event
