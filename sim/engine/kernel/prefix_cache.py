"""The prefix cache: KV of the first tokens of prompts, shared by requests that begin alike, as in vLLM V1.

sim/engine/protocol.py states the rules. A **prefix block** is the KV of one hash id: ``prefix_block_tokens`` tokens of
a prompt. Here it is a row of ``prefix_blocks``, numbered from 1; its KV blocks are counted, not numbered. Arrays:

* ``hash_ids``: the ids of all prompts, one after the other; prompt r has those from ``prompts[r].hash_at`` on.
* ``prefix_block_of_id``: hash id -> the prefix block that requests find by it; 0 for none.
* ``held_prefix_blocks``: same places as ``hash_ids``: the prefix block that the request holds there; 0 for none.

A prefix block without holders is a free run (sim/engine/kernel/kv.py) whose owner is ``NO_OWNER - number``.
"""

from __future__ import annotations

from sim.compiled import compiled
from sim.engine.kernel.kv import _forget_prefix_block, _prefix_blocks_in, _release
from sim.engine.kernel.layout import Table
from sim.engine.kernel.state import (
    FILLED,
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
    """Return the tokens that a waiting request finds; ``found_held_blocks`` counts those blocks that others hold."""
    n, request, hash_ids, blocks = counters_of(s), requests_of(s)[r], hash_ids_of(s), prefix_blocks_of(s)
    n.found_held_blocks = 0
    first = place = prompts_of(s)[r].hash_at
    # Without the last token: it is always computed, because the next token is sampled from its output.
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
    """Let slot i hold the first ``count`` prefix blocks of its prompt, all of which are in the cache."""
    n, slot, hash_ids, free_runs = counters_of(s), slots_of(s)[i], hash_ids_of(s), free_runs_of(s)
    prompt = prompts_of(s)[slot.request]
    for place in range(prompt.hash_at, prompt.hash_at + count):
        number = prefix_block_of_id_of(s)[hash_ids[place]]
        block = prefix_blocks_of(s)[number]
        held_prefix_blocks_of(s)[place] = number
        if block.holders == 0:  # its KV blocks were free: take them out of the pool
            run = free_runs[block.free_run]
            n.free_blocks -= run.blocks
            run.owner, run.blocks = NO_OWNER, 0
        block.holders += 1
    slot.shared_blocks = count * n.prefix_block_kv_blocks
    slot.fill_tokens = (count + 1) * n.prefix_block_tokens if count < prompt.prefix_blocks else FILLED


@compiled()
def _fill_cache(s: Table, i: int) -> None:
    """Add the prefix blocks whose end a prefill has passed; if a block is cached already, this copy stays private."""
    n, slot, hash_ids, block_of_id = counters_of(s), slots_of(s)[i], hash_ids_of(s), prefix_block_of_id_of(s)
    prompt, computed = prompts_of(s)[slot.request], requests_of(s)[slot.request].computed_tokens
    while computed >= slot.fill_tokens:
        count = slot.fill_tokens // n.prefix_block_tokens
        place = prompt.hash_at + count - 1
        if block_of_id[hash_ids[place]] == 0:
            number = n.free_prefix_block  # free numbers form a list, linked by ``free_run``
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
        slot.fill_tokens = (count + 1) * n.prefix_block_tokens if count < prompt.prefix_blocks else FILLED


@compiled()
def _fill_answer(s: Table, i: int) -> None:
    """Add the prefix blocks of the answer of slot i, whose request ends, if its prompt's were not refused."""
    n, slot = counters_of(s), slots_of(s)[i]
    prompt = prompts_of(s)[slot.request]
    if slot.fill_tokens == FILLED and prompt.answer_blocks > prompt.prefix_blocks:
        slot.fill_tokens = (prompt.prefix_blocks + 1) * n.prefix_block_tokens
        prompt.prefix_blocks = prompt.answer_blocks
        _fill_cache(s, i)


@compiled()
def _release_prefix_blocks(s: Table, i: int) -> None:
    """Stop holding slot i's prefix blocks, from the last to the first, after its own KV blocks were freed."""
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
            _forget_prefix_block(s, number)  # the pool is in debt and will absorb some of its KV blocks
        block.holders -= 1
        if block.holders > 0:
            continue
        if block.hash_id >= 0:
            _release(s, kv_blocks, NO_OWNER - number)
        else:  # no request can find it: its number is free for a new block
            _release(s, kv_blocks, NO_OWNER)
            block.holders, block.free_run = -1, n.free_prefix_block
            n.free_prefix_block = number


@compiled(once=True)
def _forget_prefix_blocks(s: Table) -> None:
    """Clear the cache; running requests keep the prefix blocks that they hold, and add no more."""
    n, slots, blocks = counters_of(s), slots_of(s), prefix_blocks_of(s)
    for i in range(len(slots)):
        slots[i].fill_tokens = NEVER
    for number in range(1, n.prefix_block_count + 1):
        if blocks[number].holders >= 0 and blocks[number].hash_id >= 0:
            _forget_prefix_block(s, number)
