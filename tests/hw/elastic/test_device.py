"""The seam to the device: how memory is pinned, limited and given back, and which errors mean that it ran out."""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the real model needs torch: pip install -e '.[hw]'")

from hw.elastic.blocks import PinnedStore  # noqa: E402
from hw.elastic.checkpoint import pick_device  # noqa: E402
from hw.elastic.device import ALLOCATOR_SETTINGS, SEGMENTS_BYTES, Cpu, Cuda, device_of, make_current  # noqa: E402
from hw.elastic.device_memory import DeviceMemory, attempt, out_of_memory  # noqa: E402
from hw.elastic.model import ElasticModel  # noqa: E402
from hw.elastic.quantize import quantize  # noqa: E402
from sim.cost.memory import weight_bytes  # noqa: E402
from sim.cost.model_spec import load_model  # noqa: E402
from sim.cost.plan import dense_plan, drop, with_mask  # noqa: E402
from sim.errors import ModelError  # noqa: E402
from sim.policies import PolicyContext  # noqa: E402
from sim.policies.fixed import fixed  # noqa: E402
from sim.policies.greedy_stop import greedy_stop  # noqa: E402
from sim.policies.morphserve import morphserve  # noqa: E402
from tests.hw.fake_cuda import FakeCuda  # noqa: E402
from tests.hw.serving import tiny  # noqa: E402


def test_the_cpu_is_a_device_without_memory_of_its_own() -> None:
    device = device_of(torch.device("cpu"))
    assert isinstance(device, Cpu)
    assert device.name
    device.synchronize()
    device.give_back()
    assert device.in_use_bytes() > 0


# --- Running out of memory -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "means_it"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (MemoryError(), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported asynchronously"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (RuntimeError("CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx`"), False),
        (ValueError("CUDA out of memory"), False),
    ],
)
def test_an_error_that_means_that_memory_ran_out_is_told_from_others(error: Exception, means_it: bool) -> None:
    assert out_of_memory(error) == means_it


def test_memory_is_given_back_only_once_nothing_of_the_failed_step_is_alive() -> None:
    with FakeCuda() as device:
        before = device.in_use

        def step() -> None:
            held = torch.zeros(1000)
            raise torch.OutOfMemoryError(f"CUDA out of memory next to {held.nbytes} bytes")

        with pytest.raises(MemoryError, match="next to 4000 bytes") as caught:
            attempt(device, step)
        assert device.given_back == [before]
        assert caught.value.__context__ is None
        with pytest.raises(ValueError, match="other"):
            attempt(device, lambda: (_ for _ in ()).throw(ValueError("other")))


def test_a_budget_is_a_real_limit_that_counts_the_weights_once_and_ends_with_the_run() -> None:
    with FakeCuda() as device:
        kept = torch.zeros(500)  # of someone else in this process
        elastic = ElasticModel(tiny(), hardware=device)
        gc.collect()
        others = device.in_use - elastic.bytes()
        memory = DeviceMemory(device, elastic.bytes())
        budget = elastic.bytes() + 10_000
        memory.follow(budget)
        assert device.limits == [budget + others]
        assert others >= kept.nbytes
        fits = torch.zeros(10_000, dtype=torch.uint8)
        with pytest.raises(torch.OutOfMemoryError):
            torch.zeros(1)
        del fits
        memory.follow(budget)
        assert len(device.limits) == 1  # nothing new to set
        memory.follow(budget - 4000)
        with pytest.raises(torch.OutOfMemoryError):
            torch.zeros(10_000, dtype=torch.uint8)
        memory.close()
        torch.zeros(10_000, dtype=torch.uint8)


def test_memory_in_use_is_the_most_of_an_iteration_and_not_what_is_left_after_it() -> None:
    with FakeCuda() as device:
        memory = DeviceMemory(device, 0)
        before = device.in_use
        torch.zeros(1000)
        assert memory.sample() == before + 4000
        assert memory.sample() == before
        assert memory.peak_bytes == before + 4000


# --- Pinned memory ---------------------------------------------------------------------------------------------------


