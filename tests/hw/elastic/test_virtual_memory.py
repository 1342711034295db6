"""Memory of a CUDA device, mapped piece by piece: every call of the driver, and every one that it refuses."""

from __future__ import annotations

import ctypes
import gc
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the real model needs torch: pip install -e '.[hw]'")

from hw.elastic.device import SEGMENTS_BYTES, Cuda  # noqa: E402
from hw.elastic.virtual_memory import MOST_PIECES, CudaDriver, CudaRange, HostRange, Pieces  # noqa: E402

PIECE = 2 << 20
BASE = 1 << 40


class Library:
    """libcuda as far as it maps memory: it refuses what CUDA refuses.

    calls: names of all calls. fail: the result of the call with this number.
    """

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.fail: dict[int, int] = {}
        self.handles: dict[int, int] = {}  # handle -> users: the program and mappings
        self.mapped: dict[int, tuple[int, int]] = {}  # address -> size, handle
        self.readable: set[int] = set()
        self.reserved: dict[int, int] = {}

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("cu"):
            raise AttributeError(name)

        def call(*values: Any) -> int:
            if name == "cuGetErrorName":
                values[1]._obj.value = b"CUDA_ERROR_FAKE"
                return 0
            number = len(self.calls)
            self.calls.append(name)
            return self.fail.get(number) or getattr(self, f"_{name}")(*values) or 0

        return call

    def _cuMemGetAllocationGranularity(self, size: Any, properties: Any, kind: Any) -> None:  # noqa: N802
        assert ctypes.sizeof(properties._obj) == 32  # CUmemAllocationProp
        assert (properties._obj.type, properties._obj.location.type, properties._obj.location.id) == (1, 1, 3)
        assert kind.value == 0
        size._obj.value = PIECE

    def _cuMemAddressReserve(self, address: Any, size: Any, *rest: Any) -> None:  # noqa: N802
        assert size.value % PIECE == 0
        assert [value.value for value in rest] == [0, 0, 0]
        address._obj.value = BASE
        self.reserved[BASE] = size.value

    def _cuMemAddressFree(self, address: Any, size: Any) -> None:  # noqa: N802
        assert not self.mapped
        assert self.reserved.pop(address.value) == size.value

    def _cuMemCreate(self, handle: Any, size: Any, properties: Any, flags: Any) -> None:  # noqa: N802
        assert size.value % PIECE == 0
        handle._obj.value = len(self.calls)
        self.handles[handle._obj.value] = 1

    def _cuMemMap(self, address: Any, size: Any, offset: Any, handle: Any, flags: Any) -> None:  # noqa: N802
        assert BASE <= address.value <= BASE + self.reserved[BASE] - size.value
        assert address.value not in self.mapped
        assert offset.value == 0
        self.mapped[address.value] = size.value, handle.value
        self.handles[handle.value] += 1

    def _cuMemSetAccess(self, address: Any, size: Any, access: Any, count: Any) -> None:  # noqa: N802
        assert ctypes.sizeof(access._obj) == 12  # CUmemAccessDesc
        assert (access._obj.location.id, access._obj.flags, count.value) == (3, 3, 1)
        inside = [at for at in self.mapped if address.value <= at < address.value + size.value]
        assert sum(self.mapped[at][0] for at in inside) == size.value
        self.readable.update(inside)

    def _cuMemUnmap(self, address: Any, size: Any) -> None:  # noqa: N802
        mapped, handle = self.mapped.pop(address.value)
        assert mapped == size.value
        self.readable.discard(address.value)
        self._release(handle)

    def _cuMemRelease(self, handle: Any) -> None:  # noqa: N802
        self._release(handle.value)

    def _release(self, handle: int) -> None:
        self.handles[handle] -= 1
        if not self.handles[handle]:
            del self.handles[handle]


def pieces(library: Library, size: int, changes: list[int] | None = None, waits: list[int] | None = None) -> Pieces:
    changed = (lambda added: None) if changes is None else changes.append
    driver = CudaDriver(3, library)
    return Pieces(
        size, driver, wait=lambda: None if waits is None else waits.append(len(library.mapped)), resized=changed
    )


def test_a_range_maps_what_it_needs_and_frees_the_rest() -> None:
    library, changes, waits = Library(), list[int](), list[int]()
    found = pieces(library, 10 * PIECE + 1, changes, waits)
    assert library.reserved == {BASE: 11 * PIECE}
    assert found.__cuda_array_interface__["data"] == (BASE, False)
    found.map(3 * PIECE + 1)
    assert found.mapped_bytes == 4 * PIECE
    assert sorted(library.mapped) == sorted(library.readable) == [BASE + i * PIECE for i in range(4)]
    assert len(library.handles) == 4
    assert waits == []
    found.map(4 * PIECE)
    found.map(PIECE)
    assert sorted(library.mapped) == [BASE]
    assert len(library.handles) == 1
    assert waits == [4]  # before anything was unmapped
    found.map(11 * PIECE)
    del found
    gc.collect()
    assert (library.mapped, library.handles, library.reserved) == ({}, {}, {})
    assert changes == [4 * PIECE, -3 * PIECE, 10 * PIECE, -11 * PIECE]


