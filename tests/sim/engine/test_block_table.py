"""Which KV blocks hold the tokens of a request."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from sim.cost.kv_format import KVFormat
from sim.cost.plan import KVKeep
from sim.engine.block_table import BlockTable, ring_place, ring_positions
from sim.engine.kv_pool import KVPool


@given(st.integers(0, 9), st.integers(1, 9), st.integers(1, 60))
def test_a_ring_holds_the_first_and_the_last_tokens(first: int, last: int, tokens: int) -> None:
    keep = KVKeep(first_tokens=first, last_tokens=last)
    positions = ring_positions(keep, tokens)
    assert sorted(positions) == sorted({*range(min(first, tokens)), *range(max(0, tokens - last), tokens)})
    assert len(positions) == keep.tokens(tokens)
    assert [ring_place(keep, position) for position in positions] == list(range(len(positions)))


def test_blocks_found_again_are_those_of_the_first_tokens_of_every_layer() -> None:
    pool = KVPool(40)
    table = BlockTable(mha=frozenset({0, 2, 3}), block_tokens=4)
    table.hold(pool, 18)  # 5 blocks a layer
    before = {layer: list(ids) for layer, ids in table.blocks.items()}
    pool.release(table.own_blocks(), owner=0)
    pool.take(25)  # blocks without an owner
    pool.take(4)  # and the last block of every layer, and one before
    again = BlockTable(mha=frozenset({0, 2, 3}), block_tokens=4)
    again.found(pool.claim(0, 9))
    assert again.blocks == {layer: ids[:3] for layer, ids in before.items()}


def test_a_layer_that_no_longer_runs_gives_its_blocks_back() -> None:
    pool = KVPool(40)
    table = BlockTable(mha=frozenset({0, 1}), block_tokens=4)
    table.hold(pool, 9)
    table.mha = frozenset({1})
    table.hold(pool, 9)
    assert (table.held_layer_blocks, pool.used_layer_blocks) == (3, 3)
    assert list(table.blocks) == [1]


def test_a_prefix_block_leaves_the_own_blocks_and_the_tokens_after_it_keep_theirs() -> None:
    pool = KVPool(40)
    table = BlockTable(mha=frozenset({0, 1}), block_tokens=4, prefix_layer_blocks=2)
    table.hold(pool, 20)
    before = {layer: list(ids) for layer, ids in table.blocks.items()}
    assert table.give_to_prefix(0) == {layer: ids[:2] for layer, ids in before.items()}
    assert table.blocks == {layer: ids[2:] for layer, ids in before.items()}


@given(st.integers(1, 5), st.integers(0, 5), st.integers(1, 6), st.integers(1, 40), st.sampled_from([16, 8, 4]))
def test_tokens_that_stay_move_into_the_ring_and_nothing_is_read_after_it_was_overwritten(
    block_tokens: int, first: int, last: int, tokens: int, bits: int
) -> None:
    wanted = a_format(KVKeep(first_tokens=first, last_tokens=last), bits, block_tokens)
    pool = KVPool(100)
    table = BlockTable(mha=frozenset({0}), block_tokens=block_tokens)
    table.hold(pool, tokens)
    memory = {slot: token for token, slot in enumerate(table.slots(0, 0, tokens))}
    source, target = table.end_prefill(0, tokens, wanted)
    written = dict(zip(target, [memory[slot] for slot in source], strict=True))
    memory = {**memory, **written} if bits == 16 else written
    table.formats = (wanted,)
    table.hold(pool, tokens)
    kept = [memory[slot] for slot in table.kept_slots(tokens, bits)]
    assert kept == ring_positions(wanted.keep, tokens)


@given(st.lists(st.integers(1, 60), min_size=1, max_size=8), st.sampled_from([8, 4]))
def test_layers_at_fewer_bits_take_blocks_less_often_and_a_reader_meets_every_new_one(
    growth: list[int], bits: int
) -> None:
    pool, full, packed = KVPool(2000), a_format(KVKeep(), 16, 4), a_format(KVKeep(), bits, 4)
    table = BlockTable(mha=frozenset({0, 1}), block_tokens=4, formats=(full, packed))
    seen: dict[int, list[int]] = {0: [], 1: []}
    tokens = 0
    for more in growth:
        tokens += more
        table.hold(pool, tokens)
        for layer, ids in table.blocks.items():
            seen[layer] = seen[layer][: table.unchanged] + ids[table.unchanged :]
        table.unchanged = max(map(len, table.blocks.values()))
        assert seen == table.blocks
        assert [len(table.blocks[layer]) for layer in (0, 1)] == [full.blocks(tokens), packed.blocks(tokens)]


def a_format(keep: KVKeep, bits: int, block_tokens: int) -> KVFormat:
    """Return a format without scales: half the bits, twice the tokens."""
    return KVFormat(keep, bits, block_tokens * 16 // bits, bits, 16)
