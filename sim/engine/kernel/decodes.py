"""Running requests. All decoding requests gain one token in every decoding iteration, without a loop over them.

``clock`` counts the decoding iterations, and a slot remembers the clock at which its request joined the decodes. Kept
up to date instead of single requests: sums over the decodes, which price an iteration (``kv_sets``); a histogram of
their contexts modulo the KV block, which gives the blocks that an iteration takes (``blocks_due_by_phase``); and
``next_due``, the next clock at which a request has its last token. So an iteration costs O(1), plus O(1) for each
chunk, admission and preemption; a finish costs one pass over the slots.
"""

from __future__ import annotations

from sim.compiled import compiled
from sim.engine.kernel.kv import _found_again, _prefix_blocks_in, _release, blocks_of
from sim.engine.kernel.layout import Table
from sim.engine.kernel.prefix_cache import _release_prefix_blocks
from sim.engine.kernel.state import (
    NEVER,
    NO_OWNER,
    WAITING,
    blocks_due_by_phase_of,
    counters_of,
    due_clocks_of,
    free_slots_of,
    held_prefix_blocks_of,
    kv_sets_of,
    last_token_groups_of,
    preempted_stack_of,
    prefix_blocks_of,
    prompts_of,
    requests_of,
    slots_of,
)


@compiled()
def _settle_one(s: Table, i: int) -> None:
    """Bring the record of a decoding request up to date."""
    n, slot = counters_of(s), slots_of(s)[i]
    request, held_set, since = requests_of(s)[slot.request], kv_sets_of(s)[slot.kv_set], n.clock - slot.joined_clock
    if since > 0:
        request.computed_tokens += since
        request.produced_tokens += since
        request.kept_params += since * held_set.decode_params
        request.nll_sum += since * held_set.decode_nll
        request.last_token_s = last_token_groups_of(s)[0].last_token_s
        slot.joined_clock = n.clock


@compiled()
def settle(s: Table) -> None:
    """Bring the records of all decoding requests up to date."""
    slots = slots_of(s)
    end = len(slots) - 1
    i = slots[end].next
    while i != end:
        if due_clocks_of(s)[i] != NEVER:
            _settle_one(s, i)
        i = slots[i].next


@compiled()
def _group_of(s: Table, last_token_s: float) -> int:
    """Return the group of requests that got their last token at this time; make a new one if there is none."""
    n, groups = counters_of(s), last_token_groups_of(s)
    for group in range(n.group_count - 1, -1, -1):
        if groups[group].last_token_s == last_token_s:
            return group
    if n.group_count == len(groups) - 1:  # there are more groups than running requests: remove the empty ones
        to = 1
        for group in range(1, n.group_count):
            if groups[group].requests > 0:
                groups[to].last_token_s, groups[to].requests = groups[group].last_token_s, groups[group].requests
                to += 1
        n.group_count = to
    group = n.group_count
    groups[group].last_token_s, groups[group].requests = last_token_s, 0
    n.group_count = group + 1
    return int(group)


@compiled()
def _join_decodes(s: Table, i: int) -> None:
    """Add slot i, whose record is up to date, to the group of decodes."""
    n, slot, phases = counters_of(s), slots_of(s)[i], blocks_due_by_phase_of(s)
    request, held_set = requests_of(s)[slot.request], kv_sets_of(s)[slot.kv_set]
    # At clock c it has since + c tokens; if that is a multiple of block_tokens, its next token needs new KV blocks.
    since = request.computed_tokens - n.clock
    slot.joined_clock = n.clock
    phases[since % n.block_tokens] += held_set.layers
    held_set.decodes += 1
    held_set.context_tokens += since
    n.decoding += 1
    due_clock = n.clock + request.output_limit_tokens - request.produced_tokens
    due_clocks_of(s)[i] = due_clock
    n.next_due = min(n.next_due, due_clock)
    last_token_groups_of(s)[_group_of(s, request.last_token_s)].requests += 1


@compiled()
def _leave_decodes(s: Table, i: int) -> None:
    """Undo `_join_decodes` and bring the record up to date."""
    _settle_one(s, i)
    n, slot, phases = counters_of(s), slots_of(s)[i], blocks_due_by_phase_of(s)
    request, held_set = requests_of(s)[slot.request], kv_sets_of(s)[slot.kv_set]
    since = request.computed_tokens - n.clock
    phases[since % n.block_tokens] -= held_set.layers
    held_set.decodes -= 1
    held_set.context_tokens -= since
    n.decoding -= 1
    due_clocks_of(s)[i] = NEVER
    last_token_groups_of(s)[_group_of(s, request.last_token_s)].requests -= 1


