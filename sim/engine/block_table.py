"""Which KV blocks hold the tokens of one request, layer by layer.

    table = BlockTable(mha=frozenset({0, 2}), block_tokens=16)
    overwritten = table.hold(pool, 40)              # 3 blocks of the pool for each of the two layers
    table.slots(2, start=32, count=8)               # where tokens 32 to 39 of layer 2 lie: block * 16 + place in it

A request owns its blocks, except those of the prefix cache at the beginning of its prompt, which several requests may
share (sim/engine/prefix_cache.py). ``sim.engine.kv_manager`` keeps one table per running request; a device reads its
slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from sim.cost.kv_format import KVFormat
from sim.cost.memory import kv_blocks
from sim.cost.plan import KV_KEEP_ALL, KVKeep
from sim.engine.kv_pool import KVPool


@dataclass(slots=True, eq=False)
class PrefixBlock:
    """The KV of one hash id in the prefix cache.

    owner: its owner number in the pool. blocks: layer -> its KV blocks, in the order of their tokens.
    holders: how many requests hold it. known: whether requests that are admitted later find it.
    """

    owner: int
    hash_id: int
    blocks: dict[int, list[int]]
    holders: int = 1
    known: bool = True

    @property
    def layer_blocks(self) -> int:
        """KV blocks over all layers."""
        return sum(map(len, self.blocks.values()))


@dataclass(slots=True, eq=False)
class BlockTable:
    """The KV blocks of one request.

    mha: layers whose MHA block it runs, and whose KV it holds.
    block_tokens: tokens of one KV block at 16 bits.
    formats: which tokens each layer keeps, and at how many bits; None while it keeps every token at 16 bits. A layer
        that keeps the first f and the last w tokens has a ring buffer after its first f slots: token t >= f lies in
        slot f + (t - f) % w.
    saved_tokens: how many tokens' bytes its prompt does not take in each layer, as its KV is compressed.
    blocks: layer -> its own KV blocks, in the order of their slots.
    prefix: index in the prompt, in prefix blocks -> the prefix block that the request holds there.
    prefix_layer_blocks: KV blocks of one layer in each prefix block.
    read: what a device keeps of ``blocks`` between iterations (hw/elastic/block_arrays.py). unchanged: how many leading
        blocks of every layer are as they were read.
    observed: what a device keeps of a prompt that is being computed, to compress it. packed: how it has compressed it.
    """

    mha: frozenset[int] = frozenset()
    block_tokens: int = 16
    formats: tuple[KVFormat, ...] | None = None
    saved_tokens: int = 0
    blocks: dict[int, list[int]] = field(default_factory=dict)
    prefix: dict[int, PrefixBlock] = field(default_factory=dict)
    prefix_layer_blocks: int = 0
    read: object = None
    unchanged: int = 0
    observed: object = None
    packed: object = None

    @property
    def own_layer_blocks(self) -> int:
        """KV blocks over all layers that only this request holds."""
        return sum(map(len, self.blocks.values()))

    @property
    def cached_layer_blocks(self) -> int:
        """KV blocks over all layers in the prefix blocks that it holds."""
        return sum(block.layer_blocks for block in self.prefix.values())

    @property
    def held_layer_blocks(self) -> int:
        """KV blocks over all layers, prefix blocks included."""
        return self.own_layer_blocks + self.cached_layer_blocks

    def keep_of(self, layer: int) -> KVKeep:
        """Return which tokens a layer keeps."""
        return self.formats[layer].keep if self.formats is not None else KV_KEEP_ALL

    def block_tokens_of(self, layer: int) -> int:
        """Return how many tokens of a layer a KV block holds."""
        return self.formats[layer].block_tokens if self.formats is not None else self.block_tokens

    def blocks_needed(self, layer: int, tokens: int) -> int:
        """Return the own blocks that one layer needs for ``tokens`` computed tokens."""
        if self.formats is None:
            return kv_blocks(tokens, self.block_tokens) - len(self.prefix) * self.prefix_layer_blocks
        return self.formats[layer].blocks(tokens - self.saved_tokens)

    def own_blocks_needed(self, tokens: int) -> int:
        """Return the own blocks over all layers that ``tokens`` computed tokens need."""
        if self.formats is None:
            return len(self.mha) * self.blocks_needed(0, tokens)
        return sum(self.blocks_needed(layer, tokens) for layer in self.mha)

    @property
    def stores_hidden(self) -> bool:
        """Whether it stores hidden states in place of keys and values."""
        return self.formats is not None and self.formats[0].hidden

    def hold(self, pool: KVPool, tokens: int) -> list[int]:
        """Take or free blocks so that ``tokens`` computed tokens fit exactly; return owners whose content is lost."""
        wanted = {layer: self.blocks_needed(layer, tokens) for layer in sorted(self.mha)}
        freed: list[int] = []
        for layer in sorted(self.blocks, reverse=True):
            ids, keep = self.blocks[layer], wanted.get(layer, 0)
            freed.extend(ids[keep:][::-1])
            del ids[keep:]
            if keep < self.unchanged:
                self.unchanged = keep
            if layer not in wanted:
                del self.blocks[layer]
        if freed:
            pool.release(freed)
        known = len(self.blocks)
        missing = {layer: count - len(self.blocks.setdefault(layer, [])) for layer, count in wanted.items()}
        if len(self.blocks) > known:
            self.unchanged = 0
        ids, overwritten = pool.take(sum(missing.values()))
        at = 0
        for layer, count in missing.items():
            if count:
                self.unchanged = min(self.unchanged, len(self.blocks[layer]))  # layers grow at different times
            self.blocks[layer].extend(ids[at : at + count])
            at += count
        return overwritten

    def holds_exactly(self, tokens: int) -> bool:
        """Return True only if ``hold`` would change nothing; a quick check for the common case, everything kept."""
        if self.formats is not None or self.blocks.keys() != self.mha:
            return False
        needed = self.blocks_needed(0, tokens)
        return all(len(ids) == needed for ids in self.blocks.values())

    def own_blocks(self) -> list[int]:
        """Return its own blocks, those of the last tokens first; among blocks of the same tokens, by layer."""
        deepest = max(map(len, self.blocks.values()), default=0)
        return [
            self.blocks[layer][index]
            for index in range(deepest - 1, -1, -1)
            for layer in sorted(self.blocks)
            if index < len(self.blocks[layer])
        ]

    def leading_blocks(self, count: int | None = None) -> list[int]:
        """Return the first ``count`` own blocks of every layer (None: all), by layer, in the order of their tokens."""
        return [block for layer in sorted(self.blocks) for block in self.blocks[layer][:count]]

    def found(self, ids: Sequence[int]) -> None:
        """Hold blocks that were found again; ``ids`` has the order of ``own_blocks``."""
        layers = sorted(self.mha)
        self.blocks, self.unchanged = {layer: [] for layer in layers}, 0
        for index, block in enumerate(reversed(ids)):
            self.blocks[layers[-1 - index % len(layers)]].append(block)

    def give_to_prefix(self, place: int) -> dict[int, list[int]]:
        """Remove the blocks of one prefix block from its own blocks and return them, layer by layer."""
        # Prefix blocks before ``place`` that it shares are not among its own blocks.
        before = sum(other < place for other in self.prefix)
        start = (place - before) * self.prefix_layer_blocks
        stop = start + self.prefix_layer_blocks
        moved = {layer: ids[start:stop] for layer, ids in self.blocks.items()}
        for ids in self.blocks.values():
            del ids[start:stop]
        self.unchanged = 0
        return moved

    def rename(self, moved: dict[int, int]) -> None:
        """Update the numbers of its own blocks that moved in the pool."""
        self.unchanged = 0
        for layer, ids in self.blocks.items():
            self.blocks[layer] = [moved.get(block, block) for block in ids]

    def slots(self, layer: int, start: int, count: int) -> list[int]:
        """Return the slots of ``count`` tokens of a layer from ``start`` on.

        A slot is block number * tokens of one KV block + place in it; KV at fewer bits has more tokens in a block.
        """
        keep = self.keep_of(layer)
        if keep.first_tokens is None or keep.last_tokens is None:
            return self.slots_of(layer, range(start, start + count))
        return self.slots_of(layer, [ring_place(keep, token) for token in range(start, start + count)])

    def slots_of(self, layer: int, places: Sequence[int]) -> list[int]:
        """Return the slots of places of a layer, counted from its first slot."""
        ids, size = self.blocks[layer], self.block_tokens_of(layer)
        return [ids[place // size] * size + place % size for place in places]

    def bits_of(self, layer: int) -> int:
        """Return the bits at which a layer stores KV."""
        return self.formats[layer].bits if self.formats is not None else 16

    def kept_slots(self, tokens: int, bits: int) -> list[int]:
        """Return the slots of kept tokens among ``tokens`` computed ones in layers at some bits, in order of place.

        For two requests with the same layers and formats, equal positions of this list correspond.
        """
        return [
            slot
            for layer in sorted(self.blocks)
            if self.bits_of(layer) == bits
            for slot in self.slots_of(layer, range(self.keep_of(layer).tokens(tokens)))
        ]

    def end_prefill(self, layer: int, tokens: int, wanted: KVFormat) -> tuple[list[int], list[int]]:
        """Return which slots of a layer to copy to which others so that its KV of ``tokens`` has a format.

        The first are slots at 16 bits, the second those of the format. It has no format yet.
        """
        assert self.formats is None
        keep, ids, size = wanted.keep, self.blocks[layer], wanted.block_tokens
        if wanted.bits < 16 or wanted.hidden:
            places = range(keep.tokens(tokens))
            target = [ids[place // size] * size + place % size for place in places]
            return self.slots_of(layer, ring_positions(keep, tokens)), target
        first, last = keep.first_tokens, keep.last_tokens
        if first is None or last is None or tokens <= first + last:
            return [], []
        newest = range(tokens - last, tokens)  # the first tokens stay where they are
        return self.slots_of(layer, newest), self.slots_of(layer, [ring_place(keep, token) for token in newest])


def ring_place(keep: KVKeep, token: int) -> int:
    """Return the place of a token, counted from a layer's first slot, if only first and last tokens are kept."""
    assert keep.first_tokens is not None
    assert keep.last_tokens is not None
    if token < keep.first_tokens:
        return token
    return keep.first_tokens + (token - keep.first_tokens) % keep.last_tokens


def ring_positions(keep: KVKeep, tokens: int) -> list[int]:
    """Return which token each place of a layer holds once ``tokens`` tokens have been computed."""
    kept = keep.tokens(tokens)
    if keep.first_tokens is None or keep.last_tokens is None or kept == tokens:
        return list(range(kept))
    first, last = keep.first_tokens, keep.last_tokens
    newest = tokens - 1
    # Place p of the ring holds the newest token t with (t - first) % last == p - first.
    return [place if place < first else newest - (newest - first - (place - first)) % last for place in range(kept)]
