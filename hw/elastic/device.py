"""The device behind the model: its copies, its memory and its events, in one place.

    device = device_of(torch.device("cuda:1"))
    tensors, event = device.copy_in(stored)     # starts to copy from pinned memory, next to what is being computed
    device.join(event, tensors)                 # what is computed from now on waits for the copy

Nothing else calls ``torch.cuda``'s streams, events and memory functions. Tests replace the device with one that fails
loudly (tests/hw/fake_cuda.py).
"""

from __future__ import annotations

import ctypes
import os
import time
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from hw.elastic.processor import processor_name
from hw.elastic.virtual_memory import AddressRange, CudaDriver, CudaRange, HostRange, Pieces

SEGMENTS_BYTES = 64 << 20
"""What CUDA's allocator may hold beyond tensors: it takes segments of 2 to 20 MiB, for small and large tensors of each
of two streams."""
ALLOCATOR_SETTINGS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""Environment variables with the settings of CUDA's allocator: of torch 2.9 and later, which warn of the second, and of
earlier versions."""
MOST_AHEAD_S = 0.5
CYCLES_PER_S = 2e9
"""Clock of a GPU at its fastest, about: it spins too long at a lower one, which does no harm."""
_STATM = Path("/proc/self/statm")


class Event(Protocol):
    """A point in the work of a device."""

    def query(self) -> bool:
        """Return whether the device has reached it."""
        ...

    def synchronize(self) -> None:
        """Wait until the device has reached it."""
        ...

    def elapsed_time(self, end: Any, /) -> float:
        """Return the milliseconds from this timed event to a later one; the device has reached both."""
        ...


class Graph(Protocol):
    """Work of a device that was recorded once."""

    @property
    def output(self) -> Tensor:
        """Its result, which every ``replay`` writes again."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes of memory that it holds."""
        ...

    def replay(self) -> None:
        """Start the work again, on the same addresses."""
        ...


class Device(ABC):
    """Where tensors are. place: its name in torch."""

    place: torch.device

    @property
    @abstractmethod
    def name(self) -> str:
        """The name of the processor."""

    def use(self) -> None:  # noqa: B027 - most devices need nothing
        """Let this thread compute on the device; each thread has to call it before it starts kernels."""

    @abstractmethod
    def synchronize(self) -> None:
        """Wait until all work of the device is done."""

    @abstractmethod
    def give_back(self) -> None:
        """Return the memory that this process has freed to the system."""

    @abstractmethod
    def in_use_bytes(self) -> int:
        """Return the bytes in use now: of tensors on an accelerator, of the full process on a CPU."""

    @abstractmethod
    def take_peak_bytes(self) -> int:
        """Return the most bytes in use since the last call, as far as the device counts them."""

    @abstractmethod
    def reserve(self, size: int) -> AddressRange:
        """Return new addresses for ``size`` bytes of this device; what backs them counts as in use."""


class Accelerator(Device):
    """A device with memory of its own, which copies while it computes."""

    @abstractmethod
    def pinned(self, size: int) -> Tensor:
        """Return new host memory, uint8[size]. The device can copy from it while the host goes on."""

    @abstractmethod
    def copy_in(self, stored: Sequence[Tensor]) -> tuple[list[Tensor], Event]:
        """Start to copy pinned tensors to the device; return the copies and the event of their end.

        The copies must not be read before ``join``.
        """

    @abstractmethod
    def copy_over(self, stored: Sequence[Tensor], targets: Sequence[Tensor]) -> Event:
        """Start to copy pinned tensors over tensors of the device; return the event of the end.

        The copy begins after all work that was started before, and runs next to what is started later. The targets must
        not be read before ``join``, nor freed before the event.
        """

    @abstractmethod
    def join(self, event: Event, tensors: Sequence[Tensor]) -> None:
        """Let all later work of the device wait for a copy, and keep its tensors until that work has read them."""

    @abstractmethod
    def mark(self) -> Event:
        """Return a timed event after the copies started so far."""

    @abstractmethod
    def timed(self, work: Callable[[], object], ahead_s: float = 0.0) -> tuple[float, float]:
        """Return the seconds of the device's work that ``work`` starts, and those that the host took to start it.

        ahead_s: how long the device waits before it begins, so that the host has started all of it by then. The first
            figure is then that of the device alone.
        """

    @abstractmethod
    def limit(self, most_bytes: int | None) -> None:
        """Let allocations beyond this many bytes of tensors and backed addresses fail; None takes the limit away."""

    @abstractmethod
    def upload(self, source: Tensor, target: Tensor) -> None:
        """Start to copy pinned memory to a tensor of the device, before all later work; the host goes on.

        ``source`` must not change before the next ``read``.
        """

    @abstractmethod
    def download(self, source: Tensor, target: Tensor) -> None:
        """Start to copy a tensor of the device to pinned memory, after all earlier work; the host goes on.

        The host must not read ``target`` before the next ``read``; a later ``upload`` may.
        """

    @abstractmethod
    def read(self, tensor: Tensor) -> Tensor:
        """Wait for all work so far and return a copy of a tensor in host memory."""

    @abstractmethod
    def record(self, step: Callable[[], Tensor]) -> Graph:
        """Record the work that ``step`` starts; it may neither wait for the device nor use memory of the host."""


