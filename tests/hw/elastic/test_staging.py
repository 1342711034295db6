"""Arrays of an iteration on their way to the device: one copy from pinned memory, one wait for the result."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the real model needs torch: pip install -e '.[hw]'")

from hw.elastic.device import Cpu  # noqa: E402
from hw.elastic.staging import ALIGNMENT, LEAST_BYTES, Staging  # noqa: E402
from tests.hw.fake_cuda import FakeCuda  # noqa: E402


def arrays(rng: np.random.Generator, scale: int = 1) -> list[np.ndarray]:
    return [
        rng.integers(0, 1000, (3 * scale, 5)).astype(np.int64),
        rng.integers(0, 1000, (7,)).astype(np.int32),
        rng.integers(0, 1000, (2, 3, 4)).astype(np.int32),
        np.zeros((4, 0), np.int32),
        rng.random((3, 2)),
    ]


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_tensors_have_the_content_of_the_arrays(kind: str) -> None:
    staging, rng = Staging(Cpu() if kind == "cpu" else FakeCuda()), np.random.default_rng(1)
    for scale in (1, 3, 20_000, 2):
        sent = arrays(rng, scale)
        for array, tensor in zip(sent, staging.send(sent), strict=True):
            assert tensor.shape == array.shape
            assert np.array_equal(tensor.numpy(), array)
        assert torch.equal(staging.read(tensor), tensor)


def test_an_iteration_is_one_copy_and_one_wait_at_addresses_that_stay() -> None:
    device, rng = FakeCuda(), np.random.default_rng(1)
    staging = Staging(device)
    addresses = set()
    for _ in range(4):
        tensors = staging.send(arrays(rng))
        addresses.add(tuple(tensor.data_ptr() for tensor in tensors))
        assert all(tensor.data_ptr() % ALIGNMENT == 0 for tensor in tensors if tensor.numel())
        staging.read(tensors[0])
    assert (device.uploads, device.reads, len(addresses), staging.version) == (4, 4, 1, 1)
    layout = staging.layout
    staging.send([np.zeros(LEAST_BYTES, np.int32)])
    assert staging.version == 2
    assert staging.layout != layout


def test_pinned_memory_is_not_written_while_the_device_may_still_copy_from_it() -> None:
    device = FakeCuda()
    staging = Staging(device)
    staging.send([np.arange(4)])
    staging.send([np.arange(4) + 1])  # the pass before it failed, so no one has waited
    assert device.uploads == 2
    staging._sent = False  # as if it had not noticed
    staging.send([np.arange(4) + 2])
    with pytest.raises(AssertionError, match="pinned memory changed"):
        staging.read(torch.zeros(1))


def test_memory_that_was_made_in_inference_mode_is_written_outside_of_it() -> None:
    staging = Staging(FakeCuda())
    with torch.inference_mode():
        staging.send([np.arange(4)])
    staging.read(torch.zeros(1))
    (sent,) = staging.send([np.arange(4) + 1])
    assert sent.tolist() == [1, 2, 3, 4]