class Unfilled(FakeCuda):
    """Pinned memory of any size: it has no content."""

    def pinned(self, size: int) -> Any:
        self.pinned_bytes += 1 << (size - 1).bit_length()
        return torch.empty(size, dtype=torch.uint8, device="meta")


def test_pinned_memory_of_llama_2_7b_at_three_precisions_is_hardly_more_than_its_weights() -> None:
    spec, device = load_model("llama2_7b"), Unfilled()
    store = PinnedStore(device)
    q, ffn = (4096, 4096), (11008, 4096)
    shapes = [q] * 4 + [ffn] * 3
    needed = 0
    for layer in range(spec.num_layers):
        for bits in (16, 8, 4):
            tensors = []
            for o, i in shapes:
                if bits == 16:
                    tensors.append(torch.empty((o, i), dtype=torch.bfloat16, device="meta"))
                    continue
                tensors += quantize(torch.empty((o, i), dtype=torch.bfloat16, device="meta"), bits).tensors
            needed += sum(tensor.nbytes for tensor in tensors)
            store.put((layer, bits), tensors)
    assert needed > 22e9
    assert store.nbytes == device.pinned_bytes  # every arena has a size that is not rounded up
    assert store.nbytes < 1.05 * needed


def test_a_policy_gets_only_the_copies_that_its_plans_can_need() -> None:
    elastic = ElasticModel(tiny(), name="tiny")
    served = PolicyContext(model=elastic.spec, kv_block_tokens=4)
    order = ["FFN2", "MHA1"]
    assert elastic.spec.num_layers == 4

    def stored(policy: Any) -> int:
        with FakeCuda() as device:
            model = ElasticModel(tiny(), name="tiny", hardware=device)
            model.prepare_for(policy.plans)
            return sum(t.nbytes for tensors in model._store._tensors.values() for t in tensors)  # type: ignore[attr-defined]

    dense = weight_bytes(elastic.spec, dense_plan(elastic.spec))
    pruned = weight_bytes(elastic.spec, with_mask(dense_plan(elastic.spec), drop(elastic.spec, mha=[1], ffn=[2])))
    assert stored(fixed(served)) == 0
    assert stored(greedy_stop(served, order=order)) == dense - pruned
    swapped = morphserve(served, order=[0, 1])
    four = elastic.bytes() - weight_bytes(elastic.spec, swapped.plans[-1])
    assert 0 < stored(swapped) < 2 * (dense - pruned) + four
    assert stored(morphserve(served)) > stored(swapped)