class Cpu(Device):
    """The processor of the host: tensors and stored weights share its memory."""

    place = torch.device("cpu")

    @property
    def name(self) -> str:
        """The name of the CPU."""
        return processor_name(self.place)

    def synchronize(self) -> None:
        """Do nothing: work is done when a call returns."""

    def give_back(self) -> None:
        """Let the C library return what it keeps."""
        trim = getattr(_libc(), "malloc_trim", None)  # glibc keeps freed memory; other systems return it by themselves
        if trim is not None:
            trim(0)

    def in_use_bytes(self) -> int:
        """Return the resident bytes of the process; 0 where the system does not tell."""
        if _STATM.is_file():
            return int(_STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        return 0

    def take_peak_bytes(self) -> int:
        """Return the bytes in use now: the system keeps no peak that can be reset."""
        return self.in_use_bytes()

    def reserve(self, size: int) -> AddressRange:
        """Return addresses of main memory."""
        return HostRange(size)


class Cuda(Accelerator):
    """One CUDA device. Copies of weights run on two streams of their own, for plan changes and for streamed layers.

    Memory behind ``reserve`` is no part of torch's allocator: this class counts it, and makes the allocator's limit
    smaller by as much.
    """

    def __init__(self, place: torch.device) -> None:
        """Use this device, or the current one if it has no number."""
        index = torch.cuda.current_device() if place.index is None else place.index
        self.place = torch.device("cuda", index)
        self._side = torch.cuda.Stream(self.place)  # type: ignore[no-untyped-call]
        # Of its own: copies of plan changes need not wait for the passes that free a slot of streamed layers.
        self._over = torch.cuda.Stream(self.place)  # type: ignore[no-untyped-call]
        self._mapped_bytes = self._peak_bytes = 0
        self._most_bytes: int | None = None
        self._recorder: Any = None  # the stream on which graphs are recorded
        self._graph_memory: Any = None
        self._recorded: weakref.WeakSet[Any] = weakref.WeakSet()

    @property
    def name(self) -> str:
        """The name of the GPU."""
        return processor_name(self.place)

    def use(self) -> None:
        """Make it the current device of this thread: the driver and Triton take no other."""
        torch.cuda.set_device(self.place)

    def synchronize(self) -> None:
        """Wait for all streams."""
        torch.cuda.synchronize(self.place)

    def give_back(self) -> None:
        """Return the segments that the allocator keeps for later."""
        torch.cuda.empty_cache()

    def in_use_bytes(self) -> int:
        """Return the bytes of allocated tensors and of backed addresses."""
        return torch.cuda.memory_allocated(self.place) + self._mapped_bytes

    def take_peak_bytes(self) -> int:
        """Return the most bytes of allocated tensors and backed addresses since the last call."""
        self._note_peak()
        peak, self._peak_bytes = self._peak_bytes, 0
        return peak

    def _note_peak(self) -> None:
        self._peak_bytes = max(self._peak_bytes, torch.cuda.max_memory_allocated(self.place) + self._mapped_bytes)
        torch.cuda.reset_peak_memory_stats(self.place)

    def reserve(self, size: int) -> AddressRange:
        """Return addresses that the driver maps."""
        assert self.place.index is not None
        self.use()
        driver = CudaDriver(self.place.index)
        pieces = Pieces(size, driver, wait=self._wait, resized=self._mapped)
        # Earlier versions of torch copy the memory to the host unless the device is stated.
        return CudaRange(pieces, partial(torch.as_tensor, device=self.place))

    def _wait(self) -> None:
        """Wait for passes and for copies of KV blocks, which use mapped memory, not for copies of weights."""
        self.use()
        torch.cuda.current_stream(self.place).synchronize()

    def _mapped(self, added: int) -> None:
        """Count mapped memory, and take it out of the allocator's limit.

        Raises:
            torch.OutOfMemoryError: if the limit leaves no room for it.
        """
        self.use()
        if added > 0 and self._most_bytes is not None:
            most = self._most_bytes + SEGMENTS_BYTES - self._mapped_bytes
            if torch.cuda.memory_reserved(self.place) + added > most:
                self.give_back()
            if torch.cuda.memory_reserved(self.place) + added > most:
                raise torch.OutOfMemoryError(
                    f"CUDA out of memory: {added:,} bytes of KV blocks do not fit under the limit of this process"
                )
        self._note_peak()
        self._mapped_bytes += added
        self.limit(self._most_bytes)

    def pinned(self, size: int) -> Tensor:
        """Return page-locked memory; the allocator rounds its size up to a power of two."""
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)

    def copy_in(self, stored: Sequence[Tensor]) -> tuple[list[Tensor], Event]:
        """Copy on the side stream."""
        with torch.cuda.stream(self._side):
            tensors = [tensor.to(self.place, non_blocking=True) for tensor in stored]
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(self._side)
        return tensors, event

    def copy_over(self, stored: Sequence[Tensor], targets: Sequence[Tensor]) -> Event:
        """Copy on a second side stream, which waits for the current one."""
        self._over.wait_stream(torch.cuda.current_stream(self.place))
        with torch.cuda.stream(self._over):
            for source, target in zip(stored, targets, strict=True):
                target.copy_(source, non_blocking=True)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(self._over)
        copied: Event = event
        return copied

    def join(self, event: Event, tensors: Sequence[Tensor]) -> None:
        """Let the current stream of this device wait."""
        current = torch.cuda.current_stream(self.place)
        assert isinstance(event, torch.cuda.Event)
        current.wait_event(event)
        for tensor in tensors:
            # Allocated on the side stream: its memory must not be reused before this stream has read it.
            tensor.record_stream(current)

    def mark(self) -> Event:
        """Record an event on the side stream."""
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(self._side)
        marked: Event = event
        return marked

    def timed(self, work: Callable[[], object], ahead_s: float = 0.0) -> tuple[float, float]:
        """Record an event before and after, on the current stream."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        self.synchronize()
        if ahead_s > 0:
            # A kernel that spins: the queue fills up behind it.
            torch.cuda._sleep(int(min(1.2 * ahead_s, MOST_AHEAD_S) * CYCLES_PER_S))  # type: ignore[no-untyped-call]
        begin.record()
        start_s = time.perf_counter()
        work()
        host_s = time.perf_counter() - start_s
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3, host_s

    def limit(self, most_bytes: int | None) -> None:
        """Limit the share of the device's memory that torch's allocator may take: what mapped memory leaves of it."""
        self._most_bytes = most_bytes
        total = torch.cuda.get_device_properties(self.place).total_memory
        left = total if most_bytes is None else most_bytes + SEGMENTS_BYTES - self._mapped_bytes
        torch.cuda.set_per_process_memory_fraction(min(1.0, max(0.0, left / total)), self.place)

    def upload(self, source: Tensor, target: Tensor) -> None:
        """Copy on the stream that computes."""
        target.copy_(source, non_blocking=True)

    def download(self, source: Tensor, target: Tensor) -> None:
        """Copy on the stream that computes."""
        target.copy_(source, non_blocking=True)

    def read(self, tensor: Tensor) -> Tensor:
        """Copy and wait."""
        return tensor.cpu()

    def record(self, step: Callable[[], Tensor]) -> Graph:
        """Record a CUDA graph. All graphs share their memory: they run one after another.

        The step runs once before, on the same stream: cuBLAS keeps a workspace of 32 MiB for each stream that it meets.
        It must not take that from the memory of the graphs, which would then never be free.
        """
        current = torch.cuda.current_stream(self.place)
        if self._recorder is None:
            self._recorder = torch.cuda.Stream(self.place)  # type: ignore[no-untyped-call]
        stream = self._recorder
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            step()  # kernels are compiled and libraries allocate what they keep
        current.wait_stream(stream)
        if not self._recorded:  # torch refuses the memory of graphs that are all gone
            self._graph_memory = torch.cuda.graph_pool_handle()
        torch.cuda.synchronize(self.place)
        self.give_back()
        before = torch.cuda.memory_reserved(self.place)
        graph = torch.cuda.CUDAGraph()
        recording = torch.cuda.graph(graph, pool=self._graph_memory, stream=stream, capture_error_mode="thread_local")
        try:
            with recording:
                output = step()
        finally:
            torch.cuda.set_stream(current)  # a recording that fails does not leave its stream
        self._recorded.add(graph)
        return CudaGraph(graph, output, max(0, torch.cuda.memory_reserved(self.place) - before))


@dataclass(frozen=True, slots=True)
class CudaGraph:
    """A recorded CUDA graph."""

    graph: Any
    output: Tensor
    nbytes: int

    def replay(self) -> None:
        """Start it on the stream that computes."""
        self.graph.replay()


def device_of(place: torch.device) -> Device:
    """Return the device with this name in torch."""
    return Cuda(place) if place.type == "cuda" else Cpu()


def make_current(place: torch.device) -> torch.device:
    """Let this process compute on a CUDA device, without a number on the current one; return it with its number.

    Call it before anything else touches a device: torch reads the settings of its allocator when it first does.
    """
    # With segments that grow and shrink, what one stream freed is found by the other, and nothing stays in fragments.
    if not any(name in os.environ for name in ALLOCATOR_SETTINGS):
        os.environ.update(dict.fromkeys(ALLOCATOR_SETTINGS, "expandable_segments:True"))
    place = torch.device("cuda", torch.cuda.current_device() if place.index is None else place.index)
    torch.cuda.set_device(place)
    return place


def _libc() -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL(None)
    except (OSError, TypeError):
        return None
