"""Running requests. All decoding requests gain one token in every decoding iteration, without a loop over them.

``clock`` counts the decoding iterations, and a slot remembers the clock at which its request joined the decodes. Kept
up to date instead of single requests: sums over the decodes, which price an iteration (``kv_sets``, and ``layer_kv``
for those that keep only a part of their KV); a histogram of their contexts modulo the KV block, which gives the blocks
that an iteration takes (``blocks_due_by_phase``); and ``next_due``, the next clock at which a request has its last
token. So an iteration costs O(1), plus O(1) for each chunk, admission and preemption; a finish costs one pass over the
slots. A request that keeps only a part of its KV costs one pass over the layers when it joins, leaves, or has as many
tokens as a layer keeps.
"""

from __future__ import annotations

from typing import Any

from sim.compiled import compiled, constant
from sim.cost.kv_format import HIDDEN_ROW
from sim.engine.kernel.kv import _found_again, _prefix_blocks_in, _release, blocks_of
from sim.engine.kernel.layout import Table
from sim.engine.kernel.prefix_cache import _release_prefix_blocks
from sim.engine.kernel.state import (
    NEVER,
    NO_OWNER,
    WAITING,
    Ints,
    _has,
    blocks_due_by_phase_of,
    counters_of,
    due_clocks_of,
    free_slots_of,
    held_prefix_blocks_of,
    kv_format_bits_of,
    kv_format_tokens_of,
    kv_precisions_of,
    kv_set_words_of,
    kv_sets_of,
    last_token_groups_of,
    layer_kv_of,
    preempted_stack_of,
    prefix_blocks_of,
    prompts_of,
    requests_of,
    slots_of,
)

ONE = constant(1)


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


@compiled(once=True)
def _low_blocks_due(s: Table) -> int:
    """Return the KV blocks that decoding requests take in this clock's iteration, below 16 bits or as hidden states."""
    n, phases, precisions, due = counters_of(s), blocks_due_by_phase_of(s), kv_precisions_of(s), 0
    for precision in range(1, len(precisions)):
        due += phases[precision, -n.clock % precisions[precision].block_tokens]
    return int(due)


@compiled(inline=True)
def blocks_due(s: Table) -> int:
    """Return the KV blocks, over all layers, that the decoding requests take in the iteration of this clock."""
    n = counters_of(s)
    due = blocks_due_by_phase_of(s)[0, -n.clock % n.block_tokens]
    return int(due + _low_blocks_due(s)) if n.formatted_decodes > 0 else int(due)


@compiled()
def _limit_clock(s: Table, i: int, tokens: int) -> int:
    """Return the clock at which slot i, which stores this many tokens now, reaches the next limit of its layers.

    NEVER if there is none.
    """
    kept, number, held_set = kv_format_tokens_of(s), slots_of(s)[i].kv_format_id, slots_of(s)[i].kv_set
    limit = NEVER
    for layer in range(kept.shape[1]):
        if tokens < kept[number, layer] < limit and _has(kv_set_words_of(s), held_set, layer):
            limit = kept[number, layer]
    return int(limit - tokens + counters_of(s).clock) if limit < NEVER else int(NEVER)


@compiled(once=True)
def _sum_formatted(s: Table, i: int, times: int) -> None:
    """Add slot i, which keeps only a part of its KV, to the sums over decodes (times 1), or take it out of them (-1).

    A layer gains a token in every iteration, or none once it has as many as it keeps. `reach_limits` moves it from one
    to the other.
    """
    n, slot, phases, layer_kv = counters_of(s), slots_of(s)[i], blocks_due_by_phase_of(s), layer_kv_of(s)
    kept, bits, number = kv_format_tokens_of(s), kv_format_bits_of(s), slot.kv_format_id
    tokens = requests_of(s)[slot.request].computed_tokens
    stored = tokens - slot.saved_tokens
    if times > 0:
        slot.summed_tokens, slot.limit_clock = stored, _limit_clock(s, i, stored)
        n.next_limit = min(n.next_limit, slot.limit_clock)
    n.formatted_decodes += times
    n.formatted_tokens += times * (tokens - n.clock)
    since = stored - n.clock
    for layer in range(len(layer_kv)):
        if not _has(kv_set_words_of(s), slot.kv_set, layer):
            continue
        row, precision = layer_kv[layer], kv_precisions_of(s)[bits[number, layer]]
        row.decodes += times
        if kept[number, layer] <= slot.summed_tokens:
            row.bytes += times * kept[number, layer] * precision.token_bytes
        else:
            row.bytes += times * since * precision.token_bytes
            row.token_bytes += times * precision.token_bytes
            phases[bits[number, layer], since % precision.block_tokens] += times
        if bits[number, layer] == HIDDEN_ROW:  # of all tokens: no plan drops some of them
            row.hidden += times
            row.hidden_tokens += times * since


