"""The memory behind a pool of KV blocks: what is written stays with its block, and what shrinks is freed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="the paged pool needs torch: pip install -e '.[hw]'")

from hw.elastic.device import Cpu  # noqa: E402
from hw.elastic.kv_storage import ArenaStorage  # noqa: E402
from hw.elastic.paged_kv import KVArena  # noqa: E402
from sim.engine.kv_pool import KVPool  # noqa: E402
from tests.hw.fake_cuda import FakeCuda  # noqa: E402

SHAPE = {"block_tokens": 4, "heads": 2, "head_dim": 8, "dtype": torch.float32}


def arena(kind: str) -> KVArena:
    return KVArena(Cpu() if kind == "cpu" else FakeCuda(), capacity=500, **SHAPE)


def fill(memory: KVArena, ids: list[int]) -> None:
    """Write each block's own number into its keys, and the negative into its values."""
    for block in ids:
        slots = torch.arange(4) + 4 * block
        content = torch.full((4, 2, 8), float(block))
        memory.write(slots, content, -content)


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_what_is_written_is_read_whatever_block_it_lies_in(kind: str) -> None:
    memory = arena(kind)
    memory.resize(20)
    slots = torch.tensor([79, 0, 30, 27, 28])
    keys, values = torch.randn(5, 2, 8), torch.randn(5, 2, 8)
    memory.write(slots, keys, values)
    found_keys, found_values = memory.read_slots(slots)
    assert torch.equal(found_keys, keys)
    assert torch.equal(found_values, values)
    blocks, _ = memory.read(torch.tensor([19, 7, 0]))
    assert torch.equal(blocks[0, 3], keys[0])
    assert torch.equal(blocks[1, 2], keys[2])
    assert torch.equal(blocks[2, 0], keys[1])


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_shrinking_moves_held_blocks_together_with_their_content(kind: str) -> None:
    memory = arena(kind)
    pool = KVPool(30, ArenaStorage(memory))
    first, _ = pool.take(10)
    second, _ = pool.take(12)
    fill(memory, second)
    was = list(second)
    pool.resize(13)
    assert pool.free_layer_blocks == 13 - 22
    pool.release(first)
    moved = pool.settle()
    assert memory.blocks == 13
    second = [moved.get(block, block) for block in second]
    assert max(second) < 13
    keys, values = memory.read(torch.tensor(second))
    assert keys[:, 0, 0, 0].tolist() == [float(block) for block in was]
    assert values[:, 3, 1, 7].tolist() == [-float(block) for block in was]
    pool.check(second)


def test_growth_gives_blocks_of_zeros_and_leaves_what_is_held_where_it_is() -> None:
    memory = arena("cuda")
    pool = KVPool(5, ArenaStorage(memory))
    held, _ = pool.take(5)
    fill(memory, held)
    pool.resize(40)
    assert pool.settle() == {}
    keys, _ = memory.read(torch.tensor(held))
    assert keys[:, 0, 0, 0].tolist() == [float(block) for block in held]
    more, _ = pool.take(35)
    assert not memory.read(torch.tensor(more))[0].any()


@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="resident memory is read from /proc")
def test_a_pool_that_shrinks_gives_its_memory_back_to_the_system() -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    memory = KVArena(Cpu(), capacity=2000, block_tokens=16, heads=8, head_dim=64, dtype=torch.float32)
    before = resident()
    memory.resize(1000)
    grown = resident() - before
    assert grown == pytest.approx(1000 * memory.block_bytes, rel=0.05)
    memory.resize(100)
    assert resident() - before == pytest.approx(100 * memory.block_bytes, rel=0.2)


def test_an_arena_that_cannot_grow_stays_as_it_is() -> None:
    device = FakeCuda()
    memory = KVArena(device, capacity=500, **SHAPE)
    memory.resize(20)
    fill(memory, [19])
    in_use, refused = device.in_use, device.allocations + 1
    device.refuse = frozenset({refused})
    with pytest.raises(torch.OutOfMemoryError):
        memory.resize(400)
    assert device.allocations == refused + 1
    assert (memory.blocks, device.in_use) == (20, in_use)
    assert memory.read(torch.tensor([19]))[0].eq(19).all()
    memory.resize(400)
    assert device.in_use == memory.backed_bytes >= memory.allocated_bytes


def test_memory_beyond_the_arena_is_not_a_number() -> None:
    memory = KVArena(FakeCuda(), capacity=500, **SHAPE)
    memory.resize(100)
    memory.resize(16)
    memory.resize(20)
    assert not memory.kv[:20].any()
    assert memory.kv[40:].isnan().all()


def test_memory_is_unmapped_only_after_the_work_that_may_read_it() -> None:
    class Hasty(FakeCuda):
        def computed(self) -> None:
            """Wait for nothing."""

    for device in (FakeCuda(), Hasty()):
        with device:
            memory = KVArena(device, capacity=500, **SHAPE)
            memory.resize(300)
            memory.read(torch.tensor([299]))
            if isinstance(device, Hasty):
                with pytest.raises(AssertionError, match="may still read"):
                    memory.resize(10)
            else:
                memory.resize(10)


@pytest.mark.gpu
def test_on_a_gpu_memory_is_mapped_counted_and_given_back() -> None:
    from hw.elastic.device import device_of, make_current

    place = torch.device("cuda", 0)
    make_current(place)
    device = device_of(place)
    before, free = device.in_use_bytes(), torch.cuda.mem_get_info(place)[0]
    memory = KVArena(device, capacity=4000, block_tokens=16, heads=8, head_dim=128, dtype=torch.bfloat16)
    assert memory.kv.device == place
    memory.resize(2000)
    taken = memory.backed_bytes
    assert device.in_use_bytes() - before == taken >= memory.allocated_bytes
    alone = "PYTEST_XDIST_WORKER" not in os.environ  # else other tests take memory of this GPU, and free it
    assert not alone or free - torch.cuda.mem_get_info(place)[0] >= taken
    memory.kv[:2000].fill_(3)
    memory.resize(100)
    memory.resize(2000)
    assert bool((memory.kv[:100] == 3).all())
    assert not bool(memory.kv[100:2000].any())
    assert memory.read(torch.tensor([99, 100], device=place))[0].float().amax((1, 2, 3)).tolist() == [3, 0]
    memory.close()
    assert device.in_use_bytes() == before
    assert not alone or free - torch.cuda.mem_get_info(place)[0] < 8 << 20