@compiled()
def _count_decodes(s: Table) -> None:
    """Build the group of decodes again from the records, which are up to date."""
    n, requests, slots = counters_of(s), requests_of(s), slots_of(s)
    sets, groups, phases = kv_sets_of(s), last_token_groups_of(s), blocks_due_by_phase_of(s)
    end = len(slots) - 1
    phases[:] = 0
    for k in range(n.kv_set_count):
        sets[k].decodes = sets[k].context_tokens = 0
    n.decoding, n.group_count, n.next_due = 0, 1, NEVER
    groups[0].last_token_s, groups[0].requests = n.now_s, 0
    i = slots[end].next
    while i != end:
        due_clocks_of(s)[i] = NEVER
        request = requests[slots[i].request]
        if request.computed_tokens >= request.prefill_tokens:
            _join_decodes(s, i)
        i = slots[i].next


@compiled(inline=True)
def _link_slot(s: Table, r: int, kv_set: int, kv_format_id: int) -> int:
    """Give request r a free slot, as the newest running request; return the slot."""
    n, slots = counters_of(s), slots_of(s)
    end = len(slots) - 1
    n.running += 1
    i, newest = free_slots_of(s)[end - n.running], slots[end].previous
    slot = slots[i]
    slots[newest].next, slot.previous, slot.next, slots[end].previous = i, newest, end, i
    slot.request, slot.kv_set, slot.kv_format_id = r, kv_set, kv_format_id
    slot.saved_tokens, slot.shared_blocks, slot.fill_tokens, due_clocks_of(s)[i] = 0, 0, NEVER, NEVER
    return int(i)


@compiled()
def _unlink_slot(s: Table, i: int) -> None:
    """Free slot i."""
    n, slots = counters_of(s), slots_of(s)
    before, after = slots[i].previous, slots[i].next
    slots[before].next, slots[after].previous = after, before
    free_slots_of(s)[len(slots) - 1 - n.running] = i
    n.running -= 1
    if slots[i].kv_format_id >= 0:
        n.formatted -= 1


@compiled()
def _preempt(s: Table, i: int) -> int:
    """Free or swap out the KV of slot i and put its request at the head of the queue.

    Returns:
        The tokens it had computed, 0 if it keeps them in host memory.
    """
    n, slot = counters_of(s), slots_of(s)[i]
    if due_clocks_of(s)[i] != NEVER:
        _leave_decodes(s, i)
    r = slot.request
    request = requests_of(s)[r]
    computed = request.computed_tokens
    held = blocks_of(s, i, computed)
    runs = n.decode_set if computed >= request.prefill_tokens else n.prefill_set
    swaps = 0 < held <= n.host_free_blocks and slot.kv_format_id < 0 and slot.kv_set == runs
    # It can resume only from complete KV: every token, exactly the layers that prefill runs, every prefix block.
    complete = slot.kv_format_id < 0 and slot.kv_set == n.prefill_set
    complete = complete and slot.shared_blocks == _prefix_blocks_in(s, r, computed) * n.prefix_block_kv_blocks
    if complete and slot.shared_blocks > 0:  # all of its prefix blocks can be found, or none: check the first
        complete = prefix_blocks_of(s)[held_prefix_blocks_of(s)[prompts_of(s)[r].hash_at]].hash_id >= 0
    _unlink_slot(s, i)
    n.running_tokens -= computed
    _release(s, held, r if n.reuse_preempted_kv and complete and not swaps else NO_OWNER)
    if slot.shared_blocks > 0:
        _release_prefix_blocks(s, i)
    if swaps:
        request.host_blocks = held
        n.host_free_blocks -= held
        n.moved_blocks += held
    else:
        request.computed_tokens = _found_again(s, r)
    request.preemptions += 1
    request.status = WAITING
    preempted_stack_of(s)[n.preempted_waiting] = r
    n.preempted_waiting += 1
    n.waiting_tokens += request.prompt_tokens + request.produced_tokens
    n.preemptions += 1
    return 0 if swaps else int(computed)
