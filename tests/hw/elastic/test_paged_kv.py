"""The paged pool against the counts of sim.engine.kv_pool, and the memory behind it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch", reason="the paged pool needs torch: pip install -e '.[hw]'")

from hw.elastic.paged_kv import Arena, MappedArena, PagedKV, RequestPages, SlabArena, ring_place, ring_positions  # noqa: E402
from sim.cost.plan import KVKeep  # noqa: E402
from sim.engine.kv_pool import KVPool  # noqa: E402

SHAPE = {"block_tokens": 4, "heads": 2, "head_dim": 8, "dtype": torch.float32}


def arena(kind: str) -> Arena:
    if kind == "mapped":
        return MappedArena(capacity=500, **SHAPE)
    return SlabArena(slab_blocks=7, device=torch.device("cpu"), **SHAPE)


def fill(pool: PagedKV, ids: list[int]) -> None:
    """Write each block's own number into its keys, and the negative into its values."""
    for block in ids:
        slots = torch.arange(4) + 4 * block
        content = torch.full((4, 2, 8), float(block))
        pool.arena.write(slots, content, -content)


@pytest.mark.parametrize("kind", ["mapped", "slabs"])
def test_what_is_written_is_read_whatever_slab_it_lies_in(kind: str) -> None:
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


@pytest.mark.parametrize("kind", ["mapped", "slabs"])
def test_shrinking_moves_held_blocks_together_with_their_content(kind: str) -> None:
    pool = PagedKV(arena(kind), 30)
    first, _ = pool.take(10)
    second, _ = pool.take(12)
    fill(pool, second)
    was = list(second)
    pool.resize(13)
    assert pool.free_layer_blocks == 13 - 22
    pool.release(first)
    moved = pool.settle()
    assert pool.arena.blocks == 13
    second = [moved.get(block, block) for block in second]
    assert max(second) < 13
    keys, values = pool.arena.read(torch.tensor(second))
    assert keys[:, 0, 0, 0].tolist() == [float(block) for block in was]
    assert values[:, 3, 1, 7].tolist() == [-float(block) for block in was]
    pool.check(second)


def test_growth_gives_blocks_of_zeros_and_leaves_what_is_held_where_it_is() -> None:
    pool = PagedKV(arena("slabs"), 5)
    held, _ = pool.take(5)
    fill(pool, held)
    pool.resize(40)
    assert pool.settle() == {}
    keys, _ = pool.arena.read(torch.tensor(held))
    assert keys[:, 0, 0, 0].tolist() == [float(block) for block in held]
    more, _ = pool.take(35)
    assert not pool.arena.read(torch.tensor(more))[0].any()


STEPS = st.lists(
    st.tuples(st.sampled_from(["take", "release", "keep", "resize", "claim", "forget", "settle"]), st.integers(0, 40)),
    max_size=40,
)


@given(STEPS)
@settings(max_examples=150, deadline=None)
def test_free_and_held_blocks_are_counted_as_the_simulator_counts_them(steps: list[tuple[str, int]]) -> None:
    plain, paged = KVPool(25), PagedKV(arena("slabs"), 25)
    held: list[list[int]] = []
    owner = 0
    owners: list[int] = []
    for step, number in steps:
        if step == "take":
            count = min(number, max(plain.free_layer_blocks, 0))
            ids, overwritten = paged.take(count)
            assert overwritten == plain.take(count)
            held.append(ids)
        elif step in ("release", "keep") and held:
            ids = held.pop(number % len(held))
            if step == "keep":
                owners.append(owner)
            plain.release(len(ids), owner if step == "keep" else -1)
            paged.release(ids, owner if step == "keep" else -1)
            owner += step == "keep"
        elif step == "resize":
            assert paged.resize(number) == plain.resize(number)
        elif step == "claim" and owners:
            who = owners.pop(number % len(owners))
            count = min(number, plain.kept_layer_blocks(who))
            plain.claim(who, count)
            held.append(paged.claim(who, count))
        elif step == "forget":
            plain.forget()
            paged.forget()
        elif step == "settle":
            moved = paged.settle()
            held = [[moved.get(block, block) for block in ids] for ids in held]
        assert paged.free_layer_blocks == plain.free_layer_blocks
        assert paged.used_layer_blocks == plain.used_layer_blocks
        assert [paged.kept_layer_blocks(o) for o in range(owner)] == [plain.kept_layer_blocks(o) for o in range(owner)]
        paged.check(block for ids in held for block in ids)


@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="resident memory is read from /proc")
def test_a_pool_that_shrinks_gives_its_memory_back_to_the_system() -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    memory = MappedArena(capacity=2000, block_tokens=16, heads=8, head_dim=64, dtype=torch.float32)
    before = resident()
    memory.resize(1000)
    grown = resident() - before
    assert grown == pytest.approx(1000 * memory.block_bytes, rel=0.05)
    memory.resize(100)
    assert resident() - before == pytest.approx(100 * memory.block_bytes, rel=0.2)


@given(st.integers(0, 9), st.integers(1, 9), st.integers(1, 60))
def test_a_ring_holds_the_first_and_the_last_tokens(first: int, last: int, tokens: int) -> None:
    keep = KVKeep(first_tokens=first, last_tokens=last)
    positions = ring_positions(keep, tokens)
    assert sorted(positions) == sorted({*range(min(first, tokens)), *range(max(0, tokens - last), tokens)})
    assert len(positions) == keep.tokens(tokens)
    assert [ring_place(keep, position) for position in positions] == list(range(len(positions)))


def test_blocks_found_again_are_those_of_the_first_tokens_of_every_layer() -> None:
    pool = PagedKV(arena("slabs"), 40)
    pages = RequestPages(mha=frozenset({0, 2, 3}))
    pages.hold(pool, 18)  # 5 blocks a layer
    before = {layer: list(ids) for layer, ids in pages.blocks.items()}
    pool.release(pages.all_blocks(), owner=0)
    pool.take(25)  # nobody's blocks
    pool.take(4)  # and the last block of every layer, and one before
    again = RequestPages(mha=frozenset({0, 2, 3}))
    again.found(pool.claim(0, 9))
    assert again.blocks == {layer: ids[:3] for layer, ids in before.items()}
