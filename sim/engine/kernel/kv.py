"""KV blocks: how many a request needs, taking and freeing them, and the last owners of free blocks.

The kernel counts KV blocks and does not number them. Free blocks are runs, in order of their release; the blocks that
have been free longest are taken first. A run remembers its last owner, a preempted request or a prefix block, which can
reuse what is left of it (sim/engine/kv_pool.py has the same rules).
"""

from __future__ import annotations

from sim.compiled import compiled
from sim.engine.kernel.layout import Table
from sim.engine.kernel.state import (
    NO_OWNER,
    ZERO,
    _has,
    counters_of,
    free_runs_of,
    kv_format_bits_of,
    kv_format_tokens_of,
    kv_precisions_of,
    kv_set_words_of,
    kv_sets_of,
    preempted_stack_of,
    prefix_block_of_id_of,
    prefix_blocks_of,
    prompts_of,
    requests_of,
    slots_of,
)


@compiled(inline=True)
def _blocks(tokens: int, block_tokens: int) -> int:
    return (tokens + block_tokens - 1) // block_tokens


@compiled()
def blocks_of(s: Table, i: int, tokens: int) -> int:
    """Return the KV blocks, over all layers, that slot i needs for this many tokens, without its prefix blocks."""
    n, slot, kept, bits = counters_of(s), slots_of(s)[i], kv_format_tokens_of(s), kv_format_bits_of(s)
    held_set, number, precisions = slot.kv_set, slot.kv_format_id, kv_precisions_of(s)
    if number < 0:
        return int(kv_sets_of(s)[held_set].layers * (_blocks(tokens, n.block_tokens) - slot.shared_blocks))
    tokens -= slot.saved_tokens
    # Layers may keep different numbers of tokens and bits; mostly they are those of the layer before.
    total, blocks, last = 0, 0, -1
    for layer in range(kept.shape[1]):
        if _has(kv_set_words_of(s), held_set, layer):
            if last < 0 or kept[number, layer] != kept[number, last] or bits[number, layer] != bits[number, last]:
                block_tokens = precisions[bits[number, layer]].block_tokens
                blocks, last = _blocks(min(tokens, kept[number, layer]), block_tokens), layer
            total += blocks
    return total


