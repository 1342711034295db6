"""Running requests: those that decode all gain a token in every decoding iteration, and are not touched one by one.

One clock counts these iterations, and a slot remembers the clock at which it joined. Sums over the decodes price an
iteration; a histogram of their contexts modulo the KV block gives the blocks an iteration takes; ``next_due`` is the
next clock at which one of them is done. So an iteration costs O(1), and O(1) for each chunk, admission and preemption;
a finish costs one pass over the slots.
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
    """Bring the record of a decoding request up to the clock."""
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
    """Bring the records of all decoding requests up to the clock."""
    slots = slots_of(s)
    end = len(slots) - 1
    i = slots[end].next
    while i != end:
        if due_clocks_of(s)[i] != NEVER:
            _settle_one(s, i)
        i = slots[i].next


@compiled()
def _group_of(s: Table, last_token_s: float) -> int:
    """Return the group of requests whose last token is of this time; a new one if there is none."""
    n, groups = counters_of(s), last_token_groups_of(s)
    for group in range(n.group_count - 1, -1, -1):
        if groups[group].last_token_s == last_token_s:
            return group
    if n.group_count == len(groups) - 1:  # some are empty then, for there are fewer running requests
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
    """Count a slot, whose record is up to date, among those that gain a token in every decoding iteration."""
    n, slot, phases = counters_of(s), slots_of(s)[i], blocks_due_by_phase_of(s)
    request, held_set = requests_of(s)[slot.request], kv_sets_of(s)[slot.kv_set]
    # At clock c it has since + c tokens, so it takes a KV block a layer when that is a multiple of block_tokens.
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
    """Undo `_join_decodes`; the record is up to date afterwards."""
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
    """Count all decoding requests again; their records are up to date."""
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
def _link_slot(s: Table, r: int, kv_set: int, kv_keep_id: int) -> int:
    """Give a request a free slot as the newest that runs; return the slot."""
    n, slots = counters_of(s), slots_of(s)
    end = len(slots) - 1
    n.running += 1
    i, newest = free_slots_of(s)[end - n.running], slots[end].previous
    slot = slots[i]
    slots[newest].next, slot.previous, slot.next, slots[end].previous = i, newest, end, i
    slot.request, slot.kv_set, slot.kv_keep_id = r, kv_set, kv_keep_id
    slot.shared_blocks, slot.fill_tokens, due_clocks_of(s)[i] = 0, NEVER, NEVER
    return int(i)


@compiled()
def _unlink_slot(s: Table, i: int) -> None:
    """Free a slot."""
    n, slots = counters_of(s), slots_of(s)
    before, after = slots[i].previous, slots[i].next
    slots[before].next, slots[after].previous = after, before
    free_slots_of(s)[len(slots) - 1 - n.running] = i
    n.running -= 1
    if slots[i].kv_keep_id >= 0:
        n.windowed -= 1


@compiled()
def _preempt(s: Table, i: int) -> int:
    """Take a running request's KV and put it back at the head of the queue; return the tokens it had computed."""
    n, slot = counters_of(s), slots_of(s)[i]
    if due_clocks_of(s)[i] != NEVER:
        _leave_decodes(s, i)
    r = slot.request
    request = requests_of(s)[r]
    computed = request.computed_tokens
    held = blocks_of(s, i, computed)
    # It may go on from its KV only if that has every token and exactly the layers that prefill runs.
    whole = slot.kv_keep_id < 0 and slot.kv_set == n.prefill_set
    whole = whole and slot.shared_blocks == _prefix_blocks_in(s, r, computed) * n.prefix_block_kv_blocks
    if whole and slot.shared_blocks > 0:  # its prefix blocks are forgotten all or none
        whole = prefix_blocks_of(s)[held_prefix_blocks_of(s)[prompts_of(s)[r].hash_at]].hash_id >= 0
    _unlink_slot(s, i)
    n.running_tokens -= computed
    _release(s, held, r if n.reuse_preempted_kv and whole else NO_OWNER)
    if slot.shared_blocks > 0:
        _release_prefix_blocks(s, i)
    request.computed_tokens = _found_again(s, r)
    request.preemptions += 1
    request.status = WAITING
    preempted_stack_of(s)[n.preempted_waiting] = r
    n.preempted_waiting += 1
    n.waiting_tokens += request.prompt_tokens + request.produced_tokens
    n.preemptions += 1
    return int(computed)
