"""Block tables as arrays: what is kept between iterations is always what the tables hold now."""

from __future__ import annotations

import random
from itertools import chain
from typing import Any

import numpy as np
import pytest

from hw.elastic.block_arrays import read_table, stack_blocks
from sim.cost.kv_format import KVFormat
from sim.cost.plan import KV_KEEP_ALL, KVKeep
from sim.engine.block_table import BlockTable
from sim.engine.kv_pool import KVPool

LAYERS = 4


class NoMemory:
    """The storage of a pool without memory."""

    def resize(self, blocks: int) -> None:
        """Do nothing."""

    def move(self, moved: dict[int, int]) -> None:
        """Do nothing."""

    def copy(self, source: Any, target: Any) -> None:
        """Do nothing."""


def check(table: BlockTable, tokens: int) -> None:
    held = read_table(table, LAYERS, tokens)
    assert set(np.flatnonzero(held.runs).tolist()) == table.mha
    width = held.needed + 3
    stacked = stack_blocks([held], width)
    for layer in table.mha:
        keep = table.keep_of(layer)
        ids = table.blocks[layer]
        assert stacked[layer, 0, : len(ids)].tolist() == ids
        assert held.first[layer] == (keep.first_tokens or 0)
        assert held.last[layer] == (keep.last_tokens or 0)
        assert held.bits[layer] == table.bits_of(layer)
    assert held.keeps_all == all(table.keep_of(layer) == KV_KEEP_ALL for layer in range(LAYERS))


def a_format(keep: KVKeep, bits: int) -> KVFormat:
    """Return a format of blocks that hold 4 tokens at 16 bits."""
    return KVFormat(keep, bits, 4 * 16 // bits, bits, 16)


@pytest.mark.parametrize("seed", range(30))
def test_after_any_changes_the_arrays_are_the_tables(seed: int) -> None:
    rng = random.Random(seed)
    pool = KVPool(400, NoMemory())
    tables = [[BlockTable(mha=frozenset(range(LAYERS)), block_tokens=4), 0] for _ in range(3)]
    for table in tables:
        table[1] = rng.randint(1, 20)
        table[0].hold(pool, table[1])
    for _ in range(60):
        entry = rng.choice(tables)
        table, tokens = entry
        event = rng.choice(["grow", "grow", "grow", "shrink", "drop", "keep", "move", "leave", "nothing"])
        if event == "grow":
            entry[1] = tokens + rng.randint(1, 6)
        elif event == "shrink":
            entry[1] = rng.randint(1, tokens)
        elif event == "drop" and len(table.mha) > 1:
            table.mha = table.mha - {rng.choice(sorted(table.mha))}
        elif event == "keep" and table.formats is None:
            keeps = KV_KEEP_ALL, KVKeep(first_tokens=2, last_tokens=rng.randint(3, 12))
            bits = rng.choice([(16,), (16, 8, 4)])
            table.formats = tuple(a_format(rng.choice(keeps), rng.choice(bits)) for _ in range(LAYERS))
        elif event == "move":
            pool.resize(rng.randint(pool.used_layer_blocks + 1, 400))
            moved = pool.settle()
            for other, _ in tables:
                other.rename(moved)
            pool.resize(400)
        elif event == "leave" and table.formats is None:
            ids = table.own_blocks()
            pool.release(ids, owner=7)
            table.found(pool.claim(7, len(ids)))
        table.hold(pool, entry[1])
        if rng.random() < 0.6:
            for other, count in tables:
                check(other, count)
    pool.check(chain.from_iterable(table.own_blocks() for table, _ in tables))


def test_a_layer_that_joins_later_is_read_from_its_first_block() -> None:
    pool = KVPool(100, NoMemory())
    table = BlockTable(mha=frozenset({0, 2}), block_tokens=4)
    table.hold(pool, 30)
    check(table, 30)
    table.mha = frozenset({0, 1, 2})
    table.hold(pool, 31)
    check(table, 31)


def test_only_new_blocks_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    from hw.elastic.block_arrays import HeldBlocks

    ranges: list[tuple[int, int]] = []
    read = HeldBlocks._read

    def noted(held: HeldBlocks, table: BlockTable, start: int, stop: int) -> None:
        ranges.append((start, stop))
        read(held, table, start, stop)

    monkeypatch.setattr(HeldBlocks, "_read", noted)
    pool = KVPool(400, NoMemory())
    table = BlockTable(mha=frozenset(range(LAYERS)), block_tokens=4)
    for tokens in range(10, 26):
        table.hold(pool, tokens)
        check(table, tokens)
    assert ranges == [(0, 3), (3, 4), (4, 5), (5, 6), (6, 7)]