# --- Which device ----------------------------------------------------------------------------------------------------


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Let torch see two CUDA devices; return the calls that choose one."""
    chosen: list[Any] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    return chosen


def test_a_gpu_chosen_by_number_becomes_the_current_one(two_gpus: list[Any]) -> None:
    assert pick_device("cuda:1") == torch.device("cuda:1")
    assert two_gpus == [torch.device("cuda:1")]
    assert pick_device("cpu") == torch.device("cpu")
    assert len(two_gpus) == 1


def test_the_limit_of_a_gpu_is_a_share_of_its_memory_and_ends_with_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    shares: list[Any] = []
    monkeypatch.setattr(torch.cuda, "Stream", lambda place: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda place: SimpleNamespace(total_memory=1 << 36))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda *share: shares.append(share))
    device = Cuda(torch.device("cuda:1"))
    for most in ((1 << 35) - SEGMENTS_BYTES, 1 << 37, None):
        device.limit(most)
    assert shares == [(0.5, device.place), (1.0, device.place), (1.0, device.place)]


@pytest.mark.parametrize("name", ["cuda:2", "cuda:-1", "cuda:one", "cuda:", "cuda:1:1", "cuda1", "gpu"])
def test_a_gpu_that_is_not_there_is_one_line(two_gpus: list[Any], name: str) -> None:
    with pytest.raises(ModelError) as caught:
        pick_device(name)
    assert "\n" not in str(caught.value)
    assert "cuda" in str(caught.value)
    assert two_gpus == []


@pytest.mark.parametrize("stated", [None, *ALLOCATOR_SETTINGS])
def test_settings_of_the_allocator_that_a_user_has_made_stay(
    two_gpus: list[Any], monkeypatch: pytest.MonkeyPatch, stated: str | None
) -> None:
    for name in ALLOCATOR_SETTINGS:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    if stated is not None:
        monkeypatch.setenv(stated, "max_split_size_mb:64")
    make_current(torch.device("cuda:1"))
    wanted = dict.fromkeys(ALLOCATOR_SETTINGS, "expandable_segments:True")
    if stated is not None:
        wanted = {stated: "max_split_size_mb:64"}
    assert {name: os.environ[name] for name in ALLOCATOR_SETTINGS if name in os.environ} == wanted


def test_the_allocator_has_its_settings_before_torch_touches_a_gpu(
    two_gpus: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str | None] = []
    for name in ALLOCATOR_SETTINGS:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)

    def current() -> int:
        seen.append(os.environ.get(ALLOCATOR_SETTINGS[0]))
        return 1

    monkeypatch.setattr(torch.cuda, "current_device", current)
    assert pick_device("cuda") == torch.device("cuda:1")
    assert seen == ["expandable_segments:True"]
    assert two_gpus == [torch.device("cuda:1")]


# --- CUDA graphs -----------------------------------------------------------------------------------------------------


class Recorder:
    """torch.cuda as far as a graph is recorded; it refuses what CUDA's allocator refuses.

    streams: that were made. warm: those that something ran on. current: the stream of the thread.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.streams: list[Any] = []
        self.warm: set[int] = set()
        self.current: Any = SimpleNamespace(wait_stream=lambda other: None)
        self.pools: dict[int, int] = {}  # handle -> graphs
        self.handles = 0
        for name, value in {
            "Stream": self.stream,
            "stream": self.on,
            "current_stream": lambda place: self.current,
            "set_stream": lambda stream: setattr(self, "current", stream),
            "graph_pool_handle": self.handle,
            "synchronize": lambda place: None,
            "empty_cache": lambda: None,
            "memory_reserved": lambda place: 0,
            "CUDAGraph": self.graph_of(),
            "graph": self.recording,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)

    def stream(self, place: Any) -> Any:
        self.streams.append(SimpleNamespace(wait_stream=lambda other: None))
        return self.streams[-1]

    @contextlib.contextmanager
    def on(self, stream: Any) -> Iterator[None]:
        before, self.current = self.current, stream
        self.warm.add(id(stream))
        yield
        self.current = before

    def handle(self) -> int:
        self.handles += 1
        return self.handles

    def graph_of(self) -> type:
        recorder = self

        class CUDAGraph:
            pool = 0

            def __del__(self) -> None:
                if self.pool:
                    recorder.pools[self.pool] -= 1

        return CUDAGraph

    @contextlib.contextmanager
    def recording(self, graph: Any, pool: int, stream: Any = None, **_: Any) -> Iterator[None]:
        before, self.current = self.current, stream
        assert id(stream) in self.warm, "cuBLAS takes its workspace from the memory of the graphs"
        assert self.pools.get(pool, 1) > 0, "it->second->use_count > 0 INTERNAL ASSERT FAILED"
        yield  # an error leaves the stream as it is, as torch's context does if the end of a recording fails
        self.pools[pool] = self.pools.get(pool, 0) + 1
        graph.pool = pool
        self.current = before


def test_graphs_are_recorded_again_after_all_of_them_are_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(monkeypatch)
    device, computing = Cuda(torch.device("cuda:0")), recorder.current
    streams = len(recorder.streams)
    for _ in range(3):
        graphs = [device.record(lambda: torch.zeros(1)) for _ in range(3)]
        assert list(recorder.pools.values())[-1] == 3  # they share their memory
        del graphs
        gc.collect()
    assert recorder.handles == 3
    assert len(recorder.streams) == streams + 1  # each stream costs a workspace
    assert recorder.current is computing


def test_a_recording_that_fails_leaves_the_stream_that_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(monkeypatch)
    device, computing, runs = Cuda(torch.device("cuda:0")), recorder.current, list[int]()

    def step() -> torch.Tensor:
        runs.append(1)
        if len(runs) == 2:
            raise RuntimeError("operation not permitted when stream is capturing")
        return torch.zeros(1)

    with pytest.raises(RuntimeError, match="capturing"):
        device.record(step)
    assert recorder.current is computing
    device.record(step)
