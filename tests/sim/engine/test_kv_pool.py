"""Free and held KV blocks, and what a preempted request finds again."""

from __future__ import annotations

import math

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from sim.engine.kv_pool import KVPool
from tests.sim.serving import requests, tiny_engine

SIZE = 30


class PoolAgainstAQueueOfBlocks(RuleBasedStateMachine):
    """The pool's runs against the obvious thing: one entry a block in a queue, the longest free at its head."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = KVPool(SIZE)
        self.queue: list[int] = [-1] * SIZE
        self.owners = 0

    @rule(share=st.floats(0, 1))
    def take(self, share: float) -> None:
        count = int(share * len(self.queue))
        taken, self.queue = self.queue[:count], self.queue[count:]
        assert self.pool.take(count) == list(dict.fromkeys(owner for owner in taken if owner >= 0))

    @rule(share=st.floats(0, 1), keep=st.booleans())
    def release(self, share: float, keep: bool) -> None:
        count = int(share * (SIZE - len(self.queue)))
        owner = self.owners if keep else -1
        self.owners += keep
        self.pool.release(count, owner)
        self.queue += [owner] * count

    @precondition(lambda self: any(owner >= 0 for owner in self.queue))
    @rule(share=st.floats(0, 1), which=st.integers(0))
    def claim(self, share: float, which: int) -> None:
        owners = sorted({owner for owner in self.queue if owner >= 0})
        owner = owners[which % len(owners)]
        count = math.ceil(share * self.queue.count(owner))
        self.pool.claim(owner, count)
        for _ in range(count):
            self.queue.remove(owner)
        self.queue = [-1 if entry == owner else entry for entry in self.queue]

    @invariant()
    def the_same_blocks_are_free_and_kept(self) -> None:
        assert self.pool.free_layer_blocks == len(self.queue)
        assert self.pool.used_layer_blocks == SIZE - len(self.queue)
        for owner in range(self.owners):
            assert self.pool.kept_layer_blocks(owner) == self.queue.count(owner)


TestPool = PoolAgainstAQueueOfBlocks.TestCase
TestPool.settings = settings(max_examples=60, deadline=None)


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
    """What is left of it in the pool is nobody's once it runs again, even when it was too little to find."""
    pool = KVPool(10)
    pool.take(10)
    pool.release(3, owner=7)
    pool.claim(7, 0)
    assert pool.kept_layer_blocks(7) == 0
    assert pool.take(3) == []