@compiled(once=True)
def reach_limits(s: Table) -> None:
    """Let the layers that have as many tokens as they keep gain no more; due when the clock is at ``next_limit``."""
    n, slots = counters_of(s), slots_of(s)
    end, n.next_limit = len(slots) - 1, NEVER
    i = slots[end].next
    while i != end:
        if due_clocks_of(s)[i] != NEVER and slots[i].kv_format_id >= 0:
            if slots[i].limit_clock <= n.clock:
                _settle_one(s, i)
                _sum_formatted(s, i, -ONE)
                _sum_formatted(s, i, ONE)
            n.next_limit = min(n.next_limit, slots[i].limit_clock)
        i = slots[i].next


@compiled(inline=True)
def _sum_whole(phases: Ints, held_set: Any, since: int, block_tokens: int, times: int) -> None:
    """Add a request that keeps all of its KV to the sums over decodes (times 1), or take it out of them (-1).

    At clock c it has since + c tokens; if that is a multiple of block_tokens, its next token needs new KV blocks.
    phases: ``blocks_due_by_phase``. held_set: its row of ``kv_sets``.
    """
    phases[0, since % block_tokens] += times * held_set.layers
    held_set.decodes += times
    held_set.context_tokens += times * since


@compiled(inline=True)
def _sum_decode(s: Table, i: int, times: int) -> None:
    """Add slot i, whose record is up to date, to the sums over decodes (times 1), or take it out of them (-1)."""
    n, slot = counters_of(s), slots_of(s)[i]
    if slot.kv_format_id >= 0:
        _sum_formatted(s, i, times)
        return
    since = requests_of(s)[slot.request].computed_tokens - n.clock
    _sum_whole(blocks_due_by_phase_of(s), kv_sets_of(s)[slot.kv_set], since, n.block_tokens, times)


@compiled()
def empty_sums(s: Table) -> None:
    """Take all decoding requests out of the sums over decodes."""
    n, layer_kv = counters_of(s), layer_kv_of(s)
    blocks_due_by_phase_of(s)[:] = 0
    for k in range(n.kv_set_count):
        kv_sets_of(s)[k].decodes = kv_sets_of(s)[k].context_tokens = 0
    if n.formatted_decodes > 0:
        for layer in range(len(layer_kv)):
            layer_kv[layer].decodes = layer_kv[layer].bytes = layer_kv[layer].token_bytes = 0
            layer_kv[layer].hidden = layer_kv[layer].hidden_tokens = 0
    n.formatted_decodes = n.formatted_tokens = 0
    n.next_limit = NEVER


@compiled()
def _join_decodes(s: Table, i: int) -> None:
    """Add slot i, whose record is up to date, to the group of decodes."""
    n, slot = counters_of(s), slots_of(s)[i]
    request = requests_of(s)[slot.request]
    slot.joined_clock = n.clock
    _sum_decode(s, i, ONE)
    n.decoding += 1
    due_clock = n.clock + request.output_limit_tokens - request.produced_tokens
    due_clocks_of(s)[i] = due_clock
    n.next_due = min(n.next_due, due_clock)
    last_token_groups_of(s)[_group_of(s, request.last_token_s)].requests += 1


@compiled()
def _leave_decodes(s: Table, i: int) -> None:
    """Undo `_join_decodes` and bring the record up to date."""
    _settle_one(s, i)
    n, request = counters_of(s), requests_of(s)[slots_of(s)[i].request]
    _sum_decode(s, i, -ONE)
    n.decoding -= 1
    due_clocks_of(s)[i] = NEVER
    last_token_groups_of(s)[_group_of(s, request.last_token_s)].requests -= 1


@compiled()
def _count_decodes(s: Table) -> None:
    """Build the group of decodes again from the records, which are up to date."""
    n, requests, slots, groups = counters_of(s), requests_of(s), slots_of(s), last_token_groups_of(s)
    end = len(slots) - 1
    empty_sums(s)
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