@compiled(inline=True)
def saved_tokens(s: Table, tokens: int) -> int:
    """Return how many tokens' bytes the running plan frees in each layer of a prompt of this many tokens."""
    return int(tokens * (100 - counters_of(s).kv_percent) // 100)


@compiled(inline=True)
def _prefix_blocks_in(s: Table, r: int, tokens: int) -> int:
    """Return how many prefix blocks lie within the first ``tokens`` tokens of a prompt; 0 while caching is off."""
    n = counters_of(s)
    return int(min(tokens // n.prefix_block_tokens, prompts_of(s)[r].prefix_blocks)) if n.caching else 0


@compiled()
def _found_again(s: Table, r: int) -> int:
    """Return the leading tokens of a preempted request whose KV has not been overwritten."""
    n, request, free_runs = counters_of(s), requests_of(s)[r], free_runs_of(s)
    run = request.free_run
    if run < 0 or free_runs[run].blocks == 0:
        return 0
    # Its prefix blocks were freed after its own KV blocks, so all of them remain while one own block does.
    found = _prefix_blocks_in(s, r, request.computed_tokens) * n.prefix_block_kv_blocks
    found += free_runs[run].blocks // kv_sets_of(s)[n.prefill_set].layers
    # Only full blocks count: the last one may be partly filled.
    found = min(found, request.computed_tokens // n.block_tokens)
    # At least one token is computed again: an iteration without tokens would produce none.
    last = (request.prompt_tokens + request.produced_tokens - 1) // n.block_tokens
    return int(min(found, last) * n.block_tokens)


@compiled()
def _forget_prefix_block(s: Table, number: int) -> None:
    """Let no request find a prefix block again; if it is free, its run loses its owner and its number is reused."""
    n, block = counters_of(s), prefix_blocks_of(s)[number]
    prefix_block_of_id_of(s)[block.hash_id] = 0
    block.hash_id = -1
    if block.holders == 0:
        free_runs_of(s)[block.free_run].owner = NO_OWNER
        block.holders, block.free_run = -1, n.free_prefix_block
        n.free_prefix_block = number


@compiled()
def _take(s: Table, blocks: int) -> None:
    """Take this many free KV blocks, the longest free first."""
    n, requests, free_runs = counters_of(s), requests_of(s), free_runs_of(s)
    n.free_blocks -= blocks
    if not n.free_runs_kept:
        return
    while blocks > 0:
        run = free_runs[n.free_run_head]
        taken = min(run.blocks, blocks)
        run.blocks -= taken
        blocks -= taken
        owner = run.owner
        if taken > 0 and owner >= 0:
            requests[owner].computed_tokens = _found_again(s, owner)
        elif taken > 0 and owner < NO_OWNER:  # a prefix block is found only if all its KV blocks are there
            _forget_prefix_block(s, NO_OWNER - owner)
        if run.blocks == 0:
            n.free_run_head += 1
            if owner >= 0:
                requests[owner].free_run = -1


@compiled(inline=True)
def _place_run(s: Table, run: int) -> None:
    """Store a run's place in its owner's record."""
    owner = free_runs_of(s)[run].owner
    if owner >= 0:
        requests_of(s)[owner].free_run = run
    elif owner < NO_OWNER:
        prefix_blocks_of(s)[NO_OWNER - owner].free_run = run


@compiled()
def _pack_runs(s: Table) -> int:
    """Move the free runs to the front of their array and merge neighbors without an owner; return the new tail."""
    n, free_runs = counters_of(s), free_runs_of(s)
    to = ZERO  # a typed zero: a plain 0 would give `_place_run` a second argument type to compile for
    for at in range(n.free_run_head, n.free_run_tail):
        run = free_runs[at]
        if run.blocks == 0 and run.owner == NO_OWNER:
            continue
        if to > 0 and run.owner == NO_OWNER and free_runs[to - 1].owner == NO_OWNER:
            free_runs[to - 1].blocks += run.blocks
            continue
        free_runs[to].owner, free_runs[to].blocks = run.owner, run.blocks
        _place_run(s, to)
        to += 1
    n.free_run_head = 0
    return int(to)


@compiled()
def _release(s: Table, blocks: int, owner: int) -> None:
    """Free KV blocks; ``owner`` can reuse them until they are taken. A pool in debt absorbs the first of them."""
    n, free_runs = counters_of(s), free_runs_of(s)
    owed = min(max(-n.free_blocks, 0), blocks)
    n.free_blocks += blocks
    blocks -= owed
    if not n.free_runs_kept or blocks == 0:
        return
    tail = n.free_run_tail
    if owner == NO_OWNER and tail > n.free_run_head and free_runs[tail - 1].owner == NO_OWNER:
        free_runs[tail - 1].blocks += blocks
        return
    # The array has room for twice the runs that can exist: one per owner, and one without an owner between each two.
    if tail == len(free_runs):
        tail = _pack_runs(s)
    free_runs[tail].owner, free_runs[tail].blocks = owner, blocks
    _place_run(s, tail)
    n.free_run_tail = tail + 1


@compiled()
def resize_pool(s: Table, blocks: int) -> None:
    """Grow or shrink the pool; ``free_blocks`` is negative while more is held than it has (sim/engine/kv_pool.py)."""
    n = counters_of(s)
    change = blocks - n.pool_blocks
    if change < 0:
        available = max(n.free_blocks, 0)
        _take(s, min(-change, available))
        n.free_blocks -= max(-change - available, 0)
    n.pool_blocks = blocks
    if change > 0:
        _release(s, change, NO_OWNER)


@compiled(once=True)
def forget_kept_kv(s: Table) -> None:
    """Let no preempted request find its freed KV again."""
    n, requests, free_runs = counters_of(s), requests_of(s), free_runs_of(s)
    for at in range(n.free_run_head, n.free_run_tail):
        if free_runs[at].owner >= 0:
            requests[free_runs[at].owner].free_run = -1
            free_runs[at].owner = NO_OWNER
    for place in range(n.preempted_waiting):
        request = requests[preempted_stack_of(s)[place]]
        if request.host_blocks == 0:
            request.computed_tokens = 0


@compiled(once=True)
def forget_host_kv(s: Table) -> None:
    """Let every swapped request be computed again."""
    n, requests = counters_of(s), requests_of(s)
    for place in range(n.preempted_waiting):
        request = requests[preempted_stack_of(s)[place]]
        if request.host_blocks > 0:
            n.host_free_blocks += request.host_blocks
            request.host_blocks = request.computed_tokens = 0
