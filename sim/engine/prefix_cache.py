"""The prefix cache of a replica: KV that requests find because others computed the same beginning of a prompt.

sim/engine/protocol.py states its rules. Several requests may hold one prefix block. While none does, its KV blocks are
free in the pool and can be claimed by the owner number of the prefix block until others take them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from sim.engine.block_table import PrefixBlock
from sim.engine.kv_pool import NO_OWNER, KVPool
from sim.engine.live_request import LiveRequest
from sim.engine.protocol import EngineConfig
from sim.results.records import Status


class PrefixCache:
    """The prefix blocks that requests can find, by hash id.

    active: whether the running plan lets requests add to the cache and find blocks in it.
    """

    def __init__(self, config: EngineConfig, pool: KVPool) -> None:
        """Begin empty and inactive."""
        self.active = False
        self._enabled = config.prefix_caching
        self._tokens = config.hash_block_tokens
        self._pool = pool
        self._by_hash: dict[int, PrefixBlock] = {}
        self._by_owner: dict[int, PrefixBlock] = {}
        self._made = 0

    def blocks_within(self, live: LiveRequest, tokens: int, *, answer: bool = False) -> int:
        """Return how many prefix blocks lie within the first ``tokens`` tokens of a prompt; 0 while inactive.

        answer: whether to count those of its answer too.
        """
        if not self.active:
            return 0
        tokens = tokens if answer else min(tokens, live.request.prompt_tokens)
        return min(tokens // self._tokens, len(live.request.hash_ids))

    def find(self, live: LiveRequest) -> list[PrefixBlock]:
        """Return the leading prefix blocks that a waiting request finds; at least one token is left to compute."""
        found = []
        for hash_id in live.request.hash_ids[: self.blocks_within(live, live.target_tokens - 1)]:
            if hash_id not in self._by_hash:
                break
            found.append(self._by_hash[hash_id])
        return found

    def found_tokens(self, live: LiveRequest) -> int:
        """Return how many tokens the blocks of ``find`` cover."""
        return len(self.find(live)) * self._tokens

    def shared_layer_blocks(self, live: LiveRequest, others: Sequence[LiveRequest]) -> int:
        """Return how many KV blocks a request holds or finds that others hold or find too."""
        if not self._enabled:
            return 0
        theirs = {id(block) for other in others for block in self._of(other)}
        return sum(block.layer_blocks for block in self._of(live) if id(block) in theirs)

    def _of(self, live: LiveRequest) -> Iterable[PrefixBlock]:
        return live.table.prefix.values() if live.status is Status.RUNNING else self.find(live)

    def hold(self, live: LiveRequest) -> None:
        """Let an admitted request hold the prefix blocks that it finds."""
        found = self.find(live)
        live.table.prefix = dict(enumerate(found))
        live.next_prefix_block, live.fills_cache = len(found), self.active
        for block in found:
            if not block.holders:
                self._pool.claim(block.owner, block.layer_blocks)
            block.holders += 1

    def let_go(self, live: LiveRequest) -> None:
        """Stop holding a request's prefix blocks, from the last to the first; free those without other holders."""
        for place in sorted(live.table.prefix, reverse=True):
            block = live.table.prefix.pop(place)
            block.holders -= 1
            if block.holders:
                continue
            if block.known and self._pool.free_layer_blocks < 0:  # the shrunk pool takes some of its KV blocks
                self._forget(block)
            self._pool.release(_last_first(block), block.owner if block.known else NO_OWNER)

    def fill(self, live: LiveRequest, *, answer: bool = False) -> None:
        """Add the prefix blocks whose end a prefill has passed; if one is cached already, its copy stays private.

        answer: whether to add those of its answer too, as when a turn of a session ends.
        """
        if not live.fills_cache:
            return
        while live.next_prefix_block < self.blocks_within(live, live.computed_tokens, answer=answer):
            place = live.next_prefix_block
            hash_id = live.request.hash_ids[place]
            if hash_id not in self._by_hash:
                self._made += 1
                block = PrefixBlock(NO_OWNER - self._made, hash_id, live.table.give_to_prefix(place))
                self._by_hash[hash_id] = self._by_owner[block.owner] = live.table.prefix[place] = block
            live.next_prefix_block += 1

    def overwritten(self, owner: int) -> None:
        """Forget a prefix block because some of its KV blocks were taken; the others are useless alone."""
        self._forget(self._by_owner[owner])
        self._pool.claim(owner, 0)

    def forget(self, running: Iterable[LiveRequest]) -> None:
        """Clear the cache; running requests keep the prefix blocks that they hold, and add no more."""
        for block in list(self._by_owner.values()):
            self._forget(block)
            if not block.holders:
                self._pool.claim(block.owner, 0)
        for live in running:
            live.fills_cache = False

    def drop_layers(self, running: Iterable[LiveRequest], kept: frozenset[int]) -> None:
        """Free the layers of held prefix blocks that prefill no longer runs."""
        for block in _held(running):
            for layer in block.blocks.keys() - kept:
                self._pool.release(block.blocks.pop(layer)[::-1])

    def rename(self, running: Iterable[LiveRequest], moved: dict[int, int]) -> None:
        """Update the numbers of KV blocks that moved in the pool."""
        for block in {id(block): block for block in (*self._by_owner.values(), *_held(running))}.values():
            block.blocks = {layer: [moved.get(i, i) for i in ids] for layer, ids in block.blocks.items()}

    def _forget(self, block: PrefixBlock) -> None:
        block.known = False
        del self._by_hash[block.hash_id], self._by_owner[block.owner]


def _held(running: Iterable[LiveRequest]) -> list[PrefixBlock]:
    """Return the prefix blocks that requests hold, each once."""
    return list({id(block): block for live in running for block in live.table.prefix.values()}.values())


def held_prefix_blocks(running: Iterable[LiveRequest]) -> list[int]:
    """Return the KV blocks of the prefix blocks that requests hold, each once."""
    return [i for block in _held(running) for ids in block.blocks.values() for i in ids]


def _last_first(block: PrefixBlock) -> list[int]:
    """Return the KV blocks of a prefix block, those of its last tokens first."""
    depth = max(map(len, block.blocks.values()), default=0)
    return [block.blocks[layer][index] for index in range(depth - 1, -1, -1) for layer in sorted(block.blocks)]
