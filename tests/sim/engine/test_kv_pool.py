"""Free and held KV blocks, and what a preempted request finds again."""

from __future__ import annotations

import math
from collections.abc import Sequence

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from sim.engine.kv_pool import KVPool
from tests.sim.serving import requests, tiny_engine

SIZE = 30


class Memory:
    """The memory behind a pool: what was last written into each block, copied when blocks move."""

    def __init__(self) -> None:
        self.content: list[object] = []

    def resize(self, blocks: int) -> None:
        self.content = [*self.content[:blocks], *[None] * (blocks - len(self.content))]

    def move(self, moved: dict[int, int]) -> None:
        for source, target in moved.items():
            self.content[target] = self.content[source]

    def copy(self, source: Sequence[int], target: Sequence[int]) -> None:
        raise AssertionError("a pool moves blocks, not tokens")


class PoolAgainstAQueueOfBlocks(RuleBasedStateMachine):
    """The pool against the obvious version: a queue with one entry per block, the longest free at its head."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = Memory()
        self.pool = KVPool(SIZE, self.memory)
        self.queue: list[int] = [-1] * SIZE
        self.held: list[list[int]] = []
        self.debt = 0
        self.owners = 0

    @rule(share=st.floats(0, 1))
    def take(self, share: float) -> None:
        count = int(share * len(self.queue)) if not self.debt else 0
        taken, self.queue = self.queue[:count], self.queue[count:]
        ids, overwritten = self.pool.take(count)
        assert overwritten == list(dict.fromkeys(owner for owner in taken if owner >= 0))
        self.held.append(ids)
        self._write()

    def _write(self) -> None:
        """Write into every held block its place in the list of held blocks, to check later that it is still there."""
        for number, ids in enumerate(self.held):
            for place, block in enumerate(ids):
                self.memory.content[block] = (number, place)

    @precondition(lambda self: self.held)
    @rule(which=st.integers(0), keep=st.booleans())
    def release(self, which: int, keep: bool) -> None:
        ids = self.held.pop(which % len(self.held))
        owner = self.owners if keep else -1
        self.owners += keep
        self.pool.release(ids, owner)
        paid = min(self.debt, len(ids))
        self.debt -= paid
        self.queue += [owner] * (len(ids) - paid)
        self._write()

    @precondition(lambda self: any(owner >= 0 for owner in self.queue))
    @rule(share=st.floats(0, 1), which=st.integers(0))
    def claim(self, share: float, which: int) -> None:
        owners = sorted({owner for owner in self.queue if owner >= 0})
        owner = owners[which % len(owners)]
        count = math.ceil(share * self.queue.count(owner)) if not self.debt else 0
        self.held.append(self.pool.claim(owner, count))
        for _ in range(count):
            self.queue.remove(owner)
        self.queue = [-1 if entry == owner else entry for entry in self.queue]
        self._write()

    @rule()
    def forget(self) -> None:
        self.pool.forget()
        self.queue = [-1] * len(self.queue)

    @rule(size=st.integers(0, 2 * SIZE))
    def resize(self, size: int) -> None:
        change = size - self.pool.layer_blocks
        lost = self.pool.resize(size)
        if change > 0:
            paid = min(self.debt, change)
            self.debt -= paid
            self.queue += [-1] * (change - paid)
            assert lost == []
        else:
            gone = min(-change, len(self.queue))
            taken, self.queue = self.queue[:gone], self.queue[gone:]
            self.debt += -change - gone
            assert lost == list(dict.fromkeys(owner for owner in taken if owner >= 0))

    @rule()
    def settle(self) -> None:
        moved = self.pool.settle()
        self.held = [[moved.get(block, block) for block in ids] for ids in self.held]
        for number, ids in enumerate(self.held):
            for place, block in enumerate(ids):
                assert self.memory.content[block] == (number, place), "a held block keeps its content as it moves"

    @invariant()
    def the_same_blocks_are_free_and_kept(self) -> None:
        assert self.pool.free_layer_blocks == len(self.queue) - self.debt
        assert self.pool.used_layer_blocks == sum(map(len, self.held))
        assert self.pool.free_layer_blocks + self.pool.used_layer_blocks == self.pool.layer_blocks
        for owner in range(self.owners):
            assert self.pool.kept_layer_blocks(owner) == self.queue.count(owner)
        self.pool.check(block for ids in self.held for block in ids)


TestPool = PoolAgainstAQueueOfBlocks.TestCase


def test_a_preempted_request_computes_less_when_it_may_find_its_kv_again() -> None:
    rows = [(0.0, 16, 20), (0.0, 16, 20), (0.0, 16, 20)]
    computed = {}
    for reuse in (False, True):
        engine = tiny_engine(kv_blocks=16, reuse_preempted_kv=reuse)
        engine.submit(requests(*rows))
        engine.run_until(math.inf)
        assert engine.records().preemptions.sum() > 0
        assert engine.records().produced_tokens.tolist() == [20, 20, 20]
        computed[reuse] = int(engine.iterations().prefill_tokens.sum())
    assert 48 < computed[True] < computed[False]


def test_a_request_that_came_back_without_its_kv_does_not_lose_what_it_computes_then() -> None:
    """Once it runs again, what is left of it in the pool has no owner, even if it was too little to be found."""
    pool = KVPool(10)
    ids, _ = pool.take(10)
    pool.release(ids[:3], owner=7)
    pool.claim(7, 0)
    assert pool.kept_layer_blocks(7) == 0
    assert pool.take(3) == (ids[:3], [])