@pytest.mark.parametrize("call", ["cuMemCreate", "cuMemMap", "cuMemSetAccess"])
@pytest.mark.parametrize("number", range(3))
def test_a_call_that_the_driver_refuses_leaves_no_memory_behind(call: str, number: int) -> None:
    calls = [name for _ in range(3) for name in ("cuMemCreate", "cuMemMap", "cuMemRelease")] + ["cuMemSetAccess"]
    library, changes = Library(), list[int]()
    found = pieces(library, 8 * PIECE, changes)
    found.map(2 * PIECE)
    places = [place for place, name in enumerate(calls) if name == call]
    library.fail[len(library.calls) + places[min(number, len(places) - 1)]] = 2
    with pytest.raises(torch.OutOfMemoryError, match=call):
        found.map(5 * PIECE)
    assert sorted(library.mapped) == [BASE, BASE + PIECE]
    assert len(library.handles) == 2
    assert sum(changes) == found.mapped_bytes == 2 * PIECE
    library.fail.clear()
    found.map(5 * PIECE)
    assert sorted(library.readable) == [BASE + i * PIECE for i in range(5)]


def test_other_errors_of_the_driver_name_themselves() -> None:
    library = Library()
    found = pieces(library, 8 * PIECE)
    library.fail[len(library.calls)] = 999
    with pytest.raises(RuntimeError, match=r"cuMemCreate failed: CUDA_ERROR_FAKE \(999\)"):
        found.map(1)


def test_a_large_range_has_larger_pieces() -> None:
    found = pieces(Library(), 60 << 30)
    assert found.piece_bytes % PIECE == 0
    assert found.size / found.piece_bytes <= MOST_PIECES
    assert pieces(Library(), 8 << 30).piece_bytes == PIECE


def test_the_tensor_of_a_range_keeps_its_memory() -> None:
    library = Library()
    memory = CudaRange(pieces(library, 4 * PIECE), lambda of: torch.zeros(of.size, dtype=torch.uint8))
    assert library.mapped == {}  # mapped for a moment, for torch to look up the device
    assert library.calls.count("cuMemUnmap") == 1
    memory.back(PIECE + 1)
    assert memory.backed_bytes == 2 * PIECE
    assert memory.tensor.nbytes == 4 * PIECE


def test_host_memory_keeps_what_stays() -> None:
    memory = HostRange(100_000)
    memory.back(100_000)
    memory.tensor.fill_(7)
    memory.back(5000)
    assert memory.tensor[:5000].eq(7).all()
    memory.back(100_000)
    assert memory.backed_bytes >= 100_000
    assert not memory.tensor[20_000:].any()


# --- The device counts mapped memory ---------------------------------------------------------------------------------


class Allocator:
    """torch's allocator as far as the device calls it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.shares: list[float] = []
        self.current: list[torch.device] = []
        self.allocated = self.reserved = self.peak = 0
        self.cached = 0  # bytes that ``empty_cache`` returns
        properties = SimpleNamespace(total_memory=1 << 36)
        for name, value in {
            "Stream": lambda place: None,
            "set_device": self.current.append,
            "get_device_properties": lambda place: properties,
            "set_per_process_memory_fraction": lambda share, place: self.shares.append(share),
            "memory_allocated": lambda place: self.allocated,
            "memory_reserved": lambda place: self.reserved,
            "max_memory_allocated": lambda place: self.peak,
            "reset_peak_memory_stats": lambda place: setattr(self, "peak", self.allocated),
            "empty_cache": self._empty,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)

    def _empty(self) -> None:
        self.reserved, self.cached = self.reserved - self.cached, 0


def test_mapped_memory_is_in_use_and_makes_the_limit_of_the_allocator_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    allocator, total = Allocator(monkeypatch), 1 << 36
    device = Cuda(torch.device("cuda:1"))
    device.limit(1 << 35)
    allocator.allocated = allocator.peak = 1000
    device._mapped(1 << 30)
    assert device.in_use_bytes() == (1 << 30) + 1000
    assert device.take_peak_bytes() == (1 << 30) + 1000
    device._mapped(-(1 << 29))
    assert device.take_peak_bytes() == (1 << 30) + 1000  # before it was unmapped
    assert device.take_peak_bytes() == (1 << 29) + 1000
    room = (1 << 35) + SEGMENTS_BYTES
    assert allocator.shares == [room / total, (room - (1 << 30)) / total, (room - (1 << 29)) / total]
    assert set(allocator.current) == {device.place}
    device.limit(None)
    assert allocator.shares[-1] == 1.0
    device._mapped(1 << 36)  # without a limit the driver alone refuses
    assert allocator.shares[-1] == 1.0


def test_mapped_memory_beyond_the_limit_is_refused_after_the_cache_was_given_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    allocator = Allocator(monkeypatch)
    device = Cuda(torch.device("cuda:1"))
    device.limit((1 << 30) - SEGMENTS_BYTES)
    allocator.reserved, allocator.cached = 1 << 30, 1 << 29
    device._mapped(1 << 29)
    assert allocator.reserved == 1 << 29
    with pytest.raises(torch.OutOfMemoryError, match="under the limit of this process"):
        device._mapped(1)
    assert device.in_use_bytes() == 1 << 29
