"""The prefix cache: KV of the first tokens of prompts, shared by the requests that begin alike, as in vLLM V1.

A **prefix block** is what one hash id of a trace stands for: some tokens of a prompt (``prefix_block_tokens``), all
tokens before them the same. Rules:

1. Requests find a prefix block if they are admitted after a prefill has passed its end. A request holds the longest run
   of its prompt's first blocks that it finds, together with every other request that does; the run is in the pool once.
   Found tokens are not computed. At least one token is, so a block that ends a prompt is computed again. A block that
   lies only partly in a prompt does not count.
2. When two requests compute the same block at once, the second keeps a private copy; the blocks after it are shared if
   they are new.
3. A request that ends or is preempted frees its own KV blocks first, then its prefix blocks from the last to the first.
   A prefix block without holders is free and still found. The longest free are taken first, and a prefix block is lost
   with the first of its KV blocks. With ``reuse_preempted_kv`` a preempted request also finds its own KV after them.
4. When the MHA blocks that prefill runs change, blocks from before are not found again: they are other KV. Running
   requests keep holding theirs, without the layers that prefill drops, and add nothing to the cache. Other precisions
   or FFN blocks leave the cache as it is, as they leave the KV of running requests.
5. While prefill and decode run different MHA blocks, or a plan does not keep every token (``kv_keep``), nothing is
   cached or found, and the cache is emptied when such a plan starts and when it ends. A request that holds prefix
   blocks keeps every token and, for those blocks, every layer that prefill runs.
"""

from __future__ import annotations

from sim.compiled import compiled
from sim.engine.kernel.kv import _forget_prefix_block, _prefix_blocks_in, _release
from sim.engine.kernel.layout import Table
from sim.engine.kernel.state import (
    NEVER,
    NO_OWNER,
    counters_of,
    free_runs_of,
    hash_ids_of,
    held_prefix_blocks_of,
    kv_sets_of,
    prefix_block_of_id_of,
    prefix_blocks_of,
    prompts_of,
    requests_of,
    slots_of,
)


@compiled()
def _find_prefix(s: Table, r: int) -> int:
    """Return the tokens that a waiting request finds; ``found_held_blocks`` counts the blocks that others hold."""
    n, request, hash_ids, blocks = counters_of(s), requests_of(s)[r], hash_ids_of(s), prefix_blocks_of(s)
    n.found_held_blocks = 0
    first = place = prompts_of(s)[r].hash_at
    # One token less than there are: the last is always computed, for it yields the next one.
    end = first + _prefix_blocks_in(s, r, request.prompt_tokens + request.produced_tokens - 1)
    while place < end:
        number = prefix_block_of_id_of(s)[hash_ids[place]]
        if number == 0:
            break
        n.found_held_blocks += blocks[number].holders > 0
        place += 1
    return int(max(request.computed_tokens, (place - first) * n.prefix_block_tokens))


@compiled()
def _hold_prefix_blocks(s: Table, i: int, count: int) -> None:
    """Let a request hold the first prefix blocks of its prompt, all of which are found; it goes on from there."""
    n, slot, hash_ids, free_runs = counters_of(s), slots_of(s)[i], hash_ids_of(s), free_runs_of(s)
    prompt = prompts_of(s)[slot.request]
    for place in range(prompt.hash_at, prompt.hash_at + count):
        number = prefix_block_of_id_of(s)[hash_ids[place]]
        block = prefix_blocks_of(s)[number]
        held_prefix_blocks_of(s)[place] = number
        if block.holders == 0:  # its KV blocks were free
            run = free_runs[block.free_run]
            n.free_blocks -= run.blocks
            run.owner, run.blocks = NO_OWNER, 0
        block.holders += 1
    slot.shared_blocks = count * n.prefix_block_kv_blocks
    if count < prompt.prefix_blocks:
        slot.fill_tokens = (count + 1) * n.prefix_block_tokens


@compiled()
def _fill_cache(s: Table, i: int) -> None:
    """Let others find the prefix blocks that a prefill has passed; where they find one already, this stays private."""
    n, slot, hash_ids, block_of_id = counters_of(s), slots_of(s)[i], hash_ids_of(s), prefix_block_of_id_of(s)
    prompt, computed = prompts_of(s)[slot.request], requests_of(s)[slot.request].computed_tokens
    while computed >= slot.fill_tokens:
        count = slot.fill_tokens // n.prefix_block_tokens
        place = prompt.hash_at + count - 1
        if block_of_id[hash_ids[place]] == 0:
            number = n.free_prefix_block
            if number > 0:
                n.free_prefix_block = prefix_blocks_of(s)[number].free_run
            else:
                n.prefix_block_count += 1
                number = n.prefix_block_count
            block = prefix_blocks_of(s)[number]
            block.holders, block.hash_id, block.kv_set = 1, hash_ids[place], n.prefill_set
            block_of_id[hash_ids[place]] = number
            held_prefix_blocks_of(s)[place] = number
            slot.shared_blocks += n.prefix_block_kv_blocks
        slot.fill_tokens = (count + 1) * n.prefix_block_tokens if count < prompt.prefix_blocks else NEVER


@compiled()
def _release_prefix_blocks(s: Table, i: int) -> None:
    """Stop holding a request's prefix blocks, from the last to the first; its own KV blocks are free by then."""
    n, slot, held = counters_of(s), slots_of(s)[i], held_prefix_blocks_of(s)
    prompt = prompts_of(s)[slot.request]
    slot.shared_blocks = 0
    for place in range(prompt.hash_at + prompt.prefix_blocks - 1, prompt.hash_at - 1, -1):
        number = held[place]
        if number == 0:
            continue
        held[place] = 0
        block = prefix_blocks_of(s)[number]
        kv_blocks = kv_sets_of(s)[block.kv_set].layers * n.prefix_block_kv_blocks
        if block.holders == 1 and block.hash_id >= 0 and n.free_blocks < 0:
            _forget_prefix_block(s, number)  # the pool has shrunk and takes some of its KV blocks
        block.holders -= 1
        if block.holders > 0:
            continue
        if block.hash_id >= 0:
            _release(s, kv_blocks, NO_OWNER - number)
        else:
            _release(s, kv_blocks, NO_OWNER)
            block.holders, block.free_run = -1, n.free_prefix_block
            n.free_prefix_block = number


@compiled(once=True)
def _forget_prefix_blocks(s: Table) -> None:
    """Let no request find a prefix block again; running requests hold theirs on, and fill no more."""
    n, slots, blocks = counters_of(s), slots_of(s), prefix_blocks_of(s)
    for i in range(len(slots)):
        slots[i].fill_tokens = NEVER
    for number in range(1, n.prefix_block_count + 1):
        if blocks[number].holders >= 0 and blocks[number].hash_id >= 0:
            _forget_prefix_block(s, number)
